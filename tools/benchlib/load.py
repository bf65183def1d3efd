"""One process that opens the pool at argv[1], as the daemon does, and prints what that took: see trials.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from nbdthin.pool.pool import Pool


def _status(key: str) -> int:
    """Bytes, of this program alone: what getrusage tells counts the process that it was forked from."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise AssertionError(key)


def main(path: str) -> None:
    started = time.monotonic()
    pool = Pool.open(path, autocommit=False)
    loaded = time.monotonic()
    peak = _status("VmHWM")
    pool.info()
    informed = time.monotonic()
    pool.list()
    listed = time.monotonic()
    figures = {
        "blocks": pool.allocator.used,
        "load_seconds": loaded - started,
        "peak_bytes": peak,
        "info_seconds": informed - loaded,
        "list_seconds": listed - informed,
    }
    pool.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
