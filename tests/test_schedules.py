"""Schedules are pure functions of (env steps, schedule seed); clocks change on the dot."""

import math

import pytest

from perennial.envs.schedules import Clock, Schedule, hashed_uniform, make_values

RANGE = (0.02, 2.0)


def build(kind: str, change_every: int = 100, seed: int = 0, **given: object) -> Schedule:
    values = make_values(kind, given.get("span", RANGE), given.get("listed"), given.get("period"))
    return Schedule(values, change_every, seed)


def test_a_task_lasts_change_every_steps() -> None:
    schedule = build("log-uniform", change_every=2_000_000)
    steps = (0, 1_999_999, 2_000_000, 3_999_999, 4_000_000)
    assert [schedule.task(n) for n in steps] == [0, 0, 1, 1, 2]


def test_values_depend_on_task_and_seed_only() -> None:
    forwards = [build("log-uniform").value(task) for task in range(50)]
    again = build("log-uniform", change_every=7)
    assert [again.value(task) for task in reversed(range(50))] == forwards[::-1]
    other = [build("log-uniform", seed=1).value(task) for task in range(50)]
    assert len(set(forwards + other)) == 100


def test_the_first_draws_never_change() -> None:
    """Published runs name their schedule by its seed, so these numbers are part of the format."""
    drawn = [build("log-uniform", seed=seed).value(task) for seed in (0, 1) for task in (0, 1)]
    pinned = [1.0311836228680538, 0.08586729154129874, 0.1279698972472261, 0.02039226321186877]
    assert drawn == pytest.approx(pinned, rel=1e-12)  # exp and log may differ by a rounding


def test_log_uniform_passes_kolmogorov_smirnov() -> None:
    """100 seeds x 50 changes, as the published table has; p > 0.01."""
    schedules = [build("log-uniform", seed=seed) for seed in range(100)]
    drawn = [schedule.value(task) for schedule in schedules for task in range(50)]
    low, high = map(math.log, RANGE)
    ranks = sorted((math.log(value) - low) / (high - low) for value in drawn)
    n = len(ranks)
    distance = max(max((i + 1) / n - u, u - i / n) for i, u in enumerate(ranks))
    assert distance < 1.628 / math.sqrt(n)
    assert RANGE[0] <= min(drawn) and max(drawn) <= RANGE[1]


def test_the_ends_of_the_range_are_kept_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perennial.envs.schedules.hashed_uniform", lambda seed, index: 0.0)
    assert build("log-uniform").value(0) == 0.02
    monkeypatch.setattr("perennial.envs.schedules.hashed_uniform", lambda seed, index: 1 - 2**-53)
    assert build("log-uniform").value(0) <= 2.0
    assert build("log-uniform", span=(0.3, 0.3)).value(5) == 0.3


def test_hashed_uniform_is_even_along_either_argument() -> None:
    along_seeds = [hashed_uniform(seed, 3) for seed in range(2000)]
    along_tasks = [hashed_uniform(3, task) for task in range(2000)]
    for numbers in (along_seeds, along_tasks):
        assert abs(sum(numbers) / 2000 - 0.5) < 4 * math.sqrt(1 / 12 / 2000)
        assert 0 <= min(numbers) and max(numbers) < 1


def test_list_ends_and_cycle_does_not() -> None:
    listed = (0.1, 0.5, 2.0)
    in_turn, cycle = build("list", listed=listed), build("cycle", listed=listed)
    steps = [0, 100, 200, 300, 10_000]
    assert [in_turn.task(n) for n in steps] == [0, 1, 2, 2, 2]
    assert [cycle.task(n) for n in steps] == [0, 1, 2, 3, 100]
    assert [in_turn.value(in_turn.task(n)) for n in steps] == [0.1, 0.5, 2.0, 2.0, 2.0]
    assert [cycle.value(cycle.task(n)) for n in steps] == [0.1, 0.5, 2.0, 0.1, 0.5]


def test_linear_drift_moves_evenly_and_stays() -> None:
    schedule = build("linear", period=1000, span=(2.0, 0.0))
    values = [schedule.value(schedule.task(n)) for n in range(0, 1300, 100)]
    assert values == pytest.approx([2.0 - 0.2 * i for i in range(10)] + [0.0] * 3)
    assert schedule.task(10**9) == schedule.last_task == 10


def test_sinusoidal_drift_swings_over_the_whole_range() -> None:
    schedule = build("sinusoidal", change_every=1, period=1000, seed=4)
    swing = [schedule.value(task) for task in range(2000)]
    assert min(swing) == pytest.approx(0.02, abs=1e-4)
    assert max(swing) == pytest.approx(2.0, abs=1e-4)
    assert swing[:1000] == swing[1000:]
    assert sum(swing[:1000]) / 1000 == pytest.approx(1.01)
    other = build("sinusoidal", change_every=1, period=1000, seed=5)
    assert other.value(0) != schedule.value(0)


def test_clock_crosses_exactly_on_the_step() -> None:
    clock = Clock(build("log-uniform", change_every=10))
    crossed = [n for n in range(1, 41) if clock.advance(1)]
    assert crossed == [10, 20, 30, 40]
    clock.restart()
    assert clock.task == 0 and [n for n in range(3, 43, 3) if clock.advance(3)] == [12, 21, 30, 42]


def test_clock_of_an_ended_list_stops_crossing() -> None:
    clock = Clock(build("list", change_every=10, listed=(0.1, 0.2)))
    assert [n for n in range(1, 100) if clock.advance(1)] == [10]
    assert clock.task == 1


def test_nature_counts_from_the_last_change_strictly() -> None:
    clock = Clock(build("log-uniform", change_every=100), reference="nature")
    tasks = {}
    for end in (100, 101, 150, 201, 202, 500, 600, 601):
        assert clock.advance(end - clock.env_steps) is False
        before = clock.task
        tasks[end] = (before, clock.episode_end())
    assert tasks == {
        100: (0, 0),  # strictly more than 100 steps
        101: (0, 1),
        150: (1, 1),
        201: (1, 1),  # exactly 100 after the change at 101
        202: (1, 2),
        500: (2, 3),  # one change however long the episode was
        600: (3, 3),
        601: (3, 4),
    }


def test_clock_holds_a_task() -> None:
    schedule = build("log-uniform", change_every=10)
    for reference in (None, "nature"):
        clock = Clock(schedule, reference=reference, hold=7)
        assert not clock.advance(1000)
        assert clock.episode_end() == clock.task == 7
        assert clock.value == schedule.value(7)


@pytest.mark.parametrize("reference", [None, "nature"])
def test_clock_state_goes_on(reference: str | None) -> None:
    def walk(clock: Clock, ends: range) -> list[tuple[bool, int, float]]:
        return [(clock.advance(7), clock.episode_end(), clock.value) for _ in ends]

    unbroken, first, second = (
        Clock(build("log-uniform", change_every=50, seed=3), reference) for _ in range(3)
    )
    expected = walk(unbroken, range(100))
    walk(first, range(41))
    second.set_state(first.get_state())
    assert walk(second, range(59)) == expected[41:]
