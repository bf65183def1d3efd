"""Which layers hold the blocks of a dm-thin pool, so that what its devices share is stored once.

A thin device maps logical blocks of its own to physical blocks of the pool, and each mapping bears the pool's time at
which it was made; the time goes on with every snapshot. Here a layer has at most one parent, so devices that share are
the leaves of a tree, whose inner nodes hold what several have in common.

That tree is found from the mappings alone; which device was a snapshot of which is not recorded. Devices that share a
mapping made at time t were one device at the end of t, so: devices are joined where they share mappings, the latest
first, and all that are joined at one time become the children of one node (single linkage). A mapping belongs to the
lowest node above all devices that have it, and stands in the way of another of the same logical block only where one
device would have had both at the end of one time. So of what dm-thin wrote nothing is stored twice. Of mappings that
never were a pool's, the one that fewer devices have is stored once more in each child.

Pure: no I/O; numbers are the pool's blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nbdthin.errors import Invalid

MAX_PIECES = 1 << 25  # that sharing devices are cut into where one of their mappings begins or ends

Numbers = npt.NDArray[np.int64]
Indexes = npt.NDArray[np.int32]  # of which there may be MAX_PIECES and more
Flags = npt.NDArray[np.bool_]


class Runs(NamedTuple):
    """Mappings of one device, ascending by `logical`: so many `blocks` each from `logical` on, at `physical` and on."""

    logical: Numbers
    physical: Numbers
    blocks: Numbers
    time: Numbers

    def select(self, which: Flags | slice) -> Runs:
        return Runs(*(column[which] for column in self))


class Stored(NamedTuple):
    """What a layer holds: runs, ascending. `over`: layers below show something else there, which must not shine."""

    logical: Numbers
    physical: Numbers
    blocks: Numbers
    over: Flags


@dataclass(frozen=True, slots=True)
class Layer:
    """`parent` is an index of the plan's layers; `device` one of the devices planned for, whose content this is."""

    parent: int | None
    device: int | None
    stored: Stored
    holes: tuple[Numbers, Numbers]  # logical, blocks: nothing here, though layers below show something


@dataclass(frozen=True, slots=True)
class Plan:
    layers: Sequence[Layer]  # parents first; without a device: of several, which all need it
    mapped: int  # mappings of all devices
    distinct: int  # physical blocks that they map to
    stored: int  # blocks that will be written; above `distinct`: what no tree can share


def plan(devices: Sequence[Runs]) -> Plan:
    """The layers of `devices`. Raises Invalid where there are more pieces than there is memory for."""
    layers: list[Layer] = []
    by_physical = _by_physical(devices)
    for group in _groups(len(devices), *by_physical):
        if len(group) == 1:
            runs = devices[group[0]]
            stored = Stored(runs.logical, runs.physical, runs.blocks, np.zeros(len(runs.logical), dtype=bool))
            layers.append(Layer(None, group[0], stored, _no_holes()))
        else:
            first = len(layers)
            for layer in _Sharing(group, [devices[index] for index in group]).layers():
                parent = None if layer.parent is None else first + layer.parent
                layers.append(Layer(parent, layer.device, layer.stored, layer.holes))
    mapped = sum(int(runs.blocks.sum()) for runs in devices)
    return Plan(layers, mapped, _distinct(*by_physical[1:]), sum(int(layer.stored.blocks.sum()) for layer in layers))


def _no_holes() -> tuple[Numbers, Numbers]:
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)


def _by_physical(devices: Sequence[Runs]) -> tuple[Numbers, Numbers, Numbers]:
    """All runs by their physical block: device, first block, and the highest end so far."""
    if not devices:
        return (np.empty(0, dtype=np.int64),) * 3
    of = np.repeat(np.arange(len(devices)), [len(runs.logical) for runs in devices])
    start = np.concatenate([runs.physical for runs in devices])
    end = start + np.concatenate([runs.blocks for runs in devices])
    order = np.argsort(start, kind="stable")
    return of[order], start[order], np.maximum.accumulate(end[order])


def _distinct(start: Numbers, end: Numbers) -> int:
    if not len(start):
        return 0
    before = np.concatenate((start[:1], end[:-1]))
    return int((end - np.maximum(start, before)).clip(0).sum())


