"""Adaptive polling: only while requests come quickly, and never for an idle daemon."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest
import uvloop

from nbdthin import polling
from nbdthin.polling import LONG, Poller

pytestmark = pytest.mark.interpreted("a class of ours cannot inherit from a compiled one")


class Counting(Poller):
    polls = 0

    def _poll(self) -> None:
        self.polls += 1
        super()._poll()


def quickly(poller: Poller, requests: int = 100) -> None:
    for _ in range(requests):
        poller.came()
        poller.answered()


def unhurried(monkeypatch: pytest.MonkeyPatch, window: float = 0.05) -> None:
    """However busy the machine is, there is time for many looks, and nobody is taken for somebody else."""
    monkeypatch.setattr(polling, "WINDOW", window)
    monkeypatch.setattr(polling, "LONG", 60.0)


def test_it_looks_for_the_next_request_where_they_come_quickly_and_then_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        unhurried(monkeypatch)
        poller = Counting()
        quickly(poller)
        begun = time.monotonic()
        await asyncio.sleep(0.2)
        assert poller.polls > 1
        seen = poller.polls
        await asyncio.sleep(0.2)
        assert poller.polls == seen, f"after {polling.WINDOW} s it sleeps; {time.monotonic() - begun:.3f} s have passed"

    uvloop.run(main())


def test_where_requests_come_slowly_it_does_not_look_for_them() -> None:
    async def main() -> None:
        poller = Counting()
        for _ in range(20):
            poller.came()
            poller.answered()
            await asyncio.sleep(0.005)
        assert poller.polls == 0

    uvloop.run(main())


class Offers:
    """Of the processor, counted; what else takes it has it for `seconds`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        self.count = 0
        self._seconds = seconds
        monkeypatch.setattr(polling, "_give_way", self._give_way)

    def _give_way(self) -> None:
        self.count += 1
        time.sleep(self._seconds)

    def more_than(self, before: int, _: int) -> bool:
        """As a socket would be ready: somebody has had the processor since."""
        return self.count > before


def test_between_two_looks_it_offers_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may be waiting for it: then nothing else brings the next request."""

    async def main() -> None:
        unhurried(monkeypatch)
        poller, offers = Counting(), Offers(monkeypatch)
        quickly(poller)
        await asyncio.sleep(0.2)
        assert offers.count >= poller.polls - 1 > 0  # the last time it ends
        unhurried(monkeypatch, 60.0)
        quickly(poller)
        before = offers.count
        assert poller.wait(partial(offers.more_than, before)) and offers.count == before + 1

    uvloop.run(main())


def test_it_rests_where_somebody_else_takes_the_processor_and_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        poller, offers = Counting(), Offers(monkeypatch, 2 * LONG)
        monkeypatch.setattr(polling, "WINDOW", 60.0)
        monkeypatch.setattr(polling, "LONGEST_REST", 1000.0)
        monkeypatch.setattr(poller, "_rest", 60.0)
        quickly(poller)
        assert not poller.wait(partial(offers.more_than, 0)), "the request may be here, but others computed before"
        seen = poller.polls
        quickly(poller)
        await asyncio.sleep(0.01)
        assert (offers.count, poller.polls - seen) == (1, 1), "the one that was due finds that it rests"
        assert not poller.wait(lambda _: True)
        assert poller._rest == 120.0

    uvloop.run(main())


@pytest.mark.parametrize(("gain", "rests"), [(100, False), (1, True)])
def test_one_look_that_took_long_is_no_reason_to_rest_and_many_are(
    monkeypatch: pytest.MonkeyPatch, gain: int, rests: bool
) -> None:
    """An interrupt, or the hypervisor: `gain` requests come between one such look and the next."""

    async def main() -> None:
        unhurried(monkeypatch, 60.0)
        monkeypatch.setattr(polling, "TAKEN", 0.001)
        monkeypatch.setattr(polling, "LONG", 0.2)  # less than a busy machine takes for one look
        poller, slow, fast = Counting(), Offers(monkeypatch, 0.05), Offers(monkeypatch)
        quickly(poller)
        found = []
        for _ in range(8):
            monkeypatch.setattr(polling, "_give_way", slow._give_way)
            before = slow.count
            poller.answered()
            found.append(poller.wait(partial(slow.more_than, before + 1)))  # the first look brings nothing
            monkeypatch.setattr(polling, "_give_way", fast._give_way)
            found += [poller.wait(lambda _: True) for _ in range(gain)]
        assert all(found) is not rests

    uvloop.run(main())


def test_a_client_on_the_same_processor_is_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        poller, offers = Counting(), Offers(monkeypatch)
        unhurried(monkeypatch, 60.0)
        monkeypatch.setattr(polling, "TAKEN", 0.0)  # each offer is taken
        quickly(poller)
        for _ in range(100):
            poller.answered()
            before = offers.count
            assert poller.wait(partial(offers.more_than, before)) and offers.count == before + 1

    uvloop.run(main())


@pytest.mark.parametrize("enabled", [True, False])
def test_it_can_be_turned_off(enabled: bool) -> None:
    async def main() -> None:
        poller = Counting(enabled)
        quickly(poller, 1000)
        await asyncio.sleep(0.01)
        assert bool(poller.polls) is enabled

    uvloop.run(main())
