"""Trees compared, and the difference as a layer: applied to the old tree it gives the new one."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdthin.errors import Invalid
from nbdthin.images.changes import changes, write_layer
from nbdthin.images.unpack import apply
from tests.conftest import need, need_root
from tests.images.trees import tree


def layer(old: Path | None, new: Path) -> bytes:
    tar = io.BytesIO()
    write_layer(changes(old, new), new, tar.write)
    return tar.getvalue()


def listed(old: Path | None, new: Path) -> list[str]:
    """As `docker diff` has it."""
    return [f"{change.kind} /{os.fsdecode(change.path)}" for change in changes(old, new) if change.path]


def copy(source: Path, target: Path) -> None:
    """As a clone is: the same but for what the file system gives, and there all metadata has to be compared."""
    subprocess.run(["cp", "-a", source, target], check=True)


def touch_back(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    old = tmp_path / "old"
    (old / "etc/sub").mkdir(parents=True)
    (old / "etc/passwd").write_text("root")
    (old / "etc/sub/kept").write_text("kept")
    (old / "usr/bin").mkdir(parents=True)
    (old / "usr/bin/perl").write_bytes(b"p" * 10_000)
    os.link(old / "usr/bin/perl", old / "usr/bin/perl5")
    (old / "link").symlink_to("etc/passwd")
    os.mkfifo(old / "fifo")
    return old


# Name: what a shell does in a copy of `old`, what `docker diff` shows of it.
CHANGES: dict[str, tuple[str, list[str]]] = {
    "nothing": (":", []),
    "a new file": ("echo x > etc/new", ["C /etc", "A /etc/new"]),
    "a new directory with something in it": (
        "mkdir -p srv/a; touch srv/a/b srv/c",
        ["A /srv", "A /srv/a", "A /srv/a/b", "A /srv/c"],
    ),
    "a deleted file": ("rm etc/passwd", ["C /etc", "D /etc/passwd"]),
    "a deleted directory": ("rm -r etc", ["D /etc"]),
    "other content": ("echo toor > etc/passwd", ["C /etc", "C /etc/passwd"]),
    "a mode": ("chmod 4755 etc/passwd", ["C /etc", "C /etc/passwd"]),
    "a directory's mode": ("chmod 700 etc/sub", ["C /etc", "C /etc/sub"]),
    "an owner": ("chown -h 5:6 link", ["C /link"]),
    "a time alone": ("touch -d @1 etc/passwd", ["C /etc", "C /etc/passwd"]),
    "an attribute": ("setfattr -n user.a -v 0xff00 etc/sub", ["C /etc", "C /etc/sub"]),
    "another target": ("ln -sfn etc/passwx link", ["C /link"]),
    "a file in a directory's place": ("rm -r etc/sub; echo x > etc/sub", ["C /etc", "C /etc/sub"]),
    "a directory in a file's place": (
        "rm etc/passwd; mkdir etc/passwd; touch etc/passwd/x",
        ["C /etc", "C /etc/passwd", "A /etc/passwd/x"],
    ),
    "a directory in a directory's place": (
        "rm -r etc; mkdir etc; touch etc/other",
        ["C /etc", "A /etc/other", "D /etc/passwd", "D /etc/sub"],
    ),
    "a device": ("mknod -m 666 null c 1 3", ["A /null"]),
    "another device": ("rm fifo; mknod fifo b 7 300", ["C /fifo"]),
    "a hard link to what is there": ("ln etc/passwd etc/shadow", ["C /etc", "C /etc/passwd", "A /etc/shadow"]),
    "one name less": ("rm usr/bin/perl5", ["C /usr", "C /usr/bin", "D /usr/bin/perl5"]),
    "a name moved": (
        "mv usr/bin/perl5 etc/perl",
        ["C /etc", "A /etc/perl", "C /usr", "C /usr/bin", "C /usr/bin/perl", "D /usr/bin/perl5"],
    ),
    "a hard link made a copy": (
        "rm usr/bin/perl5; cp -p usr/bin/perl usr/bin/perl5",
        ["C /usr", "C /usr/bin", "C /usr/bin/perl", "C /usr/bin/perl5"],
    ),
    "names of any bytes": (r"ln -s $(printf '\376') $(printf 'n\377n')", ["A /n\udcffn"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_shown_and_makes_the_new_tree_of_the_old_one(case: str, old: Path, tmp_path: Path) -> None:
    need_root()
    change, shown = CHANGES[case]
    new, applied = tmp_path / "new", tmp_path / "applied"
    copy(old, new)
    need("setfattr")
    subprocess.run(["sh", "-ec", change], cwd=new, check=True)
    assert listed(old, new) == shown
    copy(old, applied)
    apply([layer(old, new)], applied)
    assert tree(applied) == tree(new)
    assert changes(new, applied) == []


def test_sockets_are_left_out(old: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(old, os.O_PATH)  # a short name, as such names have to be
        made.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    new = tmp_path / "new"
    new.mkdir()
    apply([layer(None, old)], new)
    assert not (new / "socket").exists()
    assert listed(new, old) == listed(old, new) == []


def test_of_a_clone_only_what_changed_is_read(old: Path, tmp_path: Path) -> None:
    need_root()
    disk, clone = tmp_path / "disk", tmp_path / "clone"
    disk.touch()
    os.truncate(disk, 32 << 20)
    subprocess.run([need("mkfs.ext4"), "-q", disk], check=True)
    with mounted(disk, tmp_path / "first") as root:
        subprocess.run(["cp", "-a", f"{old}/.", root], check=True)
        for path in root.rglob("*"):
            os.utime(path, ns=(0, 10**9), follow_symlinks=False)  # reading sets the first
    shutil.copy(disk, clone)
    with mounted(disk, tmp_path / "before") as before, mounted(clone, tmp_path / "after") as after:
        assert changes(before, after) == []
        (after / "etc/sub/kept").write_text("made")  # as long as it was, and at the same time
        os.utime(after / "etc/sub/kept", ns=(0, 10**9))
        os.setxattr(after / "usr/bin/perl", "user.note", b"x")
        assert listed(before, after) == [
            "C /etc",
            "C /etc/sub",
            "C /etc/sub/kept",
            "C /usr",
            "C /usr/bin",
            "C /usr/bin/perl",
            "C /usr/bin/perl5",
        ]
        assert (before / "etc/sub/kept").stat().st_atime_ns != 0  # it was read, as nothing else told
        assert (before / "etc/passwd").stat().st_atime_ns == (after / "etc/passwd").stat().st_atime_ns == 0


def test_a_change_time_of_whole_seconds_proves_nothing(tmp_path: Path) -> None:
    need_root()
    disks = tmp_path / "one", tmp_path / "two"
    for disk in disks:
        source = disk.with_suffix(".source")
        source.mkdir()
        (source / "file").write_text(disk.name)
        for path in (source / "file", source):
            os.utime(path, ns=(0, 10**9))
        disk.touch()
        os.truncate(disk, 8 << 20)
        subprocess.run([need("mkfs.ext4"), "-q", "-I", "128", "-d", source, disk], check=True, stderr=subprocess.PIPE)
        subprocess.run(["debugfs", "-w", "-R", "set_inode_field /file ctime 20200101000000", disk], check=True)
    with mounted(disks[0], tmp_path / "before") as before, mounted(disks[1], tmp_path / "after") as after:
        statuses = [(root / "file").stat() for root in (before, after)]
        assert statuses[0].st_ctime_ns == statuses[1].st_ctime_ns
        assert statuses[0].st_ino == statuses[1].st_ino
        assert listed(before, after) == ["C /file"]


@contextmanager
def mounted(disk: Path, place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run([need("mount"), "-o", "loop,relatime", disk, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_content_that_changed_behind_its_size_and_time_is_found(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    copy(old, new)
    status = (new / "etc/passwd").stat()
    (new / "etc/passwd").write_text("r00t")
    touch_back(new / "etc/passwd", status)
    assert listed(old, new) == ["C /etc", "C /etc/passwd"]


def test_a_tree_gives_the_same_bytes_each_time(old: Path, tmp_path: Path) -> None:
    copy(old, tmp_path / "copy")
    assert layer(None, old) == layer(None, tmp_path / "copy")


def test_times_attributes_and_capabilities_survive(tmp_path: Path) -> None:
    need_root()
    old, new, applied = (tmp_path / name for name in ("old", "new", "applied"))
    for path in (old, new, applied):
        path.mkdir()
    for name, mtime in (("now", 1_700_000_000_123_456_789), ("before", -1_500_000_000), ("long ago", -(10**9))):
        (new / name).write_text(name)
        os.utime(new / name, ns=(0, mtime))
    os.setxattr(new / "now", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.setxattr(new / "now", "user.note", b"line\nline\0\xff=")
    os.setxattr(new, "trusted.root", b"")
    apply([layer(old, new)], applied)
    assert tree(applied) == tree(new)


def test_large_holes_are_kept_and_small_ones_written(tmp_path: Path) -> None:
    old, new, applied = (tmp_path / name for name in ("old", "new", "applied"))
    for path in (old, new, applied):
        path.mkdir()
    for name, positions, size in (
        ("large", (0, 5 << 30), (1 << 40) + 7),
        ("end", (123_456,), 123_456 + 4),
        ("empty", (), 1 << 30),
        ("small", (100_000,), 1 << 17),
    ):
        with (new / name).open("wb") as file:
            for position in positions:
                file.seek(position)
                file.write(b"data")
            file.truncate(size)
    tar = layer(old, new)
    assert len(tar) < 1 << 20
    apply([tar], applied)
    for name in ("large", "end", "empty", "small"):
        assert (applied / name).stat().st_size == (new / name).stat().st_size
        assert (applied / name).stat().st_blocks <= (new / name).stat().st_blocks
    with (applied / "large").open("rb") as file:
        assert file.read(8) == b"data" + bytes(4)
        file.seek(5 << 30)
        assert file.read(5) == b"data" + bytes(1)
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        assert {member.name for member in members if member.issparse()} == {"large", "empty"}


def test_a_file_of_very_many_holes_is_written_whole(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    with (new / "comb").open("wb") as file:
        for position in range(0, 300 << 20, 2 << 12):
            file.seek(position)
            file.write(b"tooth")
    (tmp_path / "applied").mkdir()
    apply([layer(None, new)], tmp_path / "applied")
    subprocess.run(["cmp", new / "comb", tmp_path / "applied/comb"], check=True)


def test_what_a_layer_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    for number, name in enumerate((".wh.file", ".wh..wh..opq")):
        new = tmp_path / str(number)
        new.mkdir()
        (new / name).touch()
        with pytest.raises(Invalid, match=rf"^{name}: a name that begins with \.wh\."):
            layer(None, new)
    new = tmp_path / "attribute"
    new.mkdir()
    (new / "file").touch()
    os.setxattr(new / "file", "user.a=b", b"c")
    with pytest.raises(Invalid, match=r"file: its attribute 'user.a=b'"):
        layer(None, new)


def test_tar_unpacks_a_layer_of_ours_to_the_same_tree(old: Path, tmp_path: Path) -> None:
    need_root()
    (old / "sparse").touch()
    os.truncate(old / "sparse", 3 << 20)
    (old / os.fsdecode(b"\xff")).write_text("x")
    os.setxattr(old / "sparse", "user.note", b"\xff\0")
    (tmp_path / "theirs").mkdir()
    command = [need("tar"), "--xattrs", "--xattrs-include=*", "-xpf", "-", "-C", str(tmp_path / "theirs")]
    subprocess.run(command, input=layer(None, old), check=True)
    assert tree(tmp_path / "theirs") == tree(old)


# -- any tree, any change

NAME = st.sampled_from(["a", "b", "c", "ä", os.fsdecode(b"\xff"), "n" * 150, "x y\n"])
PATH = st.lists(NAME, min_size=1, max_size=3).map("/".join)
STEP = st.one_of(
    st.tuples(st.just("file"), PATH, st.binary(max_size=20)),
    st.tuples(st.just("directory"), PATH, st.sampled_from([0o755, 0o1777, 0o500])),
    st.tuples(st.just("symlink"), PATH, st.text("ab/.", min_size=1, max_size=150)),
    st.tuples(st.just("link"), PATH, PATH),
    st.tuples(st.just("remove"), PATH, st.none()),
    st.tuples(st.just("owner"), PATH, st.integers(0, 2**32 - 2)),
    st.tuples(st.just("time"), PATH, st.integers(-(2**31) * 10**9, 2**33 * 10**9)),
    st.tuples(st.just("attribute"), PATH, st.binary(max_size=20)),
)


def take(root: Path, step: tuple[str, str, object]) -> None:
    """One step of making a tree; nothing where it cannot be taken."""
    what, name, value = step
    path = root / name
    try:
        if what in ("file", "directory", "symlink", "link"):
            for above in reversed(path.relative_to(root).parents):
                if (root / above).is_symlink():
                    return
            path.parent.mkdir(parents=True, exist_ok=True)
        if what == "file":
            assert isinstance(value, bytes)
            if not path.is_symlink():
                path.write_bytes(value)
        elif what == "directory":
            assert isinstance(value, int)
            path.mkdir(mode=value)
        elif what == "symlink":
            path.symlink_to(str(value))
        elif what == "link":
            os.link(root / str(value), path, follow_symlinks=False)
        elif what == "remove":
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        elif any((root / above).is_symlink() for above in path.relative_to(root).parents):
            return
        elif what == "owner":
            assert isinstance(value, int)
            os.chown(path, value, value, follow_symlinks=False)
        elif what == "time":
            assert isinstance(value, int)
            os.utime(path, ns=(value, value), follow_symlinks=False)
        elif not path.is_symlink():
            assert isinstance(value, bytes)
            os.setxattr(path, "user.a", value)
    except OSError:
        pass


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.lists(STEP, max_size=12), after=st.lists(STEP, max_size=12))
def test_any_change_of_any_tree_comes_out_of_its_layer(
    before: list[tuple[str, str, object]], after: list[tuple[str, str, object]], tmp_path: Path
) -> None:
    need_root()
    old, new, applied = (tmp_path / name for name in ("old", "new", "applied"))
    for path in (old, new, applied):
        shutil.rmtree(path, ignore_errors=True)
    old.mkdir()
    for step in before:
        take(old, step)
    copy(old, new)
    for step in after:
        take(new, step)
    applied.mkdir()
    apply([layer(None, old)], applied)
    assert tree(applied) == tree(old)
    apply([layer(old, new)], applied)
    assert tree(applied) == tree(new)
    assert changes(new, applied) == []
