"""One run of fio, the client that is the same for every server, and its report as numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BenchError
from .images import WRITTEN_BYTE
from .works import Load

READS_OF_MIX = 70  # percent
_CONNECT_AND_GO = 60.0  # seconds beyond the job's own after which a server counts as hung


@dataclass(frozen=True, slots=True)
class Job:
    """What fio reports of one job, or of several as one.

    `p99` is of the flushes where there are any, and else of reads or writes, whichever is worse. `busy` is fio's own
    CPU time over its run time, of one connection on average: near 1, the client is the limit.
    """

    requests: int
    seconds: float
    p99: float  # seconds
    busy: float


def measure(uri: str, load: Load, size: int, seconds: float, requests: int | None, seed: int) -> Job:
    """One measured run: for `seconds`, or, where `requests` is given, so many of them, each at another place.

    Of a cold image each place is read once, and the run ends early where there are no more.
    """
    runtime = f"--runtime={round(seconds * 1000)}ms"
    if requests is not None:
        amount = [f"--io_size={requests * load.block}"]
    else:
        amount = [runtime] if load.cold else ["--time_based", runtime, "--norandommap"]
    pattern = [f"--buffer_pattern={WRITTEN_BYTE:#x}"] if load.writes else []
    shape = [f"--rw={load.rw}", f"--bs={load.block}", f"--iodepth={load.depth}", f"--randseed={seed}"]
    mix = [f"--rwmixread={READS_OF_MIX}"] if load.rw == "randrw" else []
    many = [f"--numjobs={load.connections}", "--group_reporting"] if load.connections > 1 else []
    flush = ["--fsync=1"] if load.flushes else []
    return _run(uri, [*shape, *amount, *pattern, *mix, *many, *flush, f"--size={size}"], seconds)


def verify(uri: str, size: int, amount: int) -> None:
    """Random writes of 4 to 64 KiB at depth 32, a checksum in each; then all are read back on the same connection.

    Raises BenchError when what comes back is not what was last written there.
    """
    shape = [
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ]
    _run(uri, [*shape, f"--size={size}", f"--io_size={amount}"], 0)


def command(uri: str, arguments: Sequence[str]) -> list[str]:
    return ["fio", "--name=bench", "--thread", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", *arguments]


def report(uri: str, arguments: Sequence[str], patience: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What it says of its one job, and of those sides of it, read and write, that got a request through: at least one.

    Raises BenchError, also when it has not ended after `patience` seconds.
    """
    try:
        done = subprocess.run(command(uri, arguments), capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"fio did not end within {patience:.0f} s: the server hangs") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BenchError(said[0] if said else f"fio ended with status {done.returncode}")
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]  # it may talk before that
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise BenchError("fio did not get a single request through")
    return job, sides


def _run(uri: str, arguments: Sequence[str], seconds: float) -> Job:
    job, sides = report(uri, arguments, seconds + _CONNECT_AND_GO)
    slow = [job["sync"]["lat_ns"]] if job["sync"]["total_ios"] else [side["clat_ns"] for side in sides]
    return Job(
        requests=sum(int(side["total_ios"]) for side in sides),
        seconds=max(float(side["runtime"]) for side in sides) / 1000,
        p99=max(float(each["percentile"]["99.000000"]) for each in slow) / 1e9,
        busy=(float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100,
    )
