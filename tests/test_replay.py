"""Replay against a plain list of transitions."""

import numpy as np
import pytest

from perennial.agents.replay import Replay
from perennial.agents.streams import Streams


def play(replay, steps, lanes, tasks, seed=0, start=0):
    """Fill `replay` with transitions whose observations name themselves; the same as a list."""
    rng = np.random.default_rng(seed)
    name = lambda t, lane: np.array([t, lane], np.float32)  # noqa: E731
    if start == 0:
        replay.start(np.stack([[name(0, lane) for lane in range(lanes)]] * replay.copies))
    stored = []
    for t in range(start, start + steps):
        terminated = rng.random((replay.copies, lanes)) < 0.1
        cut = ~terminated & (rng.random((replay.copies, lanes)) < 0.1)
        reward = rng.normal(size=(replay.copies, lanes)).astype(np.float32)
        after = np.stack([[name(t + 1, lane) for lane in range(lanes)]] * replay.copies)
        finals = {
            int(lane): np.array([-t - 1, lane % lanes], np.float32)
            for lane in np.flatnonzero(cut.reshape(-1))
        }
        action = np.full((replay.copies, lanes, 1), t, np.float32)
        replay.add(
            [tasks(t)] * replay.copies, action, reward, terminated, terminated | cut, after, finals
        )
        stored.append((t, reward, terminated, cut))
    return stored


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("capacity", [1000, 24])
def test_samples_are_the_transitions_that_happened(n_step, capacity):
    lanes, gamma = 2, 0.9
    replay = Replay(2, lanes, capacity, np.zeros(2, np.float32), np.zeros(1, np.float32))
    stored = play(replay, 60, lanes, lambda t: t // 20)
    assert len(replay) == min(capacity, 120)
    sample = replay.sample(Streams([0, 1], "replay"), 500, gamma, n_step)
    first_row = 60 - len(replay) // lanes
    for copy in range(2):
        assert set(sample.actions[copy, :, 0]) <= set(range(first_row, 60))
        assert len(set(sample.actions[copy, :, 0])) == 60 - first_row  # all of them occur
        for k in range(500):
            t, lane = (int(x) for x in sample.observations[copy, k])
            assert sample.actions[copy, k, 0] == t
            total, discount, following = 0.0, 1.0, None
            for step in range(n_step):
                _, reward, terminated, cut = stored[t + step]
                total += discount * reward[copy, lane]
                discount *= gamma
                following = np.array([t + step + 1, lane])
                if terminated[copy, lane]:
                    discount = 0.0
                if cut[copy, lane]:
                    following = np.array([-(t + step) - 1, lane])
                if terminated[copy, lane] or cut[copy, lane] or t + step + 1 == 60:
                    break
            assert sample.rewards[copy, k] == pytest.approx(total, abs=1e-5)
            assert sample.discounts[copy, k] == pytest.approx(discount)
            if discount:
                assert np.array_equal(sample.next_observations[copy, k], following)


@pytest.mark.parametrize("policy, tasks", [("keep", {0, 1}), ("clear", {0}), ("per-task", {0})])
def test_what_a_change_leaves(policy, tasks):
    """Tasks 0, 1, 0: `per-task` finds the first visit again, `clear` only the last one."""
    replay = Replay(1, 1, 100, np.zeros(2, np.float32), np.zeros(1, np.float32), policy)
    play(replay, 30, 1, lambda t: (t // 10) % 2)
    rows = replay.sample(Streams([0], "replay"), 400, 0.9).actions[0, :, 0]
    assert {int(t) // 10 % 2 for t in rows} == tasks
    assert (rows.min() < 10) == (policy != "clear")


@pytest.mark.parametrize("capacity", [1000, 24])
def test_state_goes_on_bit_for_bit(capacity):
    def make():
        return Replay(2, 2, capacity, np.zeros(2, np.float32), np.zeros(1, np.float32))

    one, other = make(), make()
    play(one, 40, 2, lambda t: t // 20)
    for copy in (0, 1):
        other.load_state(copy, one.state(copy))
    for replay in (one, other):
        play(replay, 25, 2, lambda t: t // 20, seed=1, start=40)
    a, b = (replay.sample(Streams([0, 1], "replay"), 300, 0.9, 3) for replay in (one, other))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
