"""The daemons that the tests of images talk to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from tests.clients.daemon import Daemon, running


@pytest.fixture(scope="module", autouse=True)
def no_roots_left() -> Iterator[None]:
    """Where containers are mounted there is nothing in the end; what stays of it is one directory for each pool."""
    yield
    home = Path(f"{os.environ['NBDTHIN_RUN']}.containers")
    for directory in home.glob("*"):
        directory.rmdir()
    if home.exists():
        home.rmdir()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture
def daemon(served: Daemon) -> Iterator[Daemon]:
    """One whose pool is empty. Whatever a test leaves attached fails it."""
    with served.connect() as pool:
        pool.remove(*(row.name for row in pool.list()))
    yield served
    assert devices.attached() == []
    assert devices.cleanup() == []


@pytest.fixture
def pool(daemon: Daemon) -> Iterator[nbdthin.Client]:
    with daemon.connect() as pool:
        yield pool
