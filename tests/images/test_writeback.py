"""Writing out what is unpacked, beside unpacking more."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from nbdthin.errors import NoSpace
from nbdthin.images import writeback
from nbdthin.units import MiB


def test_what_is_unpacked_is_written_out_beside_it_a_good_deal_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = writeback.sync, threading.Semaphore(0)

    def sync(directory: int, root: Path) -> None:
        real(directory, root)
        assert root == tmp_path and threading.current_thread() is not threading.main_thread()
        synced.release()

    monkeypatch.setattr(writeback, "sync", sync)
    with writeback.behind(tmp_path) as put:
        put(31 * MiB)
        assert not synced.acquire(timeout=0.05)
        put(1 * MiB)
        synced.acquire()
        put(31 * MiB)
    assert not synced.acquire(blocking=False), "the end is left to who freezes"


def test_what_could_not_be_written_out_is_told_with_more_of_it_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(directory: int, root: Path) -> None:
        raise NoSpace("lost")

    monkeypatch.setattr(writeback, "sync", sync)
    with pytest.raises(NoSpace, match="lost"), writeback.behind(tmp_path) as put:
        put(32 * MiB)
    with pytest.raises(NoSpace, match="lost"), writeback.behind(tmp_path) as put:
        while True:
            put(32 * MiB)
