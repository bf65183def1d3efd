"""What can be asked over the control socket: one table, a row a command.

A change becomes commands of the pool, is durable when it is answered, and may be part of a batch. A query only looks. A
stream answers item by item for as long as it takes, or until the client goes away.
The arguments of a row are a dataclass, and what comes in is checked against it before anything else happens. Who may
ask is the socket's business (mode 0600), how it crosses is the codec's.

To add a command: a dataclass, a row, a method of the client; the documentation's test then asks for the rest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nbdthin import __version__, host
from nbdthin.addresses import Address
from nbdthin.control import codec, looking
from nbdthin.control.rows import Export, Info
from nbdthin.errors import InUse, Invalid, NoSpace, OverQuota, Unreachable
from nbdthin.lag import Lag
from nbdthin.pool.commands import (
    Clone,
    Command,
    Create,
    Extend,
    Label,
    Quota,
    Rename,
    Reserve,
    Resize,
    Rollback,
    Snapshot,
)
from nbdthin.pool.commands import Remove as RemoveOne
from nbdthin.pool.events import Event
from nbdthin.pool.limits import advised
from nbdthin.pool.records import is_deferred, lasting_name
from nbdthin.pool.rows import Extent, Row, Scrubbed

if TYPE_CHECKING:
    from nbdthin.pool.live import LivePool

STOPS = "the daemon stops"
FORCED_TRIES = 3  # a client that reconnects at once may be back before its volume is removed


class Described(Protocol):
    @property
    def read_only(self) -> bool: ...


class Exports(Protocol):
    """What the NBD server knows of the names it serves."""

    @property
    def connections(self) -> int: ...
    def describe(self, name: str) -> Described | None: ...
    def open_count(self, name: str) -> int: ...
    def holders(self, name: str) -> tuple[str, ...]: ...
    async def disconnect(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Daemon:
    """What commands act on."""

    live: LivePool
    exports: Exports
    listen: tuple[Address, ...]
    control: Path
    lag: Lag

    def export(self, row: Row) -> Export:
        """`row` with what only the daemon knows."""
        described = self.exports.describe(row.name)
        address = self.listen[0] if self.listen else None
        return Export(
            name=row.name,
            kind=row.kind,
            size=row.size,
            referenced=row.referenced,
            exclusive=row.exclusive,
            shared=row.shared,
            parent=row.parent,
            created=row.created,
            labels=row.labels,
            quota=row.quota,
            reservation=row.reservation,
            charged=row.charged,
            read_only=described is None or described.read_only,
            connections=self.exports.holders(row.name),
            open_count=self.exports.open_count(row.name),
            uri=None if address is None or is_deferred(row.name) else address.uri(row.name),
            lasting_uri=None if address is None else address.uri(lasting_name(row.name, row.created)),
        )


# -- arguments beyond those that are the pool's own commands


@dataclass(frozen=True, slots=True)
class Remove:
    names: tuple[str, ...]
    force: bool = False  # disconnect who holds them
    deferred: bool = False  # those that somebody holds are hidden, and removed when they do no more
    if_exists: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A command as it crosses: its name in the table, its arguments not yet checked."""

    command: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Request:
    version: int
    command: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Batch:
    commands: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class List:
    labels: Mapping[str, str] = field(default_factory=dict)  # only what has all of them
    deferred: bool = False  # what was removed while it was in use, instead of what there is


@dataclass(frozen=True, slots=True)
class Show:
    name: str


@dataclass(frozen=True, slots=True)
class Diff:
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Scrub:
    names: tuple[str, ...] = ()  # all without any
    rate: int | None = None  # bytes a second


@dataclass(frozen=True, slots=True)
class Nothing:
    pass


# -- changes


def _itself(command: Command) -> Sequence[Command]:
    return (command,)


def _remove(arguments: Remove) -> Sequence[RemoveOne]:
    if arguments.force and arguments.deferred:
        raise Invalid("either disconnect who uses it (force), or wait for them (deferred)")
    names = dict.fromkeys(arguments.names)
    return tuple(RemoveOne(name, arguments.deferred, arguments.if_exists) for name in names)


def _batch(arguments: Batch) -> Sequence[Command]:
    commands: list[Command] = []
    for number, call in enumerate(arguments.commands, 1):
        row = find(call.command)
        if not isinstance(row, Change) or row.arguments is Batch:
            raise Invalid(f"command {number} of the batch: {call.command} cannot be part of one")
        checked = _arguments(call.command, row, call.arguments)
        if isinstance(checked, Remove) and checked.force:
            raise Invalid(f"command {number} of the batch: force cannot be undone, so it cannot be part of one")
        commands.extend(row.commands(checked))
    return commands


async def _change(daemon: Daemon, row: Change, arguments: object) -> None:
    if isinstance(arguments, Remove) and arguments.force:
        return await _remove_by_force(daemon, _remove(arguments))
    commands = row.commands(arguments)
    try:
        await daemon.live.execute(commands)
    except OverQuota:
        raise
    except NoSpace as error:
        raise NoSpace(advised(str(error), daemon.live.pool)) from error


