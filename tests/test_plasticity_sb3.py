"""The callback for stock Stable-Baselines3: networks, targets, pixels, parts by name, penalties.
Every method by itself: test_plasticity_sb3_methods.py; the rest: test_plasticity_sb3_model.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from perennial.plasticity.sb3 import PlasticityCallback
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


# ---- optimizers, networks, targets ---------------------------------------------------------------


@every_kind
def test_one_handle_per_optimizer_that_owns_units(kind: str):
    model, callback = build(kind), PlasticityCallback(CBP)
    seen: set[str] = set()

    def look(_: str) -> None:
        seen.update(callback.handles)
        for name, handle in callback.handles.items():
            assert handle.optimizer is optimizers(model)[name]
            owned = {p for group in handle.optimizer.param_groups for p in group["params"]}
            assert {site.producer.module.weight for site in handle.units} <= owned
        if kind == "sac":
            assert not model.ent_coef_optimizer._optimizer_step_post_hooks

    learn(model, [callback, Watch(look, post=True)])
    assert seen == set(optimizers(model)) == set(model.plasticity["state"])
    for optimizer in optimizers(model).values():  # and nothing stays behind
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_pre_hooks for module in model.policy.modules())


def test_actor_and_critic_draw_different_numbers():
    model = learn(build("sac"), PlasticityCallback(CBP))
    actor, critic = model.plasticity["state"].values()
    assert not torch.equal(actor["cbp.key"], critic["cbp.key"])


def test_a_critic_that_shares_features_reads_the_actor_s_units():
    kwargs = {"share_features_extractor": True}
    model, callback = build("sac", pixels=True, policy_kwargs=kwargs), PlasticityCallback(CBP)
    readers: dict[str, set[str]] = {}

    def look(_: str) -> None:
        for handle in callback.handles.values():
            for site in handle.units:
                readers[site.key] = {c.layer.key for c in site.consumers}

    learn(model, [callback, Watch(look, post=True)])
    assert readers["actor/3"] == {"actor/4", "qf0/0", "qf1/0"}
    assert set(readers) == {
        *("actor/0", "actor/1", "actor/2", "actor/3", "actor/4", "actor/5"),
        *("qf0/0", "qf0/1", "qf1/0", "qf1/1"),
    }


@pytest.mark.parametrize("kind", ["sac", "dqn"])
@pytest.mark.parametrize("spec", ["reset:every=5", "weight-norm:scope=all", "l2-init", CBP])
def test_targets_jump_with_the_network_and_otherwise_follow(spec: str, kind: str):
    """At the step of a reset the target is the network; held norms are held there too; recycling
    and penalties leave it alone."""
    slow = {"tau": 0.01} | ({"target_update_interval": 1} if kind == "dqn" else {})
    model, callback = build(kind, **slow), PlasticityCallback(spec)
    name = "critic" if kind == "sac" else "q_net"
    before: dict[str, Tensor] = {}
    resets = moves = 0

    def target() -> dict[str, Tensor]:
        network = model.critic_target if kind == "sac" else model.q_net_target
        return {k: v.detach().clone() for k, v in network.named_parameters()}

    def look_before(network: str) -> None:
        before.update(target())

    def look_after(network: str) -> None:
        nonlocal resets, moves
        if network != name:
            return
        now = target()
        online = dict((model.critic if kind == "sac" else model.q_net).named_parameters())
        moves += bool(differences(now, before))
        if spec.startswith("reset"):
            handle = callback.handles[name]
            if int(handle.clock.updates) % 5 == 0:
                assert differences(now, online) == []
                resets += 1
        elif spec.startswith("weight-norm"):
            for key, value in now.items():
                if key.endswith("weight"):
                    torch.testing.assert_close(value.norm(), online[key].norm())
        else:
            assert differences(now, before) == []

    watched = [Watch(look_before, post=True), callback, Watch(look_after, post=True)]
    learn(model, watched)
    assert resets == (3 if spec.startswith("reset") else 0)
    assert (moves > 0) == spec.startswith(("reset", "weight-norm"))


@every_kind
def test_pixels(kind: str):
    """CNN policies: convolutions and what reads them are recycled, a norm is put in, and learning
    goes on after save and load as if never saved."""
    methods = [CBP, "layer-norm"]
    straight = learn(build(kind, pixels=True), PlasticityCallback(methods), 2)
    model, callback = build(kind, pixels=True), PlasticityCallback(methods)
    sites: dict[str, int] = {}
    keys = Watch(
        lambda _: sites.update(
            {s.key: s.columns.k for h in callback.handles.values() for s in h.units}
        ),
        post=True,
    )
    learn(model, [callback, keys])
    first = {"ppo": "features", "sac": "actor", "dqn": "q_net"}[kind]
    assert {f"{first}/0", f"{first}/1", f"{first}/2", f"{first}/3"} <= set(sites)
    loaded = learn(reload(model), PlasticityCallback(methods), again=True)
    assert differences(everything(loaded), everything(straight)) == []
    assert sum(int(s["cbp.replaced"]) for s in loaded.plasticity["state"].values()) > 0


@every_kind
def test_part_of_a_model_by_name(kind: str):
    net = {"ppo": "value", "sac": "qf1", "dqn": "q_net"}[kind]
    model, without = build(kind), build(kind)
    first = weights(model)
    callback = PlasticityCallback(f"reset:net={net},every=1000000,change=true")
    callback.on_change()
    untrained = {"learning_starts": 10**6} if kind != "ppo" else {}
    for name, value in untrained.items():
        setattr(model, name, value)
    changed: list[str] = []

    class Look(Watch):
        def _on_rollout_end(self) -> None:
            changed[:] = changed or differences(weights(self.model), first)

    learn(model, [callback, Look(lambda _: None, post=True)])
    parts = {"ppo": ("value_net",), "sac": ("qf1",), "dqn": ("q_net",)}[kind]
    assert changed and all(any(part in name for part in parts) for name in changed)
    assert differences(first, weights(without)) == []


# ---- penalties -----------------------------------------------------------------------------------


def penalty_of(name: str, handle, first: dict[Tensor, Tensor]) -> Tensor:
    """The loss whose gradient the method adds, written out."""
    method = handle.interventions[name]
    owned = [p for group in handle.optimizer.param_groups for p in group["params"]]
    layers = [layer.module for layer in handle.units.layers]
    s = method.strength
    if name == "l2":
        return s / 2 * sum(p.square().sum() for p in owned)
    if name == "l2-init":
        within = [p for layer in layers for p in (layer.weight, layer.bias)]
        return s / 2 * sum((p - first[p]).square().sum() for p in within)
    if name == "parseval":
        loss = torch.zeros(())
        for site, scale in zip(handle.units, method.scales[0], strict=True):
            w = site.producer.module.weight
            error = w @ w.T - scale * torch.eye(len(w))
            loss = loss + s * (64 / len(w)) ** 2 * error.square().sum()
        return loss
    if name == "spectral":
        loss = torch.zeros(())
        for layer, u in zip(layers, method.u[0], strict=True):
            w, u = layer.weight, u[: len(layer.weight)]
            v = torch.nn.functional.normalize(w.detach().T @ u, dim=0)
            u = torch.nn.functional.normalize(w.detach() @ v, dim=0)
            loss = loss + s * ((u @ w @ v).square() - 1).square()
            loss = loss + s * layer.bias.square().sum().square()
        return loss
    loss = torch.zeros(())
    for number, trunk in enumerate(method._trunks):
        x = trunk.tap.raw
        target = functional_call(trunk.module, trunk.frozen, (x,)).detach()
        target = method.scale * target @ method.get_buffer(f"first_heads_{number}")[0].T
        heads = method.get_buffer(f"heads_{number}")[0]
        error = trunk.module(x) @ heads.T - target
        loss = loss + s * error.square().sum(-1).mean()
    return loss


@every_kind
@pytest.mark.parametrize(
    "spec",
    [
        "l2:strength=0.1",
        "l2-init:strength=0.1",
        "spectral:strength=0.1,every=1",
        "parseval:strength=0.1,every=1",
        "infer:strength=0.1,heads=3,scale=2,every=1",
    ],
)
def test_penalty_gradient_is_autograd_s(spec: str, kind: str):
    model, callback = build(kind), PlasticityCallback(spec)
    name = spec.partition(":")[0]
    first = {p: p.detach().clone() for p in model.policy.parameters()}
    before: dict[Tensor, Tensor] = {}
    wanted: dict[Tensor, Tensor] = {}
    steps = 0

    def look_before(network: str) -> None:
        handle = callback.handles[network]
        owned = [p for group in handle.optimizer.param_groups for p in group["params"]]
        before.update({p: p.grad.clone() for p in owned})
        recorded = [site.raw for site in handle.units]
        with torch.enable_grad():
            loss = penalty_of(name, handle, first)
            found = torch.autograd.grad(loss, owned, allow_unused=True)
        for site, raw in zip(handle.units, recorded, strict=True):
            site.raw = raw
        wanted.update(zip(owned, found, strict=True))

    def look_after(network: str) -> None:
        nonlocal steps
        for group in callback.handles[network].optimizer.param_groups:
            for p in group["params"]:
                pull = torch.zeros_like(p) if wanted[p] is None else wanted[p]
                torch.testing.assert_close(p.grad - before[p], pull, rtol=1e-3, atol=2e-5)
                steps += bool(pull.any())

    learn(model, [Watch(look_before, post=False), callback, Watch(look_after, post=False)])
    assert steps > 30


@pytest.mark.parametrize(
    ("kind", "options", "works"),
    [
        ("dqn", {}, True),
        ("ppo", {"policy_kwargs": {"net_arch": []}}, True),
        ("ppo", {"policy_kwargs": {"share_features_extractor": False, "net_arch": []}}, True),
        ("ppo", {}, False),
        ("sac", {}, False),
        ("sac", {"policy_kwargs": {"share_features_extractor": True}}, False),
    ],
)
def test_infer_on_pixels_works_or_says_in_one_line_why_not(kind: str, options: dict, works: bool):
    model = build(kind, pixels=True, **options)
    callback = PlasticityCallback("infer:every=1", metrics_every=0)
    if works:
        learn(model, callback)
        assert all(h.interventions["infer"].trained.item() > 0 for h in callback.handles.values())
        return
    with pytest.raises(ValueError, match="infer") as error:
        learn(model, callback)
    assert "\n" not in str(error.value)
