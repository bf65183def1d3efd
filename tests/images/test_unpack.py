"""Layers applied to a directory: what the members say is there afterwards, and what the whiteouts say is not."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdthin.errors import Error, NoSpace
from nbdthin.images.unpack import Applied, apply
from tests.conftest import need, need_root
from tests.images.trees import SECOND, Member, directory, hardlink, make_tar, symlink, tree

BLOCK = 4096


def names(root: Path) -> set[str]:
    return set(tree(root)) - {"."}


# -- metadata


def test_every_kind_of_member_has_its_metadata(tmp_path: Path) -> None:
    need_root()
    apply(
        [
            make_tar(
                directory("./", 0o750, owner=(1, 2), mtime=5),
                directory("dir", 0o1777, mtime=7),
                Member("dir/file", b"content", mode=0o6755, owner=(1000, 4_000_000_000), mtime=-9),
                hardlink("link", "dir/file"),
                symlink("symlink", "/anywhere/at all")._replace(owner=(7, 8), mtime=11),
                Member("null", type=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
                Member("disk", type=tarfile.BLKTYPE, device=(259, 70_000), mode=0o660, owner=(0, 6)),
                Member("fifo", type=tarfile.FIFOTYPE, mode=0o622),
            )
        ],
        tmp_path,
    )
    found = tree(tmp_path)
    assert (found["."].mode, found["."].owner, found["."].mtime) == (stat.S_IFDIR | 0o750, (1, 2), 5 * SECOND)
    assert (found["dir"].mode, found["dir"].mtime) == (stat.S_IFDIR | 0o1777, 7 * SECOND)
    file = found["dir/file"]
    assert (file.mode, file.owner, file.mtime) == (stat.S_IFREG | 0o6755, (1000, 4_000_000_000), -9 * SECOND)
    assert found["link"] == file
    link = found["symlink"]
    assert (link.content, link.owner, link.mtime) == ("/anywhere/at all", (7, 8), 11 * SECOND)
    assert (found["null"].mode, found["null"].content) == (stat.S_IFCHR | 0o666, str(os.makedev(1, 3)))
    disk = found["disk"]
    assert (disk.mode, disk.owner) == (stat.S_IFBLK | 0o660, (0, 6))
    assert disk.content == str(os.makedev(259, 70_000))
    assert found["fifo"].mode == stat.S_IFIFO | 0o622


@pytest.mark.parametrize(
    ("text", "mtime"),
    [
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("1700000000.5", 1_700_000_000_500_000_000),
        ("-1.25", -1_250_000_000),
        ("0.0000000019", 1),
        ("12.", 12_000_000_000),
    ],
)
def test_times_are_exact_to_the_nanosecond(text: str, mtime: int, tmp_path: Path) -> None:
    apply([make_tar(directory("dir", pax=(("mtime", text),)), Member("file", pax=(("mtime", text),)))], tmp_path)
    assert tree(tmp_path)["file"].mtime == tree(tmp_path)["dir"].mtime == mtime


def test_attributes_are_set_but_for_those_of_the_host(tmp_path: Path) -> None:
    need_root()
    capability = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw+ep
    pax = (
        ("SCHILY.xattr.security.capability", capability.decode("utf-8", "surrogateescape")),
        ("SCHILY.xattr.user.note", "a=b\nc"),
        ("SCHILY.xattr.trusted.overlay.opaque", "y"),
        ("SCHILY.xattr.security.selinux", "system_u:object_r:bin_t:s0"),
    )
    apply([make_tar(Member("ping", b"x", owner=(5, 5), pax=pax), directory("dir", pax=pax[1:]))], tmp_path)
    found = tree(tmp_path)
    assert found["ping"].xattrs == (("security.capability", capability), ("user.note", b"a=b\nc"))
    assert found["dir"].xattrs == (("user.note", b"a=b\nc"),)
    apply([make_tar(directory("dir"), symlink("link", "x")._replace(pax=(("SCHILY.xattr.trusted.a", "b"),)))], tmp_path)
    assert tree(tmp_path)["dir"].xattrs == ()
    assert tree(tmp_path)["link"].xattrs == (("trusted.a", b"b"),)


def test_names_are_any_bytes_and_of_any_length(tmp_path: Path) -> None:
    raw = os.fsdecode(b"not \xff utf-8")
    long = "/".join(["d" * 200] * 15) + "/" + "f" * 255
    apply([make_tar(Member(raw, b"1"), Member(long, b"2"), Member("ümläut", b"3"), symlink("s", long))], tmp_path)
    assert (tmp_path / raw).read_bytes() + (tmp_path / long).read_bytes() + (tmp_path / "ümläut").read_bytes() == b"123"
    assert os.readlink(tmp_path / "s") == long


def test_a_directory_that_only_its_owner_may_not_write_is_filled(tmp_path: Path) -> None:
    apply([make_tar(directory("dir", 0o555), Member("dir/file", b"x"), directory("dir/sub", 0))], tmp_path)
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o555
    assert stat.S_IMODE((tmp_path / "dir/sub").stat().st_mode) == 0


def test_directories_have_their_times_whatever_is_put_into_them(tmp_path: Path) -> None:
    apply([make_tar(directory("a", mtime=3), directory("a/b", mtime=4), Member("a/b/file"))], tmp_path)
    apply([make_tar(Member("a/more"), Member("a/b/.wh.file"))], tmp_path)
    assert (tree(tmp_path)["a"].mtime, tree(tmp_path)["a/b"].mtime) == (3 * SECOND, 4 * SECOND)


def test_parents_that_no_layer_has_are_made_as_roots_and_open_to_all(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        apply([make_tar(Member("a/b/file", owner=(9, 9)))], tmp_path)
    finally:
        os.umask(old)
    assert (tree(tmp_path)["a/b"].mode, tree(tmp_path)["a/b"].owner) == (stat.S_IFDIR | 0o755, (0, 0))


def test_the_setgid_bit_of_a_directory_below_changes_no_owner(tmp_path: Path) -> None:
    need_root()
    apply([make_tar(directory("dir", 0o2775, owner=(3, 4)))], tmp_path)
    apply([make_tar(Member("dir/file"), directory("dir/sub"), symlink("dir/link", "x"), Member("dir/new/x"))], tmp_path)
    found = tree(tmp_path)
    assert {found[name].owner for name in ("dir/file", "dir/sub", "dir/link", "dir/new")} == {(0, 0)}
    assert found["dir/sub"].mode == found["dir/new"].mode == stat.S_IFDIR | 0o755


def test_the_default_access_list_of_a_directory_below_changes_nothing(tmp_path: Path) -> None:
    need_root()
    entries = [(1, 7, -1), (2, 7, 1234), (4, 5, -1), (16, 7, -1), (32, 0, -1)]  # tag, rights, user
    access_list = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    text = access_list.decode("utf-8", "surrogateescape")
    apply([make_tar(directory("dir", pax=(("SCHILY.xattr.system.posix_acl_default", text),)))], tmp_path)
    assert tree(tmp_path)["dir"].xattrs == (("system.posix_acl_default", access_list),)
    members = [
        Member("dir/file", mode=0o640),
        directory("dir/sub"),
        Member("dir/sub/file"),
        Member("dir/fifo", type=tarfile.FIFOTYPE, mode=0o640),
        Member("dir/made/file"),
    ]
    apply([make_tar(*members)], tmp_path)
    found = tree(tmp_path)
    for name in ("dir/file", "dir/sub", "dir/sub/file", "dir/fifo", "dir/made", "dir/made/file"):
        assert found[name].xattrs == ()
    assert stat.S_IMODE(found["dir/file"].mode) == stat.S_IMODE(found["dir/fifo"].mode) == 0o640


# -- data


def test_blocks_of_zeroes_become_holes(tmp_path: Path) -> None:
    data = b"x" * BLOCK + bytes(64 * BLOCK) + b"y" * 100 + bytes(32 * BLOCK)
    apply([make_tar(Member("file", data), Member("empty", bytes(10 * BLOCK)), Member("small", bytes(100)))], tmp_path)
    assert (tmp_path / "file").read_bytes() == data
    assert (tmp_path / "file").stat().st_blocks * 512 <= 3 * BLOCK
    assert (tmp_path / "empty").read_bytes() == bytes(10 * BLOCK)
    assert (tmp_path / "empty").stat().st_blocks == 0
    assert (tmp_path / "small").read_bytes() == bytes(100)


@pytest.mark.parametrize("size", [1000, 4095, 10_000])
def test_zeroes_are_holes_in_whatever_pieces_they_come(size: int, tmp_path: Path) -> None:
    tar = make_tar(Member("empty", bytes(64 * BLOCK)), Member("end", bytes(9 * BLOCK) + b"x"))
    apply((tar[at : at + size] for at in range(0, len(tar), size)), tmp_path)
    assert (tmp_path / "empty").stat().st_blocks == 0
    assert (tmp_path / "end").stat().st_blocks * 512 == BLOCK
    assert (tmp_path / "end").read_bytes() == bytes(9 * BLOCK) + b"x"


@pytest.mark.parametrize("size", [1, 100, 511, 512, 513, 4000, 10_000, 1 << 20])
def test_the_pieces_of_a_tar_may_be_of_any_size(size: int, tmp_path: Path) -> None:
    data = os.urandom(3 * BLOCK) + bytes(5 * BLOCK + 7) + os.urandom(BLOCK)
    tar = make_tar(directory("d"), Member("d/file", data, pax=(("comment", "x" * 2000),)), Member("d/two", b"2"))
    pieces = (tar[at : at + size] for at in range(0, len(tar), size))
    assert apply(pieces, tmp_path) == Applied(3, len(data) + 1)
    assert (tmp_path / "d/file").read_bytes() == data


@pytest.mark.parametrize(
    "form", ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"]
)
def test_sparse_files_of_every_form_are_read(form: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/sparse").open("wb") as file:
        for position in range(0, 60 << 20, 1 << 20):  # more than one header has room for
            file.seek(position)
            file.write(os.urandom(BLOCK))
        file.truncate(100 << 20)
    (tmp_path / "in/zero").touch()
    os.truncate(tmp_path / "in/zero", 50 << 20)
    (tmp_path / "in/after").write_text("in its place")
    form = form if "gnu" in form else f"--format=posix {form}"
    names = ["sparse", "zero", "after"]
    tar = subprocess.run(
        [need("tar"), "--sparse", *form.split(), "-C", tmp_path / "in", "-cf", "-", *names], stdout=-1, check=True
    ).stdout
    assert len(tar) < 1 << 20
    (tmp_path / "out").mkdir()
    apply([tar], tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
        assert (tmp_path / "out" / name).stat().st_blocks <= (tmp_path / "in" / name).stat().st_blocks


@pytest.mark.parametrize("form", ["gnu", "ustar", "posix", "v7"])
def test_a_tree_that_tar_packed_is_the_same_as_when_tar_unpacks_it(form: str, tmp_path: Path) -> None:
    need_root()
    for name in ("in", "ours", "theirs"):
        (tmp_path / name).mkdir()
    source = tmp_path / "in"
    (source / "etc").mkdir(mode=0o2750)
    (source / "etc/passwd").write_text("root")
    os.chown(source / "etc/passwd", 12, 34)
    os.link(source / "etc/passwd", source / "hard")
    os.symlink("etc/passwd", source / "soft")
    if form != "v7":
        os.mkfifo(source / "fifo")
        os.mknod(source / "zero", stat.S_IFCHR | 0o640, os.makedev(1, 5))
        (source / ("deep/" * 10)).mkdir(parents=True)
        (source / ("deep/" * 10) / ("long" * 20)).write_bytes(os.urandom(100_000))
    tar = subprocess.run([need("tar"), f"--format={form}", "-C", source, "-cf", "-", "."], stdout=-1, check=True).stdout
    apply([tar], tmp_path / "ours")
    subprocess.run([need("tar"), "-C", tmp_path / "theirs", "-xpf", "-"], input=tar, check=True)
    assert tree(tmp_path / "ours") == tree(tmp_path / "theirs")


# -- what is there already


@pytest.mark.parametrize("before", ["file", "directory", "link", "fifo", "link to a directory", "hard link"])
@pytest.mark.parametrize("after", ["file", "directory", "link", "fifo", "hard link"])
def test_a_member_takes_the_place_of_whatever_has_its_name(before: str, after: str, tmp_path: Path) -> None:
    kinds = {
        "file": Member("x", b"new"),
        "directory": directory("x"),
        "link": symlink("x", "nowhere"),
        "fifo": Member("x", type=tarfile.FIFOTYPE),
        "link to a directory": symlink("x", "other"),
        "hard link": hardlink("x", "source"),
    }
    others = [Member("source", b"source"), directory("other"), Member("other/kept", b"kept")]
    apply([make_tar(*others, kinds[before], *([Member("x/inside")] if before == "directory" else []))], tmp_path)
    apply([make_tar(kinds[after])], tmp_path)
    (tmp_path / "fresh").mkdir()
    apply([make_tar(*others, kinds[after])], tmp_path / "fresh")
    fresh = tree(tmp_path / "fresh")["x"]
    assert tree(tmp_path)["x"] == fresh
    assert (tmp_path / "source").read_bytes() == b"source"
    assert (tmp_path / "other/kept").read_bytes() == b"kept"
    assert ("x/inside" in tree(tmp_path)) == (before == after == "directory")


def test_a_hard_link_to_itself_changes_nothing(tmp_path: Path) -> None:
    apply([make_tar(Member("file", b"x"), hardlink("file", "./file"))], tmp_path)
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_hard_link_that_would_replace_what_it_is_a_link_to_leaves_it(tmp_path: Path) -> None:
    apply([make_tar(Member("dir/sub/file", b"x"))], tmp_path)
    with pytest.raises(Error, match=r"^dir: it is a hard link to dir/sub/file, which it would replace$"):
        apply([make_tar(hardlink("dir", "dir/sub/file"))], tmp_path)
    assert (tmp_path / "dir/sub/file").read_bytes() == b"x"


def test_a_hard_link_to_a_file_of_a_layer_below_is_that_file(tmp_path: Path) -> None:
    apply([make_tar(Member("usr/lib/file", b"x"), symlink("lib", "usr/lib"))], tmp_path)
    apply([make_tar(hardlink("link", "lib/file"))], tmp_path)
    assert os.path.samefile(tmp_path / "link", tmp_path / "usr/lib/file")


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "usr/../usr/./lib/", "/first", "usr/bin/../lib"])
def test_a_link_in_a_directorys_place_is_followed_inside_the_root(target: str, tmp_path: Path) -> None:
    apply([make_tar(directory("usr/lib", mtime=3), directory("usr/bin"), symlink("first", "usr/lib"))], tmp_path)
    apply([make_tar(symlink("lib", target), Member("lib/file", b"x"), Member("lib/new/deep", b"y"))], tmp_path)
    assert (tmp_path / "usr/lib/file").read_bytes() == b"x"
    assert (tmp_path / "usr/lib/new/deep").read_bytes() == b"y"
    assert os.readlink(tmp_path / "lib") == target
    assert (tmp_path / "usr/lib").stat().st_mtime == 3


def test_a_link_that_is_changed_leads_elsewhere_from_then_on(tmp_path: Path) -> None:
    apply(
        [
            make_tar(
                directory("one"),
                directory("two"),
                symlink("to", "one"),
                Member("to/first"),
                symlink("to", "two"),
                Member("to/second"),
                directory("to"),
                Member("to/third"),
            )
        ],
        tmp_path,
    )
    assert names(tmp_path) == {"one", "one/first", "two", "two/second", "to", "to/third"}


def test_many_directories_are_no_more_descriptors_than_a_process_has(tmp_path: Path) -> None:
    members = [Member(f"{number}/{'d/' * 20}file{number}") for number in range(200)]
    apply([make_tar(*members)], tmp_path)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 200


# -- whiteouts


LOWER = [
    Member("file"),
    Member("dir/one"),
    Member("dir/two"),
    Member("dir/sub/three"),
    Member("dir/sub/deep/four"),
]
ALL = {"file", "dir", "dir/one", "dir/two", "dir/sub", "dir/sub/three", "dir/sub/deep", "dir/sub/deep/four"}
OPAQUE = ".wh..wh..opq"

WHITEOUTS: dict[str, tuple[list[Member], set[str]]] = {
    "of a file": ([Member(".wh.file")], ALL - {"file"}),
    "of a file in a directory": ([Member("dir/.wh.one")], ALL - {"dir/one"}),
    "of a directory": ([Member(".wh.dir")], {"file"}),
    "of what is not there": ([Member(".wh.nothing"), Member("no/such/.wh.place")], ALL),
    "of a file that the layer brings before": ([Member("file", b"new"), Member(".wh.file")], ALL),
    "of a file that the layer brings after": ([Member(".wh.file"), Member("file", b"new")], ALL),
    "of a directory that the layer brings before": (
        [directory("dir"), Member("dir/new"), Member(".wh.dir")],
        {"file", "dir", "dir/new"},
    ),
    "of a directory that the layer brings after": (
        [Member(".wh.dir"), directory("dir"), Member("dir/new")],
        {"file", "dir", "dir/new"},
    ),
    "of all in a directory": ([Member(f"dir/{OPAQUE}")], {"file", "dir"}),
    "of all in a directory, after what it brings": (
        [Member("dir/new"), Member("dir/sub/deep/new"), Member(f"dir/{OPAQUE}")],
        {"file", "dir", "dir/new", "dir/sub", "dir/sub/deep", "dir/sub/deep/new"},
    ),
    "of all in a directory, before what it brings": (
        [Member(f"dir/{OPAQUE}"), Member("dir/one", b"new")],
        {"file", "dir", "dir/one"},
    ),
    "of all in the root": ([Member(OPAQUE), Member("new")], {"new"}),
    "through a link": ([symlink("to", "dir"), Member("to/.wh.one")], ALL - {"dir/one"} | {"to"}),
    "of a link, which stays what it leads to": (
        [symlink("to", "dir"), Member("to2"), Member(".wh.to")],
        ALL | {"to", "to2"},
    ),
    "of aufs, which is bookkeeping": (
        [Member(".wh..wh.aufs"), directory(".wh..wh.plnk"), Member(".wh..wh.plnk/12.34"), Member(".wh..wh.orph")],
        ALL,
    ),
    "as a directory": ([directory(".wh.file")], ALL - {"file"}),
}


@pytest.mark.parametrize("case", WHITEOUTS)
def test_a_whiteout_takes_away_what_layers_below_have(case: str, tmp_path: Path) -> None:
    members, left = WHITEOUTS[case]
    apply([make_tar(*LOWER)], tmp_path)
    apply([make_tar(*members)], tmp_path)
    assert names(tmp_path) == left
    for member in members:
        if member.data:
            assert (tmp_path / member.name).read_bytes() == member.data


def test_a_whiteout_of_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    apply([make_tar(*LOWER, symlink("to", "dir"))], tmp_path)
    apply([make_tar(Member(".wh.to"))], tmp_path)
    assert names(tmp_path) == ALL


# -- refusals and rights


def test_what_the_pieces_raise_comes_through_even_after_the_last_member(tmp_path: Path) -> None:
    def pieces(failing: int) -> Iterator[bytes]:
        yield make_tar(Member("file", b"x"))
        for number in range(10):
            if number == failing:
                raise Error("not what it should be")
            yield bytes(1000)

    with pytest.raises(Error, match=r"^not what it should be$"):
        apply(pieces(9), tmp_path)


def test_a_full_file_system_is_said_with_the_member(tmp_path: Path) -> None:
    need_root()
    subprocess.run([need("mount"), "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        with pytest.raises(NoSpace, match=r"^some/big: No space left"):
            apply([make_tar(Member("some/big", os.urandom(200_000)))], tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_without_root_everything_belongs_to_the_user_and_devices_are_refused(tmp_path: Path) -> None:
    need_root()
    pax = (("SCHILY.xattr.user.kept", "1"), ("SCHILY.xattr.trusted.lost", "1"))
    layers = {
        "fine": make_tar(
            directory("dir", 0o555, owner=(1, 1)),
            Member("dir/file", b"x", mode=0o4711, owner=(1, 1), mtime=5, pax=pax),
            symlink("link", "dir/file"),
            Member("fifo", type=tarfile.FIFOTYPE),
        ),
        "again": make_tar(Member("dir/more", b"y"), Member("dir/.wh.file")),
        "listed": make_tar(directory("dir", 0o555), Member("dir/most", b"y")),
        "device": make_tar(Member("dev/null", type=tarfile.CHRTYPE, device=(1, 3))),
    }
    root = tmp_path / "root"
    root.mkdir()
    os.chown(root, 65534, 65534)

    def run(name: str) -> subprocess.CompletedProcess[bytes]:
        """In the root itself: nobody else may enter the directories above."""
        program = (
            "import sys; from nbdthin.images.unpack import apply\n"
            "try: apply([sys.stdin.buffer.read()], '.')\n"
            "except Exception as error: sys.exit(str(error))"
        )
        command = [need("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", program]
        return subprocess.run(command, input=layers[name], capture_output=True, cwd=root)

    result = run("fine")
    assert (result.returncode, result.stderr) == (0, b"")
    found = tree(root)
    assert {entry.owner for entry in found.values()} == {(65534, 65534)}
    assert (found["dir/file"].mode, found["dir/file"].mtime) == (stat.S_IFREG | 0o4711, 5 * SECOND)
    assert found["dir/file"].xattrs == (("user.kept", b"1"),)
    result = run("again")
    assert (result.returncode, result.stderr) == (0, b"")
    assert set(tree(root)) == {".", "dir", "dir/more", "link", "fifo"}
    assert tree(root)["dir"].mode == stat.S_IFDIR | 0o555
    result = run("listed")
    assert (result.returncode, result.stderr) == (0, b"")
    result = run("device")
    assert (result.returncode, result.stderr) == (1, b"dev/null: only root can make a device\n")
