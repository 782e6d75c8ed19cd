"""A folder that one process writes: an advisory lock that ends with its holder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path


class FolderLock:
    """Holds `folder/.lock` until `release` or the end of the process (kill -9 included).

    Raises:
        ValueError: another process holds it; names its pid and host.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ".lock"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 200).decode(errors="replace").strip() or "another process"
            os.close(self._fd)
            raise ValueError(
                f"{folder} is being written by {holder}: wait for it, or choose another --run-dir"
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Let others write the folder."""
        os.close(self._fd)
