"""BatchedAdam and BatchedLinear against torch's own, copy by copy."""

import copy

import pytest
import torch
from torch import Tensor, nn

from perennial.plasticity import BatchedAdam, BatchedLinear, Init
from perennial.plasticity.flat import together

SHAPES = [(5, 4), (5,), (3, 5)]


def make_params(copies: int, dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(copies, *shape, generator=g, dtype=dtype)) for shape in SHAPES]


def gradients(step: int, copies: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(copies, *shape, generator=g, dtype=dtype) for shape in SHAPES]


class Plain(BatchedAdam):
    """The elementwise path, forced."""

    def _groups(self):  # type: ignore[no-untyped-def]
        groups = super()._groups()
        for group in groups:
            group.fused = group.compiled = False
        return groups


@pytest.mark.parametrize("kind", [BatchedAdam, Plain])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("copies", [1, 3])
def test_equals_torch_adam_on_each_copy_also_when_some_stand_still(
    kind: type[BatchedAdam], weight_decay: float, copies: int
) -> None:
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": weight_decay}
    params = make_params(copies, torch.float64)
    ours = kind(params, **options)
    alone = [[nn.Parameter(p[c].detach().clone()) for p in params] for c in range(copies)]
    theirs = [torch.optim.Adam(a, **options) for a in alone]
    for step in range(12):
        active = [c for c in range(copies) if (step + c) % 3 != 1]
        if step == 7:
            ours.param_groups[0]["lr"] = 0.005
            for optimizer in theirs:
                optimizer.param_groups[0]["lr"] = 0.005
        grads = gradients(step, copies, torch.float64)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        before = [(p.detach().clone(), copy.deepcopy(ours.state[p])) for p in params]
        ours.step(active if step % 2 else [c in active for c in range(copies)])
        for c in range(copies):
            if c in active:
                for p, g in zip(alone[c], grads, strict=True):
                    p.grad = g[c]
                theirs[c].step()
            elif step > 0:
                for p, (weight, state) in zip(params, before, strict=True):
                    assert torch.equal(p[c], weight[c])
                    for key in ("step", "exp_avg", "exp_avg_sq"):
                        assert torch.equal(ours.state[p][key][c], state[key][c])
        for c in range(copies):
            for p, q in zip(params, alone[c], strict=True):
                torch.testing.assert_close(p[c], q, rtol=0, atol=1e-13)
    assert [int(s) for s in ours.state[params[0]]["step"]] == [
        int(theirs[c].state[alone[c][0]]["step"]) for c in range(copies)
    ]


def test_one_copy_is_torchs_fused_adam_within_rounding() -> None:
    params = make_params(1, torch.float32)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = BatchedAdam(params, lr=1e-2, weight_decay=1e-2)
    theirs = torch.optim.Adam(twins, lr=1e-2, weight_decay=1e-2, fused=True)
    for step in range(5):
        for p, q, g in zip(params, twins, gradients(step, 1, torch.float32), strict=True):
            p.grad, q.grad = g, g.clone()
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=3e-7)


