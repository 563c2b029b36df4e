"""Runs a process that says what it is at, and ends it where it hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.step_rows import WHOLE, Case

_POLL = 0.5  # seconds


@dataclass
class Progress:
    """What a process is at, in a file that another one reads.

    Args:
        path: of the file.
        case: what is measured.
    """

    path: Path
    case: Case | None = field(default=None)

    def begin(self, case: Case) -> None:
        """A model is built now."""
        self.case = case
        self.tell(WHOLE)

    def tell(self, variant: str) -> None:
        """A variant runs now."""
        assert self.case is not None  # `begin` comes first
        text = json.dumps([self.case.model, self.case.compiled, variant])
        beside = self.path.with_suffix(".new")
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path)


def supervise(
    command: Sequence[str], path: Path, seconds: float, total: float
) -> Iterator[tuple[Case, str, str]]:
    """Runs a command until it ends well, again after every time that it does not.

    Args:
        command: tells its `Progress` in the file.
        path: of the file.
        seconds: without progress after which it hangs and is ended.
        total: seconds after which it is not run again.

    Yields:
        What it was at when it hung or broke, and why; whoever takes that must see to it that the
        next run leaves it out.

    Raises:
        RuntimeError: it ended badly before it had begun, or twice at the same.
    """
    end = time.monotonic() + total
    last: tuple[Case, str] | None = None
    while True:
        path.unlink(missing_ok=True)
        why = _run(command, path, seconds)
        if why is None:
            return
        at = _read(path)
        if at is None or at == last or time.monotonic() > end:
            raise RuntimeError(f"Expected the benchmark to go on, but {why}, at {at}.")
        last = at
        yield (*at, why)


def _run(command: Sequence[str], path: Path, seconds: float) -> str | None:
    """Why the command ended badly, or `None`."""
    process = subprocess.Popen(command, start_new_session=True)
    changed, seen = time.monotonic(), None
    try:
        while (code := process.poll()) is None:
            time.sleep(_POLL)
            stamp = path.stat().st_mtime_ns if path.exists() else None
            if stamp != seen:
                changed, seen = time.monotonic(), stamp
            elif time.monotonic() - changed > seconds:
                return f"there was no progress in {seconds:g} seconds"
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that compile for it, too
            process.wait()
    return None if code == 0 else f"the process ended with code {code}"


def _read(path: Path) -> tuple[Case, str] | None:
    try:
        model, compiled, variant = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Case(model, compiled), variant