async def _remove_by_force(daemon: Daemon, commands: Sequence[RemoveOne]) -> None:
    for command in commands:
        if not command.if_exists:
            daemon.live.pool.show(command.name)  # a refused command disconnects nobody
    daemon.live.pool.check_writable()
    # What was removed before is freed by itself as soon as it is let go.
    commands = [replace(command, if_exists=command.if_exists or is_deferred(command.name)) for command in commands]
    for _ in range(FORCED_TRIES - 1):
        for command in commands:
            await daemon.exports.disconnect(command.name)
        try:
            return await daemon.live.execute(commands)
        except InUse:
            pass
    await daemon.live.execute(commands)


# -- queries


async def _list(daemon: Daemon, arguments: List) -> list[Export]:
    await looking.prepare(daemon)
    wanted = arguments.labels.items()
    rows = daemon.live.pool.list(deferred=arguments.deferred)
    return [daemon.export(row) for row in rows if wanted <= row.labels.items()]


def _show(daemon: Daemon, arguments: Show) -> Export:
    return daemon.export(daemon.live.pool.show(arguments.name))


def _diff(daemon: Daemon, arguments: Diff) -> list[Extent]:
    return daemon.live.pool.diff(arguments.before, arguments.after)


def _info(daemon: Daemon, _: Nothing) -> Info:
    pool = daemon.live.pool.info()
    return Info(
        version=__version__,
        pool=pool,
        listen=tuple(str(address) for address in daemon.listen),
        connections=daemon.exports.connections,
        process=host.process_facts(),
        loop=daemon.lag.facts(),
        disk=host.disk_facts(pool.data_path),
    )


# -- streams


def _events(daemon: Daemon, _: Nothing) -> AsyncIterator[Event]:
    return _until_stopped(daemon.live.listen())


async def _until_stopped(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """An end without a word would look as if nothing more could happen."""
    async for event in events:
        yield event
    raise Unreachable(STOPS)


def _scrub(daemon: Daemon, arguments: Scrub) -> AsyncIterator[Scrubbed]:
    if arguments.rate is not None and arguments.rate <= 0:
        raise Invalid("a rate is more than 0 bytes a second")
    return daemon.live.verifier.scrub(arguments.names, arguments.rate)


# -- the table


@dataclass(frozen=True, slots=True)
class Change:
    doc: str
    arguments: type
    commands: Callable[..., Sequence[Command]] = _itself


@dataclass(frozen=True, slots=True)
class Query:
    doc: str
    arguments: type
    answer: Callable[..., object]


@dataclass(frozen=True, slots=True)
class Stream:
    doc: str
    arguments: type
    items: Callable[..., AsyncIterator[object]]


COMMANDS: dict[str, Change | Query | Stream] = {
    "create": Change("a new volume that reads as zeroes", Create),
    "snapshot": Change("keep what a volume holds now under a name", Snapshot),
    "clone": Change("a new volume that starts as a snapshot", Clone),
    "rollback": Change("make a volume what a snapshot is", Rollback),
    "rename": Change("give a volume or snapshot another name", Rename),
    "remove": Change("remove volumes and snapshots", Remove, _remove),
    "resize": Change("give a volume another size", Resize),
    "label": Change("set and remove labels", Label),
    "quota": Change("what a volume may take of the pool", Quota),
    "reserve": Change("keep space for a volume", Reserve),
    "extend": Change("make the pool larger", Extend),
    "batch": Change("several changes: all or nothing, one commit", Batch, _batch),
    "list": Query("every volume and snapshot, or those with some labels", List, _list),
    "show": Query("one volume or snapshot", Show, _show),
    "diff": Query("where two snapshots differ", Diff, _diff),
    "explain": Query("the way of one read or write", looking.ExplainArguments, looking.explain),
    "map": Query("where a volume's data comes from", looking.MapArguments, looking.volume_map),
    "du": Query("what names take, and what removing them frees", looking.DuArguments, looking.disk_use),
    "names": Query("names alone", looking.NamesArguments, looking.names),
    "info": Query("the pool, the process, the disk", Nothing, _info),
    "scrub": Stream("compare data with its checksums", Scrub, _scrub),
    "events": Stream("what happens to the pool, from now on", Nothing, _events),
}


def find(command: str) -> Change | Query | Stream:
    """Raises Invalid."""
    row = COMMANDS.get(command)
    if row is None:
        raise Invalid(codec.unknown("command", command, COMMANDS))
    return row


def _arguments(command: str, row: Change | Query | Stream, arguments: Mapping[str, object]) -> object:
    try:
        return codec.load(row.arguments, arguments)
    except Invalid as error:
        raise Invalid(f"{command}: {error}") from error


async def run(daemon: Daemon, message: object) -> object:
    """Carry out one request; an AsyncIterator where the answer is a stream. Raises errors.Error."""
    request = codec.load(Request, message)
    if request.version != codec.VERSION:
        raise Invalid(
            f"the daemon speaks version {codec.VERSION} of the control protocol, not {request.version} "
            "(use the `nbdthin` that was installed with the daemon)"
        )
    row = find(request.command)
    arguments = _arguments(request.command, row, request.arguments)
    if isinstance(row, Query):
        answer = row.answer(daemon, arguments)
        return await answer if isinstance(answer, Awaitable) else answer
    if isinstance(row, Stream):
        return row.items(daemon, arguments)
    await _change(daemon, row, arguments)
    return None
