"""What is left of a journal: every frame that can still be read, in order, where commits are missing, and why.

`Journal.load` is strict and stops at the first thing that does not check; this reads on. It goes by what frames say
of themselves, not by the names of their files, so segments that were renamed or swapped cost nothing. Rules:

- what is found is said, with file and offset; it is `harmless` where opening the pool would pass over it rightly;
- a frame with one wrong byte is made whole where its checksums say how (mend.py);
- the largest checkpoint that is whole counts; where it is damaged, an older one with all frames since is as good;
- where numbers are missing, commits are lost (`Lost`), and what is read behind them stands on a gap.

Reads files and writes nothing; frames have no meaning here, but for the End of a checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nbdthin.pool import journal
from nbdthin.pool.files import not_a_file
from nbdthin.pool.journal import (
    FRAME,
    HEADER,
    LAST_MARK,
    MAGIC,
    VERSION,
    Frame,
    Header,
    may_be_torn,
    parse_frame,
    parse_header,
)
from nbdthin.pool.mend import Mended, mend_header, mend_payload
from nbdthin.pool.records import BadRecord, Counter, End, Record, decode

_MOST = 1 << 62  # no journal gets as far: a file with a larger number in its name is no evidence of commits
_FILE = re.compile(r"([0-9a-f]{16})\.(log|checkpoint)")


class Finding(NamedTuple):
    """Something that is not as it was written."""

    path: Path
    offset: int | None
    what: str
    harmless: bool = False

    def __str__(self) -> str:
        where = f"{self.path}" if self.offset is None else f"{self.path} at byte {self.offset}"
        return f"{where}: {self.what}"


class Lost(NamedTuple):
    """Commits that cannot be read: frames `first` to `last` (None: and nobody knows how many)."""

    first: int
    last: int | None
    path: Path  # where they stood
    offset: int | None

    @property
    def only_one(self) -> bool:
        return self.first == self.last

    def __str__(self) -> str:
        if self.only_one:
            return f"commit {self.first}"
        return f"commits {self.first} and later" if self.last is None else f"commits {self.first} to {self.last}"


class Piece(NamedTuple):
    """A frame that can be read; its bytes stay in the file until they are asked for."""

    sequence: int
    path: Path
    offset: int
    length: int
    mended: bytes | None = None

    def frame(self) -> Frame:
        payload = self.mended
        if payload is None:
            with open(self.path, "rb") as file:
                file.seek(self.offset + HEADER.size)
                payload = file.read(self.length)
        return Frame(self.sequence, payload, self.path, self.offset)


class Hole(NamedTuple):
    """A place in a file where a frame does not check: frame `sequence`, if it is only one."""

    sequence: int
    offset: int
    durable: bool  # something behind it says that it was written whole


@dataclass(slots=True)
class File:
    """What one file of the journal holds."""

    path: Path
    number: int  # of its name
    size: int = 0
    pieces: list[Piece] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    mends: list[Finding] = field(default_factory=list)
    marked: int = 0  # the highest frame that a mark calls durable
    followed: int = 0  # the highest frame that a mark calls the last of its segment
    later: int | None = None  # offset of a frame of a later version
    is_checkpoint: bool = False  # by content, whatever its name
    is_whole: bool = False  # a checkpoint with all that its End counts


@dataclass(slots=True)
class Survey:
    """`steps` in order; what is before a Lost, and behind it, was read."""

    directory: Path
    steps: list[Piece | Lost] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    last: int = 0  # the highest number that any frame, mark or file has
    later: Finding | None = None  # a frame that a later nbdthin wrote
    empty: bool = False  # nothing is left at all

    @property
    def damage(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.harmless]

    @property
    def lost(self) -> list[Lost]:
        return [step for step in self.steps if isinstance(step, Lost)]


def survey(directory: Path) -> Survey:
    """Read the journal in `directory`, whatever is left of it. Raises OSError."""
    result = Survey(directory)
    files = _files(directory, result)
    segments = [item for item in files if not item.is_checkpoint]
    _say_what_is_odd(files, result)
    frames = _frames(segments, result)
    start = _start(files, frames, segments, result)
    _follow(start, frames, segments, result)
    _say_holes(files, result)
    _say_lost(result)
    _excuse_replaced(files, start, result)
    return result


# -- reading files


def _files(directory: Path, result: Survey) -> list[File]:
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _FILE.fullmatch(path.name)
        if path.is_file() and (match or path.name == "next"):
            file = scan(path, int(match[1], 16) if match else 0)
            if match or file.pieces:
                found.append(file)
            if path.name == "next" and not file.pieces:
                _look_at_next(path, result)
        elif (what := not_a_file(path)) and (match or path.stem == "unsynced"):
            result.findings.append(Finding(path, None, what))
        elif path.suffix != ".new" and path.stem != "unsynced":
            result.findings.append(Finding(path, None, "not a file of a journal", harmless=True))
    return found


def _look_at_next(path: Path, result: Survey) -> None:
    data = path.read_bytes()
    if data.count(0) != len(data):
        offset = len(data) - len(data.lstrip(b"\0"))
        what = "the next segment is not blank: it will be made anew"
        result.findings.append(Finding(path, offset, what, harmless=True))
    if len(data) < journal.SEGMENT_BYTES:
        what = "the next segment was cut off here: it will be made anew"
        result.findings.append(Finding(path, len(data), what, harmless=True))


def scan(path: Path, number: int) -> File:
    """Every frame of a file, in the order in which they stand there."""
    data = path.read_bytes()
    file = File(path, number, len(data))
    checkpoint = path.suffix == ".checkpoint"
    offset = 0
    while offset < len(data):
        found = parse_frame(data, offset)
        if found is not None:
            file.pieces.append(Piece(found[0], path, offset, len(found[1])))
            offset += HEADER.size + len(found[1])
            continue
        header = parse_header(data, offset)
        if header is not None and header.is_mark:
            file.marked = max(file.marked, header.sequence)
            file.followed = max(file.followed, header.sequence if header.kind == LAST_MARK else 0)
        elif header is not None and (header.version != VERSION or header.kind != FRAME):
            file.later = offset if file.later is None else file.later
        offset = _pass_over(file, data, offset, header, number if checkpoint else None)
    _classify(file)
    return file


def _classify(file: File) -> None:
    """A checkpoint's frames have one number; they begin with a Counter and end with an End."""
    if len({piece.sequence for piece in file.pieces}) > 1 or file.marked:
        return
    if not file.pieces:
        file.is_checkpoint = file.path.suffix == ".checkpoint"
        return
    count = 0
    first: Record | None = None
    last: Record | None = None
    for piece in file.pieces:
        try:
            records = decode(piece.frame().payload)
        except BadRecord:
            records = []
        count += len(records)
        if records:
            first, last = first or records[0], records[-1]
    file.is_whole = last == End(count - 1)
    file.is_checkpoint = (
        file.is_whole
        or len(file.pieces) > 1
        or (file.path.suffix == ".checkpoint" and (isinstance(first, Counter) or file.pieces[0].offset > 0))
    )