def _groups(devices: int, of: Numbers, start: Numbers, end: Numbers) -> list[list[int]]:
    """Devices that share physical blocks, with others between them or not, each group and all groups ascending."""
    joined = _Joined(devices)
    if len(start):
        begins = np.flatnonzero(np.concatenate(([True], start[1:] >= end[:-1])))
        first = np.repeat(of[begins], np.diff(begins, append=len(start)))
        for pair in np.unique(first * devices + of).tolist():
            joined.join(*divmod(pair, devices))
    groups: dict[int, list[int]] = {}
    for index in range(devices):
        groups.setdefault(joined.find(index), []).append(index)
    return list(groups.values())


class _Joined:
    """Sets of numbers that are joined with each other (union-find)."""

    def __init__(self, count: int) -> None:
        self._towards = list(range(count))

    def find(self, number: int) -> int:
        towards = self._towards
        while towards[number] != number:
            towards[number] = towards[towards[number]]
            number = towards[number]
        return number

    def join(self, one: int, other: int) -> None:
        self._towards[self.find(other)] = self.find(one)


class _Sharing:
    """Devices that share blocks, as pieces: cut wherever a run of one of them begins or ends, so that two pieces at one
    logical place are of the same length. A *mapping* is what is at one place in one or more devices, with one physical
    block; mappings are numbered by place.
    """

    def __init__(self, numbers: Sequence[int], devices: Sequence[Runs]) -> None:
        self._numbers = numbers
        of = np.repeat(np.arange(len(devices), dtype=np.int32), [len(runs.logical) for runs in devices])
        logical, physical, blocks, time = (np.concatenate(column) for column in zip(*devices, strict=True))
        self._cuts = np.unique(np.concatenate((logical, logical + blocks)))
        first = np.searchsorted(self._cuts, logical)
        pieces = np.searchsorted(self._cuts, logical + blocks) - first
        if (total := int(pieces.sum())) > MAX_PIECES:
            raise Invalid(f"the devices share {total} pieces of the pool, more than can be planned ({MAX_PIECES})")
        run = np.repeat(np.arange(len(logical), dtype=np.int32), pieces)
        place = (np.arange(total) - np.repeat(np.cumsum(pieces) - pieces - first, pieces)).astype(np.int32)
        where = self._cuts[place]
        where += (physical - logical)[run]
        order = np.lexsort((where, place))  # stable: devices stay ascending
        place, where, run = place[order], where[order], run[order]
        self._device, self._time = of[run], time[run]
        self._new = np.concatenate(([True], (place[1:] != place[:-1]) | (where[1:] != where[:-1])))
        self._mapping = np.cumsum(self._new, dtype=np.int32) - np.int32(1)  # of each piece
        self._place, self._physical = place[self._new], where[self._new]  # of each mapping
        self._mark = np.zeros(len(self._cuts), dtype=bool)  # of each place; all unset between uses

    def layers(self) -> list[Layer]:
        """Parents first; those without a device before all others."""
        children = self._linked()
        of_device = self._of_devices()
        own = self._placed(children, of_device)
        needed = [self._place[mappings] for mappings in of_device]  # by node: the places at which it shows something
        parent: dict[int, int] = {}
        for node, nodes in enumerate(children, start=len(needed)):
            needed.append(np.unique(np.concatenate([needed[child] for child in nodes])))
            parent.update(dict.fromkeys(nodes, node))
        shown: dict[int, Indexes] = {}
        index: dict[int, int] = {}
        layers: list[Layer] = []
        for node in reversed(range(len(needed))):
            above = parent.get(node)
            below = shown[above] if above is not None else np.empty(0, dtype=np.int32)
            mappings = np.sort(np.concatenate(own[node]))
            places = self._place[mappings]
            stays = self._among(below, needed[node])
            over = self._among(places, below)
            shown[node] = np.concatenate((below[stays], places[~over]))
            device = self._numbers[node] if node < len(of_device) else None
            index[node] = len(layers)
            holes = self._holes(np.sort(below[~stays]))
            layers.append(Layer(None if above is None else index[above], device, self._stored(mappings, over), holes))
        return layers

    def _linked(self) -> list[list[int]]:
        """The inner nodes, by the children of each: devices, and above them nodes from the number of devices on."""
        count = len(self._numbers)
        again = np.flatnonzero(~self._new)
        edges = self._device[again - 1].astype(np.int64) * count + self._device[again]
        order = np.lexsort((-self._time[again], edges))
        edges, times = edges[order], self._time[again][order]
        latest = np.concatenate(([True], edges[1:] != edges[:-1]))[: len(edges)]
        edges, times = edges[latest], times[latest]
        order = np.argsort(-times, kind="stable")
        joined, node = _Joined(count), list(range(count))
        children: list[list[int]] = []
        for pairs in _equal(edges[order], times[order]):
            together: dict[int, list[int]] = {}
            for pair in pairs.tolist():
                one, other = map(joined.find, divmod(pair, count))
                if one != other:
                    lists = [together.pop(each, [node[each]]) for each in (one, other)]
                    joined.join(one, other)
                    small, large = sorted(lists, key=len)
                    large.extend(small)
                    together[one] = large
            for root, nodes in together.items():
                node[root] = count + len(children)
                children.append(nodes)
        return children

    def _of_devices(self) -> list[Indexes]:
        """The mappings of each device, ascending."""
        order = np.argsort(self._device, kind="stable")
        ends = np.cumsum(np.bincount(self._device, minlength=len(self._numbers)))
        return np.split(self._mapping[order], ends[:-1])

    def _placed(self, children: Sequence[Sequence[int]], of_device: Sequence[Indexes]) -> list[list[Indexes]]:
        """The mappings that each node stores.

        From the devices upwards, each node passes on what others need too, with the number of devices that have it.
        """
        total = np.bincount(self._mapping).astype(np.int32)  # devices that have each
        shared = [mappings[total[mappings] > 1] for mappings in of_device]
        own = [[mappings[total[mappings] == 1]] for mappings in of_device]
        passed = [(mappings, np.ones(len(mappings), dtype=np.int32)) for mappings in shared]
        for nodes in children:
            ids, counts = (np.concatenate(column) for column in zip(*(passed[child] for child in nodes), strict=True))
            ids, counts = _summed(ids, counts)
            best = self._best(ids, counts)
            if not best.all():
                lost = ids[~best]
                total[lost] -= counts[~best]
                for child in nodes:
                    own[child].append(np.intersect1d(passed[child][0], lost, assume_unique=True))
                ids, counts = ids[best], counts[best]
            for child in nodes:
                passed[child] = ids[:0], counts[:0]
            complete = counts == total[ids]
            own.append([ids[complete]])
            passed.append((ids[~complete], counts[~complete]))
        return own

    def _best(self, ids: Indexes, counts: Indexes) -> Flags:
        """At each place, the one that most devices have; a node can show one."""
        places = self._place[ids]
        order = np.lexsort((-counts, places))
        best = np.empty(len(ids), dtype=bool)
        best[order] = np.concatenate(([True], places[order][1:] != places[order][:-1]))[: len(ids)]
        return best

    def _among(self, these: Indexes, those: Indexes) -> Flags:
        """Which of `these` places are among `those`."""
        self._mark[those] = True
        result: Flags = self._mark[these]
        self._mark[those] = False
        return result

    def _stored(self, mappings: Indexes, over: Flags) -> Stored:
        places = self._place[mappings]
        logical, physical, end = self._cuts[places], self._physical[mappings], self._cuts[places + 1]
        count = end - logical
        goes_on = (end[:-1] == logical[1:]) & (physical[:-1] + count[:-1] == physical[1:]) & (over[:-1] == over[1:])
        first, count = _runs(goes_on, count)
        return Stored(logical[first], physical[first], count, over[first])

    def _holes(self, places: Indexes) -> tuple[Numbers, Numbers]:
        logical, end = self._cuts[places], self._cuts[places + 1]
        first, count = _runs(end[:-1] == logical[1:], end - logical)
        return logical[first], count


def _equal(values: Numbers, keys: Numbers) -> Iterator[Numbers]:
    """Values in parts of equal keys, which are sorted."""
    ends = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    parts: Iterable[Numbers] = np.split(values, ends) if len(values) else []
    yield from parts


def _summed(ids: Indexes, counts: Indexes) -> tuple[Indexes, Indexes]:
    """Each id once, ascending, with the sum of its counts."""
    order = np.argsort(ids, kind="stable")
    ids, counts = ids[order], counts[order]
    first = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1]))[: len(ids)])
    return ids[first], np.add.reduceat(counts, first, dtype=np.int32) if len(first) else counts


def _runs(goes_on: Flags, count: Numbers) -> tuple[Numbers, Numbers]:
    """Where runs begin, and their counts; `goes_on`: the one after each is of the same run."""
    first = np.flatnonzero(np.concatenate(([True], ~goes_on))[: len(count)])
    return first, np.add.reduceat(count, first) if len(first) else count
