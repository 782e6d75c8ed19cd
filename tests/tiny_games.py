"""A pixel game that is learned in seconds: `tests/Catch-v0`, and `tests/BigCatch-v0` on 40x40."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

SIDE = 10


class Catch(gym.Env):
    """A ball falls down a 10x10 image, a paddle at the bottom moves left, stays or moves right.

    Reward 1 for a catch and -1 for a miss, at the end of an episode of 9 steps. Perfect play always
    catches; random play returns about -0.6.

    Args:
        scale: side of a square of pixels that shows one of the 100 places.
    """

    action_space = gym.spaces.Discrete(3)

    def __init__(self, scale: int = 1):
        self.scale = scale
        self.observation_space = gym.spaces.Box(0, 255, (1, SIDE * scale, SIDE * scale), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.row, self.paddle = 0, SIDE // 2
        self.column = int(self.np_random.integers(SIDE))
        return self._image(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.paddle = min(max(self.paddle + int(action) - 1, 0), SIDE - 1)
        self.row += 1
        done = self.row == SIDE - 1
        reward = (1.0 if self.column == self.paddle else -1.0) if done else 0.0
        return self._image(), reward, done, False, {}

    def _image(self) -> np.ndarray:
        image = np.zeros((1, SIDE, SIDE), np.uint8)
        image[0, self.row, self.column] = image[0, SIDE - 1, self.paddle] = 255
        return image.repeat(self.scale, 1).repeat(self.scale, 2)


if "tests/Catch-v0" not in gym.registry:
    gym.register("tests/Catch-v0", entry_point=Catch)
    gym.register("tests/BigCatch-v0", entry_point=Catch, kwargs={"scale": 4})