def _pass_over(file: File, data: bytes, offset: int, header: Header | None, fixed: int | None) -> int:
    """Something that is no sound frame stands at `offset`; where to read on. `fixed`: the number of all frames."""
    behind = offset + 1
    if header is not None:
        behind = offset + HEADER.size
        if not header.is_mark and behind + header.length <= len(data):
            behind += header.length
    following = _next_sound(data, behind)
    marked = header is not None and header.is_mark
    if following is None and fixed is None and _is_blank(data, behind if marked else offset):
        return len(data)
    if following is not None and header is not None and not marked:
        following = behind
    expected = _expected(file, fixed)
    if following is None and fixed is not None:
        following = len(data)
    mended = None if following is None else _mend(data, offset, following, header, expected)
    if mended is not None:
        sequence = expected if header is None else header.sequence
        file.pieces.append(Piece(sequence, file.path, offset, len(mended.payload), mended.payload))
        what = f"a damaged frame: {mended.how}; nothing is lost"
        file.mends.append(Finding(file.path, offset, what))
        return offset + HEADER.size + len(mended.payload)
    sequence = expected if header is None or marked else header.sequence
    durable = following is not None or not may_be_torn(data, offset)
    file.holes.append(Hole(sequence, behind if marked else offset, durable))
    return len(data) if following is None else following


def _expected(file: File, fixed: int | None) -> int:
    if fixed is not None:
        return file.pieces[0].sequence if file.pieces else fixed
    return file.pieces[-1].sequence + 1 if file.pieces else file.number


def _mend(data: bytes, offset: int, following: int, header: Header | None, expected: int) -> Mended | None:
    if header is None:
        mended = mend_header(data, offset, following, expected)
    elif header.kind == FRAME and header.version == VERSION:
        start = offset + HEADER.size
        mended = mend_payload(data[start : start + header.length], header, offset)
    else:
        return None
    if mended is not None:
        try:
            decode(mended.payload)
        except BadRecord:
            return None
    return mended


def _next_sound(data: bytes, start: int) -> int | None:
    """Where the next frame or mark begins that checks."""
    position = data.find(MAGIC, start)
    while position >= 0:
        header = parse_header(data, position)
        if header is not None and (header.is_mark or parse_frame(data, position) is not None):
            return position
        position = data.find(MAGIC, position + 1)
    return None


def _is_blank(data: bytes, start: int) -> bool:
    rest = memoryview(data)[start:].tobytes()
    return rest.count(0) == len(rest)


# -- putting them in order


