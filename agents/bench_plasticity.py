"""What each plasticity method and value loss costs: `perennial bench plasticity`.

PPO's update alone, at the ant's setting (two 256-256 networks, minibatches of 128 of 105 numbers,
one thread), on made-up transitions. Every method's update stands beside a plain one, in turn, and
only the ratio of such a pair counts: machines are noisy. Methods are measured late in a run, after
many optimizer steps, with units of all the ages that continual backprop leads to in the long run;
what happens every so many steps is measured by itself and spread over its period.

Under Adam's usual betas (0.9, 0.999) a recycled unit takes its own steps for 16,000 updates,
under (0.99, 0.99) for 1,600: recycling is measured under both.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, TextIO

from perennial.agents.config import PPOConfig, build_config
from perennial.plasticity.registry import METHODS
from perennial.plasticity.value_registry import VALUES

if TYPE_CHECKING:
    from perennial.agents.ppo import PPO

ROUNDS = 15
_BATCH, _STEPS = 128, 16  # rows and number of minibatches of one measurement
_LATE = 1_000_000  # optimizer steps done before it
_PENALTIES = ("l2", "weight-decay", "l2-init", "spectral", "parseval", "infer")
# What a method may cost at most, as a share of a plain update.
LIMITS = {"cbp": 0.10, "redo": 0.03, **dict.fromkeys(_PENALTIES, 0.10)}
_BETAS = (0.9, 0.999)  # the default; of all measurements but the second of the following
_EQUAL, _TWICE = (0.99, 0.99), ("cbp", "redo", "snr", "regrama")


class _Update:
    """PPO with or without a method, and the time of an epoch over fixed transitions."""

    def __init__(
        self,
        plasticity: tuple[str, ...],
        value_loss: str = "mse",
        betas: tuple[float, float] = _BETAS,
    ) -> None:
        import gymnasium as gym
        import numpy as np
        import torch

        from perennial.agents.ppo import PPO, Batch

        rows = _BATCH * _STEPS
        given = {
            "n_steps": rows,
            "batch_size": _BATCH,
            "n_epochs": 1,
            "learning_rate": 1e-4,
            "plasticity": plasticity,
            "value_loss": value_loss,
        }
        if betas != _BETAS:  # where they are the default, a method may set its own
            given["betas"] = betas
        config = build_config("ppo", given=given)
        assert isinstance(config, PPOConfig)
        seen, acted = (gym.spaces.Box(-np.inf, np.inf, (n,)) for n in (105, 8))
        self.agent: PPO = PPO(config, seen, acted, seeds=(0,))
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Any:
            return torch.randn(1, rows, *shape, generator=g)

        with torch.no_grad():
            observations, actions = normal(105), normal(8)
            output = self.agent.net.policy(observations)
            log_prob = self.agent.net.distribution.log_prob(output, actions)
        self.batch = Batch(observations, actions, log_prob, normal(), normal(), normal())
        self.order = torch.arange(rows).view(1, 1, rows)

    def seconds(self) -> float:
        """Processor time of one epoch: on one thread the wall's, less what other programs take."""
        begun = time.thread_time()
        self.agent.learn(self.batch, self.order)
        return time.thread_time() - begun

    def at(self, updates: int) -> None:
        """Go on as if so many optimizer steps were done."""
        handle, optimizer = self.agent.handle, self.agent.optimizer
        state = handle.state_dict()
        state["updates"].fill_(updates)
        for name, method in handle.interventions.items():
            if f"{name}.age" in state:
                ages = self._ages(method)
                state[f"{name}.age"].copy_(ages)
                state["moments.birth"][:, :-1].copy_(updates - ages)
        handle.load_state_dict(state)
        for kept in optimizer.state.values():
            kept["step"].fill_(updates)

    def _ages(self, method: Any) -> Any:
        """Ages `[1, units]` in the long run of recycling at `rate` from `maturity` on: even up to
        there, then falling off exponentially."""
        import torch

        total = self.agent.units.total
        lengths = torch.randperm(total, generator=torch.Generator().manual_seed(0)).double()
        lengths = (lengths + 0.5) / total * (method.maturity + 1 / method.rate)
        beyond = (lengths - method.maturity).clamp(min=0) * method.rate
        older = method.maturity - torch.log1p(-beyond) / method.rate
        return torch.where(beyond > 0, older, lengths).long().clamp(min=1).unsqueeze(0)


def _periods(name: str) -> list[int]:
    """Steps between events of a method that one measurement may not hold."""
    params = METHODS[name].params
    steps = [int(params[key].default) for key in ("every", "check") if key in params]
    return [period for period in steps if period > _STEPS]


def _cost(update: _Update, plain: _Update, periods: list[int], rounds: int) -> list[float]:
    """Extra time of a step over a plain one, once per round."""
    costs = []
    for k in range(rounds):
        events = 0.0
        for period in periods:
            # The event is the last step but one; what follows from it belongs to the usual cost.
            update.at((_LATE // period + k) * period - _STEPS + 1)
            base = plain.seconds()
            events += (update.seconds() / base - 1) * _STEPS / period
        if k == 0 or periods:
            update.at(_LATE + 1 + 2 * _STEPS * k)
        base = plain.seconds()
        usual = update.seconds() / base - 1
        share = sum(_STEPS / period for period in periods)
        costs.append(usual * max(0.0, 1 - share) + events)
    return costs


def bench_plasticity(stream: TextIO, rounds: int = ROUNDS) -> dict[str, Any]:
    """Cost of every method and value loss over PPO's plain update."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain = _Update(())
        plain.seconds()
        costs: dict[str, list[float]] = {}
        print(
            f"cost over PPO's plain update, % (median of the rounds); Adam's betas {_BETAS}, "
            f"second line {_EQUAL}",
            file=stream,
        )

        def measure(title: str, update: _Update, name: str) -> None:
            update.seconds()
            periods = _periods(name) if name in METHODS else []
            costs[title] = _cost(update, plain, periods, rounds)
            limit = f"  (at most {100 * LIMITS[name]:.0f})" if name in LIMITS else ""
            value = 100 * statistics.median(costs[title])
            print(f"  {title:20s} {value:7.1f}{limit}", file=stream, flush=True)

        for name in METHODS:
            measure(name, _Update((name,)), name)
            if name in _TWICE:
                measure(f"{name} {_EQUAL[0]}", _Update((name,), betas=_EQUAL), name)
        for name in VALUES:
            if name != "mse":
                measure(name, _Update((), name), name)
        step = 1e3 * statistics.median(plain.seconds() for _ in range(rounds)) / _STEPS
        print(f"  a plain step takes {step:.2f} ms", file=stream)
    finally:
        torch.set_num_threads(threads)
    return {"costs": costs, "plain_step_ms": step}
