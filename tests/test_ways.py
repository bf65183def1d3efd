"""Which way large reads are answered: the faster one, as it is measured, and the other is tried again."""

from __future__ import annotations

import pytest

from nbdthin.units import KiB
from nbdthin.ways import AGAIN, FIRST, SPAN, Ways


class Client:
    """Who asks for 256 KiB after 256 KiB, and gets so many bytes a second, lent or copied."""

    def __init__(self, lent: float, copied: float) -> None:
        self.lent, self.copied = lent, copied
        self.pause = 0.0  # seconds before each request
        self.ways = Ways(lambda: self._now)
        self._now = 1000.0

    def read(self, spans: int) -> list[bool]:
        """Of each request, whether it was lent."""
        found = []
        for _ in range(spans * SPAN // (256 * KiB)):
            found.append(self.ways.lends_next(256 * KiB))
            self._now += self.pause + 256 * KiB / (self.lent if found[-1] else self.copied)
        return found


def part(found: list[bool]) -> float:
    return sum(found) / len(found)


@pytest.mark.parametrize(("lent", "copied"), [(3e9, 2e9), (2e9, 3e9), (2e9, 4e9)])
def test_the_faster_way_is_found_and_kept(lent: float, copied: float) -> None:
    client = Client(lent, copied)
    assert not any(client.read(2)), "at first it copies"
    client.read(8 * FIRST)
    found = part(client.read(2 * AGAIN))
    assert (found if lent > copied else 1 - found) > 0.95


def test_that_lending_is_a_little_faster_is_no_reason_for_it() -> None:
    client = Client(2.1e9, 2.0e9)
    client.read(8 * FIRST)
    assert part(client.read(2 * AGAIN)) < 0.05


@pytest.mark.parametrize("before", [True, False])
def test_what_has_become_faster_is_found_again(before: bool) -> None:
    client = Client(3e9, 1e9) if before else Client(1e9, 3e9)
    client.read(2 * AGAIN)
    client.lent, client.copied = client.copied, client.lent
    client.read(4 * AGAIN)
    assert (part(client.read(2 * AGAIN)) < 0.05) is before


def test_one_bad_measure_does_not_decide_for_long() -> None:
    client = Client(2e9, 1e9)
    client.read(2)
    client.copied = 3e9
    client.read(6 * FIRST)
    assert part(client.read(AGAIN)) < 0.1


def test_the_other_way_is_tried_less_and_less_often() -> None:
    client = Client(1e9, 3e9)
    first, later = client.read(8 * FIRST), client.read(8 * AGAIN)
    assert part(first) > 0.1
    assert 0 < part(later) < 0.02


def test_a_client_that_takes_its_time_says_nothing_of_the_ways() -> None:
    client = Client(3e9, 1e9)
    client.pause = 0.1
    assert not any(client.read(AGAIN))


def test_what_was_asked_for_before_a_change_is_not_taken_for_the_other_way() -> None:
    """With 8 MiB under way most of what is answered at first was asked for in the span before."""
    client = Client(1e9, 3e9)
    while not client.read(1)[-1]:
        pass
    client.lent = 9e9  # the first span, of what had been copied
    client.read(1)
    client.lent = 1e9
    client.read(1)
    assert part(client.read(AGAIN)) < 0.05
