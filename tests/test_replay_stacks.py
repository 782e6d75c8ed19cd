"""Replay of stacked frames and of priorities against plain lists of whole transitions."""

from typing import NamedTuple

import numpy as np
import pytest

from perennial.agents.checkpoint import read_checkpoint, write_checkpoint
from perennial.agents.priorities import Priorities
from perennial.agents.replay import Places, Replay
from perennial.agents.streams import Streams

FRAME, K, LANES, COPIES = (3, 2), 4, 2, 2


class Transition(NamedTuple):
    observation: np.ndarray
    reward: float
    terminated: bool
    ended: bool
    following: np.ndarray


class World:
    """Lanes of pictures that stack as an environment would; remembers all that happened."""

    def __init__(self, padding: str, seed: int = 0):
        self.rng, self.padding = np.random.default_rng(seed), padding
        self.now = np.stack([[self.first() for _ in range(LANES)] for _ in range(COPIES)])
        self.past: list[list[list[Transition]]] = []  # [row][copy][lane]

    def picture(self) -> np.ndarray:
        return self.rng.integers(1, 255, FRAME, dtype=np.uint8)

    def first(self) -> np.ndarray:
        picture = self.picture()
        stack = np.stack([picture] * K)
        if self.padding == "zeros":
            stack[:-1] = 0
        return stack

    def play(self, replay: Replay, rows: int, task) -> None:
        if not self.past:
            replay.start(self.now)
        for row in range(len(self.past), len(self.past) + rows):
            over = self.rng.random((COPIES, LANES)) < 0.15
            cut = ~over & (self.rng.random((COPIES, LANES)) < 0.15)
            rewards = self.rng.normal(size=(COPIES, LANES)).astype(np.float32)
            reached, after, finals = self.now.copy(), self.now.copy(), {}
            for c in range(COPIES):
                for e in range(LANES):
                    reached[c, e] = np.concatenate([self.now[c, e, 1:], self.picture()[None]])
                    after[c, e] = self.first() if over[c, e] or cut[c, e] else reached[c, e]
                    if cut[c, e]:
                        finals[c * LANES + e] = reached[c, e]
            self.past.append(
                [
                    [
                        Transition(
                            self.now[c, e], rewards[c, e], over[c, e], over[c, e] | cut[c, e],
                            reached[c, e],
                        )
                        for e in range(LANES)
                    ]
                    for c in range(COPIES)
                ]
            )  # fmt: skip
            names = np.arange(LANES) + row * LANES
            names = np.broadcast_to(names, (COPIES, LANES)).astype(np.float64)
            replay.add([task(row)] * COPIES, names, rewards, over, over | cut, after, finals)
            self.now = after

    def expected(self, copy: int, name: int, n_step: int, gamma: float):
        """Observation, reward, discount and next observation of a sample that starts at `name`."""
        row, lane = divmod(name, LANES)
        total, discount = 0.0, 1.0
        for step in range(n_step):
            at = self.past[row + step][copy][lane]
            total += discount * at.reward
            discount *= gamma
            if at.ended or row + step + 1 == len(self.past):
                break
        first = self.past[row][copy][lane]
        return first.observation, total, 0.0 if at.terminated else discount, at.following

    def check(self, sample, n_step: int, gamma: float) -> None:
        for copy in range(COPIES):
            for k, name in enumerate(sample.actions[copy].astype(int)):
                seen, total, discount, following = self.expected(copy, name, n_step, gamma)
                assert np.array_equal(sample.observations[copy, k], seen)
                assert sample.rewards[copy, k] == pytest.approx(total, abs=1e-5)
                assert sample.discounts[copy, k] == pytest.approx(discount)
                if discount:
                    assert np.array_equal(sample.next_observations[copy, k], following)


def make(capacity: int, at_change: str = "keep", alpha: float | None = None, stack: int = K):
    example = np.zeros((K, *FRAME), np.uint8)
    return Replay(COPIES, LANES, capacity, example, np.zeros(()), at_change, stack, alpha)


