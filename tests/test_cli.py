"""The command line: one-line errors in time, help, resolved configuration, progress, a real run."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perennial.agents.cli import COMMANDS, main
from perennial.agents.config import AGENTS, fields_of
from perennial.agents.events import CHARTS, HPARAM_METRICS
from perennial.agents.progress import Progress
from perennial.plasticity.value_registry import VALUES

PPO = ("train", "ppo")
# Words of a command, and what its error line must contain.
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("tarin",), "unknown command 'tarin'; did you mean 'train'?"),
    (("--steps", "3"), "unknown command '--steps'"),
    (("train",), "name the agent first"),
    (("train", "--steps", "5"), "name the agent first"),
    (("train", "pp0"), "unknown agent 'pp0'; did you mean 'ppo'?"),
    ((*PPO, "--stepz", "5"), "unknown option '--stepz'; did you mean '--steps'?"),
    ((*PPO, "--learning_rat", "5"), "did you mean '--learning-rate'?"),
    ((*PPO, "--zzz=1"), "unknown option '--zzz'; see `perennial train ppo --help`"),
    ((*PPO, "-x"), "unknown option '-x'"),
    ((*PPO, "surplus"), "unexpected word 'surplus'"),
    ((*PPO, "--env", "Pendulum-v1", "surplus"), "unexpected word 'surplus'"),
    ((*PPO, "--steps"), "Missing value for argument '--steps'"),
    ((*PPO, "--plasticity"), "--plasticity needs a value"),
    ((*PPO, "--env-args", "--steps", "5"), "--env-args needs a value"),
    ((*PPO, "--steps", "nan"), "steps: expected a whole number from 1, not 'nan'"),
    ((*PPO, "--steps", "-5"), "not '-5'"),
    ((*PPO, "--steps=-5"), "not '-5'"),
    ((*PPO, "--steps", "10"), "less than one rollout of 2048"),
    ((*PPO, "--learning-rate", "-1e-3"), "learning_rate: expected a number above 0"),
    ((*PPO, "--learning-rate", "inf"), "not 'inf'"),
    ((*PPO, "--batch-size", "100"), "does not divide n_steps*num_envs=2048; try 64 or 128"),
    ((*PPO, "--num-envs", "3", "--batch-size", "4096"), "n_steps*num_envs=6144; try 3072 or 6144"),
    ((*PPO, "--seeds", "0,0"), "seed 0 is named twice"),
    ((*PPO, "--seeds", "none"), "seeds: expected"),
    ((*PPO, "--env", "perennial/SlipperyAmt-v0"), "perennial/SlipperyAnt-v0"),
    ((*PPO, "--env", "CartPol-v1"), "CartPole-v1"),
    ((*PPO, "--env", "ALE/Pong-v5"), "--env perennial/AtariSwitch-v0 --env-args games=Pong"),
    (("train", "sac", "--env", "perennial/AtariSwitch-v0"), "take dqn or ppo"),
    (("train", "dqn", "--env", "perennial/SlipperyAnt-v0"), "take sac or ppo"),
    (("train", "sac", "--preset", "abbas-atari-cycle"), "is for dqn and ppo, not for sac"),
    (("train", "dqn", "--preset", "abbas-atari-cycl"), "did you mean 'abbas-atari-cycle'?"),
    (("train", "dqn", "--env", "perennial/AtariSwitch-v0", "--env-args", "games=Pnog"),
     "did you mean Pong?"),
    ((*PPO, "--env-args", "frictoin=1,2"), "friction"),
    ((*PPO, "--env-args", "friction=2,nan"), "friction"),
    ((*PPO, "--env-args", "friction"), "expected key=value, not 'friction'"),
    ((*PPO, "--env-args", "change_every=3", "--env-args", "change_every=4"), "given twice"),
    ((*PPO, "--plasticity", "cpb"), "cbp"),
    ((*PPO, "--plasticity", "cbp:rate=2"), "rate"),
    ((*PPO, "--plasticity", "cbp", "--plasticity", "cbp"), "'cbp' is named twice"),
    ((*PPO, "--preset", "nature-slippery-ant-cpb"), "nature-slippery-ant-cbp"),
    ((*PPO, "--value-loss", "msee"), "did you mean 'mse'?"),
    ((*PPO, "--device", "gpu"), "available: auto, cpu, cuda"),
    ((*PPO, "--betas", "0.9"), "betas: expected two numbers"),
    ((*PPO, "--net-arch", "64,x"), "net_arch: expected"),
    ((*PPO, "--norm-obs=maybe",), "'maybe'"),
    ((*PPO, "--run-dir", "/dev/null/run"), "/dev/null/run"),
    ((*PPO, "--run-dir", "{foreign}"), "choose an empty or new"),
    ((*PPO, "--run-dir", "{foreign}/notes.txt"), "notes.txt is a file"),
    ((*PPO, "--run-dir", "{run}"), "holds a run"),
    (("resume",), "name the run's folder"),
    (("resume", "{foreign}"), "is no run: it has no config.json"),
    (("resume", "{foreign}/absent"), "is no run"),
    (("resume", "{foreign}/notes.txt"), "notes.txt"),
    (("resume", "{run}"), "config.json"),
    (("resume", "{run}", "--steps", "0"), "steps: expected a whole number"),
    (("resume", "a", "b"), "unexpected word 'b'"),
    (("evaluate",), "name the run's folder"),
    (("evaluate", "{foreign}"), "is no run"),
    (("evaluate", "{foreign}", "--episodes", "0"), "episodes: expected a whole number"),
    (("evaluate", "{foreign}", "--task", "-1"), "task: expected a whole number from 0"),
    (("evaluate", "{foreign}", "--vidoe", "x"), "unknown option '--vidoe'"),
    (("evaluate", "{foreign}", "--video", "x.mov"), "must end in .mp4"),
    (("evaluate", "{foreign}", "--video", "{foreign}/no/x.mp4"), "its folder does not exist"),
    (("list", "env"), "did you mean 'envs'?"),
    (("list", "envs", "agents"), "unexpected word 'agents'"),
    (("bench", "pp0"), "did you mean 'ppo'?"),
    (("bench", "ppo", "--json"), "Missing value for argument '--json'"),
]  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A folder with somebody's notes, and one with a config.json that is not a run's."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("not a run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"agent": "ppo", "steps": 1}')
    return {"foreign": str(tmp_path / "foreign"), "run": str(tmp_path / "run")}


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perennial.agents", *words],
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda v: " ".join(v)[:60])
def test_mistakes_are_one_line(
    words: tuple[str, ...],
    message: str,
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main([word.format(**folders) for word in words])
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_mistakes_need_neither_torch_nor_a_simulator(folders: dict[str, str]) -> None:
    commands = [[word.format(**folders) for word in words] for words, _ in MISTAKES]
    commands.append([*PPO, "--print-config", "--preset", "nature-slippery-ant-cbp"])
    code = (
        "import sys; from perennial.agents.cli import main\n"
        f"for words in {commands!r}:\n"
        "    main(words)\n"
        "    heavy = {'torch', 'mujoco', 'tensorboard', 'stable_baselines3'} & {*sys.modules}\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    "words", [(*PPO, "--stepz", "5"), (*PPO, "--env", "CartPol-v1"), (*PPO, "--print-config")]
)
def test_answers_come_within_a_second(words: tuple[str, ...]) -> None:
    seconds = []
    for _ in range(3):  # the best of three: this measures the command, not the neighbours
        begun = time.perf_counter()
        command(*words)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 1.0


def test_a_mistake_has_no_traceback_and_status_2() -> None:
    done = command(*PPO, "--steps", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: steps: expected a whole number from 1, not 'nan'\n"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main([*PPO, "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path}")


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*PPO, "--print-config", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    config: dict[str, Any] = json.loads(out)
    return config


def test_print_config_resolves_preset_and_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = printed_config(
        capsys, "--preset", "nature-slippery-ant-cbp", "--steps", "3e6", "--seeds", "0:3",
        "--env-args", "change_every=2e5", "friction=0.1,1", "--env-args", "observation=v5",
        "--plasticity", "adam-equal-betas", "--plasticity", "cbp:rate=1e-3", "--n-epochs", "1e1",
        "--norm-obs", "--num-envs", "2", "--max-grad-norm", "1",
    )  # fmt: skip
    assert config["agent"] == "ppo"
    assert (config["steps"], config["seeds"], config["num_envs"]) == (3_000_000, [0, 1, 2], 2)
    assert config["env_args"] == {
        "change_every": 200_000, "friction": [0.1, 1.0], "observation": "v5", "reference": "nature",
    }  # fmt: skip
    assert config["plasticity"] == ["l2:strength=1e-4", "cbp:rate=1e-3", "adam-equal-betas"]
    assert (config["betas"], config["norm_obs"], config["max_grad_norm"]) == ([0.99, 0.99], True, 1)
    assert (config["learning_rate"], config["batch_size"]) == (1e-4, 128)
    assert list(tmp_path.iterdir()) == []


def test_underscores_and_equals_signs_work_too(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "--n_steps=1_024", "--batch-size=32", "--no-norm-obs")
    assert (config["n_steps"], config["batch_size"], config["norm_obs"]) == (1024, 32, False)


@pytest.mark.parametrize("agent", AGENTS)
def test_help_is_grouped_and_shows_defaults(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", agent, "--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"{group} options") for group in
              ("experiment", "algorithm", "network", "plasticity", "run")]  # fmt: skip
    assert places == sorted(places)
    for name in fields_of(agent):
        assert "--" + name.replace("_", "-") in text
    flat = " ".join(text.replace("│", " ").split())
    assert f"(default: {fields_of(agent)['learning_rate'].default:g})" in flat
    assert "auto: 256,256" in flat or "(default: 256,256)" in flat
    if agent == "ppo":  # a preset's values are the defaults beside it
        assert main(["train", agent, "--preset", "nature-slippery-ant-std", "--help"]) == 0
        assert "(default: 0.0001)" in " ".join(capsys.readouterr().out.split())


def test_overview_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    assert "ppo" in capsys.readouterr().out
    for name in ("resume", "evaluate", "list", "bench"):
        assert main([name, "--help"]) == 0
        assert f"usage: perennial {name}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("perennial-rl ")


def test_lists_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for topic in ("agents", "envs", "plasticity", "metrics", "presets"):
        assert main(["list", topic]) == 0
        shown[topic] = capsys.readouterr().out
    assert "ppo" in shown["agents"]
    assert "perennial/SlipperyAnt-v0" in shown["envs"]
    assert "change_every=2000000" in shown["envs"]
    assert "friction=0.02,2" in shown["envs"]
    for name in ("cbp", "l2", "adam-equal-betas", "rate=", "strength=", *VALUES, "bins=255"):
        assert name in shown["plasticity"]
    assert "dormant_fraction" in shown["metrics"]
    assert "nature-slippery-ant-ns" in shown["presets"]
    assert main(["list"]) == 0
    everything = capsys.readouterr().out
    for text in shown.values():
        assert text.splitlines()[0] in everything


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "perennial.agents", "list", "envs"],
            stdout=closed, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 141


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_progress_prints_plain_lines_now_and_then() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(10_000, (0, 1), stream, clock) as progress:
        for k in range(1, 11):
            clock.seconds += 3
            for seed in (0, 1):
                message = {"seed": seed, "env_steps": 1000 * k, "task": k // 5, "fps": 250.0}
                progress.update(message | {"return": None if k == 1 else 5.0 * k})
        progress.note("warning: something")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # at 3, 15 and 27 seconds, the note, and the end
    assert lines[0] == "  5.0 %  500 of 10,000 env steps each  250 steps/s  ETA -:--:--  task 0"
    assert lines[1] == (
        " 45.0 %  4,500 of 10,000 env steps each  500 steps/s  ETA 0:00:24  tasks 0-1  return 22.5"
    )
    assert lines[3] == "warning: something"
    assert lines[4].startswith("100.0 %  10,000 of 10,000")


def test_progress_names_the_game_that_all_seeds_play() -> None:
    progress = Progress(100, (0, 1), io.StringIO())
    for names, shown in (
        (("Pong", "Pong"), "task 1 (Pong)"),
        (("Pong", "Alien"), "task 1"),
        ((None, None), "task 1"),
    ):
        for seed, name in enumerate(names):
            report = {"seed": seed, "env_steps": 10, "task": 1, "fps": 9.0, "return": None}
            progress.update(report | {"name": name})
        assert progress.line().endswith(f"  {shown}")


def test_progress_shows_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(10_000, (0,), stream) as progress:
        progress.note("a note [in brackets]")
        progress.update({"seed": 0, "env_steps": 5000, "task": 3, "return": -1.25, "fps": 1000.0})
    text = stream.getvalue()
    for part in ("50%", "1,000 steps/s", "ETA 0:00:05", "task 3", "return -1.2", "[in brackets]"):
        assert part in text


def test_train_resume_and_evaluate_by_command(tmp_path: Path) -> None:
    small = "--n-steps 256 --batch-size 64 --n-epochs 1 --net-arch 16 --metrics-every 256".split()
    words = [*small, "--steps", "512", "--seeds", "2", "--plasticity", "cbp"]
    done = command(*PPO, *words, "--env-args", "change_every=200", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    folder = Path(tmp_path, first.removeprefix("run folder: "))
    assert "tensorboard --logdir" in second
    record = json.loads((folder / "config.json").read_text())
    assert record["plasticity"] == ["cbp"]
    assert "versions" in record
    assert sorted(path.name for path in folder.glob("seed-*")) == ["seed-0", "seed-1"]
    done = command(*PPO, "--run-dir", str(folder), cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    accumulator = EventAccumulator(str(folder / "seed-1"))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    for chart, regexes in CHARTS.items():
        assert any(re.match(regex, tag) for regex in regexes for tag in tags), chart
    assert set(HPARAM_METRICS) <= set(tags)
    assert command("resume", str(folder), "--steps", "768", cwd=tmp_path).returncode == 0
    assert {path.name for path in folder.glob("seed-*/checkpoints/*")} >= {"768"}
    done = command("evaluate", str(folder), "--episodes", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "seed 0" in done.stdout
    assert "seed 1" in done.stdout
