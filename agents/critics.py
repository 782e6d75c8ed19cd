"""Twin critics of S seeds as one batched network of 2S copies, with their targets."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perennial.agents.aside import Aside, Step, in_turn
from perennial.agents.config import SACConfig
from perennial.agents.networks import MLP, spread
from perennial.agents.passes import Passes, passes, written_out
from perennial.agents.replay import Sample
from perennial.agents.streams import torch_generator
from perennial.agents.weights import load_weights, weights_of
from perennial.plasticity import attach, find_units, kernels, make, metrics, values
from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.categorical import Loss
from perennial.plasticity.copies import Init
from perennial.plasticity.flat import together
from perennial.plasticity.kernels import array

TWINS = 2


class Soft(NamedTuple):
    """What targets are made of, beside the values ahead."""

    rewards: Tensor  # [S, B]
    discounts: Tensor  # [S, B]
    ent_coef: Tensor  # [S]
    log_prob: Tensor  # [S, B], of the next actions


class Inputs(NamedTuple):
    """Where an update finds a sample and its noise; what actions follow is filled in by it."""

    observations: Tensor  # [S, B, D]
    next_observations: Tensor
    noise: Tensor  # [S, B, A], of the actor on either
    next_noise: Tensor
    taken: Tensor  # [S, B, D + A]: observations with the actions of the sample,
    here: Tensor  # with the actor's,
    ahead: Tensor  # and the next observations with the actor's
    rewards: Tensor  # [S, B]
    discounts: Tensor

    @classmethod
    def of(cls, new: Callable[..., Tensor], batch: int, n_obs: int, n_act: int) -> Inputs:
        """Memory by `new`, which takes all but the leading S."""
        last = [(n_obs,)] * 2 + [(n_act,)] * 2 + [(n_obs + n_act,)] * 3 + [()] * 2
        return cls(*(new(batch, *sizes) for sizes in last))

    def fill(self, sample: Sample, noise: Tensor) -> None:
        """With a sample and noise [S, 2, B, A]."""
        observations, actions, rewards, discounts, following = map(torch.from_numpy, sample[:5])
        n = observations.shape[-1]
        for target, source in (
            (self.observations, observations),
            (self.next_observations, following),
            (self.noise, noise[:, 0]),
            (self.next_noise, noise[:, 1]),
            (self.taken[..., :n], observations),
            (self.taken[..., n:], actions),
            (self.here[..., :n], observations),
            (self.ahead[..., :n], following),
            (self.rewards, rewards),
            (self.discounts, discounts),
        ):
            target.copy_(source)


def critic_loss(codec: values.Codec, outputs: Tensor, future: Tensor, soft: Soft) -> Loss:
    """Half the sum over the twins [S], and its gradient [S, 2, B, m] by their outputs, on
    `rewards + discounts * (the smaller of future - ent_coef * log_prob)`.

    outputs, future [S, 2, B, m]: the critics' here, the targets' on what follows.
    """
    worth = soft.rewards - soft.discounts * soft.ent_coef[:, None] * soft.log_prob
    goal = codec.backup(codec.smallest(future, dim=1), worth, soft.discounts)
    loss, slope = codec.loss(outputs, goal[:, None])
    return Loss(0.5 * loss.mean(-1).sum(1), slope * (0.5 / loss.shape[-1]))


def actor_loss(codec: values.Codec, outputs: Tensor, ent_coef: Tensor, log_prob: Tensor) -> Loss:
    """Mean [S] of `ent_coef * log_prob - the smaller of the twins' values`, and the gradient [S, 2,
    B, m] of those values by `outputs`, which equal ones share."""
    q, slope = decode(codec, outputs)
    low = q.amin(1, keepdim=True)
    share = (q == low).to(q.dtype)
    gradient = slope * (share / share.sum(1, keepdim=True))[..., None]
    return Loss((ent_coef[:, None] * log_prob - low[:, 0]).mean(-1), gradient)


def decode(codec: values.Codec, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Values [...] of outputs [..., m] and their gradient by the outputs."""
    if codec.outputs == 1:
        return codec.decode(outputs), torch.ones_like(outputs)
    leaf = outputs.clone().requires_grad_()
    with torch.enable_grad():
        decoded = codec.decode(leaf)
    ones = torch.ones_like(decoded)
    return decoded.detach(), torch.autograd.grad(decoded, leaf, ones)[0]


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
        self.aside = Aside(threaded and written_out(self.net))
        middle = copies // 2
        self.cuts = (
            [slice(0, middle), slice(middle, copies)] if self.aside.threaded else [slice(None)]
        )
        self.online, self.delayed = self._passes(self.net), self._passes(self.targets, False)

    def _passes(self, net: MLP, learns: bool = True) -> list[Passes]:
        if len(self.cuts) == 1:
            return [passes(net, learns)]
        return [passes(net, learns, cut) for cut in self.cuts]

    # ---- an update, laid out once: steps on memory of the whole network --------------------------

    def look_later(self, pairs: Tensor, outputs: Tensor, ahead: Tensor, future: Tensor) -> Step:
        """Outputs of `pairs`, from which `learn_later` goes on, and the targets' of `ahead`.

        Inputs [S, B, D + A] are observations and actions; outputs are [S, 2, B, m].
        """
        seen: list[dict[nn.Module, Tensor]] = [{} for _ in self.cuts]

        def record() -> None:
            for layer, h in seen[0].items():
                parts = [part[layer] for part in seen]
                self.units.record(layer, h if len(parts) == 1 else torch.cat(parts))

        jobs = []
        for late, part, noted in zip(self.delayed, self.online, seen, strict=True):
            note = noted.__setitem__ if self.handle.observes else None
            jobs.append(
                [
                    late.forward_later(ahead, future.flatten(0, 1)),
                    part.forward_later(pairs, outputs.flatten(0, 1), note),
                ]
            )
        return in_turn([self.aside.beside(*jobs), record])

    def errors_later(
        self, outputs: Tensor, future: Tensor, soft: Soft, loss: Tensor, gradient: Tensor
    ) -> Step:
        """`critic_loss` into the last two."""
        given = outputs, future, *soft
        if isinstance(self.codec, values.MSE) and kernels.ready(*given):
            return partial(_twin_errors, *map(array, (*given, loss, gradient)))
        return lambda: _keep(critic_loss(self.codec, outputs, future, soft), loss, gradient)

    def learn_later(self, gradient: Tensor, pairs: Tensor, outputs: Tensor) -> Step:
        """One step by the gradient [S, 2, B, m] of what was looked at; then outputs [S, 2, B, m] of
        `pairs` [S, B, D + A], of which `action_gradient_later` will be asked for."""
        flat, out = gradient.flatten(0, 1), outputs.flatten(0, 1)
        backward = [part.backward_later(flat) for part in self.online]
        evaluate = [part.forward_later(pairs, out, None, True) for part in self.online]
        # Methods act on both halves at once, between their gradients and what comes after.
        if len(self.cuts) > 1 and not self.handle.interventions and self.optimizer.compiled:
            copies = range(self.optimizer.copies)
            moves = [partial(self.optimizer.move, copies[cut]) for cut in self.cuts]
            return self.aside.beside(*zip(backward, moves, evaluate, strict=True))
        step = self.handle.before_step, self.optimizer.move, self.handle.after_step
        return in_turn([self._both(backward), *step, self._both(evaluate)])

    def _both(self, halves: Sequence[Step]) -> Step:
        return self.aside.beside(*([half] for half in halves))

    def lesser_later(
        self, outputs: Tensor, ent_coef: Tensor, log_prob: Tensor, loss: Tensor, gradient: Tensor
    ) -> Step:
        """`actor_loss` into the last two."""
        given = outputs, ent_coef, log_prob
        if isinstance(self.codec, values.MSE) and kernels.ready(*given):
            return partial(_lesser, *map(array, (*given, loss, gradient)))
        return lambda: _keep(actor_loss(self.codec, *given), loss, gradient)

    def action_gradient_later(
        self, gradient: Tensor, found: Tensor, follow: Sequence[Sequence[Step]]
    ) -> Step:
        """Gradients [S, 2, B, A] by the actions of sum(outputs * gradient [S, 2, B, m]); `follow`
        is what the halves do besides."""
        flat, out = gradient.flatten(0, 1), found.flatten(0, 1)
        halves = [part.input_gradient_later(flat, out) for part in self.online]
        jobs = zip(halves, follow, strict=True)
        return self.aside.beside(*([half, *steps] for half, steps in jobs))

    def follow_later(self, tau: float) -> list[list[Step]]:
        """Steps of the halves which together move the targets by `tau` of the way."""
        own, online = list(self.targets.parameters()), [p.detach() for p in self.net.parameters()]
        late, new, count = together(own), together(online), len(self.cuts)
        if late is None or new is None or not kernels.ready(late, new):
            return [[partial(torch._foreach_lerp_, own, online, tau)], *[[]] * (count - 1)]
        parts = zip(late.tensor_split(count), new.tensor_split(count), strict=True)
        return [[partial(kernels.approach, array(a), array(b), tau)] for a, b in parts]

    # ---- seeing and state ------------------------------------------------------------------------

    def measure(self, obs: Tensor, actions: Tensor) -> dict[str, Any]:
        """Correlates [S] of each critic under `critic1/...`, `critic2/...`."""
        with torch.no_grad(), self.units.recording():
            self.net(spread(torch.cat([obs, actions], -1), self.optimizer.copies))
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


