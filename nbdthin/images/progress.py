"""How long work goes on, for who wants to show it."""

from __future__ import annotations


class Progress:
    """Told how a load or a save goes on; this one keeps it to itself."""

    def waiting(self) -> None:
        """Another process loads or removes images of this pool."""

    def layer(self, name: str) -> None:
        """A layer is next."""

    def advance(self, count: int) -> None:
        """So many more bytes of its tar are done."""


SILENT = Progress()
