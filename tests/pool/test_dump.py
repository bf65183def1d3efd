"""A dump says everything that a pool's metadata says, the same bytes again after a restore; what does not add up is
refused by its line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdthin.errors import Corrupt, Error, Exists, Invalid, Locked, NotFound
from nbdthin.pool.check import check_path
from nbdthin.pool.dump import dump, restore
from nbdthin.pool.pool import Pool
from nbdthin.units import KiB, MiB

from .conftest import BLOCK, LEAF, SUB, Pools, checkpoints, contents, flip, pattern

Line = dict[str, object]


def build(pool: Pool) -> None:
    pool.create("web", 2 * LEAF, labels={"zebra": "1", "ape": "é\n", "raw": "\x00"})
    pool.volume("web").write(0, pattern(5 * BLOCK))
    pool.volume("web").write(LEAF - BLOCK, pattern(2 * BLOCK, 2))
    pool.snapshot("web", "web@1")
    pool.clone("web@1", "data")
    pool.volume("data").write(3 * SUB, pattern(SUB, 3))
    pool.volume("data").write_zeroes(2 * BLOCK, 2 * BLOCK, allocate=True)
    pool.volume("web").trim(0, 3 * BLOCK)
    pool.snapshot("web", "web@2")
    pool.clone("web@2", "other", size=3 * LEAF)
    pool.commit()
    pool._autocommit = False  # so that a layer without a name stays
    pool.remove("web@2")
    pool.commit()
    assert any(layer.name is None for layer in pool.state.layers.values())


@pytest.fixture
def path(pools: Pools) -> Path:
    pool = pools.make()
    build(pool)
    return pools.close(pool)


def text(path: Path) -> str:
    return "".join(dump(path))


def dumped(path: Path, to: Path) -> Path:
    to.write_text(text(path))
    return to


def test_a_dump_of_what_was_restored_is_the_same_bytes(path: Path, tmp_path: Path) -> None:
    file = dumped(path, tmp_path / "dump")
    with Pool.open(path, inspect=True) as pool:
        before = contents(pool), pool.list(), pool.state.next_layer, pool.allocator.used
    kept = restore(file, path, force=True)
    assert kept == path / "journal.damaged-1" and kept.is_dir()
    assert text(path) == file.read_text()
    assert check_path(path).problems == ()
    with Pool.open(path, inspect=True) as pool:
        assert (contents(pool), pool.list(), pool.state.next_layer, pool.allocator.used) == before


def test_a_dump_does_not_depend_on_what_is_in_the_checkpoint_and_what_behind_it(path: Path) -> None:
    before = text(path)
    with Pool.open(path, autocommit=False) as pool:
        pool.label("web", {"more": "x"})
        pool.journal.bytes_since_checkpoint = 1 << 40
        pool.commit()
        pool.label("web", {"more": None})
    assert checkpoints(path)[0].stem != f"{1:016x}"
    assert text(path) == before


def test_the_lines_are_what_the_page_says(pools: Pools) -> None:
    pool = pools.make()
    pool.create("a", MiB, labels={"k": "v"})
    pool.volume("a").write(0, pattern(3 * BLOCK))
    pool.volume("a").write(5 * BLOCK, pattern(SUB))
    pool.volume("a").write_zeroes(7 * BLOCK, SUB)
    pool.commit()
    created, identity = pool.show("a").created, pool.superblock
    assert [json.loads(line) for line in dump(pools.close(pool))] == [
        {
            "type": "pool",
            "dump": 1,
            "uuid": identity.uuid,
            "block_size": BLOCK,
            "size": 64 * MiB,
            "created": identity.created,
            "version": 1,
            "features": [],
        },
        {"type": "counter", "next_layer": 2},
        {"type": "layer", "layer": 1, "parent": 0},
        {
            "type": "name",
            "name": "a",
            "snapshot": False,
            "layer": 1,
            "size": MiB,
            "created": created,
            "labels": {"k": "v"},
            "quota": 0,
            "reservation": 0,
            "origin": 0,
        },
        {"type": "range", "layer": 1, "block": 0, "count": 3, "physical": 1, "data": "ffff", "zero": "0000"},
        {"type": "range", "layer": 1, "block": 5, "count": 1, "physical": 6, "data": "0001", "zero": "0000"},
        {"type": "end", "lines": 6, "layers": 1, "names": 1, "blocks": 4},
    ]


def test_a_lost_pool_is_made_anew_from_its_data_and_a_dump(path: Path, tmp_path: Path) -> None:
    file = dumped(path, tmp_path / "dump")
    with Pool.open(path, inspect=True) as pool:
        before = contents(pool)
    (path / "data").rename(tmp_path / "data")
    shutil.rmtree(path)
    with pytest.raises(NotFound, match="--data FILE"):
        restore(file, tmp_path / "again")
    assert restore(file, tmp_path / "again", data=tmp_path / "data") is None
    assert text(tmp_path / "again") == file.read_text()
    with Pool.open(tmp_path / "again") as pool:
        assert contents(pool) == before
        assert pool.data.path == tmp_path / "data"


def test_a_damaged_pool_is_restored_without_force_and_a_sound_one_is_not(path: Path, tmp_path: Path) -> None:
    file = dumped(path, tmp_path / "dump")
    with pytest.raises(Exists, match="is sound"):
        restore(file, path)
    flip(path / "superblock", 20)
    flip(checkpoints(path)[0], 20)
    restore(file, path)
    assert text(path) == file.read_text()


def test_the_data_of_another_pool_is_refused_even_with_force(pools: Pools, path: Path, tmp_path: Path) -> None:
    file = dumped(path, tmp_path / "dump")
    other = pools.close(pools.make())
    for force in (False, True):
        with pytest.raises(Error, match=r"is the data of pool|is sound"):
            restore(file, other, force=force)
        with pytest.raises(Invalid, match="is the data of pool"):
            restore(file, tmp_path / "new", data=other / "data", force=force)
    assert not (tmp_path / "new").exists()
    assert check_path(other).problems == ()


def test_a_damaged_header_of_the_data_is_written_anew_with_force(path: Path, tmp_path: Path) -> None:
    file = dumped(path, tmp_path / "dump")
    flip(path / "data", 3)
    with pytest.raises(Corrupt, match="--force"):
        restore(file, path)
    restore(file, path, force=True)
    assert check_path(path).problems == ()


def test_a_pool_in_use_is_neither_dumped_nor_restored(pools: Pools, tmp_path: Path) -> None:
    pool = pools.make()
    with pytest.raises(Locked):
        text(pool.path)
    (tmp_path / "dump").write_text(text(pools.close(pools.make())))
    for force in (False, True):
        with pytest.raises(Locked):
            restore(tmp_path / "dump", pool.path, force=force)


# -- what is refused


def at(kind: str, number: int = 0, **values: object) -> Callable[[list[Line]], int]:
    """Change a line; the number of the line that is to be named."""

    def change(lines: list[Line]) -> int:
        index = [index for index, line in enumerate(lines) if line["type"] == kind][number]
        lines[index].update(values)
        return index + 1

    return change


def without(kind: str) -> Callable[[list[Line]], int]:
    def change(lines: list[Line]) -> int:
        lines.remove(next(line for line in lines if line["type"] == kind))
        return len(lines)

    return change


def without_a_field(lines: list[Line]) -> int:
    del lines[1]["next_layer"]
    return 2


def with_a_field(lines: list[Line]) -> int:
    lines[1]["more"] = 1
    return 2


def a_line_twice(lines: list[Line]) -> int:
    index = next(index for index, line in enumerate(lines) if line["type"] == "range")
    lines.insert(index, dict(lines[index]))
    return index + 2


def behind_the_end(lines: list[Line]) -> int:
    lines.append({"type": "counter", "next_layer": 1})
    return len(lines)


def no_end(lines: list[Line]) -> int:
    lines.pop()
    return len(lines) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("pool", dump=2), "another version"),
        (at("pool", uuid="x"), "UUID"),
        (at("pool", size="1G"), "size is not a int"),
        (at("pool", size=BLOCK + 1), "not a size in blocks"),
        (at("pool", features=["later"]), "later version"),
        (at("counter", type="count"), "unknown type of line: 'count'"),
        (at("layer", parent=77), "77"),
        (at("layer", 1, layer=1), "once more"),
        (at("layer", layer=-1), "below 0"),
        (at("layer", layer=True), "not the fields of a Layer"),
        (at("name", name="a b"), "not a name"),
        (at("name", size=100), "not a volume's size"),
        (at("name", layer=99), "layer 99 does not exist"),
        (at("name", 1, name="data"), "once more"),
        (at("name", labels={"k": 1}), "labels are text"),
        (at("name", 3, snapshot=False), "cannot be a volume's"),
        (at("range", layer=99), "layer 99 does not exist"),
        (at("range", physical=1 << 20), "not all in the pool"),
        (at("range", 1, physical=1), "has an owner already"),
        (at("range", data="ffff", zero="0001"), "an entry that cannot be"),
        (at("range", physical=0), "an entry that cannot be"),
        (at("range", data="fff"), "not a mask"),
        (at("range", count=0), "not a range"),
        (at("range", count=513), "not a range"),
        (at("range", block=-1), "not a range"),
        (a_line_twice, "twice"),
        (at("end", blocks=0), "lines are missing"),
        (without("counter"), "lines are missing"),
        (without("range"), "lines are missing"),
        (without_a_field, "a counter has next_layer"),
        (with_a_field, "a counter has next_layer"),
        (behind_the_end, "behind the end"),
        (no_end, "the end is missing"),
    ],
)
def test_a_dump_that_does_not_add_up_is_refused_by_its_line(
    path: Path, tmp_path: Path, change: Callable[[list[Line]], int], message: str
) -> None:
    lines: list[Line] = [json.loads(line) for line in dump(path)]
    number = change(lines)
    (tmp_path / "dump").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = text(path)
    with pytest.raises(Invalid, match=message) as caught:
        restore(tmp_path / "dump", path, force=True)
    assert str(caught.value).startswith(f"{tmp_path}/dump line {number}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert text(path) == before


def test_a_dump_that_was_cut_anywhere_is_refused(path: Path, tmp_path: Path) -> None:
    whole = text(path).encode()
    for cut in range(0, len(whole), 7):
        (tmp_path / "dump").write_bytes(whole[:cut])
        with pytest.raises(Invalid, match=r"dump line \d+: "):
            restore(tmp_path / "dump", path, force=True)


def test_bytes_that_are_no_dump_are_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    for junk in (b"", b"\xff\xfe\n", b"[]\n", b"{}\n", b"null\n", pattern(4 * KiB), b"[" * 100_000 + b"\n", b"1e999\n"):
        (tmp_path / "dump").write_bytes(junk)
        with pytest.raises(Invalid) as caught:
            restore(tmp_path / "dump", path, force=True)
        assert len(str(caught.value).splitlines()) == 1
