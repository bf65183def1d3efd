"""Volumes as block devices of this machine, by nbdfuse and loop devices; the kernel's driver has test_guest.py."""

from __future__ import annotations

import errno
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from nbdthin.errors import Error, InUse, Invalid, NotFound
from nbdthin.units import MiB
from tests.clients.daemon import Daemon
from tests.clients.hostmount import wait_until
from tests.conftest import need
from tests.devices.conftest import make_file_system, nbdfuse_processes, what_is_left


def mounted_with(path: Path) -> list[str]:
    """The options of what is mounted on `path`."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next(fields[3].split(",") for fields in lines if fields[1] == str(path).replace(" ", r"\040"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "mounted here"
    path.mkdir()
    return path


# -- attach and detach


def test_what_was_written_to_a_device_is_durable_when_it_is_detached(pool: nbdthin.Client, served: Daemon) -> None:
    pool.create("v", MiB)
    device = devices.attach(pool, "v")
    assert device == devices.Device("v", device.path, "loop", False, served.uri("v"))
    assert devices.attached() == [device]
    with open(device.path, "wb") as disk:  # through the device's page cache
        disk.write(data := os.urandom(MiB))
    devices.detach("v")
    assert devices.attached() == [] and what_is_left() == []
    served.kill()
    served.start()
    with served.connect() as again:
        device = devices.attach(again, "v", read_only=True)
    assert device.path.read_bytes() == data
    devices.detach(device.path)


def test_a_device_shows_what_it_did_though_that_is_removed_and_its_name_is_used_again(pool: nbdthin.Client) -> None:
    pool.create("v", MiB)
    old = devices.attach(pool, "v")
    old.path.write_bytes(before := os.urandom(MiB))
    pool.remove("v", deferred=True)
    pool.create("v", 2 * MiB)
    new = devices.attach(pool, "v")
    new.path.write_bytes(after := os.urandom(2 * MiB))
    with pytest.raises(InUse, match="attached already"):
        devices.attach(pool, "v")
    with pytest.raises(Invalid, match="attached more than once"):
        devices.detach("v")
    assert (old.path.read_bytes(), new.path.read_bytes()) == (before, after)
    (row,) = pool.list(deferred=True)
    assert row.open_count > 0
    devices.detach(old.path)
    wait_until(lambda: not pool.list(deferred=True), "it is freed")
    assert new.path.read_bytes() == after
    devices.detach("v")


def test_a_snapshot_can_only_be_read(pool: nbdthin.Client) -> None:
    pool.create("v", MiB)
    pool.snapshot("v", "v@1")
    device = devices.attach(pool, "v@1")
    assert device.read_only
    disk = os.open(device.path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(disk, bytes(512))
    os.close(disk)
    devices.detach("v@1")


def test_only_what_both_only_read_can_be_attached_twice(pool: nbdthin.Client) -> None:
    pool.create("v", MiB)
    first = devices.attach(pool, "v", read_only=True)
    second = devices.attach(pool, "v", read_only=True)
    with pytest.raises(InUse, match=f"attached already: {first.path}"):
        devices.attach(pool, "v")
    with pytest.raises(Invalid, match=f"more than once, say which: {first.path}, {second.path}"):
        devices.detach("v")
    devices.detach(first.path)
    devices.detach("v")
    with pytest.raises(NotFound, match="'v' is not attached"):
        devices.detach("v")


def test_many_at_once_get_a_device_each(pool: nbdthin.Client, served: Daemon) -> None:
    pool.create("v", MiB)
    pool.snapshot("v", "v@1")
    names = [f"clone{number}" for number in range(12)]
    for name in names:
        pool.clone("v@1", name)
    with ThreadPoolExecutor(len(names)) as threads:
        found = list(threads.map(lambda name: devices.attach_uri(served.uri(name)), names))
        assert len({device.path for device in found}) == len(names)
        for device in found:
            device.path.write_bytes(device.name.encode())
        list(threads.map(lambda device: devices.detach(device.path), found))
    for name in names:
        device = devices.attach(pool, name)
        assert device.path.read_bytes()[: len(name)].decode() == name
        devices.detach(name)


def test_a_uri_may_say_where_the_socket_is_from_here(
    pool: nbdthin.Client, served: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.create("v", MiB)
    monkeypatch.chdir(served.directory)
    device = devices.attach_uri("nbd+unix:///v?socket=nbd.sock", connections=1)
    assert (device.name, device.uri) == ("v", served.uri("v"))
    devices.detach("v")


def test_where_no_server_is_nothing_is_left(pool: nbdthin.Client, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"nbdfuse cannot show nbd\+unix.*No such file or directory") as caught:
        devices.attach_uri(f"nbd+unix:///v?socket={tmp_path}/none")
    assert "\n" not in str(caught.value)


def test_a_device_that_was_detached_by_hand_is_forgotten_and_its_successor_left_alone(
    pool: nbdthin.Client, tmp_path: Path
) -> None:
    pool.create("v", MiB)
    device = devices.attach(pool, "v")
    subprocess.run([need("losetup"), "-d", device.path], check=True)
    (tmp_path / "another").write_bytes(bytes(MiB))
    subprocess.run(["losetup", device.path, tmp_path / "another"], check=True)
    with open(device.path, "rb") as other:
        devices.detach("v")
        assert other.read(512) == bytes(512)
    subprocess.run(["losetup", "-d", device.path], check=True)


@pytest.mark.parametrize("connections", [0, -1, 65])
def test_a_device_has_a_number_of_connections(connections: int, pool: nbdthin.Client) -> None:
    pool.create("v", MiB)
    with pytest.raises(Invalid, match=f"1 to 64 connections, not {connections}"):
        devices.attach(pool, "v", connections=connections)


def test_loop_devices_do_not_cache_what_their_users_do(pool: nbdthin.Client) -> None:
    pool.create("v", MiB)
    device = devices.attach(pool, "v")
    assert Path("/sys/block", device.path.name, "loop/dio").read_text() == "1\n"
    devices.detach("v")


# -- mount


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_was_written_to_a_mount_is_durable_when_it_is_unmounted(
    kind: str, pool: nbdthin.Client, served: Daemon, directory: Path
) -> None:
    make_file_system(pool, "v", kind)
    device = devices.mount(pool, "v", directory, options=["noatime"])
    assert (device.directory, devices.attached()) == (directory, [device])
    assert "noatime" in mounted_with(directory)
    (directory / "file").write_bytes(data := os.urandom(MiB))
    devices.unmount(directory)
    assert what_is_left() == []
    served.kill()
    served.start()
    with served.connect() as again, devices.mounted(again, "v") as found:
        assert (found / "file").read_bytes() == data


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_snapshot_of_a_mounted_volume_mounts_beside_it_and_so_do_its_clones(
    kind: str, pool: nbdthin.Client, directory: Path
) -> None:
    make_file_system(pool, "v", kind)
    devices.mount(pool, "v", directory)
    (directory / "file").write_text("kept")
    os.sync()
    pool.snapshot("v", "v@1")  # its journal has not been replayed
    pool.clone("v@1", "clone")
    (directory / "file").write_text("changed")
    with devices.mounted(pool, "v@1") as before, devices.mounted(pool, "clone") as clone:
        assert {"ro", "norecovery"} <= set(mounted_with(before))
        assert ("nouuid" in mounted_with(clone)) == (kind == "xfs")
        with devices.mounted(pool, "v@1") as twice:
            assert sorted(twice.iterdir()) == sorted(twice / path.name for path in before.iterdir())
        if kind == "ext4":  # xfs has in its log what it has not in its place
            assert (before / "file").read_text() == "kept"
        assert (clone / "file").read_text() == "kept"
        with pytest.raises(OSError, match="Read-only") as caught:
            (before / "file").write_text("no")
        assert caught.value.errno == errno.EROFS
    devices.unmount("v")


def test_what_is_mounted_is_not_detached_and_what_is_in_use_not_unmounted(
    pool: nbdthin.Client, directory: Path
) -> None:
    make_file_system(pool, "v")
    device = devices.mount(pool, "v", directory)
    with pytest.raises(InUse, match=f"'v', {device.path}, is mounted on {directory}"):
        devices.detach("v")
    with open(directory / "file", "w"), pytest.raises(InUse, match=r"is in use \(fuser -vm"):
        devices.unmount("v")
    assert devices.attached() == [device]
    devices.unmount("v")


def test_what_another_mount_namespace_has_mounted_is_not_detached(pool: nbdthin.Client, directory: Path) -> None:
    make_file_system(pool, "v")
    device = devices.attach(pool, "v")
    script = 'mount "$0" "$1" && echo mounted && read line'
    command = [need("unshare"), "--mount", "sh", "-c", script, str(device.path), str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as elsewhere:
        assert elsewhere.stdin and elsewhere.stdout and elsewhere.stdout.readline() == b"mounted\n"
        with pytest.raises(InUse, match="maybe in another mount namespace"):
            devices.detach("v")
        elsewhere.stdin.close()
    devices.detach("v")


def test_an_unmount_by_hand_leaves_a_device_that_can_be_detached_or_unmounted(
    pool: nbdthin.Client, directory: Path
) -> None:
    make_file_system(pool, "v")
    for undo in (devices.detach, devices.unmount):
        devices.mount(pool, "v", directory)
        subprocess.run(["umount", directory], check=True)
        undo("v")
    devices.mount(pool, "v", directory)
    subprocess.run(["umount", directory], check=True)
    assert devices.cleanup() == ["v"]


def test_what_cannot_be_mounted_is_one_line_and_nothing_is_left(pool: nbdthin.Client, directory: Path) -> None:
    pool.create("v", MiB)
    with pytest.raises(Error, match=r"^cannot mount /dev/loop\d+: it has no file system"):
        devices.mount(pool, "v", directory)
    make_file_system(pool, "formatted")
    with pytest.raises(Error, match=r"^cannot mount the ext4 on /dev/loop\d+: Invalid argument: a bad option"):
        devices.mount(pool, "formatted", directory, options=["noatime", "nonsense"])
    with pytest.raises(Invalid, match="no directory to mount on"):
        devices.mount(pool, "v", directory / "none")


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_a_dead_tool_has_frozen_is_unmounted(kind: str, pool: nbdthin.Client, directory: Path) -> None:
    make_file_system(pool, "v", kind)
    devices.mount(pool, "v", directory)
    subprocess.run([need("fsfreeze"), "--freeze", directory], check=True)
    devices.unmount("v")
    devices.mount(pool, "v", directory)
    (directory / "file").touch()
    devices.unmount("v")


# -- a server that goes away


def test_a_device_whose_server_has_died_is_cleaned_up_though_it_is_in_use(
    pool: nbdthin.Client, served: Daemon, directory: Path
) -> None:
    make_file_system(pool, "v")
    devices.mount(pool, "v", directory)
    file = open(directory / "file", "wb")
    served.kill()
    with pytest.raises(OSError), file:
        file.write(bytes(MiB))
        os.fsync(file.fileno())
    wait_until(lambda: not nbdfuse_processes(), "the end of nbdfuse")
    assert devices.cleanup() == ["v"]
    assert what_is_left() == []
    served.start()


def test_devices_whose_server_has_died_are_cleaned_up_though_nobody_has_asked_them_for_anything_since(
    pool: nbdthin.Client, served: Daemon, directory: Path
) -> None:
    make_file_system(pool, "v")
    pool.create("other", MiB)
    devices.mount(pool, "v", directory)
    devices.attach(pool, "other")
    served.kill()
    assert sorted(devices.cleanup()) == ["other", "v"]
    assert what_is_left() == []
    served.start()


def test_what_was_written_after_the_server_died_is_said_to_be_lost(pool: nbdthin.Client, served: Daemon) -> None:
    pool.create("v", MiB)
    disk = os.open(devices.attach(pool, "v").path, os.O_RDWR)
    os.write(disk, bytes(MiB))
    served.kill()
    os.close(disk)
    with pytest.raises(Error, match="detached, but what was written to it last is lost"):
        devices.detach("v")
    assert what_is_left() == []
    served.start()


def test_cleanup_leaves_what_lives(pool: nbdthin.Client, directory: Path) -> None:
    make_file_system(pool, "v")
    pool.create("other", MiB)
    device, other = devices.mount(pool, "v", directory), devices.attach(pool, "other")
    pool.snapshot("v", "v@1")
    with devices.mounted(pool, "v@1"):  # another tool's, which is at it
        assert devices.cleanup() == []
        assert devices.attached() == [other, device]
    devices.unmount("v")
    devices.detach("other")