def _keep(found: Loss, loss: Tensor, gradient: Tensor) -> None:
    loss.copy_(found.value)
    gradient.copy_(found.gradient)


@kernels.compiled
def _smaller(a, b):  # type: ignore[no-untyped-def]
    """No number where either is none."""
    return a if a <= b or a != a else b


@kernels.compiled
def _twin_errors(  # type: ignore[no-untyped-def]
    outputs, future, rewards, discounts, ent_coef, log_prob, losses, gradient
):
    """`critic_loss` of values themselves into the last two."""
    batch = rewards.shape[1]
    for c in range(len(losses)):
        total = 0.0
        for r in range(batch):
            ahead = _smaller(future[c, 0, r, 0], future[c, 1, r, 0]) - ent_coef[c] * log_prob[c, r]
            goal = rewards[c, r] + discounts[c, r] * ahead
            for i in range(2):
                error = outputs[c, i, r, 0] - goal
                gradient[c, i, r, 0] = error / batch
                total += error * error
        losses[c] = 0.5 * total / batch


@kernels.compiled
def _lesser(outputs, ent_coef, log_prob, losses, gradient):  # type: ignore[no-untyped-def]
    """`actor_loss` of values themselves into the last two."""
    batch = outputs.shape[2]
    for c in range(outputs.shape[0]):
        total = 0.0
        for r in range(batch):
            first, second = outputs[c, 0, r, 0], outputs[c, 1, r, 0]
            share = 0.5
            if first != second:
                share = 1.0 if first < second else 0.0
            total += ent_coef[c] * log_prob[c, r] - _smaller(first, second)
            gradient[c, 0, r, 0], gradient[c, 1, r, 0] = share, 1.0 - share
        losses[c] = total / batch
