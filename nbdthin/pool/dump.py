"""All metadata of a pool as lines of JSON, and a pool's metadata made from them.

docs/dump.md describes the lines. They come in an order that the pool's history does not change, so that a dump of what
was restored is the same bytes. Entries are ranges: blocks in a row with the same masks, whose physical blocks are in a
row, too. The last line counts the others, so that a file that was cut is refused.

A dump knows the data by the pool's uuid and not by its place: `restore` is told where it is, or finds it where the pool
has it, and never touches more of it than a damaged header.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np

from nbdthin.errors import Corrupt, Error, Exists, Invalid, NotFound
from nbdthin.pool import commands, records
from nbdthin.pool.check import links
from nbdthin.pool.files import FILES, Files, open_file, write_all
from nbdthin.pool.layers import FULL, LEAF_MASK, LEAF_SHIFT, Layer, State, words
from nbdthin.pool.pool import MAX_BLOCKS, REPAIRED, Pool
from nbdthin.pool.records import LEAF_BLOCKS, BadRecord, Record, u64
from nbdthin.pool.repair import flocked, locked, replace_journal
from nbdthin.pool.superblock import DATA_HEADER, FEATURES, Superblock, parse_data_header, read_superblock
from nbdthin.pool.superblock import VERSION as POOL_VERSION
from nbdthin.pool.unsynced import count

log = logging.getLogger("nbdthin.pool")

VERSION = 1
_KINDS: dict[str, type[Record]] = {
    kind.__name__.lower(): kind
    for kind in records.kinds().values()
    if kind not in (records.Entries, records.Leaf, records.Uuid)
}
_RANGE = {"layer": int, "block": int, "count": int, "physical": int, "data": str, "zero": str}
_MOST_BLOCKS = commands.MAX_VOLUME  # no volume has as many

Line = dict[str, object]


# -- out


def dump(path: Path | str) -> Iterator[str]:
    """The lines of a dump of the pool at `path`, which must not be in use. Raises as `Pool.open` does.

    What a killed process had answered beyond the journal is not in it, and the log says so: until it is durable, a dump
    that points to its data would outlive that data in a power cut.
    """
    with contextlib.closing(Pool.open(path, inspect=True)) as pool:
        _warn_of_unsynced(pool)
        yield from map(_text, lines(pool.superblock, pool.state))


def _warn_of_unsynced(pool: Pool) -> None:
    try:
        answered = count(pool.read_unsynced())
    except Corrupt as error:
        log.warning("%s", error)
        return
    if answered:
        what = "answered changes that a kill left are not in this dump: %d (open or serve the pool to take them over)"
        log.warning(f"%s: {what}", pool.path, answered)


def _text(line: Line) -> str:
    return json.dumps(line, separators=(", ", ": ")) + "\n"


def lines(superblock: Superblock, state: State) -> Iterator[Line]:
    head = asdict(superblock)
    del head["data"]
    yield {"type": "pool", "dump": VERSION, **head}
    counted = {"lines": 1, "layers": 0, "names": 0, "blocks": 0}
    for record in sorted(state.snapshot_records(), key=_order(state)):
        if isinstance(record, records.Uuid):  # the first line says it
            continue
        counted["lines"] += 1
        counted["layers"] += isinstance(record, records.Layer)
        counted["names"] += isinstance(record, records.Name)
        yield {"type": type(record).__name__.lower(), **record._asdict(), **_sorted_labels(record)}
    for number in sorted(state.layers):
        for item in _ranges(state.layers[number]):
            counted["lines"] += 1
            counted["blocks"] += cast(int, item["count"]) if item["physical"] else 0
            yield item
    yield {"type": "end", **counted}


class _order:
    """Counter and the like, then layers with parents before children, then names: each by its own order."""

    def __init__(self, state: State) -> None:
        self._depths: dict[int, int] = {}
        for layer in state.layers.values():
            chain = []
            node: Layer | None = layer
            while node is not None and node.number not in self._depths:
                chain.append(node.number)
                node = node.parent
            depth = 0 if node is None else self._depths[node.number]
            for number in reversed(chain):
                depth += 1
                self._depths[number] = depth

    def __call__(self, record: Record) -> tuple[int, int, int, str]:
        match record:
            case records.Layer():
                return 1, self._depths[record.layer], record.layer, ""
            case records.Name():
                return 2, 0, 0, record.name
            case _:
                return 0, records.TAGS[type(record)], 0, ""


def _sorted_labels(record: Record) -> Line:
    return {"labels": dict(sorted(record.labels.items()))} if isinstance(record, records.Name) else {}


def _ranges(layer: Layer) -> Iterator[Line]:
    """The entries of a layer; a range does not go beyond its leaf."""
    for leaf in sorted(layer.own):
        entries = words(layer.own[leaf])
        masks, physical = entries & np.uint64(0xFFFFFFFF), (entries >> np.uint64(32)).astype(np.int64)
        step = np.diff(physical)
        joined = (masks[1:] == masks[:-1]) & ((step == 1) & (physical[:-1] != 0) | (step == 0) & (physical[1:] == 0))
        starts = [0, *(np.flatnonzero(~joined) + 1).tolist()]
        for start, stop in zip(starts, [*starts[1:], LEAF_BLOCKS], strict=True):
            entry = int(entries[start])
            if entry:
                yield {
                    "type": "range",
                    "layer": layer.number,
                    "block": (leaf << LEAF_SHIFT) + start,
                    "count": stop - start,
                    "physical": entry >> 32,
                    "data": f"{entry & FULL:04x}",
                    "zero": f"{entry >> 16 & FULL:04x}",
                }


# -- in


@dataclass(slots=True)
class Loaded:
    superblock: Superblock  # `data` is not known
    state: State


def load(name: str, text: Iterable[str]) -> Loaded:
    """What the lines of a dump say; `name` is the file's. Raises Invalid, which names the line that does not add up."""
    reader = _Reader()
    number = 0
    try:
        for line in text:
            number += 1
            reader.take(_parse(line))
        number += 1
        reader.finish()
    except (ValueError, BadRecord, Invalid) as error:
        raise Invalid(f"{name} line {number}: {error}") from error
    assert reader.superblock is not None
    return Loaded(reader.superblock, reader.state)


