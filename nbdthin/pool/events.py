"""What happens to a pool that somebody should know: to the log, and to everyone who listens.

An event is told when something becomes so, not while it is so: a level that is passed is told once, and told of again
only when usage has fallen clearly below it in between (`Levels`). Who listens hears what comes from then on. Nobody
who listens slowly holds up the pool: what he does not take in time is dropped, and he is told how much that was.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

LISTENING = "listening"  # told to a listener alone, first: how full the pool is now
LOW_WATER = "low_water"  # more than `level` percent are in use
RECOVERED = "recovered"  # clearly less than `level` percent are, again
NO_SPACE = "no_space"  # a write of `name` found no space: it waits, or was refused
SPACE = "space"  # writes find space again
EXTENDED = "extended"  # the pool has grown, from `before` to `size`
GROWTH_FAILED = "growth_failed"  # it should have
JOURNAL_LOW = "journal_low"  # no room for another journal segment: nothing new, and soon no commit
JOURNAL_ROOM = "journal_room"  # there is room again
DEFERRED = "deferred"  # `name` was removed while `holders` use it, and is `called` so until it is freed
FREED = "freed"  # it is: nobody uses it any more
FAILED = "failed"  # a sync failed: the pool is read-only
DAMAGE = "damage"  # something on disk is not what it was
DROPPED = "dropped"  # of this listener's events, `count` were not kept

_LEVELS = {
    **dict.fromkeys((RECOVERED, SPACE, EXTENDED, JOURNAL_ROOM, DEFERRED, FREED), logging.INFO),
    **dict.fromkeys((FAILED, DAMAGE), logging.ERROR),
}
WAITING = 1024  # events that a listener may be behind
HYSTERESIS = 0.02  # fraction of the pool by which usage must fall below a level before that is told

log = logging.getLogger("nbdthin.events")


class Notify(Protocol):
    """What an event is told with: its kind, a line for people, and facts for programs."""

    def __call__(self, kind: str, message: str, **facts: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    message: str  # one line
    time: float  # seconds since 1970
    facts: Mapping[str, object] = field(default_factory=dict)  # numbers in bytes unless their name says otherwise


class Events:
    """Events as they come, to the log and to any number of listeners, in one event loop."""

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()  # who drops one has stopped listening

    def notify(self, kind: str, message: str, **facts: object) -> None:
        log.log(_LEVELS.get(kind, logging.WARNING), "%s", message)
        event = Event(kind, message, time.time(), facts)
        for listener in list(self._listeners):
            listener.put(event)

    def listen(self, most: int = WAITING) -> Listener:
        """Every event from this moment on, until `close`; up to `most` of them wait to be taken."""
        listener = Listener(most)
        self._listeners.add(listener)
        return listener

    def close(self) -> None:
        """Nothing more happens: listeners end when they have taken what there is."""
        for listener in list(self._listeners):
            listener.close()


class Listener:
    """An async iterator of events."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._closed = False
        self._wake = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self._events) == self._most:
            self._events.popleft()
            self._dropped += 1
        self._events.append(event)
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            message = f"{dropped} events came faster than they were taken, and are gone"
            return Event(DROPPED, message, time.time(), {"count": dropped})
        return self._events.popleft()


class Levels:
    """Which of some levels of usage have been passed."""

    def __init__(self, levels: Sequence[float]) -> None:
        self._levels = sorted(levels)
        self._passed = 0  # how many of them

    def update(self, fraction: float) -> tuple[str, float] | None:
        """What a usage of `fraction` newly means: the highest level passed, or the lowest one fallen below."""
        before = self._passed
        while self._passed < len(self._levels) and fraction >= self._levels[self._passed]:
            self._passed += 1
        if self._passed > before:
            return LOW_WATER, self._levels[self._passed - 1]
        while self._passed and fraction < self._levels[self._passed - 1] - HYSTERESIS:
            self._passed -= 1
        if self._passed < before:
            return RECOVERED, self._levels[self._passed]
        return None
