"""A Debian image made by umoci, through all of its life: loaded, run, changed, committed, saved, unpacked again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from nbdthin.images import base, committing, containers, loading, saving, store
from nbdthin.images.store import Catalogue
from nbdthin.units import GiB
from tests.clients.daemon import Daemon, run
from tests.clients.hostmount import check_file_system
from tests.clients.test_debian_root import debootstrap, dpkg_complaints
from tests.conftest import need, need_root
from tests.images.trees import tree

PACKAGE = "iputils-ping"  # small, and /usr/bin/ping has a file capability

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with three layers: a Debian, a package that apt installed, an edit with deletions."""
    need_root()
    home = tmp_path_factory.mktemp("image")
    umoci = need("umoci")
    layout, bundle, root = home / "debian", home / "bundle", home / "bundle/rootfs"
    run(umoci, "init", "--layout", layout)
    run(umoci, "new", "--image", f"{layout}:12")
    for step in (debootstrap, install, edit):
        run(umoci, "unpack", "--image", f"{layout}:12", bundle)
        step(root)
        run(umoci, "repack", "--image", f"{layout}:12", bundle)
        shutil.rmtree(bundle)
    run(umoci, "config", "--image", f"{layout}:12", "--config.cmd", "/bin/sh", "--config.env", "GREETING=hello")
    return layout


def install(root: Path) -> None:
    with as_this_machine_resolves(root):
        run("chroot", root, "apt-get", "-q", "update")
        run("chroot", root, "apt-get", "-qy", "--no-install-recommends", "install", PACKAGE)
        run("chroot", root, "apt-get", "clean")


@contextlib.contextmanager
def as_this_machine_resolves(root: Path) -> Iterator[None]:
    """Names, and whatever else this machine's apt needs to reach its mirror."""
    places = [
        path for path in ("etc/resolv.conf", "etc/hosts", "etc/apt/apt.conf.d/99proxy") if Path("/", path).exists()
    ]
    for path in places:
        shutil.copy(Path("/", path), root / path)
    yield
    for path in places:
        (root / path).unlink()


def edit(root: Path) -> None:
    shutil.rmtree(root / "usr/share/doc")
    (root / "usr/share/doc").mkdir(mode=0o700)  # opaque: what was in it is gone
    (root / "usr/share/doc/new").write_text("new\n")
    (root / "etc/motd").unlink()
    (root / "etc/motd").symlink_to("../srv/motd")
    (root / "srv/motd").write_text("edited\n")
    os.chown(root / "srv/motd", 1000, 1001)
    os.link(root / "srv/motd", root / "srv/motd-again")
    with (root / "srv/sparse").open("wb") as sparse:
        sparse.truncate(GiB)
        sparse.seek(GiB // 2)
        sparse.write(b"in the middle")
    os.mkfifo(root / "srv/pipe")
    os.setxattr(root / "srv/motd", "user.color", b"red\0blue")


def unpacked(layout: Path, tag: str, where: Path) -> Path:
    run(need("umoci"), "unpack", "--image", f"{layout}:{tag}", where)
    return where / "rootfs"


def test_a_debian_image_goes_in_runs_changes_and_comes_out_file_by_file(
    archive: Path, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    base.create(pool, "base", "ext4", "4 GiB")
    (image,) = loading.load(pool, archive, on="base")
    assert (image.tags, len(image.layers)) == (("debian:12",), 3)
    assert [image.tags for image in Catalogue.of(pool).images] == [("debian:12",)]
    wanted = tree(unpacked(archive, "12", tmp_path / "loaded"))
    assert len(wanted) > 5000
    assert any("security.capability" in dict(entry.xattrs) for entry in wanted.values())
    with devices.mounted(pool, image.name, read_only=True) as root:
        assert tree(root) == wanted
        assert (root / "srv/sparse").stat().st_blocks * 512 < GiB // 2

    containers.create(pool, "debian:12", "web", "untouched")
    root = containers.start(pool, "web")
    assert run(need("chroot"), root, "/bin/sh", "-c", ". /etc/os-release; echo $VERSION_ID") == "12\n"
    assert run("chroot", root, "dpkg-query", "-W", "-f", "${Status}", PACKAGE) == "install ok installed"
    assert {line for line in dpkg_complaints(root).splitlines() if "/usr/share/doc/" not in line} == set()
    run("chroot", root, "dpkg", "--purge", PACKAGE)
    run("chroot", root, "useradd", "--create-home", "somebody")
    (root / "srv/motd").write_text("changed\n")
    found = {os.fsdecode(change.path): change.kind for change in containers.diff(pool, "web")}
    assert {path: found.get(path) for path in ("usr/bin/ping", "home/somebody", "srv/motd", "etc", "usr/bin/dpkg")} == {
        "usr/bin/ping": "D",
        "home/somebody": "A",
        "srv/motd": "C",
        "etc": "C",
        "usr/bin/dpkg": None,
    }
    assert containers.diff(pool, "untouched") == []

    changed = committing.commit(pool, "web", "debian:web")
    live = tree(root)
    containers.stop(pool, "web")
    check_file_system(daemon.uri(image.name), "ext4")
    saved = tmp_path / "saved"
    identity = saving.save(pool, "debian:web", saved)
    assert identity != changed.id
    assert tree(unpacked(saved, "debian:web", tmp_path / "again")) == live
    config = json.loads(run(need("skopeo"), "inspect", "--config", f"oci:{saved}:debian:web"))
    assert config["config"]["Env"][-1] == "GREETING=hello"
    assert len(config["rootfs"]["diff_ids"]) == 4
    run("skopeo", "copy", "--quiet", f"oci:{saved}:debian:web", f"oci:{tmp_path / 'copied'}:web")

    (again,) = loading.load(pool, saved, on="base", tags=["again"])
    with devices.mounted(pool, again.name, read_only=True) as root:
        assert tree(root) == live
    containers.remove(pool, "web", "untouched")
    store.remove(pool, "again", "debian:web", "debian:12")
    assert [row.name for row in pool.list()] == ["base/base"]


def test_an_image_runs_in_runc(archive: Path, tmp_path: Path, pool: nbdthin.Client) -> None:
    """With the root that `container start` prints, and nothing else of an image."""
    base.create(pool, size="4 GiB")
    loading.load(pool, archive)
    containers.create(pool, "debian:12", "web")
    root = containers.start(pool, "web")
    try:
        run(need("runc"), "spec", "--bundle", tmp_path)
        spec = json.loads((tmp_path / "config.json").read_text())
        spec["root"] = {"path": str(root), "readonly": False}
        spec["process"]["terminal"] = False
        spec["process"]["args"] = ["sh", "-c", "cat /srv/motd; echo ran > /srv/ran"]
        (tmp_path / "config.json").write_text(json.dumps(spec))
        done = subprocess.run(
            ["runc", "--root", tmp_path / "runc", "run", "--bundle", tmp_path, "web"], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "edited\n"), done.stderr
        assert (root / "srv/ran").read_text() == "ran\n"
    finally:
        containers.stop(pool, "web")
