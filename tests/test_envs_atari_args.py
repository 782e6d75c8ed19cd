"""Arguments of the changing Atari: its games, what is understood, one line for what is not."""

import inspect
import subprocess
import sys
from typing import Any

import ale_py
import gymnasium as gym
import pytest

import perennial.envs  # noqa: F401
from perennial.envs import specs
from perennial.envs.atari_games import GAMES, rom_name

ENV_ID = "perennial/AtariSwitch-v0"


def test_the_table_holds_gymnasiums_games() -> None:
    gym.register_envs(ale_py)
    theirs = {
        spec.id.removeprefix("ALE/").removesuffix("-v5"): spec.kwargs["game"]
        for spec in gym.registry.values()
        if spec.id.startswith("ALE/") and spec.id.endswith("-v5")
    }
    assert {game: rom_name(game) for game in GAMES} == theirs
    assert all(ale_py.roms.get_rom_path(rom) for rom in theirs.values())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"games": "Pnog"}, "games=Pnog: did you mean Pong?"),
        ({"games": ""}, "games must be names such as Adventure, AirRaid, Alien; got none"),
        ({"games": "Pong,Krull", "modes": "1"}, "modes=1: Krull has modes 0"),
        ({"games": "Pong", "difficulties": "0,4"}, "difficulties=4: Pong has difficulties 0, 1,"),
        ({"modes": "1.5"}, "modes must be whole numbers of at least 0; got 1.5"),
        ({"change_every": "0"}, "change_every must be a whole number of at least 1; got 0"),
        ({"cycles": "0"}, "cycles must be a whole number of at least 1"),
        ({"order": "shufled"}, "did you mean shuffled?"),
        ({"change": "soon"}, "change=soon: "),
        ({"repeat_action_probability": "1.5"}, "must be a number from 0 to 1; got 1.5"),
        ({"frame_skip": "0"}, "frame_skip must be a whole number of at least 1"),
        ({"stack": "0"}, "stack must be a whole number of at least 1"),
        ({"max_frames": "none"}, "max_frames must be a whole number of at least 1; got none"),
        ({"sticky": "0"}, "takes no sticky"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        specs.check_args(ENV_ID, args)
    assert "\n" not in str(caught.value)


def test_names_are_read_in_any_case() -> None:
    given = {"games": "pong,ms_pacman, TICTACTOE3D", "modes": "0", "change_every": "5e6"}
    wanted = {
        "games": ("Pong", "MsPacman", "TicTacToe3D"),
        "modes": (0,),
        "change_every": 5_000_000,
    }
    assert specs.check_args(ENV_ID, given) == wanted
    assert specs.check_args(ENV_ID, {"games": ["Pong"]}) == {"games": ("Pong",)}


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = specs.importlib.util.find_spec
    monkeypatch.setattr(
        specs.importlib.util, "find_spec", lambda name: None if name == "ale_py" else find(name)
    )
    for build in (
        lambda: specs.check_env(ENV_ID),
        lambda: gym.make(ENV_ID),
        lambda: gym.make_vec(ENV_ID),
    ):
        with pytest.raises(ValueError, match=r"needs ale_py: pip install 'perennial-rl\[atari\]'"):
            build()


def test_the_table_of_parameters_matches_the_constructors() -> None:
    from perennial.envs.atari_switch import AtariSwitchEnv
    from perennial.envs.atari_switch_vector import AtariSwitchVectorEnv

    told = specs.ENVS[ENV_ID].defaults
    own = {"num_envs", "threads", "schedule_seed", "render_mode"}
    for cls in (AtariSwitchEnv, AtariSwitchVectorEnv):
        params = inspect.signature(cls).parameters
        taken = {name: param.default for name, param in params.items() if name not in own}
        assert taken == told


def test_checking_imports_no_emulator() -> None:
    code = (
        "import sys, perennial.envs.atari_switch_vector; from perennial.envs import specs\n"
        f"specs.check_env({ENV_ID!r}); specs.check_args({ENV_ID!r}, {{'games': 'Pong'}})\n"
        "print(sorted({'torch', 'ale_py', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
