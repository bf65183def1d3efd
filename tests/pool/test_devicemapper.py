"""The examples with which Docker's devicemapper driver explained itself, here in blocks of 64 KiB.

Images are layers, containers are clones; what is new takes blocks, what changes copies, what is removed gives back.
"""

from __future__ import annotations

import pytest

from nbdthin.pool.pool import Pool
from nbdthin.pool.rows import Extent
from nbdthin.pool.volume import ZERO
from nbdthin.units import GiB, KiB, MiB

from .conftest import BLOCK, SUB, Pools, Writes, contents, pattern, used


@pytest.fixture
def image(pool: Pool) -> Pool:
    """A base of two layers, each an image: the lower one owns blocks 0 to 3, the upper one 4 to 7."""
    pool.create("base", 10 * GiB)
    pool.volume("base").write(0, pattern(4 * BLOCK, 1))
    pool.snapshot("base", "debian:12")
    pool.clone("debian:12", "build")
    pool.volume("build").write(4 * BLOCK, pattern(4 * BLOCK, 2))
    pool.snapshot("build", "app:1")
    pool.remove("base", "build")
    pool.clone("app:1", "web")
    return pool


def test_a_fresh_snapshot_and_a_fresh_clone_take_no_data_block(image: Pool) -> None:
    before = used(image), image.info().data_used
    image.snapshot("web", "web@1")
    image.clone("web@1", "copy")
    assert (used(image), image.info().data_used) == before
    for name in ("web", "web@1", "copy"):
        row = image.show(name)
        assert (row.exclusive, row.shared, row.referenced) == (0, 8 * BLOCK, 8 * BLOCK)


def test_56_kib_written_to_a_new_place_take_exactly_one_block(image: Pool) -> None:
    before = used(image)
    image.volume("web").write(100 * BLOCK, pattern(56 * KiB))
    assert used(image) == before + 1
    assert image.show("web").exclusive == BLOCK


def test_56_kib_that_lie_across_two_blocks_take_two(image: Pool) -> None:
    before = used(image)
    image.volume("web").write(100 * BLOCK + 32 * KiB, pattern(56 * KiB))
    assert used(image) == before + 2


def test_a_block_read_in_a_container_comes_from_the_layer_that_owns_it(image: Pool) -> None:
    """Whatever lies between: twenty layers that own nothing of it, and one that owns a part."""
    places = image.volume("debian:12").segments(0, 4 * BLOCK), image.volume("app:1").segments(4 * BLOCK, 4 * BLOCK)
    for number in range(20):
        image.snapshot("web", f"step{number}")
        image.volume("web").write((10 + number) * BLOCK, pattern(SUB, number))
    web = image.volume("web")
    assert (web.segments(0, 4 * BLOCK), web.segments(4 * BLOCK, 4 * BLOCK)) == places
    assert web.read(0, 8 * BLOCK) == pattern(4 * BLOCK, 1) + pattern(4 * BLOCK, 2)
    web.write(2 * BLOCK + SUB, data := pattern(SUB, 3))
    (own, _), *rest = web.segments(2 * BLOCK + SUB, BLOCK - SUB)
    assert own != places[0][0][0] + 2 * BLOCK + SUB
    assert rest == [(places[0][0][0] + 2 * BLOCK + 2 * SUB, BLOCK - 2 * SUB)]
    assert (
        web.read(2 * BLOCK, 3 * SUB)
        == pattern(4 * BLOCK, 1)[2 * BLOCK :][:SUB] + data + pattern(4 * BLOCK, 1)[2 * BLOCK + 2 * SUB :][:SUB]
    )


