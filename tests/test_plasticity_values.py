"""Value codecs against the oracles of their papers, against autograd, and by fitting."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from perennial.plasticity.categorical import project, symexp, symlog, two_hot
from perennial.plasticity.value_registry import VALUES, parse_spec
from perennial.plasticity.values import C51, MSE, Codec, HLGauss, Quantile, TwoHot, make
from tests.host_questions import no_host_questions

SPECS = [
    "mse",
    "two-hot:low=-3,high=3,bins=13,symlog=false",
    "two-hot:low=-2,high=2,bins=21",
    "hl-gauss:low=-3,high=3,bins=24",
    "hl-gauss:low=-2,high=2,bins=21,width=2,symlog=true",
    "c51:low=-3,high=3,bins=13",
    "quantile:quantiles=7",
    "quantile:quantiles=4,kappa=0.5",
]
CATEGORICAL = [spec for spec in SPECS if spec.startswith(("two-hot", "hl-gauss", "c51"))]


def near(a: Tensor, b: list[float] | list[list[float]] | Tensor, atol: float = 1e-6) -> None:
    wanted = b if isinstance(b, Tensor) else torch.tensor(b, dtype=a.dtype)
    torch.testing.assert_close(a, wanted.to(a.dtype), rtol=0, atol=atol)


def peaked(probabilities: list[float]) -> Tensor:
    """Logits of given probabilities, zeros included."""
    return torch.tensor(probabilities, dtype=torch.float64).log().clamp(min=-1e9)


# ---- oracles of the papers -------------------------------------------------------------------


def test_two_hot_shares_a_target_between_its_neighbours() -> None:
    codec = TwoHot(-1, 1, 3, symlog=False)
    y = torch.tensor([0.25, -1.0, 0.0, 1.0, 7.0, -9.0])
    wanted = [[0, 0.75, 0.25], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]]
    near(codec.encode(y), [[float(x) for x in row] for row in wanted], atol=0)
    assert codec.outside(y).tolist() == [False] * 4 + [True] * 2


def test_two_hot_by_default_reads_back_any_scale_of_return() -> None:
    codec = TwoHot()
    y = torch.tensor([-1e6, -37.5, -1e-3, 0.0, 0.4, 5.0, 812.0, 3e7], dtype=torch.float64)
    target = codec.encode(y)
    near(target.sum(-1), torch.ones(8), 1e-12)
    assert ((target > 0).sum(-1) <= 2).all()
    read = codec.decode(target.log().clamp(min=-1e9))
    torch.testing.assert_close(read, y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(symexp(symlog(y)), y)


def test_hl_gauss_is_the_histogram_of_a_gaussian() -> None:
    two = HLGauss(0, 2, 2, width=1)
    near(two.encode(torch.tensor([1.0, 0.0])), [[0.5, 0.5], [0.7152, 0.2848]], 5e-5)
    near(two.decode(two.encode(torch.tensor([1.0, 0.0])).log()), [1.0, 0.7848], 5e-5)
    five = HLGauss(0, 5, 5)
    near(five.encode(torch.tensor(2.5)), [0.0223, 0.2299, 0.4954, 0.2299, 0.0223], 5e-5)
    near(HLGauss(0, 5, 5, width=1e-4).encode(torch.tensor(2.3)), [0.0, 0, 1, 0, 0])
    # Against the distribution function itself, on a support of other units.
    codec, y = HLGauss(-4, 8, 24, width=0.75), torch.linspace(-4, 8, 17, dtype=torch.float64)
    gauss = torch.distributions.Normal(y[:, None], 0.75 * 0.5)
    mass = gauss.cdf(torch.linspace(-4, 8, 25, dtype=torch.float64)).diff(dim=-1)
    near(codec.encode(y), mass / mass.sum(-1, keepdim=True), 1e-12)


def test_hl_gauss_is_exact_in_the_middle_and_biased_inwards_at_the_ends() -> None:
    codec = HLGauss(-10, 10, 51)
    deviation = 0.75 * 20 / 51
    y = torch.linspace(-10, 10, 201, dtype=torch.float64)
    read = codec.decode(codec.encode(y).log().clamp(min=-1e9))
    inner = y.abs() < 10 - 5 * deviation
    assert (read - y)[inner].abs().max() < 0.02 * deviation
    error = (read - y) * y.sign()
    assert -deviation < error[0] < -0.5 * deviation and (error < 0.02 * deviation).all()


def test_c51_projects_and_loses_no_mass_on_whole_numbers() -> None:
    codec = C51(0, 2, 3)
    last = peaked([0, 0, 1])
    near(codec.backup(last, torch.tensor(0.5), torch.tensor(0.5)), [0.0, 0.5, 0.5])
    near(codec.backup(last, torch.tensor(1.0), torch.tensor(0.0)), [0.0, 1.0, 0.0])
    rewards = torch.arange(-5.0, 6.0)
    for discount in (0.0, 0.5, 1.0):  # all hits of atoms, also beyond both ends
        target = codec.backup(last, rewards, torch.full_like(rewards, discount))
        near(target.sum(-1), torch.ones(11, dtype=torch.float64), atol=1e-15)


def test_c51_projection_equals_atom_by_atom_and_both_its_forms_agree() -> None:
    g = torch.Generator().manual_seed(0)
    codec = C51(-2, 2, 9)
    logits = torch.randn(2, 5, 9, generator=g, dtype=torch.float64)
    rewards = torch.randn(2, 5, generator=g, dtype=torch.float64)
    rewards[0, 0], rewards[1, 1] = 0.5, -30.0
    discounts = torch.tensor([0.99, 0.0, 1.0, 0.5, 0.9], dtype=torch.float64).expand(2, 5)
    wanted = torch.zeros_like(logits)
    p, atoms = logits.softmax(-1), torch.linspace(-2, 2, 9).tolist()
    for s in range(2):
        for b in range(5):
            for j, z in enumerate(atoms):
                place = (min(max(float(rewards[s, b] + discounts[s, b] * z), -2), 2) + 2) / 0.5
                low, high = math.floor(place), math.ceil(place)
                for i, share in ((low, high - place + (low == high)), (high, place - low)):
                    wanted[s, b, i] += p[s, b, j] * share
    near(codec.backup(logits, rewards, discounts), wanted, 1e-13)
    place = torch.rand(2, 5, 9, generator=g, dtype=torch.float64) * 12 - 2
    matrix = (p.unsqueeze(-2) @ two_hot(place, 9)).squeeze(-2)
    near(project(p, place), matrix, 1e-14)


def test_c51_backed_up_often_enough_is_the_value_of_a_constant_reward() -> None:
    codec = C51(0, 20, 51)
    logits, gamma = torch.zeros(51, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    for _ in range(300):
        logits = codec.backup(logits, torch.tensor(1.0), gamma).log()
    near(codec.decode(logits), torch.tensor(10.0), 1e-9)


def test_quantile_loss_has_the_sign_of_the_paper() -> None:
    codec = Quantile(2)  # tau = 1/4, 3/4
    outputs = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    # first column: tau=.25, theta=0, y=2 -> .375; theta=2, y=0 -> 1.125; the other output is exact
    near(codec.loss(outputs, target).value, [0.375, 1.125])
    single = Quantile(1)
    u = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    loss = single.loss(torch.zeros(4, 1), u[:, None]).value
    near(loss, torch.nn.functional.huber_loss(u, torch.zeros(4), reduction="none") / 2)


def test_quantile_sums_over_outputs_and_averages_over_targets() -> None:
    codec = Quantile(3)
    outputs, target = torch.randn(4, 3), torch.randn(4, 5)
    parts = [codec.loss(outputs, target[:, k : k + 1]).value for k in range(5)]
    near(codec.loss(outputs, target).value, torch.stack(parts).mean(0))
    backup = codec.backup(outputs, torch.ones(4), torch.tensor([0.9, 0.9, 0.0, 0.9]))
    near(backup[0], 1 + 0.9 * outputs[0])
    near(backup[2], [1.0, 1.0, 1.0])


def test_quantiles_fit_the_quantiles_of_the_targets() -> None:
    codec = Quantile(5, kappa=1e-3)
    target = torch.linspace(0, 1, 1001, dtype=torch.float64)
    outputs = torch.zeros(5, dtype=torch.float64)
    for step in range(400):
        outputs -= 0.5 / (1 + step / 40) * codec.loss(outputs, target).gradient
    near(outputs, [0.1, 0.3, 0.5, 0.7, 0.9], 5e-3)
    near(codec.decode(outputs), torch.tensor(0.5), 5e-3)


# ---- what holds for every codec --------------------------------------------------------------


def example(
    codec: Codec, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs [2, 6, m], next outputs, rewards and discounts [2, 6]."""
    g = torch.Generator().manual_seed(1)
    outputs = torch.randn(2, 2, 6, codec.outputs, generator=g, dtype=torch.float64)
    rewards = torch.randn(2, 6, generator=g, dtype=torch.float64).to(dtype)
    discounts = torch.tensor([0.9, 0.9, 0.0, 0.9, 0.0, 1.0], dtype=dtype).expand(2, 6)
    return outputs[0].to(dtype), outputs[1].to(dtype), rewards, discounts


