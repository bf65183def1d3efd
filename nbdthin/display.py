"""How things look to people: on a terminal and, plain, whole and greppable, everywhere else. Only prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Self, TextIO

from nbdthin.control.codec import printable
from nbdthin.control.rows import Detail, DiskFacts, Export, Info, LoopFacts, Node, ProcessFacts
from nbdthin.pool.events import Event
from nbdthin.pool.rows import Extent, Finding, PoolInfo, Row, Scrubbed
from nbdthin.pool.views import DiskUse
from nbdthin.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress

WIDEST = 100_000  # columns: rows are never cut, the terminal wraps them

Facts = Iterable[tuple[str, str]]

_COLUMNS = ("NAME", "KIND", "SIZE", "REFERENCED", "EXCLUSIVE", "SHARED", "PARENT", "CREATED", "USED BY", "LABELS")
ROW_COLUMNS = _COLUMNS[:6]
_NUMBERS = ("SIZE", "REFERENCED", "EXCLUSIVE", "SHARED")


def show_new_pool(info: PoolInfo) -> None:
    print(f"{printable(str(info.path))}: {format_size(info.data_total)} in blocks of {format_size(info.block_size)}")


class Bar:
    """How far something is, with rate and time left, where `file` is a terminal. It stays unless it is `transient`."""

    def __init__(self, what: str, *, file: TextIO, quiet: bool, transient: bool = False) -> None:
        self._progress: Progress | None = None
        if file.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            self._progress = Progress(
                *Progress.get_default_columns()[:2],
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=file),
                transient=transient,
            )
            self._task = self._progress.add_task(printable(what), total=None)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def show(self, done: int, total: int | None) -> None:
        """Bytes; `total` is None where nobody knows."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def __call__(self, done: int, total: int) -> None:
        """As progress is told: `total` is 0 where nobody knows."""
        self.show(done, total or None)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


class Scrubbing:
    """A scrub as it goes on: a bar on a terminal, what was found, and a line about all of it at the end."""

    def __init__(self, *, quiet: bool) -> None:
        self._bar = Bar("scrub", file=sys.stdout, quiet=quiet)
        self._last: Scrubbed | None = None

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def show(self, step: Scrubbed) -> None:
        self._last = step
        self._bar.show(step.done, step.total)
        if step.finding is not None:
            print(_finding(step.finding))
            sys.stdout.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.__exit__()
        if kind is None and self._last is not None:
            unsummed = (
                f", {format_size(self._last.unsummed)} of it without checksums yet" if self._last.unsummed else ""
            )
            print(f"scrubbed {format_size(self._last.done)}{unsummed}")


def _finding(finding: Finding) -> str:
    what = "unreadable" if finding.unreadable else "damaged"
    others = ", ".join(name for name in finding.affected if name != finding.name)
    where = f"{finding.name or 'nothing that has a name'}: {finding.length} bytes at {finding.offset} are {what}"
    return f"{where} (data byte {finding.position}){f'; also in {others}' if others else ''}"


def show_uri(export: Export) -> None:
    if export.uri is not None:
        print(export.uri)


def show_exports(exports: Sequence[Export]) -> None:
    show_table(_COLUMNS, [_cells(export) for export in exports], _NUMBERS)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> None:
    """Cells are printable text; `numbers` are the columns that are set to the right."""
    if sys.stdout.isatty():
        _draw_table(columns, rows, numbers)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        padded = [
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths, strict=True)
        ]
        print("  ".join(padded).rstrip())


def _row_cells(row: Row) -> tuple[str, ...]:
    return row.name, row.kind, *map(format_size, (row.size, row.referenced, row.exclusive, row.shared))


def _cells(export: Export) -> tuple[str, ...]:
    return (
        *_row_cells(export),
        export.parent or "-",
        moment(export.created),
        printable(", ".join(export.connections)) or "-",
        " ".join(_labels(export)) or "-",
    )


def _draw_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a label is no markup
    console = Console(highlight=False)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=WIDEST)).maximum)
    console.print(table, soft_wrap=True)


def show_detail(detail: Detail) -> None:
    _print_facts(_export_facts(detail))


def _export_facts(export: Detail) -> Facts:
    yield "Name", export.name
    yield "Kind", export.kind
    yield "Size", _bytes(export.size)
    yield "Referenced", _bytes(export.referenced)
    yield "Exclusive", _bytes(export.exclusive)
    yield "Shared", _bytes(export.shared)
    yield "Mapped", _bytes(export.mapped)
    yield "Highest mapped", _bytes(export.highest)
    yield "Runs", f"{export.runs} in the data file"
    if export.quota is not None or export.reservation is not None:
        yield "Quota", "none" if export.quota is None else _bytes(export.quota)
        yield "Reservation", "none" if export.reservation is None else _bytes(export.reservation)
        yield "Charged", _bytes(export.charged)
    yield "Parent", export.parent or "-"
    yield "Created", moment(export.created)
    yield "Read-only", "yes" if export.read_only else "no"
    yield "URI", export.uri or "-"
    for label in _labels(export):
        yield "Label", label
    for holder in export.connections:
        yield "Used by", holder


