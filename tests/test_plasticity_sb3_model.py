"""The callback for stock Stable-Baselines3: metrics, changes of task, rebuilding, errors, and the
README's examples."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.logger import configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from perennial.plasticity import ContinualBackprop, Units, make, metrics
from perennial.plasticity.sb3 import PlasticityCallback
from perennial.plasticity.sb3_networks import networks_of
from tests.sb3_models import (
    KINDS,
    Watch,
    build,
    differences,
    everything,
    learn,
    optimizers,
    reload,
    weights,
)

every_kind = pytest.mark.parametrize("kind", KINDS)
CBP = "cbp:rate=0.1,maturity=2"


class Tasks(gym.Wrapper):
    """Tells a task that changes after 20 steps."""

    steps = 0

    def step(self, action):
        self.steps += 1
        *rest, info = super().step(action)
        return *rest, info | {"task": self.steps // 20}


# ---- metrics and changes -------------------------------------------------------------------------


@every_kind
def test_metrics_in_sb3_s_logger(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Measured on stored observations after an optimizer step, under the tags of the README; the
    activations that methods see stay those of the minibatch."""
    model, callback = build(kind, verbose=1), PlasticityCallback(CBP, metrics_every=16)
    model.set_logger(configure(str(tmp_path), ["stdout", "json", "tensorboard"]))
    measured: dict[str, float] = {}

    def look(network: str) -> None:
        found = {
            k.removeprefix("plasticity/"): v
            for k, v in model.logger.name_to_value.items()
            if k.startswith("plasticity/")
        }
        own = {k: v for k, v in found.items() if k not in measured}
        if not own:
            return
        measured.update(own)
        part = callback.handles[network]
        for layer in part.units.layers:
            norm = layer.module.weight.norm().item()
            assert own[f"{layer.key}/weight_norm"] == pytest.approx(norm, rel=1e-5)
            norm = layer.module.weight.grad.norm().item()
            assert own[f"{layer.key}/gradient_norm"] == pytest.approx(norm, rel=1e-5)
        assert all(len(site.raw) == 16 for site in part.units)  # the minibatch again
        (net,) = [n for n in networks_of(model.policy) if n.name == network]
        stored = model.rollout_buffer if kind == "ppo" else model.replay_buffer
        rows = stored.observations[: stored.size()].reshape(-1, *model.observation_space.shape)
        actions = torch.as_tensor(stored.actions[: stored.size()]).reshape(len(rows), -1)
        with torch.no_grad(), part.units.recording():
            kept = [site.raw for site in part.units]
            net.forward((torch.as_tensor(rows), actions))
            again = metrics.measure(part.units)
            for site, raw in zip(part.units, kept, strict=True):
                site.raw = raw
        assert set(own) == set(again)
        for key, value in again.items():
            if key.endswith("weight_change"):  # since the last measurement: none
                continue
            assert own[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key

    learn(model, [callback, Watch(look, post=True)], 2)
    model.dump_logs(1) if kind == "ppo" else model.dump_logs()
    model.logger.close()
    nets = {"ppo": ("policy", "value"), "sac": ("actor", "qf0", "qf1"), "dqn": ("q_net",)}[kind]
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for net in nets:
        for tag in (f"{net}/0/dormant_fraction", f"{net}/effective_rank", f"{net}/weight_norm"):
            assert any(f"plasticity/{tag}" in line for line in lines)
            assert f"plasticity/{tag}" in events.Tags()["scalars"]
    assert max(line.get("intervention/cbp/units_reset", 0) for line in lines) > 0
    shown = capsys.readouterr().out
    assert "units_reset" in shown and "dormant_fraction" not in shown


@every_kind
def test_a_change_of_task_is_told_between_rollouts(kind: str):
    """At the next rollout's start, also where that is after save and load."""
    name = "Pendulum-v1" if kind == "sac" else "CartPole-v1"
    model = build(kind, env=Tasks(gym.make(name)))  # changes at 20, 40, 60 ... steps
    told: list[int] = []

    class Told(ContinualBackprop):
        def on_change(self) -> None:
            told.append(model.num_timesteps)

    methods = [Told(rate=0), "shrink-perturb:every=0,change=true"]
    learn(model, PlasticityCallback(methods))
    # The last rollout of PPO has no successor that could tell of its changes.
    assert told == {"ppo": [32], "sac": [20, 20], "dqn": [20]}[kind]
    counts = [int(s["shrink-perturb.events"]) for s in model.plasticity["state"].values()]
    assert all(count == 1 for count in counts)
    told.clear()
    model = reload(model)
    learn(model, PlasticityCallback(methods), again=True)
    assert told == {"ppo": [64, 96], "sac": [40, 40, 60, 60], "dqn": [40, 60]}[kind]
    counts = [int(s["shrink-perturb.events"]) for s in model.plasticity["state"].values()]
    assert all(count == 3 for count in counts)
    assert model.plasticity["task"] == (6 if kind == "ppo" else 3)


# ---- rebuilding ----------------------------------------------------------------------------------


@every_kind
def test_a_rebuilt_model_is_whole(kind: str):
    """Policy class and arguments are on record; aliases, optimizers and targets are the new
    policy's; layers that stay were drawn as without the method."""
    model, first = build(kind), weights(build(kind))
    PlasticityCallback("layer-norm").init_callback(model)
    assert type(model.policy) is model.policy_class
    assert model.policy_class.__module__ == "perennial.plasticity.sb3_policies"
    assert model.policy_kwargs["rewrites"] == ("layer-norm",)
    norms = [m for m in model.policy.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == {"ppo": 4, "sac": 10, "dqn": 4}[kind]
    trained = {p for o in optimizers(model).values() for g in o.param_groups for p in g["params"]}
    if kind == "ppo":
        assert trained == set(model.policy.parameters())
    else:
        online, target, optimizer = (
            (model.critic, model.critic_target, model.critic.optimizer)
            if kind == "sac"
            else (model.q_net, model.q_net_target, model.policy.optimizer)
        )
        assert set(optimizer.param_groups[0]["params"]) == set(online.parameters())
        assert differences(dict(online.named_parameters()), dict(target.named_parameters())) == []
        assert online is (model.policy.critic if kind == "sac" else model.policy.q_net)
    if kind == "sac":
        assert model.actor is model.policy.actor
        assert set(model.actor.optimizer.param_groups[0]["params"]) == set(model.actor.parameters())
    drawn = {tuple(v.shape): v for v in first.values() if v.ndim > 1}
    found = [v for v in weights(model).values() if v.ndim > 1]
    assert all(any(torch.equal(v, w) for w in found) for v in drawn.values())


def test_ppo_draws_rewritten_layers_as_sb3_does():
    """Orthogonal rows of its gain; layers that know better (simba's) keep their own draw."""
    model = build("ppo")
    PlasticityCallback("crelu").init_callback(model)
    weight = model.policy.mlp_extractor.policy_net[0].weight
    assert weight.shape == (4, 3)
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(3))
    model = build("ppo")
    PlasticityCallback("simba").init_callback(model)
    stem = model.policy.mlp_extractor.policy_net[0].weight
    torch.testing.assert_close(stem.T @ stem, torch.eye(3))


def test_recycled_units_of_ppo_are_drawn_orthogonal():
    """As SB3 draws them, gain sqrt(2) (heads apart): a row of an 8x3 matrix with orthogonal columns
    of length sqrt(2) is shorter than that."""
    model, callback = build("ppo"), PlasticityCallback(CBP)
    inits: dict[str, float] = {}

    def look(_: str) -> None:
        units = callback.handles["policy"].units
        inits.update({layer.key: layer.init.gain for layer in units.layers})
        assert {layer.init.kind for layer in units.layers} == {"orthogonal"}

    learn(model, [callback, Watch(look, post=True)])
    assert inits["policy/2"] == 0.01 and inits["value/2"] == 1.0
    assert inits["policy/0"] == inits["value/1"] == pytest.approx(2**0.5)


@every_kind
def test_injection_into_a_model_that_has_trained(kind: str):
    """Weights and optimizers are taken over, and a loaded model predicts alike."""
    model = learn(build(kind), PlasticityCallback([]))
    before = everything(model)
    PlasticityCallback("injection:every=4").init_callback(model)
    after = {k: v for k, v in everything(model).items() if "_extra_state" not in k}
    assert differences(before, after) == []
    learn(model, PlasticityCallback("injection:every=4"), again=True)
    observations = torch.stack([torch.as_tensor(model.observation_space.sample()) for _ in "abc"])
    loaded = reload(model)
    for network, other in zip(networks_of(model.policy), networks_of(loaded.policy), strict=True):
        batch = observations, torch.zeros(3, *model.action_space.shape)
        with torch.no_grad():
            found, same = network.forward(batch), other.forward(batch)
        found, same = (list(_tensors(value)) for value in (found, same))
        assert found and all(map(torch.equal, found, same))


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


@every_kind
def test_weights_that_a_method_sets_when_attached_are_set_once(kind: str):
    class Halves(ContinualBackprop):
        def bind(self, units: Units, optimizer: torch.optim.Optimizer) -> None:
            super().bind(units, optimizer)
            for site in units:
                site.producer.weight.mul_(0.5)

    straight = learn(build(kind), PlasticityCallback(Halves(rate=0)), 2)
    loaded = reload(learn(build(kind), PlasticityCallback(Halves(rate=0))))
    learn(loaded, PlasticityCallback(Halves(rate=0)), again=True)
    assert differences(everything(loaded), everything(straight)) == []


def test_learning_on_after_an_exception():
    """A learn() that was interrupted leaves state to go on from, and no second set of hooks."""

    class Stop(Exception):
        pass

    def look(_: str) -> None:
        if int(callback.handles["policy"].clock.updates) == 6:
            raise Stop

    model, callback, stopper = build("ppo"), PlasticityCallback(CBP), Watch(look, post=True)
    with pytest.raises(Stop):
        learn(model, [callback, stopper])
    stopper.on_training_end()
    learn(model, PlasticityCallback(CBP))
    assert int(model.plasticity["state"]["policy"]["updates"]) == 6 + 16


@pytest.mark.gpu
@every_kind
def test_on_a_gpu(kind: str):
    """Learns on the device, keeps its state on the CPU when saved, and goes on from it."""
    methods = [CBP, "injection:every=4", "layer-norm"]
    model = learn(build(kind, device="cuda"), PlasticityCallback(methods))
    state = [v for part in model.plasticity["state"].values() for v in part.values()]
    assert {value.device.type for value in state} == {"cpu"}
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = type(model).load(file, env=model.env, device="cuda")
    observations = np.stack([model.observation_space.sample() for _ in range(5)])
    actions = [m.predict(observations, deterministic=True)[0] for m in (model, loaded)]
    assert (actions[0] == actions[1]).all()
    learn(loaded, PlasticityCallback(methods))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "line"),
    [
        (["cbb"], "unknown plasticity method 'cbb'; did you mean 'cbp'?"),
        (["cbp:rate=2"], "cbp: rate=2 must be >= 0 and <= 1"),
        (["layer-norm", "nap"], "layer-norm and nap both"),
        ([make("layer-norm")], "give layer-norm as a spec ('layer-norm')"),
        ([3], "3 is neither an Intervention nor a spec"),
    ],
)
def test_a_wrong_method_is_refused_in_one_line(methods: list, line: str):
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        PlasticityCallback(methods)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "spec", "line"),
    [
        (
            "ppo",
            {"net_arch": [7, 7]},
            "crelu",
            "crelu halves the width of every hidden layer",
        ),
        ("dqn", {"net_arch": []}, "cbp", "cbp finds no units to replace"),
        ("sac", {"net_arch": []}, "layer-norm", "layer-norm finds no nn.Sequential"),
        ("ppo", {}, "reset:net=critic", "no part of PPO's networks is named 'critic'"),
        ("sac", {"net_arch": [8, 6]}, "simba", "simba has one width"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_in_one_line(kind, options, spec, line):
    model = build(kind, policy_kwargs=options)
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        learn(model, PlasticityCallback(spec))
    assert "\n" not in str(caught.value)
    assert differences(weights(model), weights(build(kind, policy_kwargs=options))) == []
    assert not any(module._forward_pre_hooks for module in model.policy.modules())


@every_kind
def test_a_model_that_has_trained_keeps_its_network(kind: str):
    model = learn(build(kind))
    with pytest.raises(
        ValueError, match="layer-norm changes the network, and this model"
    ) as caught:
        learn(model, PlasticityCallback("layer-norm"))
    assert "\n" not in str(caught.value)
    model = learn(build(kind), PlasticityCallback("layer-norm"))
    learn(model, PlasticityCallback([CBP]), again=True)  # the norms stay without being named
    assert model.policy_kwargs["rewrites"] == ("layer-norm",)
    model = learn(build(kind), PlasticityCallback(CBP))
    with pytest.raises(
        ValueError, match="learned with methods \\['cbp'\\], now given are \\['l2'\\]"
    ):
        learn(model, PlasticityCallback("l2"))
    model.plasticity = None
    learn(model, PlasticityCallback("l2"))


def test_other_algorithms_and_policies_are_named():
    with pytest.raises(ValueError, match="knows PPO, A2C, SAC and DQN, not TD3"):
        TD3("MlpPolicy", "Pendulum-v1").learn(10, callback=PlasticityCallback("cbp"))
    own = type("Own", (PPO.policy_aliases["MlpPolicy"],), {})
    with pytest.raises(ValueError, match="know SB3's own policies, not Own"):
        PPO(own, "CartPole-v1").learn(10, callback=PlasticityCallback("layer-norm"))


# ---- README --------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mark", ["PlasticityCallback(", "handle = attach("])
def test_examples_of_the_readme_run_as_written(mark: str, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if mark in block]
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    if "model" in names and isinstance(names["model"], PPO | SAC | DQN):
        state = names["model"].plasticity["state"]  # type: ignore[union-attr]
        assert all(int(part["updates"]) > 0 for part in state.values())
    else:
        assert "dormant" in block and capsys.readouterr().out
