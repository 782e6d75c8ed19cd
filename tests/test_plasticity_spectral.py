"""Spectral and Parseval regularisation, against autograd and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perennial.plasticity import attach, find_units
from tests.penalty_bench import NETS, Bench, mlp

every_net = pytest.mark.parametrize("kind", NETS)


# ---- spectral ----------------------------------------------------------------------------------


def spectral_penalty(bench: Bench, k: float, biases: bool = True) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for w in bench.matrices():
        total = total + (torch.linalg.matrix_norm(w, 2) ** k - 1).square().sum()
    if biases:
        for module in bench.net:
            bias = getattr(module, "bias", None)
            if bias is not None:
                total = total + bias.square().sum(-1).pow(k).sum()
            if isinstance(module, nn.LayerNorm):
                total = total + (module.weight - 1).square().sum()
    return total


@every_net
@pytest.mark.parametrize("options", ["", "exponent=1.5", "biases=false"])
def test_spectral_is_autograds_gradient_once_the_power_method_has_converged(
    kind: str, options: str
) -> None:
    bench = Bench(kind, f"spectral:strength=0.3,every=1,{options}".rstrip(","))
    bench.perturb(0.1)
    for _ in range(400):  # weights stand still
        bench.pulls()
    k = 1.5 if "exponent" in options else 2
    ours = bench.pulls()
    expected = bench.expected(lambda: 0.3 * spectral_penalty(bench, k, "false" not in options))
    for name, g in expected.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-6, atol=1e-8, msg=name)


def test_spectral_oracles_one_step_and_vanishing_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        net[0].bias.copy_(torch.tensor([0.6, 0.8]))  # of norm 1: gradient 4 |b|^2 b
        net[2].weight.copy_(torch.tensor([[0.6, -0.8], [0.8, 0.6]]))  # orthogonal
        net[2].bias.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = attach(
        "spectral:strength=1,every=1",
        find_units(net, torch.zeros(1, 2).double()),
        optimizer,
        hooks=False,
    )

    def pulls() -> list[Tensor]:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        handle.before_step()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    expected = ([[24.0, 0.0], [0.0, 0.0]], [2.4, 3.2], [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0])
    for ours, theirs in zip(pulls(), expected, strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs).double(), rtol=0, atol=1e-6)
    # Weights move: sigma is that of one more step from the vector that is kept, below the true one.
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.3, 1.0], [-2.0, 0.5]]))
    w = net[0].weight.detach()
    u = handle.state_dict()["spectral.u"][0, 0, :2]
    v = w.T @ u / (w.T @ u).norm()
    sigma = (w @ v).norm()
    ours = pulls()[0]
    torch.testing.assert_close(
        ours, 4 * (sigma**2 - 1) * sigma * torch.outer(w @ v / sigma, v), rtol=1e-9, atol=1e-12
    )
    assert sigma < torch.linalg.matrix_norm(w, 2)
    with torch.no_grad():
        net[0].weight.zero_()
    assert all(bool(pull.isfinite().all()) for pull in pulls())
    with torch.no_grad():
        net[0].weight.copy_(w)
    assert all(bool(pull.isfinite().all()) for pull in pulls())


def test_spectral_keeps_the_norm_near_one() -> None:
    bench = Bench("plain", "spectral:strength=0.05")
    bench.perturb(1.0)
    assert max(torch.linalg.matrix_norm(w, 2) for w in bench.matrices()) > 2
    for _ in range(1500):
        bench.pulls()
        bench.optimizer.step()
    for w in bench.matrices():
        assert torch.linalg.matrix_norm(w, 2).item() == pytest.approx(1.0, abs=0.02)


# ---- Parseval ----------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("options", ["", "scale=0.7", "groups=2", "normalize=true",
                                     "groups=2,normalize=true,scale=1.3"])  # fmt: skip
def test_parseval_is_autograds_gradient(kind: str, options: str) -> None:
    bench = Bench(kind, f"parseval:strength=0.3,every=1,{options}".rstrip(","))
    given = dict(part.split("=") for part in options.split(",") if part)
    scales = []
    for w in bench.matrices(hidden=True):
        measured = w.detach().square().sum((1, 2)) / min(w.shape[1:])
        fixed = float(given.get("scale", 1.0))
        scale = torch.full_like(measured, fixed)
        scales.append(measured if not given.keys() & {"scale", "normalize"} else scale)
    bench.perturb()

    def penalty() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for w, scale in zip(bench.matrices(hidden=True), scales, strict=True):
            n = w.shape[1]
            for rows in w.chunk(int(given.get("groups", 1)), 1):
                if "normalize" in given:
                    rows = rows / rows.norm(dim=-1, keepdim=True)
                identity = torch.eye(rows.shape[1], dtype=torch.float64)
                excess = rows @ rows.mT - scale.view(-1, 1, 1) * identity
                total = total + (64 / n) ** 2 * excess.square().sum()
        return total

    bench.check(lambda: 0.3 * penalty())


def test_parseval_oracles() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(2 * torch.eye(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    units = find_units(net, torch.zeros(1, 2).double())

    def pull(spec: str) -> tuple[Tensor, Tensor]:
        handle = attach(spec, units, optimizer, hooks=False)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        handle.before_step()
        return net[0].weight.grad, net[2].weight.grad

    # Of n (a^2 - s)^2 by a, per diagonal entry: 4 a (a^2 - s) = 24, times (64 / 2)^2.
    hidden, output = pull("parseval:scale=1,strength=1")
    torch.testing.assert_close(hidden, 24 * 32**2 * torch.eye(2).double())
    assert not output.any()  # output layers are free
    assert not pull("parseval:scale=4")[0].any() and not pull("parseval")[0].any()
    wide = mlp(2)  # orthogonal of gain sqrt 2: [8, 3] and [6, 8]
    found = attach("parseval", find_units(wide, torch.zeros(2, 1, 3).double()),
                   torch.optim.SGD(wide.parameters(), lr=0.1), hooks=False)  # fmt: skip
    scales = found.state_dict()["parseval.scales"]
    torch.testing.assert_close(scales, torch.full_like(scales, 2.0))
    with pytest.raises(ValueError, match="groups=4 does not divide; use a divisor"):
        Bench("plain", "parseval:groups=4")


@pytest.mark.parametrize("spec", ["parseval:strength=0.3,every=3", "infer:scale=3,every=3"])
def test_held_gradients_are_added_between_computations(spec: str) -> None:
    bench = Bench("plain", spec)
    held = torch.empty(0)
    for step in range(7):
        bench.perturb(0.2, seed=step)
        pull = bench.pulls()["2.weight"]
        fresh = Bench("plain", spec.replace("every=3", "every=1"))
        if step % 3 == 0 and "parseval" in spec:
            state = fresh.handle.state_dict() | {
                "parseval.scales": bench.handle.state_dict()["parseval.scales"]
            }
            fresh.net.load_state_dict(bench.net.state_dict())
            fresh.handle.load_state_dict(state)
            torch.testing.assert_close(pull, fresh.pulls()["2.weight"])
        if step % 3:
            assert torch.equal(pull, held)
        else:
            assert step == 0 or not torch.equal(pull, held)
            held = pull
        bench.handle.after_step()