def test_a_small_change_in_a_large_file_copies_only_what_changed(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 KiB of 1 GiB: one block, and 32 KiB of I/O where the driver copied 64."""
    pool = pools.make(size="2G")
    pool.create("base", GiB)
    for offset in range(0, GiB, MiB):
        pool.volume("base").write(offset, pattern(SUB))
    pool.volume("base").write(500 * MiB, pattern(2 * MiB))
    pool.snapshot("base", "image")
    pool.clone("image", "web")
    before = used(pool)
    writes = Writes(monkeypatch, pool)
    pool.volume("web").write(500 * MiB + 16 * KiB, pattern(32 * KiB))
    assert (used(pool) - before, writes.bytes) == (1, 32 * KiB)
    assert pool.show("web").exclusive == BLOCK
    pool.snapshot("web", "now")
    assert pool.diff("image", "now") == [Extent(500 * MiB + 16 * KiB, 32 * KiB, True)]


def test_4_kib_over_a_shared_block_cost_one_block_and_4_kib_of_io(image: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = used(image)
    writes = Writes(monkeypatch, image)
    image.volume("web").write(BLOCK + 2 * SUB, pattern(SUB))
    assert (used(image) - before, writes.bytes, writes.calls) == (1, SUB, 1)


def test_a_second_change_in_the_same_block_takes_no_other(image: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    image.volume("web").write(BLOCK, pattern(SUB))
    before = used(image)
    writes = Writes(monkeypatch, image)
    image.volume("web").write(BLOCK + 7 * SUB, pattern(2 * SUB))
    assert (used(image), writes.bytes) == (before, 2 * SUB)


def test_less_than_a_subblock_reads_and_writes_that_one_subblock(image: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch, image)
    image.volume("web").write(BLOCK + 1000, b"x" * 512)
    assert writes.bytes == SUB
    expected = bytearray(pattern(4 * BLOCK, 1)[BLOCK : 2 * BLOCK])
    expected[1000:1512] = b"x" * 512
    assert image.volume("web").read(BLOCK, BLOCK) == expected


def test_a_containers_changes_go_with_it_and_the_image_stays(image: Pool) -> None:
    before = used(image), {name: contents(image)[name] for name in ("debian:12", "app:1")}
    web = image.volume("web")
    web.write(0, pattern(3 * BLOCK, 5))
    web.trim(5 * BLOCK, BLOCK)
    web.write(50 * BLOCK, pattern(BLOCK, 6))
    assert used(image) == before[0] + 4
    image.remove("web")
    assert (used(image), contents(image)) == before


def test_containers_of_one_image_do_not_see_each_other(image: Pool) -> None:
    for number in range(5):
        image.clone("app:1", f"web{number}")
        image.volume(f"web{number}").write(number * BLOCK, pattern(BLOCK, 10 + number))
    whole = pattern(4 * BLOCK, 1) + pattern(4 * BLOCK, 2)
    for number in range(5):
        expected = whole[: number * BLOCK] + pattern(BLOCK, 10 + number) + whole[(number + 1) * BLOCK :]
        assert image.volume(f"web{number}").read(0, 8 * BLOCK) == expected


def test_removing_an_image_leaves_its_containers_as_they_are(image: Pool) -> None:
    image.volume("web").write(0, pattern(BLOCK, 7))
    before = image.volume("web").read(0, 10 * BLOCK)
    image.remove("debian:12", "app:1")
    assert image.volume("web").read(0, 10 * BLOCK) == before
    assert used(image) == 8, "the block that web has written over is free"
    assert len(image.state.layers) == 1


def test_a_thousand_containers_cost_one_record_each_and_no_block(image: Pool) -> None:
    before, journal = used(image), image.info().journal
    with image.batch():
        for number in range(1000):
            image.clone("app:1", f"c{number}")
    assert used(image) == before
    assert image.info().journal - journal < 1000 * 100


def test_containers_of_one_image_are_read_from_one_place(image: Pool) -> None:
    """So the page cache below the pool holds an image once: what one container has read, the others find there."""
    for number in range(5):
        image.clone("app:1", f"c{number}")
    names = ["app:1", *(f"c{number}" for number in range(5))]
    (places,) = {tuple(image.volume(name).segments(0, 8 * BLOCK)) for name in names}
    assert sum(length for _, length in places) == 8 * BLOCK and ZERO not in dict(places)


def test_what_a_removed_container_held_goes_back_to_the_file_system(image: Pool) -> None:
    def taken() -> int:
        return image.data.path.stat().st_blocks * 512

    before = taken()
    image.volume("web").write(100 * BLOCK, pattern(16 * MiB))
    image.commit()
    assert taken() >= before + 16 * MiB
    image.remove("web")
    assert taken() <= before + BLOCK, "the file system may need a block to say where the holes are"
