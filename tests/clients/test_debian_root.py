"""The main job on real input: a Debian root file system, snapshotted, cloned twice, both clones changed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clients.daemon import Daemon, run
from tests.clients.hostmount import check_file_system, make_file_system, mounted_export
from tests.conftest import need, need_root

SUITE = "bookworm"
PACKAGES = Path.home() / ".cache/nbdthin-debs"  # debootstrap verifies what it finds there

pytestmark = pytest.mark.slow


class Entry(NamedTuple):
    """What a file is, its times left out: a change that is made twice is made at two times."""

    mode: int
    owner: tuple[int, int]
    size: int  # 0 for a directory, whose size is the file system's affair
    content: str  # sha256 of a file, target of a link, number of a device


def tree(root: Path) -> dict[str, Entry]:
    """Everything below `root`, by its path."""
    entries = {}
    waiting = [root]
    while waiting:
        with os.scandir(waiting.pop()) as directory:
            for item in directory:
                status = item.stat(follow_symlinks=False)
                size, content = 0, str(status.st_rdev)
                if item.is_symlink():
                    content = os.readlink(item.path)
                elif item.is_dir(follow_symlinks=False):
                    waiting.append(Path(item.path))
                elif item.is_file(follow_symlinks=False):
                    size = status.st_size
                    with open(item.path, "rb") as file:
                        content = hashlib.file_digest(file, "sha256").hexdigest()
                path = os.path.relpath(item.path, root)
                entries[path] = Entry(status.st_mode, (status.st_uid, status.st_gid), size, content)
    entries.pop("lost+found", None)  # the file system's own
    return entries


def mirror() -> str:
    """Where this machine's own apt finds Debian."""
    urls = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian").split()
    found = [url for url in urls if re.search("/debian/?$", url)]
    return found[0] if found else "http://deb.debian.org/debian"


def debootstrap(root: Path) -> None:
    PACKAGES.mkdir(parents=True, exist_ok=True)
    run(need("debootstrap"), "--variant=minbase", f"--cache-dir={PACKAGES}", SUITE, root, mirror())


def become_a_web_server(root: Path) -> None:
    (root / "srv/www").mkdir(parents=True)
    for number in range(200):
        (root / f"srv/www/page{number}.html").write_text(f"<p>{number}</p>\n" * number)
    os.chown(root / "srv/www", 33, 33)
    (root / "etc/hostname").write_text("web\n")
    (root / "etc/motd").unlink()
    (root / "etc/motd").symlink_to("../srv/www/page7.html")
    shutil.rmtree(root / "usr/share/doc")
    with (root / "usr/bin/perl").open("r+b") as big:  # a few bytes inside
        big.seek(1_000_000)
        big.write(b"changed in place")


def become_a_builder(root: Path) -> None:
    (root / "etc/hostname").write_text("builder\n")
    with (root / "etc/passwd").open("a") as passwd:
        passwd.write("builder:x:1000:1000::/home/builder:/bin/sh\n")
    home = root / "home/builder"
    home.mkdir(mode=0o750)
    (home / "object").write_bytes(bytes(range(256)) * 40_000)
    os.link(home / "object", home / "same-object")
    os.chown(home, 1000, 1000)
    (root / "usr/bin/perl").rename(root / "usr/bin/perl-renamed")
    (root / "usr/bin/apt").chmod(0o700)
    os.truncate(root / "etc/login.defs", 100)


def dpkg_complaints(root: Path) -> str:
    """What Debian's own program, run in there, finds wrong with the files of its packages."""
    done = subprocess.run([need("chroot"), root, "/usr/bin/dpkg", "--verify"], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_debian_root_and_two_changed_clones_are_right_file_by_file(daemon: Daemon, tmp_path: Path) -> None:
    need_root()
    uri = daemon.create("debian:12", "4 GiB")
    make_file_system(uri, "ext4")
    with mounted_export(uri) as root:
        debootstrap(root)
    plain = {name: tmp_path / name for name in ("debian", "web", "builder")}
    with mounted_export(uri) as root:
        # The same changes are made to plain copies: what the clones must be does not come from nbdthin.
        for copy in plain.values():
            run("cp", "-a", root, copy)
    image = daemon.snapshot("debian:12", "debian:12@1")
    used = daemon.data_used()
    clones = {name: daemon.clone("debian:12@1", name) for name in ("web", "builder")}
    assert daemon.data_used() == used
    for name, change in (("web", become_a_web_server), ("builder", become_a_builder)):
        change(plain[name])
        with mounted_export(clones[name]) as root:
            change(root)

    expected = {name: tree(path) for name, path in plain.items()}
    assert len(expected["debian"]) > 5000
    assert expected["debian"] != expected["web"] != expected["builder"]
    with mounted_export(image, "ro", "noload", read_only=True) as root:
        assert tree(root) == expected["debian"]
        # The packages' own md5sums: debootstrap's files came through, not only the copies of them.
        assert dpkg_complaints(root) == ""
    for name, clone in clones.items():
        with mounted_export(clone, "ro", "noload", read_only=True) as root:
            assert tree(root) == expected[name], name
        check_file_system(clone, "ext4")
    with mounted_export(uri, "ro", "noload", read_only=True) as root:
        assert tree(root) == expected["debian"]
    check_file_system(image, "ext4")