def show_event(event: Event) -> None:
    print(f"{moment(event.time)} {event.kind}: {printable(event.message)}")


def show_tree(nodes: Sequence[Node]) -> None:
    """A line an export, drawn from the last to the first: only then is it known which lines go on."""
    open_at: set[int] = set()  # depths at which a sibling follows further down
    rows = []
    for node in reversed(nodes):
        stems = "".join("│   " if depth in open_at else "    " for depth in range(1, node.depth))
        branch = ("├── " if node.depth in open_at else "└── ") if node.depth else ""
        open_at = {depth for depth in open_at if depth < node.depth} | {node.depth}
        name, *others = _row_cells(node.export)
        rows.append((f"{stems}{branch}{name}", *others))
    if not _can_draw():
        rows = [(name.translate(_ASCII), *others) for name, *others in rows]
    show_table(ROW_COLUMNS, rows[::-1], _NUMBERS)


def show_disk_use(use: DiskUse) -> None:
    show_table(ROW_COLUMNS, [_row_cells(row) for row in use.rows], _NUMBERS)
    what = "this" if len(use.rows) == 1 else "all of these"
    print(f"removing {what} frees {_bytes(use.freed)} of {format_size(use.used)} in use")


_ASCII = str.maketrans({"│": "|", "├": "|", "└": "`", "─": "-"})


def _can_draw() -> bool:
    try:
        "│├└─".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def show_extents(extents: Iterable[Extent]) -> None:
    """Offset and length in bytes, and what the second snapshot holds there."""
    for extent in extents:
        print(extent.offset, extent.length, "data" if extent.data else "zero")


def show_info(info: Info) -> None:
    print(f"Version: {info.version}")
    for address in info.listen:
        print(f"Listen: {printable(address)}")
    print(f"Connections: {info.connections}")
    print(f"Pool: {printable(str(info.pool.path))}")
    _print_facts(_pool_facts(info.pool), 1)
    print(f"Process: {info.process.pid}")
    _print_facts((*_process_facts(info.process), *_loop_facts(info.loop)), 1)
    print(f"Disk: {printable(info.disk.device)}")
    _print_facts(_disk_facts(info.disk), 1)


def _pool_facts(pool: PoolInfo) -> Facts:
    if pool.failed is not None:
        yield "Failed", pool.failed
    yield "UUID", pool.uuid
    yield "Block size", format_size(pool.block_size)
    yield "Data", str(pool.data_path)
    yield "Data used", _bytes(pool.data_used)
    yield "Data total", _bytes(pool.data_total)
    yield "Data available", _bytes(pool.data_available)
    yield "Data reserved", _bytes(pool.data_reserved)
    yield "Minimum free", f"{_bytes(pool.min_free)}, for new volumes and clones"
    yield "Metadata used", _bytes(pool.metadata_used)
    yield "Metadata total", _bytes(pool.metadata_total)
    yield "Metadata available", _bytes(pool.metadata_available)
    yield "Mapping in memory", format_size(pool.memory_mapping)
    yield "Volumes", str(pool.volumes)
    yield "Snapshots", str(pool.snapshots)
    if pool.deferred:
        yield "Deferred", f"{pool.deferred} removed and not yet freed, {_bytes(pool.deferred_held)}"
    merging = f", {pool.merging} of them to be merged" if pool.merging else ""
    yield "Layers", f"{pool.layers}{merging}"
    yield "Virtual size", _bytes(pool.virtual_size)
    yield "Oversubscription", f"{pool.oversubscription:.2f}"
    yield "Journal", f"{format_size(pool.journal)} since the last checkpoint"
    yield "Checkpoint", format_size(pool.checkpoint)
    yield "Sequence", str(pool.sequence)


def _process_facts(process: ProcessFacts) -> Facts:
    yield "Started", moment(process.started)
    yield "Memory", format_size(process.memory)
    yield "CPU", f"{process.cpu:.1f} s"
    yield "Threads", str(process.threads)
    yield "Open files", f"{process.files} of {process.files_limit}"
    yield "Data path", "compiled" if process.compiled else "interpreted"


def _loop_facts(loop: LoopFacts) -> Facts:
    late = f"{_milliseconds(loop.lag_p99)} (99 %), {_milliseconds(loop.lag_max)} (longest)"
    yield "Loop lag", f"{late}, of {loop.samples} samples in the last minute"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _disk_facts(disk: DiskFacts) -> Facts:
    yield "Type", disk.type
    if disk.mount is not None:
        yield "Mounted at", str(disk.mount)
        yield "Used", _bytes(disk.used)
    yield "Total", _bytes(disk.total)
    if disk.mount is not None:
        yield "Available", _bytes(disk.available)


def _print_facts(facts: Facts, indent: int = 0) -> None:
    for name, value in facts:
        print(f"{' ' * indent}{name}: {printable(value)}")


def _labels(export: Export) -> list[str]:
    return [f"{printable(key)}={printable(value)}" for key, value in sorted(export.labels.items())]


def _bytes(size: int) -> str:
    return f"{format_size(size)} ({size} bytes)"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
