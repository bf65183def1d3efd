"""All devices of a dm-thin pool, brought over with what they share: of Docker's devicemapper driver, or of LVM.

`survey` reads the metadata (thin_xml.py), finds out names and sizes and plans the layers (thin_plan.py); it writes
nothing. `Survey.bring` carries the plan out, through a daemon as any client does: layer by layer, parents first, each
is a volume that is written over NBD and, where others stand on it, sealed by a snapshot. All of it has names that begin
with `importing/` meanwhile. At the end one batch gives the devices their names and takes all others away; layers that
several stand on stay. A failure takes away everything.

dm-thin keeps no sizes. A device's is what it is told, or what Docker's metadata say, or what the file system or
partition table in its first block says, but at least as far as its mappings reach.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Self

from nbdthin import nbd
from nbdthin.control.client import Client
from nbdthin.errors import Corrupt, Exists, Invalid
from nbdthin.moving import thin_xml
from nbdthin.moving.building import building
from nbdthin.moving.copying import Progress, unseen, write_data
from nbdthin.moving.files import RawSource, about
from nbdthin.moving.reaching import connected
from nbdthin.moving.thin_plan import Layer, Plan, Runs, plan
from nbdthin.moving.thin_xml import ThinDevice, ThinMetadata
from nbdthin.pool.commands import MAX_VOLUME, SECTOR, check_name, check_size
from nbdthin.units import KiB

PREFIX = "thin/"
FIRST = 64 * KiB  # bytes of a device that say how large it is; dm-thin's blocks are not smaller


@dataclass(frozen=True, slots=True)
class Volume:
    """What becomes of one thin device. Sizes are bytes."""

    device: int  # dm-thin's id
    name: str
    size: int
    mapped: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes of data blocks."""

    mapped: int  # by all devices, what they share counted for each
    distinct: int  # in the thin pool
    stored: int  # to be written here; less is stored where they hold zeroes
    unshared: int  # of these: more than distinct, as no tree of layers can share them


class Survey:
    """A dm-thin pool that can be brought over. A context manager: it holds its data open."""

    def __init__(self, data: RawSource, block_size: int, volumes: Sequence[Volume], layers: Plan) -> None:
        self.volumes = volumes
        self.block_size = block_size
        self.totals = Totals(
            *(layers.mapped * block_size, layers.distinct * block_size, layers.stored * block_size),
            (layers.stored - layers.distinct) * block_size,
        )
        self._data = data
        self._plan = layers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.__exit__()

    def bring(self, pool: Client, progress: Progress = unseen) -> None:
        """Make the volumes.

        What an earlier try has left is removed first. Raises Exists, InUse, NoSpace, Unreachable, Error; there is then
        nothing of it, unless the daemon is gone: the error then says what may be left.
        """
        if not self.volumes:
            return
        self._check_free(pool)
        with building(pool, self.volumes[0].name) as hidden:
            _Bringing(pool, self._data, self._plan, self.volumes, hidden, self.block_size, progress).run()

    def _check_free(self, pool: Client) -> None:
        """At once, not when everything has been copied."""
        taken = {*pool.names()} & {volume.name for volume in self.volumes}
        if taken:
            others = f", and {len(taken) - 1} other names" if len(taken) > 1 else ""
            raise Exists(f"{min(taken)!r} exists already{others} (--prefix and --name give others)")


