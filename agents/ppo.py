"""Proximal policy optimisation over all seeds of a process as one batched network.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017 (arXiv 1707.06347). The details are
those of Stable-Baselines3: per-minibatch advantage normalisation, optional value clipping, one Adam
over both networks, gradient clipping by the norm over both, stop of an update by approximate KL,
value bootstrapping where a time limit cut an episode. Each holds per seed: clipping, normalisation
and the KL stop never look across seeds.

    perennial train ppo --env perennial/SlipperyAnt-v0 --steps 1e6 --plasticity cbp

Deviations: initial weights are drawn per seed from their own stream; log probabilities of a rollout
come from the means that acted, values from one batch after the rollout (the same numbers up to
rounding).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from perennial.agents.actor_critic import ActorCritic, interventions, sizes
from perennial.agents.config import PPOConfig
from perennial.agents.distributions import surrogate_losses, value_gradient
from perennial.agents.episodes import Episodes
from perennial.agents.networks import Acting, WrittenOut, passes
from perennial.agents.normalize import Normalizer
from perennial.agents.returns import generalised_advantages
from perennial.agents.streams import Streams
from perennial.plasticity import attach, find_units, make
from perennial.plasticity.adam import BatchedAdam

_PROBE_ROWS = 1024  # observations of the rollout on which correlates are measured, per seed
_CHUNK = 4096  # rows of one value forward: bounds memory, costs nothing


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
        n_obs, n_act = sizes(config, observation_space, action_space)
        self.low, self.high = action_space.low, action_space.high  # type: ignore[attr-defined]
        self.net = ActorCritic(config, n_obs, n_act, seeds).to(self.device, dtype)
        self.optimizer = BatchedAdam(
            self.net.parameters(), lr=config.learning_rate, betas=config.betas, eps=config.adam_eps
        )
        self.units = find_units(
            self.net,
            torch.zeros(len(seeds), 1, n_obs, device=self.device, dtype=dtype),
            forward=self.net,
        )
        self.handle = attach(
            [make(spec) for spec in interventions(config)],
            self.units,
            self.optimizer,
            seeds=seeds,
            hooks=False,
        )
        self.policy_passes, self.value_passes = passes(self.net.policy), passes(self.net.value)
        written_out = isinstance(self.policy_passes, WrittenOut)
        on_cpu = self.device.type == "cpu"
        self.acting = Acting(self.net.policy) if written_out and on_cpu else None
        self.gradients: list[Tensor] = []
        self.flat: list[Tensor] = []
        self.record = self.units.record if self.handle.observes else None
        # Two networks on two threads, one core each, beat matrix products split over two cores.
        self.aside = None
        if threads > 1 and on_cpu:
            if written_out:
                self.aside = ThreadPoolExecutor(1, thread_name_prefix="value")
            else:
                torch.set_num_threads(threads)

        self.action_noise = Streams(seeds, "action")
        self.minibatch_order = Streams(seeds, "minibatch")
        self.normalizer = Normalizer(
            len(seeds), n_obs, config.num_envs, config.norm_obs, config.norm_reward, config.gamma
        )
        self.updates = 0  # minibatch steps per seed
        lead = (len(seeds), config.n_steps, config.num_envs)
        self.observations = torch.zeros(*lead, n_obs, dtype=dtype)
        self.actions = torch.zeros(*lead, n_act, dtype=dtype)
        self.outputs = torch.zeros(*lead, n_act, dtype=dtype)
        self.rewards = np.zeros((config.n_steps, len(seeds) * config.num_envs))
        self.ends = np.zeros(self.rewards.shape, np.bool_)
        # Normalised observations that act next.
        self.latest = np.zeros(
            (len(seeds), config.num_envs, n_obs), self.observations.numpy().dtype
        )

    # ---- acting
    # ------------------------------------------------------------------------------------------

    def start(self, observations: np.ndarray) -> None:
        """Begin from the first observations [S*E, D] of the environments."""
        shaped = observations.reshape(self.latest.shape)
        self.latest = self.normalizer.observe(shaped).astype(self.latest.dtype)

    def _policy(self, observations: np.ndarray) -> np.ndarray:
        if self.acting is not None:
            return self.acting.forward(observations)
        with torch.no_grad():
            return self.net.policy(torch.from_numpy(observations).to(self.device)).cpu().numpy()

    def collect(self, envs: gym.vector.VectorEnv, episodes: Episodes) -> None:
        """Play one rollout of n_steps per lane into the buffers; its episodes go to `episodes`."""
        config, shape, clip = self.config, self.latest.shape, self.config.clips_actions
        steps, lanes = config.n_steps, shape[0] * shape[1]
        noise = self.net.distribution.noise(self.action_noise, steps, config.num_envs)
        seen, outputs, acted = (x.numpy() for x in (self.observations, self.outputs, self.actions))
        raw, rewards = np.zeros((steps, lanes)), np.zeros((steps, lanes))
        ends = np.zeros((steps, lanes), np.bool_)
        cuts: list[tuple[int, int, np.ndarray]] = []
        latest, normalizer = self.latest, self.normalizer
        for t in range(steps):
            seen[:, t] = latest
            outputs[:, t] = output = self._policy(latest)
            acted[:, t] = actions = output + noise[:, t]
            asked = actions.reshape(lanes, -1)
            if clip:
                asked = np.clip(asked, self.low, self.high)
            obs, raw[t], terminated, truncated, infos = envs.step(asked)
            if "_final_obs" in infos:  # only where an episode ended
                ends[t] = infos["_final_obs"]
                episodes.end(t, raw, ends[t], infos)
                for lane in np.flatnonzero(truncated & ~terminated):
                    cuts.append((t, int(lane), infos["final_obs"][lane]))
            if normalizer.returns is not None:
                rewards[t] = normalizer.reward(
                    raw[t].reshape(shape[:2]), ends[t].reshape(shape[:2])
                ).ravel()
            latest = normalizer.observe(obs.reshape(shape)).astype(latest.dtype)
        episodes.rollout(raw)
        self.latest, self.ends = latest, ends
        self.rewards = raw if normalizer.returns is None else rewards
        if config.timeout == "bootstrap":
            self._bootstrap(cuts)

    def _bootstrap(self, cuts: list[tuple[int, int, np.ndarray]]) -> None:
        """Add gamma V(final observation) where a time limit cut an episode short."""
        for t, lane, final in cuts:
            s = lane // self.config.num_envs
            row = np.zeros((len(self.seeds), 1, self.observations.shape[-1]), self.latest.dtype)
            row[s] = self.normalizer.normalize(final[None], s)
            value = self.values(torch.from_numpy(row))[s, 0]
            self.rewards[t, lane] += self.config.gamma * float(value)

    def values(self, observations: Tensor) -> Tensor:
        """Values [S, B] (on the CPU) of normalised observations [S, B, D]."""
        chunks = observations.split(_CHUNK, dim=1)
        with torch.no_grad():
            return torch.cat(
                [self.value_forward(c.to(self.device))[..., 0].cpu() for c in chunks], dim=1
            )

    def value_forward(self, observations: Tensor) -> Tensor:
        """Value network without bookkeeping for training."""
        return self.net.value(observations)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions [..., A] without noise for raw observations [..., D], of the first copy."""
        rows = self.normalizer.normalize(np.asarray(observation), 0).astype(self.latest.dtype)
        flat = torch.from_numpy(rows.reshape(-1, rows.shape[-1])).to(self.device)
        with torch.no_grad():
            means = self.net.policy(flat[None].expand(len(self.seeds), -1, -1))[0]
        return means.cpu().numpy().reshape(*rows.shape[:-1], -1)

    # ---- learning
    # ----------------------------------------------------------------------------------------

    def update(self, progress: float) -> dict[str, np.ndarray]:
        """Learn from the rollout; returns `train/*` values [S]. `progress` of the run in [0, 1]."""
        config, copies, lanes = self.config, len(self.seeds), self.config.num_envs
        steps, n = config.n_steps, config.n_steps * config.num_envs
        values = self.values(self.observations.reshape(copies, n, -1))
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
        return self.learn(
            self.observations.reshape(copies, n, -1),
            actions,
            log_prob,
            values,
            advantage,
            order,
            progress,
        )

    def learn(
        self,
        observations: Tensor,
        actions: Tensor,
        log_prob: Tensor,
        values: Tensor,
        advantages: Tensor,
        order: Tensor,
        progress: float = 0.0,
    ) -> dict[str, np.ndarray]:
        """`n_epochs` passes over a rollout of n transitions per seed.

        observations [S, n, D], actions [S, n, A], log_prob, values, advantages [S, n]; order [S,
        epochs, n].
        """
        config, device, copies = self.config, self.device, len(self.seeds)
        returns = advantages + values
        batch, n = config.batch_size, advantages.shape[1]
        minibatches = n // batch
        rate = config.learning_rate * (1.0 - progress if config.lr_schedule == "linear" else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if config.advantage_norm == "batch":
            advantages = _standardised(advantages)
        data = [
            x.to(device) for x in (observations, actions, log_prob, values, advantages, returns)
        ]
        log_ratios = torch.zeros(
            config.n_epochs, copies, minibatches, batch, dtype=values.dtype, device=device
        )
        weights, residuals = torch.zeros_like(log_ratios), torch.zeros_like(log_ratios)
        done = np.zeros(copies, np.int64)  # minibatches that each seed has seen
        active = [True] * copies
        for epoch in range(config.n_epochs):
            if not any(active):
                break
            obs, act, old, old_values, adv, ret = (_shuffled(x, order[:, epoch]) for x in data)
            if config.advantage_norm == "minibatch" and batch > 1:
                adv = _standardised(adv.view(copies, minibatches, batch)).view(copies, n)
            weights[epoch] = adv.view(copies, minibatches, batch)
            for k in range(minibatches):
                rows = slice(k * batch, (k + 1) * batch)
                log_ratio, residual = self._gradients(
                    obs[:, rows],
                    act[:, rows],
                    old[:, rows],
                    old_values[:, rows],
                    adv[:, rows],
                    ret[:, rows],
                )
                log_ratios[epoch, :, k], residuals[epoch, :, k] = log_ratio, residual
                done += active
                if config.target_kl is not None:
                    kl = (log_ratio.exp() - 1.0 - log_ratio).mean(-1).tolist()
                    active = [
                        a and x <= 1.5 * config.target_kl for a, x in zip(active, kl, strict=True)
                    ]
                    if not any(active):
                        break
                moving = None if all(active) else active
                self._clip()
                self.handle.before_step(active=moving)
                self.optimizer.move(active=moving)
                self.handle.after_step(active=moving)
                self.updates += 1
        return self._losses(log_ratios, weights, residuals, done, values, returns, rate)

    def _gradients(
        self,
        obs: Tensor,
        actions: Tensor,
        old_log_prob: Tensor,
        old_values: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Leave the loss' gradients in `.grad`; returns log ratios, value residuals [S, B]."""
        config = self.config

        def value_side() -> Tensor:
            value = self.value_passes.forward(obs, self.record)[..., 0]
            residual, gradient = value_gradient(
                value, returns, old_values, config.clip_range_vf, config.vf_coef
            )
            self.value_passes.backward(gradient[..., None])
            return residual

        aside = self.aside.submit(value_side) if self.aside is not None else None
        output = self.policy_passes.forward(obs, self.record)
        step = self.net.distribution.surrogate(
            output, actions, old_log_prob, advantages, config.clip_range, config.ent_coef
        )
        self.policy_passes.backward(step.d_output)
        return step.log_ratio, aside.result() if aside is not None else value_side()

    def _clip(self) -> None:
        """Scale each seed's gradients to a norm of at most max_grad_norm, over both networks."""
        limit = self.config.max_grad_norm
        if limit is None:
            return
        if not self.flat:  # gradients are tensors that stay: their views are made once
            self.gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            self.flat = [g.view(len(self.seeds), 1, -1) for g in self.gradients]
        squares = torch.cat([torch.bmm(g, g.mT) for g in self.flat], dim=-1)  # [S, 1, tensors]
        scale = (limit / (squares.sum(-1).sqrt_().add_(1e-6))).clamp_(max=1.0)  # [S, 1]
        if len(self.seeds) == 1:
            torch._foreach_mul_(self.gradients, scale[0, 0])
        else:
            for g in self.flat:
                g.mul_(scale[..., None])

    @torch.no_grad()
    def _losses(
        self,
        log_ratios: Tensor,
        weights: Tensor,
        residuals: Tensor,
        done: np.ndarray,
        values: Tensor,
        returns: Tensor,
        rate: float,
    ) -> dict[str, np.ndarray]:
        """Averages over the minibatches that each seed has seen, under SB3's names."""
        config = self.config
        parts = surrogate_losses(log_ratios, weights, config.clip_range)
        parts["value_loss"] = residuals.square().mean(-1)
        averaged: dict[str, np.ndarray] = {}
        last: dict[str, np.ndarray] = {}
        for name, part in parts.items():
            table = part.transpose(0, 1).reshape(len(self.seeds), -1).cpu().double().numpy()
            averaged[name] = np.array([row[:k].mean() for row, k in zip(table, done, strict=True)])
            last[name] = np.array([row[k - 1] for row, k in zip(table, done, strict=True)])
        entropy = self.net.distribution.entropy(self.outputs.to(self.device)).cpu().double().numpy()
        variance = returns.double().var(-1, correction=0).cpu().numpy()
        unexplained = (returns - values).double().var(-1, correction=0).cpu().numpy()
        return {
            **averaged,
            "loss": last["policy_gradient_loss"]
            - config.ent_coef * entropy
            + config.vf_coef * last["value_loss"],
            "entropy_loss": -entropy,
            "explained_variance": 1.0 - unexplained / np.where(variance > 0, variance, np.nan),
            "std": self.net.distribution.log_std.exp().mean(-1).cpu().double().numpy(),
            "learning_rate": np.full(len(self.seeds), rate),
            "clip_range": np.full(len(self.seeds), config.clip_range),
            "n_updates": np.full(len(self.seeds), self.updates),
        }

    def probe(self) -> None:
        """Record activations on a fixed number of the rollout's observations, for the metrics."""
        rows = self.observations.flatten(1, 2)[:, :_PROBE_ROWS].to(self.device)
        with torch.no_grad(), self.units.recording():
            self.net(rows)

    # ---- state
    # -------------------------------------------------------------------------------------------

    def state(self, copy: int) -> dict[str, Any]:
        """All that one seed's future depends on: tensors and plain values in a nested dict."""
        return {
            "weights": {k: v[copy].detach().cpu() for k, v in self.net.state_dict().items()},
            "optimizer": self.optimizer.state_of(copy),
            "interventions": self.handle.state_of(copy),
            "streams": {
                "action": self.action_noise.state(copy),
                "minibatch": self.minibatch_order.state(copy),
            },
            "normalizer": self.normalizer.state(copy),
            "latest": torch.from_numpy(self.latest[copy].copy()),
            "updates": self.updates,
        }

    @torch.no_grad()
    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        own = self.net.state_dict()
        for name, tensor in state["weights"].items():
            own[name][copy].copy_(tensor)
        self.optimizer.load_state_of(copy, state["optimizer"])
        self.handle.load_state_of(copy, state["interventions"])
        self.action_noise.load_state(copy, state["streams"]["action"])
        self.minibatch_order.load_state(copy, state["streams"]["minibatch"])
        self.normalizer.load_state(copy, state["normalizer"])
        self.latest[copy] = state["latest"].numpy()
        self.updates = state["updates"]


def _standardised(x: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-8) along the last axis, as SB3 does."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8)


def _shuffled(x: Tensor, order: Tensor) -> Tensor:
    """x [S, n, ...] with each seed's rows in its order [S, n]."""
    if x.shape[0] == 1:
        return x[0].index_select(0, order[0].to(x.device))[None]
    return torch.stack(
        [row.index_select(0, o.to(x.device)) for row, o in zip(x, order, strict=True)]
    )
