"""Moving pictures of what an agent does: `perennial evaluate DIR --video FILE.mp4`."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from perennial.agents.settings import UsageError


def check_video(path: str) -> Path:
    """The file's path; UsageError where the extra, the folder or the ending is missing."""
    file = Path(path)
    if file.suffix != ".mp4":
        raise UsageError(f"--video {path}: the file's name must end in .mp4")
    if not file.resolve().parent.is_dir():
        raise UsageError(f"--video {path}: its folder does not exist")
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UsageError("--video needs imageio-ffmpeg: pip install 'perennial-rl[video]'")
    return file


def draw_without_a_screen() -> None:
    """Where there is no screen, let MuJoCo draw by EGL or OSMesa: by itself it asks for one.

    To be called before mujoco is imported; a MUJOCO_GL that is set stays.
    """
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        for name in ("EGL", "OSMesa"):
            if ctypes.util.find_library(name):
                os.environ.setdefault("MUJOCO_GL", name.lower())
                return


class Video:
    """An mp4 (H.264) of pictures uint8 [H, W, 3] of one size; it appears under its name when whole.

    Args:
        path: the file; one that is there is replaced.
        fps: pictures per second.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, fps: float):
        self.path, self.fps = path, fps
        self.pictures = 0
        self._part = path.with_name(f".{path.stem}.part.mp4")
        self._writer: Any = None

    def add(self, picture: np.ndarray) -> None:
        """Append a picture; small ones (a console's) are shown twice as large."""
        if max(picture.shape[:2]) < 240:
            picture = picture.repeat(2, 0).repeat(2, 1)
        if self._writer is None:
            from imageio_ffmpeg import write_frames

            size = picture.shape[1], picture.shape[0]
            self._writer = write_frames(str(self._part), size, fps=self.fps, macro_block_size=2)
            self._writer.send(None)
        try:
            self._writer.send(np.ascontiguousarray(picture))
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"cannot write {self.path}: {reason}") from None
        self.pictures += 1

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._part.replace(self.path)

    def drop(self) -> None:
        """Leave nothing: playing failed."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._part.unlink(missing_ok=True)