def _say_what_is_odd(files: list[File], result: Survey) -> None:
    for file in files:
        result.findings.extend(file.mends)
        if file.later is not None and result.later is None:
            result.later = Finding(file.path, file.later, "a frame that a later nbdthin wrote")
            result.findings.append(result.later)
        suffix = ".checkpoint" if file.is_checkpoint else ".log"
        first = file.pieces[0].sequence if file.pieces else None
        begins = first if first is None or file.pieces[0].offset == 0 or file.is_checkpoint else None
        if file.path.suffix != suffix or (begins is not None and begins != file.number):
            what = f"this is {begins:016x}{suffix} under another name" if begins else "a file under another name"
            result.findings.append(Finding(file.path, 0, what))
        if suffix == ".log" and file.size < journal.SEGMENT_BYTES:
            what = f"the segment was cut off here: it was made with {journal.SEGMENT_BYTES} bytes"
            result.findings.append(Finding(file.path, file.size, what))


def _frames(segments: list[File], result: Survey) -> dict[int, Piece]:
    """The frames of all segments by number."""
    frames: dict[int, Piece] = {}
    for file in segments:
        before = 0
        for piece in file.pieces:
            if piece.sequence in frames or piece.sequence <= before:
                what = f"frame {piece.sequence} once more: it is passed over"
                result.findings.append(Finding(file.path, piece.offset, what))
            elif before and piece.sequence != before + 1 and not any(hole.sequence > before for hole in file.holes):
                what = f"frame {piece.sequence} where frame {before + 1} belongs"
                result.findings.append(Finding(file.path, piece.offset, what))
            frames.setdefault(piece.sequence, piece)
            before = max(before, piece.sequence)
    return frames


def _start(files: list[File], frames: dict[int, Piece], segments: list[File], result: Survey) -> int:
    """Choose the checkpoint to begin with, note its frames; the number of the first frame behind it."""
    candidates = sorted((file for file in files if file.is_checkpoint), key=_checkpoint_number, reverse=True)
    top = _checkpoint_number(candidates[0]) if candidates else None
    for file in candidates:
        number = _checkpoint_number(file)
        if file.is_whole:
            missing = top is not None and any(sequence not in frames for sequence in range(number, top))
            if not missing:
                result.steps.extend(file.pieces)
                return number
            break
        if not file.holes:
            what = "the checkpoint was cut off here" if file.size else "an empty checkpoint"
            result.findings.append(Finding(file.path, file.size, what))
    if top is not None and top > 1:
        return _start_from_part(candidates, top, frames, result)
    return _start_from_nothing(frames, segments, result, top)


def _start_from_part(candidates: list[File], top: int, frames: dict[int, Piece], result: Survey) -> int:
    """The newest checkpoint is damaged, and what is older does not reach up to it."""
    newest = candidates[0]
    older = next((file for file in candidates[1:] if file.is_whole), None)
    first = 1
    if older is not None:
        first = _checkpoint_number(older)
        result.steps.extend(older.pieces)
    _between(first, top, frames, newest.path, result)
    result.steps.extend(newest.pieces)
    return top


def _start_from_nothing(frames: dict[int, Piece], segments: list[File], result: Survey, top: int | None) -> int:
    """No checkpoint is left. Number 1 would have said no more than that the pool was empty."""
    first = min([*frames, *(file.number for file in segments if file.path.name != "next")], default=top or 0)
    if not first:
        result.empty = True
        result.findings.append(Finding(result.directory, None, "nothing of the journal is left"))
        return 1
    if top is None:
        what = f"{first:016x}.checkpoint is missing" + ("; it was empty" if first == 1 else "")
        result.findings.append(Finding(result.directory, None, what))
    if first > 1:
        result.steps.append(Lost(1, first - 1, result.directory, None))
    return first


def _follow(start: int, frames: dict[int, Piece], segments: list[File], result: Survey) -> None:
    """The frames from `start` on, and where some are missing."""
    known = max([start - 1, *frames])
    durable = max([known, *(file.marked for file in segments)])
    durable = max([durable, *(file.number - 1 for file in segments if not file.pieces and file.number < _MOST)])
    durable = max([durable, *(hole.sequence for file in segments for hole in file.holes if hole.durable)])
    _between(start, durable + 1, frames, None, result)
    followed = max((file.followed for file in segments), default=0)
    result.last = max(durable, followed)
    cut = next((file for file in segments if _was_cut_at_its_end(file, durable)), None)
    if cut is not None:
        result.steps.append(Lost(durable + 1, None, cut.path, cut.size))
    elif (lost := _lost_segment(segments, frames, durable, followed)) or (not segments and durable < start):
        missing = result.directory / f"{lost or start:016x}.log"
        result.findings.append(Finding(missing, None, "this segment is missing"))
        result.steps.append(Lost(result.last + 1, None, missing, None))
    elif not any(file.number == start or (file.pieces and file.pieces[0].sequence <= start) for file in segments):
        missing = result.directory / f"{start:016x}.log"
        result.findings.append(Finding(missing, None, "this segment is missing"))
        if known < start:
            result.steps.append(Lost(start, None, missing, None))


