"""Layers that mean harm: each is refused by its member's name, in one line, and nothing outside of the root changes."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdthin.errors import Error, Invalid
from nbdthin.images import unpack
from nbdthin.images.unpack import apply
from tests.images.trees import Member, directory, hardlink, make_tar, symlink, tree

# Name, the member whose name is said, members. OUTSIDE is a directory beside the root, which has a file "victim".
HOSTILE: dict[str, tuple[str, list[Member]]] = {
    "a name that leads up": ("../evil", [Member("../evil", b"x")]),
    "a name that leads up from within": ("a/../../evil", [directory("a"), Member("a/../../evil", b"x")]),
    "a name that leads up and stays inside": ("a/../b", [directory("a"), Member("a/../b", b"x")]),
    "a name that ends by leading up": ("a/..", [directory("a"), directory("a/..")]),
    "an absolute name": ("OUTSIDE/evil", [Member("OUTSIDE/evil", b"x")]),
    "an absolute name of two slashes": ("//evil", [Member("//evil", b"x")]),
    "through a link that leads up": ("out/evil", [symlink("out", "../outside"), Member("out/evil", b"x")]),
    "through a link deep inside that leads up": (
        "a/b/out/evil",
        [symlink("a/b/out", "../../../outside"), Member("a/b/out/evil", b"x")],
    ),
    "through an absolute link": ("out/evil", [symlink("out", "OUTSIDE"), Member("out/evil", b"x")]),
    "through a link to a link": (
        "two/evil",
        [symlink("one", ".."), symlink("two", "one/outside"), Member("two/evil", b"x")],
    ),
    "a directory through a link": ("out/dir", [symlink("out", "../outside"), directory("out/dir")]),
    "a directory's mode through a link": ("out/sub", [symlink("out", ".."), directory("out/sub", 0o777)]),
    "a link that replaces a directory": (
        "a/evil",
        [directory("a"), Member("a/fine", b"x"), symlink("a", "../outside"), Member("a/evil", b"x")],
    ),
    "a loop of links": ("one/evil", [symlink("one", "two"), symlink("two", "one"), Member("one/evil", b"x")]),
    "a link to itself": ("me/evil", [symlink("me", "me"), Member("me/evil", b"x")]),
    "below a file": ("file/evil", [Member("file", b"x"), Member("file/evil", b"x")]),
    "a hard link that leads up": ("evil", [hardlink("evil", "../outside/victim")]),
    "an absolute hard link": ("evil", [hardlink("evil", "OUTSIDE/victim")]),
    "a hard link through a link": ("evil", [symlink("out", "../outside"), hardlink("evil", "out/victim")]),
    "a hard link through an absolute link": ("evil", [symlink("out", "OUTSIDE"), hardlink("evil", "out/victim")]),
    "a hard link to a directory": ("evil", [directory("a"), hardlink("evil", "a")]),
    "a hard link to nothing": ("evil", [hardlink("evil", "nothing")]),
    "a hard link to the root": ("evil", [hardlink("evil", ".")]),
    "a hard link in the place of what has its file in it": ("a", [Member("a/file", b"x"), hardlink("a", "a/file")]),
    "a root that is a link": (".", [symlink(".", "../outside")]),
    "a root that is a file": (".", [Member("./", b"")._replace(name=".")]),
    "a whiteout of the parent": (".wh...", [Member(".wh...")]),
    "a whiteout of the directory": ("a/.wh..", [directory("a"), Member("a/.wh..")]),
    "a whiteout of nothing": (".wh.", [Member(".wh.")]),
    "a whiteout outside": ("out/.wh.victim", [symlink("out", "../outside"), Member("out/.wh.victim")]),
    "an opaque directory outside": ("out/.wh..wh..opq", [symlink("out", "../outside"), Member("out/.wh..wh..opq")]),
    "a whiteout that leads up": ("../outside/.wh.victim", [Member("../outside/.wh.victim")]),
    "below a whiteout": (".wh.a/evil", [Member(".wh.a/evil", b"x")]),
    "a name of two lines": ("../evil\\nline", [Member("../evil\nline", b"x")]),
    "a zero byte in a name": ("evil\\x00name", [Member("short", pax=(("path", "evil\0name"),))]),
    "a zero byte in a link": ("evil", [Member("evil", type=tarfile.SYMTYPE, pax=(("linkpath", "a\0b"),))]),
    "a link to nothing at all": ("evil", [symlink("evil", "")]),
    "a name that is too long": ("n" * 120, [Member("n" * 300, b"x")]),
    "a path that is too long": ("abcdefg/", [Member("abcdefg/" * 600 + "evil", b"x")]),
    "too many directories in each other": ("d/d/d", [Member("d/" * 400 + "evil", b"x")]),
    "a type that nobody knows": ("evil", [Member("evil", type=b"Z")]),
    "a size of less than nothing": ("evil", [Member("evil", pax=(("size", "-5000"),))]),
    "a time that is no time": ("evil", [Member("evil", pax=(("mtime", "nan"),))]),
    "a time beyond all time": ("evil", [Member("evil", pax=(("mtime", "9" * 40),))]),
    "an owner that cannot be": ("evil", [Member("evil", pax=(("uid", "-7"),))]),
    "an attribute that cannot be": ("evil", [Member("evil", pax=(("SCHILY.xattr.nonsense", "x"),))]),
    "a sparse map beyond the end": (
        "evil",
        [Member("evil", b"x" * 512, pax=(("GNU.sparse.map", "4096,512"), ("GNU.sparse.size", "512")))],
    ),
    "a sparse map that turns back": (
        "evil",
        [Member("evil", b"x" * 1024, pax=(("GNU.sparse.map", "4096,512,0,512"), ("GNU.sparse.size", "9999")))],
    ),
    "a sparse map of negative lengths": (
        "evil",
        [Member("evil", b"x" * 512, pax=(("GNU.sparse.map", "0,-512"), ("GNU.sparse.size", "9999")))],
    ),
}

# Damaged so far that no member can be named: where in the tar is said.
DAMAGED = {
    "headers without end": make_tar(Member("evil", pax=(("comment", "x" * 5_000_000),))),
    "headers in headers": make_tar(Member("evil")).join(
        [tarfile.TarInfo.create_pax_global_header({"a": "b"}) * 2000, b""]
    ),
    "a header that is none": make_tar(Member("fine"))[:512] + b"\x01" * 512 + bytes(1024),
    "half a header": make_tar(Member("fine"))[:512] + b"x" * 200,
    "a sparse map of words": make_tar(Member("evil", pax=(("GNU.sparse.map", "a,b"), ("GNU.sparse.size", "1")))),
}


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Beside the root, and the same afterwards."""
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "victim").write_text("still here")
    (tmp_path / "sub").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    os.utime(tmp_path, ns=(0, 0))
    before = {name: entry for name, entry in tree(tmp_path).items() if not name.startswith("root")}
    yield outside
    assert {name: entry for name, entry in tree(tmp_path).items() if not name.startswith("root")} == before


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_is_refused_by_name_and_touches_nothing_outside(case: str, outside: Path) -> None:
    said, members = HOSTILE[case]
    place = str(outside)
    tar = make_tar(
        *(
            member._replace(name=member.name.replace("OUTSIDE", place), link=member.link.replace("OUTSIDE", place))
            for member in members
        )
    )
    with pytest.raises(Error) as refusal:
        apply([tar], outside.parent / "root")
    assert str(refusal.value).startswith(said.replace("OUTSIDE", place))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tar_is_refused_and_not_taken_for_a_short_one(case: str, outside: Path) -> None:
    with pytest.raises(Invalid, match="the layer's tar"):
        apply([DAMAGED[case]], outside.parent / "root")


