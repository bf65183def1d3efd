"""A frame with one damaged byte, made whole again where its checksums leave no doubt which byte it was.

Two checksums stand in a frame's header, one over the payload and one over the rest of the header. When one byte is
wrong, enough is left to tell what it must have been:

- a wrong byte in the header: the payload is sound, and the header that belongs to it can be made anew. It is the
  right one when either stored checksum agrees with it;
- a wrong byte in the payload: a CRC is linear, so the difference between what it is and what it should be says which
  changes of one byte explain it. Chance would name some change for `255 * length / 2**32` of all larger damages, so
  this is believed for payloads up to 16 KiB, and for single bits up to what a checkpoint's frame has: one or two in a
  thousand, and what comes out must be records besides.

Only for repair: opening a pool believes nothing that does not check. Pure.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

from nbdthin.pool.journal import HEADER, Header, frame
from nbdthin.units import KiB

MOST_BYTE = 16 * KiB  # longest payload in which a wrong byte is put right
MOST_BIT = 1088 * KiB  # and a wrong bit: a checkpoint's frame has 1 MiB, and its last record more

_TABLE = [zlib.crc32(bytes([value])) ^ zlib.crc32(b"\0") for value in range(256)]
_FLIPS = {effect: flip for flip, effect in enumerate(_TABLE) if flip}
_BY_TOP = {effect >> 24: value for value, effect in enumerate(_TABLE)}


class Mended(NamedTuple):
    payload: bytes
    how: str


def mend_header(data: bytes, start: int, end: int | None, sequence: int) -> Mended | None:
    """The payload of frame `sequence` at `start`, whose header does not check; `end` is where the next one begins."""
    if len(data) - start <= HEADER.size:
        return None
    _, _, _, _, length, payload_crc, header_crc = HEADER.unpack_from(data, start)
    body = start + HEADER.size
    lengths = {length} if end is None else {length, end - body}
    for candidate in sorted(lengths):
        payload = data[body : body + candidate]
        if not payload or len(payload) != candidate:
            continue
        made = HEADER.unpack_from(frame(sequence, payload))
        if made[5] == payload_crc or made[6] == header_crc:
            return Mended(payload, "its header is damaged, its payload is sound")
    return None


def mend_payload(payload: bytes, header: Header, offset: int) -> Mended | None:
    """`payload`, behind a sound header at `offset` of its file, with its one wrong byte put right."""
    if len(payload) != header.length or len(payload) > MOST_BIT:
        return None
    found = flips(payload, header.payload_crc)
    if len(payload) > MOST_BYTE:
        found = [(position, flip) for position, flip in found if flip & (flip - 1) == 0]
    if len(found) != 1:
        return None
    ((position, flip),) = found
    right = payload[position] ^ flip
    what = f"byte {offset + HEADER.size + position} is 0x{payload[position]:02x} and was 0x{right:02x}"
    return Mended(payload[:position] + bytes([right]) + payload[position + 1 :], what)


def flips(data: bytes, wanted: int) -> list[tuple[int, int]]:
    """Every (position, exclusive or) of one byte that gives `data` the CRC `wanted`."""
    difference = zlib.crc32(data) ^ wanted
    found = []
    for position in range(len(data) - 1, -1, -1):
        flip = _FLIPS.get(difference)
        if flip is not None:
            found.append((position, flip))
        low = _BY_TOP[difference >> 24]
        difference = (difference ^ _TABLE[low]) << 8 & 0xFFFFFFFF | low
    return found