def _lost_segment(segments: list[File], frames: dict[int, Piece], durable: int, followed: int) -> int | None:
    """The number of a last segment of which a mark, or the name of a file, tells, and no file has what it held."""
    told = [followed + 1] if followed else []
    told += [file.number for file in segments if file.pieces and file.pieces[0].sequence < file.number < _MOST]
    number = max(told, default=0)
    if number <= durable or number in frames:
        return None
    for file in segments:
        if not file.pieces and (file.number == number or file.number in frames):
            if not file.holes or file.holes[0].sequence == number:
                return None  # nothing was written to it yet
    return number


def _was_cut_at_its_end(file: File, durable: int) -> bool:
    """The last segment is shorter than it was made, and no mark says that nothing stood there."""
    last = file.pieces[-1].sequence if file.pieces else file.number - 1
    return file.size < journal.SEGMENT_BYTES and last >= durable and not file.marked


def _between(first: int, end: int, frames: dict[int, Piece], path: Path | None, result: Survey) -> None:
    """Frames `first` to `end` - 1; one Lost, in `path` if that is known, for each run of those that are missing."""
    present = sorted(number for number in frames if first <= number < end)
    expected = first
    for number in [*present, end]:
        if number > expected:
            place = (path, None) if path is not None else _place(expected, number, frames, result)
            result.steps.append(Lost(expected, number - 1, *place))
        if number < end:
            result.steps.append(frames[number])
        expected = number + 1


def _place(first: int, end: int, frames: dict[int, Piece], result: Survey) -> tuple[Path, int | None]:
    """Where frames `first` to `end` - 1 stood: behind the frame before them, as far as that is known."""
    own, before, after = result.directory / f"{first:016x}.log", frames.get(first - 1), frames.get(end)
    if before is not None and not own.exists():
        return before.path, before.offset + HEADER.size + before.length
    if after is not None and after.offset:
        return after.path, 0
    return own, 0


def _say_holes(files: list[File], result: Survey) -> None:
    """Damaged places, now that it is known what follows them elsewhere."""
    numbers = {piece.sequence for file in files if not file.is_checkpoint for piece in file.pieces}
    top = max(numbers, default=0)
    named = {file.number for file in files if file.path.name != "next" and not file.is_checkpoint}
    for file in files:
        for hole in file.holes:
            harmless = False
            if file.is_whole:
                what = "bytes that do not belong to the checkpoint; nothing is lost"
            elif file.is_checkpoint or (hole.durable and hole.sequence not in numbers):
                what = "a damaged frame"
            elif hole.durable or hole.sequence <= top or any(number > file.number for number in named):
                what = "a damaged frame or mark where another segment follows; nothing is lost"
            elif file.size < journal.SEGMENT_BYTES:
                what = "a damaged frame"
            else:
                harmless = True
                what = "bytes behind the last frame, which no commit needs (a torn append, or damage): to be cleared"
            result.findings.append(Finding(file.path, hole.offset, what, harmless))


def _say_lost(result: Survey) -> None:
    """What each damage costs is said where it is."""
    for lost in result.lost:
        place = (lost.path, lost.offset)
        at = next((index for index, found in enumerate(result.findings) if found[:2] == place), None)
        if at is None and lost.offset is None:
            at = next((index for index, found in enumerate(result.findings) if found.path == lost.path), None)
        if at is None:
            what = f"{lost} cannot be read: {'it is' if lost.only_one else 'they are'} lost"
            result.findings.append(Finding(lost.path, lost.offset, what))
        elif not result.findings[at].harmless:
            found = result.findings[at]
            result.findings[at] = found._replace(what=f"{found.what}: {lost} lost")


def _excuse_replaced(files: list[File], start: int, result: Survey) -> None:
    """What a checkpoint has replaced is not read any more: its damage harms nothing."""
    sound = any(file.is_whole and file.number == start and file.path.suffix == ".checkpoint" for file in files)
    if not sound or any(file.is_checkpoint and _checkpoint_number(file) > start for file in files):
        return
    replaced = {
        file.path
        for file in files
        if 0 < file.number < start and not any(piece.sequence >= start for piece in file.pieces)
    }
    result.findings = [
        found._replace(harmless=True, what=f"{found.what} (a checkpoint has replaced it)")
        if found.path in replaced and not found.harmless
        else found
        for found in result.findings
    ]


def _checkpoint_number(file: File) -> int:
    return file.pieces[0].sequence if file.pieces else file.number
