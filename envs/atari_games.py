"""The Atari games, and in which order they come: tasks of `perennial/AtariSwitch-v0`.

Imports no emulator, so that a command is checked without one. Names, modes and difficulties are
those of ale-py 0.12 and of Gymnasium's `ALE/<name>-v5`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from perennial.envs.params import Param
from perennial.envs.schedules import Clock, Schedule, hashed_uniform

ACTIONS = 18  # the joystick's, in every game; what a game has no use for does nothing
SIDE = 84  # pixels of a picture, both ways

# name, its modes, its difficulties; the first mode is the one a game starts in
_TABLE = """
Adventure 0-2 0-3; AirRaid 1-8 0; Alien 0-3 0-3; Amidar 0 0,3; Assault 0 0; Asterix 0 0;
Asteroids 0-31,128 0,3; Atlantis 0-3 0; Atlantis2 0 0; Backgammon 0 3;
BankHeist 0,4,8,12,16,20,24,28 0-3; BasicMath 5-8 0,2-3; BattleZone 1-3 0; BeamRider 0 0-1;
Berzerk 1-9,16-18 0; Blackjack 0 0-3; Bowling 0,2,4 0-1; Boxing 0 0-3;
Breakout 0,4,8,12,16,20,24,28,32,36,40,44 0-1; Carnival 0 0; Casino 0,2-3 0-3; Centipede 22,86 0;
ChopperCommand 0,2 0-1; CrazyClimber 0-3 0-1; Crossbow 0,2,4,6 0-1; Darkchambers 0 0;
Defender 1-9,16 0-1; DemonAttack 1,3,5,7 0-1; DonkeyKong 0 0; DoubleDunk 0-15 0; Earthworld 0 0;
ElevatorAction 0 0; Enduro 0 0; Entombed 0 0,2; Et 0-2 0-3; FishingDerby 0 0-3;
FlagCapture 8-10 0; Freeway 0-7 0-1; Frogger 0-2 0-1; Frostbite 0,2 0; Galaxian 1-9 0-1;
Gopher 0,2 0-1; Gravitar 0-4 0; Hangman 0-3 0-1; HauntedHouse 0-8 0-1; Hero 0-4 0;
HumanCannonball 0-7 0-1; IceHockey 0,2 0-3; Jamesbond 0-1 0; JourneyEscape 0 0-1; Kaboom 0 0;
Kangaroo 0-1 0; KeystoneKapers 0 0; KingKong 0-3 0; Klax 0-2 0; Koolaid 0 0; Krull 0 0;
KungFuMaster 0 0; LaserGates 0 0; LostLuggage 0-1 0-1; MarioBros 0,2,4,6 0; MiniatureGolf 0 0-1;
MontezumaRevenge 0 0; MrDo 0-3 0; MsPacman 0-3 0; NameThisGame 8,24,40 0-1; Othello 0-2 0,2;
Pacman 0-7 0-1; Phoenix 0 0; Pitfall 0 0; Pitfall2 0 0; Pong 0-1 0-3; Pooyan 10,30,50,70 0;
PrivateEye 0-4 0-3; Qbert 0 0-1; Riverraid 0 0-1; RoadRunner 0 0; Robotank 0 0; Seaquest 0 0-1;
SirLancelot 0 0; Skiing 0 0; Solaris 0 0; SpaceInvaders 0-15 0-1; SpaceWar 6-17 0;
StarGunner 0-3 0; Superman 0 0-3; Surround 0,2 0-3; Tennis 0,2 0-3; Tetris 0 0;
TicTacToe3D 0-8 0,2; TimePilot 0 0-2; Trondead 0 0-1; Turmoil 0-8 0; Tutankham 0,4,8,12 0;
UpNDown 0 0-3; Venture 0 0-3; VideoCheckers 1-9,11-19 0; VideoChess 0-4 0; VideoPinball 0,2 0-1;
WizardOfWor 0 0-1; WordZapper 0-23 0-3; YarsRevenge 0,32,64,96 0-1; Zaxxon 0,8,16,24 0
"""
_CUBES = ",".join(f"{100 * shuffle}-{100 * shuffle + 2}" for shuffle in range(51))


def _numbers(spans: str) -> tuple[int, ...]:
    found: list[int] = []
    for span in spans.split(","):
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


_ROWS = [row.split() for row in _TABLE.split(";")] + [["VideoCube", _CUBES, "0-1"]]
MODES = {name: _numbers(modes) for name, modes, _ in sorted(_ROWS)}
DIFFICULTIES = {name: _numbers(difficulties) for name, _, difficulties in sorted(_ROWS)}
GAMES = tuple(MODES)

# Schwarz et al., "Progress & Compress", 2018, and CORA (Powers et al., 2022): 5e7 frames each.
DEFAULT_GAMES = ("SpaceInvaders", "Krull", "BeamRider", "Hero", "StarGunner", "MsPacman")

ATARI_PARAMS = (
    Param("games", "choices", DEFAULT_GAMES, "the games, such as Pong,Breakout; each in every given"
          " mode and difficulty", choices=GAMES),
    Param("modes", "ints", None, "modes of every game, milder changes than another game; none: the"
          " mode it starts in", low=0, optional=True),
    Param("difficulties", "ints", None, "difficulties of every game; none: the one it starts in",
          low=0, optional=True),
    Param("change_every", "int", 12_500_000, "env steps of the seed from one change to the next; "
          "one is frame_skip frames", low=1),
    Param("cycles", "int", None, "how often the games come round, the last one then stays; none: "
          "for ever", low=1, optional=True),
    Param("order", "choice", "given", "given: the same in every cycle; shuffled: the seed shuffles "
          "each cycle", choices=("given", "shuffled")),
    Param("change", "choice", "episode", "changes wait for an episode's end, or come at once and "
          "truncate it", choices=("episode", "now")),
    Param("task", "int", None, "stay in this task of the schedule for ever", low=0, optional=True),
    Param("repeat_action_probability", "float", 0.25, "stickiness: how likely each frame repeats "
          "the last frame's action", low=0, high=1),
    Param("frame_skip", "int", 4, "frames of one env step; the last two are pooled", low=1),
    Param("stack", "int", 4, "frames of an observation", low=1),
    Param("max_frames", "int", 108_000, "frames after which an episode is truncated", low=1),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A game in a mode and a difficulty; None: as it starts."""

    game: str
    index: int  # of the game among `games`
    mode: int | None
    difficulty: int | None

    @property
    def name(self) -> str:
        """What the log calls it: Pong, or Pong-mode-1-difficulty-0 as far as these are given."""
        parts = [("mode", self.mode), ("difficulty", self.difficulty)]
        return self.game + "".join(f"-{part}-{n}" for part, n in parts if n is not None)

    @property
    def params(self) -> dict[str, float]:
        """What `info["task_params"]` says of it."""
        return {
            "game": float(self.index),
            "mode": float(MODES[self.game][0] if self.mode is None else self.mode),
            "difficulty": float(self.difficulty or 0),
        }


