"""TensorBoard event files: many scalars in one event, the page "Continual", hparams.

    file = EventFile(folder, purge_step=None)
    file.write(2048, scalars({"rollout/ep_rew_mean": 12.0, "task/index": 0}))

Events are written in the caller's thread and handed to the system at once, so a killed run loses
none. tensorboard's own writer keeps a thread and a queue, and asks for tensorflow.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

# Title -> regular expressions, matched from a tag's start. TensorBoard asks every run for every
# chart, so they are few.
_NET = "plasticity/[^/]+"
CHARTS: dict[str, tuple[str, ...]] = {
    "return": ("rollout/ep_rew_mean$", "task/return$", "task/change$"),
    "task": ("task/index$",),
    "task parameters": ("task/(?!index$|return$|change$)",),
    "dormant units": (f"{_NET}/dormant_fraction$",),
    "dormant units by layer": (f"{_NET}/[^/]+/dormant_fraction$",),
    "dead units": (f"{_NET}/dead_fraction$",),
    "effective and approximate rank": (f"{_NET}/(effective|approximate)_rank$",),
    "stable rank": (f"{_NET}/stable_rank$",),
    "weight magnitude": (f"{_NET}/weight_magnitude$",),
    "weight norm": (f"{_NET}/weight_norm$",),
    "gradient norm": (f"{_NET}/gradient_norm$",),
    "units reset": ("intervention/.*/units_reset$",),
}
_GAMES = 12  # with more games than these, one chart shows them all
# What the hparams table shows beside the options: tags, so that it holds the latest values.
HPARAM_METRICS = (
    "rollout/ep_rew_mean",
    "task/return",
    "plasticity/policy/dormant_fraction",
    "plasticity/value/dormant_fraction",
    "plasticity/policy/effective_rank",
    "plasticity/policy/weight_magnitude",
)


class EventFile:
    """One event file in a run's folder, which sorts after those that are there.

    Args:
        folder: where the file is made.
        purge_step: points at this step or later, in older files, no longer count (a resumed run).

    Raises:
        OSError: the disk refuses; names the file.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        # TensorBoard reads files in the order of their names: later than any, whatever time it is.
        stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        stamp = max([int(time.time()), *(int(s) + 1 for s in stamps if s.isdigit())])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._file = open(self.path, "xb")
        self._writer = RecordWriter(self._file)
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._put(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, summary: Summary) -> None:
        """Add one event and hand it to the system."""
        self._put(Event(wall_time=time.time(), step=step, summary=summary))

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def _put(self, event: Event) -> None:
        try:
            self._writer.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def scalars(values: Mapping[str, float]) -> Summary:
    """All of {tag: value} in one summary."""
    return Summary(value=[Summary.Value(tag=t, simple_value=float(v)) for t, v in values.items()])


def charts_of(games: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """`CHARTS`, and after the task one of each game: their points are of different sizes."""
    rows = [(f"return in {game}", (f"game/{re.escape(game)}/return$",)) for game in games]
    if len(rows) > _GAMES:
        rows = [("return by game", ("game/[^/]+/return$",))]
    shown = {title: (*tags, "task/change$") for title, tags in rows}
    (first, tags), (second, tasks), *rest = CHARTS.items()
    return {first: tags, second: tasks, **shown, **dict(rest)}


def continual_page(games: Sequence[str] = ()) -> Summary:
    """The custom-scalars page "Continual": returns, task and correlates side by side."""
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
        for title, tags in charts_of(games).items()
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="Continual", chart=charts)])
    content = layout.SerializeToString()
    return _tensor("custom_scalars__config__", "custom_scalars", content, TensorShapeProto())


def config_text(record: Mapping[str, Any]) -> Summary:
    """The configuration for the text page."""
    markdown = "\n".join("    " + line for line in json.dumps(record, indent=2).splitlines())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    return _tensor("config/text_summary", "text", markdown.encode(), shape)


def hparams(options: Mapping[str, float | str]) -> tuple[Summary, Summary]:
    """The experiment and the session of the hparams table.

    Without tensorboard's third record: it says how a session ended, and would be untrue until then.
    """
    kinds = {True: api_pb2.DATA_TYPE_STRING, False: api_pb2.DATA_TYPE_FLOAT64}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=kinds[isinstance(value, str)])
            for name, value in options.items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in HPARAM_METRICS
        ],
    )
    session = plugin_data_pb2.SessionStartInfo()
    for name, value in options.items():
        if isinstance(value, str):
            session.hparams[name].string_value = value
        else:
            session.hparams[name].number_value = value
    return (
        _hparams("experiment", plugin_data_pb2.HParamsPluginData(experiment=experiment)),
        _hparams(
            "session_start_info", plugin_data_pb2.HParamsPluginData(session_start_info=session)
        ),
    )


def _hparams(name: str, data: plugin_data_pb2.HParamsPluginData) -> Summary:
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=f"_hparams_/{name}", metadata=metadata)])


def _tensor(tag: str, plugin: str, content: bytes, shape: TensorShapeProto) -> Summary:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=shape)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
