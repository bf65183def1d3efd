"""Sizes as people write them."""

from __future__ import annotations

import pytest

from nbdthin.errors import Invalid
from nbdthin.units import GiB, KiB, MiB, TiB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("10G", 10 * GiB),
        ("10 GiB", 10 * GiB),
        ("10gb", 10 * GiB),
        ("64KiB", 64 * KiB),
        ("64k", 64 * KiB),
        ("1.5 TiB", 3 * TiB // 2),
        ("0.5K", 512),
        ("  7 M  ", 7 * MiB),
        ("2E", 2 << 60),
        ("3p", 3 << 50),
        (4096, 4096),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "G",
        "ten",
        "10X",
        "10 G B",
        "-1",
        "+1",
        "1e9",
        "0x10",
        "1,5G",
        "1.G",
        ".5G",
        "10KK",
        "10iB",
        "1_000",
        "10\nG G",
        "9" * 5000,
        "1." + "1" * 5000,
        "10\u212a",  # the Kelvin sign, which is a K to a regular expression that ignores case
        "\u0661\u0660",  # ten, in Arabic digits
    ],
)
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 1.5, True, b"10G", [1]])
def test_what_is_neither_text_nor_a_whole_number_is_refused(value: object) -> None:
    with pytest.raises(Invalid):
        parse_size(value)  # type: ignore[arg-type]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(Invalid, match="negative"):
        parse_size(-1)


@pytest.mark.parametrize("text", ["0.3", "0.1K", "1.0001M"])
def test_a_part_of_a_byte_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="whole number of bytes"):
        parse_size(text)


def test_fractions_are_exact() -> None:
    assert parse_size("0.0009765625K") == 1
    assert parse_size("1.000000000000000000T") == TiB


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 * KiB, "10 KiB"),
        (64 * KiB + 512, "64.5 KiB"),
        (100 * GiB, "100 GiB"),
        (999 * KiB, "999 KiB"),
        (1023 * KiB, "1 MiB"),
        (1234 * MiB, "1.21 GiB"),
        (3 * TiB, "3 TiB"),
        (4 << 60, "4 EiB"),
        (2000 << 60, "2000 EiB"),
    ],
)
def test_a_size_is_written_with_three_digits_and_a_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("size", [1, 512, KiB, 64 * KiB, MiB, 3 * MiB // 2, 10 * GiB, 100 * GiB, 3 * TiB])
def test_what_is_written_for_a_round_size_reads_back_as_it(size: int) -> None:
    assert parse_size(format_size(size)) == size
