"""PopArt and return scaling: oracles, copies, and Stable-Baselines3's own normaliser."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

from perennial.plasticity import BatchedAdam, BatchedLinear
from perennial.plasticity.scaling import PopArt, ReturnScale
from tests.host_questions import no_host_questions


def near(a: Tensor, b: Tensor | list[float] | float, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        a.double(), torch.as_tensor(b, dtype=torch.float64).expand_as(a), rtol=0, atol=atol
    )


# ---- PopArt ----------------------------------------------------------------------------------


def test_popart_reaches_a_constant_target_at_the_rate_of_the_average() -> None:
    popart = PopArt(rate=0.1)
    head = nn.Linear(3, 1).double()
    for n in range(1, 40):
        popart.update(torch.full((1, 8), 50.0), [head])
        near(popart.mean, 50.0 * (1 - 0.9**n))
    for _ in range(400):
        popart.update(torch.full((1, 8), 50.0), [head])
    near(popart.sigma, 1e-4, 1e-9)  # no deviation left: the lower bound


@pytest.mark.parametrize("copies", [1, 3])
def test_popart_preserves_what_every_head_says(copies: int) -> None:
    g = torch.Generator().manual_seed(0)
    popart = PopArt(copies, rate=0.3)
    heads = [BatchedLinear(copies, 5, n_out).double() for n_out in (1, 1, 4)]
    for head in heads:
        nn.init.normal_(head.bias)
    features = torch.randn(copies, 7, 5, generator=g, dtype=torch.float64)
    before = [popart.denormalize(head(features)) for head in heads]
    for _ in range(5):
        popart.update(300 * torch.randn(copies, 16, generator=g) + 40, heads)
    assert (popart.sigma > 50).all()
    for head, values in zip(heads, before, strict=True):
        near(popart.denormalize(head(features)), values, 1e-9)
    y = torch.randn(copies, 16, generator=g)
    near(popart.denormalize(popart.normalize(y)), y.double(), 1e-4)


def test_popart_of_a_plain_layer_equals_one_copy_and_copies_equal_copies_alone() -> None:
    targets = torch.randn(3, 16, dtype=torch.float64) * torch.tensor([[1.0], [30.0], [500.0]])
    together, layer = PopArt(3, rate=0.2), BatchedLinear(3, 5, 1).double()
    alone = [PopArt(rate=0.2) for _ in range(3)]
    plain = [nn.Linear(5, 1).double() for _ in range(3)]
    for s, single in enumerate(plain):
        single.weight.data.copy_(layer.weight[s])
        single.bias.data.copy_(layer.bias[s])
    for _ in range(4):
        together.update(targets, [layer])
        for s in range(3):
            alone[s].update(targets[s], [plain[s]])
    for s in range(3):
        near(layer.weight[s], plain[s].weight.detach(), 1e-13)
        near(layer.bias[s], plain[s].bias.detach(), 1e-13)
        near(together.mean[s], float(alone[s].mean))


def test_popart_leaves_standing_copies_bit_for_bit() -> None:
    popart, head = PopArt(2, rate=0.5), BatchedLinear(2, 5, 1)
    popart.update(torch.randn(2, 8) * 7, [head])
    optimizer = BatchedAdam(head.parameters())
    head(torch.randn(2, 4, 5)).sum().backward()
    optimizer.step()
    tensors = [popart.mean, popart.square, head.weight, head.bias, *_state(optimizer, head)]
    before = [t.detach().clone() for t in tensors]
    popart.update(torch.randn(2, 8) * 99, [head], optimizer, active=torch.tensor([False, True]))
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old[0], new[0]) and not torch.equal(old[1], new[1])


def _state(optimizer: torch.optim.Optimizer, head: nn.Module) -> list[Tensor]:
    keys = ("exp_avg", "exp_avg_sq")
    return [optimizer.state[p][key] for p in head.parameters() for key in keys]


@pytest.mark.parametrize("kind", ["adam", "rmsprop", "sgd", "batched"])
def test_popart_scales_the_optimizers_averages_as_the_gradients_scale(kind: str) -> None:
    """After an update the state is what it would be, had gradients been in the new unit."""
    torch.manual_seed(0)
    head = BatchedLinear(1, 5, 1).double() if kind == "batched" else nn.Linear(5, 1).double()
    make = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.0),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.0, eps=1e-20, momentum=0.9, centered=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        "batched": lambda p: BatchedAdam(p, lr=0.0),
    }[kind]
    features = torch.randn(1, 6, 5, dtype=torch.float64)
    y = 100 * torch.randn(1, 6, dtype=torch.float64)
    popart, optimizer = PopArt(rate=0.4), make(head.parameters())

    def gradients() -> list[Tensor]:
        loss = (head(features)[..., 0] - popart.normalize(y)).square().mean()
        return list(torch.autograd.grad(loss, list(head.parameters())))

    def learn(optimizer: torch.optim.Optimizer) -> None:
        for p, g in zip(head.parameters(), gradients(), strict=True):
            p.grad = g
        optimizer.step()

    learn(optimizer)
    popart.update(y, [head], optimizer)
    fresh = make(head.parameters())
    learn(fresh)
    for p in head.parameters():
        for key, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                torch.testing.assert_close(value, fresh.state[p][key], rtol=1e-8, atol=1e-12)


def test_popart_learns_targets_of_any_scale_at_one_rate() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 4, generator=g)
    truth = torch.stack([(x[0] @ torch.ones(4)) * 1e-2, (x[1] @ torch.ones(4)) * 1e3 + 5e3])
    popart, head = PopArt(2, rate=0.05), BatchedLinear(2, 4, 1)
    optimizer = BatchedAdam(head.parameters(), lr=0.02)
    for _ in range(800):
        popart.update(truth, [head], optimizer)
        optimizer.zero_grad()
        (head(x)[..., 0] - popart.normalize(truth)).square().mean(-1).sum().backward()
        optimizer.step()
    error = (popart.denormalize(head(x)[..., 0]) - truth).abs().mean(-1)
    assert error[0] < 1e-3 and error[1] < 100


def test_popart_compiles_asks_nothing_and_carries_its_state() -> None:
    torch._dynamo.reset()
    popart, head = PopArt(2), BatchedLinear(2, 5, 1)
    y = torch.randn(2, 8)
    torch.compile(lambda: popart.update(y, [head]), fullgraph=True, backend="aot_eager")()
    other = PopArt(2)
    other.load_state_dict(popart.state_dict())
    assert torch.equal(other.mean, popart.mean) and not list(popart.parameters())
    assert other.mean.abs().min() > 0
    with no_host_questions():
        popart.update(y, [head])
        popart.normalize(y)


def test_popart_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="bias"):
        PopArt().update(torch.zeros(1, 3), [nn.Linear(2, 1, bias=False)])
    with pytest.raises(ValueError, match=r"rate=1.5 in \[0, 1\]"):
        PopArt(rate=1.5)


# ---- return scaling --------------------------------------------------------------------------


def test_return_scale_equals_stable_baselines3_on_a_real_environment() -> None:
    lanes, gamma = 3, 0.97
    theirs = VecNormalize(
        DummyVecEnv([lambda: gym.make("CartPole-v1")] * lanes), norm_obs=False, gamma=gamma
    )
    theirs.seed(0)
    theirs.reset()
    ours = ReturnScale(1, lanes, gamma=gamma)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(200):
        _, scaled, dones, _ = theirs.step(rng.integers(0, 2, lanes))
        rewards = torch.from_numpy(theirs.get_original_reward())[None]
        ours.update(rewards, torch.from_numpy(dones)[None])
        torch.testing.assert_close(ours.scale(rewards)[0], torch.from_numpy(scaled))
        ended += dones.sum()
    assert ended > 5
    near(ours.var, float(theirs.ret_rms.var))


def test_return_scale_of_copies_equals_copies_alone_and_bounds_the_peak() -> None:
    g = torch.Generator().manual_seed(0)
    together = ReturnScale(2, 3, peak=5.0, gamma=0.9)
    alone = [ReturnScale(1, 3, peak=5.0, gamma=0.9) for _ in range(2)]
    returns, peak = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(50):
        rewards = torch.randn(2, 3, generator=g).double()
        if step == 20:
            rewards[1, 2] = 1000.0
        ends = torch.rand(2, 3, generator=g) < 0.1
        together.update(rewards, ends)
        returns = returns * 0.9 + rewards
        peak = torch.maximum(peak, returns.abs().amax(-1))
        returns = returns * ~ends
        for s in range(2):
            alone[s].update(rewards[s : s + 1], ends[s : s + 1])
            near(together.divisor[s], float(alone[s].divisor))
        near(together.discounted, returns)
    near(together.divisor, torch.maximum(together.var.sqrt(), peak / 5), 1e-6)
    assert together.divisor[1] > 195 > together.var[1].sqrt()


def test_a_window_follows_a_change_that_the_full_history_hides() -> None:
    scales = {"all": ReturnScale(gamma=0.0), "window": ReturnScale(gamma=0.0, window=100)}
    restarted = ReturnScale(gamma=0.0)
    scales["restarted"] = restarted
    g = torch.Generator().manual_seed(0)
    no = torch.zeros(1, 1, dtype=torch.bool)
    for step in range(6000):
        rewards = torch.randn(1, 1, generator=g) * (100 if step < 5000 else 1)
        if step == 5000:
            restarted.restart()
        for scale in scales.values():
            scale.update(rewards, no)
    divisors = {name: float(scale.divisor) for name, scale in scales.items()}
    assert divisors["all"] > 80
    assert divisors["restarted"] == pytest.approx(1, rel=0.1)
    assert divisors["window"] < 3


def test_restart_of_one_copy_leaves_the_other() -> None:
    scale = ReturnScale(2, 1)
    for _ in range(10):
        scale.update(torch.randn(2, 1), torch.zeros(2, 1, dtype=torch.bool))
    before = scale.divisor
    scale.restart(torch.tensor([True, False]))
    assert float(scale.divisor[0]) == pytest.approx(1) and scale.divisor[1] == before[1]
    assert not list(scale.parameters()) and len(scale.state_dict()) == 5


def test_return_scale_asks_nothing_and_refuses_what_cannot_work() -> None:
    scale = ReturnScale(2, 3)
    with no_host_questions():
        scale.update(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
        scale.scale(torch.ones(2, 3))
        scale.restart()
    with pytest.raises(ValueError, match=r"gamma=2 in\s+\[0, 1\]"):
        ReturnScale(gamma=2)
    with pytest.raises(ValueError, match="peak=0 must be > 0"):
        ReturnScale(peak=0)
