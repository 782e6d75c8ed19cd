"""Proximal policy optimisation over all seeds of a process as one batched network.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017 (arXiv 1707.06347). The details are
those of Stable-Baselines3: per-minibatch advantage normalisation, optional value clipping, one Adam
over both networks, gradient clipping by the norm over both, stop of an update by approximate KL,
value bootstrapping where a time limit cut an episode. Each holds per seed: clipping, normalisation
and the KL stop never look across seeds.

    perennial train ppo --env perennial/SlipperyAnt-v0 --steps 1e6 --plasticity cbp

Deviations: initial weights are drawn per seed from their own stream; log probabilities of a rollout
come from the means that acted, values of a network of its own from one batch after the rollout (the
same numbers up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from perennial.agents.actor_critic import ActorCritic, Sides, check_actions
from perennial.agents.clipping import Clip
from perennial.agents.config import PPOConfig
from perennial.agents.convnets import observation_shape
from perennial.agents.distributions import SurrogateGradient, approximate_kl, value_gradient
from perennial.agents.episodes import Episodes
from perennial.agents.minibatches import Batch, shuffled, standardised
from perennial.agents.normalize import Normalizer
from perennial.agents.returns import explained_variance, generalised_advantages
from perennial.agents.streams import Streams
from perennial.agents.tally import Tally
from perennial.agents.weights import load_weights, weights_of
from perennial.plasticity import attach, find_units, make, metrics, values
from perennial.plasticity.adam import BatchedAdam

# Observations of the rollout on which correlates are measured, per seed: flat ones, images.
_PROBE_ROWS, _PROBE_IMAGES = 1024, 512
_CHUNK, _CHUNK_IMAGES = 4096, 256  # rows of one value forward: bounds memory, costs nothing


class PPO:
    """Networks, optimizer, interventions and rollout of S seeds: `collect`, then `update`."""

    def __init__(
        self,
        config: PPOConfig,
        observation_space: gym.Space,
        action_space: gym.Space,
        seeds: tuple[int, ...],
        device: str = "cpu",
        threads: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.seeds, self.device = config, seeds, torch.device(device)
        shape = observation_shape(config, observation_space)
        self.images = len(shape) > 1
        if self.images and config.norm_obs:
            raise ValueError(
                f"norm_obs normalises flat observations, and {config.env} has images, which are "
                "scaled by 1/255: leave norm_obs off"
            )
        check_actions(config, action_space, box=True, discrete=True)
        self.codec = values.make(config.value_loss)
        self.net = ActorCritic(config, shape, action_space, self.codec.outputs, seeds).to(
            self.device, dtype
        )
        self.optimizer = BatchedAdam(
            self.net.parameters(), lr=config.learning_rate, betas=config.betas, eps=config.adam_eps
        )
        self.optimizer.keep_gradients()
        # Images are stored as they come, as bytes.
        kind = torch.uint8 if self.images else dtype
        self.units = find_units(
            self.net,
            torch.zeros(len(seeds), 1, *shape, device=self.device, dtype=kind),
            keys=self.net.keys,
        )
        self.handle = attach(
            [make(spec) for spec in config.interventions],
            self.units,
            self.optimizer,
            seeds=seeds,
            hooks=False,
        )
        self.sides = Sides(self.net, shape, threads)
        self.clip = Clip(self.net.parameters(), config.max_grad_norm)
        self.record = self.units.record if self.handle.observes else None

        self.action_noise = Streams(seeds, "action")
        self.minibatch_order = Streams(seeds, "minibatch")
        self.normalizer = Normalizer(
            len(seeds), shape[0], config.num_envs, config.norm_obs, config.norm_reward, config.gamma
        )
        self.updates = np.zeros(len(seeds), np.int64)  # minibatch steps
        lead = (len(seeds), config.n_steps, config.num_envs)
        self.observations = torch.zeros(*lead, *shape, dtype=kind)
        self.actions = torch.zeros(*lead, self.net.distribution.size, dtype=dtype)
        self.outputs = torch.zeros(*lead, self.net.distribution.n_out, dtype=dtype)
        self.value_outputs = torch.zeros(*lead, self.codec.outputs, dtype=dtype)
        self.rewards = np.zeros((config.n_steps, len(seeds) * config.num_envs))
        self.ends = np.zeros(self.rewards.shape, np.bool_)
        # Normalised observations that act next.
        self.latest = np.zeros(
            (len(seeds), config.num_envs, *shape), self.observations.numpy().dtype
        )

    # ---- acting
    # ------------------------------------------------------------------------------------------

    def start(self, observations: np.ndarray) -> None:
        """Begin from the first observations [S*E, *D] of the environments."""
        shaped = observations.reshape(self.latest.shape)
        self.latest = self.normalizer.observe(shaped).astype(self.latest.dtype)

    def restart(self, copy: int, observations: np.ndarray) -> None:
        """Go on from new episodes of one seed, first observations [E, *D]."""
        self.latest[copy] = self.normalizer.normalize(observations, copy)

    def advance(
        self,
        envs: gym.vector.VectorEnv,
        episodes: Episodes,
        clock: Callable[[str], AbstractContextManager[None]],
        stopping: Callable[[], bool],
    ) -> dict[str, np.ndarray]:
        """One whole rollout and what is learned from it: `train/*` values [S]."""
        with clock("collect"):
            self.collect(envs, episodes)
        with clock("update"):
            return self.update(min(1.0, episodes.env_steps / self.config.steps))

    def collect(self, envs: gym.vector.VectorEnv, episodes: Episodes) -> None:
        """Play one rollout of n_steps per lane into the buffers; its episodes go to `episodes`."""
        config, shape, distribution = self.config, self.latest.shape, self.net.distribution
        steps, lanes = config.n_steps, shape[0] * shape[1]
        noise = distribution.noise(self.action_noise, steps, config.num_envs)
        seen, outputs, acted = (x.numpy() for x in (self.observations, self.outputs, self.actions))
        valued = self.value_outputs.numpy()
        raw, rewards = np.zeros((2, steps, lanes))
        bound = config.clips_rewards
        ends = np.zeros((steps, lanes), np.bool_)
        cuts: list[tuple[int, int, np.ndarray]] = []
        latest, normalizer = self.latest, self.normalizer
        for t in range(steps):
            seen[:, t] = latest
            output, value = self.sides.act(latest)
            outputs[:, t] = output
            if value is not None:
                valued[:, t] = value
            acted[:, t] = actions = distribution.choose(output, noise[:, t])
            asked = distribution.asked(actions)
            obs, raw[t], terminated, truncated, infos = envs.step(asked)
            if "_final_obs" in infos:  # only where an episode ended
                ends[t] = infos["_final_obs"]
                episodes.end(t, raw, ends[t], infos)
                for lane in np.flatnonzero(truncated & ~terminated):
                    cuts.append((t, int(lane), infos["final_obs"][lane]))
            learned = raw[t] if bound is None else np.clip(raw[t], -bound, bound)
            rewards[t] = normalizer.reward(
                learned.reshape(shape[:2]), ends[t].reshape(shape[:2])
            ).ravel()
            latest = normalizer.observe(obs.reshape(shape)).astype(latest.dtype)
        episodes.rollout(raw)
        self.latest, self.ends, self.rewards = latest, ends, rewards
        if config.timeout == "bootstrap":
            self._bootstrap(cuts)

    def _bootstrap(self, cuts: list[tuple[int, int, np.ndarray]]) -> None:
        """Add gamma V(final observation) where a time limit cut an episode short."""
        for t, lane, final in cuts:
            s = lane // self.config.num_envs
            row = np.zeros_like(self.latest[:, :1])
            row[s] = self.normalizer.normalize(final[None], s)
            value = self.values(torch.from_numpy(row))[s, 0]
            self.rewards[t, lane] += self.config.gamma * float(value)

    def values(self, observations: Tensor) -> Tensor:
        """Values [S, B] (on the CPU) of normalised observations [S, B, *D]."""
        chunks = observations.split(_CHUNK_IMAGES if self.images else _CHUNK, dim=1)
        with torch.no_grad():
            outputs = [self.net.values(c.to(self.device)) for c in chunks]
            return torch.cat([self.codec.decode(x).cpu() for x in outputs], dim=1)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions [..., A] without noise for raw observations [..., *D], of the first copy."""
        shape = self.latest.shape[2:]
        rows = self.normalizer.normalize(np.asarray(observation), 0).astype(self.latest.dtype)
        flat = torch.from_numpy(rows.reshape(1, -1, *shape)).to(self.device)
        with torch.no_grad():
            outputs = self.net.choices(torch.cat([flat] * len(self.seeds)))[0]
        actions = self.net.distribution.mode(outputs.cpu().numpy())
        return actions.reshape(*rows.shape[: -len(shape)], -1)

    def asked(self, actions: np.ndarray) -> np.ndarray:
        """Actions as a vector environment takes them."""
        return self.net.distribution.asked(actions)

    # ---- learning
    # ----------------------------------------------------------------------------------------

    def update(self, progress: float) -> dict[str, np.ndarray]:
        """Learn from the rollout at `progress` of the run in [0, 1]; `train/*` values [S]."""
        config, copies, lanes = self.config, len(self.seeds), self.config.num_envs
        steps, n = config.n_steps, config.n_steps * config.num_envs
        observations = self.observations.flatten(1, 2)
        if self.net.shared is None:
            values = self.values(observations)
        else:
            values = self.codec.decode(self.value_outputs.flatten(1, 2))
        next_values = self.values(torch.from_numpy(self.latest)).numpy()
        by_lane = values.numpy().reshape(copies, steps, lanes).swapaxes(0, 1).reshape(steps, -1)
        advantages = generalised_advantages(
            self.rewards,
            by_lane,
            next_values.reshape(-1),
            self.ends,
            config.gamma,
            config.gae_lambda,
        )
        advantages = advantages.reshape(steps, copies, lanes).swapaxes(0, 1).reshape(copies, n)
        advantage = torch.from_numpy(advantages).to(values.dtype)
        actions = self.actions.reshape(copies, n, -1)
        log_prob = self.net.distribution.log_prob(
            self.outputs.reshape(copies, n, -1).to(self.device), actions.to(self.device)
        )
        order = torch.from_numpy(self.minibatch_order.permutations(n, config.n_epochs))
        batch = Batch(observations, actions, log_prob, values, advantage, advantage + values)
        return self.learn(batch, order, progress)

    @torch.no_grad()  # the passes that need gradients ask for them
    def learn(self, batch: Batch, order: Tensor, progress: float = 0.0) -> dict[str, np.ndarray]:
        """Passes over a rollout of n transitions per seed, in the order [S, n_epochs, n]."""
        config, copies = self.config, len(self.seeds)
        size, n = config.batch_size, order.shape[-1]
        rate = config.learning_rate * (1.0 - progress if config.lr_schedule == "linear" else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if config.advantage_norm == "batch":
            batch = batch._replace(advantages=standardised(batch.advantages))
        batch = Batch(*(x.to(self.device) for x in batch))
        tally = Tally(copies, config.n_epochs, n // size, size, batch.values)
        active = [True] * copies  # a seed whose policy has moved too far stops for this update
        for epoch in range(config.n_epochs):
            rows = Batch(*(shuffled(x, order[:, epoch]) for x in batch))
            if config.advantage_norm == "minibatch" and size > 1:
                standard = standardised(rows.advantages.view(copies, -1, size))
                rows = rows._replace(advantages=standard.view(copies, n))
            tally.start_epoch(rows.advantages)
            for first in range(0, n, size):
                minibatch = Batch(*(x[:, first : first + size] for x in rows))
                step, value_loss = self._gradients(minibatch)
                tally.add(step, value_loss, active)
                if config.target_kl is not None:
                    limit = 1.5 * config.target_kl
                    kl = approximate_kl(step.log_ratio).tolist()
                    active = [a and x <= limit for a, x in zip(active, kl, strict=True)]
                    if not any(active):
                        return self._losses(tally, batch, rate)
                moving = None if all(active) else active
                self.clip()
                self.handle.before_step(active=moving)
                self.optimizer.move(active=moving)
                self.handle.after_step(active=moving)
                self.updates += active
        return self._losses(tally, batch, rate)

    def _gradients(self, batch: Batch) -> tuple[SurrogateGradient, Tensor]:
        """Leave the loss' gradients in `.grad`; surrogate parts, value losses [S, B]."""
        config = self.config

        def value_side(output: Tensor) -> tuple[Tensor, Tensor]:
            if config.value_loss == "mse":
                loss, gradient = value_gradient(
                    output[..., 0], batch.returns, batch.values, config.clip_range_vf
                )
                gradient = gradient[..., None]
            else:
                loss, gradient = self.codec.loss(output, self.codec.encode(batch.returns))
            return loss, gradient * (config.vf_coef / loss.shape[-1])

        def policy_side(output: Tensor) -> tuple[SurrogateGradient, Tensor]:
            step = self.net.distribution.surrogate(
                output,
                batch.actions,
                batch.log_prob,
                batch.advantages,
                config.clip_range,
                config.ent_coef,
            )
            return step, step.d_output

        return self.sides.learn(batch.observations, self.record, policy_side, value_side)

    def _losses(self, tally: Tally, batch: Batch, rate: float) -> dict[str, np.ndarray]:
        """The update in numbers [S], under SB3's names."""
        config, copies = self.config, len(self.seeds)
        return {
            **tally.losses(config.clip_range, config.ent_coef, config.vf_coef),
            "explained_variance": explained_variance(batch.values, batch.returns),
            **self.net.distribution.logged(),
            "learning_rate": np.full(copies, rate),
            "clip_range": np.full(copies, config.clip_range),
            "n_updates": self.updates.copy(),
        }

    def measure(self) -> dict[str, Any]:
        """Correlates of plasticity [S] by key, on a fixed number of the rollout's observations."""
        rows = self.observations.flatten(1, 2)
        if self.images:  # few, so from all over the rollout
            rows = rows[:, :: -(-rows.shape[1] // _PROBE_IMAGES)]
        rows = rows[:, :_PROBE_ROWS].to(self.device)
        with torch.no_grad(), self.units.recording():
            self.net(rows)
        measured: dict[str, Any] = dict(metrics.measure(self.units))
        if self.clip.scale is not None:  # gradients are told as they were before clipping
            for key in measured:
                if key.endswith("gradient_norm"):
                    measured[key] = measured[key] / self.clip.scale[:, 0]
        entropy = self.net.distribution.entropy(self.outputs.flatten(1, 2).to(self.device))
        return measured | {"policy/policy_entropy": entropy.cpu().double()}

    def on_change(self, changed: list[bool]) -> None:
        """Tell the methods which seeds' task changed; between two rollouts."""
        self.handle.on_change(changed)

    def counts(self) -> dict[str, Tensor]:
        """Units recycled so far [S] by each method."""
        return self.handle.counts()

    # ---- state
    # -------------------------------------------------------------------------------------------

    def state(self, copy: int) -> dict[str, Any]:
        """All that one seed's future depends on: tensors and plain values in a nested dict."""
        return {
            "weights": weights_of(self.net, copy),
            "optimizer": self.optimizer.state_of(copy),
            "interventions": self.handle.state_of(copy),
            "metrics": self.units.references.state_of(copy),
            "streams": {
                "action": self.action_noise.state(copy),
                "minibatch": self.minibatch_order.state(copy),
            },
            "normalizer": self.normalizer.state(copy),
            "latest": torch.from_numpy(self.latest[copy].copy()),
            "updates": int(self.updates[copy]),
        }

    @torch.no_grad()
    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        load_weights(self.net, copy, state["weights"])
        self.optimizer.load_state_of(copy, state["optimizer"])
        self.handle.load_state_of(copy, state["interventions"])
        self.units.references.load_state_of(copy, state["metrics"])
        self.action_noise.load_state(copy, state["streams"]["action"])
        self.minibatch_order.load_state(copy, state["streams"]["minibatch"])
        self.normalizer.load_state(copy, state["normalizer"])
        self.latest[copy] = state["latest"].numpy()
        self.updates[copy] = state["updates"]
