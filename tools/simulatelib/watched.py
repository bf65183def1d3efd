"""The engine's Pool, which tells an oracle what it was asked and what it says is durable; it changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from nbdthin.pool.commands import Command
from nbdthin.pool.policy import Policy
from nbdthin.pool.pool import Batch, Pool
from simulatelib.oracle import Oracle

FIXED = Policy(min_free=0.0, auto_extend=False)  # a pool that is full is full


class WatchedPool(Pool):
    oracle: Oracle | None = None  # none yet while it is being opened, when it may commit as well
    want_checkpoint = False  # the next batch writes one, however short the journal is

    def serve(self) -> None:
        """Do as a daemon does: keep what is answered from the end of the process."""
        self.unsynced.start(self.journal.sequence + 1)

    def execute(self, wanted: Sequence[Command]) -> None:
        before = set(self.state.deferred)
        super().execute(wanted)
        assert self.oracle is not None
        self.oracle.execute(wanted, [name for name in self.state.deferred if name not in before])

    def begin(self) -> Batch:
        if self.want_checkpoint and self._capture is None:
            self.want_checkpoint = False
            self._checkpoint_at = self.journal.checkpoint_bytes = -1
        batch = super().begin()
        if self.oracle is not None:
            self.oracle.begin_commit(self.journal.sequence + (batch._payload is not None))
        return batch

    def finish(self, batch: Batch) -> None:
        super().finish(batch)
        if self.oracle is not None:
            self.oracle.end_commit()
