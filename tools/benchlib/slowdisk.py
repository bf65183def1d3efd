"""A disk whose sync takes longer: a shim around the C library's fdatasync and fsync, the same for every server.

The disk of a virtual machine often confirms a sync in 0.1 ms, less than a server spends on the request around it. What
a server makes of syncs shows where they cost something: 1 ms is an SSD without a capacitor. The shim waits so long,
then calls the real one. As with a disk of one queue, one flush is under way at a time, and who asks meanwhile shares
the next one (Linux, block/blk-flush.c): to sync in many threads at once does not multiply the disk. It is compiled when
it is needed.
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
#include <pthread.h>
#include <unistd.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended = PTHREAD_COND_INITIALIZER;
static unsigned long flushes, done;
static void flush(void) {{
    pthread_mutex_lock(&lock);
    for (unsigned long next = flushes + 1; done < next;)
        if (done < flushes)
            pthread_cond_wait(&ended, &lock);
        else {{
            flushes++;
            pthread_mutex_unlock(&lock);
            usleep({DELAY});
            pthread_mutex_lock(&lock);
            done = flushes;
            pthread_cond_broadcast(&ended);
        }}
    pthread_mutex_unlock(&lock);
}}
#define SLOW(name) int name(int fd) {{ flush(); return ((int (*)(int))dlsym(RTLD_NEXT, #name))(fd); }}
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
            ["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source), "-ldl"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise BenchError(f"cc: {done.stderr.strip().splitlines()[0]}")
    return {"LD_PRELOAD": str(library)}