def targets(codec: Codec, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    _, following, rewards, discounts = example(codec, dtype)
    return [codec.encode(rewards), codec.backup(following, rewards, discounts)]


@pytest.mark.parametrize("spec", SPECS)
def test_written_out_gradients_equal_autograds(spec: str) -> None:
    codec = make(spec)
    for target in targets(codec):
        outputs = example(codec)[0].requires_grad_()
        value, gradient = codec.loss(outputs, target)
        assert value.shape == outputs.shape[:-1] and not target.requires_grad
        near(gradient, torch.autograd.grad(value.sum(), outputs)[0], 1e-12)


@pytest.mark.parametrize("spec", CATEGORICAL)
def test_categorical_gradients_are_bounded_whatever_the_return(spec: str) -> None:
    codec = make(spec)
    y = torch.tensor([0.3, 1e4, -1e9])
    target = codec.encode(y)
    near(target.sum(-1), torch.ones(3))
    gradient = codec.loss(5 * torch.randn(3, codec.outputs), target).gradient
    assert (gradient.abs().sum(-1) <= 2 + 1e-5).all()
    assert codec.outside(y).tolist() == [False, True, True]
    near(codec.decode(torch.zeros(codec.outputs)), torch.tensor(0.0))  # a head of zeros: the middle


@pytest.mark.parametrize("spec", SPECS)
def test_copies_side_by_side_equal_copies_alone(spec: str) -> None:
    codec = make(spec)
    outputs, following, rewards, discounts = example(codec)
    backup = codec.backup(following, rewards, discounts)
    loss = codec.loss(outputs, backup)
    for s in range(2):
        alone = codec.backup(following[s], rewards[s], discounts[s])
        near(backup[s], alone, 1e-14)
        for together, single in zip(loss, codec.loss(outputs[s], alone), strict=True):
            near(together[s], single, 1e-14)
        near(codec.decode(outputs)[s], codec.decode(outputs[s]), 1e-14)


@pytest.mark.parametrize("spec", SPECS)
def test_every_float_type_keeps_its_type(spec: str) -> None:
    codec = make(spec)
    for dtype in (torch.float32, torch.bfloat16):
        for target, exact in zip(targets(codec, dtype), targets(codec), strict=True):
            loss = codec.loss(example(codec, dtype)[0], target)
            parts = (target, *loss, codec.decode(example(codec, dtype)[0]))
            assert all(x.dtype is dtype and x.isfinite().all() for x in parts)
            near(target.double(), exact, 1e-5 if dtype is torch.float32 else 0.15)


@pytest.mark.parametrize("spec", SPECS)
def test_fitting_outputs_to_a_return_reads_the_return_back(spec: str) -> None:
    codec = make(spec)
    y = torch.tensor([[-1.2, 0.0, 0.37, 1.9]], dtype=torch.float64)
    outputs = torch.zeros(1, 4, codec.outputs, dtype=torch.float64)
    optimizer = torch.optim.Adam([outputs], lr=0.05)
    target = codec.encode(y)
    for _ in range(400):
        outputs.grad = codec.loss(outputs, target).gradient
        optimizer.step()
    near(codec.decode(outputs), y, 0.05)


@pytest.mark.parametrize("spec", SPECS)
def test_smallest_takes_the_whole_distribution_of_the_lower_critic(spec: str) -> None:
    codec = make(spec)
    critics = torch.stack(example(codec)[:2])  # [2, copies, batch, m]
    values = codec.decode(critics)
    chosen = codec.smallest(critics, 0)
    near(codec.decode(chosen), values.amin(0), 0)
    near(codec.smallest(critics.movedim(0, -2), -2), chosen, 0)


@pytest.mark.parametrize("spec", SPECS)
def test_codecs_compile_and_ask_the_device_nothing(spec: str) -> None:
    codec = make(spec)

    def learn(outputs: Tensor, following: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
        target = codec.backup(following, rewards, discounts)
        clipped = codec.outside(rewards).float().mean()
        loss = codec.loss(outputs, target)
        return loss.value.sum() + loss.gradient.sum() + codec.decode(outputs).sum() + clipped

    torch._dynamo.reset()
    compiled = torch.compile(learn, fullgraph=True, backend="aot_eager")
    near(compiled(*example(codec)), learn(*example(codec)), 1e-12)
    with no_host_questions():
        learn(*example(codec))


def test_mse_is_the_plain_squared_error() -> None:
    loss = MSE().loss(torch.tensor([[3.0]]), MSE().encode(torch.tensor([1.0])))
    assert loss.value.tolist() == [4.0] and loss.gradient.tolist() == [[4.0]]


# ---- specs -----------------------------------------------------------------------------------


def test_registry_and_classes_agree() -> None:
    assert list(VALUES) == ["mse", "two-hot", "hl-gauss", "c51", "quantile"]
    for name, entry in VALUES.items():
        codec = make(name)
        assert codec.name == name and type(codec).__name__ == entry.cls
        signature = inspect.signature(type(codec)).parameters
        assert {k: p.default for k, p in signature.items()} == {
            k: p.default for k, p in entry.params.items()
        }
        assert type(codec).__doc__ and len(entry.line) < 100 and (entry.paper or name == "mse")
        assert codec.encode(torch.zeros(3)).isfinite().all()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("two-hott", "unknown value loss 'two-hott'; did you mean 'two-hot'?"),
        ("c51:bin=7", "unknown parameter 'bin'; did you mean 'bins'?"),
        ("c51:bins=1", "bins=1 must be >= 2"),
        ("c51:low=3,high=3", "low=3 must be below high=3"),
        ("hl-gauss:low=20", "low=20 must be below high=10"),
        ("hl-gauss:width=0", "width=0 must be > 0"),
        ("quantile:kappa=0", "kappa=0 must be > 0"),
        ("quantile:quantiles=2.5", "quantiles=2.5 is not a whole number"),
        ("two-hot:symlog=yes", "symlog=yes is not a truth value"),
    ],
)
def test_wrong_specs_are_explained_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_spec(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_arguments_are_refused_by_the_classes_too() -> None:
    with pytest.raises(ValueError, match="low=1 must be below high=0"):
        C51(1, 0)
    with pytest.raises(ValueError, match="bins=1 must be >= 2"):
        HLGauss(bins=1)


def test_checking_a_value_loss_needs_no_torch() -> None:
    code = (
        "import sys; from perennial.plasticity.value_registry import parse_spec;"
        "parse_spec('c51:bins=21'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
