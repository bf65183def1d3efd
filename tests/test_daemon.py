"""How a daemon starts, what it leaves behind when it cannot, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin import Locked
from nbdthin.pool.pool import Pool
from nbdthin.units import MiB
from tests import rawclient
from tests.clients.daemon import CONFIG, Daemon, free_port, nbdthin_command, run, running
from tests.conftest import need, need_root


def write_config(directory: Path, *, size: int = 100) -> Path:
    config = directory / "exports.toml"
    config.write_text(CONFIG.format(size=size, port=free_port()))
    return config


def refused(config: Path) -> str:
    """What `serve` says, in one line; before and after, the directory holds the same."""
    before = sorted(config.parent.rglob("*"))
    done = subprocess.run(nbdthin_command("serve", "--config", config), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "", done
    assert sorted(config.parent.rglob("*")) == before
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nbdthin: ") and "Traceback" not in done.stderr
    return last.removeprefix("nbdthin: ")


def test_the_first_start_makes_the_pool_and_the_end_leaves_nothing_else(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, size=100 * MiB)
    daemon.pool = tmp_path / "deep/below/pool"
    daemon.config.write_text(daemon.config.read_text().replace('"pool"', '"deep/below/pool"'))
    with contextlib.closing(daemon):
        daemon.start()
        with daemon.connect() as pool:
            pool.create("a", "1 GiB")
            assert pool.info().pool.data_total <= 100 * MiB
        daemon.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon.log", "deep", "exports.toml"]
    with Pool.open(daemon.pool) as opened:
        assert [row.name for row in opened.list()] == ["a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_and_a_second_one_end_it_well(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as daemon:
        with daemon.connect() as pool:
            pool.create("a", "1 MiB")
            client = rawclient.Client(daemon.socket, "a")
            daemon.signal(number)
            daemon.signal(number)
            assert daemon.wait() == 0
            client.close()
        assert "Traceback" not in daemon.log.read_text()
        assert not daemon.socket.exists() and not daemon.control.exists()


def test_the_data_may_be_on_a_block_device(tmp_path: Path) -> None:
    need_root()
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", 64 * MiB)
    device = run(need("losetup"), "--find", "--show", tmp_path / "image").strip()
    try:
        daemon = Daemon(tmp_path)
        text = daemon.config.read_text().replace('size = "102400 MiB"', f'data = "{device}"')
        daemon.config.write_text(text)
        with contextlib.closing(daemon):
            daemon.start()
            daemon.create("a", "1 GiB")
            client = rawclient.Client(daemon.socket, "a")
            assert client.write(0, b"x" * 4096) == 0
            with daemon.connect() as pool:
                info = pool.info()
            assert info.pool.data_path == Path(device) and info.pool.data_total <= 64 * MiB
            assert (info.disk.device, info.disk.mount, info.disk.total) == (device, None, 64 * MiB)
            daemon.stop()
            client.close()
            daemon.start()
            client = rawclient.Client(daemon.socket, "a")
            assert client.read(0, 4096) == b"x" * 4096
            client.close()
    finally:
        run(need("losetup"), "--detach", device)


def test_what_was_written_before_the_signal_is_there_after_the_next_start(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        daemon.create("a", "1 MiB")
        client = rawclient.Client(daemon.socket, "a")
        assert client.write(4096, b"\x07" * 4096) == 0
        daemon.stop()
        client.close()
        daemon.start()
        client = rawclient.Client(daemon.socket, "a")
        assert client.read(4096, 4096) == b"\x07" * 4096
        client.close()


def test_a_killed_daemons_sockets_are_replaced(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        daemon.create("a", "1 MiB")
        daemon.kill()
        assert stat.S_ISSOCK(daemon.control.stat().st_mode)
        daemon.start()
        with daemon.connect() as pool:
            assert [row.name for row in pool.list()] == ["a"]


def test_a_second_daemon_is_refused_and_does_the_first_no_harm(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        with daemon.connect() as pool:
            pool.create("a", "1 MiB")
            done = subprocess.run(nbdthin_command("serve", "--config", daemon.config), capture_output=True, text=True)
            assert done.returncode == 1
            assert done.stderr.endswith("is in use: another process listens there (is this daemon running already?)\n")
        with daemon.connect() as pool:
            assert [row.name for row in pool.list()] == ["a"]


def test_a_busy_port_leaves_no_new_pool_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = write_config(tmp_path)
        config.write_text(CONFIG.format(size=100, port=other.getsockname()[1]))
        assert "is in use" in refused(config)


def test_a_busy_control_socket_is_not_replaced(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "control.sock"))
        other.listen()
        assert f"unix:{tmp_path}/control.sock is in use" in refused(config)


def test_a_directory_instead_of_a_socket_is_not_touched(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "nbd.sock").mkdir()
    assert "something that is no socket is there" in refused(config)


def test_a_locked_pool_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    Pool.init(tmp_path / "pool", size="100 MiB")
    with Pool.open(tmp_path / "pool"):
        assert "is open in another process" in refused(config)


def test_a_served_pool_is_locked_for_everyone_else(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        with daemon.connect() as pool:
            pool.info()
        with pytest.raises(Locked):
            Pool.open(daemon.pool)
        check = subprocess.run(nbdthin_command("check", daemon.pool), capture_output=True, text=True)
        assert (check.returncode, check.stdout) == (1, "")
        assert "is open in another process" in check.stderr


@pytest.mark.parametrize("place", ["superblock", "data"])
def test_a_damaged_pool_is_refused_and_named(tmp_path: Path, place: str) -> None:
    config = write_config(tmp_path)
    Pool.init(tmp_path / "pool", size="100 MiB")
    with (tmp_path / "pool" / place).open("r+b") as file:
        file.seek(12)
        file.write(b"\xff\xff")
    assert refused(config).startswith(f"{tmp_path}/pool/{place} at byte ")


def test_what_is_no_pool_is_not_overwritten(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/letters").write_text("dear")
    assert "exists and is not empty" in refused(config)


def test_no_address_at_all_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "exports.toml"
    config.write_text("[server]\nlisten = []")
    assert "no address to listen at" in refused(config)


def test_a_pool_too_large_for_its_blocks_is_refused(tmp_path: Path) -> None:
    assert "a pool of 64 KiB blocks has" in refused(write_config(tmp_path, size=1 << 40))


def test_an_address_of_the_network_is_warned_about(tmp_path: Path) -> None:
    with Locker(tmp_path / "pool"):
        config = write_config(tmp_path)
        config.write_text(config.read_text().replace("tcp:127.0.0.1:", "tcp:0.0.0.0:"))
        done = subprocess.run(nbdthin_command("serve", "--config", config), capture_output=True, text=True)
    assert "is open to the network: whoever reaches it can read and write every volume" in done.stderr


class Locker:
    """Holds a new pool, so that a daemon ends where it would open it."""

    def __init__(self, path: Path) -> None:
        Pool.init(path, size="100 MiB")
        self._pool = Pool.open(path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._pool.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    need_root()
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32M", "none", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_lets_no_pool_begin(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(28 * MiB))
    config = write_config(small_disk)
    assert "space" in refused(config)


def test_a_full_disk_is_told_of_and_removing_helps(small_disk: Path) -> None:
    daemon = Daemon(small_disk)
    daemon.config.write_text(daemon.config.read_text().replace("[server]", 'no_space = "error"\n[server]'))
    with contextlib.closing(daemon):
        daemon.start()
        daemon.create("a", "64 MiB")
        client = rawclient.Client(daemon.socket, "a")
        written = 0
        while client.write(written, bytes([7]) * MiB) == 0:
            written += MiB
        assert MiB < written < 32 * MiB
        assert client.read(0, 4096) == b"\x07" * 4096
        with daemon.connect() as pool:
            assert pool.info().pool.failed is None
            pool.remove("a", force=True)
        daemon.create("b", "64 MiB")
        with daemon.connect() as pool:
            assert pool.info().pool.data_used == 0
        client.close()


@pytest.fixture
def read_only_directory(tmp_path: Path) -> Iterator[Path]:
    need_root()
    path = tmp_path / "fixed"
    path.mkdir()
    for arguments in (["--bind", str(path)], ["-o", "remount,bind,ro"]):
        done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_read_only_directory_is_refused(tmp_path: Path, read_only_directory: Path) -> None:
    config = tmp_path / "exports.toml"
    config.write_text(CONFIG.format(size=100, port=free_port()).replace('"pool"', '"fixed/pool"'))
    assert "Read-only file system" in refused(config)
    config.write_text(CONFIG.format(size=100, port=free_port()).replace("unix:nbd", "unix:fixed/nbd"))
    assert "Read-only file system" in refused(config)


def test_more_connections_than_a_shells_limit_are_taken(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        with daemon.connect() as pool:
            soft = pool.info().process.files_limit
            assert soft >= min(8192, int(os.sysconf("SC_OPEN_MAX")))


def test_clients_that_connect_while_it_starts_are_served(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = subprocess.Popen(nbdthin_command("serve", "--config", config))
    try:
        while True:
            try:
                pool = nbdthin.connect(tmp_path / "control.sock")
                break
            except nbdthin.Unreachable:
                assert process.poll() is None
        with pool:
            assert pool.list() == []
    finally:
        process.terminate()
        assert process.wait() == 0
