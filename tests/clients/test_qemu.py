"""QEMU's block layer as the client: the tools with which disk images are moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdthin.units import KiB, MiB
from tests.clients.daemon import Daemon, run, run_json
from tests.conftest import need

SIZE = 256 * MiB


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """An image with data, zeroes and holes, at borders of nbdthin's blocks and beside them."""
    need("qemu-img")
    path = tmp_path / "source.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    io(path, "qcow2", "write -P 0x11 0 1M", "write -P 0x22 3M 68k", "write -P 0x33 100004k 12k", "write -z 200M 1M")
    io(path, "qcow2", f"write -P 0x44 {SIZE - 64 * KiB} 64k")
    return path


def io(target: str | Path, image_format: str, *commands: str) -> str:
    """Run qemu-io. It exits 0 although a pattern does not match, and says so."""
    need("qemu-io")
    arguments = [argument for command in commands for argument in ("-c", command)]
    printed = run("qemu-io", "-f", image_format, *arguments, target)
    assert "failed" not in printed, printed
    return printed


def test_an_image_goes_in_compares_equal_and_comes_out(shared_daemon: Daemon, qcow2: Path, tmp_path: Path) -> None:
    uri = shared_daemon.create("from-qcow2", SIZE)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", "-m", "8", "-W", qcow2, uri)
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, uri)
    back = tmp_path / "back.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, back)
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", back, uri)
    # Neither way did zeroes become data.
    with shared_daemon.connect() as control:
        assert control.show("from-qcow2").exclusive == MiB + 128 * KiB + 64 * KiB + 64 * KiB


def test_qemu_img_maps_data_and_what_reads_as_zero(shared_daemon: Daemon) -> None:
    uri = shared_daemon.create("mapped", SIZE)
    io(uri, "raw", "write -P 0x55 1M 64k", "write -P 0x66 8M 4k", "write -z 9M 64k")
    need("qemu-img")
    rows = run_json("qemu-img", "map", "--output=json", "-f", "raw", uri)
    assert isinstance(rows, list)
    data = [(row["start"], row["length"]) for row in rows if not row["zero"]]
    assert data == [(MiB, 64 * KiB), (8 * MiB, 4 * KiB)]
    assert sum(row["length"] for row in rows) == SIZE


def test_qemu_io_reads_the_patterns_it_wrote(shared_daemon: Daemon) -> None:
    uri = shared_daemon.create("patterns", SIZE)
    io(
        uri,
        "raw",
        "write -P 0x5a 0 1M",
        "write -P 0x6b 1000000 12345",
        "write -f -P 0x7c 5M 4k",
        "aio_write -P 0x8d 6M 2M",
        "aio_write -P 0x9e 16M 32M",
        "aio_flush",
        "flush",
    )
    io(
        uri,
        "raw",
        "read -P 0x5a 0 1000000",
        "read -P 0x6b 1000000 12345",
        "read -P 0x5a 1012345 36231",
        "read -P 0x7c 5M 4k",
        "read -P 0x8d 6M 2M",
        "read -P 0x9e 16M 32M",
        "read -P 0 48M 200M",
    )


@pytest.mark.parametrize(
    ("command", "space_comes_back"),
    [("discard 1M 64k", True), ("write -z -u 1M 64k", True), ("write -z 1M 64k", False)],
)
def test_a_range_reads_as_zeroes_after(command: str, space_comes_back: bool, daemon: Daemon) -> None:
    uri = daemon.create("range", SIZE)
    io(uri, "raw", "write -P 0xff 0 3M", "flush")
    assert daemon.data_used() == 3 * MiB
    io(uri, "raw", command, "flush")
    io(uri, "raw", "read -P 0xff 0 1M", "read -P 0 1M 64k", "read -P 0xff 1088k 1984k")
    assert daemon.data_used() == 3 * MiB - (64 * KiB if space_comes_back else 0)


def test_qemu_img_refuses_nothing_on_a_snapshot_but_writing(shared_daemon: Daemon) -> None:
    uri = shared_daemon.create("frozen", SIZE)
    io(uri, "raw", "write -P 0x77 0 128k")
    snapshot = shared_daemon.snapshot("frozen", "frozen@1")
    io(uri, "raw", "write -P 0x78 64k 128k")
    need("qemu-io")
    printed = run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x77 0 128k", "-c", "read -P 0 128k 1M", snapshot)
    assert "failed" not in printed, printed
    io(uri, "raw", "read -P 0x77 0 64k", "read -P 0x78 64k 128k")


def test_a_qcow2_overlay_lies_on_a_snapshot(shared_daemon: Daemon, qcow2: Path, tmp_path: Path) -> None:
    uri = shared_daemon.create("backing", SIZE)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, uri)
    snapshot = shared_daemon.snapshot("backing", "backing@1")
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", snapshot, overlay)
    io(overlay, "qcow2", "read -P 0x11 0 1M", "write -P 0x99 512k 4k", "read -P 0x11 516k 508k", "read -P 0x22 3M 68k")
