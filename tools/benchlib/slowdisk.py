"""A disk whose sync takes longer: a shim around the C library's fdatasync and fsync, the same for every server.

The disk of a virtual machine often confirms a sync in 0.1 ms, less than a server spends on the request around it. What
a server makes of syncs shows where they cost something: 1 ms is an SSD without a capacitor. The shim waits so long,
then calls the real one. It is compiled when it is needed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .errors import BenchError

DELAY = 1000  # microseconds

_SOURCE = f"""\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#define SLOW(name) int name(int fd) {{ usleep({DELAY}); return ((int (*)(int))dlsym(RTLD_NEXT, #name))(fd); }}
SLOW(fsync)
SLOW(fdatasync)
"""


def missing() -> str | None:
    """Why there is no such disk; None when there is."""
    return None if shutil.which("cc") else "needs a C compiler (apt-get install gcc libc6-dev)"


def environment(directory: Path) -> dict[str, str]:
    """What a server's process must have in its environment."""
    library = directory / "slowdisk.so"
    if not library.exists():
        source = directory / "slowdisk.c"
        source.write_text(_SOURCE)
        done = subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], capture_output=True, text=True
        )
        if done.returncode:
            raise BenchError(f"cc: {done.stderr.strip().splitlines()[0]}")
    return {"LD_PRELOAD": str(library)}
