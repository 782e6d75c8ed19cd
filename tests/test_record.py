"""The recorder as TensorBoard's own reader and a spreadsheet see it: fresh, killed, resumed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from perennial.agents import events
from perennial.agents.config import PPOConfig, from_json
from perennial.agents.episodes import Episodes
from perennial.agents.record import SeedRecorder, hparams_of
from perennial.envs.specs import game_names

CONFIG = PPOConfig(steps=100_000, n_steps=1000, batch_size=100, metrics_every=3000)
# Tags of every kind that the contract names.
TAGS = [
    "rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "train/value_loss", "task/index",
    "task/friction", "task/return", "task/change", "game/Pong/return",
    "game/Breakout-mode-4/return", "plasticity/policy/dormant_fraction",
    "plasticity/value/dormant_fraction", "plasticity/policy/dormant_fraction_0.1",
    "plasticity/policy/0/dormant_fraction", "plasticity/value/1/dormant_fraction",
    "plasticity/policy/dead_fraction", "plasticity/policy/effective_rank",
    "plasticity/policy/stable_rank", "plasticity/policy/approximate_rank",
    "plasticity/policy/weight_magnitude", "plasticity/value/weight_norm",
    "plasticity/policy/gradient_norm", "intervention/cbp/units_reset", "train/explained_variance",
]  # fmt: skip


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def rows(folder: Path) -> list[list[str]]:
    with open(folder / "episodes.csv") as file:
        return list(csv.reader(file))


def seed_dir(tmp_path: Path, name: str = "seed-3") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def play(recorder: SeedRecorder, start: int, stop: int) -> None:
    """What a run records between two steps: a function of env_steps, as in an exact resume."""
    for env_steps in range(start + 1000, stop + 1, 1000):
        recorder.episode(env_steps - 500, task=env_steps // 5000, return_=env_steps / 7, length=500)
        values = {"rollout/ep_rew_mean": env_steps / 8}
        if recorder.metrics_due(env_steps):
            values["plasticity/policy/dormant_fraction"] = env_steps / 2**20
        recorder.scalars(env_steps, values)


def test_many_tags_in_one_event_read_back(tmp_path: Path) -> None:
    recorder = SeedRecorder(seed_dir(tmp_path), CONFIG, None)
    recorder.scalars(1000, {tag: k / 4 for k, tag in enumerate(TAGS)})
    accumulator = read(recorder.seed_dir)  # before close: what a kill now would leave
    assert sorted(accumulator.Tags()["scalars"]) == sorted(TAGS)
    for k, tag in enumerate(TAGS):
        assert [(e.step, e.value) for e in accumulator.Scalars(tag)] == [(1000, k / 4)]
    recorder.close()
    recorder.close()


def test_fresh_run_holds_page_hparams_and_configuration(tmp_path: Path) -> None:
    SeedRecorder(seed_dir(tmp_path), CONFIG, None).close()
    accumulator = read(tmp_path / "seed-3")
    layout = layout_pb2.Layout()
    layout.ParseFromString(
        accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    (category,) = layout.category
    assert category.title == "Continual"
    assert len(category.chart) <= 12
    text = accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"n_steps": 1000' in text
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["seed"].number_value == 3
    assert session.hparams["agent"].string_value == "ppo"
    assert rows(tmp_path / "seed-3") == [["env_steps", "task", "return", "length"]]


def test_charts_show_the_tags_of_the_contract() -> None:
    def shown(chart: str) -> set[str]:
        return {tag for tag in TAGS if any(re.match(regex, tag) for regex in events.CHARTS[chart])}

    assert shown("return") == {"rollout/ep_rew_mean", "task/return", "task/change"}
    assert shown("task") == {"task/index"}
    assert shown("task parameters") == {"task/friction"}
    assert shown("dormant units") == {
        "plasticity/policy/dormant_fraction", "plasticity/value/dormant_fraction",
    }  # fmt: skip
    assert shown("dormant units by layer") == {
        "plasticity/policy/0/dormant_fraction", "plasticity/value/1/dormant_fraction",
    }  # fmt: skip
    assert shown("units reset") == {"intervention/cbp/units_reset"}
    assert all(shown(chart) for chart in events.CHARTS)


def test_every_game_has_a_chart_with_the_marks_of_changes(tmp_path: Path) -> None:
    args = {"games": ("Pong", "Breakout"), "change_every": 5000}
    config = PPOConfig(env="perennial/AtariSwitch-v0", env_args=args, n_steps=1000)
    SeedRecorder(seed_dir(tmp_path), config, None).close()
    layout = layout_pb2.Layout()
    tensor = read(tmp_path / "seed-3").Tensors("custom_scalars__config__")[0].tensor_proto
    layout.ParseFromString(tensor.string_val[0])
    charts = {chart.title: chart.multiline.tag for chart in layout.category[0].chart}
    assert list(charts)[:4] == ["return", "task", "return in Pong", "return in Breakout"]
    shown = {tag for tag in TAGS if any(re.match(regex, tag) for regex in charts["return in Pong"])}
    assert shown == {"game/Pong/return", "task/change"}
    modes = game_names(config.env, {"games": ("Breakout",), "modes": (0, 4), "difficulties": (1,)})
    assert modes == ("Breakout-mode-0-difficulty-1", "Breakout-mode-4-difficulty-1")
    assert game_names("perennial/SlipperyAnt-v0", {}) == game_names("Pendulum-v1", {}) == ()
    many = events.charts_of([f"Game{k}" for k in range(20)])
    assert many["return by game"] == ("game/[^/]+/return$", "task/change$")
    assert len(many) == len(events.CHARTS) + 1


def test_episodes_by_game_and_the_height_of_marks_go_on_after_a_resume() -> None:
    def end(episodes: Episodes, ret: float, task: int) -> None:
        infos = {"final_info": {"task": np.array([task])}}
        episodes.end(0, np.array([[ret]]), np.array([True]), infos)
        episodes.rollout(np.array([[ret]]))

    episodes = Episodes(1, 1)
    assert episodes.latest(0) is None
    for ret, task, latest, high in (
        (-20.0, 0, (0, -20.0), 0.0),
        (-10.0, 0, (0, -15.0), 0.0),
        (300.0, 1, (1, 300.0), 300.0),
        (-5.0, 0, (1, 300.0), 300.0),  # a lane that ended its old game late
        (100.0, 1, (1, 200.0), 300.0),
    ):
        end(episodes, ret, task)
        assert (episodes.latest(0), episodes.extremes[0]) == (latest, (-20.0, high))
        episodes.take(0)
        resumed = Episodes(1, 1)
        resumed.load_state(0, episodes.state(0))
        episodes = resumed


def test_hparams_are_few_flat_and_alike_in_all_runs() -> None:
    other = PPOConfig(
        plasticity=("cbp",), env_args={"friction": (0.02, 2.0)}, target_kl=0.01, max_grad_norm=None,
        norm_obs=True, preset="nature-slippery-ant-cbp",
    )  # fmt: skip
    one, two = hparams_of(CONFIG, 0), hparams_of(other, 1)
    assert list(one) == list(two)
    assert len(one) <= 30
    assert [type(v) is str for v in one.values()] == [type(v) is str for v in two.values()]
    assert two["env_args"] == "friction=0.02,2"
    assert one["env_args"] == "none"
    assert (one["target_kl"], two["target_kl"]) == ("none", "0.01")


@pytest.mark.parametrize("checkpoint", [0, 4000, 9000])
def test_resumed_run_equals_the_unbroken_one(tmp_path: Path, checkpoint: int) -> None:
    whole = SeedRecorder(seed_dir(tmp_path, "seed-0"), CONFIG, None)
    play(whole, 0, 20_000)
    whole.close()
    broken = SeedRecorder(seed_dir(tmp_path, "seed-1"), CONFIG, None)
    play(broken, 0, 13_000)  # nine rollouts and more past the checkpoint; no close, as after a kill
    broken.flush()
    with open(broken.seed_dir / "episodes.csv", "a") as file:
        file.write("13250,2,1.2")  # a row torn by the kill
    resumed = SeedRecorder(broken.seed_dir, CONFIG, resume_step=checkpoint)
    play(resumed, checkpoint, 20_000)
    resumed.close()
    for tag in ("rollout/ep_rew_mean", "plasticity/policy/dormant_fraction"):
        assert points(resumed.seed_dir, tag) == points(whole.seed_dir, tag)
    assert rows(resumed.seed_dir) == rows(whole.seed_dir)
    assert "custom_scalars__config__" in read(resumed.seed_dir).Tags()["tensors"]
    assert not list(resumed.seed_dir.glob("*.tmp"))


def test_killed_writer_loses_nothing_it_reported(tmp_path: Path) -> None:
    script = f"""
        import itertools
        from pathlib import Path
        from perennial.agents.config import PPOConfig
        from perennial.agents.record import SeedRecorder
        recorder = SeedRecorder(Path({str(seed_dir(tmp_path))!r}), PPOConfig(), None)
        for k in itertools.count(1):
            recorder.episode(k, 0, k / 3, 1)
            recorder.scalars(k, {{"rollout/ep_rew_mean": k}})
            print(k, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(500):
        reported = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    reported = int(([str(reported), *process.stdout.read().split()])[-1])
    process.wait()
    process.stdout.close()
    folder = tmp_path / "seed-3"
    found = points(folder, "rollout/ep_rew_mean")
    assert len(found) >= reported
    assert found == [(k, float(k)) for k in range(1, len(found) + 1)]
    resumed = SeedRecorder(folder, PPOConfig(), resume_step=300)
    resumed.scalars(301, {"rollout/ep_rew_mean": -1.0})
    resumed.close()
    assert points(folder, "rollout/ep_rew_mean")[299:] == [(300, 300.0), (301, -1.0)]
    assert rows(folder)[-1] == ["300", "0", repr(300 / 3), "1"]


def test_new_event_file_sorts_last_even_if_the_clock_went_back(tmp_path: Path) -> None:
    future = tmp_path / "events.out.tfevents.9000000000.host.1"
    future.write_bytes(b"")
    files = [events.EventFile(tmp_path, purge_step=None) for _ in range(3)]
    names = [file.path.name for file in files]
    assert sorted([future.name, *names]) == [future.name, *names]
    for file in files:
        file.close()


def test_rows_survive_when_cutting_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = SeedRecorder(seed_dir(tmp_path), CONFIG, None)
    play(recorder, 0, 5000)
    recorder.close()
    before = (recorder.seed_dir / "episodes.csv").read_bytes()
    (recorder.seed_dir / "episodes.csv.tmp").mkdir()  # stands in the way of the new file
    with pytest.raises(OSError, match=r"episodes\.csv\.tmp"):
        SeedRecorder(recorder.seed_dir, CONFIG, resume_step=2000)
    assert (recorder.seed_dir / "episodes.csv").read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_names_the_file(tmp_path: Path) -> None:
    recorder = SeedRecorder(seed_dir(tmp_path), CONFIG, None)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recorder._csv.fileno())
    recorder.episode(10, 0, 1.0, 10)
    with pytest.raises(OSError, match=r"No space left.*episodes\.csv"):
        recorder.flush()
    os.dup2(full, recorder._events._file.fileno())
    with pytest.raises(OSError, match=r"No space left.*tfevents"):
        recorder._events.write(10, events.scalars({"task/index": 0}))
    harmless = os.open(os.devnull, os.O_WRONLY)  # so that closing can flush
    for file in (recorder._csv, recorder._events._file):
        os.dup2(harmless, file.fileno())
    os.close(full)
    os.close(harmless)


