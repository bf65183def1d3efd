"""The plan of an import from dm-thin: every device shows what it did, and what was shared is stored once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdthin.errors import Invalid
from nbdthin.moving import thin_plan
from nbdthin.moving.thin_plan import Plan, Runs, plan
from tests.moving.thinpool import Device, ThinPool, runs_of, shown

BLOCKS = 12
Step = tuple[str, int, int]


def planned(pool: ThinPool) -> Plan:
    """The plan of all devices; they show what they did, each physical block is stored once."""
    result = checked(list(pool.devices.values()))
    assert result.stored == result.distinct
    return result


def checked(devices: Sequence[Device]) -> Plan:
    result = plan([runs_of(device) for device in devices])
    content = [{block: physical for block, (physical, _) in device.items()} for device in devices]
    assert shown(result) == dict(enumerate(content))
    assert result.mapped == sum(map(len, content))
    assert result.distinct == len({physical for device in content for physical in device.values()})
    assert result.distinct <= result.stored <= result.mapped
    return result


def parents(result: Plan) -> dict[int | None, int | None]:
    """device -> layer below it"""
    return {layer.device: layer.parent for layer in result.layers if layer.device is not None}


def of_one_device(blocks: int) -> ThinPool:
    """Device 0, with so many blocks written."""
    pool = ThinPool()
    pool.create(0)
    for block in range(blocks):
        pool.write(0, block)
    return pool


def carry_out(steps: Sequence[Step]) -> ThinPool:
    """Numbers say which of the devices there are."""
    pool = ThinPool()
    pool.create(0)
    for index, (what, which, argument) in enumerate(steps, start=1):
        names = sorted(pool.devices)
        number = names[which % len(names)]
        if what == "create":
            pool.create(index)
        elif what == "snapshot":
            pool.snapshot(number, index)
        elif what == "delete" and len(names) > 1:
            pool.delete(number)
        elif what == "write":
            for block in range(argument % BLOCKS, min(argument % BLOCKS + 1 + argument % 3, BLOCKS)):
                pool.write(number, block)
        elif what == "discard":
            pool.discard(number, argument % BLOCKS)
    return pool


histories = st.lists(
    st.tuples(
        st.sampled_from(["write"] * 5 + ["snapshot"] * 3 + ["discard", "delete", "create"]),
        st.integers(0, 50),
        st.integers(0, 50),
    ),
    max_size=80,
)


@given(histories)
@settings(max_examples=400, deadline=None)
def test_whatever_happened_in_a_pool_nothing_is_stored_twice(steps: list[Step]) -> None:
    planned(carry_out(steps))


mappings = st.dictionaries(st.integers(0, 7), st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=8)


@given(st.lists(mappings, max_size=7))
@settings(max_examples=400, deadline=None)
def test_mappings_that_no_pool_ever_had_are_brought_over_all_the_same(devices: list[Device]) -> None:
    checked(devices)


def test_independent_devices_stay_independent() -> None:
    pool = ThinPool()
    for number in range(3):
        pool.create(number)
        pool.write(number, 5)
    assert parents(planned(pool)) == {0: None, 1: None, 2: None}


def test_a_snapshot_and_its_origin_stand_on_what_they_share() -> None:
    pool = of_one_device(4)
    pool.snapshot(0, 1)
    pool.write(0, 1)
    pool.discard(1, 2)
    result = planned(pool)
    assert parents(result) == {0: 0, 1: 0}
    common, *own = result.layers
    assert common.stored.logical.tolist() == [0, 3]
    origin, snapshot = sorted(own, key=lambda layer: layer.device or 0)
    assert origin.stored.logical.tolist() == [1, 2]
    assert snapshot.stored.logical.tolist() == [1] and not snapshot.stored.over.any()


def test_snapshots_along_the_life_of_an_origin_are_a_chain() -> None:
    pool = of_one_device(10)
    for number in range(1, 9):
        pool.snapshot(0, number)
        pool.write(0, number)
    result = planned(pool)
    assert len(result.layers) == 9 + 8
    assert sorted(layer.parent for layer in result.layers if layer.device is None and layer.parent is not None) == [
        *range(7)
    ]


def test_a_thousand_containers_of_one_image_stand_on_one_layer() -> None:
    pool = of_one_device(10)
    for number in range(1, 1001):
        pool.snapshot(0, number)
    result = planned(pool)
    assert [layer.device for layer in result.layers if layer.parent is None] == [None]
    assert set(parents(result).values()) == {0}


def test_images_of_dockers_shape_and_their_containers_share_every_layer() -> None:
    pool = ThinPool()
    pool.create(0)
    pool.write(0, 0)  # mkfs
    for image in (100, 200):
        below = 0
        for layer in range(image, image + 3):
            pool.snapshot(below, layer)
            pool.write(layer, 0)
            pool.write(layer, layer % 100 + 1)
            below = layer
        for container in range(image + 10, image + 15):
            pool.snapshot(below, container)
            pool.write(container, container % 100)
    result = planned(pool)
    assert result.stored == 1 + 6 * 2 + 10 - 2 * 2 + 2 * 2


def test_what_is_missing_in_all_that_stand_on_a_layer_is_said_once() -> None:
    pool = of_one_device(6)
    pool.snapshot(0, 1)
    pool.snapshot(0, 2)
    pool.discard(1, 3)
    pool.write(1, 5)
    for number in range(3, 12):
        pool.snapshot(1, number)
    assert [layer.holes[0].tolist() for layer in planned(pool).layers if len(layer.holes[0])] == [[3]]


def test_what_no_tree_can_share_is_stored_again() -> None:
    crossed: list[Device] = [{0: (0, 0)}, {0: (0, 0)}, {0: (1, 0)}, {0: (1, 0)}]
    for device, other in zip(crossed, ((7, 2), (8, 2), (7, 2), (8, 2)), strict=True):
        device[1] = other
    result = checked(crossed)
    assert (result.mapped, result.distinct, result.stored) == (8, 4, 5)


def test_long_runs_stay_long() -> None:
    most = 1 << 40
    column = [np.array([each], dtype=np.int64) for each in (0, 0, most, 0)]
    changed = Runs(*np.array([[0, 0, 7, 0], [7, most, 1, 1], [8, 8, most - 8, 0]], dtype=np.int64).T)
    result = plan([Runs(*column), changed])
    assert (result.mapped, result.distinct, result.stored) == (2 * most, most + 1, most + 1)
    assert [layer.stored.blocks.tolist() for layer in result.layers] == [[7, most - 8], [1], [1]]


def test_more_pieces_than_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_plan, "MAX_PIECES", 19)
    blocks = np.arange(10, dtype=np.int64)
    device = Runs(blocks, blocks * 2, np.ones(10, dtype=np.int64), np.zeros(10, dtype=np.int64))
    with pytest.raises(Invalid, match="20 pieces"):
        plan([device, device])
