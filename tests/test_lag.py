"""The event loop's lag: what holds the loop up is seen, and an idle daemon is hardly woken for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from nbdthin import lag
from nbdthin.lag import Lag


def lasting(seconds: float, monkeypatch: pytest.MonkeyPatch, work: Callable[[Lag], Awaitable[None]]) -> None:
    """`work` in a loop whose lag is sampled 20 times as often as a daemon's, over so many seconds."""
    for name, value in (("BUSY", 0.005), ("IDLE", 0.05), ("WINDOW", seconds)):
        monkeypatch.setattr(lag, name, value)

    async def main() -> None:
        measured = Lag()
        try:
            await work(measured)
        finally:
            measured.stop()

    uvloop.run(main())


async def _stall(seconds: float) -> None:
    await asyncio.sleep(0.01)  # behind a timer that is asked for
    time.sleep(seconds)  # noqa: ASYNC251 - what the loop must never do
    await asyncio.sleep(0.06)


def test_what_holds_up_the_loop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(measured: Lag) -> None:
        await _stall(0.3)
        facts = measured.facts()
        assert 0.2 < facts.lag_p99 == facts.lag_max, "of a few samples, one in a hundred is the worst"

    lasting(60, monkeypatch, work)


def test_the_percentile_passes_over_what_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(measured: Lag) -> None:
        measured._samples.extend((time.monotonic(), 0.001 * each) for each in range(1, 101))
        measured._samples.append((time.monotonic(), 5.0))
        facts = measured.facts()
        assert (facts.lag_p99, facts.lag_max, facts.samples) == (0.1, 5.0, 101)

    lasting(60, monkeypatch, work)


def test_what_was_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(measured: Lag) -> None:
        await _stall(0.3)
        before = measured.facts().lag_max
        assert before > 0.2
        await asyncio.sleep(0.5)
        assert measured.facts().lag_max < before

    lasting(0.4, monkeypatch, work)


def test_a_loop_at_work_is_asked_often_and_an_idle_one_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(measured: Lag) -> None:
        await asyncio.sleep(0.5)
        idle = measured.facts().samples
        assert idle <= 11, "0.5 s of 0.05 each, and one for good measure"
        busy_until = time.monotonic() + 0.5
        while time.monotonic() < busy_until:  # noqa: ASYNC110 - it is to be busy
            await asyncio.sleep(0)
        assert measured.facts().samples > 2 * idle + 10

    lasting(60, monkeypatch, work)


def test_before_the_first_sample_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(measured: Lag) -> None:
        assert (measured.facts().lag_max, measured.facts().samples) == (0.0, 0)

    lasting(60, monkeypatch, work)
