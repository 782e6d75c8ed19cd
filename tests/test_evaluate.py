"""Playing what was trained: in which task, on what, and how it is seen."""

from typing import Any

import numpy as np
import pytest

from perennial.envs.vector import make_vec

ARGS: dict[str, dict[str, Any]] = {
    "perennial/SlipperyAnt-v0": {"change_every": 20},
    "perennial/AtariSwitch-v0": {"change_every": 20, "games": "Pong,Breakout"},
    "CartPole-v1": {},
}


@pytest.mark.parametrize("env", ARGS)
def test_the_task_of_a_saved_state_is_known_without_playing(env: str) -> None:
    envs: Any = make_vec(env, 4, schedule_seeds=(3, 5), **ARGS[env])
    envs.reset(seed=[0, 1, 2, 3])
    seen: list[int] = []
    for _ in range(60):
        if len(seen) % 7 == 0:
            saved = [(envs.get_state(block), envs.task_of(block)[0]) for block in (0, 1)]
        seen.append(envs.task_of(1)[0])
        envs.step(envs.action_space.sample())
        for block, (state, task) in enumerate(saved):
            now = envs.task_of(block)
            assert envs.task_in(block, state) == task
            assert envs.task_of(block) == now
    assert np.unique(seen).size == (1 if env == "CartPole-v1" else 6)
    envs.close()
