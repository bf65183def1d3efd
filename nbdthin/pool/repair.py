"""Bring a damaged pool back to what is left of it, and say exactly what is gone.

The superblock and the header of the data are made from each other, the journal from what `survey` and `salvage` find.
Rules:

- where nothing is damaged, nothing is changed;
- what was there is kept beside it, under its name and `.damaged-N`: nothing is destroyed;
- the new journal is written whole and synced under another name, read back as recovery would, and takes the old one's
  place in one step: a crash at any moment leaves one or the other;
- what is lost may still be in blocks that are free now: they are kept from being swept (`POOL/repaired`), until
  somebody says that no dump will bring it back;
- nothing is guessed about whose data it is: a sound header of another pool, or a file that is no pool's, is refused.

Asks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbdthin.errors import Corrupt, Invalid, Locked, NotFound
from nbdthin.pool.allocator import Allocator
from nbdthin.pool.data import device_size, is_device
from nbdthin.pool.files import FILES, Files, not_a_file, open_file, read_file, write_all, write_file
from nbdthin.pool.journal import Frame, Journal
from nbdthin.pool.layers import State
from nbdthin.pool.pool import REPAIRED, Capture
from nbdthin.pool.records import BadRecord, decode
from nbdthin.pool.salvage import Loss, Salvage
from nbdthin.pool.superblock import (
    DATA_HEADER,
    DATA_MAGIC,
    LaterVersion,
    Superblock,
    parse_data_header,
    read_superblock,
)
from nbdthin.pool.survey import Finding, Survey, survey

_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair found and did. Without `damage` nothing was changed."""

    path: Path
    dry_run: bool
    damage: tuple[str, ...]
    notes: tuple[str, ...]  # what is odd and harmless
    lost: tuple[Loss, ...]
    kept: tuple[Path, ...]  # what was there, put aside


@dataclass(slots=True)
class Identity:
    """What a pool's superblock and its data say of it. `superblock` is None where neither can be read."""

    path: Path
    data: Path
    superblock: Superblock | None = None
    write_superblock: bool = False
    page: bytes | None = None  # the first bytes of the data, None where there is none
    write_header: bool = False
    data_bytes: int = 0
    wrong_kinds: list[Path] = field(default_factory=list)  # a FIFO, a directory: no files, and in the way of some
    findings: list[Finding] = field(default_factory=list)


@contextlib.contextmanager
def locked(path: Path, *, new: bool = False) -> Iterator[None]:
    """Keep everyone else off the pool in the directory `path`, or what is left of it. Raises NotFound or Locked."""
    if path.is_dir() and not new and not any(path.glob("superblock*")) and not any(path.glob("journal*")):
        raise NotFound(f"no pool at {path} (`nbdthin init {path}` makes one)")
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"no pool at {path}") from error
    try:
        with flocked(lock, f"the pool at {path} is open in another process (stop it first)"):
            yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def flocked(fd: int, message: str) -> Iterator[None]:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Locked(message) from error
    yield


# -- whose it is


def identify(path: Path, data: Path | None = None, *, write_header: bool = False) -> Identity:
    """Read the superblock and the data's header. Raises NotFound where there is no pool, LaterVersion, or Corrupt where
    the data is another pool's, or cannot be told to be this one's: `write_header` says that it is."""
    identity = Identity(path, path / "data")
    if what := not_a_file(path / "sums"):
        identity.findings.append(Finding(path / "sums", None, f"{what}: checksums are computed anew"))
        identity.wrong_kinds.append(path / "sums")
    try:
        identity.superblock = read_superblock(path / "superblock")
        identity.data = path / identity.superblock.data
    except LaterVersion:
        raise
    except NotFound:
        if not path.is_dir() or not ((path / "journal").exists() or data is not None):
            raise
        identity.findings.append(Finding(path / "superblock", None, "the superblock is missing"))
        identity.write_superblock = True
    except Corrupt as error:
        identity.findings.append(Finding(error.path, error.offset, error.what))
        identity.write_superblock = True
        if not_a_file(path / "superblock"):
            identity.wrong_kinds.append(path / "superblock")
    named = data is not None and data.absolute() != identity.data.absolute()
    if data is not None and named:
        if identity.superblock is not None and _is_data_of(identity.data, identity.superblock):
            raise Invalid(f"the data of {path} is where its superblock says, at {identity.data}: leave out --data")
        identity.data = data.absolute()
        identity.write_superblock = True
    _read_header(identity, named, write_header)
    return identity


