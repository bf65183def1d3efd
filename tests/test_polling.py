"""Adaptive polling: only while requests come quickly, and never for an idle daemon."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop

from nbdthin import polling
from nbdthin.polling import LONG, WINDOW, Poller


class Counting(Poller):
    polls = 0

    def _poll(self) -> None:
        self.polls += 1
        super()._poll()


def quickly(poller: Poller, requests: int = 100) -> None:
    for _ in range(requests):
        poller.came()
        poller.answered()


def test_it_looks_for_the_next_request_where_they_come_quickly_and_then_sleeps() -> None:
    async def main() -> None:
        poller = Counting()
        quickly(poller)
        begun = time.monotonic()
        await asyncio.sleep(0.2)
        assert poller.polls > 1
        seen = poller.polls
        await asyncio.sleep(0.2)
        assert poller.polls == seen, f"after {WINDOW} s it sleeps; {time.monotonic() - begun:.3f} s have passed"

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


def test_between_two_looks_it_offers_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may be waiting for it: then nothing else brings the next request."""

    async def main() -> None:
        poller = Counting()
        offers = 0

        def give_way() -> None:
            nonlocal offers
            offers += 1

        monkeypatch.setattr(polling, "_give_way", give_way)
        quickly(poller)
        await asyncio.sleep(0.01)
        assert offers >= poller.polls - 1 > 0  # the last time it ends
        quickly(poller)
        before = offers
        assert poller.wait(lambda _: offers == before + 1) and offers == before + 1

    uvloop.run(main())


def test_it_rests_where_somebody_else_takes_the_processor_and_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        poller = Counting()
        taken = 0

        def give_way() -> None:
            nonlocal taken
            taken += 1
            time.sleep(2 * LONG)

        monkeypatch.setattr(polling, "REST", 60.0)
        monkeypatch.setattr(poller, "_rest", 60.0)
        monkeypatch.setattr(polling, "_give_way", give_way)
        quickly(poller)
        assert not poller.wait(lambda _: taken), "the request may be here, but others computed before it was"
        seen = poller.polls
        quickly(poller)
        await asyncio.sleep(0.01)
        assert (taken, poller.polls - seen) == (1, 1), "the one that was due finds that it rests"
        assert not poller.wait(lambda _: True)

    uvloop.run(main())


def test_a_client_on_the_same_processor_is_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        poller = Counting()
        sent = 0

        def give_way() -> None:
            nonlocal sent
            sent += 1

        monkeypatch.setattr(polling, "_give_way", give_way)
        monkeypatch.setattr(polling, "TAKEN", 0.0)  # as long as it took
        monkeypatch.setattr(polling, "LONG", 60.0)
        quickly(poller)
        for number in range(1, 100):
            poller.answered()
            assert poller.wait(lambda _: sent == number)  # noqa: B023 - it is called before the next one begins

    uvloop.run(main())


@pytest.mark.parametrize("enabled", [True, False])
def test_it_can_be_turned_off(enabled: bool) -> None:
    async def main() -> None:
        poller = Counting(enabled)
        quickly(poller, 1000)
        await asyncio.sleep(0.01)
        assert bool(poller.polls) is enabled

    uvloop.run(main())
