"""Recycled units step as newborn under any Adam: against Adam with a step count per element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.plasticity import (
    BatchedAdam,
    BatchedLinear,
    Intervention,
    attach,
    find_units,
    kernels,
)
from perennial.plasticity.flat import flatten, together
from perennial.plasticity.surgery import Selection


class Pick(Intervention):
    """Recycles given units at given steps: {step: {site position: mask [S, n]}}."""

    name: ClassVar[str] = "pick"

    def __init__(self, plan: dict[int, dict[int, Tensor]], treatment: str = "exact") -> None:
        super().__init__()
        self.plan, self.treatment = plan, treatment

    def after_step(self) -> None:
        assert self.clock.host is not None
        masks = self.plan.get(self.clock.host[0], {})
        self._recycle(
            [Selection.from_mask(p, self.units.sites[p], mask) for p, mask in masks.items()],
            treatment=self.treatment,
        )


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    ).double()


def batched() -> nn.Module:
    return nn.Sequential(
        BatchedLinear(2, 3, 6), nn.ReLU(), BatchedLinear(2, 6, 5), nn.ReLU(), BatchedLinear(2, 5, 2)
    ).double()


class Reference:
    """Adam written per element, each with its own step count t; the tensor has made T steps.

    eps is that of the tensor's step: torch adds it after correcting v by T, which is `eps *
    sqrt(1 - b2^T)` beside an uncorrected v, and plain eps once T is large.
    """

    def __init__(self, params: list[nn.Parameter], options: dict[str, Any]) -> None:
        self.options = options
        self.weights = [p.detach().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]
        self.t = [torch.zeros_like(p) for p in params]
        self.steps = 0  # T

    def step(self, grads: list[Tensor]) -> None:
        o = self.options
        b1, b2 = o["betas"]
        self.steps += 1
        eps = o["eps"] * (1 - b2**self.steps) ** 0.5
        for w, m, v, t, g in zip(self.weights, self.m, self.v, self.t, grads, strict=True):
            if o.get("decoupled"):
                w.mul_(1 - o["lr"] * o["weight_decay"])
            else:
                g = g + o["weight_decay"] * w
            t.add_(1)
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            w.sub_(o["lr"] * (1 - b2**t).sqrt() / (1 - b1**t) * m / (v.sqrt() + eps))


OPTIONS = {"lr": 0.01, "betas": (0.9, 0.97), "eps": 1e-4, "weight_decay": 0.0}
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"foreach": False}),
    "foreach": (torch.optim.Adam, {"foreach": True}),
    "fused": (torch.optim.Adam, {"fused": True}),
    "coupled": (torch.optim.Adam, {"weight_decay": 0.1}),
    "equal betas": (torch.optim.Adam, {"betas": (0.9, 0.9)}),
    "no momentum": (torch.optim.Adam, {"betas": (0.0, 0.9)}),
    "f rises from below": (torch.optim.Adam, {"betas": (0.5, 0.97)}),
    "f crosses 1": (torch.optim.Adam, {"betas": (0.9, 0.95)}),
    "f falls": (torch.optim.Adam, {"betas": (0.97, 0.5)}),
    "only momentum": (torch.optim.Adam, {"betas": (0.9, 0.0)}),
    "maximize": (torch.optim.Adam, {"maximize": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "batched": (BatchedAdam, {}),
    "batched coupled": (BatchedAdam, {"weight_decay": 0.1, "betas": (0.95, 0.95)}),
}


CASES = [
    *[(plain, kind) for kind in OPTIMIZERS if "batched" not in kind],
    (conv, "adam"),
    (conv, "fused"),
    *[(batched, kind) for kind in ("adam", "foreach", "batched", "batched coupled")],
]


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "tensors"])
@pytest.mark.parametrize("late", [False, True], ids=["T small", "T large"])
@pytest.mark.parametrize(("make", "kind"), CASES, ids=[f"{m.__name__}-{k}" for m, k in CASES])
def test_young_units_step_as_under_adam_with_a_step_per_element(
    make: Callable[[], nn.Module],
    kind: str,
    late: bool,
    loops: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """loops: as on the CPU; else in tensor operations, as elsewhere."""
    if not loops:
        monkeypatch.setattr(kernels, "ready", lambda *_: False)
    torch.manual_seed(0)
    model = make()
    shape = {"plain": (8, 3), "conv": (4, 1, 4, 4), "batched": (2, 8, 3)}[make.__name__]
    cls, extra = OPTIMIZERS[kind]
    given = OPTIONS | extra
    maximize = -1.0 if given.get("maximize") else 1.0
    optimizer = cls(model.parameters(), **given)
    params = list(model.parameters())
    reference = Reference(params, given | {"decoupled": cls is torch.optim.AdamW})
    units = find_units(model, torch.zeros(shape, dtype=torch.float64))
    copies = units.copies
    first, second = (site.n for site in units)
    plan = {
        step: {
            0: torch.rand(copies, first) < 0.4,
            **({1: torch.rand(copies, second) < 0.4} if step % 2 else {}),
        }
        for step in (1, 2, 5, 6, 13, 30)
    }
    if late:  # long trained: moments and steps as after 5,000 steps
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.zero_grad()
        for p in params:
            p.grad = torch.zeros_like(p)
        held = [p.detach().clone() for p in params]
        optimizer.step()
        reference.steps = 5000
        for i, p in enumerate(params):
            p.data.copy_(held[i])
            state = optimizer.state[p]
            state["step"].fill_(5000)
            reference.t[i].fill_(5000)
            state["exp_avg"].copy_(reference.m[i].normal_())
            state["exp_avg_sq"].copy_(reference.v[i].normal_().abs_())
    handle = attach(Pick(plan), units, optimizer)
    steps = min(int(s["step"].min()) for s in optimizer.state.values()) if late else 0
    assert (steps > handle.moments.horizon) == late
    for step in range(1, 41):
        optimizer.zero_grad()
        x = torch.randn(shape, dtype=torch.float64)
        (model(x) - 1.0).square().mean().backward()
        grads = [maximize * p.grad.clone() for p in params]
        reference.step(grads)
        events = plan.get(step, {})
        optimizer.step()
        if step > 2 and isinstance(optimizer, BatchedAdam):
            assert (optimizer.aging is not None) == loops
        # Recycling happened inside the step: recycled units are new, the rest must agree.
        for position, mask in events.items():
            site = units.sites[position]
            touched = [(site.producer.module.weight, 1, mask), (site.producer.module.bias, 1, mask)]
            touched += [(q, 1, mask) for norm in site.norms for q in (norm.weight, norm.bias)]
            for consumer in site.consumers:
                columns = torch.zeros(copies, consumer.layer.weight.shape[2], dtype=torch.bool)
                columns[:, consumer.columns.table] = mask[:, :, None].expand(
                    -1, -1, consumer.columns.k
                )
                touched.append((consumer.layer.module.weight, 2, columns))
            for parameter, dim, chosen in touched:
                i = next(k for k, p in enumerate(params) if p is parameter)
                lead = [t if copies > 1 else t[None] for t in
                        (parameter.detach(), reference.weights[i], reference.m[i],
                         reference.v[i], reference.t[i])]  # fmt: skip
                view = [copies, *[1] * (lead[0].ndim - 1)]
                view[dim] = -1
                where = chosen.view(view).expand_as(lead[0])
                lead[1][where] = lead[0][where]
                for state in lead[2:]:
                    state[where] = 0.0
                for key in ("exp_avg", "exp_avg_sq"):
                    kept = optimizer.state[parameter][key]
                    assert (kept if copies > 1 else kept[None])[where].eq(0).all()
        error = max(
            (p.detach() - w).abs().max().item()
            for p, w in zip(params, reference.weights, strict=True)
        )
        assert error < 2e-12, f"step {step}: {error}"


def test_parameters_move_into_one_memory_and_keep_their_values() -> None:
    model = batched()
    values = [p.detach().clone() for p in model.parameters()]
    first = next(iter(model.parameters()))
    assert together(list(model.parameters())) is None
    optimizer = BatchedAdam(model.parameters())
    memory = together(list(model.parameters()))
    assert memory is not None and memory.numel() == sum(v.numel() for v in values)
    assert first is next(iter(model.parameters()))
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert torch.equal(memory, torch.cat([v.flatten() for v in values]))
    model.to(torch.float32)  # they leave it; the optimizer goes on
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert together(list(model.parameters())) is None
    assert flatten([model[0].weight, torch.zeros(3, dtype=torch.float64)]) is None


def test_parameters_that_left_the_memory_step_by_age_where_they_are() -> None:
    """`module.to` between two steps: young units go on as newborn where the weights are now."""
    results = []
    for leave in (False, True):
        torch.manual_seed(0)
        model = batched()
        optimizer = BatchedAdam(model.parameters(), lr=0.01, betas=(0.9, 0.9))
        units = find_units(model, torch.zeros(2, 1, 3, dtype=torch.float64))
        mask = torch.tensor([[True] + [False] * 5] * 2)
        attach(Pick({400: {0: mask}}), units, optimizer)
        for step in range(1, 404):
            optimizer.zero_grad()
            model(torch.randn(2, 4, 3, dtype=torch.float64)).square().sum().backward()
            if leave and step == 402:
                for p in model.parameters():
                    p.data = p.data.clone()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for stayed, left in zip(*results, strict=True):
        assert torch.equal(stayed, left)


def test_zeroing_alone_takes_a_first_step_of_three_learning_rates() -> None:
    """What exact steps are for: methods.md 0.2."""
    for treatment, expected in (("zero", 0.1 / 0.001**0.5), ("exact", 1.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.0)
        units = find_units(model, torch.zeros(1, 2, dtype=torch.float64))
        mask = torch.tensor([[True, False, False]])
        handle = attach(Pick({30_001: {0: mask}}, treatment), units, optimizer, hooks=False)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for state in optimizer.state.values():
            state["step"].fill_(30_000)
        handle.clock.updates.fill_(30_000)
        handle.clock.reload()
        handle.before_step()
        optimizer.step()
        handle.after_step()
        bias = model[0].bias.detach().clone()
        handle.before_step()
        optimizer.step()
        handle.after_step()
        moved = (bias - model[0].bias.detach())[0].item() / 1e-3
        assert moved == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.NAdam(p),
    ],
    ids=["sgd", "rmsprop", "amsgrad", "nadam"],
)
def test_every_average_of_other_optimizers_is_cleared(
    optimizer: Callable[[Any], Optimizer],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    made = optimizer(model.parameters())
    mask = torch.tensor([[False, True, False]])
    attach(Pick({2: {0: mask}}), find_units(model, torch.zeros(1, 2)), made)
    for _ in range(2):
        made.zero_grad()
        model(torch.randn(4, 2)).square().mean().backward()
        made.step()
    found = 0
    for p, rows in ((model[0].weight, (1,)), (model[0].bias, (1,)), (model[2].weight, (0, 1))):
        for value in made.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                found += 1
                assert value[rows].eq(0).all()
                others = value.clone()
                others[rows] = torch.nan
                assert others.ne(0).all()
    assert found >= 3


def test_copies_that_stand_still_keep_every_bit() -> None:
    torch.manual_seed(0)
    model = batched().float()
    optimizer = BatchedAdam(model.parameters(), lr=0.01)
    units = find_units(model, torch.zeros(2, 1, 3))
    mask = torch.tensor([[True, False, True, False, False, False]] * 2)
    handle = attach(Pick({2: {0: mask}}), units, optimizer, hooks=False)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 3)).square().sum().backward()
        active = [0] if step >= 4 else None
        if step >= 4:
            for p in model.parameters():
                p.grad[1] = torch.nan
        before = {k: v.clone() for k, v in handle.state_of(1).items()}
        old = [p[1].detach().clone() for p in model.parameters()] + [
            s[k][1].clone() for s in optimizer.state.values() for k in s
        ]
        handle.before_step(active)
        optimizer.step(active)
        handle.after_step(active)
        new = [p[1].detach() for p in model.parameters()] + [
            s[k][1] for s in optimizer.state.values() for k in s
        ]
        if step >= 4:
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
            assert all(torch.equal(v, before[k]) for k, v in handle.state_of(1).items())
    assert handle.clock.updates.tolist() == [8, 4]


def test_an_optimizer_reset_makes_all_units_as_old_as_their_tensors() -> None:
    torch.manual_seed(0)
    model = batched()
    optimizer = BatchedAdam(model.parameters(), lr=0.01)
    handle = attach(
        Pick({1: {0: torch.ones(2, 6, dtype=torch.bool)}}),
        find_units(model, torch.zeros(2, 1, 3, dtype=torch.float64)),
        optimizer,
    )
    for _ in range(3):
        model(torch.randn(2, 4, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert (handle.moments.birth == 1).sum() == 12
    handle.moments.restart()
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    optimizer.zero_grad()
    model(torch.randn(2, 4, 3, dtype=torch.float64)).square().sum().backward()
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, before in zip(model.parameters(), old, strict=True):
        expected = before - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.5, 0.9), (0.9, 0.93)], ids=str)
def test_grown_units_step_to_the_bit_as_if_never_recycled(betas: tuple[float, float]) -> None:
    """Past the horizon, and for old units beside a young one: F is exactly 1."""
    results = []
    for treatment in ("exact", "zero"):
        torch.manual_seed(0)
        model = plain().float()
        optimizer = torch.optim.Adam(model.parameters(), 0.01, betas=betas)
        units = find_units(model, torch.zeros(8, 3))
        masks = {0: torch.arange(6).unsqueeze(0) == 1}
        handle = attach(Pick({600: masks, 1200: masks}, treatment), units, optimizer)
        assert handle.moments.horizon < 600
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        for step in range(1300):
            if step == 1190:  # grown up: from here the same weights and averages for both
                torch.manual_seed(2)
                for p in model.parameters():
                    p.data.normal_()
                    optimizer.state[p]["exp_avg"].normal_()
                    optimizer.state[p]["exp_avg_sq"].normal_().abs_()
            for p in model.parameters():
                p.grad.normal_()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for number, (exact, zero) in enumerate(zip(*results, strict=True)):
        young = torch.zeros_like(exact, dtype=torch.bool)
        if number < 4:
            young[1] = True
        elif number == 4:
            young[:, 1] = True
        assert torch.equal(exact[~young], zero[~young])
        assert young.any() == (not torch.equal(exact, zero))
