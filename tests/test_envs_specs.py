"""Arguments of environments: what is understood, and one line for what is not."""

import subprocess
import sys
from typing import Any

import gymnasium as gym
import pytest

from perennial.envs import make_vec, specs

ENV_ID = "perennial/SlipperyAnt-v0"


def test_command_line_strings_become_values() -> None:
    given = {
        "friction": "0.02,2.0",
        "change_every": "2e5",
        "observation": "v4",
        "contact_cost": "false",
        "reference": "nature",
        "max_episode_steps": "none",
        "task": "3",
    }
    assert specs.check_args(ENV_ID, given) == {
        "friction": (0.02, 2.0),
        "change_every": 200_000,
        "observation": "v4",
        "contact_cost": False,
        "reference": "nature",
        "max_episode_steps": None,
        "task": 3,
    }
    assert specs.check_args(ENV_ID, {"change_every": "2_000_000"}) == {"change_every": 2_000_000}
    listed = specs.check_args(ENV_ID, {"schedule": "cycle", "frictions": "(0.1, 1)"})
    assert listed == {"schedule": "cycle", "frictions": (0.1, 1.0)}
    assert specs.check_args(ENV_ID, {}) == {}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"fricton": "1,2"}, "takes no fricton: did you mean friction?"),
        ({"zzz": "1"}, "takes no zzz: choose from friction, frictions, change_every"),
        ({"schedule_seed": "3"}, "choose it with --seeds"),
        ({"friction": "0.5"}, "must be 2 numbers from 1e-05 to 10000; got 1: 0.5"),
        ({"friction": (0.1, 0.2, 0.3)}, "must be 2 numbers from 1e-05 to 10000; got 3"),
        ({"friction": "nan,2"}, "got nan"),
        ({"friction": "0.1,inf"}, "got inf"),
        ({"friction": (-0.1, 2)}, "got -0.1"),
        ({"friction": "0,2"}, "got 0"),
        ({"friction": "2,0.02"}, "friction=2,0.02: the lower number comes first"),
        ({"friction": "low,high"}, "got low"),
        ({"friction": ""}, "must be 2 numbers"),
        ({"friction": None}, "friction must be 2 numbers from 1e-05 to 10000; got none"),
        ({"friction": 3}, "got 1: 3"),
        ({"change_every": "0"}, "change_every must be a whole number of at least 1; got 0"),
        ({"change_every": "1.5"}, "got 1.5"),
        ({"change_every": "-3"}, "got -3"),
        ({"change_every": float("nan")}, "got nan"),
        ({"change_every": "1e400"}, "got 1e400"),
        ({"change_every": True}, "got True"),
        ({"change_every": [1]}, r"got \[1\]"),
        ({"schedule": "log-unifrom"}, "schedule=log-unifrom: did you mean log-uniform?"),
        ({"schedule": "list"}, "schedule=list needs its values"),
        ({"schedule": "cycle", "frictions": "0.1,-1"}, "got -1"),
        ({"schedule": "cycle", "frictions": ()}, "frictions must be numbers from 1e-05"),
        ({"frictions": "0.1,1"}, "schedule=log-uniform takes no frictions"),
        ({"schedule": "linear"}, "schedule=linear needs period=ENV_STEPS"),
        ({"period": "100"}, "schedule=log-uniform takes no period"),
        ({"change": "never"}, "change=never: choose from episode, now"),
        ({"reference": "natur"}, "did you mean nature?"),
        ({"reference": "nature", "change": "now"}, "drop change=now"),
        ({"observation": "v6"}, "observation=v6: did you mean v5?|did you mean v"),
        ({"contact_cost": "maybe"}, "contact_cost must be true or false; got maybe"),
        ({"max_episode_steps": "0"}, "max_episode_steps must be a whole number of at least 1"),
        ({"task": "-1"}, "task must be a whole number of at least 0; got -1"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        specs.check_args(ENV_ID, args)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=says):
        make_vec(ENV_ID, 2, schedule_seeds=[0], **args)


@pytest.mark.filterwarnings("ignore:.*render_mode='movie'")
def test_constructors_refuse_the_same() -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ValueError, match="got nan"):
            make(ENV_ID, friction=(float("nan"), 2))
        with pytest.raises(ValueError, match="schedule_seed must be a whole number of at least 0"):
            make(ENV_ID, schedule_seed=-1)
        with pytest.raises(ValueError, match="did you mean sinusoidal"):
            make(ENV_ID, schedule="sinusoid")
        with pytest.raises(ValueError, match="render_mode=movie: choose from"):
            make(ENV_ID, render_mode="movie")


