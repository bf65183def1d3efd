"""Two daemons, so that something can move from one to the other, and what tests of moving share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin import nbd
from nbdthin.pool.rows import Extent
from tests.clients.daemon import Daemon, nbdthin_command, running


class Stop(BaseException):
    """As Ctrl-C: no Exception."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("here")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("there")) as daemon:
        yield daemon


def _emptied(daemon: Daemon) -> Iterator[nbdthin.Client]:
    with daemon.connect() as pool:
        pool.remove(*(row.name for row in pool.list()))
        yield pool


@pytest.fixture
def pool(here: Daemon) -> Iterator[nbdthin.Client]:
    """That of `here`, empty."""
    yield from _emptied(here)


@pytest.fixture
def other(there: Daemon) -> Iterator[nbdthin.Client]:
    """That of `there`, empty."""
    yield from _emptied(there)


def content(pool: nbdthin.Client, name: str) -> bytes:
    with disk(pool, name) as each:
        return bytes(each.read(0, each.size))


def holes(pool: nbdthin.Client, name: str) -> list[Extent]:
    with disk(pool, name) as each:
        return list(each.extents())


def disk(pool: nbdthin.Client, name: str) -> nbd.Disk:
    uri = pool.show(name).uri
    assert uri is not None
    return nbd.connect(uri)


def names(pool: nbdthin.Client) -> list[str]:
    return [row.name for row in pool.list()]


def command(daemon: Daemon, *arguments: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run `nbdthin` as a user does. It must not show a traceback."""
    line = [*nbdthin_command(*arguments), "--socket", str(daemon.control)]
    done = subprocess.run(
        line, input=stdin, capture_output=True, stdin=None if stdin is not None else subprocess.DEVNULL
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def said(daemon: Daemon, *arguments: str | Path, stdin: bytes | None = None) -> bytes:
    """What it prints when it goes well."""
    done = command(daemon, *arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b""), done
    return done.stdout


def refused(daemon: Daemon, *arguments: str | Path, stdin: bytes | None = None) -> str:
    """The one line that it says when it does not."""
    done = command(daemon, *arguments, stdin=stdin)
    line = done.stderr.decode()
    assert done.returncode == 1 and line.count("\n") == 1 and line.startswith("nbdthin: "), done
    return line.removeprefix("nbdthin: ").rstrip()