@pytest.mark.parametrize("end", [512, 700, 1536 + 100])
def test_a_tar_that_ends_inside_a_file_is_refused_by_its_name(end: int, tmp_path: Path) -> None:
    tar = make_tar(Member("long", b"x" * 3000))
    with pytest.raises(Invalid, match="long: the layer ends inside it"):
        apply([tar[:end]], tmp_path)


def test_a_layer_has_a_bounded_number_of_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MEMBERS", 3)
    apply([make_tar(*(Member(f"file{number}") for number in range(3)))], tmp_path)
    with pytest.raises(Invalid, match="more than 3 members"):
        apply([make_tar(*(Member(f"file{number}") for number in range(4)))], tmp_path)


def test_global_headers_are_bounded_in_number(tmp_path: Path) -> None:
    header = tarfile.TarInfo.create_pax_global_header({f"key{number}": "x" for number in range(2000)})
    with pytest.raises(Invalid, match="global headers"):
        apply([header + make_tar(Member("file"))], tmp_path)


def test_a_sparse_map_in_the_old_form_is_read_no_further_than_any_member_needs(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("evil").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[482] = 1  # more of the map follows
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 20_000
    with pytest.raises(Invalid, match="larger than any member needs"):
        apply(io.BytesIO(bytes(header) + more), tmp_path)
