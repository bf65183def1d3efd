"""Thin, copy-on-write volumes and snapshots as network block devices.

    with nbdthin.connect("var/control.sock") as pool:      a daemon's pool; `connect_async` for asyncio
    with nbdthin.Pool.open("var/pool") as pool:            a pool without a daemon, under its lock

What is named here is public; docs/python.md describes it. Names load when they are first used: whoever only talks
to a daemon needs neither numpy nor uvloop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nbdthin.errors import (
    ConfigError,
    Corrupt,
    Error,
    Exists,
    InUse,
    Invalid,
    Locked,
    NoSpace,
    NotFound,
    PoolFailed,
    ReadOnly,
    Unreachable,
)

if TYPE_CHECKING:
    from nbdthin.control.client import AsyncClient, Client, connect, connect_async
    from nbdthin.control.rows import Export, Info, Node
    from nbdthin.pool.events import Event
    from nbdthin.pool.policy import Policy
    from nbdthin.pool.pool import Pool
    from nbdthin.pool.rows import Extent, Finding, PoolInfo, Row, Scrubbed
    from nbdthin.pool.views import DiskUse, Explanation, Map

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "ConfigError",
    "Corrupt",
    "DiskUse",
    "Error",
    "Event",
    "Exists",
    "Explanation",
    "Export",
    "Extent",
    "Finding",
    "InUse",
    "Info",
    "Invalid",
    "Locked",
    "Map",
    "NoSpace",
    "Node",
    "NotFound",
    "Policy",
    "Pool",
    "PoolFailed",
    "PoolInfo",
    "ReadOnly",
    "Row",
    "Scrubbed",
    "Unreachable",
    "connect",
    "connect_async",
]

_LAZY = {
    "AsyncClient": "nbdthin.control.client",
    "Client": "nbdthin.control.client",
    "connect": "nbdthin.control.client",
    "connect_async": "nbdthin.control.client",
    "Export": "nbdthin.control.rows",
    "Info": "nbdthin.control.rows",
    "Node": "nbdthin.control.rows",
    "Event": "nbdthin.pool.events",
    "Policy": "nbdthin.pool.policy",
    "Pool": "nbdthin.pool.pool",
    "Extent": "nbdthin.pool.rows",
    "Finding": "nbdthin.pool.rows",
    "PoolInfo": "nbdthin.pool.rows",
    "Scrubbed": "nbdthin.pool.rows",
    "Row": "nbdthin.pool.rows",
    "DiskUse": "nbdthin.pool.views",
    "Explanation": "nbdthin.pool.views",
    "Map": "nbdthin.pool.views",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'nbdthin' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value
