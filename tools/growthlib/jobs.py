"""fio as a client that does one thing: to its end, or in the background until it is told to stop."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchlib.errors import BenchError

_PATIENCE = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Job:
    """One connection's work; `bounded` in bytes, else in seconds."""

    rw: str
    block: int
    depth: int
    size: int
    seconds: float | None = None
    extra: tuple[str, ...] = ()

    def command(self, uri: str) -> list[str]:
        timed = [] if self.seconds is None else ["--time_based", f"--runtime={round(1000 * self.seconds)}ms"]
        shape = [f"--rw={self.rw}", f"--bs={self.block}", f"--iodepth={self.depth}", f"--size={self.size}"]
        head = ["fio", "--name=growth", "--thread", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
        return [*head, *shape, *timed, *self.extra]


def run(uri: str, job: Job) -> float:
    """Bytes a second. Raises BenchError."""
    done = subprocess.run(job.command(uri), capture_output=True, text=True, timeout=_PATIENCE)
    return _rate(done.returncode, done.stdout, done.stderr)


def _rate(status: int, output: str, errors: str) -> float:
    """fio may talk before its JSON begins."""
    if status:
        said = (errors or output).strip().splitlines()
        raise BenchError(said[0] if said else f"fio ended with status {status}")
    report: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    side = report["read"] if report["read"]["total_ios"] else report["write"]
    if not side["total_ios"]:
        raise BenchError("fio did not get a single request through")
    return float(side["bw_bytes"])


@contextmanager
def beside(uri: str, job: Job) -> Iterator[None]:
    """`job`, whose `seconds` are more than it will get, goes on inside. Raises BenchError where it ended early."""
    command: Sequence[str] = job.command(uri)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield
            if process.poll() is not None:
                assert process.stderr is not None
                raise BenchError(f"the client beside ended: {process.stderr.read().strip()[:200]}")
        finally:
            process.kill()
