"""`nbdthin scrub` and `verify = true`, as a user has them: the daemon, its command line, its clients."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin.units import KiB, MiB
from tests.clients.daemon import PATIENCE, Daemon, nbdthin_command
from tests.rawclient import EIO, READ, WRITE, Client

BLOCK, SUB = 64 * KiB, 4 * KiB


def scrub(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        nbdthin_command("scrub", "--socket", daemon.control, *arguments),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def settle(control: nbdthin.Client) -> None:
    """Scrub until everything has its checksums."""
    while True:
        *_, last = control.scrub(rate="1 GiB")
        assert last.finding is None and last.done == last.total
        if not last.unsummed:
            return


def flip(daemon: Daemon, data: bytes) -> int:
    """Flip a bit where `data` is in the data file."""
    path = daemon.pool / "data"
    with path.open("r+b") as file:
        position = file.read(16 * MiB).index(data)
        file.seek(position)
        file.write(bytes([data[0] ^ 1]))
    return position


@pytest.fixture(params=[False, True], ids=["plain", "verifying"])
def verifying(request: pytest.FixtureRequest) -> bool:
    wanted: bool = request.param
    return wanted


@pytest.fixture
def daemon(tmp_path: Path, verifying: bool) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    text = daemon.config.read_text().replace("[pool]\n", f"[pool]\nverify = {str(verifying).lower()}\n")
    daemon.config.write_text(text + '[scrub]\nrate = "512 MiB"\n')
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def test_a_flipped_bit_is_found_by_scrub_and_by_those_who_read_it(daemon: Daemon, verifying: bool) -> None:
    mark = b"here a bit will flip".ljust(SUB, b".")
    with daemon.connect() as control:
        control.create("v", "4 MiB")
        client = Client(daemon.socket, "v")
        assert client.write(5 * SUB, mark) == 0
        control.snapshot("v", "s")
        control.clone("s", "c")
        assert client.write(5 * SUB, b"v has overwritten it".ljust(SUB)) == 0
        settle(control)
        assert scrub(daemon).stdout == "scrubbed 64 KiB\n"
        position = flip(daemon, mark)

    found = scrub(daemon)
    assert found.returncode == 1
    assert found.stdout.splitlines() == [
        f"c: {SUB} bytes at {5 * SUB} are damaged (data byte {position}); also in s",
        "scrubbed 64 KiB",
    ]
    assert found.stderr == "nbdthin: damaged data was found (places: 1)\n"
    steps = [json.loads(line) for line in scrub(daemon, "s", "--json", "--rate", "1G").stdout.splitlines()]
    assert [step["finding"]["name"] for step in steps if step["finding"]] == ["s"]
    assert steps[-1]["done"] == steps[-1]["total"] == BLOCK
    assert scrub(daemon, "v", "--rate", "1G").returncode == 1  # below v, though v does not show it
    refused = scrub(daemon, "nobody")
    assert (refused.returncode, refused.stdout) == (1, "") and "nobody" in refused.stderr
    assert f"damaged data at byte {5 * SUB} of c, s" in daemon.log.read_text()

    for name in ("s", "c"):
        other = Client(daemon.socket, name)
        assert other.call(READ, 5 * SUB + 100, 10) == (EIO if verifying else 0)
        assert other.call(READ, 0, 64 * KiB) == (EIO if verifying else 0)
        assert other.call(READ, 6 * SUB, 64 * KiB) == 0
        if name == "c":
            assert other.call(WRITE, 5 * SUB + 1, 2, b"xx") == (EIO if verifying else 0)
        other.close()
    assert client.read(5 * SUB, 20) == b"v has overwritten it"
    client.close()
    assert ("was read: refused (affected: c, s)" in daemon.log.read_text()) == verifying


@pytest.mark.parametrize("verifying", [False], indirect=True)
def test_checksums_outlive_a_kill(daemon: Daemon) -> None:
    mark = b"written before a kill".ljust(SUB, b".")
    with daemon.connect() as control:
        control.create("v", "4 MiB")
        client = Client(daemon.socket, "v")
        assert client.write(0, mark) == 0
        control.snapshot("v", "s")
        settle(control)
        client.close()
    daemon.kill()
    position = flip(daemon, mark)
    daemon.start()
    with daemon.connect() as control:
        (finding,) = (step.finding for step in control.scrub() if step.finding)
    assert finding == nbdthin.Finding("s", 0, SUB, position, False, ("s", "v"))
