"""One run of fio, the client that is the same for every server, and its report as numbers."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from .errors import BenchError
from .images import WRITTEN_BYTE
from .works import Work

_CONNECT_AND_GO = 60.0  # seconds beyond the job's own after which a server counts as hung


@dataclass(frozen=True, slots=True)
class Job:
    """What fio reports of one job, or of several as one.

    `busy` is fio's own CPU time over its run time: near 1, the client is the limit.
    """

    requests: int
    seconds: float
    p99: float  # seconds
    busy: float


def measure(uri: str, work: Work, size: int, seconds: float, requests: int | None, seed: int) -> Job:
    """One measured run: for `seconds`, or, where `requests` is given, so many of them, each at another place."""
    amount = (
        ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--norandommap"]
        if requests is None
        else [f"--io_size={requests * work.block}"]
    )
    pattern = [f"--buffer_pattern={WRITTEN_BYTE:#x}"] if work.writes else []
    shape = [f"--rw={work.rw}", f"--bs={work.block}", f"--iodepth={work.depth}", f"--randseed={seed}"]
    many = [f"--numjobs={work.writers}", "--group_reporting"] if work.writers > 1 else []
    flush = ["--fsync=1"] if work.flushes else []
    return _run(uri, [*shape, *amount, *pattern, *many, *flush, f"--size={size}"], seconds)


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


def _run(uri: str, arguments: list[str], seconds: float) -> Job:
    argv = ["fio", "--name=bench", "--thread", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + _CONNECT_AND_GO)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"fio did not end within {seconds + _CONNECT_AND_GO:.0f} s: the server hangs") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BenchError(said[0] if said else f"fio ended with status {done.returncode}")
    return _parse(done.stdout)


def _parse(output: str) -> Job:
    """fio may talk before its JSON begins."""
    report: dict[str, Any] = json.loads(output[output.index("{") :])
    job = report["jobs"][0]
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    if not side["total_ios"]:
        raise BenchError("fio did not get a single request through")
    slow = job["sync"]["lat_ns"] if job["sync"]["total_ios"] else side["clat_ns"]  # of the flush, where there are any
    return Job(
        requests=int(side["total_ios"]),
        seconds=float(side["runtime"]) / 1000,
        p99=float(slow["percentile"]["99.000000"]) / 1e9,
        busy=(float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100,
    )
