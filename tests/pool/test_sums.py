"""Checksums of sealed data: what is flipped is found, and nothing else is, whatever happened before."""

from __future__ import annotations

import errno
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from nbdthin.errors import NoSpace, NotFound
from nbdthin.pool import merge, sums
from nbdthin.pool.check import check_path
from nbdthin.pool.layers import SUBBLOCKS, Layer
from nbdthin.pool.policy import Policy
from nbdthin.pool.pool import Pool
from nbdthin.pool.repair import repair
from nbdthin.pool.rows import Finding
from nbdthin.pool.scrub import Reader, Scrub
from nbdthin.units import MiB

from .conftest import BLOCK, SUB, Faults, Pools, checkpoints, flip, pattern

VERIFYING = Policy(min_free=0, auto_extend=False, verify=True)


def compute(pool: Pool) -> int:
    """Compute every sum that is missing; bytes read for it."""
    return sum(work.run() for work in sums.missing(pool))


def scrub(pool: Pool, *names: str) -> tuple[list[Finding], int]:
    """What is found, and bytes without sums."""
    found: list[Finding] = []
    unsummed = 0
    each = Scrub(pool, names)
    for check in each.checks():
        check.read()
        unsummed += check.unsummed
        found += check.findings(each.names)
    return found, unsummed


def position(pool: Pool, name: str, offset: int) -> int:
    """Where a byte of a volume is in the data file."""
    ((found, _),) = pool.volume(name).segments(offset, 1)
    assert found > 0
    return found


def rot(pool: Pool, name: str, offset: int) -> int:
    """Flip a bit of what `name` has at `offset`; where that is."""
    where = position(pool, name, offset)
    flip(pool.data.path, where, 1)
    return where


def record(pool: Pool, block: int) -> tuple[int, ...]:
    """As FORMAT.md has it: owner, 16 sums, mask, reserved, CRC."""
    data = (pool.path / "sums").read_bytes()[block * 80 : block * 80 + 80]
    return struct.unpack("<Q16IHHI", data)


@pytest.fixture
def family(pool: Pool) -> Pool:
    """Snapshot s of v, 2 blocks; clone c of it, snapshot cs, clone cc of that. v and o, another clone, have written
    over block 0 of s."""
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(2 * BLOCK))
    pool.snapshot("v", "s")
    pool.clone("s", "c")
    pool.volume("c").write(4 * BLOCK, pattern(BLOCK, 2))
    pool.snapshot("c", "cs")
    pool.clone("cs", "cc")
    pool.clone("s", "o")
    for name in ("v", "o"):
        pool.volume(name).write(0, pattern(BLOCK, 3))
    pool.commit()
    compute(pool)
    assert scrub(pool) == ([], 0)
    return pool


# -- the file


def test_a_record_has_the_bytes_that_the_format_says(pool: Pool) -> None:
    pool.create("v", MiB)
    pool.volume("v").write(SUB, data := pattern(2 * SUB))
    pool.snapshot("v", "s")
    compute(pool)
    block = position(pool, "s", SUB) // BLOCK
    owner, *stored, mask, reserved, crc = record(pool, block)
    wanted = [xxh3_64_intdigest(data[at : at + SUB]) & 0xFFFFFFFF for at in (0, SUB)]
    assert (owner, mask, reserved) == (pool.volume("s").layer.number, 0b110, 0)
    assert stored == [0, *wanted, *[0] * 13]
    assert crc == zlib.crc32((pool.path / "sums").read_bytes()[block * 80 : block * 80 + 76])


def test_there_is_no_record_before_something_is_sealed(pool: Pool) -> None:
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    pool.commit()
    compute(pool)
    assert (pool.path / "sums").stat().st_size == 0


def test_what_is_computed_is_computed_once(pools: Pools, family: Pool) -> None:
    assert compute(family) == 0
    again = pools.reopen(family)
    assert compute(again) < BLOCK  # the records, and no data
    assert compute(again) == 0