def _parse(text: str) -> Line:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(line, dict) or not text.endswith("\n"):
        raise ValueError("not a whole line of a dump")
    return line


class _Reader:
    """Takes lines one by one and refuses the first that does not add up with those before it."""

    def __init__(self) -> None:
        self.superblock: Superblock | None = None
        self.state = State()
        self._owned = bytearray()
        self._blocks = 0
        self._lines = 0
        self._ended = False
        self._last: tuple[int, int] = (0, 0)  # layer and end of the range before

    def take(self, line: Line) -> None:
        if self._ended:
            raise ValueError("something stands behind the end")
        kind = line.pop("type", None)
        if self.superblock is None:
            if kind != "pool":
                raise ValueError("a dump begins with the line of its pool")
            self._take_pool(line)
        elif kind == "range":
            self._take_range(line)
        elif kind == "end":
            self._take_end(line)
        elif isinstance(kind, str) and kind in _KINDS:
            self._take_record(_KINDS[kind], line)
        else:
            raise ValueError(f"an unknown type of line: {kind!r}")
        self._lines += 1

    def _take_pool(self, line: Line) -> None:
        if line.pop("dump", None) != VERSION:
            raise ValueError(f"a dump of another version than {VERSION}")
        names = {item.name for item in fields(Superblock)} - {"data"}
        features = line.get("features")
        if line.keys() != names or not isinstance(features, list):
            raise ValueError(f"the pool's line has {', '.join(sorted(names))}")
        for name, kind in (("uuid", str), ("block_size", int), ("size", int), ("created", float), ("version", int)):
            if type(line[name]) is not kind:
                raise ValueError(f"{name} is not a {kind.__name__}")
        if line["version"] != POOL_VERSION or not set(features) <= FEATURES:
            raise ValueError("a pool of a later version of nbdthin")
        made = Superblock(**{**line, "features": tuple(features), "data": ""})  # type: ignore[arg-type]
        if (
            made.block_size not in (1 << bits for bits in range(14, 21))
            or made.size % made.block_size
            or made.size <= 0
        ):
            raise ValueError(f"not a size in blocks: {made.size} of {made.block_size}")
        made.data_header()  # ValueError: not a uuid
        self.superblock = made
        self.state.uuid = made.uuid
        self._owned = bytearray(made.size // made.block_size)

    def _take_record(self, kind: type[Record], line: Line) -> None:
        if line.keys() != set(kind._fields):
            raise ValueError(f"a {kind.__name__.lower()} has {', '.join(kind._fields)}")
        record = records.make(kind, [line[name] for name in kind._fields])
        state = self.state
        if isinstance(record, records.Layer) and (record.layer in state.layers or not record.layer):
            raise ValueError(f"layer {record.layer} once more, or no layer's number")
        if isinstance(record, records.Name):
            self._look_at_name(record)
        if isinstance(record, records.Size):
            self._grow(record.size)
        if state.apply(record):
            raise ValueError("it leaves a layer without a name")

    def _grow(self, size: int) -> None:
        assert self.superblock is not None
        block_size = self.superblock.block_size
        if size % block_size or not self.superblock.size <= size <= MAX_BLOCKS * block_size:
            raise ValueError(f"not a size that the pool can have grown to: {size}")
        self._owned = bytearray(size // block_size)

    def _look_at_name(self, row: records.Name) -> None:
        commands.check_stored_name(row.name)
        commands.check_size(row.size)
        commands.check_labels(row.labels)
        layer = self.state.layers.get(row.layer)
        if row.name in self.state.names:
            raise ValueError(f"{row.name!r} once more")
        if layer is None:
            raise ValueError(f"layer {row.layer} does not exist")
        if layer.name is not None:
            raise ValueError(f"layer {row.layer} is {layer.name!r} already")
        if not row.snapshot and layer.children:
            raise ValueError(f"other layers stand on layer {row.layer}: it cannot be a volume's")

    def _take_range(self, line: Line) -> None:
        if line.keys() != _RANGE.keys() or any(type(line[name]) is not kind for name, kind in _RANGE.items()):
            raise ValueError(f"a range has {', '.join(_RANGE)}")
        number, block, count, physical = (cast(int, line[name]) for name in ("layer", "block", "count", "physical"))
        data, zero = (_mask(cast(str, line[name])) for name in ("data", "zero"))
        layer = self.state.layers.get(number)
        if layer is None:
            raise ValueError(f"layer {number} does not exist")
        if block < 0 or not 0 < count <= LEAF_BLOCKS - (block & LEAF_MASK) or block + count > _MOST_BLOCKS:
            raise ValueError(f"not a range within a leaf: {count} blocks from {block}")
        if (number, block) < self._last:
            raise ValueError(f"block {block} of layer {number} comes after a later one, or twice")
        self._last = (number, block + count)
        if data & zero or (data and not physical) or not (data or zero or physical):
            raise ValueError("an entry that cannot be: data in no block, data and zero at once, or nothing")
        if physical:
            self._own(physical, count)
        first = physical << 32 | zero << 16 | data
        values = [first + (index << 32 if physical else 0) for index in range(count)]
        self.state.apply(records.Entries(number, u64(range(block, block + count)), u64(values)))

    def _own(self, physical: int, count: int) -> None:
        if not 0 < physical <= len(self._owned) - count:
            raise ValueError(f"physical blocks {physical} to {physical + count - 1} are not all in the pool")
        if any(self._owned[physical : physical + count]):
            raise ValueError(f"one of the physical blocks {physical} to {physical + count - 1} has an owner already")
        self._owned[physical : physical + count] = b"\1" * count
        self._blocks += count

    def _take_end(self, line: Line) -> None:
        state = self.state
        wanted = {
            "lines": self._lines,
            "layers": len(state.layers),
            "names": len(state.names),
            "blocks": self._blocks,
        }
        if line != wanted:
            raise ValueError(f"the end counts {line}, here are {wanted}: lines are missing, or too many")
        state.find_unnamed()
        for problem in links(state):
            raise ValueError(problem)
        self._ended = True

    def finish(self) -> None:
        if not self._ended:
            raise ValueError("the end is missing: the file was cut")


def _mask(text: str) -> int:
    if len(text) != 4:
        raise ValueError(f"not a mask of four hexadecimal digits: {text!r}")
    return int(text, 16)


def restore(
    file: Path | str, path: Path | str, *, data: Path | str | None = None, force: bool = False, files: Files = FILES
) -> Path | None:
    """Make the dump in `file` the metadata of the pool at `path`; where its old journal is kept, if it had one.

    The data must be there already, with the header of the dump's pool: `data`, or where the pool's superblock says, or
    POOL/data. With `force`, a pool that is sound is replaced, and a header that is damaged is written anew.
    Raises Invalid, Exists, NotFound, Locked, Corrupt or OSError; then nothing was changed.
    """
    path = Path(path)
    with open(file, encoding="utf-8", errors="surrogateescape", newline="\n") as text:
        loaded = load(str(file), text)
    if not force:
        _refuse_sound(path)
    if not path.exists() and data is None:
        raise NotFound(f"no pool at {path} (`--data FILE` says where the data is, to make one)")
    new = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        with locked(path, new=True):
            return _write(path, loaded, _place(path, data), force, files)
    except BaseException:
        if new:
            shutil.rmtree(path)
        raise


def _write(path: Path, loaded: Loaded, place: Path, force: bool, files: Files) -> Path | None:
    with contextlib.ExitStack() as held:
        fd = _open_data(place)
        held.callback(os.close, fd)
        held.enter_context(flocked(fd, f"{place} is the data of a pool that is open"))
        wanted = _superblock(loaded.superblock, path, place)
        page = os.pread(fd, DATA_HEADER, 0)
        _compare(page, wanted, place, force)
        size = loaded.state.size or wanted.size
        if os.lseek(fd, 0, os.SEEK_END) < size:
            raise Invalid(f"{place} has less than the {size} bytes of the dump's pool: it was truncated")
        kept = replace_journal(path, path / "journal", loaded.state, wanted, 2, files)
        if page != wanted.data_header():
            write_all(files, fd, wanted.data_header(), 0)
            files.sync(fd)
        wanted.write(path / "superblock", files)
        if (path / REPAIRED).exists():  # what that lost is here again, or never will be
            files.unlink(path / REPAIRED)
        files.sync_directory(path)
        files.sync_directory(path.absolute().parent)
    return kept[0] if kept else None


def _refuse_sound(path: Path) -> None:
    """Raises Exists, or Locked, where there is a pool that opens."""
    try:
        Pool.open(path, inspect=True).close()
    except (NotFound, Corrupt, Invalid, FileNotFoundError):
        return
    raise Exists(f"the pool at {path} is sound (--force replaces its metadata all the same)")


def _place(path: Path, data: Path | str | None) -> Path:
    if data is not None:
        return Path(data).absolute()
    try:
        return path / read_superblock(path / "superblock").data
    except Error:
        return path / "data"


def _open_data(place: Path) -> int:
    try:
        return open_file(place, os.O_RDWR, device=True)
    except FileNotFoundError as error:
        raise NotFound(f"the data is not at {place} (`--data FILE` says where it is)") from error


def _superblock(of_dump: Superblock, path: Path, place: Path) -> Superblock:
    inside = place.absolute() == (path / "data").absolute()
    return Superblock(**{**asdict(of_dump), "data": "data" if inside else str(place)})


def _compare(page: bytes, wanted: Superblock, place: Path, force: bool) -> None:
    """Is it the data of the dump's pool?"""
    try:
        found = parse_data_header(place, page, "")
    except Corrupt as error:
        if force:
            return
        what = f"{error.what} (--force writes it anew: only if this is the data of the dump)"
        raise Corrupt(place, 0, what) from error
    if found.uuid != wanted.uuid:
        raise Invalid(f"{place} is the data of pool {found.uuid}, the dump is of pool {wanted.uuid}")
