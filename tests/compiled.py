"""Where the data path is compiled (tools/building.py), what tests put in its place is never called: those are skipped.

Compiled functions call each other directly, and compiled classes have no room for another method. Constants of modules
and attributes of objects are looked up as ever.
"""

from __future__ import annotations

import inspect
import pkgutil
from types import FunctionType, ModuleType
from typing import Any

import pytest

from nbdthin import host


def skip_what_replaces_compiled_code(items: list[pytest.Item]) -> None:
    """The tests that are marked, now; those that patch, when they do."""
    for item in items:
        if marker := item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason=f"compiled: {marker.args[0]}"))
    real = pytest.MonkeyPatch.setattr

    def checked(self: pytest.MonkeyPatch, target: Any, name: Any, *more: Any, **options: Any) -> None:
        if isinstance(target, str):
            where, _, attribute = target.rpartition(".")
            _check(pkgutil.resolve_name(where), attribute)
        else:
            _check(target, name)
        real(self, target, name, *more, **options)

    pytest.MonkeyPatch.setattr = checked  # type: ignore[method-assign]


def _check(target: object, name: str) -> None:
    owner = target if isinstance(target, type | ModuleType) else type(target)
    found = inspect.getattr_static(owner, name, None)
    module = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    own = not isinstance(owner, ModuleType) or getattr(found, "__module__", None) == module
    compiled = own and module.startswith("nbdthin.") and host.is_compiled(module)
    if compiled and callable(found) and not isinstance(found, type | FunctionType):
        pytest.skip(f"compiled: nothing can take the place of {owner.__name__}.{name}")
