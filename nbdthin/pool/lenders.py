"""Who looks at blocks without having entered (Pool.enter): what is freed meanwhile is held until they have looked."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nbdthin.pool.layers import Words


class Lender(Protocol):
    """See nbdthin.lent."""

    @property
    def abandoned(self) -> bool:
        """Nothing is lent any more: once all is read, it is to be closed."""
        ...

    def unread(self) -> list[tuple[int, int]]:
        """(position, length) of what it may still look at, in bytes of the data file."""
        ...

    def abandon(self) -> None: ...
    def close(self) -> None: ...


class Lenders:
    """All of a pool's, and the blocks that could be reclaimed, were they not lent."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._lenders: set[Lender] = set()
        self._held: list[Words] = []

    def __len__(self) -> int:
        return len(self._lenders)

    def add(self, lender: Lender) -> None:
        self._lenders.add(lender)

    def end(self, lender: Lender) -> None:
        """It lends no more; it is closed once all is read."""
        if lender.unread():
            lender.abandon()
        else:
            lender.close()
            self._lenders.discard(lender)

    def drop(self) -> None:
        """Close those that have ended, and of which all is read by now."""
        for lender in [each for each in self._lenders if each.abandoned and not each.unread()]:
            self.end(lender)

    def close(self) -> None:
        for lender in self._lenders:
            lender.close()

    @property
    def held(self) -> int:
        """Blocks that `without_lent` has held back."""
        return sum(map(len, self._held))

    def without_lent(self, blocks: Words) -> Words:
        """`blocks` but for those that may still be looked at, which are held back."""
        size = self._block_size
        lent: set[int] = set()
        for lender in self._lenders:
            for position, length in lender.unread():
                lent.update(range(position // size, (position + length - 1) // size + 1))
        if not lent:
            return blocks
        held = np.isin(blocks, np.fromiter(lent, dtype=blocks.dtype, count=len(lent)))
        if held.any():
            self._held.append(blocks[held])
        return blocks[~held]

    def take_held(self) -> Words:
        """All that was held back: they are the caller's to ask about again."""
        held, self._held = self._held, []
        return np.concatenate(held)
