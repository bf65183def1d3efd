"""What can be asked of a pool's structure, and the records that each command becomes.

A command is a fact; `plan` turns a sequence of them into records over a draft of the catalogue, so that a batch is
all or nothing: the first refusal raises before anything has changed. Nothing here touches the pool, a file or the
clock. Sizes are bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nbdthin.errors import Exists, Invalid, NotFound
from nbdthin.pool.records import Layer, Name, Record, Unname, deferred_name, is_deferred

SECTOR = 512
MAX_VOLUME = 1 << 62  # block offsets and their ends stay inside a signed 64-bit number on every client
MAX_LABELS = 64
MAX_LABEL = 4096  # bytes of a label's key or value

_NAME = re.compile(r"[A-Za-z0-9._:@/-]{1,255}")
_SUFFIX = re.compile(r"~[0-9]+\Z")  # records.deferred_name


@dataclass(frozen=True, slots=True)
class Create:
    """A new volume that reads as zeroes."""

    name: str
    size: int
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Seal what `volume` holds now under `name`."""

    volume: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clone:
    """A new volume that starts as `snapshot`; `size` (None: the snapshot's) may be larger, never smaller."""

    snapshot: str
    name: str
    size: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollback:
    """Make `volume` what `snapshot` is. Any snapshot will do; newer ones stay."""

    volume: str
    snapshot: str


@dataclass(frozen=True, slots=True)
class Rename:
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Remove:
    """`deferred` hides it at once, and frees nothing: it goes on under a name that only a Remove can speak of."""

    name: str
    deferred: bool = False
    if_exists: bool = False  # that it is not there is no error


@dataclass(frozen=True, slots=True)
class Resize:
    """Give `name` a new size. What lies beyond a smaller one is gone, and reads as zeroes after growing again."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Label:
    """Set labels; None as a value removes one."""

    name: str
    changes: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Quota:
    """Volume `name` may be charged with `size` bytes of blocks (limits.py); None: with any."""

    name: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Reserve:
    """Keep blocks for volume `name`, so that it can be charged with `size` bytes; None: no more than others."""

    name: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Extend:
    """Make the pool's data file `size` bytes, or use that much of its block device. A pool never shrinks."""

    size: int


Command = Create | Snapshot | Clone | Rollback | Rename | Remove | Resize | Label | Quota | Reserve | Extend


def names_in(command: Command) -> tuple[str, ...]:
    """The names that `command` speaks of."""
    match command:
        case Snapshot() | Rollback():
            return command.volume, command.name if isinstance(command, Snapshot) else command.snapshot
        case Clone():
            return command.snapshot, command.name
        case Rename():
            return command.old, command.new
        case Extend():
            return ()
        case _:
            return (command.name,)


def check_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Invalid(f"not a name: {name!r} (1 to 255 letters, digits and ._:@/-)")
    return name


def check_stored_name(name: str) -> str:
    """A name that a pool can hold: also that of what was removed while it was in use."""
    check_name(_SUFFIX.sub("", name))
    return name


def check_size(size: int) -> int:
    if size <= 0 or size % SECTOR or size > MAX_VOLUME:
        raise Invalid(f"not a volume's size: {size} bytes (a multiple of 512, above 0, up to 4 EiB)")
    return size


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise Invalid(f"labels are text, not {key!r} = {value!r}")
        if not key or "=" in key or not (_fits(key) and _fits(value)):
            raise Invalid(f"not a label: {key[:40]!r} (a key without =, key and value up to {MAX_LABEL} bytes)")
    if len(labels) > MAX_LABELS:
        raise Invalid(f"too many labels: {len(labels)} (up to {MAX_LABELS})")
    return dict(labels)


def _fits(text: str) -> bool:
    try:
        return len(text.encode()) <= MAX_LABEL
    except UnicodeEncodeError:  # half a surrogate pair, as a command line of bad UTF-8 gives
        return False


class Draft:
    """The catalogue as it will be when the records collected so far have been applied."""

    def __init__(self, names: Mapping[str, Name], next_layer: int, now: float) -> None:
        self._base = names
        self._changed: dict[str, Name | None] = {}
        self._next_layer = next_layer
        self.now = now
        self.records: list[Record] = []
        self.shrinks: list[tuple[str, int]] = []  # volumes that become smaller, and to what
        self.size = 0  # bytes that the pool is to have; 0: as it is

    @property
    def changed(self) -> Mapping[str, Name | None]:
        """What names will be, as far as they change; None: gone."""
        return self._changed

    def get(self, name: str) -> Name | None:
        return self._changed[name] if name in self._changed else self._base.get(name)

    def find(self, name: str) -> Name:
        row = self.get(name)
        if row is None:
            raise NotFound(f"no volume or snapshot {name!r} (`nbdthin ls` lists what there is)")
        if is_deferred(name):
            raise Invalid(f"{name!r} is removed: it only waits for its last client (`nbdthin ls --deferred`)")
        return row

    def find_kind(self, name: str, snapshot: bool) -> Name:
        row = self.find(name)
        if row.snapshot != snapshot:
            wanted, other = ("snapshot", "volume") if snapshot else ("volume", "snapshot")
            raise Invalid(f"{name!r} is a {other}, not a {wanted}")
        return row

    def free_name(self, name: str) -> str:
        self.refuse_taken(check_name(name))
        return name

    def refuse_taken(self, name: str) -> None:
        if self.get(name) is not None:
            raise Exists(f"{name!r} exists already")

    def put(self, row: Name) -> None:
        self._changed[row.name] = row
        self.records.append(row)

    def drop(self, name: str) -> None:
        self._changed[name] = None
        self.records.append(Unname(name))

    def new_layer(self, parent: int) -> int:
        layer = self._next_layer
        self._next_layer += 1
        self.records.append(Layer(layer, parent))
        return layer


