"""What a statement about growth is, and what measuring it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. `quick` proves that it runs and that data is right; its figures mean little."""

    quick: bool

    def choose(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(slots=True)
class Curve:
    """Figures over something that grows: `series` by their names, each a list of (x, y)."""

    key: str  # of its chart's file
    title: str
    x: str  # what the x are, with their unit
    y: str
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, name: str, x: float, y: float) -> None:
        self.series.setdefault(name, []).append((x, y))

    def values(self, name: str) -> list[float]:
        return [y for _, y in self.series[name]]


@dataclass(frozen=True, slots=True)
class Bound:
    what: str
    value: float
    limit: float
    unit: str
    least: bool = False  # the value is to be `limit` or more, not or less

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit


@dataclass(slots=True)
class Measured:
    curves: list[Curve]
    bounds: list[Bound]


@dataclass(slots=True)
class Statement:
    """`run` measures in an empty directory. Raises BenchError, nbdthin's Error or OSError where it cannot."""

    key: str
    title: str
    run: Callable[[Path, Scale], Measured]
    programs: tuple[str, ...] = ()
    measured: Measured | None = None
    failure: str | None = None
