"""Power cuts: seeded work and directed histories, cut and compared (tools/simulate). Fixed seeds, and new ones a run.

A failure prints the command that replays it.
"""

from __future__ import annotations

import random

import pytest
from simulatelib.directed import ALL, run_directed
from simulatelib.livework import run_live
from simulatelib.run import run_seed

from .served import ServedWork

STEPS = 450  # of random work: three lives, each on a disk that a cut of the one before has left
NEW = random.SystemRandom().randrange(1 << 31)  # of this run; a failure names it


@pytest.mark.parametrize("history", ALL)
def test_a_cut_at_any_call_of_a_history_loses_nothing(history: str) -> None:
    for seed in (0, NEW):
        print(history, seed, run_directed(history, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, NEW])
def test_a_cut_at_any_sync_of_random_work_loses_nothing(seed: int) -> None:
    print(f"seed {seed}:", run_seed(seed, STEPS))


@pytest.mark.slow
def test_a_cut_at_any_call_of_random_work_loses_nothing() -> None:
    print(f"seed {NEW}:", run_seed(NEW, 150, "all"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, NEW])
def test_a_cut_of_a_live_pool_loses_nothing_that_was_answered(seed: int) -> None:
    print(f"seed {seed}:", run_live(seed, 60))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, NEW])
def test_a_cut_of_a_served_pool_loses_nothing_that_a_client_was_answered(seed: int) -> None:
    print(f"seed {seed}:", run_live(seed, 60, ServedWork))
