"""Where data is more than zeroes."""

from __future__ import annotations

import random

import pytest

from nbdthin.moving.copying import BLOCK, data_runs
from nbdthin.units import MiB


def _plainly(data: bytes) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for start in range(0, len(data), BLOCK):
        stop = min(start + BLOCK, len(data))
        if any(data[start:stop]):
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], stop
            else:
                runs.append((start, stop))
    return runs


@pytest.mark.parametrize("seed", range(40))
def test_runs_of_data_are_found(seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(chance.choice((0, 1, 511, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK, 16 * BLOCK + 5)))
    for _ in range(chance.randrange(8)):
        if data:
            data[chance.randrange(len(data))] = chance.choice((0, 1, 255))
    assert data_runs(memoryview(data)) == _plainly(bytes(data))


def test_whole_data_is_one_run_and_zeroes_are_none() -> None:
    assert data_runs(memoryview(b"\1" * MiB)) == [(0, MiB)]
    assert data_runs(memoryview(bytes(MiB))) == []
    assert data_runs(memoryview(bytes(MiB - 1) + b"\1")) == [(MiB - BLOCK, MiB)]
