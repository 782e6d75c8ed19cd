"""Every method of the registry through stock PPO, SAC and DQN on real environments."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from perennial.plasticity import make
from perennial.plasticity.registry import METHODS
from perennial.plasticity.sb3 import PlasticityCallback
from perennial.plasticity.sb3_policies import belongs_to_policy
from tests.plasticity_cases import ACTING, NULL
from tests.sb3_models import (
    KINDS,
    Streams,
    Watch,
    build,
    differences,
    everything,
    learn,
    optimizers,
    random_streams,
    reload,
    weights,
)

# Events that come after a stretch of these short runs and that meet its end.
EVENTS = {
    "shrink-perturb": "shrink-perturb:every=5",
    "reset": "reset:every=5",
    "head-reset": "head-reset:every=5",
    "optimizer-reset": "optimizer-reset:every=5",
    "injection": "injection:every=5,times=2",
    "hare-tortoise": "hare-tortoise:every=5,momentum=0.9",
}
ACTS = {"simba": "simba:version=2"}  # version 1 only changes the network
NEVER = {name: f"{name}:every=0" for name in EVENTS}
SPECS = {name: (EVENTS | ACTS).get(name) or ACTING.get(name, [name])[0] for name in METHODS}
RECYCLING = ("cbp", "redo", "snr", "regrama")
every_method = pytest.mark.parametrize("name", METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def trained(name: str, kind: str) -> tuple[BaseAlgorithm, Streams]:
    """A model after one stretch with the method, and the random streams at that moment."""
    model = learn(build(kind), PlasticityCallback(SPECS[name], seed=3))
    return model, random_streams()


@functools.cache
def plain(kind: str, stretches: int = 1) -> dict[str, Tensor]:
    return weights(learn(build(kind), stretches=stretches))


@every_kind
@every_method
def test_acts(name: str, kind: str):
    """With the method the weights become others, and stay finite."""
    found = weights(trained(name, kind)[0])
    assert all(torch.isfinite(value).all() for value in found.values())
    assert differences(found, plain(kind))


@every_kind
@every_method
def test_null_setting_is_the_plain_run_bit_for_bit(name: str, kind: str):
    """Weights, targets, temperature, optimizers, random streams; with metrics measured often."""
    spec = NEVER.get(name) or NULL[name]
    if spec is None:
        pytest.skip(f"{name} has no null setting")
    options = {"policy_kwargs": {"optimizer_kwargs": {"betas": (0.9, 0.9)}}}
    with_it, without = build(kind, **options), build(kind, **options)
    callback = PlasticityCallback(spec, metrics_every=1)
    if belongs_to_policy(make(spec)):  # its network is another: the same is built at once
        callback.init_callback(with_it)
        without.policy_class, without.policy_kwargs = with_it.policy_class, with_it.policy_kwargs
        without._setup_model()
    learn(with_it, callback)
    learn(without)
    with_it.plasticity = None
    assert differences(everything(with_it), everything(without)) == []


@every_kind
@every_method
def test_goes_on_after_save_and_load_as_if_never_saved(name: str, kind: str):
    """Bit for bit as one learn() of the same length, the methods' state included."""
    straight = everything(learn(build(kind), PlasticityCallback(SPECS[name], seed=3), 2))
    model, streams = trained(name, kind)
    loaded = reload(model, streams)
    assert type(loaded.plasticity) is dict
    observations = np.stack([model.observation_space.sample() for _ in range(5)])
    actions = [m.predict(observations, deterministic=True)[0] for m in (model, loaded)]
    assert (actions[0] == actions[1]).all()
    learn(loaded, PlasticityCallback(SPECS[name], seed=3), again=True)
    assert differences(everything(loaded), straight) == []


@every_kind
@pytest.mark.parametrize("name", EVENTS)
def test_every_counts_steps_of_each_optimizer(name: str, kind: str):
    model = learn(build(kind), PlasticityCallback(EVENTS[name].replace("every=5", "every=4")))
    for network, state in model.plasticity["state"].items():
        steps = int(state["updates"])
        assert steps == _steps(model, network) > 8
        most = 2 if name == "injection" else steps
        assert int(state[f"{name}.events"]) == min(steps // 4, most)


@every_kind
def test_cbp_replaces_as_many_as_expected(kind: str):
    rate, stretches = 0.04, 3
    callback = PlasticityCallback(f"cbp:rate={rate},maturity=0")
    model = learn(build(kind), callback, stretches)
    expected = variance = found = 0.0
    for state in model.plasticity["state"].values():
        sites = state["cbp.age"].shape[-1] // 8
        share = rate * 8  # of a unit per site and step, all being eligible
        trials = sites * int(state["updates"])
        expected += share * trials
        variance += share * (1 - share) * trials
        found += int(state["cbp.replaced"])
    assert expected > 25
    assert abs(found - expected) < 3 * math.sqrt(variance)


@every_kind
@pytest.mark.parametrize("name", RECYCLING)
def test_recycling_clears_moments_and_outgoing_weights(name: str, kind: str):
    """At every step: units born in it have fresh rows, no moments and no outgoing weights; there
    are as many as the method counts."""
    model, callback = build(kind), PlasticityCallback(SPECS[name])
    rows: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    recycled: list[int] = []

    def before(network: str) -> None:
        handle = callback.handles[network]
        rows[network] = [site.producer.weight.clone() for site in handle.units]
        counts[network] = int(handle.counts()[name])

    def after(network: str) -> None:
        handle, state = callback.handles[network], optimizers(model)[network].state
        total, now = 0, int(handle.clock.updates[0])
        spans = handle.units.spans
        for site, span, old in zip(handle.units, spans, rows[network], strict=True):
            gone = handle.moments.birth[0, span] == now
            assert ((site.producer.weight != old).flatten(2).any(-1)[0] | ~gone).all()
            total += int(gone.sum())
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not state[site.producer.module.weight][moment][gone].any()
                assert not state[site.producer.module.bias][moment][gone].any()
                for consumer in site.consumers:
                    value = state[consumer.layer.module.weight][moment]
                    assert not value[:, consumer.columns.table[gone]].any()
            assert not site.outgoing()[0, gone].any()
        assert total == int(handle.counts()[name]) - counts[network]
        recycled.append(total)

    learn(model, [Watch(before, post=True), callback, Watch(after, post=True)])
    assert sum(recycled) > 0


def _steps(model, network: str) -> int:
    states = optimizers(model)[network].state.values()
    counts = {int(state["step"]) for state in states}
    # A reset of the optimizer begins its own count anew: take that of the learning loop.
    loops = {"PPO": 2 * 2 * 4, "SAC": model._n_updates, "DQN": model._n_updates}
    steps = loops[type(model).__name__]
    assert max(counts) <= steps
    return steps
