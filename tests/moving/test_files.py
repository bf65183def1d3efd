"""Files become volumes and volumes become files: byte by byte, and hole by hole."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin.moving.importing import import_file
from nbdthin.pool.rows import Extent
from nbdthin.units import KiB, MiB, TiB
from tests.clients.daemon import PATIENCE, Daemon, nbdthin_command, run, running
from tests.clients.hostmount import loop
from tests.conftest import need, need_root

from .conftest import Stop, command, content, disk, holes, names, refused, said

SIZE = 24 * MiB
PARTS = ((0, 64 * KiB), (MiB + 4 * KiB, 4 * KiB), (5 * MiB, 3 * MiB), (20 * MiB, 100 * KiB), (SIZE - 4 * KiB, 4 * KiB))


def sparse(path: Path) -> bytes:
    """A file of SIZE bytes with data at PARTS, a MiB of written zeroes at 10 MiB and holes elsewhere; its content."""
    chance = random.Random(str(path.name))
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset, length in PARTS:
            os.pwrite(file.fileno(), chance.randbytes(length), offset)
        os.pwrite(file.fileno(), bytes(MiB), 10 * MiB)
    return path.read_bytes()


def data_extents(pool: nbdthin.Client, name: str) -> list[tuple[int, int]]:
    return [(extent.offset, extent.length) for extent in holes(pool, name) if extent.data]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def served(here: Daemon, pool: nbdthin.Client) -> Daemon:
    """A daemon whose pool is empty."""
    return here


def test_a_raw_file_comes_in_and_goes_out_with_its_holes(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    expected = sparse(tmp_path / "in")
    assert said(served, "import", tmp_path / "in", "disk").decode().strip() == served.uri("disk")
    assert content(pool, "disk") == expected
    assert data_extents(pool, "disk") == list(PARTS)  # zeroes that were written are no data, either
    assert said(served, "export", "disk", tmp_path / "out") == b""
    assert (tmp_path / "out").read_bytes() == expected
    assert allocated(tmp_path / "out") <= sum(length for _, length in PARTS) + 256 * KiB
    assert names(pool) == ["disk"]


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_images_of_other_formats_come_in_with_their_holes(
    served: Daemon, pool: nbdthin.Client, tmp_path: Path, format: str
) -> None:
    expected = sparse(tmp_path / "raw")
    run(need("qemu-img"), "convert", "-f", "raw", "-O", format, tmp_path / "raw", tmp_path / "image")
    said(served, "import", tmp_path / "image", "disk")
    assert content(pool, "disk") == expected
    assert data_extents(pool, "disk") == list(PARTS)


@pytest.mark.parametrize("format", ["qcow2", "vmdk"])
def test_images_of_other_formats_are_made_with_their_holes(
    served: Daemon, pool: nbdthin.Client, tmp_path: Path, format: str
) -> None:
    expected = sparse(tmp_path / "raw")
    said(served, "import", tmp_path / "raw", "disk")
    said(served, "export", "disk", tmp_path / "image", "--format", format)
    found = json.loads(run(need("qemu-img"), "info", "--output=json", tmp_path / "image"))
    assert found["format"] == format and found["virtual-size"] == SIZE
    run("qemu-img", "convert", "-f", format, "-O", "raw", tmp_path / "image", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == expected
    assert allocated(tmp_path / "image") <= 5 * MiB
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again", "image", "raw"]


def test_a_sparse_tebibyte_costs_nothing(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    with open(tmp_path / "in", "wb") as file:
        file.truncate(TiB)
        os.pwrite(file.fileno(), b"far out", TiB - 4096)
    said(served, "import", tmp_path / "in", "disk")
    assert data_extents(pool, "disk") == [(TiB - 4096, 4096)]
    said(served, "export", "disk", tmp_path / "out")
    said(served, "export", "disk", tmp_path / "out.qcow2", "--format", "qcow2")
    assert (tmp_path / "out").stat().st_size == TiB and allocated(tmp_path / "out") <= 64 * KiB
    assert allocated(tmp_path / "out.qcow2") <= MiB
    with open(tmp_path / "out", "rb") as file:
        assert os.pread(file.fileno(), 7, TiB - 4096) == b"far out"


def test_pipes_carry_every_byte(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    expected = sparse(tmp_path / "in")
    said(served, "import", "-", "piped", stdin=expected)
    assert content(pool, "piped") == expected and data_extents(pool, "piped") == list(PARTS)
    assert said(served, "export", "piped", "-") == expected
    said(served, "import", "-", "larger", "--size", "32M", stdin=expected)
    assert content(pool, "larger") == expected + bytes(8 * MiB)
    assert "more than 1048576 bytes came" in refused(served, "import", "-", "small", "--size", "1M", stdin=expected)
    assert names(pool) == ["larger", "piped"]


def test_a_fifo_is_written_as_a_pipe(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    pool.create("disk", MiB)
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "out", "wb") as out, subprocess.Popen(["cat", tmp_path / "fifo"], stdout=out):
        said(served, "export", "disk", tmp_path / "fifo")
    assert (tmp_path / "out").read_bytes() == bytes(MiB)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert "neither a file nor a block device" in refused(served, "import", tmp_path / "fifo", "no", "--format", "raw")


def test_a_file_of_no_whole_sectors_is_filled_up(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * 5000)
    said(served, "import", tmp_path / "in", "disk", "--format", "raw")
    assert content(pool, "disk") == b"x" * 5000 + bytes(120)
    said(served, "import", tmp_path / "in", "larger", "--size", "1M", "--format", "raw")
    assert content(pool, "larger") == b"x" * 5000 + bytes(MiB - 5000)
    assert "holds 5000 bytes" in refused(served, "import", tmp_path / "in", "no", "--size", "4096", "--format", "raw")


def test_an_export_replaces_a_file_only_by_force(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    pool.create("disk", MiB)
    (tmp_path / "out").write_text("precious")
    (tmp_path / "link").symlink_to("out")
    for path in ("out", "link"):
        assert refused(served, "export", "disk", tmp_path / path).endswith("exists already (--force replaces it)")
    assert (tmp_path / "out").read_text() == "precious"
    said(served, "export", "disk", tmp_path / "link", "--force")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out").read_bytes() == bytes(MiB)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_device_is_read_and_overwritten(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    need_root()
    expected = sparse(tmp_path / "in")
    (tmp_path / "disk").write_bytes(b"\xee" * SIZE)
    said(served, "import", tmp_path / "in", "disk")
    with loop(tmp_path / "disk") as device:
        assert "--force overwrites it" in refused(served, "export", "disk", device)
        assert "only raw data" in refused(served, "export", "disk", device, "--format", "qcow2")
        said(served, "export", "disk", device, "--force")
        said(served, "import", device, "again")
        pool.create("larger", SIZE + 512)
        assert "is too small" in refused(served, "export", "larger", device, "--force")
    assert (tmp_path / "disk").read_bytes() == expected
    assert content(pool, "again") == expected and data_extents(pool, "again") == list(PARTS)


@pytest.mark.parametrize(
    ("arguments", "said_then"),
    [
        (("import", "nothing", "new"), "No such file or directory"),
        (("import", "nothing", "new", "--format", "raw"), "nothing: No such file or directory"),
        (("import", ".", "new"), "regular file"),
        (("import", ".", "new", "--format", "raw"), "neither a file nor a block device"),
        (("import", "text", "new", "--format", "qcow2"), "not in qcow2 format"),
        (("import", "text", "new", "--format", "wrong"), "wrong"),
        (("import", "text", "new", "--chain", "--size", "1G"), "resize the volume afterwards"),
        (("import", "text", "not a name"), "not a name: 'not a name'"),
        (("import", "text", "taken"), "'taken' exists already"),
        (("import", "text", "new", "--size", "1"), "holds 512 bytes"),
        (("import", "empty", "new"), "is empty"),
        (("import", "-", "new"), "is empty"),
        (("import", "-", "new", "--format", "qcow2"), "raw"),
        (("export", "nobody", "out"), "no volume or snapshot 'nobody'"),
        (("export", "taken", "."), "is a directory"),
        (("export", "taken", "no/where"), "No such file or directory"),
        (("export", "taken", "no/where", "--format", "qcow2"), "no/where: No such file or directory"),
        (("export", "taken", "out", "--format", "wrong"), "wrong"),
        (("export", "taken", "-", "--format", "qcow2"), "raw"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    served: Daemon,
    pool: nbdthin.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said_then: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(nbdthin.__file__).parent.parent))
    Path("text").write_text("x" * 512)
    Path("empty").touch()
    pool.create("taken", MiB)
    assert said_then in refused(served, *arguments)
    assert names(pool) == ["taken"]
    assert sorted(os.listdir()) == ["empty", "text"]


# Chains ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[list[Path]]:
    """Three images, each on the one before: of other sizes, with zeroes over data, the backing files relative."""
    sparse(tmp_path / "raw")
    base, middle, top = (tmp_path / name for name in ("base.qcow2", "middle.qcow2", "top.qcow2"))
    run(need("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", base)
    options = ("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b")
    run("qemu-img", *options, "base.qcow2", middle, "16M", cwd=tmp_path)
    run(need("qemu-io"), "-c", "write -P 7 2M 64k", "-c", "write -z 5M 1M", "-c", "write -P 8 100k 1k", middle)
    run("qemu-img", *options, "middle.qcow2", top, "32M", cwd=tmp_path)
    run("qemu-io", "-c", "write -P 9 30M 64k", "-c", "write -P 1 7M 4k", "-c", "discard 0 64k", top)
    yield [base, middle, top]


def _flat(image: Path) -> bytes:
    run("qemu-img", "convert", "-O", "raw", image, image.with_suffix(".flat"))
    return image.with_suffix(".flat").read_bytes()


def test_each_image_of_a_chain_is_a_snapshot_and_they_share(
    served: Daemon, pool: nbdthin.Client, chain: list[Path]
) -> None:
    said(served, "import", "--chain", chain[-1], "web")
    assert names(pool) == ["web", "web@1", "web@2"]
    assert [pool.show(name).parent for name in ("web@1", "web@2", "web")] == [None, "web@1", "web@2"]
    for image, name in zip(chain, ("web@1", "web@2", "web"), strict=True):
        assert content(pool, name) == _flat(image)
    used = pool.info().pool.data_used
    pool.remove("web", "web@2")
    alone = pool.show("web@1").referenced
    assert used - alone <= 6 * 64 * KiB  # what the two above have written, each cluster for itself


def test_without_chain_what_an_image_stands_on_is_copied_with_it(
    served: Daemon, pool: nbdthin.Client, chain: list[Path]
) -> None:
    said(served, "import", chain[-1], "web")
    assert names(pool) == ["web"] and content(pool, "web") == _flat(chain[-1])


def test_one_image_is_a_chain_too(served: Daemon, pool: nbdthin.Client, chain: list[Path]) -> None:
    said(served, "import", "--chain", chain[0], "web")
    assert names(pool) == ["web"] and content(pool, "web") == _flat(chain[0])


def test_a_chain_that_cannot_be_imported_leaves_nothing(
    served: Daemon, pool: nbdthin.Client, chain: list[Path]
) -> None:
    pool.create("web@2", MiB)
    assert "'web@2' exists already" in refused(served, "import", "--chain", chain[-1], "web")
    pool.remove("web@2")
    chain[0].unlink()
    assert "base.qcow2" in refused(served, "import", "--chain", chain[-1], "web")
    assert names(pool) == []


# Interruptions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "left"), [(signal.SIGKILL, ["importing/disk"]), (signal.SIGINT, [])])
def test_an_interrupted_import_leaves_nothing_under_its_name_and_the_next_one_goes_well(
    served: Daemon, pool: nbdthin.Client, number: signal.Signals, left: list[str]
) -> None:
    line = [*nbdthin_command("import", "-", "disk", "--size", "64M"), "--socket", str(served.control)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"\1" * 4 * MiB)
        process.stdin.flush()
        _until(lambda: "importing/disk" in names(pool) and data_extents(pool, "importing/disk") != [])
        process.send_signal(number)
        process.wait()
        assert process.stderr.read() == b""
    assert names(pool) == left
    _until(lambda: all(not row.connections for row in pool.list()))
    said(served, "import", "-", "disk", stdin=b"\2" * MiB)
    assert names(pool) == ["disk"] and content(pool, "disk") == b"\2" * MiB


def _until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_import_that_ends_with_its_connection_leaves_nothing(
    served: Daemon, pool: nbdthin.Client, tmp_path: Path
) -> None:
    """A Ctrl-C in the middle of a request closes it."""
    sparse(tmp_path / "in")
    with served.connect() as own:

        def stop(done: int, total: int) -> None:
            own.close()
            raise Stop

        with pytest.raises(Stop):
            import_file(own, tmp_path / "in", "disk", format="raw", progress=stop)
    assert names(pool) == []


def test_two_imports_of_one_name_do_not_disturb_each_other(
    served: Daemon, pool: nbdthin.Client, tmp_path: Path
) -> None:
    line = [*nbdthin_command("import", "-", "disk"), "--socket", str(served.control)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(b"\1" * 4 * MiB)
        process.stdin.flush()
        _until(lambda: "importing/disk" in names(pool) and pool.show("importing/disk").connections)
        assert "importing/disk" in refused(served, "import", "-", "disk", stdin=b"\2" * MiB)
        process.stdin.close()
        assert process.wait() == 0
    assert content(pool, "disk") == b"\1" * 4 * MiB


def test_an_export_does_not_go_into_the_pool(served: Daemon, pool: nbdthin.Client) -> None:
    pool.create("disk", MiB)
    for path in (served.pool / "data", served.pool / "journal/x"):
        assert "inside the pool" in refused(served, "export", "disk", path, "--force")
    assert content(pool, "disk") == bytes(MiB)


def test_without_qemu_raw_files_come_in_all_the_same(
    served: Daemon, pool: nbdthin.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse(tmp_path / "in")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(served, "import", tmp_path / "in", "disk").startswith("qemu-img is missing (apt-get install")
    said(served, "import", tmp_path / "in", "disk", "--format", "raw")
    assert refused(served, "export", "disk", tmp_path / "out", "--format", "qcow2").startswith("qemu-img is missing")


def test_a_full_pool_is_one_line_and_the_space_comes_back(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        daemon.stop()
        config = daemon.config.read_text().replace("[server]", 'no_space = "error"\nauto_extend = false\n[server]')
        daemon.config.write_text(config)
        subprocess.run(nbdthin_command("init", tmp_path / "small", "--size", "16M"), check=True, capture_output=True)
        daemon.config.write_text(config.replace('path = "pool"', 'path = "small"'))
        daemon.start()
        (tmp_path / "in").write_bytes(random.Random(1).randbytes(24 * MiB))
        assert "no space is left" in refused(daemon, "import", tmp_path / "in", "disk", "--format", "raw")
        with daemon.connect() as pool:
            assert names(pool) == []
            pool.create("probe", 8 * MiB)
            with disk(pool, "probe") as probe:
                probe.write(0, b"\1" * 8 * MiB)
                probe.flush()


def test_a_daemon_that_dies_in_the_middle_is_one_line(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        line = [*nbdthin_command("import", "-", "disk"), "--socket", str(daemon.control)]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stderr is not None
            process.stdin.write(b"\1" * 4 * MiB)
            process.stdin.flush()
            with daemon.connect() as pool:
                _until(lambda: "importing/disk" in names(pool) and pool.show("importing/disk").connections)
            daemon.kill()
            try:
                process.stdin.write(b"\1" * 64 * MiB)
                process.stdin.close()
            except BrokenPipeError:
                pass
            line_said = process.stderr.read().decode()
            assert process.wait() == 1
        assert line_said.startswith("nbdthin: the connection to ") and line_said.count("\n") == 1
        daemon.start()


def test_a_full_file_system_below_an_export_is_one_line_and_leaves_nothing(
    served: Daemon, pool: nbdthin.Client, tmp_path: Path
) -> None:
    need_root()
    pool.create("disk", 8 * MiB)
    with disk(pool, "disk") as each:
        each.write(0, b"\1" * 8 * MiB)
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "none", small)
    try:
        assert refused(served, "export", "disk", small / "out") == f"{small}/out: No space left on device"
        image = refused(served, "export", "disk", small / "out", "--format", "qcow2")
        assert image.startswith(f"no space is left to write '{small}/out'")
        assert list(small.iterdir()) == []
    finally:
        run("umount", small)


def test_any_name_of_a_file_will_do(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    expected = sparse(tmp_path / "in")
    said(served, "import", tmp_path / "in", "disk")
    for name in ("nbd:x", "a, b='c' %20?", "ä\n", os.fsdecode(b"\xff\xfe")):
        path = tmp_path / name
        said(served, "export", "disk", path, "--format", "qcow2")
        said(served, "import", path, "again")
        assert content(pool, "again") == expected
        assert "exists already" in refused(served, "export", "disk", path)
        pool.remove("again")


def test_progress_counts_the_data(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    sparse(tmp_path / "in")
    seen: list[tuple[int, int]] = []
    import_file(pool, tmp_path / "in", "disk", format="raw", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] < SIZE


def test_a_bar_shows_how_far_it_is_on_a_terminal_alone(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    sparse(tmp_path / "in")
    ours, theirs = pty.openpty()
    line = [*nbdthin_command("import", tmp_path / "in", "disk", "--format", "raw"), "--socket", str(served.control)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while part := os.read(ours, 4096):
            drawn += part
    os.close(ours)
    assert done.returncode == 0 and done.stdout.decode().strip() == served.uri("disk")
    assert b"import disk" in drawn and re.search(rb"\d\.\d [MG]B/s", drawn)


def test_json_says_what_was_made(served: Daemon, pool: nbdthin.Client, tmp_path: Path) -> None:
    sparse(tmp_path / "in")
    made = json.loads(said(served, "import", tmp_path / "in", "disk", "--json"))
    assert made["name"] == "disk" and made["size"] == SIZE
    assert json.loads(said(served, "export", "disk", tmp_path / "out", "--json")) == {"exported": str(tmp_path / "out")}
    assert command(served, "export", "disk", tmp_path / "out", "--json").returncode == 1
    assert holes(pool, "disk")[0] == Extent(0, 64 * KiB, True)
