"""One process of a run: trains a group of seeds and talks to its parent in JSON lines.

Started by `run.py` as `python -m perennial.agents.worker`; the first line on standard input says
what to do, a later line `stop` asks for a checkpoint and an end. When the parent dies, standard
input closes and the worker ends at once, so a killed run leaves no second writer behind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

_STOP = threading.Event()


def main() -> int:
    """Run the job on standard input; 0 done or stopped, 1 failed, 2 a mistake of the user's."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(
        sys.stderr.fileno(), sys.stdout.fileno()
    )  # prints of libraries must not mix with messages
    job = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: _STOP.set())
    threading.Thread(target=_listen, args=(sys.stdin,), daemon=True).start()
    try:
        return _train(job, messages)
    except BrokenPipeError:
        os._exit(1)  # the parent is gone


def _listen(commands: TextIO) -> None:
    for line in commands:
        if line.strip() == "stop":
            _STOP.set()
    os._exit(1)  # end of file: the parent died


def _train(job: dict[str, Any], messages: TextIO) -> int:
    def report(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    from perennial.agents.lock import FolderLock

    run_dir, seeds = Path(job["run_dir"]), tuple(job["seeds"])
    try:
        locks = [FolderLock(run_dir / f"seed-{s}") for s in seeds]
    except ValueError as e:
        report({"error": str(e), "usage": True})
        return 2
    try:
        import torch

        # Also for threads started later: each network trains on one core (see PPO).
        torch.set_num_threads(1)
        from perennial.agents.config import UsageError, from_json
        from perennial.agents.loop import TrainingError, train_group

        try:
            seconds = train_group(
                from_json(job["config"]),
                seeds,
                run_dir,
                device=job["device"],
                threads=job["threads"],
                report=report,
                stopping=_STOP.is_set,
            )
        except UsageError as e:
            report({"error": f"{e}".replace("\n", " "), "usage": True})
            return 2
        except (TrainingError, OSError) as e:
            _keep_traceback(run_dir / f"seed-{seeds[0]}")
            report({"error": f"{e}".replace("\n", " "), "usage": False})
            return 1
        report({"seconds": seconds})
        return 0
    except Exception as e:
        path = _keep_traceback(run_dir / f"seed-{seeds[0]}")
        report(
            {
                "error": f"{type(e).__name__}: {e} (details in {path})".replace("\n", " "),
                "usage": False,
            }
        )
        return 1
    finally:
        for lock in locks:
            lock.release()


def _keep_traceback(seed_dir: Path) -> Path:
    path = seed_dir / "error.log"
    path.write_text(traceback.format_exc())
    return path


if __name__ == "__main__":
    sys.exit(main())