def test_a_seal_that_is_not_durable_gets_no_sums(quiet: Pool) -> None:
    quiet.create("v", MiB)
    quiet.volume("v").write(0, pattern(BLOCK))
    quiet.snapshot("v", "s")
    assert compute(quiet) == 0
    quiet.commit()
    assert compute(quiet) > BLOCK


@pytest.mark.parametrize("damage", ["lost", "truncated", "garbage", "zeroes"])
def test_without_its_file_sums_are_computed_anew(pools: Pools, family: Pool, damage: str) -> None:
    path = pools.close(family)
    file = path / "sums"
    match damage:
        case "lost":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:100])
        case "garbage":
            file.write_bytes(pattern(file.stat().st_size))
        case "zeroes":
            file.write_bytes(bytes(file.stat().st_size))
    pool = pools.open(path)
    found, unsummed = scrub(pool)
    assert not found and unsummed > 0
    compute(pool)
    rot(pool, "s", 0)
    assert len(scrub(pool)[0]) == 1 and scrub(pool)[1] == 0


def test_a_lost_file_of_sums_is_told_by_check_and_in_the_log_and_is_no_problem(
    pools: Pools, family: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    path = pools.close(family)
    pools.close(pools.open(path))
    assert check_path(path).notes == () and caplog.messages == []
    (path / "sums").unlink()
    report = check_path(path)
    assert report.problems == () and report.notes[0].startswith(f"{path / 'sums'} is missing: checksums")
    assert caplog.messages == []
    pool = pools.open(path)
    assert caplog.messages == [f"{path / 'sums'} is missing: checksums of what is sealed are computed anew"]
    compute(pool)
    assert check_path(pools.close(pool)).notes == ()


def test_damaged_records_of_sums_are_counted_by_check(pools: Pools, family: Pool) -> None:
    block = position(family, "s", 0) // BLOCK
    path = pools.close(family)
    flip(path / "sums", block * 80 + 20)
    report = check_path(path)
    assert report.problems == () and "records that are torn or damaged: 1;" in report.notes[0]


def test_a_pool_in_which_nothing_is_sealed_misses_no_sums(pools: Pools) -> None:
    path = pools.close(pools.make())
    (path / "sums").unlink()
    assert check_path(path).notes == ()


def test_every_flipped_byte_of_a_record_is_no_sum_and_no_alarm(family: Pool) -> None:
    block = position(family, "s", 0) // BLOCK
    for at in range(76 + 4):
        flip(family.path / "sums", block * 80 + at)
        assert scrub(family) == ([], BLOCK)
        flip(family.path / "sums", block * 80 + at)
    assert scrub(family) == ([], 0)


def test_a_full_disk_costs_sums_and_nothing_else(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    pool.snapshot("v", "s")
    faults = Faults(monkeypatch, pool.sums._files, "write", errno.ENOSPC)
    compute(pool)
    faults.active = False
    assert pool.sums.failed and scrub(pool) == ([], BLOCK)
    compute(pool)
    assert not pool.sums.failed and scrub(pool) == ([], 0)


def test_a_repaired_pool_begins_without_sums(pools: Pools, family: Pool) -> None:
    path = pools.close(family)
    flip(checkpoints(path)[-1], 30)
    assert repair(path).damage
    assert (path / "sums").stat().st_size == 0 and check_path(path).notes == ()
    assert scrub(pools.open(path))[0] == []


# -- finding


def test_a_flipped_bit_is_found_with_everyone_who_shows_it(family: Pool) -> None:
    where = rot(family, "s", 100)
    found, _ = scrub(family)
    assert found == [Finding("c", 0, SUB, where - 100, False, ("c", "cc", "cs", "s"))]
    assert scrub(family, "s")[0][0].name == "s"
    assert scrub(family, "cc")[0][0].name == "cc"


def test_what_only_a_clone_of_a_clone_shows_affects_nobody_else(family: Pool) -> None:
    where = rot(family, "cs", 4 * BLOCK + 5 * SUB)
    assert scrub(family)[0] == [Finding("c", 4 * BLOCK + 5 * SUB, SUB, where, False, ("c", "cc", "cs"))]
    assert scrub(family, "v", "o", "s") == ([], 0)


def test_neighbours_are_one_finding(family: Pool) -> None:
    for each in (3, 4, 5, 9):
        rot(family, "s", each * SUB)
    assert [(found.offset, found.length) for found in scrub(family)[0]] == [(3 * SUB, 3 * SUB), (9 * SUB, SUB)]


def test_damage_in_a_head_is_not_found(family: Pool) -> None:
    rot(family, "v", 0)
    assert scrub(family) == ([], 0)


def test_a_scrub_of_an_unknown_name_is_refused(family: Pool) -> None:
    with pytest.raises(NotFound):
        Scrub(family, ["s", "nobody"])


def test_what_is_found_stays_found(pools: Pools, family: Pool) -> None:
    rot(family, "s", 0)
    compute(family)
    assert len(scrub(family)[0]) == 1
    again = pools.reopen(family)
    compute(again)
    assert len(scrub(again)[0]) == 1


def test_what_the_disk_cannot_read_is_found_by_subblock(family: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = position(family, "s", 7 * SUB)
    real = Reader.read

    def read(self: Reader, position: int, length: int) -> memoryview:
        if position <= bad < position + length:
            raise OSError(errno.EIO, "a bad sector")
        return real(self, position, length)

    monkeypatch.setattr(Reader, "read", read)
    rot(family, "s", 9 * SUB)
    found = scrub(family, "s")[0]
    assert [(each.offset, each.length, each.unreadable) for each in found] == [
        (7 * SUB, SUB, True),
        (9 * SUB, SUB, False),
    ]


# -- after commands


@pytest.mark.parametrize("verb", ["rename", "rollback", "remove clone", "restart", "kill"])
def test_sums_survive(pools: Pools, family: Pool, verb: str) -> None:
    name = "s"
    match verb:
        case "rename":
            family.rename("s", "t")
            name = "t"
        case "rollback":
            family.rollback("v", "s")
        case "remove clone":
            family.remove("c", "cc", "cs")
        case "restart":
            family = pools.reopen(family)
        case "kill":
            family = pools.open(pools.kill(family))
    assert scrub(family) == ([], 0)
    rot(family, name, 0)
    found = scrub(family, name)[0]
    assert len(found) == 1 and found[0].name == name
    assert ("v" in found[0].affected) == (verb == "rollback")


def test_a_block_that_is_used_again_has_no_sum_of_its_former_owner(full: Pool) -> None:
    size = full.block_size
    full.create("v", MiB)
    full.volume("v").write(0, pattern(size))
    full.snapshot("v", "s")
    full.commit()
    compute(full)
    block = position(full, "s", 0) // size
    full.remove("v", "s")
    full.commit()
    full.create("w", MiB)
    for at in range(15):
        full.volume("w").write(at * size, pattern(size, at))
    full.snapshot("w", "ws")
    full.commit()
    assert block in {position(full, "ws", at * size) // size for at in range(15)}
    assert scrub(full) == ([], 15 * size)
    compute(full)
    assert scrub(full) == ([], 0)


def test_a_block_that_a_living_layer_gave_up_has_no_sum_of_it(full: Pool) -> None:
    size = full.block_size
    full.create("v", MiB)
    full.volume("v").write(0, pattern(2 * size))
    full.snapshot("v", "s")
    for name in ("c", "d"):
        full.clone("s", name)
        full.volume(name).write(0, pattern(size, 2))
    full.commit()
    compute(full)
    block = position(full, "s", 0) // size
    full.remove("v", "s")
    full.commit()
    full.merge_all()  # block 0 is pruned, block 1 is not
    full.create("w", MiB)
    left = full.allocator.free
    for at in range(left):
        full.volume("w").write((1 + at) * size, pattern(size, 3 + at))
    full.snapshot("w", "ws")
    full.commit()
    places = {position(full, "ws", (1 + at) * size) // size: 1 + at for at in range(left)}
    assert block in places
    # The entry that the layer has where the block is now must not be taken for one that names it.
    layer = full.volume("c").layer.parent
    assert layer is not None and layer.entry(1) and record(full, block)[0] == layer.number
    assert scrub(full)[0] == []
    volume = full.volume("ws")
    view = memoryview(bytearray(left * size))
    sums.read_checked(full, volume.layer, size, volume.segments(size, left * size), view)


# -- merging


@pytest.fixture
def stack(pool: Pool) -> Pool:
    """Snapshots a, b of v: a has blocks 0 to 3, of 0 and 3 all, of 1 most, of 2 little; b has the rest of 1 and 2, and
    writes over 3."""
    pool.create("v", MiB)
    v = pool.volume("v")
    v.write(0, pattern(BLOCK))
    v.write(BLOCK, pattern(12 * SUB, 2))
    v.write(2 * BLOCK, pattern(2 * SUB, 3))
    v.write(3 * BLOCK, pattern(BLOCK, 4))
    pool.snapshot("v", "a")
    v.write(BLOCK + 12 * SUB, pattern(4 * SUB, 5))
    v.write(2 * BLOCK + 2 * SUB, pattern(14 * SUB, 6))
    v.write(3 * BLOCK, pattern(BLOCK, 7))
    pool.snapshot("v", "b")
    pool.commit()
    compute(pool)
    return pool


def test_a_merge_into_a_sealed_child_takes_the_sums_along(stack: Pool) -> None:
    assert not stack.sums.todo
    stack.remove("a")
    assert len(stack.state.layers) == 2  # it was merged
    assert scrub(stack) == ([], 0)
    assert compute(stack) == 0
    for each in range(4 * SUBBLOCKS):
        offset = each * SUB
        where = rot(stack, "b", offset)
        assert [(found.offset, found.affected) for found in scrub(stack)[0]] == [(offset, ("b", "v"))]
        flip(stack.data.path, where, 1)


def test_a_merge_into_a_head_leaves_no_sums(stack: Pool) -> None:
    stack.remove("b")
    stack.remove("a")
    assert scrub(stack) == ([], 0)
    stack.volume("v").write(0, pattern(4 * BLOCK, 9))
    stack.snapshot("v", "late")
    assert scrub(stack) == ([], 4 * BLOCK)
    compute(stack)
    assert scrub(stack) == ([], 0)


def test_damage_that_a_merge_copies_is_still_found_and_told(stack: Pool) -> None:
    told: list[tuple[str, dict[str, object]]] = []
    stack.notify = lambda kind, message, **facts: told.append((kind, facts))
    rot(stack, "a", 2 * BLOCK + SUB)  # copied into the block of b
    rot(stack, "b", BLOCK + 13 * SUB)  # copied into the block of a
    stack.remove("a")
    damaged = {BLOCK + 13 * SUB, 2 * BLOCK + SUB}
    assert {(found.offset, found.affected) for found in scrub(stack)[0]} == {(each, ("b", "v")) for each in damaged}
    assert {facts["offset"] for kind, facts in told if kind == "damage"} == damaged


def test_a_merge_of_a_layer_that_waits_for_sums_lets_its_child_wait(stack: Pool) -> None:
    layer = stack.volume("a").layer
    with open(stack.path / "sums", "r+b") as file:
        for block in layer.physical_blocks().tolist():
            file.seek(block * 80)
            file.write(bytes(80))
    stack.sums.todo[layer.number] = None  # as if it had been sealed just now
    stack.remove("a")
    assert scrub(stack)[1] > 0
    compute(stack)
    assert scrub(stack) == ([], 0)


def test_sums_that_a_given_up_merge_has_moved_are_computed_again(quiet: Pool) -> None:
    quiet.create("v", MiB)
    for number, name in enumerate(("a", "b", "top")):
        quiet.volume("v").write(2 * number * BLOCK, pattern(2 * BLOCK, number))
        quiet.snapshot("v", name)
    quiet.commit()
    compute(quiet)
    lower, upper = (quiet.volume(name).layer for name in ("a", "b"))
    quiet.remove("a", "b")
    quiet.commit()
    merge.Step(quiet, lower, upper, [0]).copy()
    for parent in (upper, lower):  # into top; the one whose step was given up comes last
        for step in merge.steps(quiet, parent):
            step.copy()
            step.finish()
        quiet.commit()
    assert len(quiet.state.layers) == 2
    compute(quiet)
    assert scrub(quiet) == ([], 0)


def test_a_merge_of_a_layer_without_sums_has_them_computed(pools: Pools, stack: Pool) -> None:
    path = pools.close(stack)
    (path / "sums").unlink()
    pool = pools.open(path)
    pool.remove("a")
    compute(pool)
    assert scrub(pool) == ([], 0)


def test_the_child_of_a_merge_may_be_sealed_and_not_yet_durably_so(quiet: Pool, pools: Pools) -> None:
    quiet.create("v", MiB)
    quiet.volume("v").write(0, pattern(BLOCK))
    quiet.snapshot("v", "a")
    quiet.commit()
    compute(quiet)
    quiet.remove("a")
    quiet.commit()
    quiet.snapshot("v", "b")  # its layer is the child now, and after a crash a head again
    (parent,) = (layer for layer in quiet.state.layers.values() if layer.name is None)
    for step in merge.steps(quiet, parent):
        step.copy()
        step.finish()
    pool = pools.open(pools.crash(quiet), autocommit=False)
    pool.merge_all()
    pool.volume("v").write(0, pattern(BLOCK, 2))
    pool.snapshot("v", "b")
    pool.commit()
    assert scrub(pool)[0] == []
    compute(pool)
    assert scrub(pool) == ([], 0)


# -- on reading


def test_a_checked_read_reads_what_was_written(family: Pool) -> None:
    for name in ("v", "s", "c", "cc"):
        volume = family.volume(name)
        for offset, length in ((0, MiB), (100, 10), (SUB - 1, 2), (BLOCK - 5, BLOCK + 9), (3 * BLOCK, 2 * BLOCK)):
            view = memoryview(bytearray(b"x" * length))
            sums.read_checked(family, volume.layer, offset, volume.segments(offset, length), view)
            assert bytes(view) == volume.read(offset, length)


def test_a_checked_read_of_damage_fails_for_those_who_show_it(family: Pool) -> None:
    where = rot(family, "s", SUB + 7)
    for name in ("s", "c", "cc"):
        volume = family.volume(name)
        view = memoryview(bytearray(3 * SUB))
        with pytest.raises(sums.Damage) as caught:
            sums.read_checked(family, volume.layer, 10, volume.segments(10, 3 * SUB), view)
        assert (caught.value.errno, caught.value.offset, caught.value.position) == (errno.EIO, SUB, where - 7)
        sums.read_checked(family, volume.layer, 2 * SUB, volume.segments(2 * SUB, SUB), view[:SUB])
    for name in ("v", "o"):
        volume = family.volume(name)
        sums.read_checked(family, volume.layer, 0, volume.segments(0, SUB), view[:SUB])


def test_what_surrounds_a_small_write_is_verified_too(pools: Pools, family: Pool) -> None:
    rot(family, "s", SUB + 7)
    pool = pools.open(pools.close(family), policy=VERIFYING)
    used = pool.allocator.used
    with pytest.raises(sums.Damage):
        pool.volume("c").write(SUB + 100, b"small")
    assert pool.allocator.used == used
    pool.volume("c").write(SUB, data := pattern(SUB, 8))  # a whole one needs nothing of it
    assert pool.volume("c").read(SUB, SUB) == data


# -- whatever happened before


def sealed(pool: Pool) -> Iterator[tuple[Layer, int, int]]:
    """Every subblock of data in sealed layers: layer, block, subblock."""
    for layer in pool.state.layers.values():
        if not layer.head:
            for leaf in layer.own:
                piece = sums.leaf_of(layer, leaf)
                for logical, mask in zip(piece.logical.tolist(), piece.data.tolist(), strict=True):
                    yield from ((layer, logical, each) for each in range(SUBBLOCKS) if mask >> each & 1)


class History:
    """A pool under random work, with pieces of computing and merging in between; ended in every way."""

    def __init__(self, pools: Pools, seed: int) -> None:
        self.random = random.Random(seed)
        self.pools = pools
        # So small that blocks are used again and again.
        self.pool = pools.make(autocommit=False, size=3 * MiB, block_size=16 * 1024)
        self.pool.create("v0", 24 * 16 * 1024)
        self.pool.commit()
        self.count = 0
        self._computing: Iterator[sums.Look | sums.Compute] | None = None
        self._merging: Iterator[merge.Step] | None = None

    def name(self, *kinds: str) -> str | None:
        names = [row.name for row in self.pool.list() if row.kind in kinds]
        return self.random.choice(names) if names else None

    def step(self) -> None:
        actions = [self.write] * 6 + [self.trim, self.snapshot, self.snapshot, self.clone, self.remove, self.remove]
        actions += [self.rollback, self.commit, self.commit, self.end] + [self.compute] * 8 + [self.merge] * 6
        with suppress(NoSpace):
            self.random.choice(actions)()

    def write(self) -> None:
        if (name := self.name("volume")) is not None:
            volume = self.pool.volume(name)
            offset = self.random.randrange(volume.size - 1)
            length = min(self.random.choice((100, 1024, 5000, 40000)), volume.size - offset)
            volume.write(offset, self.random.randbytes(length))

    def trim(self) -> None:
        if (name := self.name("volume")) is not None:
            self.pool.volume(name).trim(self.random.randrange(20) * 16384, 16384 * 3)

    def new(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def snapshot(self) -> None:
        if (name := self.name("volume")) is not None and len(self.pool.state.names) < 14:
            self.pool.snapshot(name, self.new())

    def clone(self) -> None:
        if (name := self.name("snapshot")) is not None and len(self.pool.state.names) < 14:
            self.pool.clone(name, self.new())

    def remove(self) -> None:
        if len(self.pool.state.names) > 3 and (name := self.name("volume", "snapshot")) is not None:
            self.pool.remove(name)
            if self.name("volume") is None:
                self.pool.create(self.new(), 24 * 16 * 1024)

    def rollback(self) -> None:
        volume, snapshot = self.name("volume"), self.name("snapshot")
        if volume is not None and snapshot is not None:
            self.pool.rollback(volume, snapshot)

    def commit(self) -> None:
        self.pool.commit()

    def compute(self) -> None:
        if self._computing is None:
            self._computing = sums.missing(self.pool)
        work = next(self._computing, None)
        if work is None:
            self._computing = None
        else:
            work.run()

    def merge(self) -> None:
        if self._merging is None:
            layer = self.pool.next_unnamed()
            if layer is None:
                return
            if layer.number in self.pool.state.prunable:
                list(merge.prune(self.pool, layer))
            self._merging = merge.steps(self.pool, layer)
        step = next(self._merging, None)
        if step is None:
            self._merging = None
            return
        step.copy()
        if self.random.random() < 0.8:  # else it is given up
            step.finish()
        else:
            self._merging = None

    def end(self) -> None:
        """A crash keeps of what is not durable only what was written in place; a kill keeps all that was answered."""
        self._computing = self._merging = None
        if self.random.random() < 0.5:
            path = self.pools.kill(self.pool)
        else:
            path = self.pools.crash(self.pool)
        if self.random.random() < 0.1 and (path / "sums").stat().st_size:
            self.tear(path / "sums")
        self.pool = self.pools.open(path, autocommit=False)

    def tear(self, path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(self.random.randrange(path.stat().st_size))
            file.write(self.random.randbytes(300))

    def finish(self) -> Pool:
        """Nothing is left to be merged, whose data would get its sums in its child."""
        self._computing = self._merging = None
        self.pool.commit()
        while self._merging is not None or self.pool.next_unnamed() is not None:
            self.merge()
        self.pool.commit()
        compute(self.pool)
        return self.pool


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_found_but_what_was_flipped_whatever_happened(pools: Pools, seed: int) -> None:
    history = History(pools, seed)
    for number in range(600):
        history.step()
        if number % 20 == 0:
            assert scrub(history.pool)[0] == [], f"seed {seed}, step {number}"
    pool = history.finish()
    assert scrub(pool) == ([], 0)
    places = list(sealed(pool))
    assert places
    sub = pool.block_size // SUBBLOCKS
    for layer, block, each in random.Random(seed).sample(places, min(len(places), 150)):
        where = (layer.entry(block) >> 32) * pool.block_size + each * sub
        flip(pool.data.path, where + seed % sub, 1)
        found = scrub(pool)[0]
        flip(pool.data.path, where + seed % sub, 1)
        assert [(one.position, one.offset) for one in found] == [(where, block * pool.block_size + each * sub)]
        assert found[0].affected == tuple(sorted(shows(pool, block, each, where // pool.block_size)))


def shows(pool: Pool, block: int, each: int, physical: int) -> list[str]:
    """By the definition: whose read of the subblock would go to that physical block?"""
    names = []
    for name in pool.state.names:
        ((place, _),) = pool.volume(name).segments(block * pool.block_size + each * (pool.block_size // 16), 1)
        if place > 0 and place // pool.block_size == physical:
            names.append(name)
    return names


# -- a merge into a head that a crash takes back


@pytest.fixture
def taken_back(pools: Pools) -> Pool:
    """The head has taken a nameless layer's block over and written to it in place; then the power went: the layer has
    the block again, with the new bytes, and a sum of the old ones."""
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(2 * BLOCK))
    pool.snapshot("v", "s")
    pool.commit()
    compute(pool)
    pool.remove("s")
    pool.commit()
    parent = pool.next_unnamed()
    assert parent is not None
    for step in merge.steps(pool, parent):
        step.copy()
        step.finish()
    pool.volume("v").write(0, pattern(BLOCK, 2))
    return pools.open(pools.crash(pool), autocommit=False)


def test_what_a_head_wrote_before_a_crash_gave_its_block_back_is_no_damage(taken_back: Pool) -> None:
    assert taken_back.volume("v").read(0, BLOCK) == pattern(BLOCK, 2)
    assert scrub(taken_back)[0] == []
    taken_back.snapshot("v", "later")  # now the layer's child is sealed
    taken_back.commit()
    assert scrub(taken_back)[0] == []
    taken_back.merge_all()
    compute(taken_back)
    assert scrub(taken_back) == ([], 0)
    rot(taken_back, "later", 0)
    assert [found.offset for found in scrub(taken_back)[0]] == [0]


def test_a_block_that_a_merge_gives_to_a_head_during_a_scrub_is_no_damage(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools.make(autocommit=False)
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(2 * BLOCK))
    pool.snapshot("v", "s")
    pool.commit()
    compute(pool)
    pool.remove("s")
    pool.commit()
    real = Reader.read

    def meanwhile(self: Reader, start: int, length: int) -> memoryview:
        pool.merge_all()
        pool.volume("v").write(0, pattern(BLOCK, 2))
        pool.commit()
        return real(self, start, length)

    monkeypatch.setattr(Reader, "read", meanwhile)
    assert scrub(pool)[0] == []