PARAM_NAMES = tuple(Entry(GAMES[0], 0, None, None).params)


def make_entries(args: Mapping[str, Any]) -> tuple[Entry, ...]:
    """What comes round in a cycle: games, within them modes, within them difficulties.

    Raises:
        ValueError: One line: a game has no such mode or difficulty.
    """
    for name, table in (("modes", MODES), ("difficulties", DIFFICULTIES)):
        for game, number in product(args["games"], args[name] or ()):
            if number not in table[game]:
                held = ", ".join(map(str, table[game][:20])) + ", ..." * (len(table[game]) > 20)
                raise ValueError(f"{name}={number}: {game} has {name} {held}")
    return tuple(
        Entry(game, index, mode, difficulty)
        for index, game in enumerate(args["games"])
        for mode in args["modes"] or (None,)
        for difficulty in args["difficulties"] or (None,)
    )


def check_atari(args: Mapping[str, Any]) -> None:
    """Refuse modes and difficulties that a game lacks."""
    make_entries(args)


@dataclass(frozen=True)
class Rounds:
    """Positions 0 to size - 1 in cycles, in order or shuffled; `cycles` None: for ever."""

    size: int
    cycles: int | None
    shuffled: bool

    def value(self, task: int, env_steps: int, seed: int) -> float:
        """The position of `task`."""
        cycle, place = divmod(task, self.size)
        return float(self._positions(cycle, seed)[place] if self.shuffled else place)

    def tasks(self, change_every: int) -> int | None:
        """How many tasks there are."""
        return None if self.cycles is None else self.cycles * self.size

    def _positions(self, cycle: int, seed: int) -> list[int]:
        if self.size == 2:
            cycle = 0  # two can only take turns
        drawn = self._drawn(cycle, seed)
        if self.size > 2 and cycle > 0 and self._drawn(cycle - 1, seed)[-1] == drawn[0]:
            drawn[:2] = drawn[1::-1]  # no game twice in a row
        return drawn

    def _drawn(self, cycle: int, seed: int) -> list[int]:
        first = cycle * self.size
        return sorted(range(self.size), key=lambda i: hashed_uniform(seed, first + i))


class Tour:
    """One seed's clock over the entries.

    Args:
        args: All parameters of the environment, checked.
        schedule_seed: Names the schedule.
    """

    def __init__(self, args: Mapping[str, Any], schedule_seed: int) -> None:
        if not isinstance(schedule_seed, int | np.integer) or schedule_seed < 0:
            wanted = "schedule_seed must be a whole number of at least 0"
            raise ValueError(f"{wanted}; got {schedule_seed}")
        self._entries = make_entries(args)
        rounds = Rounds(len(self._entries), args["cycles"], args["order"] == "shuffled")
        schedule = Schedule(rounds, args["change_every"], int(schedule_seed))
        self.clock = Clock(schedule, hold=args["task"])

    def entry(self, task: int) -> Entry:
        """What is played in `task`."""
        return self._entries[int(self.clock.schedule.value(task))]


def rom_name(game: str) -> str:
    """ale-py's name of a game: "TicTacToe3D" -> "tic_tac_toe_3d"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=e)(?=3D)", "_", game).lower()
