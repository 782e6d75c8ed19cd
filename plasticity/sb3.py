"""Plasticity methods and metrics in stock Stable-Baselines3 models: PPO, A2C, SAC and DQN.

    model = PPO("MlpPolicy", "Pendulum-v1")
    model.learn(1_000_000, callback=PlasticityCallback(["cbp:rate=1e-4", "layer-norm"]))

What it is made of: the networks (sb3_networks.py), methods at work on them (sb3_live.py), and
policies whose networks are changed (sb3_policies.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

from stable_baselines3.common.callbacks import BaseCallback

from perennial.plasticity import registry
from perennial.plasticity.base import Handle, Intervention
from perennial.plasticity.fit import check_together
from perennial.plasticity.sb3_live import Live
from perennial.plasticity.sb3_networks import check_model
from perennial.plasticity.sb3_policies import belongs_to_policy, rebuild


class PlasticityCallback(BaseCallback):
    """Methods at work on every optimizer of a model that owns units, for one `learn` after another.

    PPO and A2C have one such optimizer, DQN one, SAC two: the actor's and the critics' (never the
    temperature's). Each gets methods and random streams of its own, and `every` counts its steps.

    Methods that change the network (`layer-norm`, `crelu` ...) rebuild the policy once, before the
    first step; `model.policy_class` and `policy_kwargs` then say so, and stock `save`, `load` and
    `learn` work. The methods' state is `model.plasticity`: it travels inside stock `save` and
    `load` as plain tensors, and the next `learn` with the same methods goes on from it. `load`
    leaves optimizer, weights and state exactly as they were; what SB3 itself does not save (replay
    memory, environments, random streams) is the user's to restore.

    Target networks. Recycling (cbp, redo, snr, regrama), penalties and averages act on the online
    network, as in the published code, and the target follows as SB3 lets it. Methods that jump
    (resets, shrink-perturb, injection) or hold the weights to a norm move the target with it
    (`attach(targets=...)`): else it would teach the old function again.

    Where the environment tells its task (`info["task"]`, as perennial's do), a change is passed on
    at the next rollout's start, so that no rollout of PPO mixes two policies; elsewhere call
    `on_change`.

    Args:
        methods: specs (`"cbp:rate=1e-4"`) or interventions, which are copied for each optimizer.
            Those that change the network are given as specs.
        metrics_every: env steps between measurements, made after the next optimizer step on up to
            512 stored observations and logged under `plasticity/<net>/<metric>`; 0 for none. Nets:
            policy and value of PPO, actor, qf0 and qf1 of SAC, q_net of DQN, and features where
            several of them read the same. Gradient norms are those that the optimizer sees: SB3
            clips before.
        seed: of the methods' random streams; default the model's seed, else 0.

    Raises:
        ValueError: one line; an unknown name, an algorithm or model that a method does not fit, a
            model that trained with other methods.
    """

    def __init__(
        self,
        methods: Sequence[Intervention | str] | Intervention | str,
        *,
        metrics_every: int = 10_000,
        seed: int | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if isinstance(methods, Intervention | str):
            methods = [methods]
        if metrics_every < 0:
            raise ValueError(f"metrics_every={metrics_every} must be a number of env steps, or 0")
        self.metrics_every, self.seed = metrics_every, seed
        self._methods: list[Intervention] = []
        self._rewrites: list[str] = []
        for given in methods:
            method = registry.make(given) if isinstance(given, str) else given
            if not isinstance(method, Intervention):
                raise ValueError(f"{given!r} is neither an Intervention nor a spec like 'cbp'")
            if belongs_to_policy(method):
                if not isinstance(given, str):
                    raise ValueError(
                        f"give {method.name} as a spec ({method.name!r}): SB3 makes the network "
                        f"again when it loads the model"
                    )
                self._rewrites.append(given)
            if not method.rewrites or _acts(method):
                self._methods.append(method)
        check_together([registry.parse_spec(spec)[0] for spec in self._rewrites])
        self._live: Live | None = None
        self._told = False  # of a change, while nothing is at work

    @property
    def handles(self) -> dict[str, Handle]:
        """The handle of each optimizer while `learn` runs: policy; actor, critic; q_net."""
        return {} if self._live is None else {p.network.name: p.handle for p in self._live.parts}

    def on_change(self) -> None:
        """Tell the methods that the task changed, at the next rollout's start."""
        if self._live is None:
            self._told = True
        else:
            self._live.changed = True

    # ---- what SB3 calls ------------------------------------------------------------------------

    def _init_callback(self) -> None:
        check_model(self.model)
        rebuild(self.model, self._rewrites)

    def _on_training_start(self) -> None:
        before = getattr(self.model, "plasticity", None)
        if isinstance(before, Live):  # a learn that an exception ended
            before.close()
            before = before.snapshot()
        seed = self.model.seed if self.seed is None else self.seed
        measures = self.metrics_every > 0
        self._live = Live(self.model, self._methods, seed or 0, self._log, before, measures)
        self._live.changed |= self._told
        self._told = False
        self.model.plasticity = self._live  # type: ignore[attr-defined]

    def _on_rollout_start(self) -> None:
        if self._live is not None and self._live.changed:
            self._live.changed = False
            for part in self._live.parts:
                part.handle.on_change()

    def _on_step(self) -> bool:
        tasks = [info["task"] for info in self.locals.get("infos", ()) if "task" in info]
        if tasks and self._live is not None and all(isinstance(t, Integral) for t in tasks):
            task = max(map(int, tasks))
            self._live.changed |= self._live.task is not None and task != self._live.task
            self._live.task = task
        return True

    def _on_rollout_end(self) -> None:
        live = self._live
        if live is None:
            return
        if live.task is not None:
            self.logger.record("task/index", live.task)
        since = self.num_timesteps - (live.measured or 0)
        if self.metrics_every and (live.measured is None or not 0 <= since < self.metrics_every):
            for name, count in live.counts().items():
                self.logger.record(f"intervention/{name}/units_reset", count)
            for part in live.parts:
                part.measure_next = True

    def _on_training_end(self) -> None:
        if self._live is not None:
            self._live.close()
            self.model.plasticity = self._live.snapshot()  # type: ignore[attr-defined]
            self._live = None

    def _log(self, found: Mapping[str, float]) -> None:
        """Metrics of one network."""
        if self._live is not None:
            self._live.measured = self.num_timesteps
        for key, value in found.items():
            # Not in the table on the screen: it would be long, and cut keys may coincide there.
            self.logger.record(f"plasticity/{key}", value, exclude=("stdout", "log"))


def _acts(method: Intervention) -> bool:
    """Whether a method does something at optimizer steps."""
    kind = type(method)
    hooks = ("before_step", "after_step", "on_change")
    return any(getattr(kind, hook) is not getattr(Intervention, hook) for hook in hooks)