def tasks_of(row: int) -> int:
    return row // 17 % 3


def held(rows: int, capacity: int, at_change: str) -> set[int]:
    """Names of the transitions that may be drawn."""
    kept = range(max(0, rows - capacity // LANES), rows)
    if at_change == "per-task":
        kept = [row for row in kept if tasks_of(row) == tasks_of(rows - 1)]
    if at_change == "clear":
        start = (rows - 1) // 17 * 17
        kept = [row for row in kept if row >= start]
    return {row * LANES + lane for row in kept for lane in range(LANES)}


@pytest.mark.parametrize("alpha", [None, 0.7])
@pytest.mark.parametrize("at_change", ["keep", "clear", "per-task"])
@pytest.mark.parametrize("padding", ["zeros", "repeated"])
def test_stacks_are_those_that_the_environment_gave(padding, at_change, alpha):
    world, gamma, capacity = World(padding), 0.9, 90
    replay = make(capacity, at_change, alpha)
    streams = Streams(range(COPIES), "replay")
    for rows in (9, 20, 31, 64, 7, 30):  # before and after the ring is full, across changes
        world.play(replay, rows, tasks_of)
        for n_step in (1, 3):
            sample = replay.sample(streams, 300, gamma, n_step)
            world.check(sample, n_step, gamma)
            allowed = held(len(world.past), capacity, at_change)
            assert {*sample.actions.astype(int).flat} <= allowed
            if alpha is None and len(allowed) < 60:
                assert {*sample.actions[0].astype(int)} == allowed
            if alpha is not None:
                assert np.count_nonzero(replay.priorities.leaves(0)) == len(allowed)
                errors = np.random.default_rng(rows).random((COPIES, 300))
                replay.prioritise(sample.places, errors)


def test_a_frame_is_stored_once():
    replay = make(90)
    assert replay.seen.frames.nbytes == COPIES * (45 + 1 + K - 1) * LANES * np.prod(FRAME)


def test_what_is_no_stack_is_refused_in_one_line():
    world, replay = World("zeros"), make(90)
    world.play(replay, 5, tasks_of)
    broken = world.now[..., ::-1, :].copy()
    no = np.zeros((COPIES, LANES), bool)
    with pytest.raises(ValueError, match="stack=0") as error:
        replay.add([0] * COPIES, np.zeros((COPIES, LANES)), np.zeros((COPIES, LANES)), no, no,
                   broken, {})  # fmt: skip
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="stack=0"):
        make(90).start(broken)
    with pytest.raises(ValueError, match="no stacks of 3 frames"):
        make(90, stack=3)


def test_new_episodes_after_an_inexact_resume_begin_no_old_transition():
    """The newest transition leads to what followed it, not to the episode that begins then."""
    for stack in (K, 0):
        world, replay = World("zeros"), make(90, stack=stack)
        world.play(replay, 12, lambda row: 0)
        fresh = np.stack([world.first() for _ in range(LANES)])
        replay.restart(1, fresh)
        world.now[1] = fresh
        last = world.past[-1][1]
        world.past[-1][1] = [t._replace(ended=True) for t in last]
        world.play(replay, 5, lambda row: 0)
        world.check(replay.sample(Streams(range(COPIES), "replay"), 300, 0.9), 1, 0.9)
        world.check(replay.sample(Streams(range(COPIES), "replay"), 300, 0.9, 3), 3, 0.9)


@pytest.mark.parametrize("capacity", [1000, 40])
@pytest.mark.parametrize("at_change", ["keep", "per-task"])
def test_state_goes_on_bit_for_bit(capacity, at_change, tmp_path):
    """Through a checkpoint; sums of priorities too."""
    one, other = make(capacity, at_change, 0.6), make(capacity, at_change, 0.6)
    world = World("repeated")
    streams = [Streams(range(COPIES), "replay") for _ in range(2)]

    def learn(replay, streams):
        sample = replay.sample(streams, 50, 0.9, 2, beta=0.4)
        errors = np.abs(sample.rewards) * (1 + sample.weights)
        replay.prioritise(sample.places, errors)
        return sample

    for _ in range(10):
        world.play(one, 4, tasks_of)
        learn(one, streams[0])
    for copy in range(COPIES):
        write_checkpoint(tmp_path / str(copy), 1, {"replay": one.state(copy)})
        streams[1].load_state(copy, streams[0].state(copy))
        other.load_state(copy, read_checkpoint(tmp_path / str(copy), 1)["replay"])
    twin = World("repeated")
    twin.past, twin.now = list(world.past), world.now.copy()
    world.rng, twin.rng = np.random.default_rng(7), np.random.default_rng(7)
    for _ in range(10):
        world.play(one, 3, tasks_of)
        twin.play(other, 3, tasks_of)
        a, b = learn(one, streams[0]), learn(other, streams[1])
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    for mine, others in zip(one.priorities.levels, other.priorities.levels, strict=True):
        assert np.array_equal(mine, others)


@pytest.mark.parametrize("slots", [5, 300, 40_000])
def test_slots_are_drawn_as_often_as_their_priorities_say(slots):
    rng = np.random.default_rng(0)
    priorities = Priorities(2, slots, alpha=0.5)
    errors = rng.exponential(size=slots) * (rng.random(slots) < 0.6)
    used = np.flatnonzero(rng.random(slots) < 0.8)
    priorities.change(0, used, errors[used])
    priorities.add(1, np.array([slots - 1]))
    chances = np.zeros(slots)
    chances[used] = np.sqrt(errors[used] + 1e-6)
    chances /= chances.sum()
    counts, rounds, batch = np.zeros(slots), 400, 500
    for _ in range(rounds):
        drawn, given = priorities.draw(rng.random((2, batch)))
        assert np.allclose(given[0], chances[drawn[0]]) and (given[0] > 0).all()
        assert (drawn[1] == slots - 1).all() and (given[1] == 1).all()
        # Stratified: the k-th draw lies in the k-th of `batch` parts of equal mass.
        assert (np.diff(drawn[0]) >= 0).all()
        counts += np.bincount(drawn[0], minlength=slots)
    expected = chances * rounds * batch
    large = expected > 20
    assert counts[chances == 0].sum() == 0
    # Strata make counts vary less than independent draws would; those vary by sqrt(expected).
    assert (np.abs(counts - expected)[large] < 5 * np.sqrt(expected[large])).all()
    assert np.abs(counts.cumsum() - expected.cumsum()).max() < 5 * np.sqrt(rounds)


def test_weights_undo_the_priorities():
    """Means under weights of beta 1 are those of uniform draws; (N P)^-beta over the largest."""
    replay, streams = make(200, alpha=1.0), Streams(range(COPIES), "replay")
    world = World("zeros")
    world.play(replay, 100, lambda row: 0)
    rows, lanes = np.divmod(np.arange(200), LANES)
    places = Places(*(np.broadcast_to(x, (COPIES, 200)) for x in (rows, lanes)))
    errors = np.broadcast_to(1.0 + np.arange(200) % 7, (COPIES, 200))
    replay.prioritise(places, errors)
    sample = replay.sample(streams, 20_000, 0.9, beta=1.0)
    chances = errors[0][sample.actions[0].astype(int)] / errors[0].sum()
    weights = (200 * chances) ** -1.0
    assert np.allclose(sample.weights[0], weights / weights.max(), rtol=1e-5)
    mean = np.average(sample.actions[0], weights=sample.weights[0])
    assert mean == pytest.approx(99.5, abs=1.5)
    half = replay.sample(streams, 500, 0.9, beta=0.5).weights
    assert 0 < half.min() < half.max() == 1
    assert replay.sample(streams, 5, 0.9).weights is None


def test_new_transitions_come_first_and_errors_of_what_is_gone_are_dropped():
    replay, streams = make(40, alpha=0.5), Streams(range(COPIES), "replay")
    world = World("zeros")
    world.play(replay, 20, lambda row: 0)
    sample = replay.sample(streams, 64, 0.9)
    replay.prioritise(sample.places, np.full((COPIES, 64), 9.0))
    highest = replay.priorities.highest[0]
    assert highest == pytest.approx(3.0, rel=1e-4)
    world.play(replay, 1, lambda row: 0)
    newest = [20 % replay.rows * LANES + lane for lane in range(LANES)]
    assert (replay.priorities.leaves(0)[newest] == highest).all()
    world.play(replay, 30, lambda row: 0)  # all that was drawn is gone
    before = replay.priorities.leaves(0).copy()
    replay.prioritise(sample.places, np.full((COPIES, 64), 100.0))
    assert np.array_equal(before, replay.priorities.leaves(0))
    assert np.count_nonzero(before) == 40


def test_a_task_that_comes_again_has_its_priorities_back():
    replay, streams = make(200, "per-task", alpha=1.0), Streams(range(COPIES), "replay")
    world = World("zeros")
    world.play(replay, 10, lambda row: 0)
    sample = replay.sample(streams, 200, 0.9)
    replay.prioritise(sample.places, 0.1 + np.abs(sample.rewards))
    before = replay.priorities.leaves(0).copy()
    world.play(replay, 10, lambda row: 1)
    assert np.count_nonzero(replay.priorities.leaves(0)) == 10 * LANES
    replay.prioritise(sample.places, np.full((COPIES, 200), 5.0))  # asleep: too late
    world.play(replay, 1, lambda row: 0)
    after = replay.priorities.leaves(0)
    assert np.array_equal(after[: 10 * LANES], before[: 10 * LANES])
    assert not after[10 * LANES : 20 * LANES].any() and np.count_nonzero(after) == 11 * LANES


def test_atari_stored_as_frames_equals_atari_stored_whole():
    pytest.importorskip("ale_py")
    from perennial.envs.specs import frame_stack
    from perennial.envs.vector import make_vec

    args = {"games": ("Pong", "Breakout"), "change_every": 150, "change": "now", "max_frames": 120}
    assert frame_stack("perennial/AtariSwitch-v0", args) == 4
    assert frame_stack("perennial/AtariSwitch-v0", {"stack": 2}) == 2
    assert frame_stack("perennial/SlipperyAnt-v0", {}) == frame_stack("CartPole-v1", {}) == 0
    envs = make_vec("perennial/AtariSwitch-v0", 2, schedule_seeds=(0,), **args)
    replays = [Replay(1, 2, 120, np.zeros((4, 84, 84), np.uint8), np.zeros((), np.int64), stack=k)
               for k in (0, 4)]  # fmt: skip
    rng = np.random.default_rng(0)
    observations = envs.reset(seed=3)[0]
    for replay in replays:
        replay.start(observations[None])
    cuts = 0
    for _ in range(200):
        actions = rng.integers(0, 18, 2)
        observations, rewards, over, cut, infos = envs.step(actions)
        finals = {int(e): infos["final_obs"][e] for e in np.flatnonzero(cut & ~over)}
        cuts += len(finals)
        for replay in replays:
            replay.add([envs.task_of(0)[0]], actions[None], rewards[None], over[None],
                       (over | cut)[None], observations[None], finals)  # fmt: skip
    envs.close()
    assert cuts > 5
    for n_step in (1, 3):
        a, b = (r.sample(Streams([0], "replay"), 500, 0.9, n_step) for r in replays)
        going = a.discounts > 0
        assert np.array_equal(a.observations, b.observations)
        assert np.array_equal(a.next_observations[going], b.next_observations[going])
        assert np.array_equal(a.actions, b.actions) and np.array_equal(a.rewards, b.rewards)
