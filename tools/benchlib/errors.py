"""What goes wrong in a bench, as one line for whoever ran it."""

from __future__ import annotations


class BenchError(Exception):
    """The bench cannot go on, a cell has no figure, or data is not what was written: str() says why."""
