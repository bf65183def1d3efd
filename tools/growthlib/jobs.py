"""fio as a client that does one thing: to its end, or in the background until it is told to stop."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchlib import fio
from benchlib.errors import BenchError

_PATIENCE = 120.0  # seconds
_GOODBYE = 10.0  # seconds for one that is told to end


@dataclass(frozen=True, slots=True)
class Job:
    """One connection's work; `bounded` in bytes, else in seconds."""

    rw: str
    block: int
    depth: int
    size: int
    seconds: float | None = None
    extra: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        timed = [] if self.seconds is None else ["--time_based", f"--runtime={round(1000 * self.seconds)}ms"]
        shape = [f"--rw={self.rw}", f"--bs={self.block}", f"--iodepth={self.depth}", f"--size={self.size}"]
        return [*shape, *timed, *self.extra]


def run(uri: str, job: Job) -> float:
    """Bytes a second. Raises BenchError."""
    _, sides = fio.report(uri, job.arguments, _PATIENCE)
    return float(sides[0]["bw_bytes"])


@contextmanager
def beside(uri: str, job: Job) -> Iterator[None]:
    """`job`, whose `seconds` are more than it will get, goes on inside. Raises BenchError where it ended early."""
    command = fio.command(uri, job.arguments)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield
            if process.poll() is not None:
                assert process.stderr is not None
                raise BenchError(f"the client beside ended: {process.stderr.read().strip()[:200]}")
        finally:
            process.terminate()  # it says goodbye: nbdkit 1.32 ends with a client that is killed while it reads
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GOODBYE)
            process.kill()
