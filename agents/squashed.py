"""SAC's policy: a Gaussian squashed by tanh, with its gradients written out.

As in Stable-Baselines3: log standard deviations are clipped to [-20, 2], and 1e-6 keeps the
logarithm of the squashing's slope finite.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perennial.agents.aside import Step
from perennial.plasticity import kernels

_LOW, _HIGH = -20.0, 2.0
_EPSILON = 1e-6
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Squashed(NamedTuple):
    """A sample of the policy and what its gradient needs; actions may be part of wider rows."""

    actions: Tensor  # [S, B, A] in (-1, 1)
    log_prob: Tensor  # [S, B]
    stretched: Tensor  # [S, B, A], deviation times noise
    inside: Tensor  # [S, B, A], 1 where the log deviation is not clipped


class SquashedGaussian:
    """Actions tanh(mean + exp(log_std) noise); network outputs are means, then log deviations."""

    def __init__(self, size: int):
        self.size = size

    def act(self, output: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions [S, E, A] of outputs [S, E, 2A], on the host."""
        mean, log_std = np.split(output, 2, axis=-1)
        return np.tanh(mean + np.exp(np.clip(log_std, _LOW, _HIGH)) * noise)

    def sample(self, output: Tensor, noise: Tensor) -> Squashed:
        """Actions of outputs [S, B, 2A] and noise [S, B, A], with their log density."""
        mean, raw = output.chunk(2, -1)
        log_std = raw.clamp(_LOW, _HIGH)
        stretched = log_std.exp() * noise
        actions = torch.tanh(mean + stretched)
        gaussian = noise.square().mul_(-0.5).sub_(log_std).sub_(_HALF_LOG_2PI).sum(-1)
        slope = torch.log(1.0 - actions.square() + _EPSILON).sum(-1)
        inside = ((raw >= _LOW) & (raw <= _HIGH)).to(raw.dtype)
        return Squashed(actions, gaussian - slope, stretched, inside)

    def space(self, actions: Tensor, log_prob: Tensor) -> Squashed:
        """Memory of a sample whose actions and log density have theirs already."""
        shape = *log_prob.shape, self.size
        return Squashed(actions, log_prob, log_prob.new_empty(shape), log_prob.new_empty(shape))

    def sample_later(self, output: Tensor, noise: Tensor, found: Squashed) -> Step:
        """`sample` into `found`."""
        if kernels.ready(output, noise):
            return partial(_sample, *map(kernels.array, (output, noise, *found)))

        def run() -> None:
            for target, value in zip(found, self.sample(output, noise), strict=True):
                target.copy_(value)

        return run

    def gradient(self, policy: Squashed, d_value: Tensor, ent_coef: Tensor) -> Tensor:
        """Gradient [S, B, 2A] of `ent_coef log_prob - value` by the outputs, per row.

        d_value [S, B, A]: gradient of the value by the actions; ent_coef [S].
        """
        actions, ent_coef = policy.actions, ent_coef[:, None, None]
        slope = 1.0 - actions.square()
        # log_prob depends on the mean through the squashing alone: the noise is what is given.
        d_log_prob = 2.0 * actions * slope / (slope + _EPSILON)
        d_mean = ent_coef * d_log_prob - d_value * slope
        d_log_std = (d_mean * policy.stretched - ent_coef) * policy.inside
        return torch.cat([d_mean, d_log_std], -1)

    def gradient_later(
        self, policy: Squashed, d_values: Tensor, ent_coef: Tensor, found: Tensor
    ) -> Step:
        """`gradient` of the mean over rows into `found`, the value's being the sum of `d_values`
        [S, 2, B, A]."""
        if kernels.ready(d_values, ent_coef, found):
            return partial(_gradient, *map(kernels.array, (*policy, d_values, ent_coef, found)))

        def run() -> None:
            whole = self.gradient(policy, d_values.sum(1), ent_coef)
            found.copy_(whole).div_(found.shape[1])

        return run


@kernels.compiled
def _sample(output, noise, actions, log_prob, stretched, inside):  # type: ignore[no-untyped-def]
    """`SquashedGaussian.sample` into the last four."""
    size = noise.shape[2]
    for c in range(output.shape[0]):
        for r in range(output.shape[1]):
            total = 0.0  # in double precision: no slower here
            for i in range(size):
                raw, draw = float(output[c, r, size + i]), float(noise[c, r, i])
                log_std = _LOW if raw < _LOW else _HIGH if raw > _HIGH else raw
                step = math.exp(log_std) * draw
                before = output[c, r, i] + step
                ratio = math.exp(-2.0 * abs(before))  # a third of what tanh takes
                action = math.copysign((1.0 - ratio) / (1.0 + ratio), before)
                actions[c, r, i], stretched[c, r, i] = action, step
                inside[c, r, i] = 1.0 if log_std == raw else 0.0
                total -= 0.5 * draw * draw + log_std + _HALF_LOG_2PI
                total -= math.log(1.0 - action * action + _EPSILON)
            log_prob[c, r] = total


@kernels.compiled
def _gradient(actions, _, stretched, inside, d_values, ent_coef, found):  # type: ignore[no-untyped-def]
    """`SquashedGaussian.gradient_later`."""
    number = actions.dtype.type
    one, two, epsilon = number(1), number(2), number(_EPSILON)
    size, batch = actions.shape[2], number(actions.shape[1])
    for c in range(actions.shape[0]):
        weight = ent_coef[c]
        for r in range(actions.shape[1]):
            for i in range(size):
                action = actions[c, r, i]
                slope = one - action * action
                d_mean = weight * (two * action * slope / (slope + epsilon))
                d_mean -= (d_values[c, 0, r, i] + d_values[c, 1, r, i]) * slope
                found[c, r, i] = d_mean / batch
                d_log_std = (d_mean * stretched[c, r, i] - weight) * inside[c, r, i]
                found[c, r, size + i] = d_log_std / batch