def survey(
    metadata: str,
    data: str,
    *,
    names: Mapping[int, str] | None = None,
    sizes: Mapping[int, int] | None = None,
    prefix: str = PREFIX,
    docker: str | None = None,
) -> Survey:
    """Read the XML file `metadata` (`-`: stdin) of the pool whose data device, or a copy of it, is `data`.

    `names` and `sizes` (bytes) are by dm-thin's device id and come before what Docker's metadata directory `docker`
    says; other devices are called by their id. All names but `names` begin with `prefix`. Raises Corrupt, Invalid,
    Error, or OSError.
    """
    names, sizes = names or {}, sizes or {}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(RawSource(Path(data)))
        found = _read_metadata(metadata)
        known = _read_docker(Path(docker)) if docker is not None else {}
        devices = [device for device in found.devices if not (device.number in known and known[device.number].deleted)]
        for number in {*names, *sizes} - {device.number for device in devices}:
            raise Invalid(f"the pool has no device {number} (it has: {_some(device.number for device in devices)})")
        volumes, runs = [], []
        for device in devices:
            _check_reach(device, found.block_size, source, Path(data))
            said = known.get(device.number) or _OfDocker(str(device.number), None)
            name = names.get(device.number) or prefix + said.name
            size = sizes.get(device.number, said.size)
            if size is None:
                size = _size_of(device.runs, source, found.block_size)
            shown = _cut(device.runs, -(-check_size(size) // found.block_size))
            mapped = int(shown.blocks.sum()) * found.block_size
            volumes.append(Volume(device.number, check_name(name), size, mapped))
            runs.append(shown)
        _check_distinct(volumes)
        result = Survey(source, found.block_size, volumes, plan(runs))
        stack.pop_all()
        return result


def _some(numbers: Iterator[int], most: int = 10) -> str:
    texts = [str(number) for number in numbers]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "") or "none"


def _check_distinct(volumes: Sequence[Volume]) -> None:
    of: dict[str, int] = {}
    for volume in volumes:
        if volume.name in of:
            raise Invalid(f"devices {of[volume.name]} and {volume.device} would both be {volume.name!r}")
        of[volume.name] = volume.device


def _read_metadata(path: str) -> ThinMetadata:
    if path == "-":
        with open(0, "rb", closefd=False) as file:
            return thin_xml.read(file, "standard input")
    with open(path, "rb") as file, about(path):
        return thin_xml.read(file, path)


def _check_reach(device: ThinDevice, block_size: int, data: RawSource, path: Path) -> None:
    end = int((device.runs.physical + device.runs.blocks).max(initial=0)) * block_size
    if end > data.size:
        raise Invalid(
            f"device {device.number} has data up to byte {end}, and {path} has {data.size}: it is not the data of "
            "these metadata"
        )


# Sizes ----------------------------------------------------------------------------------------------------

_EXT4 = Struct("<4xI16xI28xH")  # of its superblock at 1024: blocks, log2 of their KiB, magic number
_EXT4_MAGIC = 0xEF53
_EXT4_FEATURES, _EXT4_64BIT, _EXT4_BLOCKS_HIGH = 0x60, 0x80, 0x150
_XFS = Struct(">4sIQ")  # magic number, block size, blocks
_GPT = Struct("<8s24xQ")  # of its header in sector 1: magic number, sector of the last one, a copy of this


def _size_of(runs: Runs, data: RawSource, block_size: int) -> int:
    """Bytes: up to what is mapped, and at least what the device's content claims."""
    if not len(runs.logical):
        return block_size
    mapped = int(runs.logical[-1] + runs.blocks[-1]) * block_size
    if runs.logical[0] != 0:
        return mapped
    ((_, first),) = data.read_many([(int(runs.physical[0]) * block_size, FIRST)])
    claimed = _claimed(first)
    return max(mapped, claimed) if claimed <= MAX_VOLUME and claimed % SECTOR == 0 else mapped


def _claimed(first: memoryview) -> int:
    """Bytes of the file system or the partition table that begins so; 0 where there is none that we know."""
    blocks, shift, magic = _EXT4.unpack_from(first, 1024)
    if magic == _EXT4_MAGIC and shift <= 6:
        superblock = first[1024:]
        if int.from_bytes(superblock[_EXT4_FEATURES:][:4], "little") & _EXT4_64BIT:
            blocks |= int.from_bytes(superblock[_EXT4_BLOCKS_HIGH:][:4], "little") << 32
        return int(blocks * KiB << shift)
    mark, size, blocks = _XFS.unpack_from(first)
    if mark == b"XFSB" and 512 <= size <= 64 * KiB:
        return int(size) * int(blocks)
    for sector in (512, 4096):
        mark, last = _GPT.unpack_from(first, sector)
        if mark == b"EFI PART":
            return (int(last) + 1) * sector
    return 0


def _cut(runs: Runs, blocks: int) -> Runs:
    """What lies before block number `blocks`."""
    runs = runs.select(runs.logical < blocks)
    return runs._replace(blocks=(runs.logical + runs.blocks).clip(max=blocks) - runs.logical)


# Docker ---------------------------------------------------------------------------------------------------

_NO_DEVICES = ("deviceset-metadata", "transaction-metadata")


@dataclass(frozen=True, slots=True)
class _OfDocker:
    name: str
    size: int | None
    deleted: bool = False  # only waiting for its last user


def _read_docker(directory: Path) -> dict[int, _OfDocker]:
    """Docker's devicemapper/metadata: a file for each device, by whose name it is known to Docker."""
    result: dict[int, _OfDocker] = {}
    for path in sorted(path for path in directory.iterdir() if path.name not in _NO_DEVICES and path.is_file()):
        content = path.read_bytes()
        try:
            row = json.loads(content)
            number, size, deleted = row["device_id"], row["size"], row.get("deleted", False)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupt(path, None, "not Docker's metadata of a device") from error
        if not (type(number) is int and type(size) is int and type(deleted) is bool):
            raise Corrupt(path, None, "not Docker's metadata of a device")
        result[number] = _OfDocker(path.name, size, deleted)
    return result


# Bringing -------------------------------------------------------------------------------------------------


class _Bringing:
    """A plan that is carried out. Volumes under construction are called by their layer's index."""

    def __init__(
        self,
        pool: Client,
        data: RawSource,
        layers: Plan,
        volumes: Sequence[Volume],
        hidden: str,
        block_size: int,
        progress: Progress,
    ) -> None:
        self._pool = pool
        self._data = data
        self._layers = layers.layers
        self._volumes = volumes
        self._hidden = hidden
        self._block_size = block_size
        self._progress = progress
        self._done, self._total = 0, layers.stored * block_size
        self._sizes = self._layer_sizes()

    def run(self) -> None:
        inner = [index for index, layer in enumerate(self._layers) if layer.device is None]
        devices = {
            index: self._volumes[layer.device] for index, layer in enumerate(self._layers) if layer.device is not None
        }
        self._progress(0, self._total)
        for index in inner:
            self._make(index)
            self._fill(index)
            self._pool.snapshot(self._name(index), self._sealed(index))
        with self._pool.batch():
            for index in devices:
                self._make(index)
        for index in devices:
            self._fill(index)
        self._finish(inner, devices)

    def _name(self, index: int) -> str:
        return f"{self._hidden}@{index}"

    def _sealed(self, index: int) -> str:
        return f"{self._name(index)}@"

    def _layer_sizes(self) -> list[int]:
        """Bytes. A clone is not smaller than its snapshot, so what several stand on is no larger than its content."""
        largest = [0] * len(self._layers)  # of the devices above each
        for index in reversed(range(len(self._layers))):
            layer = self._layers[index]
            if layer.device is not None:
                largest[index] = self._volumes[layer.device].size
            if layer.parent is not None:
                largest[layer.parent] = max(largest[layer.parent], largest[index])
        sizes: list[int] = []
        for index, layer in enumerate(self._layers):
            below = sizes[layer.parent] if layer.parent is not None else 0
            end = int((layer.stored.logical + layer.stored.blocks).max(initial=0)) * self._block_size
            own = largest[index] if layer.device is not None else min(end, largest[index])
            sizes.append(max(own, below))
        return sizes

    def _make(self, index: int) -> None:
        parent = self._layers[index].parent
        if parent is None:
            self._pool.create(self._name(index), self._sizes[index])
        else:
            self._pool.clone(self._sealed(parent), self._name(index), size=self._sizes[index])

    def _fill(self, index: int) -> None:
        layer = self._layers[index]
        if not (len(layer.stored.logical) or len(layer.holes[0])):
            return
        with connected(self._pool, self._name(index)) as disk:
            with disk.pipelined():
                for logical, blocks in zip(*(column.tolist() for column in layer.holes), strict=True):
                    disk.zero(*self._range(logical, blocks, disk.size))
                self._write(disk, layer)
            disk.flush()

    def _write(self, disk: nbd.Disk, layer: Layer) -> None:
        ranges = [
            (physical * self._block_size, *self._range(logical, blocks, disk.size), over)
            for logical, physical, blocks, over in zip(*(column.tolist() for column in layer.stored), strict=True)
        ]
        pieces = self._data.read_many((position, length) for position, _, length, _ in ranges)
        for _, offset, length, over in ranges:
            end = offset + length
            while offset < end:
                _, part = next(pieces)
                write_data(disk, offset, part, over=over)
                offset += len(part)
                self._done += len(part)
                self._progress(self._done, self._total)

    def _range(self, logical: int, blocks: int, size: int) -> tuple[int, int]:
        """Offset and length in bytes; the last block of a device may be cut."""
        offset = logical * self._block_size
        return offset, min(blocks * self._block_size, size - offset)

    def _finish(self, inner: Sequence[int], devices: Mapping[int, Volume]) -> None:
        for index, volume in devices.items():
            if volume.size < self._sizes[index]:  # its siblings have data behind its end
                self._pool.resize(self._name(index), volume.size)
        with self._pool.batch():
            for index, volume in devices.items():
                self._pool.rename(self._name(index), volume.name)
            if inner:
                self._pool.remove(*(name for index in inner for name in (self._name(index), self._sealed(index))))
