"""The daemons that the tests of real clients talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.daemon import Daemon, running


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests of a module, which then have volumes of their own in it."""
    with running(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One for a test that stops it, kills it or weighs its pool."""
    with running(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def volume(shared_daemon: Daemon, request: pytest.FixtureRequest) -> str:
    """The URI of a new volume of 256 MiB, named after the test."""
    name = "".join(letter if letter.isalnum() else "." for letter in request.node.name)
    return shared_daemon.create(name, "256 MiB")
