"""thin_dump's XML: what is read from it, and that nothing else is taken for it."""

from __future__ import annotations

import contextlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdthin.errors import Corrupt
from nbdthin.moving import thin_xml
from nbdthin.moving.thin_plan import plan
from nbdthin.moving.thin_xml import ThinMetadata
from nbdthin.units import KiB, MiB
from tests.moving.thinpool import ThinPool

HEAD = '<superblock uuid="" time="1" transaction="2" version="2" data_block_size="128" nr_data_blocks="100">'
SINGLE = '<single_mapping origin_block="{}" data_block="{}" time="0"/>'
RANGE = '<range_mapping origin_begin="{}" data_begin="{}" length="{}" time="0"/>'


def read(text: str | bytes) -> ThinMetadata:
    return thin_xml.read(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "pool.xml")


def devices(text: str) -> dict[int, list[list[int]]]:
    """Logical, physical, blocks and time of each mapping of each device."""
    return {
        device.number: [list(row) for row in zip(*(column.tolist() for column in device.runs), strict=True)]
        for device in read(text).devices
    }


def device(number: int, *inside: str) -> str:
    times = 'transaction="0" creation_time="0" snap_time="0"'
    return f'<device dev_id="{number}" mapped_blocks="1" {times}>{"".join(inside)}</device>'


def test_mappings_are_read_by_device_with_their_times() -> None:
    pool = ThinPool()
    pool.create(3)
    for block in (0, 1, 5):
        pool.write(3, block)
    pool.snapshot(3, 16777215)
    pool.write(3, 1)
    pool.create(7)
    text = pool.xml(192 * KiB, 100)
    assert read(text).block_size == 192 * KiB
    assert devices(text) == {
        3: [[0, 0, 1, 0], [1, 3, 1, 1], [5, 2, 1, 0]],
        16777215: [[0, 0, 2, 0], [5, 2, 1, 0]],
        7: [],
    }


def test_parts_that_devices_share_are_read_for_each_of_them() -> None:
    shared = f'<def name="a">{SINGLE.format(4, 9)}</def><def name="b"><ref name="a"/>{RANGE.format(8, 20, 3)}</def>'
    both = [[4, 9, 1, 0], [8, 20, 3, 0]]
    text = HEAD + shared + device(1, SINGLE.format(0, 1), '<ref name="b"/>') + device(2, '<ref name="b"/>')
    assert devices(text + "</superblock>") == {1: [[0, 1, 1, 0], *both], 2: both}


def test_more_mappings_than_are_gathered_at_a_time_stay_in_order() -> None:
    count = 150_000
    text = HEAD + device(1, *(SINGLE.format(2 * block, block) for block in range(count))) + "</superblock>"
    (found,) = read(text).devices
    assert found.runs.logical.tolist() == [2 * block for block in range(count)]
    assert found.runs.physical.tolist() == list(range(count))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "cut short"),
        ("no XML\n", "no XML"),
        (HEAD + device(1, SINGLE.format(0, 0)), "cut short"),
        ((HEAD + device(1, SINGLE.format(0, 0)))[:-30], "cut short"),
        (HEAD + "</device>", "mismatched tag"),
        ("<html/>", "<html>, not <superblock>"),
        (HEAD + "<thing/></superblock>", "<thing> inside of <superblock>"),
        (HEAD + SINGLE.format(0, 0) + "</superblock>", "<single_mapping> inside of <superblock>"),
        (HEAD + device(1, device(2)), "<device> inside of <device>"),
        (HEAD.replace('version="2"', 'version="3"'), "a superblock of version 3"),
        (HEAD.replace('data_block_size="128"', ""), "no data_block_size"),
        (HEAD.replace('"128"', '"127"'), "data blocks of 127 sectors"),
        (HEAD.replace('"128"', '"0"'), "data blocks of 0 sectors"),
        (HEAD.replace('"128"', '"2097280"'), "data blocks of 2097280 sectors"),
        (HEAD + device(16777216), "device 16777216"),
        (HEAD + device(5) + device(5), "device 5 is there twice"),
        (HEAD + device(1, SINGLE.format(-1, 0)), "origin_block is no number: '-1'"),
        (HEAD + device(1, SINGLE.format("1_0", 0)), "no number"),
        (HEAD + device(1, SINGLE.format("9" * 5000, 0)), "no number"),
        (HEAD + device(1, '<single_mapping origin_block="1" time="0"/>'), "no data_block"),
        (HEAD + device(1, RANGE.format(0, 0, 0)), "a mapping of no blocks"),
        (HEAD + device(1, RANGE.format(0, 0, 1 << 47)), "behind the end of the largest volume"),
        (HEAD + device(9, RANGE.format(0, 0, 5), SINGLE.format(4, 9)), "mappings of device 9 overlap, or are out of"),
        (HEAD + device(9, SINGLE.format(4, 9), SINGLE.format(3, 8)), "mappings of device 9 overlap, or are out of"),
        (HEAD + '<def name="a">' + SINGLE.format(4, 9) * 2 + "</def>", "mappings of a <def> overlap"),
        (HEAD + device(1, '<ref name="a"/>'), "<ref> to 'a', which is not defined before"),
        (HEAD + f'<def name="a">{SINGLE.format(1, 1)}</def>' + device(1, '<ref name="a"/>' * 2), "overlap"),
        (HEAD + '<def name="a"></def>' * 2, "<def> 'a' is there twice"),
        ('<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>' + HEAD + "</superblock>", "a DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + HEAD + "</superblock>", "a DOCTYPE"),
        (HEAD + "&lol;</superblock>", "undefined entity"),
        ('<?xml version="1.0" encoding="rot13"?><html/>', "<html>, not <superblock>"),
    ],
)
def test_what_thin_dump_would_not_write_is_refused_in_a_line_with_its_place(text: str, what: str) -> None:
    with pytest.raises(Corrupt, match=r"pool\.xml at byte \d+: ") as refused:
        read(text)
    assert what in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_a_tag_without_an_end_does_not_fill_the_memory() -> None:
    class Endless(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            self.given += 1
            return b"a" * MiB if self.given > 1 else HEAD.encode() + b'<device dev_id="'

    with pytest.raises(Corrupt, match="no end of a tag"):
        thin_xml.read(Endless(), "pool.xml")


def test_sharing_that_is_short_to_say_and_long_to_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_xml, "MAX_RUNS", 1000)
    large = '<def name="a">' + "".join(SINGLE.format(2 * block, block) for block in range(500)) + "</def>"
    with pytest.raises(Corrupt, match="more than 1000 runs"):
        read(HEAD + large + "".join(device(number, '<ref name="a"/>') for number in range(100)))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_refused_or_read_as_what_it_says(data: st.DataObject) -> None:
    pool = ThinPool()
    pool.create(1)
    for block in (0, 1, 2, 5, 6):
        pool.write(1, block)
    pool.snapshot(1, 2)
    pool.write(2, 1)
    damaged = bytearray(pool.xml(64 * KiB, 100).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 4))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"9", b"0"])
        )
    with contextlib.suppress(Corrupt):
        found = read(bytes(damaged))
        shown = plan([device.runs for device in found.devices])
        assert shown.distinct <= shown.stored <= shown.mapped