def _is_data_of(path: Path, superblock: Superblock) -> bool:
    try:
        return _page(path) == superblock.data_header()
    except (OSError, Corrupt):
        return False


def _page(path: Path) -> bytes:
    with open(open_file(path, device=True), "rb") as file:
        return file.read(DATA_HEADER)


def _read_header(identity: Identity, named: bool, forced: bool) -> None:
    path = identity.data
    try:
        identity.page = _page(path)
        identity.data_bytes = device_size(path) if is_device(path) else path.stat().st_size
    except FileNotFoundError:
        identity.findings.append(Finding(path, None, "the pool's data is missing"))
        return
    place = "data" if path == identity.path / "data" else str(path)
    copy, problem = _header_copy(path, identity.page, place)
    superblock = identity.superblock
    if superblock is None:
        identity.superblock = copy
    elif copy is not None and copy.uuid != superblock.uuid:
        raise Corrupt(path, 0, f"this is the data of another pool: its uuid is {copy.uuid}, not {superblock.uuid}")
    elif identity.write_superblock:
        identity.superblock = replace(superblock, data=place)
        identity.findings.append(Finding(identity.path / "superblock", None, f"it names other data than {path}"))
    if identity.superblock is None or identity.page != identity.superblock.data_header():
        identity.findings.append(Finding(path, 0, problem or "the data's header is not that of this pool's superblock"))
        identity.write_header = True
        if superblock is not None and not _may_be_ours(identity.page, superblock, named):
            _refuse_foreign(identity, superblock, problem, forced)
    if identity.superblock is not None and identity.data_bytes < identity.superblock.size:
        _say_truncated(identity, identity.superblock.size)


def _say_truncated(identity: Identity, size: int) -> None:
    what = f"it has {identity.data_bytes} bytes, the pool needs {size}: it was truncated"
    identity.findings.append(Finding(identity.data, identity.data_bytes, what))


def _header_copy(path: Path, page: bytes, place: str) -> tuple[Superblock | None, str]:
    try:
        return parse_data_header(path, page, place), ""
    except LaterVersion:
        raise
    except Corrupt as error:
        return None, error.what


def _may_be_ours(page: bytes, superblock: Superblock, named: bool) -> bool:
    """A damaged header still shows whose it is. A sector of zeroes is one that was lost, where the superblock says."""
    uuid, expected = page[16:32], superblock.data_header()[16:32]
    differing = sum(one != other for one, other in zip(uuid, expected, strict=False)) + len(expected) - len(uuid)
    if differing <= (1 if page.startswith(DATA_MAGIC) else 0):
        return True
    return not named and not any(page[:_SECTOR])


def _refuse_foreign(identity: Identity, superblock: Superblock, problem: str, forced: bool) -> None:
    """Nothing shows that the data is the pool's. Who insists must have one that can hold the pool, at least."""
    if not forced:
        what = f"{problem}; nothing shows that it is this pool's (--write-header says that it is, and writes it)"
        raise Corrupt(identity.data, 0, what)
    if identity.data_bytes < superblock.size:
        what = f"{problem}; and it has {identity.data_bytes} bytes, the pool {superblock.size}: not this pool's"
        raise Corrupt(identity.data, 0, what)


# -- the verb


