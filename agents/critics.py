"""Twin critics of S seeds as one batched network of 2S copies, with their targets."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perennial.agents.aside import Aside, Later
from perennial.agents.config import SACConfig
from perennial.agents.networks import MLP, WrittenOut
from perennial.agents.passes import Passes, passes
from perennial.agents.streams import torch_generator
from perennial.agents.weights import load_weights, weights_of
from perennial.plasticity import attach, find_units, kernels, make, metrics, values
from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import Init
from perennial.plasticity.flat import together

TWINS = 2


class TwinCritics:
    """Critic i of seed s is copy 2s + i; with two threads each core serves half of the copies."""

    def __init__(
        self,
        config: SACConfig,
        sizes: tuple[int, int],
        seeds: tuple[int, ...],
        like: Tensor,
        threaded: bool,
    ):
        self.codec = values.make(config.value_loss)
        copies, (n_obs, n_act) = len(seeds) * TWINS, sizes
        init = Init("torch-default", bias="torch-default")
        generators = [torch_generator(s, f"init critic {i}") for s in seeds for i in range(TWINS)]
        widths = (n_obs + n_act, *config.net_arch, self.codec.outputs)
        self.net = MLP(copies, widths, config.activation, init, init, generators)
        rewrite(self.net, config.interventions, generators=generators)
        self.net.to(like)
        self.targets = copying.deepcopy(self.net).requires_grad_(False)
        self.optimizer = BatchedAdam(
            self.net.parameters(), config.learning_rate, config.betas, config.adam_eps
        )
        self.optimizer.keep_gradients()
        self.optimizer.prepare()
        self.units = find_units(self.net, like.new_zeros(copies, 1, n_obs + n_act))
        self.handle = attach(
            [make(spec) for spec in config.interventions],
            self.units,
            self.optimizer,
            # Streams of their own: beyond any seed of an actor.
            seeds=[s + ((i + 1) << 33) for s in seeds for i in range(TWINS)],
            hooks=False,
            targets=[self.targets],
        )
        self.aside = Aside(threaded and WrittenOut.fits(self.net))
        middle = copies // 2
        self.cuts = (
            [slice(0, middle), slice(middle, copies)] if self.aside.threaded else [slice(None)]
        )
        self.online, self.delayed = self._passes(self.net), self._passes(self.targets, False)
        self.memories = _memory(self.targets), _memory(self.net)

    def _passes(self, net: MLP, learns: bool = True) -> list[Passes]:
        if len(self.cuts) == 1:
            return [passes(net, learns)]
        return [passes(net, learns, cut) for cut in self.cuts]

    def look(
        self, now: tuple[Tensor, Tensor], following: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Outputs [S, 2, B, m] `now`, from which `learn` goes on, and the targets' of `following`.

        Each on observations [S, B, D] and actions [S, B, A].
        """
        pairs, ahead = torch.cat(now, -1), torch.cat(following, -1)
        record = self.units.record if self.handle.observes and len(self.cuts) == 1 else None
        jobs = [
            (q.forward_later(_twice(ahead, cut)), p.forward_later(_twice(pairs, cut), record))
            for p, q, cut in zip(self.online, self.delayed, self.cuts, strict=True)
        ]
        self.aside.run(*jobs)
        if self.handle.observes and record is None:
            self._record()
        future, outputs = (_values(halves) for halves in zip(*jobs, strict=True))
        return outputs, future

    def _record(self) -> None:
        """Tell the methods of both halves' activations."""
        halves = [p for p in self.online if isinstance(p, WrittenOut)]
        for k, layer in enumerate(halves[0].layers):
            inputs = [p.hidden[k] for p in halves]
            led = [x if x.ndim == 3 else x[None] for x in inputs]
            self.units.record(layer, torch.cat(led))

    def learn(
        self,
        outputs: Tensor,
        future: Tensor,
        rewards: Tensor,
        discounts: Tensor,
        ahead: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """One step towards `rewards + discounts * the smaller of the targets' next values`: losses
        [S], half the sum over the twins, and outputs [S, 2, B, m] after it on observations and
        actions `ahead`, of which `action_gradient` will be asked for.

        outputs, future [S, 2, B, m]: what `look` returned; rewards, discounts [S, B].
        """
        loss, gradient = self._errors(outputs, future, rewards, discounts)
        flat = gradient.flatten(0, 1)
        pairs = torch.cat(ahead, -1)
        backward = self._each(lambda part, cut: part.backward_later(flat[cut]))
        evaluate = self._each(lambda part, cut: part.forward_later(_twice(pairs, cut), None, True))
        # Methods act on both halves at once, between their gradients and what comes after.
        if len(self.cuts) > 1 and not self.handle.interventions and self.optimizer.compiled:
            steps = [self.optimizer.calls(range(len(flat))[cut]) for cut in self.cuts]
            halves = zip(backward, steps, evaluate, strict=True)
            self.aside.run(*((back, *map(Later, step), ahead) for back, step, ahead in halves))
        else:
            self._run(backward)
            self.handle.before_step()
            self.optimizer.move()
            self.handle.after_step()
            self._run(evaluate)
        return loss, _values(evaluate)

    def _errors(
        self, outputs: Tensor, future: Tensor, rewards: Tensor, discounts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses [S] and their gradient [S, 2, B, m] by the outputs."""
        given = outputs, future, rewards, discounts
        if isinstance(self.codec, values.MSE) and kernels.ready(*given):
            gradient, loss = torch.empty_like(outputs), rewards.new_empty(len(rewards))
            _twin_errors(*map(kernels.array, (*given, gradient, loss)))
            return loss, gradient
        goal = self.codec.backup(self.codec.smallest(future, dim=1), rewards, discounts)
        loss, gradient = self.codec.loss(outputs, goal[:, None])
        return 0.5 * loss.mean(-1).sum(1), gradient * (0.5 / loss.shape[-1])

    def lesser(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The smaller of the twins' values [S, B] and its gradient by the outputs [S, 2, B, m];
        where both are equal they share it."""
        if isinstance(self.codec, values.MSE) and kernels.ready(outputs):
            low, gradient = outputs[:, 0, :, 0].contiguous(), torch.empty_like(outputs)
            _lesser(*map(kernels.array, (outputs, low, gradient)))
            return low, gradient
        q, gradient = self.decode(outputs)
        low = q.amin(1, keepdim=True)
        share = (q == low).to(q.dtype)
        share = share / share.sum(1, keepdim=True)
        return low[:, 0], gradient * share[..., None]

    def _each(self, make: Callable[[Passes, slice], Later]) -> list[Later]:
        """One computation for each half, of its passes and copies."""
        return [make(part, cut) for part, cut in zip(self.online, self.cuts, strict=True)]

    def _run(self, halves: Sequence[Later]) -> None:
        self.aside.run(*([half] for half in halves))

    def action_gradient(self, gradient: Tensor, n_act: int) -> Tensor:
        """Gradient [S, B, A] by the actions of sum(outputs * gradient [S, 2, B, m])."""
        flat = gradient.flatten(0, 1)
        halves = self._each(lambda part, cut: part.input_gradient_later(flat[cut], n_act))
        self._run(halves)
        return _values(halves).sum(1)

    def decode(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Values [S, 2, B] of outputs [S, 2, B, m] and their gradient by the outputs."""
        if self.codec.outputs == 1:
            return self.codec.decode(outputs), torch.ones_like(outputs)
        leaf = outputs.clone().requires_grad_()
        with torch.enable_grad():
            decoded = self.codec.decode(leaf)
        ones = torch.ones_like(decoded)
        return decoded.detach(), torch.autograd.grad(decoded, leaf, ones)[0]

    def follow(self, tau: float) -> None:
        """Move the targets by `tau` of the way."""
        late, new = self.memories
        if late is not None and new is not None:
            kernels.approach(late, new, tau)
        else:
            online = [p.detach() for p in self.net.parameters()]
            torch._foreach_lerp_(list(self.targets.parameters()), online, tau)

    def measure(self, obs: Tensor, actions: Tensor) -> dict[str, Any]:
        """Correlates [S] of each critic under `critic1/...`, `critic2/...`."""
        with torch.no_grad(), self.units.recording():
            self.net(_twice(torch.cat([obs, actions], -1), slice(None)))
        found: dict[str, Any] = {}
        both: dict[str, Any] = dict(metrics.measure(self.units))
        for key, value in both.items():
            for i in range(TWINS):
                found[f"critic{i + 1}/{key.removeprefix('net/')}"] = value.unflatten(
                    0, (-1, TWINS)
                )[:, i]
        return found

    def counts(self) -> dict[str, Tensor]:
        """Units recycled so far [S] by each method, both critics together."""
        return {
            name: count.unflatten(0, (-1, TWINS)).sum(1)
            for name, count in self.handle.counts().items()
        }

    def state(self, seed: int) -> list[dict[str, Any]]:
        """Weights, targets, Adam and interventions of one seed's critics."""
        return [
            {
                "weights": weights_of(self.net, copy),
                "targets": weights_of(self.targets, copy),
                "optimizer": self.optimizer.state_of(copy),
                "interventions": self.handle.state_of(copy),
                "metrics": self.units.references.state_of(copy),
            }
            for copy in range(seed * TWINS, (seed + 1) * TWINS)
        ]

    def load_state(self, seed: int, states: list[dict[str, Any]]) -> None:
        """Continue one seed's critics from `state`."""
        for copy, state in enumerate(states, seed * TWINS):
            load_weights(self.net, copy, state["weights"])
            load_weights(self.targets, copy, state["targets"])
            self.optimizer.load_state_of(copy, state["optimizer"])
            self.handle.load_state_of(copy, state["interventions"])
            self.units.references.load_state_of(copy, state["metrics"])


def _values(halves: Sequence[Later]) -> Tensor:
    """What both halves made, `[S, 2, ...]`."""
    whole = halves[0].value if len(halves) == 1 else torch.cat([half.value for half in halves])
    return whole.unflatten(0, (-1, TWINS))  # type: ignore[no-any-return]


def _memory(net: MLP) -> np.ndarray | None:
    """All weights of a network as one array, where they stand side by side on the CPU."""
    memory = together([p.detach() for p in net.parameters()])
    return kernels.array(memory) if memory is not None and kernels.ready(memory) else None


def _twice(pairs: Tensor, cut: slice) -> Tensor:
    """Inputs of the copies `cut` of pairs [S, B, n], of which every seed has two."""
    if len(pairs) == 1:
        return pairs.expand(len(range(TWINS)[cut]), -1, -1)
    return pairs.repeat_interleave(TWINS, 0)[cut]


@kernels.compiled
def _smaller(a, b):  # type: ignore[no-untyped-def]
    """No number where either is none."""
    return a if a <= b or a != a else b


@kernels.compiled
def _twin_errors(outputs, future, rewards, discounts, gradient, losses):  # type: ignore[no-untyped-def]
    """`TwinCritics._errors` of values themselves into the last two."""
    batch = rewards.shape[1]
    for c in range(len(losses)):
        total = 0.0
        for r in range(batch):
            ahead = _smaller(future[c, 0, r, 0], future[c, 1, r, 0])
            goal = rewards[c, r] + discounts[c, r] * ahead
            for i in range(2):
                error = outputs[c, i, r, 0] - goal
                gradient[c, i, r, 0] = error / batch
                total += error * error
        losses[c] = 0.5 * total / batch


@kernels.compiled
def _lesser(outputs, low, gradient):  # type: ignore[no-untyped-def]
    """`TwinCritics.lesser` of values themselves into the last two."""
    for c in range(outputs.shape[0]):
        for r in range(outputs.shape[2]):
            first, second = outputs[c, 0, r, 0], outputs[c, 1, r, 0]
            share = 0.5
            if first != second:
                share = 1.0 if first < second else 0.0
            low[c, r] = _smaller(first, second)
            gradient[c, 0, r, 0], gradient[c, 1, r, 0] = share, 1.0 - share
