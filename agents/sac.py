"""Soft actor-critic over all seeds of a process as one batched network, twin critics as copies.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv 1812.05905). The
details are those of Stable-Baselines3: tanh-squashed Gaussian, automatic temperature, one Adam each
for actor, critics and temperature, Polyak-averaged targets; plus n-step returns, distributional
values, and what the replay does at a change of task.

    perennial train sac --env perennial/SlipperyAnt-v0 --steps 2e5

The order of work of an update follows what can run side by side: actor on both observations, target
critics, critics, critics on the actor's actions. Each half of a pair goes to its own core.
"""

from __future__ import annotations

import copy as copying
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from perennial.agents.actor_critic import sizes
from perennial.agents.config import SACConfig
from perennial.agents.episodes import Episodes
from perennial.agents.networks import MLP, Acting, Passes, WrittenOut, passes
from perennial.agents.replay import Replay, Sample
from perennial.agents.squashed import SquashedGaussian
from perennial.agents.streams import Streams, torch_generator
from perennial.plasticity import attach, find_units, make, metrics, values
from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.copies import Init

_PROBE_ROWS = 1024
_CRITICS = 2
T = TypeVar("T")


class SAC:
    """Networks, optimizers and replay of S seeds; critic i of seed s is copy 2s + i."""

    def __init__(
        self,
        config: SACConfig,
        observation_space: gym.Space,
        action_space: gym.Space,
        seeds: tuple[int, ...],
        device: str = "cpu",
        threads: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.seeds, self.device = config, seeds, torch.device(device)
        n_obs, n_act = sizes(config, observation_space, action_space)
        self.low, self.high = action_space.low, action_space.high  # type: ignore[attr-defined]
        self.codec = values.make(config.value_loss)
        S, on_cpu = len(seeds), self.device.type == "cpu"
        init = Init("torch-default", bias="torch-default")
        generators = [torch_generator(s, "init") for s in seeds]
        twins = [torch_generator(s, f"init critic {i}") for s in seeds for i in range(_CRITICS)]
        shape, act = config.net_arch, config.activation
        self.actor = MLP(S, (n_obs, *shape, 2 * n_act), act, init, init, generators)
        critic_sizes = (n_obs + n_act, *shape, self.codec.outputs)
        self.critics = MLP(S * _CRITICS, critic_sizes, act, init, init, twins)
        rewrite(self.actor, config.interventions, generators=generators)
        rewrite(self.critics, config.interventions, generators=twins)
        for net in (self.actor, self.critics):
            net.to(self.device, dtype)
        self.targets = copying.deepcopy(self.critics).requires_grad_(False)
        coefficient = config.first_ent_coef
        self.log_ent_coef = nn.Parameter(
            torch.full((S, 1), math.log(coefficient), device=self.device, dtype=dtype)
        )
        self.log_ent_coef.grad = torch.zeros_like(self.log_ent_coef)
        self.target_entropy = -float(n_act)
        options: dict[str, Any] = {"betas": config.betas, "eps": config.adam_eps}
        options["lr"] = config.learning_rate
        self.actor_optimizer = BatchedAdam(self.actor.parameters(), **options)
        self.critic_optimizer = BatchedAdam(self.critics.parameters(), **options)
        self.ent_optimizer = BatchedAdam([self.log_ent_coef], lr=config.learning_rate)

        example = torch.zeros(S, 1, n_obs, device=self.device, dtype=dtype)
        pairs = torch.zeros(S * _CRITICS, 1, n_obs + n_act, device=self.device, dtype=dtype)
        self.actor_units = find_units(self.actor, example)
        self.critic_units = find_units(self.critics, pairs)
        self.actor_handle = attach(
            [make(spec) for spec in config.interventions],
            self.actor_units,
            self.actor_optimizer,
            seeds=seeds,
            hooks=False,
        )
        self.critic_handle = attach(
            [make(spec) for spec in config.interventions],
            self.critic_units,
            self.critic_optimizer,
            # Streams of their own: beyond any seed of an actor.
            seeds=[s + ((i + 1) << 33) for s in seeds for i in range(_CRITICS)],
            hooks=False,
            targets=[self.targets],
        )
        plain = WrittenOut.fits(self.actor) and WrittenOut.fits(self.critics)
        self.aside: ThreadPoolExecutor | None = None
        if threads > 1 and on_cpu:
            if plain:
                self.aside = ThreadPoolExecutor(1, thread_name_prefix="second half")
            else:
                torch.set_num_threads(threads)
        self.acting = Acting(self.actor) if plain and on_cpu else None
        self.actor_passes, self.next_passes = passes(self.actor), passes(self.actor)
        half = S  # copies of critics that one thread takes
        cuts = (slice(0, half), slice(half, 2 * half)) if self.aside else (slice(None),)
        self.critic_passes = _split(self.critics, cuts)
        self.target_passes = _split(self.targets, cuts)
        self.cuts = cuts

        self.squash = SquashedGaussian(n_act)
        self.action_stream = Streams(seeds, "action")
        self.replay_stream = Streams(seeds, "replay")
        self.update_stream = Streams(seeds, "update")
        kind = self.log_ent_coef.detach().cpu().numpy().dtype
        self.latest = np.zeros((S, config.num_envs, n_obs), kind)
        self.replay = Replay(
            S,
            config.num_envs,
            config.buffer_size,
            self.latest[0, 0],
            np.zeros(n_act, kind),
            config.at_change,
        )
        self.updates = 0
        self.sums: dict[str, np.ndarray] = {}
        self.summed = 0

    # ---- acting --------------------------------------------------------------------------------

    def start(self, observations: np.ndarray) -> None:
        """Begin from the first observations [S*E, D] of the environments."""
        self.latest = observations.reshape(self.latest.shape).astype(self.latest.dtype)
        self.replay.start(self.latest)

    def restart(self, copy: int, observations: np.ndarray) -> None:
        """Go on from new episodes of one seed, first observations [E, D]."""
        self.latest[copy] = observations
        self.replay.start(self.latest)

    def advance(
        self,
        envs: gym.vector.VectorEnv,
        episodes: Episodes,
        clock: Callable[[str], AbstractContextManager[None]],
        stopping: Callable[[], bool],
    ) -> dict[str, np.ndarray]:
        """Act and learn up to the next point of the log; means of `train/*` [S] since the last."""
        config = self.config
        end = (episodes.env_steps // config.rollout + 1) * config.rollout
        while episodes.env_steps < end:
            if stopping():
                return {}
            with clock("collect"):
                for _ in range(config.train_freq):
                    self._step(envs, episodes)
                    if episodes.env_steps >= end:
                        break
            if episodes.env_steps > config.learning_starts:
                with clock("update"):
                    for _ in range(config.gradient_steps):
                        self.update()
        means = {name: total / max(1, self.summed) for name, total in self.sums.items()}
        self.sums, self.summed = {}, 0
        if means:
            means["n_updates"] = np.full(len(self.seeds), self.updates)
        return means

    def _step(self, envs: gym.vector.VectorEnv, episodes: Episodes) -> None:
        """One step of every lane into the replay."""
        config, lead = self.config, self.latest.shape[:2]
        if episodes.env_steps < config.learning_starts:
            actions = self.action_stream.uniform(config.num_envs, self.squash.size) * 2.0 - 1.0
        else:
            noise = self.action_stream.normal(config.num_envs, self.squash.size)
            actions = self.squash.act(self._actor(self.latest), noise)
        actions = actions.astype(self.latest.dtype)
        asked = self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        obs, rewards, terminated, truncated, infos = envs.step(
            asked.reshape(lead[0] * lead[1], -1).astype(self.low.dtype)
        )
        raw = np.asarray(rewards, np.float64)[None]
        ended = terminated | truncated
        finals: dict[int, np.ndarray] = {}
        if "_final_obs" in infos:
            episodes.end(0, raw, ended, infos)
            finals = {
                int(lane): np.asarray(infos["final_obs"][lane], self.latest.dtype)
                for lane in np.flatnonzero(truncated & ~terminated)
            }
        episodes.rollout(raw)
        self.latest = obs.reshape(self.latest.shape).astype(self.latest.dtype)
        tasks = [envs.task_of(c)[0] for c in range(lead[0])]  # type: ignore[attr-defined]
        self.replay.add(
            tasks,
            actions,
            raw.reshape(lead),
            terminated.reshape(lead),
            ended.reshape(lead),
            self.latest,
            finals,
        )

    def _actor(self, observations: np.ndarray) -> np.ndarray:
        if self.acting is not None:
            return self.acting.forward(observations)
        with torch.no_grad():
            return self.actor(torch.from_numpy(observations).to(self.device)).cpu().numpy()

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions [..., A] without noise for observations [..., D], of the first copy."""
        rows = np.asarray(observation, self.latest.dtype)
        flat = torch.from_numpy(rows.reshape(-1, rows.shape[-1])).to(self.device)
        with torch.no_grad():
            output = self.actor(flat[None].expand(len(self.seeds), -1, -1).contiguous())[0]
        squashed = np.tanh(output[:, : self.squash.size].cpu().numpy())
        actions = self.low + 0.5 * (squashed + 1.0) * (self.high - self.low)
        return actions.reshape(*rows.shape[:-1], -1)

    # ---- learning ------------------------------------------------------------------------------

    def update(self) -> None:
        """One gradient step of every network on a fresh sample."""
        config = self.config
        sample = self.replay.sample(
            self.replay_stream, config.batch_size, config.gamma, config.n_step
        )
        noise = self.update_stream.normal(2, config.batch_size, self.squash.size)
        losses = self.learn(sample, torch.from_numpy(noise))
        self.summed += 1
        for name, value in losses.items():
            now = value.detach().cpu().double().numpy()
            self.sums[name] = self.sums[name] + now if name in self.sums else now

    def learn(self, sample: Sample, noise: Tensor) -> dict[str, Tensor]:
        """Learn from a sample with the actor's noise [S, 2, B, A]; `train/*` values [S]."""
        config, like = self.config, self.log_ent_coef
        obs, actions, rewards, discounts, following = (torch.from_numpy(x).to(like) for x in sample)
        noise = noise.to(like)
        output, next_output = self._pair(
            lambda: self.actor_passes.forward(obs, self._recorder(self.actor_handle)),
            lambda: self.next_passes.forward(following),
        )
        policy = self.squash.sample(output, noise[:, 0])
        ahead = self.squash.sample(next_output, noise[:, 1])
        ent_coef = self.log_ent_coef.detach().exp()  # [S, 1]
        ent_loss = self._learn_temperature(policy.log_prob)

        future = self._critics(self.target_passes, following, ahead.actions)  # [S, 2, B, m]
        smallest = self.codec.smallest(future, dim=1)
        soft = rewards - discounts * ent_coef * ahead.log_prob
        goal = self.codec.backup(smallest, soft, discounts)[:, None]  # [S, 1, B, k]
        current = self._critics(self.critic_passes, obs, actions, record=True)
        loss, gradient = self.codec.loss(current, goal)
        self._critics_backward(gradient * (0.5 / config.batch_size))
        self.critic_handle.before_step()
        self.critic_optimizer.move()
        self.critic_handle.after_step()

        outputs = self._critics(self.critic_passes, obs, policy.actions, wants_input=True)
        q, d_outputs = self._decoded(outputs)  # [S, 2, B], [S, 2, B, m]
        low = q.amin(1, keepdim=True)
        share = (q == low).to(q.dtype)
        share = share / share.sum(1, keepdim=True)
        d_actions = self._critics_input(d_outputs * share[..., None], obs.shape[-1])
        d_output = self.squash.gradient(policy, d_actions, ent_coef[..., None])
        self.actor_passes.backward(d_output / config.batch_size)
        self.actor_handle.before_step()
        self.actor_optimizer.move()
        self.actor_handle.after_step()
        self.updates += 1
        if self.updates % config.target_update_interval == 0:
            online = [p.detach() for p in self.critics.parameters()]
            torch._foreach_lerp_(list(self.targets.parameters()), online, config.tau)
        return {
            "actor_loss": (ent_coef * policy.log_prob - low[:, 0]).mean(-1),
            "critic_loss": 0.5 * loss.mean(-1).sum(1),
            "ent_coef": ent_coef[:, 0],
            "ent_coef_loss": ent_loss,
        }

    def _learn_temperature(self, log_prob: Tensor) -> Tensor:
        """One step of the temperature towards the target entropy; its loss [S]."""
        if not self.config.learns_ent_coef:
            return torch.zeros_like(log_prob[:, 0])
        surplus = log_prob.mean(-1, keepdim=True) + self.target_entropy
        loss = -(self.log_ent_coef.detach() * surplus)[:, 0]
        assert self.log_ent_coef.grad is not None
        self.log_ent_coef.grad.copy_(-surplus)
        self.ent_optimizer.move()
        return loss

    def _recorder(self, handle: Any) -> Any:
        return handle.units.record if handle.observes else None

    def _pair(self, here: Callable[[], T], there: Callable[[], T]) -> tuple[T, T]:
        """Both results; the second is computed beside the first where there is a core."""
        if self.aside is None:
            return here(), there()
        other = self.aside.submit(there)
        return here(), other.result()

    def _each(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        return [jobs[0]()] if len(jobs) == 1 else list(self._pair(jobs[0], jobs[1]))

    def _critics(
        self,
        critics: Sequence[Passes],
        obs: Tensor,
        actions: Tensor,
        record: bool = False,
        wants_input: bool = False,
    ) -> Tensor:
        """Outputs [S, 2, B, m] of both critics on observations [S, B, D] and actions [S, B, A]."""
        pairs = torch.cat([obs, actions], -1).repeat_interleave(_CRITICS, 0)
        observes = record and self.critic_handle.observes
        direct = self._recorder(self.critic_handle) if observes and len(critics) == 1 else None
        outputs = self._each(
            [
                lambda p=p, cut=cut: p.forward(pairs[cut], direct, wants_input)  # type: ignore[misc]
                for p, cut in zip(critics, self.cuts, strict=True)
            ]
        )
        if observes and direct is None:
            halves = [p for p in critics if isinstance(p, WrittenOut)]
            for k, layer in enumerate(halves[0].layers):
                rows = [_led(p.hidden[k]) for p in halves]
                self.critic_handle.units.record(layer, torch.cat(rows))
        return torch.cat(outputs).unflatten(0, (-1, _CRITICS))

    def _critics_backward(self, gradient: Tensor) -> None:
        flat = gradient.flatten(0, 1)
        self._each(
            [
                lambda p=p, cut=cut: p.backward(flat[cut])  # type: ignore[misc]
                for p, cut in zip(self.critic_passes, self.cuts, strict=True)
            ]
        )

    def _critics_input(self, gradient: Tensor, n_obs: int) -> Tensor:
        """Gradient [S, B, A] by the actions, summed over both critics."""
        flat = gradient.flatten(0, 1)
        parts = self._each(
            [
                lambda p=p, cut=cut: p.input_gradient(flat[cut])  # type: ignore[misc]
                for p, cut in zip(self.critic_passes, self.cuts, strict=True)
            ]
        )
        return torch.cat(parts).unflatten(0, (-1, _CRITICS)).sum(1)[..., n_obs:]

    def _decoded(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Values [S, 2, B] of outputs [..., m] and their gradient by the outputs."""
        if self.codec.outputs == 1:
            return self.codec.decode(outputs), torch.ones_like(outputs)
        leaf = outputs.clone().requires_grad_()
        with torch.enable_grad():
            decoded = self.codec.decode(leaf)
        return decoded.detach(), torch.autograd.grad(decoded.sum(), leaf)[0]

    # ---- seeing and state ----------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """Correlates of plasticity [S] by key, on a sample that no stream pays for."""
        if not len(self.replay):
            return {}
        probe = self.replay.sample(Streams(self.seeds, "probe"), _PROBE_ROWS, 1.0)
        obs, actions = (
            torch.from_numpy(x).to(self.log_ent_coef) for x in (probe.observations, probe.actions)
        )
        pairs = torch.cat([obs, actions], -1).repeat_interleave(_CRITICS, 0)
        with torch.no_grad(), self.actor_units.recording(), self.critic_units.recording():
            self.actor(obs)
            self.critics(pairs)
        measured: dict[str, Any] = {}
        for key, value in metrics.measure(self.actor_units).items():
            measured[_named("actor", key)] = value
        twins: dict[str, Any] = dict(metrics.measure(self.critic_units))
        for key, value in twins.items():
            for i in range(_CRITICS):
                measured[_named(f"critic{i + 1}", key)] = value.unflatten(0, (-1, _CRITICS))[:, i]
        return measured

    def counts(self) -> dict[str, Tensor]:
        """Units recycled so far [S] by each method, over all three networks."""
        critics = self.critic_handle.counts()
        return {
            name: count + critics[name].unflatten(0, (-1, _CRITICS)).sum(1)
            for name, count in self.actor_handle.counts().items()
        }

    def state(self, copy: int) -> dict[str, Any]:
        """All that one seed's future depends on."""
        twins = [copy * _CRITICS + i for i in range(_CRITICS)]
        return {
            "actor": _weights(self.actor, copy),
            "critics": [_weights(self.critics, c) for c in twins],
            "targets": [_weights(self.targets, c) for c in twins],
            "log_ent_coef": self.log_ent_coef.detach()[copy].cpu(),
            "optimizers": {
                "actor": self.actor_optimizer.state_of(copy),
                "critics": [self.critic_optimizer.state_of(c) for c in twins],
                "temperature": self.ent_optimizer.state_of(copy),
            },
            "interventions": {
                "actor": self.actor_handle.state_of(copy),
                "critics": [self.critic_handle.state_of(c) for c in twins],
            },
            "streams": {name: s.state(copy) for name, s in self._streams().items()},
            "replay": self.replay.state(copy),
            "latest": torch.from_numpy(self.latest[copy].copy()),
            "updates": self.updates,
            "sums": {name: float(total[copy]) for name, total in self.sums.items()},
            "summed": self.summed,
        }

    @torch.no_grad()
    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        _load_weights(self.actor, copy, state["actor"])
        self.actor_optimizer.load_state_of(copy, state["optimizers"]["actor"])
        self.actor_handle.load_state_of(copy, state["interventions"]["actor"])
        for i in range(_CRITICS):
            twin = copy * _CRITICS + i
            _load_weights(self.critics, twin, state["critics"][i])
            _load_weights(self.targets, twin, state["targets"][i])
            self.critic_optimizer.load_state_of(twin, state["optimizers"]["critics"][i])
            self.critic_handle.load_state_of(twin, state["interventions"]["critics"][i])
        self.log_ent_coef[copy].copy_(state["log_ent_coef"])
        self.ent_optimizer.load_state_of(copy, state["optimizers"]["temperature"])
        for name, stream in self._streams().items():
            stream.load_state(copy, state["streams"][name])
        self.replay.load_state(copy, state["replay"])
        self.latest[copy] = state["latest"].numpy()
        self.updates, self.summed = state["updates"], state["summed"]
        for name, total in state["sums"].items():
            self.sums.setdefault(name, np.zeros(len(self.seeds)))[copy] = total

    def _streams(self) -> dict[str, Streams]:
        return {
            "action": self.action_stream,
            "replay": self.replay_stream,
            "update": self.update_stream,
        }


def _split(net: MLP, cuts: Sequence[slice]) -> list[Passes]:
    if len(cuts) == 1:
        return [passes(net)]
    return [WrittenOut(net, cut) for cut in cuts]


def _led(x: Tensor) -> Tensor:
    """With the copies axis, which passes of one copy leave out."""
    return x if x.ndim == 3 else x[None]


def _named(net: str, key: str) -> str:
    """`layer/metric` or `metric` of one network under its name."""
    return f"{net}/{key}"


def _weights(net: nn.Module, copy: int) -> dict[str, Tensor]:
    return {name: value[copy].detach().cpu() for name, value in net.state_dict().items()}


def _load_weights(net: nn.Module, copy: int, weights: dict[str, Tensor]) -> None:
    own = net.state_dict()
    for name, value in weights.items():
        own[name][copy].copy_(value)
