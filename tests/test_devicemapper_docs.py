"""What docs/devicemapper.md claims and no other test shows."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

import pytest

from nbdthin import devices
from nbdthin.units import MiB
from tests import rawclient
from tests.clients.daemon import Daemon, running
from tests.clients.hostmount import check_file_system, make_file_system
from tests.conftest import need, need_root
from tests.rawclient import ENOSPC
from tests.test_cli import said

DOCUMENT = (Path(__file__).parent.parent / "docs/devicemapper.md").read_text()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_mounted_file_system_on_a_full_pool_waits_for_space_and_goes_on(kind: str, tmp_path: Path) -> None:
    """Where Docker's XFS tried for ever, or shut down."""
    need_root()
    need("nbdfuse")
    daemon = Daemon(tmp_path, size=48 * MiB)
    daemon.config.write_text(daemon.config.read_text().replace("[server]", "auto_extend = false\n[server]"))
    data = os.urandom(64 * MiB)
    with contextlib.closing(daemon):
        daemon.start()
        make_file_system(daemon.create("v", 320 * MiB), kind)
        with daemon.connect() as pool, daemon.connect() as listening, devices.mounted(pool, "v") as directory:
            (directory / "before").write_text("there")

            def write() -> None:
                with (directory / "file").open("wb") as file:
                    file.write(data)
                    os.fsync(file.fileno())

            writing = threading.Thread(target=write)
            events = listening.events()
            assert next(events).kind == "listening"
            writing.start()
            while next(events).kind != "no_space":
                pass
            assert writing.is_alive()
            assert (directory / "before").read_text() == "there"
            pool.extend(128 * MiB)
            writing.join()
            assert (directory / "file").read_bytes() == data
        check_file_system(daemon.uri("v"), kind)
        with daemon.connect() as pool, devices.mounted(pool, "v") as directory:
            assert (directory / "file").read_bytes() == data


def test_every_field_of_docker_info_is_where_the_document_says(tmp_path: Path) -> None:
    rows = re.findall(r"^\| (.+) \| `(info|base ls)`: (.+) \|$", DOCUMENT, re.MULTILINE)
    assert rows
    with running(tmp_path) as daemon:
        daemon.create("gone", "1 MiB")
        client = rawclient.Client(daemon.socket, "gone")
        with daemon.connect() as pool:
            pool.remove("gone", deferred=True)
        info, (columns, *_) = said(daemon, "info"), said(daemon, "base", "ls").splitlines()
        client.close()
    for _, verb, fields in rows:
        for field in re.findall(r"\*([^*]+)\*", fields):
            there = field in columns.split() if verb == "base ls" else re.search(rf"^ *{field}: ", info, re.MULTILINE)
            assert there, f"{verb} says no {field!r}"


def test_what_a_pool_does_about_space_may_change_with_each_start(tmp_path: Path) -> None:
    """Docker refused to start when `dm.thinp_*` had changed."""
    daemon = Daemon(tmp_path, size=2 * MiB)
    text = daemon.config.read_text()

    def write_with(*lines: str) -> int:
        daemon.config.write_text(text.replace("[server]", "\n".join((*lines, 'no_space = "error"', "[server]"))))
        daemon.start()
        with contextlib.closing(rawclient.Client(daemon.socket, "v")) as client:
            error = client.write(0, b"x" * (4 * MiB))
        daemon.stop()
        return error

    with contextlib.closing(daemon):
        daemon.start()
        daemon.create("v", 8 * MiB)
        daemon.stop()
        assert write_with("auto_extend = false") == ENOSPC
        assert write_with("auto_extend = true", 'max_size = "3 MiB"') == ENOSPC
        assert write_with("auto_extend = true", 'max_size = "16 MiB"') == 0
