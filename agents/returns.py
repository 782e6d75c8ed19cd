"""Returns and advantages of a rollout: generalised advantage estimation.

Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def generalised_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    ends: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """Advantages [T, N] (float64) of a rollout of T steps on N lanes.

    delta_t = r_t + gamma V(s_t+1) (1 - end_t) - V(s_t)
    A_t = delta_t + gamma lambda (1 - end_t) A_t+1

    Args:
        rewards: [T, N]; where a time limit cut an episode, gamma V(final observation) is already
        added. values: [T, N], V(s_t). next_values: [N], V of the observation after the rollout.
        ends: [T, N] bool, whether the episode ended at step t (terminated or truncated).
    """
    steps, lanes = rewards.shape
    following = np.empty((steps, lanes), np.float64)
    following[:-1] = values[1:]
    following[-1] = next_values
    goes_on = 1.0 - ends
    delta = rewards + gamma * following * goes_on - values
    decay = gamma * gae_lambda * goes_on
    advantages = np.empty((steps, lanes), np.float64)
    # The recursion is serial; plain floats are several times faster here than numpy rows of one or
    # two lanes.
    for lane in range(lanes):
        deltas, decays = delta[:, lane].tolist(), decay[:, lane].tolist()
        last = 0.0
        for t in range(steps - 1, -1, -1):
            last = deltas[t] + decays[t] * last
            deltas[t] = last
        advantages[:, lane] = deltas
    return advantages


def explained_variance(values: Tensor, returns: Tensor) -> np.ndarray:
    """1 - Var(returns - values) / Var(returns) of [S, n]: [S]; nan where returns are equal."""
    spread = returns.double().var(-1, correction=0).cpu().numpy()
    left = (returns - values).double().var(-1, correction=0).cpu().numpy()
    return 1.0 - left / np.where(spread > 0, spread, np.nan)
