"""Where a server's time goes: an extra run of each cell under perf, which counts for nothing else.

Samples of the server's processes by the processor's clock, 5,000 a second. Each belongs to one part, by its chain of
calls: in the kernel by what the system call is for, outside by whose code it is. Waking those who wait for what is sent
is within sending, and told besides.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from .errors import BenchError
from .process import family, last_line, output_of

WAKING: Final = "(waking)"
OTHER: Final = "other kernel"
INTERPRETER: Final = "interpreter"
OWN: Final = "own code"
# What a chain of calls in the kernel has one of, by the beginning of its name; the first that fits.
_CALLS: Final = {
    "sync": ("do_fsync", "sync_file_range", "ksys_sync_file_range", "__x64_sys_sync_file_range"),
    "receive": ("sock_recvmsg", "sock_read_iter", "__sys_recvfrom"),
    "send": ("sock_sendmsg", "__sock_sendmsg", "sock_write_iter", "__sys_sendto", "____sys_sendmsg", "do_sendfile"),
    "read file": ("vfs_read", "vfs_iter_read", "ksys_pread64", "do_preadv"),
    "write file": ("vfs_write", "vfs_iter_write", "ksys_pwrite64", "do_pwritev"),
    "wait": (
        "do_epoll",
        "ep_",
        "do_futex",
        "__x64_sys_futex",
        "__x64_sys_sched_yield",
        "do_sched_yield",
        "do_sys_poll",
    ),
}
_PARTS: Final = (*_CALLS, OTHER, INTERPRETER, OWN)
COLUMNS: Final = tuple(each for part in _PARTS for each in ((part, WAKING) if part == "send" else (part,)))
_WAKING: Final = ("sock_def_readable", "try_to_wake_up", "__wake_up")
_RATE: Final = 5000  # samples a second of each thread that runs
_FRAME: Final = re.compile(r"\s*[0-9a-f]+ (?P<symbol>.*) \((?P<object>[^()]*)\)")
_PYTHON: Final = re.compile(r"(lib)?python3[.\d]*(\.so[.\d]*)?")


@contextmanager
def recording(pid: int, samples: Counter[str]) -> Iterator[None]:
    """Count the samples of a process, of its children and of those to come, by part. Raises BenchError."""
    pids = ",".join(str(process.pid) for process in family(pid))
    with tempfile.TemporaryDirectory(prefix="nbench-perf-") as place:
        data = Path(place) / "data"
        control, to_control = os.pipe()
        from_ready, ready = os.pipe()
        command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(_RATE), "-g", "-p", pids, "-o", str(data)]
        perf = subprocess.Popen(
            [*command, "-D", "-1", f"--control=fd:{control},{ready}"],
            pass_fds=(control, ready),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        os.close(control)
        os.close(ready)
        try:
            with suppress(BrokenPipeError):
                os.write(to_control, b"enable\n")
            if began := bool(os.read(from_ready, 16)):
                yield
        finally:
            perf.send_signal(signal.SIGINT)  # which it takes for the end of its work
            _, said = perf.communicate()
            os.close(to_control)
            os.close(from_ready)
        if not began:
            raise BenchError(f"perf: {last_line(said)}")
        samples.update(parts(output_of(["perf", "script", "-i", str(data), "-F", "ip,sym,dso"])))


def parts(script: str) -> Counter[str]:
    """Samples by part, of what `perf script -F ip,sym,dso` prints: chains of calls, the innermost first."""
    found: Counter[str] = Counter()
    for chain in script.split("\n\n"):
        frames = [(match["symbol"], match["object"]) for line in chain.splitlines() if (match := _FRAME.match(line))]
        if not frames:
            continue
        kernel = [symbol for symbol, where in frames if where.startswith("[") and where not in ("[unknown]", "[vdso]")]
        if not kernel:
            python = _PYTHON.fullmatch(Path(frames[0][1]).name)
            found[INTERPRETER if python else OWN] += 1
            continue
        part = next((part for part, names in _CALLS.items() if _has(kernel, names)), OTHER)
        found[part] += 1
        found[WAKING] += part == "send" and _has(kernel, _WAKING)
    return found


def _has(chain: Sequence[str], beginnings: tuple[str, ...]) -> bool:
    return any(symbol.startswith(beginnings) for symbol in chain)


def shares(samples: Counter[str]) -> dict[str, float]:
    """Of all samples, in the order of COLUMNS; WAKING counts within "send". Empty where there is none."""
    total = sum(samples[part] for part in _PARTS)
    return {part: samples[part] / total for part in COLUMNS} if total else {}