def plan(commands: Sequence[Command], names: Mapping[str, Name], next_layer: int, now: float) -> Draft:
    """The records of `commands`, in order. Raises Invalid, NotFound or Exists for the first that cannot be."""
    draft = Draft(names, next_layer, now)
    for command in commands:
        _PLANS[type(command)](draft, command)
    for name, _ in draft.shrinks:
        if sum(name in names_in(command) for command in commands) > 1:
            raise Invalid(f"{name!r} cannot shrink in a batch that changes it in another way too: it has data to move")
    return draft


def _create(draft: Draft, command: Create) -> None:
    name = draft.free_name(command.name)
    size = check_size(command.size)
    labels = check_labels(command.labels)
    draft.put(Name(name, False, draft.new_layer(0), size, draft.now, labels))


def _snapshot(draft: Draft, command: Snapshot) -> None:
    volume = draft.find_kind(command.volume, snapshot=False)
    name = draft.free_name(command.name)
    labels = check_labels(command.labels)
    draft.put(Name(name, True, volume.layer, volume.size, draft.now, labels))  # limits stay the volume's
    draft.put(volume._replace(layer=draft.new_layer(volume.layer)))


def _clone(draft: Draft, command: Clone) -> None:
    snapshot = draft.find_kind(command.snapshot, snapshot=True)
    name = draft.free_name(command.name)
    size = snapshot.size if command.size is None else check_size(command.size)
    if size < snapshot.size:
        raise Invalid(
            f"a clone cannot be smaller than its snapshot: {size} bytes, {snapshot.name!r} has {snapshot.size}"
        )
    labels = check_labels(command.labels)
    draft.put(Name(name, False, draft.new_layer(snapshot.layer), size, draft.now, labels, origin=snapshot.layer))


def _rollback(draft: Draft, command: Rollback) -> None:
    volume = draft.find_kind(command.volume, snapshot=False)
    snapshot = draft.find_kind(command.snapshot, snapshot=True)
    draft.put(volume._replace(layer=draft.new_layer(snapshot.layer), size=snapshot.size, origin=snapshot.layer))


def _rename(draft: Draft, command: Rename) -> None:
    row = draft.find(command.old)
    name = draft.free_name(command.new)
    draft.put(row._replace(name=name))  # first: a layer must not be without a name in between
    draft.drop(command.old)


def _remove(draft: Draft, command: Remove) -> None:
    row = draft.get(command.name)
    if row is None:
        if not command.if_exists:
            draft.find(command.name)
        return
    if is_deferred(row.name) and row.name in draft.changed:
        raise Invalid(f"{row.name!r} cannot be freed by the batch that hides it: somebody may use it")
    if command.deferred:
        if is_deferred(row.name):
            return
        hidden = deferred_name(row.name, row.layer)
        draft.refuse_taken(hidden)
        draft.put(row._replace(name=hidden, reservation=0))  # first, as for a rename
    draft.drop(command.name)


def _resize(draft: Draft, command: Resize) -> None:
    volume = draft.find_kind(command.name, snapshot=False)
    if check_size(command.size) < volume.size:
        draft.shrinks.append((command.name, command.size))
    draft.put(volume._replace(size=command.size))


def _label(draft: Draft, command: Label) -> None:
    row = draft.find(command.name)
    labels = dict(row.labels)
    for key, value in command.changes.items():
        if value is None:
            labels.pop(key, None)
        else:
            labels[key] = value
    draft.put(row._replace(labels=check_labels(labels)))


def _quota(draft: Draft, command: Quota) -> None:
    draft.put(_checked_limits(draft.find_kind(command.name, snapshot=False)._replace(quota=_limit(command.size))))


def _reserve(draft: Draft, command: Reserve) -> None:
    draft.put(_checked_limits(draft.find_kind(command.name, snapshot=False)._replace(reservation=_limit(command.size))))


def _limit(size: int | None) -> int:
    if size is not None and not 0 < size <= MAX_VOLUME:
        raise Invalid(f"not a limit: {size} bytes (above 0, or none)")
    return size or 0


def _checked_limits(row: Name) -> Name:
    if row.quota and row.reservation > row.quota:
        raise Invalid(f"{row.name!r} cannot have more reserved, {row.reservation} bytes, than its quota, {row.quota}")
    return row


def _extend(draft: Draft, command: Extend) -> None:
    if command.size <= 0:
        raise Invalid(f"not a pool's size: {command.size} bytes (it is what the pool has then, not what is added)")
    draft.size = max(draft.size, command.size)


_PLANS: dict[type[Command], Callable[..., None]] = {
    Create: _create,
    Snapshot: _snapshot,
    Clone: _clone,
    Rollback: _rollback,
    Rename: _rename,
    Remove: _remove,
    Resize: _resize,
    Label: _label,
    Quota: _quota,
    Reserve: _reserve,
    Extend: _extend,
}
