"""A dm-thin pool in memory: what its metadata become in a history of commands, and as thin_dump writes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nbdthin.moving.thin_plan import Plan, Runs

Device = dict[int, tuple[int, int]]  # logical block -> physical block, time


@dataclass
class ThinPool:
    """Allocates the lowest free block, as dm-thin does, and breaks sharing by time, so once more than needed."""

    devices: dict[int, Device] = field(default_factory=dict)
    created: dict[int, int] = field(default_factory=dict)  # at what time
    snapped: dict[int, int] = field(default_factory=dict)
    time: int = 0

    def create(self, number: int) -> None:
        self.devices[number], self.created[number], self.snapped[number] = {}, self.time, self.time

    def snapshot(self, origin: int, number: int) -> None:
        self.time += 1
        self.devices[number] = dict(self.devices[origin])
        self.created[number] = self.snapped[number] = self.snapped[origin] = self.time

    def write(self, number: int, block: int) -> None:
        mapped = self.devices[number].get(block)
        if mapped is None or self.snapped[number] > mapped[1]:
            used = {physical for device in self.devices.values() for physical, _ in device.values()}
            self.devices[number][block] = next(each for each in range(1 << 30) if each not in used), self.time

    def discard(self, number: int, block: int) -> None:
        self.devices[number].pop(block, None)

    def delete(self, number: int) -> None:
        del self.devices[number]

    def runs(self) -> list[Runs]:
        """As thin_dump tells them: runs of blocks that go on on both sides, of one time."""
        return [runs_of(device) for device in self.devices.values()]

    def xml(self, block_size: int, blocks: int) -> str:
        """What thin_restore takes. `block_size` is bytes, `blocks` the pool's."""
        superblock = f'uuid="" time="{self.time}" transaction="1" flags="0" version="2"'
        lines = [f'<superblock {superblock} data_block_size="{block_size // 512}" nr_data_blocks="{blocks}">']
        for number, runs in zip(self.devices, self.runs(), strict=True):
            times = f'creation_time="{self.created[number]}" snap_time="{self.snapped[number]}"'
            mapped = len(self.devices[number])
            lines.append(f'<device dev_id="{number}" mapped_blocks="{mapped}" transaction="0" {times}>')
            for logical, physical, length, time in zip(*(column.tolist() for column in runs), strict=True):
                if length == 1:
                    lines.append(f'<single_mapping origin_block="{logical}" data_block="{physical}" time="{time}"/>')
                else:
                    place = f'origin_begin="{logical}" data_begin="{physical}" length="{length}"'
                    lines.append(f'<range_mapping {place} time="{time}"/>')
            lines.append("</device>")
        return "\n".join([*lines, "</superblock>\n"])


def runs_of(device: Device) -> Runs:
    rows: list[list[int]] = []
    for logical, (physical, time) in sorted(device.items()):
        if rows and [logical - rows[-1][2], physical - rows[-1][2], time] == [rows[-1][0], rows[-1][1], rows[-1][3]]:
            rows[-1][2] += 1
        else:
            rows.append([logical, physical, 1, time])
    return Runs(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def shown(plan: Plan) -> dict[int, dict[int, int]]:
    """What each device shows when the layers are carried out: logical block -> physical block.

    On the way: nothing is stored twice in a layer, and `over` is said where something is below and nowhere else.
    """
    layers: list[dict[int, int]] = []
    result = {}
    for layer in plan.layers:
        assert layer.parent is None or layer.parent < len(layers)
        below = {} if layer.parent is None else layers[layer.parent]
        content, here = dict(below), set()
        for logical, physical, count, over in zip(*layer.stored, strict=True):
            for index in range(int(count)):
                block = int(logical) + index
                assert block not in here and bool(over) == (block in below)
                here.add(block)
                content[block] = int(physical) + index
        for logical, count in zip(*layer.holes, strict=True):
            for block in range(int(logical), int(logical + count)):
                assert block in below and block not in here
                del content[block]
        layers.append(content)
        if layer.device is not None:
            result[layer.device] = content
    return result
