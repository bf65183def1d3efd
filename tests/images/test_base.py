"""Bases: empty file systems that cost what mkfs writes, and nothing later."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from nbdthin.images import base, loading
from nbdthin.images.store import Catalogue
from nbdthin.units import GiB, MiB
from tests.clients.daemon import Daemon, run
from tests.clients.hostmount import check_file_system
from tests.conftest import need_root
from tests.images.made import file, layout
from tests.images.trees import make_tar

TAKES = {"ext4": 6 * MiB, "xfs": MiB}  # bytes of 10 GiB; mkfs itself writes 68 and 64 MiB, most of them zero


@pytest.mark.parametrize("kind", TAKES)
def test_a_base_is_a_sound_empty_file_system_of_the_size_asked_for(
    kind: str, daemon: Daemon, pool: nbdthin.Client
) -> None:
    need_root()
    made = base.create(pool, "small", kind, "10 GiB")
    assert (made.name, made.file_system.kind, made.file_system.size) == ("small", kind, 10 * GiB)
    assert made.exclusive == daemon.data_used() < TAKES[kind]
    check_file_system(daemon.uri("base/small"), kind)
    with devices.mounted(pool, "base/small") as root:
        assert list(root.iterdir()) == []
    device = devices.attach(pool, "base/small")
    try:
        assert run("blkid", "-p", "-s", "UUID", "-o", "value", device.path).strip() == made.file_system.uuid
    finally:
        devices.detach(device.path)


def test_the_kernel_initialises_no_inode_table_of_a_containers_ext4(pool: nbdthin.Client) -> None:
    """It would write 160 MiB of zeroes into each container. It does so for the groups that do not say ITABLE_ZEROED."""
    need_root()
    base.create(pool, "base")
    device = devices.attach(pool, "base/base")
    try:
        groups = [
            line for line in run("dumpe2fs", device.path).splitlines() if line.startswith("Group ") and "Blocks" in line
        ]
    finally:
        devices.detach(device.path)
    assert len(groups) == 80
    assert [line for line in groups if "ITABLE_ZEROED" not in line] == []


def test_mkfs_gets_the_options_of_a_base_and_again_when_it_grows(pool: nbdthin.Client) -> None:
    need_root()
    for size in ("1 GiB", "2 GiB"):
        if size == "1 GiB":
            base.create(pool, "base", "ext4", size, options="-I 512 -L 'a label'")
        else:
            base.grow(pool, "base", size)
        device = devices.attach(pool, "base/base")
        try:
            facts = run("dumpe2fs", "-h", device.path)
        finally:
            devices.detach(device.path)
        assert "Filesystem volume name:   a label\n" in facts
        assert "Inode size:\t          512\n" in facts


def test_what_mkfs_refuses_is_one_line_and_leaves_nothing(daemon: Daemon, pool: nbdthin.Client) -> None:
    with pytest.raises(nbdthin.Error, match=r"^mke2fs failed: .*invalid inode size"):
        base.create(pool, "base", options="-I 7")
    with pytest.raises(nbdthin.Error, match=r"^mkfs\.xfs failed: "):
        base.create(pool, "base", "xfs", "1 MiB")
    with pytest.raises(nbdthin.Invalid, match="not a file system"):
        base.create(pool, "base", "btrfs")
    assert pool.list() == []
    assert daemon.data_used() == 0


def test_a_base_grows_for_images_to_come_and_those_that_are_there_stay(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    need_root()
    archive = layout(tmp_path / "web", {"1": [make_tar(file("hello", "hello"))]})
    base.create(pool, "base", "ext4", "1 GiB")
    (before,) = loading.load(pool, archive, on="base")
    with pytest.raises(nbdthin.Invalid, match=r"'base' has 1 GiB already, and a base never shrinks"):
        base.grow(pool, "base", "512 MiB")
    assert base.grow(pool, "base", "2 GiB").file_system.size == 2 * GiB
    (after,) = loading.load(pool, archive, on="base")
    assert (before.id, before.file_system.size, after.file_system.size) == (after.id, GiB, 2 * GiB)
    assert [image.tags for image in Catalogue.of(pool).images] in ([(), ("web:1",)], [("web:1",), ()])
    for image in (before, after):
        check_file_system(daemon.uri(image.name), "ext4")
        with devices.mounted(pool, image.name) as root:
            assert (root / "hello").read_text() == "hello"


def test_names_of_bases_are_taken_once(pool: nbdthin.Client) -> None:
    base.create(pool, "base", size="64 MiB")
    with pytest.raises(nbdthin.Exists, match="there is a base 'base' already"):
        base.create(pool, "base")
    with pytest.raises(nbdthin.NotFound, match="no base 'other'"):
        base.grow(pool, "other", "1 GiB")
    base.remove(pool, "base")
    assert pool.list() == []