@pytest.mark.parametrize(("num_envs", "seeds"), [(3, [0, 1]), (0, [0]), (2, []), (2, [1, 2, 3])])
def test_lanes_must_divide_into_blocks(num_envs: int, seeds: list[int]) -> None:
    for env_id in (ENV_ID, "Pendulum-v1"):
        with pytest.raises(ValueError, match=f"{num_envs} lanes do not divide"):
            make_vec(env_id, num_envs, schedule_seeds=seeds)


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("perennial/SliperyAnt-v0", "did you mean perennial/SlipperyAnt-v0?"),
        ("SlipperyAnt-v0", "did you mean perennial/SlipperyAnt-v0?"),
        ("Pendulum-v2", "did you mean Pendulum-v"),
        ("halfcheetah-v5", "did you mean HalfCheetah-v5?"),
        ("qqqqqqqq", "see `perennial list envs`"),
        ("nosuchmodule:Thing-v0", "there is no module nosuchmodule"),
    ],
)
def test_unknown_environments_are_refused(env_id: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        specs.check_env(env_id)
    assert "\n" not in str(caught.value)


def test_known_environments_pass() -> None:
    for env_id in (ENV_ID, "Pendulum-v1", "CartPole-v1", "HalfCheetah-v5"):
        specs.check_env(env_id)
    specs.check_env(f"perennial.envs:{ENV_ID}")


def test_a_missing_simulator_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = specs.importlib.util.find_spec
    gone = {"mujoco", "Box2D"}
    monkeypatch.setattr(
        specs.importlib.util, "find_spec", lambda name: None if name in gone else find(name)
    )
    with pytest.raises(ValueError, match="needs mujoco: pip install 'perennial-rl'"):
        specs.check_env(ENV_ID)
    with pytest.raises(ValueError, match=r"needs mujoco: pip install 'gymnasium\[mujoco\]'"):
        specs.check_env("HalfCheetah-v5")
    with pytest.raises(ValueError, match=r"needs Box2D: pip install 'gymnasium\[box2d\]'"):
        specs.check_env("LunarLander-v3")


def test_foreign_arguments_are_python_literals() -> None:
    given = {"g": "9.8", "max_episode_steps": "50"}
    assert specs.check_args("Pendulum-v1", given) == {"g": 9.8, "max_episode_steps": 50}
    cheetah = {"forward_reward_weight": "2", "xml_file": "half_cheetah.xml"}
    assert specs.check_args("HalfCheetah-v5", cheetah) == {**cheetah, "forward_reward_weight": 2}
    lake = {"is_slippery": "false", "map_name": "4x4"}
    assert specs.check_args("FrozenLake-v1", lake) == {"is_slippery": False, "map_name": "4x4"}
    with pytest.raises(ValueError, match="Pendulum-v1 takes no gravity: choose from"):
        specs.check_args("Pendulum-v1", {"gravity": 1})
    with pytest.raises(ValueError, match=r"HalfCheetah-v5 cannot be made: .*forwardreward"):
        make_vec("HalfCheetah-v5", 1, schedule_seeds=[0], forwardreward=1)


def test_the_table_matches_the_constructors() -> None:
    import inspect

    from perennial.envs.slippery_ant import SlipperyAntEnv
    from perennial.envs.slippery_ant_vector import SlipperyAntVectorEnv

    told = specs.ENVS[ENV_ID].defaults
    for cls, own in ((SlipperyAntEnv, set()), (SlipperyAntVectorEnv, {"num_envs", "threads"})):
        params = inspect.signature(cls).parameters
        taken = {name: param.default for name, param in params.items()}
        shared = set(taken) - own - {"schedule_seed", "render_mode"}
        assert {name: taken[name] for name in shared} == {name: told[name] for name in shared}
        assert set(told) - shared <= {"max_episode_steps"}


def test_checking_imports_neither_torch_nor_a_simulator() -> None:
    code = (
        "import sys; from perennial.envs import specs; import perennial.envs\n"
        f"specs.check_env({ENV_ID!r}); specs.check_args({ENV_ID!r}, {{'friction': '1,2'}})\n"
        "specs.check_env('HalfCheetah-v5')\n"
        "print(sorted({'torch', 'mujoco', 'pybullet', 'ale_py', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_stepping_imports_no_torch() -> None:
    code = (
        "import sys; from perennial.envs import make_vec\n"
        f"make_vec({ENV_ID!r}, 2, schedule_seeds=[0]).reset()\n"
        "make_vec('HalfCheetah-v5', 2, schedule_seeds=[0]).reset()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