def test_averages_of_what_gets_no_gradient_any_more_end_at_zero() -> None:
    """They do not fade through subnormal numbers, which processors are slow on."""
    params = [nn.Parameter(torch.randn(1, 64, 64))]
    optimizer = BatchedAdam(params, betas=(0.9, 0.99))
    optimizer.keep_gradients()
    assert params[0].grad is not None
    params[0].grad.normal_()
    optimizer.step()
    params[0].grad.zero_()
    state, tiny = optimizer.state[params[0]], torch.finfo(torch.float32).tiny
    faded = 0
    for _ in range(1000):
        optimizer.step()
        mean = state["exp_avg"].abs()
        assert not ((mean > 0) & (mean < tiny)).any()
        faded += int((mean == 0).any())
    assert faded > 0 and state["exp_avg"].eq(0).all() and state["exp_avg_sq"].gt(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    """A gradient that broke breaks the same weights as under torch's Adam."""
    params, twins = make_params(1, torch.float32), make_params(1, torch.float32)
    ours, theirs = BatchedAdam(params), torch.optim.Adam(twins)
    for _ in range(2):
        for p, q, g in zip(params, twins, gradients(0, 1, torch.float32), strict=True):
            g.view(-1)[0] = bad
            p.grad, q.grad = g, g.clone()
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        assert not p.isfinite().all()
        assert torch.equal(p.isfinite(), q.isfinite())


def test_gradients_that_stay_stand_side_by_side_and_step_the_same() -> None:
    params, twins = make_params(2, torch.float64), make_params(2, torch.float64)
    ours, theirs = BatchedAdam(params), BatchedAdam(twins)
    ours.keep_gradients()
    kept = [p.grad for p in params]
    assert together([g for g in kept if g is not None]) is not None
    for step in range(4):
        for p, q, g in zip(params, twins, gradients(step, 2, torch.float64), strict=True):
            assert p.grad is not None
            p.grad.copy_(g)
            q.grad = g
        ours.step([step % 2])
        theirs.step([step % 2])
    assert all(p.grad is g for p, g in zip(params, kept, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_gradients_kept_in_place_replaced_missing_and_not_contiguous() -> None:
    params = make_params(2, torch.float64)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = BatchedAdam(params), torch.optim.Adam(twins)
    for step in range(6):
        grads = gradients(step, 2, torch.float64)
        for p, q, g in zip(params, twins, grads, strict=True):
            q.grad = g.clone()
            if step in (1, 2) and p.grad is not None:
                p.grad.copy_(g)
            else:
                p.grad = g.mT.contiguous().mT if g.ndim == 3 and step >= 4 else g.clone()
        if step == 3:
            params[1].grad = twins[1].grad = None
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
    assert ours.state[params[1]]["step"].tolist() == [5.0, 5.0]
    assert ours.state[params[0]]["step"].tolist() == [6.0, 6.0]


def test_state_dict_and_state_of_a_copy_continue_bit_for_bit() -> None:
    def run(optimizer: BatchedAdam, params: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            for p, g in zip(params, gradients(step, 2, torch.float32), strict=True):
                p.grad = g
            optimizer.step([0] if step == 2 else None)

    params = make_params(2, torch.float32)
    optimizer = BatchedAdam(params, lr=0.01)
    run(optimizer, params, range(4))
    by_dict = [nn.Parameter(p.detach().clone()) for p in params]
    by_copy = [nn.Parameter(p.detach().clone()) for p in params]
    one, two = BatchedAdam(by_dict, lr=0.01), BatchedAdam(by_copy, lr=0.01)
    one.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for index in range(2):
        two.load_state_of(index, optimizer.state_of(index))
    for o, ps in ((optimizer, params), (one, by_dict), (two, by_copy)):
        run(o, ps, range(4, 8))
    for p, q, r in zip(params, by_dict, by_copy, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert optimizer.state[params[0]]["step"].tolist() == [8.0, 7.0]
    with pytest.raises(ValueError, match=r"lacks 0\.exp_avg"):
        two.load_state_of(0, {"0.step": torch.tensor(1.0)})


def test_moved_storage_is_noticed() -> None:
    params = make_params(1, torch.float32)
    optimizer = BatchedAdam(params, lr=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in params:
            p.data = p.data.clone()
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (params[0] - before).abs().min() > 0.05


def test_step_compiles_and_equals_eager() -> None:
    params, twins = make_params(2, torch.float32), make_params(2, torch.float32)
    ours, theirs = BatchedAdam(params), BatchedAdam(twins)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled() -> None:
        ours.step()

    for step in range(3):
        for p, q, g in zip(params, twins, gradients(step, 2, torch.float32), strict=True):
            p.grad, q.grad = g, g.clone()
        if step == 0:
            ours.prepare()
        compiled()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        assert torch.equal(ours.state[p]["step"], theirs.state[q]["step"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchedAdam(make_params(1, torch.float32), **options)  # type: ignore[arg-type]


def test_bad_shapes_and_masks() -> None:
    with pytest.raises(ValueError, match="2 and 3 copies"):
        BatchedAdam([nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(3, 1))])
    optimizer = BatchedAdam(make_params(2, torch.float32))
    with pytest.raises(ValueError, match="copies 0 to 1"):
        optimizer.step([2])
    with pytest.raises(ValueError, match="3 bools for 2"):
        optimizer.step([True, False, True])


@pytest.mark.parametrize("sizes", [(4, 6), (600, 500)], ids=["small", "large"])
@pytest.mark.parametrize("copies", [1, 3])
def test_batched_linear_equals_linear_layers(copies: int, sizes: tuple[int, int]) -> None:
    generators = [torch.Generator().manual_seed(s) for s in range(copies)]
    init = Init("orthogonal", 2**0.5)
    layer = BatchedLinear(copies, *sizes, init=init, generators=generators, dtype=torch.float64)
    x = torch.randn(copies, 7, sizes[0], requires_grad=True, dtype=torch.float64)
    y = layer(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    for c in range(copies):
        torch.testing.assert_close(y[c], x[c] @ layer.weight[c].T + layer.bias[c])
        torch.testing.assert_close(layer.weight.grad[c], direction[c].T @ x[c])
        torch.testing.assert_close(layer.bias.grad[c], direction[c].sum(0))
        torch.testing.assert_close(x.grad[c], direction[c] @ layer.weight[c])
        generator = torch.Generator().manual_seed(c)
        alone = BatchedLinear(1, *sizes, init=init, generators=[generator], dtype=torch.float64)
        assert torch.equal(alone.weight[0], layer.weight[c])
    small = min(sizes)
    rows = layer.weight[0] if sizes[1] <= sizes[0] else layer.weight[0].T
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(small, dtype=torch.float64))


@pytest.mark.parametrize(
    ("init", "bound"),
    [
        (Init("lecun-uniform"), (3 / 50) ** 0.5),
        (Init("kaiming-uniform", 2**0.5), (6 / 50) ** 0.5),
        (Init("xavier-uniform"), (6 / 90) ** 0.5),
        (Init("torch-default"), 50**-0.5),
        (Init("zeros"), 0.0),
    ],
)
def test_uniform_bounds(init: Init, bound: float) -> None:
    weight = init.draw_weight((40, 50), torch.Generator().manual_seed(0))
    assert weight.abs().max() <= bound
    assert weight.abs().max() >= 0.99 * bound


@pytest.mark.parametrize("copies", [1, 2])
def test_two_halves_of_a_step_are_the_step(copies: int) -> None:
    params, twins = make_params(copies, torch.float32), make_params(copies, torch.float32)
    ours, theirs = BatchedAdam(params), BatchedAdam(twins)

    def beside(here, there):  # type: ignore[no-untyped-def]
        for call in (*there, *here):
            call()

    for step in range(4):
        for p, q, g in zip(params, twins, gradients(step, copies, torch.float32), strict=True):
            p.grad, q.grad = g, g.clone()
        ours.move([step % copies], beside)
        theirs.move([step % copies])
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["step"], theirs.state[q]["step"])
