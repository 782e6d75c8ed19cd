"""Atari 2600 consoles with sticky actions whose state goes on exactly: `AtariLane`.

`cloneState(include_rng=True)` of ale-py 0.12 is not enough to go on from: it leaves out the action
that stickiness repeats, the picture that a frame draws over, and whether the last frame was
finished. So here

- stickiness is drawn outside of the emulator, with the same law: before each frame the action of
  the last frame stays with `repeat_action_probability` (Machado et al., JAIR 2018);
- an episode starts by restoring the clone of the start before it (the first: of the loaded
  cartridge) and a full reset. What follows depends on nothing else that the emulator has played
  (tested for every game), so emulators are shared and kept;
- a state holds that clone and the actions of all frames since. Going on replays them, then compares
  the emulator with the clone taken when the state was saved.
"""

from collections import defaultdict
from typing import Any

import ale_py
import cv2
import numpy as np
from ale_py import ALEInterface, ALEState, LoggerMode
from numpy.typing import NDArray

from perennial.envs.atari_games import SIDE, Entry, rom_name
from perennial.envs.state import generator_from_state

Frame = NDArray[np.uint8]

_fresh: dict[str, bytes] = {}  # game -> clone of the loaded cartridge, in this process


class Emulators:
    """Emulators by game: loading one costs 80 ms and 0.7 MB, so those given back are kept."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Any]] = defaultdict(list)

    def take(self, game: str) -> Any:
        """An emulator with the game's cartridge; whatever it played before."""
        if self._idle[game]:
            return self._idle[game].pop()
        ALEInterface.setLoggerMode(LoggerMode.Error)
        ale = ALEInterface()
        ale.setInt("random_seed", 0)  # draws stickiness only, which is off
        ale.setFloat("repeat_action_probability", 0.0)
        path: Any = ale_py.roms.get_rom_path(rom_name(game))
        ale.loadROM(path)
        if game not in _fresh:
            _fresh[game] = _clone(ale)
        return ale

    def give(self, game: str, ale: Any) -> None:
        """Take back an emulator."""
        self._idle[game].append(ale)


def _clone(ale: Any) -> bytes:
    return ale.cloneState(include_rng=True).serialize()


def _origin(ale: Any, entry: Entry) -> bytes:
    """Where an entry's first episode starts from: the loaded cartridge, mode and switches set."""
    ale.restoreState(ALEState(_fresh[entry.game]))
    if entry.mode is not None:
        ale.setMode(entry.mode)
    if entry.difficulty is not None:
        ale.setDifficulty(entry.difficulty)
    return _clone(ale)


