"""Images as one layer, for who is not root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from nbdthin.images import base, committing, containers, flattening, loading, saving, store
from nbdthin.images.store import Catalogue
from nbdthin.units import MiB
from tests.clients.daemon import Daemon, nbdthin_command, run
from tests.clients.hostmount import check_file_system
from tests.conftest import need, need_root
from tests.images.made import attributed, device, file, layout, owned
from tests.images.trees import directory, make_tar, tree

NOBODY = 65534
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep, as the kernel keeps it
LOWER = make_tar(
    owned(directory(".", 0o750), 5, 6),
    directory("etc"),
    file("etc/name", "lower\n"),
    file("etc/gone", "gone\n"),
    owned(file("etc/setuid", "#!", 0o4711), 7, 8),
)
UPPER = make_tar(
    file("etc/.wh.gone"),
    owned(directory("srv", 0o700), 33, 33),
    owned(file("srv/page", "<p>"), 33, 34),
    device("etc/null", 1, 3),
    attributed(file("srv/ping", "#!", 0o755), {"user.color": b"red", "security.capability": NET_RAW}),
    file("srv/zeroes", bytes(3 * MiB)),
)


class Unprivileged(Daemon):
    """A daemon, and verbs, of a user who is not root."""

    def _handing_over(self) -> list[str]:
        return as_nobody()


def as_nobody() -> list[str]:
    return [need("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


@pytest.fixture
def unprivileged() -> Iterator[Unprivileged]:
    need_root()  # to become another
    need("fakeroot")
    home = Path(tempfile.mkdtemp())  # others cannot enter pytest's own
    daemon = Unprivileged(home)
    for path in (home, daemon.config):
        os.chown(path, NOBODY, NOBODY)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(home)


def run_verb(daemon: Daemon, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NBDTHIN_SOCKET": str(daemon.control), "HOME": str(daemon.directory)}
    command = [*as_nobody(), *nbdthin_command(*arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_an_image_flattened_without_root_is_what_root_unpacks(unprivileged: Unprivileged) -> None:
    archive = layout(unprivileged.directory / "web", {"1": [LOWER, UPPER]})
    refused = run_verb(unprivileged, "image", "load", archive)
    assert refused.returncode == 1 and "--flatten" in refused.stderr
    done = run_verb(unprivileged, "image", "load", archive, "--flatten", "--tag", "flat")
    assert (done.returncode, done.stderr) == (0, "")
    with unprivileged.connect() as pool:
        loading.load(pool, archive)  # as root
        flat, layered = (Catalogue.of(pool).find(tag) for tag in ("flat", "web:1"))
        assert flat.id == layered.id
        assert (len(flat.layers), len(layered.layers)) == (1, 2)
        with (
            devices.mounted(pool, flat.name, read_only=True) as one,
            devices.mounted(pool, layered.name, read_only=True) as other,
        ):
            assert tree(one) == tree(other)
            assert (one / "srv/page").stat().st_gid == 34
            assert os.getxattr(one / "srv/ping", "security.capability") == NET_RAW
            assert (one / "srv/zeroes").stat().st_blocks == 0
        check_file_system(unprivileged.uri(flat.name), "ext4")
        again = run_verb(unprivileged, "image", "load", archive, "--flatten")
        assert again.returncode == 0
        assert Catalogue.of(pool).find("web:1").name == flat.name
    create = run_verb(unprivileged, "container", "create", "flat", "a", "b")
    assert (create.returncode, create.stderr) == (0, "")


def test_a_hostile_archive_is_refused_by_its_members_name_and_leaves_nothing(unprivileged: Unprivileged) -> None:
    archive = layout(unprivileged.directory / "bad", {"1": [LOWER, make_tar(file("etc/../../escape", "x"))]})
    done = run_verb(unprivileged, "image", "load", archive, "--flatten")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "etc/../../escape" in line
    with unprivileged.connect() as pool:
        assert pool.list() == []


def test_root_flattens_too_and_the_base_gives_size_and_options(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    need_root()
    base.create(pool, "base", "ext4", "64 MiB", options="-I 512")
    (image,) = flattening.load(pool, layout(tmp_path / "web", {"1": [LOWER, UPPER]}), on="base")
    assert image.file_system.size == 64 * MiB
    attached = devices.attach(pool, image.name)
    try:
        facts = run("dumpe2fs", "-h", attached.path)
    finally:
        devices.detach(attached.path)
    assert "Inode size:\t          512\n" in facts
    containers.create(pool, "web:1", "a")
    root = containers.start(pool, "a")
    assert sorted(os.listdir(root)) == ["etc", "srv"]
    (root / "srv/more").write_text("more")
    committing.commit(pool, "a", "web:2")
    containers.stop(pool, "a")
    saving.save(pool, "web:2", tmp_path / "saved")
    (again,) = loading.load(pool, tmp_path / "saved", on="base")
    assert len(again.layers) == len(store.history(pool, again.name)) == 2
    with devices.mounted(pool, again.name, read_only=True) as root:
        assert sorted(os.listdir(root / "srv")) == ["more", "page", "ping", "zeroes"]
    base.create(pool, "other", "xfs", "512 MiB")
    with pytest.raises(nbdthin.Invalid, match="only ext4"):
        flattening.load(pool, layout(tmp_path / "more", {"1": [UPPER]}), on="other")
