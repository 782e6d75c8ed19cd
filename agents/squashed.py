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

from perennial.agents.aside import Later
from perennial.plasticity import kernels

_LOW, _HIGH = -20.0, 2.0
_EPSILON = 1e-6
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Squashed(NamedTuple):
    """A sample of the policy and what its gradient needs."""

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
        if kernels.ready(output, noise) and not output.requires_grad:
            later = self.sample_later(Later(_nothing, output), noise)
            later()
            return later.value  # type: ignore[no-any-return]
        mean, raw = output.chunk(2, -1)
        log_std = raw.clamp(_LOW, _HIGH)
        stretched = log_std.exp() * noise
        actions = torch.tanh(mean + stretched)
        gaussian = noise.square().mul_(-0.5).sub_(log_std).sub_(_HALF_LOG_2PI).sum(-1)
        slope = torch.log(1.0 - actions.square() + _EPSILON).sum(-1)
        inside = ((raw >= _LOW) & (raw <= _HIGH)).to(raw.dtype)
        return Squashed(actions, gaussian - slope, stretched, inside)

    def sample_later(self, output: Later, noise: Tensor) -> Later:
        """`sample` of an output that is made before."""
        known = output.value
        if known is None or not kernels.ready(known, noise):
            return Later(lambda: self.sample(output.value, noise))
        actions, stretched, inside = (torch.empty_like(noise) for _ in range(3))
        log_prob = noise.new_empty(noise.shape[:-1])
        arrays = map(kernels.array, (known, noise, actions, stretched, inside, log_prob))
        return Later(partial(_sample, *arrays), Squashed(actions, log_prob, stretched, inside))

    def gradient(self, policy: Squashed, d_value: Tensor, ent_coef: Tensor) -> Tensor:
        """Gradient [S, B, 2A] of `ent_coef log_prob - value` by the outputs, per row.

        d_value [S, B, A]: gradient of the value by the actions; ent_coef broadcasts to [S, B, A].
        """
        actions = policy.actions
        if kernels.ready(*policy, d_value):
            made = actions.new_empty(*actions.shape[:-1], 2 * actions.shape[-1])
            weight = ent_coef.expand(len(actions), 1, 1).contiguous()
            arrays = (actions, policy.stretched, policy.inside, d_value, weight, made)
            _gradient(*map(kernels.array, arrays))
            return made
        slope = 1.0 - actions.square()
        # log_prob depends on the mean through the squashing alone: the noise is what is given.
        d_log_prob = 2.0 * actions * slope / (slope + _EPSILON)
        d_mean = ent_coef * d_log_prob - d_value * slope
        d_log_std = (d_mean * policy.stretched - ent_coef) * policy.inside
        return torch.cat([d_mean, d_log_std], -1)


def _nothing() -> None:
    """Of an output that is there."""


@kernels.compiled
def _sample(output, noise, actions, stretched, inside, log_prob):  # type: ignore[no-untyped-def]
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
def _gradient(actions, stretched, inside, d_value, ent_coef, found):  # type: ignore[no-untyped-def]
    """`SquashedGaussian.gradient` into `found`; ent_coef [S, 1, 1]."""
    number = actions.dtype.type
    one, two, epsilon = number(1), number(2), number(_EPSILON)
    size = actions.shape[2]
    for c in range(actions.shape[0]):
        weight = ent_coef[c, 0, 0]
        for r in range(actions.shape[1]):
            for i in range(size):
                action = actions[c, r, i]
                slope = one - action * action
                d_mean = weight * (two * action * slope / (slope + epsilon))
                d_mean -= d_value[c, r, i] * slope
                found[c, r, i] = d_mean
                d_log_std = d_mean * stretched[c, r, i] - weight
                found[c, r, size + i] = d_log_std * inside[c, r, i]
