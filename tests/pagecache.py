"""What the page cache has of a file."""

from __future__ import annotations

import ctypes
import mmap
import os
import time

import numpy as np


def is_cached(fd: int, position: int, length: int) -> bool:
    """Any of it, by mincore(2). A read with RWF_NOWAIT asks the disk, which may be quick enough to answer it."""
    with mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=position) as mapped:
        pages = np.empty(length // mmap.PAGESIZE, np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)) == 0
        del view  # or it could not be closed
        return bool((pages & 1).any())


def forget(fd: int) -> None:
    """Have the kernel drop what it can of a file: what is just being read or moved between its lists stays at first."""
    for _ in range(20):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not is_cached(fd, 0, os.fstat(fd).st_size & -mmap.PAGESIZE):
            return
        time.sleep(0.005)
