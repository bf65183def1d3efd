"""A name of a pool as a disk."""

from __future__ import annotations

from nbdthin import nbd
from nbdthin.control.client import Client
from nbdthin.errors import Invalid


def connected(pool: Client, name: str) -> nbd.Disk:
    """Raises NotFound, Invalid, Unreachable."""
    uri = pool.show(name).uri
    if uri is None:
        raise Invalid("the daemon listens nowhere, so that no data can be moved ([server] listen)")
    return nbd.connect(uri)