def repair(
    path: Path | str,
    *,
    data: Path | str | None = None,
    write_header: bool = False,
    dry_run: bool = False,
    files: Files = FILES,
) -> Repair:
    """Repair the pool at `path`, which must not be in use; `dry_run` only says what that would do.

    `data`: where its data is, when the superblock does not say so rightly; `write_header`: that is this pool's,
    although its header does not show it. Raises NotFound, Locked, OSError, or Corrupt for what cannot be repaired;
    then nothing was changed.
    """
    path = Path(path)
    with locked(path), contextlib.ExitStack() as held:
        identity = identify(path, None if data is None else Path(data), write_header=write_header)
        superblock = identity.superblock
        if superblock is None:
            raise Corrupt(path / "superblock", None, f"it cannot be read, nor its copy in {identity.data} (--data?)")
        if identity.page is None:
            raise NotFound(f"the pool's data is missing: {identity.data} (`--data FILE` says where it is)")
        fd = open_file(identity.data, os.O_RDWR, device=True)
        held.callback(os.close, fd)
        held.enter_context(flocked(fd, f"{identity.data} is the data of a pool that is open"))
        directory = _source(path)
        found = survey(directory)
        salvage = examine(found, identity)
        if salvage.foreign is not None:
            raise _foreign(salvage.foreign, identity)
        if is_device(identity.data) and identity.data_bytes < salvage.size:
            raise Invalid(f"{identity.data} has {identity.data_bytes} bytes, the pool needs {salvage.size}")
        damage = (*identity.findings, *found.damage, *salvage.defects)
        kept: list[Path] = []
        if damage and not dry_run:
            kept = _write(identity, superblock, salvage.size, fd, files)
            if salvage.losses:
                write_file(files, path / REPAIRED, (f"{loss}\n".encode() for loss in salvage.losses))
                files.sync_directory(path)
            if found.damage or salvage.defects:
                kept += replace_journal(path, directory, salvage.state, superblock, found.last + 1, files)
    notes = tuple(str(finding) for finding in found.findings if finding.harmless)
    return Repair(path, dry_run, tuple(map(str, damage)), notes, tuple(salvage.losses) if damage else (), tuple(kept))


def release(path: Path | str, *, files: Files = FILES) -> None:
    """Nothing will bring back what repairs of the pool at `path` have lost: whoever serves it next may sweep.

    Raises NotFound where no repair has lost anything, Locked or OSError.
    """
    path = Path(path)
    with locked(path):
        if not (path / REPAIRED).exists():
            raise NotFound(f"no repair has lost anything of {path}: there is nothing to let go of")
        files.close(files.open(path / "journal" / "unsynced.0", os.O_CREAT))  # as after a kill: there is space to find
        files.unlink(path / REPAIRED)
        files.sync_directory(path)


def _source(path: Path) -> Path:
    """The journal; or the last one put aside, where a crash came between two renames of `_put_in_place`."""
    aside = sorted(path.glob("journal.damaged-*"), key=lambda item: int(item.suffix.rpartition("-")[2]))
    return aside[-1] if aside and not (path / "journal").exists() else path / "journal"


def examine(found: Survey, identity: Identity) -> Salvage:
    """What can be had of a journal. Raises Corrupt where that is nothing, or where it is a later version's."""
    if found.later is not None:
        raise LaterVersion(found.later.path, found.later.offset, found.later.what)
    if found.empty:
        raise Corrupt(found.directory, None, "nothing of the journal is left (`nbdthin restore` takes a dump)")
    superblock = identity.superblock
    assert superblock is not None
    data_bytes = None if identity.page is None else identity.data_bytes
    salvage = Salvage(found, superblock, data_bytes)
    if salvage.foreign is not None:
        return salvage
    if (found.damage or salvage.defects) and any(found.directory.glob("unsynced.*")):
        what = "writes that were answered and never flushed, noted when the process was killed (unsynced.*)"
        salvage.losses.append(Loss("", 0, 0, what))
    if data_bytes is not None and superblock.size <= data_bytes < salvage.size:
        _say_truncated(identity, salvage.size)
    if not found.damage and not salvage.defects:
        try:
            replay(found.directory, superblock)
        except Corrupt as error:  # recovery has the last word: what it would refuse is damage
            found.findings.append(Finding(error.path, error.offset, error.what))
    return salvage


