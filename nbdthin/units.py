"""Sizes: written as people write them (`10G`, `64KiB`, `1.5 TiB`), kept as bytes. Powers of 1024 throughout."""

from __future__ import annotations

import re

from nbdthin.errors import Invalid

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

LIMIT = 1 << 63  # bytes: what a file can have, and what every number that carries a size can hold
_UNITS = "KMGTPE"
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*(?:([KMGTPE])(?:i?B)?|B)?\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """Bytes of `text`. An int is bytes already. Raises Invalid for what is no size or no whole number of bytes."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise Invalid(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise Invalid(f"not a size: {text!r} (write 10G, 512M, 64KiB or bytes)")
    number, unit = match.groups()
    scale = 1 << 10 * (_UNITS.index(unit.upper()) + 1) if unit else 1
    whole, _, fraction = number.partition(".")
    value = int(whole) * scale
    if fraction:
        part, rest = divmod(int(fraction) * scale, 10 ** len(fraction))
        if rest:
            raise Invalid(f"not a whole number of bytes: {text!r}")
        value += part
    if value >= LIMIT:
        raise Invalid(f"not a size: {text!r} is not less than 8 EiB")
    return value


def format_size(size: int) -> str:
    """`size` for people: three significant digits and a binary unit."""
    if size < KiB:
        return f"{size} B"
    value = float(size)
    for unit in _UNITS:
        value /= 1024
        if value < 999.5 or unit == _UNITS[-1]:
            break
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}iB"
