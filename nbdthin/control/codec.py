"""What crosses the control socket: frames of msgpack, and dataclasses as maps.

    frame      u32, big-endian: length of the payload; the payload, one msgpack map
    request    {version, command, arguments}
    reply      {part: [...]} any number of times, for lists of any length and for streams; then
               {result: value}, which ends a list that came in parts, or {error: {code, message, holders}}

Pure: no sockets, no asyncio. `load` is the border: what it has let through has the types that the dataclass says.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from struct import Struct
from typing import Any, TypeVar, cast

import msgpack

from nbdthin import errors
from nbdthin.errors import Error, InUse, Invalid
from nbdthin.units import KiB, MiB

VERSION = 1
LENGTH = Struct(">I")
MAX_FRAME = 64 * MiB  # a batch of half a million clones; replies come in parts and never get near
PART = 128 * KiB  # bytes of a list that one frame carries, or a single larger item: packing it takes a millisecond
MAX_MESSAGE = 2000  # characters of an error: it may quote what the client sent

T = TypeVar("T")
Reader = Callable[[object], object]


class BadFrame(Exception):
    """Bytes that are no frame of this protocol. Nothing behind them can be trusted: close the connection."""


# -- frames


def pack(message: Mapping[str, object]) -> bytes:
    """A frame. Raises Invalid for what msgpack cannot carry and for a message that is too long."""
    try:
        payload: bytes = msgpack.packb(message, default=plain)
    except UnicodeEncodeError as error:  # as a command line of bad UTF-8 gives
        raise Invalid(f"cannot be sent: {error.object!r} is not UTF-8 text") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise Invalid(f"cannot be sent: {error}") from error
    if len(payload) > MAX_FRAME:
        raise Invalid(f"too much for one request: {len(payload)} bytes, up to {MAX_FRAME} (split the batch)")
    return _frame(payload)


def pack_parts(items: Iterable[object]) -> Iterator[bytes]:
    """The frames of a reply that is a list."""
    packed: list[bytes] = []
    size = 0
    for item in items:
        packed.append(msgpack.packb(item, default=plain))
        size += len(packed[-1])
        if size >= PART:
            yield _part(packed)
            packed, size = [], 0
    yield _part(packed)
    yield pack({"result": []})


def _part(packed: list[bytes]) -> bytes:
    packer = msgpack.Packer()
    head = packer.pack_map_header(1) + packer.pack("part") + packer.pack_array_header(len(packed))
    return _frame(head + b"".join(packed))


def _frame(payload: bytes) -> bytes:
    header: bytes = LENGTH.pack(len(payload))
    return header + payload


def frame_length(header: bytes) -> int:
    """Bytes of the payload behind a frame's first four. Raises BadFrame."""
    (length,) = LENGTH.unpack(header)
    if length > MAX_FRAME:
        raise BadFrame(f"a frame of {length} bytes")
    return int(length)


def unpack(payload: bytes) -> dict[str, object]:
    """Raises BadFrame."""
    try:
        message = msgpack.unpackb(payload)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadFrame(f"not msgpack: {error}") from error
    if not isinstance(message, dict):
        raise BadFrame(f"not a map but {type(message).__name__}")
    return message


# -- errors


def pack_error(error: Error) -> bytes:
    holders = error.holders if isinstance(error, InUse) else ()
    message = shortened(printable(str(error)))
    return pack({"error": {"code": error.code, "message": message, "holders": holders}})


def unpack_error(fields: object) -> Error:
    """The error as it was raised on the other side."""
    crossed = load(_CrossedError, fields)
    if crossed.code == InUse.code:
        return InUse(crossed.message, crossed.holders)
    return errors.from_code(crossed.code, crossed.message)


@dataclasses.dataclass(frozen=True, slots=True)
class _CrossedError:
    code: str
    message: str
    holders: tuple[str, ...]


def printable(text: str) -> str:
    """`text` in one line that harms no terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """`text`, or its beginning and its end: what it quotes may be long, and what to do stands behind that."""
    end = MAX_MESSAGE // 4
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - end - 3]}...{text[-end:]}"


# -- dataclasses


def plain(value: object) -> object:
    """What msgpack and json do not know, one level deep: both ask again for what is inside."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{printable(repr(value))[:80]} ({type(value).__name__})")  # a number of more than 64 bits, too


def load(kind: type[T], value: object) -> T:
    """A `kind` from the map that it crossed as. Raises Invalid for unknown or missing keys and for wrong types."""
    return cast(T, _reader(cast(Hashable, kind))(value))


@functools.cache
def _reader(kind: Any) -> Reader:
    if kind is object:
        return lambda value: value
    if kind in _SCALARS:
        return functools.partial(_scalar, kind, _SCALARS[kind])
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(cast(type, kind))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType and inner[1:] == (types.NoneType,):
        wanted = _reader(inner[0])
        return lambda value: None if value is None else wanted(value)
    if origin is tuple:
        return functools.partial(_items, _reader(inner[0]))
    if origin is not None and issubclass(origin, Mapping) and inner[0] is str:
        return functools.partial(_mapping, _reader(inner[1]))
    raise TypeError(f"{kind} does not cross the control socket")


_SCALARS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}


def _scalar(kind: type, wanted: str, value: object) -> object:
    if type(value) is kind:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise Invalid(f"{wanted} is wanted, not {printable(repr(value))[:80]}")


def _items(read: Reader, value: object) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise Invalid(f"a list is wanted, not {printable(repr(value))[:80]}")
    return tuple(read(item) for item in value)


def _mapping(read: Reader, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise Invalid(f"a map is wanted, not {printable(repr(value))[:80]}")
    for key in value:
        if not isinstance(key, str):
            raise Invalid(f"keys are text, not {printable(repr(key))[:80]}")
    return {key: read(item) for key, item in value.items()}


def _dataclass_reader(kind: type) -> Reader:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields}
    missing = dataclasses.MISSING
    required = [f.name for f in fields if f.default is missing and f.default_factory is missing]

    def read(value: object) -> object:
        if not isinstance(value, dict):
            raise Invalid(f"a map is wanted, not {printable(repr(value))[:80]}")
        for name in value:
            if name not in readers:
                raise Invalid(unknown("argument", name, readers))
        for name in required:
            if name not in value:
                raise Invalid(f"argument {name!r} is missing")
        arguments = {}
        for name, item in value.items():
            try:
                arguments[name] = readers[name](item)
            except Invalid as error:
                raise Invalid(f"{name}: {error}") from error
        return kind(**arguments)

    return read


def unknown(what: str, name: object, valid: Iterable[str]) -> str:
    """The sentence about a name that is not one of `valid`."""
    near = difflib.get_close_matches(str(name), valid, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {what} {printable(repr(name))[:80]}{hint}"
