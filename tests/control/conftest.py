"""A real daemon, started as a user starts it, and its control socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import nbdthin
from tests.clients.daemon import Daemon, running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests of a module, which have names of their own in it."""
    with running(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture
def pool(daemon: Daemon) -> Iterator[nbdthin.Client]:
    """Its pool, empty."""
    with daemon.connect() as pool:
        pool.remove(*(row.name for row in pool.list()))
        yield pool
