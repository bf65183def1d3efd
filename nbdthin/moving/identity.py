"""Which snapshot is which, in all pools: a random number, kept as a label from the first time a snapshot is sent.

A snapshot never changes, so the number names its content for good, and whoever receives it takes the number over.
Names can be given anew, and copies of a pool go on with the same layer numbers under the same uuid, each with other
data; a digest of the content would not lie either, but costs reading all of it for every difference that is sent.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from nbdthin.control.client import Client
from nbdthin.control.rows import Export
from nbdthin.errors import Invalid, NoSpace, PoolFailed

LABEL = "nbdthin.identity"
_IDENTITY = re.compile(r"[0-9a-f]{32}")


def of(pool: Client, snapshot: Export) -> str:
    """What a snapshot has, or is given now. A pool that takes no changes is no reason not to send: it is not kept."""
    if LABEL not in snapshot.labels:
        mine = secrets.token_hex(16)
        try:
            pool.label(snapshot.name, {LABEL: mine})
        except (NoSpace, PoolFailed):
            return mine
        snapshot = pool.show(snapshot.name)  # somebody else may have been at it as well: the last one counts
    return check(snapshot.labels[LABEL])


def check(text: str) -> str:
    """Raises Invalid."""
    if not _IDENTITY.fullmatch(text):
        raise Invalid(f"not an identity of a snapshot: {text!r}")
    return text


def find(pool: Client, identity: str) -> Export | None:
    """A snapshot that has it. Two that do are the same."""
    for export in pool.list(labels={LABEL: check(identity)}):
        if export.kind == "snapshot":
            return export
    return None


def snapshot(pool: Client, name: str) -> Export:
    """Raises NotFound, and Invalid for a volume."""
    export = pool.show(name)
    if export.kind != "snapshot":
        raise Invalid(f"{name!r} is a volume, which may change while it is sent: snapshot it, and send that")
    return export


@dataclass(frozen=True, slots=True)
class Token:
    """What an interrupted `receive` has, for the `send` that goes on: `IDENTITY.BASE.OFFSET`, BASE may be empty."""

    identity: str
    base: str | None
    offset: int

    def __str__(self) -> str:
        return f"{self.identity}.{self.base or ''}.{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises Invalid."""
        identity, _, rest = text.partition(".")
        base, _, offset = rest.partition(".")
        if not (offset.isascii() and offset.isdigit() and len(offset) < 20):
            raise Invalid(f"not a token of `nbdthin receive --resume-token`: {text!r}")
        return cls(check(identity), check(base) if base else None, int(offset))
