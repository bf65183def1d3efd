"""Quota and reservation: how many blocks a volume may still take, and how many are kept for others.

A volume is charged with the blocks that the layers on its chain above its `origin` own: its head and its own snapshots
since it was created, cloned or rolled back. Layer numbers grow from parent to child, so a merge, which gives a layer's
blocks to its child, changes nothing, but for the last one: who inherits the snapshot it started from, as nobody else
needs it any more, pays for it from then on. Writes on their way count too (`Layer.in_flight`).

Nothing here is asked for each write: the allocator asks when a volume needs its next run of blocks, and hands out no
more than is left. Quotas are rounded down to whole blocks, reservations up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nbdthin.errors import OverQuota
from nbdthin.pool.allocator import NEVER
from nbdthin.pool.layers import Layer, State
from nbdthin.pool.records import Name
from nbdthin.units import format_size

if TYPE_CHECKING:
    from nbdthin.pool.pool import Pool


def charged(layer: Layer, origin: int) -> int:
    """Blocks that the volume with head `layer` is charged with."""
    total = layer.in_flight
    node: Layer | None = layer
    while node is not None and node.number > origin:
        total += node.blocks
        node = node.parent
    return total


class Limits:
    """What the names of `state` say, in blocks."""

    def __init__(self, state: State, block_size: int) -> None:
        self._state = state
        self._block_size = block_size

    def left(self, number: int) -> tuple[int, int] | None:
        """For the head with that number: blocks that its quota leaves, at least 1, and blocks kept for others.

        None where there are no limits at all. Raises OverQuota.
        """
        state = self._state
        if not state.limited:
            return None
        layer = state.layers[number]
        row = state.names.get(layer.name) if layer.name is not None else None
        quota = NEVER
        if row is not None and row.quota:
            quota = row.quota // self._block_size - charged(layer, row.origin)
            if quota <= 0:
                raise OverQuota(
                    f"{row.name!r} is at its quota of {format_size(row.quota)} (nbdthin quota {row.name} SIZE; "
                    "or trim it, or remove its snapshots)"
                )
        return quota, self.kept(layer.name)

    def kept(self, but: str | None = None) -> int:
        """Blocks that are reserved and not yet taken, by all volumes but one."""
        rows = (self._state.names[name] for name in self._state.limited if name != but)
        return sum(self.unused(row) for row in rows if row.reservation)

    def unused(self, row: Name) -> int:
        """Blocks that `row`, a name of the state, has reserved and not yet taken."""
        return max(-(-row.reservation // self._block_size) - charged(self._state.layers[row.layer], row.origin), 0)

    def kept_after(self, changed: Mapping[str, Name | None]) -> int:
        """What `kept` will be when `changed` has become so; rows may have layers that do not exist yet."""
        rows = {name: self._state.names[name] for name in self._state.limited}
        total = 0
        for row in {**rows, **changed}.values():
            if row is None or not row.reservation:
                continue
            before = self._state.names.get(row.name)
            if row.layer in self._state.layers:
                total += self.unused(row)
            elif before is not None and before.origin == row.origin:  # a new head on what it has
                total += self.unused(before._replace(reservation=row.reservation))
            else:
                total += -(-row.reservation // self._block_size)
        return total


def advised(message: str, pool: Pool) -> str:
    """A refusal with advice that fits what `pool` is short of; one that does not speak of extending it stays as it is.

    Who refuses knows the pool's own size only.
    """
    what, _, advice = message.rpartition(" (")
    return f"{what} ({_advice(pool)})" if "nbdthin extend" in advice else message


def _advice(pool: Pool) -> str:
    """How to get more free space: a larger pool is none where the file system below it has no room for one."""
    free = "remove snapshots or volumes, trim"
    policy, data = pool.policy, pool.data
    if pool.usage().free < pool.allocator.free * pool.block_size:
        return f"{free}, or free space on the file system of {data.path}, which has less left than the pool"
    if data.is_device:
        larger = "" if data.size - pool.size >= pool.block_size else f"make {data.path} larger, then "
        return f"{free}, or: {larger}nbdthin extend SIZE"
    if policy.auto_extend and policy.max_size is not None and pool.size + pool.block_size > policy.max_size:
        return f"{free}, or: nbdthin extend SIZE, as it has grown to its max_size of {format_size(policy.max_size)}"
    return f"{free}, or: nbdthin extend SIZE"