def _foreign(found: Finding, identity: Identity) -> Corrupt:
    """The journal is not that of the data: to mix them would be the end of both."""
    whose = [] if identity.write_superblock else [str(identity.path / "superblock")]
    whose += [] if identity.write_header else [str(identity.data)]
    what = f"{found.what}, as {' and '.join(whose)} say (put the right journal back, or `nbdthin restore` a dump)"
    return Corrupt(found.path, found.offset, what)


def replay(directory: Path, superblock: Superblock) -> State:
    """The state that recovery gets from a journal. Raises Corrupt."""
    state = State(superblock.uuid)

    def apply(frame: Frame) -> None:
        try:
            for record in decode(frame.payload):
                state.apply(record)
        except BadRecord as error:
            raise Corrupt(frame.path, frame.offset, str(error)) from error

    Journal(directory).load(apply, repair_tail=False)
    space = Allocator((state.size or superblock.size) // superblock.block_size, 1)
    for layer in state.layers.values():
        if len(space.claim(layer.physical_blocks())):
            raise Corrupt(directory, None, f"the blocks of layer {layer.number} are not all its own")
    return state


# -- writing


def _free_number(path: Path) -> int:
    taken = {item.name.rpartition("-")[2] for item in path.glob("*.damaged-*")}
    return next(number for number in range(1, len(taken) + 2) if str(number) not in taken)


def _write(identity: Identity, superblock: Superblock, size: int, fd: int, files: Files) -> list[Path]:
    """The superblock, the data's header and its size, where they are wrong; what was put aside."""
    path, kept = identity.path, []
    number = _free_number(path)
    for wrong in identity.wrong_kinds:
        kept.append(path / f"{wrong.name}.damaged-{number}")
        files.rename(wrong, kept[-1])
        if wrong.name == "sums":
            write_file(files, wrong, ())
    if identity.write_header:
        assert identity.page is not None
        kept.append(path / f"data-header.damaged-{number}")
        write_file(files, kept[-1], [identity.page])
        files.sync_directory(path)
    if identity.data_bytes < size:
        files.truncate(fd, size)
    if identity.write_header:
        write_all(files, fd, superblock.data_header(), 0)
    os.fsync(fd)
    if identity.write_superblock:
        if (path / "superblock").exists():
            kept.append(path / f"superblock.damaged-{number}")
            write_file(files, kept[-1], [read_file(path / "superblock")])
        superblock.write(path / "superblock", files)
    files.sync_directory(path)
    return kept


def replace_journal(
    path: Path, old: Path, state: State, superblock: Superblock, number: int, files: Files = FILES
) -> list[Path]:
    """Make `state` the journal of the pool at `path`, from checkpoint `number` on; where `old` is kept."""
    made = path / "journal.repaired"
    shutil.rmtree(made, ignore_errors=True)
    Journal.create_at(made, max(number, 2), Capture(state).payloads(), files)  # 1 would say that nothing was before
    again = replay(made, superblock)
    assert again.names == state.names and again.layers.keys() == state.layers.keys()
    if not not_a_file(path / "sums"):  # of a later state than this one, in which layers may have had these numbers
        write_file(files, path / "sums", ())
        files.sync_directory(path)
    return [_put_in_place(path, made, old, files)] if old.exists() else _put(path, made, files)


def _put(path: Path, made: Path, files: Files) -> list[Path]:
    files.rename(made, path / "journal")
    files.sync_directory(path)
    return []


def _put_in_place(path: Path, made: Path, old: Path, files: Files) -> Path:
    if old != path / "journal":  # it is aside already
        _put(path, made, files)
        return old
    aside = path / f"journal.damaged-{_free_number(path)}"
    files.rename(made, aside)  # first, so that the exchange is the last step and the old one is never `made`
    try:
        files.exchange(aside, old)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        files.rename(aside, made)
        files.rename(old, aside)  # not in one step: `_source` knows what a crash here leaves
        files.rename(made, old)
    files.sync_directory(path)
    return aside
