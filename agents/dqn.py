"""Deep Q-networks over all seeds of a process as one batched network, on vectors and pixels.

Mnih et al., "Human-level control through deep reinforcement learning", 2015. The details are those
of Stable-Baselines3: linear epsilon, target network copied every so many env steps, Huber loss,
gradients clipped to a norm. Plus what Rainbow (Hessel et al. 2018, arXiv 1710.02298) put together:
double (van Hasselt et al. 2016), dueling (Wang et al. 2016), n-step returns, prioritised replay
(Schaul et al. 2016), distributional values; and what the replay and epsilon do at a change of task.

    perennial train dqn --env CartPole-v1 --steps 5e4
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from perennial.agents.acting import Acting
from perennial.agents.actor_critic import check_actions
from perennial.agents.aside import Aside
from perennial.agents.clipping import Clip
from perennial.agents.config import DQNConfig
from perennial.agents.convnets import observation_shape
from perennial.agents.convolved import Convolved
from perennial.agents.episodes import Episodes
from perennial.agents.exploration import EpsilonGreedy
from perennial.agents.off_policy import step_into
from perennial.agents.passes import written_out
from perennial.agents.q_network import build_q_net, layer_keys, look, q_passes
from perennial.agents.replay import Replay, Sample
from perennial.agents.streams import Streams, torch_generator
from perennial.agents.weights import load_weights, weights_of
from perennial.envs.specs import frame_stack
from perennial.plasticity import attach, find_units, make, metrics, values
from perennial.plasticity.adam import BatchedAdam
from perennial.plasticity.categorical import Loss
from perennial.plasticity.values import Codec

_PROBE_ROWS = 1024  # observations that correlates are measured on,
_PROBE_IMAGES = 256  # and of images, which cost more


def bootstrap(
    codec: Codec, delayed: Tensor, chooser: Tensor, rewards: Tensor, discounts: Tensor
) -> Tensor:
    """Targets [S, B, k]: rewards, and the delayed outputs of the best next action.

    delayed [S, B, n, m]: the target network's outputs on the next observations. chooser: those
    whose value says which action is best: the same, or in double learning the online network's.
    """
    best = codec.decode(chooser).argmax(-1)[..., None, None]
    following = torch.take_along_dim(delayed, best, -2).squeeze(-2)
    return codec.backup(following, rewards, discounts)


def td_loss(codec: Codec, outputs: Tensor, targets: Tensor, huber: float | None) -> Loss:
    """Loss [S, B] of outputs [S, B, m] on targets [S, B, k], and its gradient by the outputs.

    With `huber`, plain values (mse) are fitted by half the square up to that error and linearly
    beyond, as SB3's are; other codecs have losses of their own.
    """
    if huber is None or codec.name != "mse":
        return codec.loss(outputs, targets)
    error = outputs - targets
    slope = error.clamp(-huber, huber)
    return Loss((slope * (error - 0.5 * slope)).squeeze(-1), slope)


class DQN:
    """Network, targets, optimizer and replay of S seeds."""

    def __init__(
        self,
        config: DQNConfig,
        observation_space: gym.Space,
        action_space: gym.Space,
        seeds: tuple[int, ...],
        device: str = "cpu",
        threads: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.seeds = config, seeds
        shape = observation_shape(config, observation_space)
        check_actions(config, action_space, box=False, discrete=True)
        assert isinstance(action_space, gym.spaces.Discrete)
        self.actions, self.first = int(action_space.n), int(action_space.start)
        self.codec = values.make(config.value_loss)
        generators = [torch_generator(s, "init") for s in seeds]
        self.net = build_q_net(config, shape, self.actions, self.codec.outputs, generators)
        self.net.to(device, dtype)
        self.targets = copying.deepcopy(self.net).requires_grad_(False)
        self.optimizer = BatchedAdam(
            self.net.parameters(), config.learning_rate, config.betas, config.adam_eps
        )
        self.optimizer.keep_gradients()
        self.like = torch.zeros((), dtype=dtype, device=device)
        images = len(shape) == 3
        kind = np.dtype(np.uint8 if images else str(dtype).removeprefix("torch."))
        self.latest = np.zeros((len(seeds), config.num_envs, *shape), kind)
        self.units = find_units(
            self.net, self._tensor(self.latest[:, :1]), keys=layer_keys(self.net)
        )
        self.handle = attach(
            [make(spec) for spec in config.interventions],
            self.units,
            self.optimizer,
            seeds=seeds,
            hooks=False,
            targets=[self.targets],
        )
        on_cpu = torch.device(device).type == "cpu"
        # Flat networks compute too little to share between threads. Plain CNNs share rows.
        plain = Convolved.fits(self.net)
        self.aside = aside = Aside(threads > 1 and plain)
        if threads > 1 and on_cpu and images and not plain:
            torch.set_num_threads(threads)
        self.acting = Acting(self.net) if on_cpu and written_out(self.net) else None  # type: ignore[arg-type]
        self.online, self.choosing = q_passes(self.net, aside), q_passes(self.net, aside, False)
        self.delayed = q_passes(self.targets, aside, False)
        self.clip = Clip(self.net.parameters(), config.max_grad_norm)
        self.explore = EpsilonGreedy(config, seeds, self.actions)
        self.replay_stream = Streams(seeds, "replay")
        self.replay = Replay(
            len(seeds),
            config.num_envs,
            config.buffer_size,
            self.latest[0, 0],
            np.zeros((), np.int64),
            config.at_change,
            stack=frame_stack(config.env, config.env_args),
            alpha=config.prioritized_replay_alpha if config.prioritized_replay else None,
        )
        self.steps = self.updates = 0  # of every lane; of the network
        # Of losses and action values, since the last point of the log.
        self.sums = torch.zeros(2, len(seeds), dtype=torch.float64, device=device)
        self.summed = 0

    # ---- acting --------------------------------------------------------------------------------

    def start(self, observations: np.ndarray) -> None:
        """Begin from the first observations [S*E, *D] of the environments."""
        self.latest = observations.reshape(self.latest.shape).astype(self.latest.dtype)
        self.replay.start(self.latest)

    def restart(self, copy: int, observations: np.ndarray) -> None:
        """Go on from new episodes of one seed, first observations [E, *D]."""
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
            if stopping():
                return {}
            with clock("collect"):
                for _ in range(config.train_freq):
                    self._step(envs, episodes)
            if episodes.env_steps > config.learning_starts:
                with clock("update"):
                    for _ in range(config.gradient_steps):
                        self.update(min(1.0, episodes.env_steps / config.steps))
        return self._means(episodes.env_steps)

    def _means(self, env_steps: int) -> dict[str, np.ndarray]:
        """What is logged of the updates since the last call."""
        if not self.summed:
            return {}
        loss, q_value = (self.sums / self.summed).cpu().numpy()
        self.sums.zero_()
        self.summed = 0
        return {
            "loss": loss,
            "q_value": q_value,
            "exploration_rate": self.explore.epsilon(env_steps),
            "n_updates": np.full(len(self.seeds), self.updates),
        }

    def _step(self, envs: gym.vector.VectorEnv, episodes: Episodes) -> None:
        """One step of every lane into the replay; the targets follow where it is time."""
        config = self.config
        explores, actions = self.explore.draw(episodes.env_steps)
        if not explores.all():
            actions = np.where(explores, actions, self._values(self.latest).argmax(-1))
        asked, bound = self.asked(actions), self.config.clips_rewards
        self.latest, tasks = step_into(
            self.replay, envs, episodes, asked, actions, self.latest, bound
        )
        self.explore.notice(tasks, episodes.env_steps)
        self.steps += 1
        if self.steps % max(1, config.target_update_interval // config.num_envs) == 0:
            self._follow()

    def _values(self, observations: np.ndarray) -> np.ndarray:
        """Action values [S, B, n] of observations [S, B, *D]."""
        if self.acting is not None:
            outputs = torch.from_numpy(self.acting.forward(observations))
        else:
            outputs = look(self.choosing, self._tensor(observations))
        return self.codec.decode(self._by_action(outputs)).cpu().numpy()

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The best actions [...] for observations [..., *D], of the first copy."""
        shape = self.latest.shape[2:]
        rows = np.asarray(observation, self.latest.dtype).reshape(-1, *shape)
        best = self._values(np.stack([rows] * len(self.seeds)))[0].argmax(-1)
        return best.reshape(np.shape(observation)[: -len(shape)]) + self.first

    def asked(self, actions: np.ndarray) -> np.ndarray:
        """Actions as a vector environment takes them."""
        return actions.reshape(-1) + self.first

    # ---- learning ------------------------------------------------------------------------------

    def update(self, progress: float) -> None:
        """One gradient step on a fresh sample, at `progress` of the run in [0, 1]."""
        config, first = self.config, self.config.prioritized_replay_beta0
        sample = self.replay.sample(
            self.replay_stream,
            config.batch_size,
            config.gamma,
            config.n_step,
            beta=first + progress * (1.0 - first) if config.prioritized_replay else None,
        )
        errors = self.learn(sample)
        if sample.places is not None:
            self.replay.prioritise(sample.places, errors.cpu().numpy())

    @torch.no_grad()  # the passes that need gradients ask for them
    def learn(self, sample: Sample) -> Tensor:
        """Learn from a sample; how large the errors were [S, B], of distributions the losses."""
        config, codec = self.config, self.codec
        obs, following = self._tensor(sample.observations), self._tensor(sample.next_observations)
        rewards, discounts = self._tensor(sample.rewards), self._tensor(sample.discounts)
        actions = torch.from_numpy(sample.actions).to(self.like.device)[..., None, None]
        record = self.units.record if self.handle.observes else None
        outputs = self._by_action(self.online.forward(obs, record))
        delayed = self._by_action(look(self.delayed, following))
        chooser = self._by_action(look(self.choosing, following)) if config.double else delayed
        targets = bootstrap(codec, delayed, chooser, rewards, discounts)
        taken = torch.take_along_dim(outputs, actions, -2).squeeze(-2)  # [S, B, m]
        loss, gradient = td_loss(codec, taken, targets, config.huber)
        errors = (taken - targets)[..., 0] if codec.outputs == 1 else loss
        if sample.weights is not None:
            weights = self._tensor(sample.weights)
            loss, gradient = loss * weights, gradient * weights[..., None]
        step = (gradient / loss.shape[-1])[..., None, :]
        d_outputs = torch.zeros_like(outputs)
        d_outputs.scatter_(-2, actions.expand(*actions.shape[:-1], codec.outputs), step)
        self.online.backward(d_outputs.flatten(-2))
        self.clip()
        self.handle.before_step()
        self.optimizer.move(beside=self.aside.calls if self.aside.threaded else None)
        self.handle.after_step()
        self.updates += 1
        self.summed += 1
        self.sums += torch.stack([loss.mean(-1), codec.decode(taken).mean(-1)])
        return errors

    def _follow(self) -> None:
        """Move the targets by `tau` of the way; 1 copies them."""
        own = [p.detach() for p in self.targets.parameters()]
        online = [p.detach() for p in self.net.parameters()]
        if self.config.tau == 1.0:
            torch._foreach_copy_(own, online)
        else:
            torch._foreach_lerp_(own, online, self.config.tau)

    def _by_action(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(-1, (self.actions, -1))  # [S, B, n * m] -> [S, B, n, m]

    def _tensor(self, x: np.ndarray) -> Tensor:
        """On the device; numbers in the network's type, pixels as they are."""
        tensor = torch.from_numpy(x)
        return tensor.to(self.like.device) if x.dtype == np.uint8 else tensor.to(self.like)

    # ---- seeing and state ----------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """Correlates of plasticity [S] by key, on a sample that no stream pays for."""
        if not len(self.replay):
            return {}
        rows = _PROBE_IMAGES if self.latest.ndim > 3 else _PROBE_ROWS
        probe = self.replay.sample(Streams(self.seeds, "probe"), rows, 1.0)
        with torch.no_grad(), self.units.recording():
            self.net(self._tensor(probe.observations))
        measured: dict[str, Any] = dict(metrics.measure(self.units))
        if self.clip.scale is not None:  # gradients are told as they were before clipping
            for key in measured:
                if key.endswith("gradient_norm"):
                    measured[key] = measured[key] / self.clip.scale[:, 0]
        return measured

    def on_change(self, changed: list[bool]) -> None:
        """Tell the methods which seeds' task changed."""
        self.handle.on_change(changed)

    def counts(self) -> dict[str, Tensor]:
        """Units recycled so far [S] by each method."""
        return self.handle.counts()

    def state(self, copy: int) -> dict[str, Any]:
        """All that one seed's future depends on."""
        return {
            "q_net": weights_of(self.net, copy),
            "targets": weights_of(self.targets, copy),
            "optimizer": self.optimizer.state_of(copy),
            "interventions": self.handle.state_of(copy),
            "metrics": self.units.references.state_of(copy),
            "exploration": self.explore.state(copy),
            "replay_stream": self.replay_stream.state(copy),
            "replay": self.replay.state(copy),
            "latest": torch.from_numpy(self.latest[copy].copy()),
            "steps": self.steps,
            "updates": self.updates,
            "sums": self.sums[:, copy].cpu(),
            "summed": self.summed,
        }

    @torch.no_grad()
    def load_state(self, copy: int, state: dict[str, Any]) -> None:
        """Continue one seed from `state`."""
        load_weights(self.net, copy, state["q_net"])
        load_weights(self.targets, copy, state["targets"])
        self.optimizer.load_state_of(copy, state["optimizer"])
        self.handle.load_state_of(copy, state["interventions"])
        self.units.references.load_state_of(copy, state["metrics"])
        self.explore.load_state(copy, state["exploration"])
        self.replay_stream.load_state(copy, state["replay_stream"])
        self.replay.load_state(copy, state["replay"])
        self.latest[copy] = state["latest"].numpy()
        self.steps, self.updates, self.summed = state["steps"], state["updates"], state["summed"]
        self.sums[:, copy].copy_(state["sums"])
