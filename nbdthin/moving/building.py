"""Names of what is made: free at the beginning, and until it is whole a hidden one.

NAME is called `importing/NAME` meanwhile, and what belongs to it `importing/NAME@...`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nbdthin.control import client
from nbdthin.control.client import Client
from nbdthin.errors import Error, Exists, NotFound
from nbdthin.pool.commands import check_name

HIDDEN = "importing/"


def check_free(pool: Client, name: str) -> None:
    """Raises Invalid for what is no name, Exists."""
    check_name(name)
    with contextlib.suppress(NotFound):
        pool.show(name)
        raise Exists(f"{name!r} exists already")


@contextlib.contextmanager
def building(pool: Client, name: str) -> Iterator[str]:
    """The hidden name of `name`. What an earlier try has left there is removed first, and everything after a failure.

    Raises InUse while somebody else makes the same, and after a failure Error where the daemon does not remove it.
    """
    hidden = f"{HIDDEN}{name}"
    _remove(pool, hidden)
    try:
        yield hidden
    except BaseException as error:
        _undo(pool.path, hidden, error)
        raise


def _undo(path: str, hidden: str, error: BaseException) -> None:
    """On a connection of its own: the other may have been interrupted."""
    try:
        with client.connect(path) as pool:
            _remove(pool, hidden, force=True)
    except Error as failure:
        why = f"{error}; " if isinstance(error, Error) else ""
        raise type(failure)(f"{why}{hidden} or {hidden}@... may be left ({failure})") from error


def _remove(pool: Client, hidden: str, *, force: bool = False) -> None:
    left = [name for name in pool.names(hidden) if name == hidden or name.startswith(f"{hidden}@")]
    if left:
        pool.remove(*left, force=force)
