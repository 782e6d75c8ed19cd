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

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from perennial.agents.acting import Acting
from perennial.agents.actor_critic import check_actions, observation_size
from perennial.agents.aside import Aside, Step
from perennial.agents.config import SACConfig
from perennial.agents.critics import TWINS, Inputs, Soft, TwinCritics
from perennial.agents.episodes import Episodes
from perennial.agents.networks import MLP
from perennial.agents.off_policy import step_into
from perennial.agents.passes import passes, written_out
from perennial.agents.replay import Replay, Sample
from perennial.agents.squashed import SquashedGaussian
from perennial.agents.streams import Streams, torch_generator
from perennial.agents.temperature import RestartsWithActor, Temperature
from perennial.agents.weights import load_weights, weights_of
from perennial.plasticity import attach, find_units, make, metrics
from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.architecture import rewrite
from perennial.plasticity.base import Intervention
from perennial.plasticity.copies import Init

_PROBE_ROWS = 1024
LOSSES = ("actor_loss", "critic_loss", "ent_coef", "ent_coef_loss")


class SAC:
    """Networks, optimizers and replay of S seeds."""

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
        self.config, self.seeds = config, seeds
        n_obs = observation_size(config, observation_space)
        check_actions(config, action_space, box=True, discrete=False)
        n_act = int(np.prod(action_space.shape))  # type: ignore[arg-type]
        self.low, self.high = action_space.low, action_space.high  # type: ignore[attr-defined]
        generators = [torch_generator(s, "init") for s in seeds]
        init, widths = (
            Init("torch-default", bias="torch-default"),
            (n_obs, *config.net_arch, 2 * n_act),
        )
        self.actor = MLP(len(seeds), widths, config.activation, init, init, generators)
        rewrite(self.actor, config.interventions, generators=generators)
        self.actor.to(device, dtype)
        self.temperature = Temperature(config, len(seeds), -float(n_act), device, dtype)
        self.log_ent_coef = self.temperature.log
        self.optimizer = BatchedAdam(
            self.actor.parameters(), config.learning_rate, config.betas, config.adam_eps
        )
        self.optimizer.keep_gradients()
        self.units = find_units(self.actor, self.log_ent_coef.new_zeros(len(seeds), 1, n_obs))
        self.handle = attach(
            [*map(make, config.interventions), *self._beside()],
            self.units,
            self.optimizer,
            seeds=seeds,
            hooks=False,
        )
        on_cpu = torch.device(device).type == "cpu"
        plain = written_out(self.actor)
        threaded = threads > 1 and on_cpu
        like = self.log_ent_coef.detach()
        self.critics = TwinCritics(config, (n_obs, n_act), seeds, like, threaded)
        self.aside = Aside(threaded and plain)
        if threaded and not plain:
            torch.set_num_threads(threads)
        self.acting = Acting(self.actor) if plain and on_cpu else None
        # Activations are recorded where learning passes, not on the next observations.
        self.actor_passes, self.next_passes = passes(self.actor), passes(self.actor, learns=False)

        self.squash = SquashedGaussian(n_act)
        self.action_stream = Streams(seeds, "action")
        self.replay_stream = Streams(seeds, "replay")
        self.update_stream = Streams(seeds, "update")
        kind = np.dtype(str(dtype).removeprefix("torch."))
        self.latest = np.zeros((len(seeds), config.num_envs, n_obs), kind)
        self.replay = Replay(
            len(seeds),
            config.num_envs,
            config.buffer_size,
            self.latest[0, 0],
            np.zeros(n_act, kind),
            config.at_change,
        )
        self.updates = 0
        # Of the `train/*` values of `learn`, in its order, and how often.
        self.sums = torch.zeros(len(LOSSES), len(seeds), dtype=torch.float64, device=device)
        self.summed = 0
        self.losses = like.new_zeros(len(LOSSES), len(seeds))  # of the last update
        self._laid_out: dict[int, tuple[Inputs, list[Step]]] = {}  # by batch size

    def _beside(self) -> list[Intervention]:
        """What acts beside the actor's methods."""
        return [RestartsWithActor(self.temperature)] if "reset" in self.config.methods else []

    # ---- acting --------------------------------------------------------------------------------

    def start(self, observations: np.ndarray) -> None:
        """Begin from the first observations [S*E, D] of the environments."""
        self.latest = observations.reshape(self.latest.shape).astype(self.latest.dtype)
        self.replay.start(self.latest)

    def restart(self, copy: int, observations: np.ndarray) -> None:
        """Go on from new episodes of one seed, first observations [E, D]."""
        self.latest[copy] = observations
        self.replay.restart(copy, self.latest[copy])

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
            if stopping() or not self._primed(episodes, clock, stopping):
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
        if not self.summed:
            return {}
        means = dict(zip(LOSSES, (self.sums / self.summed).cpu().numpy(), strict=True))
        self.sums.zero_()
        self.summed = 0
        return means | {"n_updates": np.full(len(self.seeds), self.updates)}

    def _primed(
        self,
        episodes: Episodes,
        clock: Callable[[str], AbstractContextManager[None]],
        stopping: Callable[[], bool],
    ) -> bool:
        """Whether `priming_steps` are done, doing them when learning has started."""
        if episodes.env_steps > self.config.learning_starts:
            with clock("update"):
                while self.updates < self.config.priming_steps:
                    if stopping():
                        return False
                    self.update()
        return True

    def _step(self, envs: gym.vector.VectorEnv, episodes: Episodes) -> None:
        """One step of every lane into the replay."""
        config = self.config
        if episodes.env_steps < config.learning_starts:
            actions = self.action_stream.uniform(config.num_envs, self.squash.size) * 2.0 - 1.0
        else:
            noise = self.action_stream.normal(config.num_envs, self.squash.size)
            actions = self.squash.act(self._actor(self.latest), noise)
        actions = actions.astype(self.latest.dtype)
        asked = self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        asked = asked.reshape(-1, self.squash.size).astype(self.low.dtype)
        self.latest, _ = step_into(
            self.replay, envs, episodes, asked, actions, self.latest, config.clips_rewards
        )

    def _actor(self, observations: np.ndarray) -> np.ndarray:
        if self.acting is not None:
            return self.acting.forward(observations)
        with torch.no_grad():
            return (
                self.actor(torch.from_numpy(observations).to(self.log_ent_coef.device))
                .cpu()
                .numpy()
            )

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions [..., A] without noise for observations [..., D], of the first copy."""
        rows = np.asarray(observation, self.latest.dtype)
        flat = torch.from_numpy(rows.reshape(-1, rows.shape[-1])).to(self.log_ent_coef.device)
        with torch.no_grad():
            output = self.actor(flat[None].expand(len(self.seeds), -1, -1).contiguous())[0]
        squashed = np.tanh(output[:, : self.squash.size].cpu().numpy())
        actions = self.low + 0.5 * (squashed + 1.0) * (self.high - self.low)
        return actions.reshape(*rows.shape[:-1], -1)

    def asked(self, actions: np.ndarray) -> np.ndarray:
        """Actions as a vector environment takes them."""
        return actions.reshape(-1, self.squash.size)

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
        self.sums += losses

    @torch.no_grad()  # the passes that need gradients ask for them
    def learn(self, sample: Sample, noise: Tensor) -> Tensor:
        """Learn from a sample with the actor's noise [S, 2, B, A]; `train/*` values [4, S], which
        LOSSES names and the next update overwrites."""
        batch = noise.shape[2]
        if batch not in self._laid_out:
            self._laid_out[batch] = self._lay_out(batch)
        inputs, steps = self._laid_out[batch]
        inputs.fill(sample, noise)
        for step in steps:
            step()
        self.updates += 1
        return self.losses

    def _lay_out(self, batch: int) -> tuple[Inputs, list[Step]]:
        """An update of `batch` transitions per seed: where its inputs go, and its steps.

        All that it reads and writes has its place from then on, so that a step is one call with
        arguments at hand. It needs the interpreter, which threads share, for little else.
        """
        config, critics, aside, squash = self.config, self.critics, self.aside, self.squash
        new = partial(self.losses.new_zeros, len(self.seeds))
        width, m = squash.size, critics.codec.outputs
        x = Inputs.of(new, batch, self.latest.shape[-1], width)
        actor_loss, critic_loss, ent_coef, ent_loss = self.losses

        output, next_output = new(batch, 2 * width), new(batch, 2 * width)
        policy = squash.space(x.here[..., -width:], new(batch))
        following = squash.space(x.ahead[..., -width:], new(batch))
        record = self.units.record if self.handle.observes else None
        act = aside.beside(
            [
                self.actor_passes.forward_later(x.observations, output, record),
                squash.sample_later(output, x.noise, policy),
            ],
            [
                self.next_passes.forward_later(x.next_observations, next_output),
                squash.sample_later(next_output, x.next_noise, following),
            ],
        )
        heat = self.temperature.learn_later(policy.log_prob, ent_coef, ent_loss)

        outputs, future, gradient = (new(TWINS, batch, m) for _ in range(3))
        look = critics.look_later(x.taken, outputs, x.ahead, future)
        soft = Soft(x.rewards, x.discounts, ent_coef, following.log_prob)
        errors = critics.errors_later(outputs, future, soft, critic_loss, gradient)
        learn = critics.learn_later(gradient, x.here, outputs)

        lesser = critics.lesser_later(outputs, ent_coef, policy.log_prob, actor_loss, gradient)
        d_actions, d_output = new(TWINS, batch, width), new(batch, 2 * width)
        follow = [
            [partial(self._at_times, s) for s in steps]
            for steps in critics.follow_later(config.tau)
        ]
        climb = critics.action_gradient_later(gradient, d_actions, follow)
        squashed = squash.gradient_later(policy, d_actions, ent_coef, d_output)
        backward = self.actor_passes.backward_later(d_output, aside)
        step = self.handle.before_step, self.optimizer.move, self.handle.after_step
        return x, [act, heat, look, errors, learn, lesser, climb, squashed, backward, *step]

    def _at_times(self, follow: Step) -> None:
        """The targets do not follow every update."""
        if (self.updates + 1) % self.config.target_update_interval == 0:
            follow()

    # ---- seeing and state ----------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """Correlates of plasticity [S] by key, on a sample that no stream pays for."""
        if not len(self.replay):
            return {}
        probe = self.replay.sample(Streams(self.seeds, "probe"), _PROBE_ROWS, 1.0)
        obs, actions = (
            torch.from_numpy(x).to(self.log_ent_coef) for x in (probe.observations, probe.actions)
        )
        with torch.no_grad(), self.units.recording():
            self.actor(obs)
        own: dict[str, Any] = dict(metrics.measure(self.units))
        measured = {f"actor/{key.removeprefix('net/')}": value for key, value in own.items()}
        return measured | self.critics.measure(obs, actions)

    def on_change(self, changed: list[bool]) -> None:
        """Tell the methods which seeds' task changed."""
        self.handle.on_change(changed)
        self.critics.handle.on_change([c for c in changed for _ in range(TWINS)])

    def counts(self) -> dict[str, Tensor]:
        """Units recycled so far [S] by each method, over all three networks."""
        twins = self.critics.counts()
        return {name: count + twins[name] for name, count in self.handle.counts().items()}

    def state(self, copy: int) -> dict[str, Any]:
        """All that one seed's future depends on."""
        return {
            "actor": weights_of(self.actor, copy),
            "optimizer": self.optimizer.state_of(copy),
            "interventions": self.handle.state_of(copy),
            "metrics": self.units.references.state_of(copy),
            "critics": self.critics.state(copy),
            "temperature": self.temperature.state(copy),
            "streams": {name: s.state(copy) for name, s in self._streams().items()},
            "replay": self.replay.state(copy),
            "latest": torch.from_numpy(self.latest[copy].copy()),
            "updates": self.updates,
            "sums": self.sums[:, copy].cpu(),
            "summed": self.summed,
        }

    @torch.no_grad()
    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        load_weights(self.actor, copy, state["actor"])
        self.optimizer.load_state_of(copy, state["optimizer"])
        self.handle.load_state_of(copy, state["interventions"])
        self.units.references.load_state_of(copy, state["metrics"])
        self.critics.load_state(copy, state["critics"])
        self.temperature.load_state(copy, state["temperature"])
        for name, stream in self._streams().items():
            stream.load_state(copy, state["streams"][name])
        self.replay.load_state(copy, state["replay"])
        self.latest[copy] = state["latest"].numpy()
        self.updates, self.summed = state["updates"], state["summed"]
        self.sums[:, copy].copy_(state["sums"])

    def _streams(self) -> dict[str, Streams]:
        return {
            "action": self.action_stream,
            "replay": self.replay_stream,
            "update": self.update_stream,
        }
