"""What all tests share: the markers, a daemon for a module, and the programs from Debian that some of them need.

Inside CI a missing program or missing rights fail the test; elsewhere they skip it, with the reason.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from nbdthin import host
from tests.clients.daemon import Daemon, running
from tests.compiled import skip_what_replaces_compiled_code

PACKAGES = Path(__file__).parent / "packages.txt"  # tools/test installs from it

# Debian keeps mkfs, losetup and nbd-client where a user's PATH does not look.
os.environ["PATH"] += ":/usr/sbin:/sbin"


def pytest_configure(config: pytest.Config) -> None:
    # What tests attach is no business of the machine's own attachments, and no cleanup of theirs.
    run_directory = tempfile.TemporaryDirectory(prefix="nbdthin-run.")
    os.environ["NBDTHIN_RUN"] = run_directory.name
    config.add_cleanup(run_directory.cleanup)
    config.addinivalue_line("markers", "slow: takes longer than ten seconds; left out by tools/test --fast")
    config.addinivalue_line("markers", "interpreted(reason): cannot be where the data path is compiled; left out there")
    config.addinivalue_line("markers", "guest: boots a guest in QEMU; left out by tools/test --fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones last: what is wrong with the rest is then known sooner."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if host.is_compiled():
        skip_what_replaces_compiled_code(items)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for all tests of a module."""
    with running(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


class Ballast:
    """Takes all space that the file system of a directory has left, and gives it back."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "ballast"

    def inflate(self, *, leave: int = 0) -> None:
        with open(self._path, "ab", buffering=0) as file:
            for size in (1 << 20, 4096):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
        if leave:
            os.truncate(self._path, self._path.stat().st_size - leave)

    def deflate(self) -> None:
        self._path.unlink()


def need(program: str) -> str:
    """The path of a program that packages.txt lists."""
    packages = dict(line.split()[:2] for line in PACKAGES.read_text().splitlines() if line and line[0] != "#")
    package = packages[program]
    path = shutil.which(program)
    return path if path else missing(f"{program} is missing (apt-get install {package})")


def need_root() -> None:
    if os.geteuid() != 0:
        missing("only root can attach loop devices and mount")


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
