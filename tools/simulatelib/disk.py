"""What a disk may hold after a power cut: the model, fed with a log event by event.

Assumed of the disk, and no more than that:
- a sector of 512 bytes is written whole or not at all;
- what a completed sync of a file covers is there: the bytes written and the size set before the sync began;
- what was not covered may be there or not, each sector by itself: any value that it had since the sync is possible, so
  writes may be torn, reordered, and lost between others that are kept. Punched ranges hold the old bytes or zeroes;
- a file's size may be any that it had since the sync; bytes that no kept write covers read as zero;
- names made, changed and removed in a directory are durable when a sync of that directory completes, and not by a
  sync of the file. Until then each of them may have happened or not, later ones without earlier ones too. One rename is
  one change: the new name is either what it was or the renamed file, never neither;
- a sync that had not completed may have covered anything, or nothing;
- a sync that failed made nothing durable, and no later one makes durable what it should have: the kernel has forgotten
  that it is not written (ext4, XFS and Btrfs all do, each in its way).

A file system may be kinder (ext4 orders renames), none that is POSIX may be worse in what the engine relies on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from simulatelib.record import (
    ROOT,
    Create,
    Event,
    Note,
    Punch,
    Rename,
    SyncBegins,
    SyncEnds,
    SyncFails,
    Truncate,
    Unlink,
    Write,
)

SECTOR = 512
NEVER = 1 << 62  # a time that no sync covers
_ZEROES = bytes(SECTOR)


class _File:
    """One file: what it holds for those who read it, what is durable, and what each sector has been since."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.durable = bytearray()  # content covered by the last completed sync
        self.later: dict[int, list[tuple[int, bytes]]] = {}  # sector -> (time, value) since then
        self.sizes: list[tuple[int, int]] = []  # (time, size) since then
        self._syncing: dict[int, int] = {}  # number of a sync under way -> its beginning

    def write(self, time: int, position: int, data: bytes) -> None:
        end = position + len(data)
        if end > len(self.content):
            self._resize(time, end)
        self.content[position:end] = data
        self._touch(time, position, end)

    def truncate(self, time: int, size: int) -> None:
        before = len(self.content)
        if size != before:
            self._resize(time, size)
            self._touch(time, min(size, before), max(size, before))

    def _resize(self, time: int, size: int) -> None:
        before = len(self.content)
        if size < before:
            del self.content[size:]
        else:
            self.content += bytes(size - before)
        self.sizes.append((time, size))

    def punch(self, time: int, position: int, length: int) -> None:
        end = min(position + length, len(self.content))
        if position < end:
            self.content[position:end] = bytes(end - position)
            self._touch(time, position, end)

    def _touch(self, time: int, start: int, end: int) -> None:
        later, content = self.later, self.content
        for sector in range(start // SECTOR, -(-end // SECTOR)):
            value = bytes(content[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")
            values = later.get(sector)
            if values is None:
                later[sector] = [(time, value)]
            else:
                values.append((time, value))

    def sync_begins(self, time: int, number: int) -> None:
        self._syncing[number] = time

    def sync_ends(self, number: int) -> None:
        begun = self._syncing.pop(number)
        sizes = [size for time, size in self.sizes if time < begun]
        if sizes:
            # From the smallest size in between on, nothing but what was written later remains.
            self.durable = self.durable[: min(sizes)]
            self.durable += bytes(sizes[-1] - len(self.durable))
            self.sizes = [item for item in self.sizes if item[0] >= begun]
        left: dict[int, list[tuple[int, bytes]]] = {}
        for sector, values in self.later.items():
            if any(time < begun for time, _ in values):  # written again: what an earlier sync lost is past
                values = [item for item in values if item[0] != NEVER]
            if values[-1][0] < begun:
                self._settle(sector, values[-1][1])
                continue
            covered = [value for time, value in values if time < begun]
            if covered:
                self._settle(sector, covered[-1])
            left[sector] = [item for item in values if item[0] >= begun]
        self.later = left

    def sync_fails(self, number: int) -> None:
        """What it covered may be there or not, for ever."""
        begun = self._syncing.pop(number)
        self.later = {
            sector: [(NEVER if time < begun else time, value) for time, value in values]
            for sector, values in self.later.items()
        }
        self.sizes = [(NEVER if time < begun else time, size) for time, size in self.sizes]

    def _settle(self, sector: int, value: bytes) -> None:
        start = sector * SECTOR
        if start < len(self.durable):
            self.durable[start : start + SECTOR] = value[: len(self.durable) - start]

    def choose(self, policy: Policy) -> bytes:
        chance = policy.chance
        mode = policy.mode()
        if mode == KEPT:
            return bytes(self.content)
        if mode == LOST or not (self.later or self.sizes):
            return bytes(self.durable)
        size = chance.choice([len(self.durable), *(size for _, size in self.sizes)])
        result = self.durable[:]
        furthest = max((sector + 1) * SECTOR for sector in self.later) if self.later else 0
        result += bytes(max(size, furthest) - len(result)) if max(size, furthest) > len(result) else b""
        keep, draw = chance.choice((0.1, 0.5, 0.5, 0.9)), chance.random
        for sector, values in self.later.items():
            if draw() < keep:
                value = values[-1][1] if len(values) == 1 or draw() < 0.5 else chance.choice(values)[1]
                result[sector * SECTOR : (sector + 1) * SECTOR] = value
        return bytes(result[:size])


@dataclass
class _Directory:
    durable: dict[str, int] = field(default_factory=dict)
    later: list[tuple[int, Event]] = field(default_factory=list)  # (time, change of a name)
    syncing: dict[int, int] = field(default_factory=dict)

    def sync_ends(self, number: int) -> None:
        begun = self.syncing.pop(number)
        for time, change in self.later:
            if time < begun:
                _change(self.durable, change)
        self.later = [item for item in self.later if item[0] >= begun]

    def choose(self, policy: Policy) -> dict[str, int]:
        names = dict(self.durable)
        if not self.later:
            return names
        chance = policy.chance
        mode = policy.mode()
        changes = [change for _, change in self.later]
        if mode == LOST:
            changes = []
        elif mode == MIXED:
            if chance.random() < 0.5:
                changes = changes[: chance.randrange(len(changes) + 1)]
            else:
                changes = [change for change in changes if chance.random() < 0.5]
        for change in changes:
            _change(names, change)
        return names


def _change(names: dict[str, int], change: Event) -> None:
    match change:
        case Create(name=name, node=node):
            names[name] = node
        case Rename(old=old, name=name, node=node):
            names.pop(old, None)
            names[name] = node
        case Unlink(name=name):
            names.pop(name, None)


LOST, KEPT, MIXED = "lost", "kept", "mixed"


class Policy:
    """How a power cut chooses: nothing of what was not synced, all of it, or by chance, for each file anew."""

    def __init__(self, kind: str, chance: random.Random) -> None:
        self.kind = kind
        self.chance = chance

    def mode(self) -> str:
        return self.kind if self.kind != MIXED else self.chance.choice((LOST, KEPT, MIXED, MIXED))


Tree = dict[str, bytes | None]  # path below the root -> content; None: a directory


class Disk:
    """A file system after the events fed to it so far."""

    def __init__(self) -> None:
        self.time = 0
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {ROOT: _Directory()}

    def feed(self, events: Iterable[Event]) -> None:
        for event in events:
            self._apply(event)
            self.time += 1

    def _apply(self, event: Event) -> None:
        time = self.time
        match event:
            case Write(node, position, data):
                self._files[node].write(time, position, data)
            case SyncBegins(node, number) if node in self._files:
                self._files[node].sync_begins(time, number)
            case SyncEnds(node, number) if node in self._files:
                self._files[node].sync_ends(number)
            case SyncFails(node, number):
                if node in self._files:
                    self._files[node].sync_fails(number)
            case SyncBegins(node, number):
                self._directories[node].syncing[number] = time
            case SyncEnds(node, number):
                self._directories[node].sync_ends(number)
            case Truncate(node, size):
                self._files[node].truncate(time, size)
            case Punch(node, position, length):
                self._files[node].punch(time, position, length)
            case Create(parent, _, node, directory):
                if directory:
                    self._directories[node] = _Directory()
                else:
                    self._files[node] = _File()
                self._directories[parent].later.append((time, event))
            case Rename(source, _, parent):
                assert source == parent, "the engine renames within one directory"
                self._directories[parent].later.append((time, event))
            case Unlink(parent):
                self._directories[parent].later.append((time, event))
            case Note():
                pass

    def image(self, policy: Policy) -> Tree:
        """One file system that may be there after the cut."""
        tree: Tree = {}
        self._collect(ROOT, "", policy, tree, {})
        return tree

    def _collect(self, node: int, prefix: str, policy: Policy, tree: Tree, chosen: dict[int, bytes]) -> None:
        for name, child in self._directories[node].choose(policy).items():
            path = prefix + name
            if child in self._directories:
                tree[path] = None
                self._collect(child, path + "/", policy, tree, chosen)
            else:
                if child not in chosen:
                    chosen[child] = self._files[child].choose(policy)
                tree[path] = chosen[child]


def materialise(tree: Tree, root: Path) -> None:
    """Make the files of `tree` below `root`, which is empty."""
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
