"""The bytes of the control protocol, and the border at which arguments get their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import pytest

from nbdthin import errors
from nbdthin.control import codec
from nbdthin.control.codec import BadFrame
from nbdthin.errors import Error, InUse, Invalid, NotFound


@dataclass(frozen=True, slots=True)
class Inner:
    path: Path


@dataclass(frozen=True, slots=True)
class Arguments:
    name: str
    size: int
    force: bool = False
    limit: int | None = None
    labels: Mapping[str, str | None] = field(default_factory=dict)
    inner: tuple[Inner, ...] = ()


def crossed(value: object) -> object:
    """`value` as the other side gets it."""
    frame = codec.pack({"value": value})
    assert codec.frame_length(frame[:4]) == len(frame) - 4
    return codec.unpack(frame[4:])["value"]


def test_a_dataclass_crosses_whole() -> None:
    sent = Arguments("a", 512, True, 7, {"k": "v", "gone": None}, (Inner(Path("/x")),))
    assert codec.load(Arguments, crossed(sent)) == sent


def test_what_has_a_default_may_be_left_out() -> None:
    assert codec.load(Arguments, {"name": "a", "size": 1}) == Arguments("a", 1)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"name": "a"}, "argument 'size' is missing"),
        ({"name": "a", "size": 1, "fource": True}, "unknown argument 'fource' (did you mean 'force'?)"),
        ({"name": "a", "size": "10G"}, "size: an integer is wanted, not '10G'"),
        ({"name": "a", "size": True}, "size: an integer is wanted, not True"),
        ({"name": "a", "size": 1.0}, "size: an integer is wanted, not 1.0"),
        ({"name": b"a", "size": 1}, "name: text is wanted, not b'a'"),
        ({"name": "a", "size": 1, "force": 1}, "force: true or false is wanted, not 1"),
        ({"name": "a", "size": 1, "force": None}, "force: true or false is wanted, not None"),
        ({"name": "a", "size": 1, "labels": {"k": 1}}, "labels: text is wanted, not 1"),
        ({"name": "a", "size": 1, "labels": {b"k": "v"}}, "labels: keys are text, not b'k'"),
        ({"name": "a", "size": 1, "labels": []}, "labels: a map is wanted, not []"),
        ({"name": "a", "size": 1, "inner": {}}, "inner: a list is wanted, not {}"),
        ({"name": "a", "size": 1, "inner": [{"path": 1}]}, "inner: path: a path is wanted, not 1"),
        ({1: 2}, "unknown argument 1"),
        ([], "a map is wanted, not []"),
        (None, "a map is wanted, not None"),
    ],
)
def test_what_is_not_as_declared_is_refused_by_name(value: object, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        codec.load(Arguments, value)
    assert str(caught.value) == said


def test_a_long_value_is_not_quoted_whole() -> None:
    with pytest.raises(Invalid) as caught:
        codec.load(Arguments, {"name": "a", "size": "x" * 100_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("error", [kind("what") for kind in errors.BY_CODE.values()])
def test_an_error_is_raised_as_the_same_class(error: Error) -> None:
    reply = codec.unpack(codec.pack_error(error)[4:])
    again = codec.unpack_error(reply["error"])
    assert type(again) is type(error) and str(again) == str(error)


def test_holders_cross_with_the_error() -> None:
    reply = codec.unpack(codec.pack_error(InUse("busy", ("a", "b")))[4:])
    again = codec.unpack_error(reply["error"])
    assert isinstance(again, InUse) and again.holders == ("a", "b")


def test_an_error_without_a_code_of_its_own_crosses_as_its_base() -> None:
    reply = codec.unpack(codec.pack_error(errors.Corrupt("/pool/superblock", 8, "damaged"))[4:])
    again = codec.unpack_error(reply["error"])
    assert type(again) is Error and str(again) == "/pool/superblock at byte 8: damaged"


def test_an_error_stays_one_line_that_harms_no_terminal() -> None:
    reply = codec.unpack(codec.pack_error(NotFound("no \x1b[2J\nvolume"))[4:])
    assert str(codec.unpack_error(reply["error"])) == "no \\x1b[2J\\nvolume"


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93\x01", b"\x01\x02", b"\x90", b"\x91" * 5000, b"\xa1\xff"])
def test_bytes_that_are_no_message_are_told_apart(payload: bytes) -> None:
    with pytest.raises(BadFrame):
        codec.unpack(payload)


def test_a_length_beyond_the_cap_is_no_frame() -> None:
    assert codec.frame_length(codec.LENGTH.pack(codec.MAX_FRAME)) == codec.MAX_FRAME
    with pytest.raises(BadFrame):
        codec.frame_length(b"GET ")


@pytest.mark.parametrize("value", ["\ud800", 1 << 64, "x" * codec.MAX_FRAME])
def test_what_cannot_be_sent_is_refused_before_it_is(value: object) -> None:
    with pytest.raises(Invalid):
        codec.pack({"value": value})


def test_a_list_of_any_length_crosses_in_small_frames() -> None:
    items = [{"number": number, "padding": "x" * 1000} for number in range(5000)]
    frames = list(codec.pack_parts(items))
    assert max(map(len, frames)) < 2 * codec.PART and len(frames) > 10
    received: list[object] = []
    for frame in frames[:-1]:
        part = codec.unpack(frame[4:])["part"]
        assert isinstance(part, list)
        received.extend(part)
    assert received == items and msgpack.unpackb(frames[-1][4:]) == {"result": []}
