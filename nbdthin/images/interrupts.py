"""Ctrl-C while a file system is mounted, at moments that lose nothing.

KeyboardInterrupt may come between a system call and the assignment of its result: a descriptor is lost then, and the
mount that it is in cannot be undone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held() -> Iterator[Callable[[], None]]:
    """Inside, KeyboardInterrupt comes where what is yielded is called, and at the end; nowhere else."""
    if (
        threading.current_thread() is not threading.main_thread()  # no other thread gets one
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # who has its own knows why
    ):
        yield lambda: None
        return
    came = threading.Event()

    def raise_if_came() -> None:
        if came.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield raise_if_came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_if_came()