class AtariLane:
    """One console: plays an entry's game episode by episode.

    Args:
        emulators: Where it takes its emulators from.
        frame_skip: Frames of a step.
        stickiness: How likely each frame repeats the action of the frame before.
        max_frames: Frames after which an episode is truncated.
    """

    def __init__(
        self, emulators: Emulators, frame_skip: int, stickiness: float, max_frames: int
    ) -> None:
        self._emulators = emulators
        self._frame_skip, self._stickiness = frame_skip, stickiness
        self._max_frames = max_frames
        self.rng = np.random.default_rng()
        self.ale: Any = None
        self._entry: Entry | None = None
        self._began = b""  # the clone that this episode started from, and the next one will
        self._next = b""
        self._held = 0  # the last frame's action
        self._applied = bytearray()  # the actions of all frames of this episode
        self._lead = 0  # frames before the first of them
        self._screen = self._other = np.empty((0, 0), np.uint8)

    @property
    def frames(self) -> int:
        """Frames of this episode, as ALE counts them: a few may go before the first action."""
        return self._lead + len(self._applied)

    @property
    def applied(self) -> bytes:
        """The action of each frame of this episode, after stickiness."""
        return bytes(self._applied)

    def seed(self, rng: np.random.Generator) -> None:
        """Draw stickiness from `rng`; the next episode is the entry's first again."""
        self.rng = rng
        if self._entry is not None:
            self._next = _origin(self.ale, self._entry)

    def start(self, entry: Entry, out: Frame) -> None:
        """Start an episode of the entry; its picture [84, 84] goes to `out`."""
        if entry != self._entry:
            self._enter(entry)
        self._begin()
        self.ale.getScreenGrayscale(self._screen)
        self._shrink(out)

    def step(self, action: int, out: Frame) -> tuple[float, bool, bool]:
        """Frames of one step: the game's points, terminated, truncated; the picture into `out`.

        The picture is the brighter of the last two frames, pixel by pixel; where the game ends
        before, of the last frame alone.
        """
        ale, skip, stickiness = self.ale, self._frame_skip, self._stickiness
        stays = (self.rng.random(skip) < stickiness).tolist() if stickiness else (False,) * skip
        points, held, over, pooled = 0, self._held, False, False
        last = min(skip, self._max_frames - self.frames) - 1
        for frame, stay in enumerate(stays):
            if not stay:
                held = action
            points += ale.act(held)
            self._applied.append(held)
            over = ale.game_over()
            if over or frame >= last:
                break
            if frame == skip - 2:
                ale.getScreenGrayscale(self._other)
                pooled = True
        self._held = held
        ale.getScreenGrayscale(self._screen)
        if pooled:
            np.maximum(self._screen, self._other, out=self._screen)
        self._shrink(out)
        return float(points), over, not over and self.frames >= self._max_frames

    def lives(self) -> int:
        """Lives left, in games that count them."""
        return self.ale.lives()

    def render(self) -> Frame:
        """The picture in colour [210, 160, 3]."""
        return self.ale.getScreenRGB()

    def _enter(self, entry: Entry) -> None:
        if self._entry is None or self._entry.game != entry.game:
            self._leave()
            self.ale = self._emulators.take(entry.game)
            self._screen, self._other = (np.empty(self.ale.getScreenDims(), np.uint8) for _ in "12")
        self._entry = entry
        self._next = _origin(self.ale, entry)

    def _leave(self) -> None:
        if self._entry is not None:
            self._emulators.give(self._entry.game, self.ale)
            self._entry = self.ale = None

    def _begin(self) -> None:
        self._began = self._next
        self.ale.restoreState(ALEState(self._began))
        self.ale.reset_game()
        self._next = _clone(self.ale)
        self._lead = self.ale.getEpisodeFrameNumber()
        self._held = 0
        self._applied = bytearray()

    def _shrink(self, out: Frame) -> None:
        cv2.resize(self._screen, (SIDE, SIDE), dst=out, interpolation=cv2.INTER_AREA)

    def get_state(self) -> dict[str, Any]:
        """Everything that `set_state` needs: numpy arrays and JSON values."""
        state: dict[str, Any] = {"rng": self.rng.bit_generator.state, "playing": False}
        if self._entry is None:
            return state
        return {
            **state,
            "playing": True,
            "origin": np.frombuffer(self._began, np.uint8),
            "applied": np.frombuffer(self.applied, np.uint8),
            "held": self._held,
            "machine": np.frombuffer(_clone(self.ale), np.uint8),
        }

    def set_state(self, entry: Entry, state: dict[str, Any]) -> None:
        """Go on from a `get_state` taken in `entry`: replays the episode, 50 us a frame.

        Raises:
            ValueError: The replay ends elsewhere: the state is of another ale-py.
        """
        self.rng = generator_from_state(state["rng"])
        if not state["playing"]:
            self._leave()
            return
        self._enter(entry)
        self._next = np.asarray(state["origin"], np.uint8).tobytes()
        self._begin()
        self._applied = bytearray(np.asarray(state["applied"], np.uint8).tobytes())
        for action in self._applied:
            self.ale.act(action)
        self._held = int(state["held"])
        if _clone(self.ale) != np.asarray(state["machine"], np.uint8).tobytes():
            raise ValueError(
                f"the saved {entry.game} ends elsewhere when replayed: it was not saved with "
                f"ale-py {ale_py.__version__}, which is installed"
            )