def test_thinning_keeps_a_long_run_small(tmp_path: Path) -> None:
    steps = 100_000_000
    config = PPOConfig(steps=steps)
    recorder = SeedRecorder(seed_dir(tmp_path), config, None)
    ends = range(config.rollout, steps + 1, config.rollout)
    due = [end for end in ends if recorder.due(end)]
    measured = [end for end in ends if recorder.metrics_due(end)]
    assert 5_000 < len(due) <= 10_000
    assert 1_000 < len(measured) <= 2_000
    before = recorder._events.path.stat().st_size
    ordinary = {f"train/some_quantity_{k}": 0.1 for k in range(25)}
    metrics = {f"plasticity/policy/{k}/some_long_metric_name": 0.1 for k in range(80)}
    recorder.scalars(due[0], ordinary)
    middle = recorder._events.path.stat().st_size
    recorder.scalars(due[1], metrics)
    end = recorder._events.path.stat().st_size
    recorder.close()
    assert (middle - before) * len(due) + (end - middle) * len(measured) < 20e6
    short = SeedRecorder(seed_dir(tmp_path, "seed-1"), PPOConfig(steps=1_000_000), None)
    assert all(short.due(end) for end in range(2048, 1_000_000, 2048))
    short.close()


def test_configuration_in_the_event_file_is_the_configuration(tmp_path: Path) -> None:
    SeedRecorder(seed_dir(tmp_path), CONFIG, None).close()
    tensor = read(tmp_path / "seed-3").Tensors("config/text_summary")[0].tensor_proto
    assert from_json(json.loads(tensor.string_val[0])) == CONFIG


def test_recording_imports_neither_torch_nor_tensorflow() -> None:
    code = "import perennial.agents.record, sys; print({'torch', 'tensorflow'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
