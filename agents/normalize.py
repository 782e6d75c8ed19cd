"""Running normalisation of observations and rewards per seed, as in SB3's VecNormalize."""

from __future__ import annotations

from typing import Any

import numpy as np

_CLIP = 10.0
_EPSILON = 1e-8


class Moments:
    """Running mean and variance of rows, per copy (Chan et al.'s parallel update, float64)."""

    def __init__(self, copies: int, *shape: int):
        self.mean = np.zeros((copies, *shape))
        self.var = np.ones((copies, *shape))
        self.count = np.full(copies, 1e-4)

    def update(self, rows: np.ndarray) -> None:
        """rows [S, B, *shape]: B new rows for each copy."""
        batch = rows.shape[1]
        total = (self.count + batch).reshape(-1, *[1] * (self.mean.ndim - 1))
        count = self.count.reshape(total.shape)
        delta = rows.mean(1) - self.mean
        spread = self.var * count + rows.var(1) * batch + delta**2 * (count * batch / total)
        self.mean = self.mean + delta * (batch / total)
        self.var = spread / total
        self.count = self.count + batch

    def state(self, copy: int) -> dict[str, Any]:
        """One copy's statistics."""
        return {
            "mean": self.mean[copy].copy(),
            "var": self.var[copy].copy(),
            "count": float(self.count[copy]),
        }

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.mean[copy], self.var[copy], self.count[copy] = (
            state["mean"],
            state["var"],
            state["count"],
        )


class Normalizer:
    """Observation and reward scaling of S seeds; a part that is off passes its input through."""

    def __init__(
        self, copies: int, n_obs: int, lanes: int, norm_obs: bool, norm_reward: bool, gamma: float
    ):
        self.obs = Moments(copies, n_obs) if norm_obs else None
        self.returns = Moments(copies) if norm_reward else None
        self.discounted = np.zeros((copies, lanes))
        self.gamma = gamma

    def observe(self, observations: np.ndarray) -> np.ndarray:
        """Take observations [S, E, D] into the statistics and normalise them."""
        if self.obs is None:
            return observations
        self.obs.update(observations)
        scaled = (observations - self.obs.mean[:, None]) / np.sqrt(self.obs.var[:, None] + _EPSILON)
        return np.clip(scaled, -_CLIP, _CLIP)

    def normalize(self, observations: np.ndarray, copy: int) -> np.ndarray:
        """Normalise observations [..., D] of one seed without learning from them."""
        if self.obs is None:
            return observations
        scaled = (observations - self.obs.mean[copy]) / np.sqrt(self.obs.var[copy] + _EPSILON)
        return np.clip(scaled, -_CLIP, _CLIP)

    def reward(self, rewards: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Divide rewards [S, E] by the running standard deviation of the discounted return."""
        if self.returns is None:
            return rewards
        self.discounted = self.discounted * self.gamma + rewards
        self.returns.update(self.discounted)
        scaled = np.clip(rewards / np.sqrt(self.returns.var[:, None] + _EPSILON), -_CLIP, _CLIP)
        self.discounted[ended] = 0.0
        return scaled

    def state(self, copy: int) -> dict[str, Any]:
        """One seed's statistics."""
        return {
            "obs": self.obs.state(copy) if self.obs else None,
            "returns": self.returns.state(copy) if self.returns else None,
            "discounted": self.discounted[copy].copy(),
        }

    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        if self.obs:
            self.obs.load_state(copy, state["obs"])
        if self.returns:
            self.returns.load_state(copy, state["returns"])
        self.discounted[copy] = state["discounted"]
