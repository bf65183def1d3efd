"""What can be asked of a pool's structure, and what of it is refused: names, sizes, labels, kinds, batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdthin.errors import Error, Exists, Invalid, NoSpace, NotFound
from nbdthin.pool.commands import (
    MAX_LABEL,
    MAX_LABELS,
    MAX_VOLUME,
    Clone,
    Command,
    Create,
    Label,
    Remove,
    Rename,
    Resize,
    Rollback,
    Snapshot,
    plan,
)
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import Layer, Name, Record, Unname
from nbdthin.units import KiB, MiB

from .conftest import BLOCK, Pools, contents, fill, pattern

NAMES = {"v": Name("v", False, 2, 4096, 1.0, {"a": "b"}), "s": Name("s", True, 1, 2048, 1.0, {})}


def records(*commands: Command) -> list[Record]:
    return plan(commands, NAMES, 3, 5.0).records


def test_each_command_becomes_these_records() -> None:
    assert records(Create("x", 512, {"k": "v"})) == [Layer(3, 0), Name("x", False, 3, 512, 5.0, {"k": "v"})]
    assert records(Snapshot("v", "x")) == [
        Name("x", True, 2, 4096, 5.0, {}),
        Layer(3, 2),
        Name("v", False, 3, 4096, 1.0, {"a": "b"}),
    ]
    assert records(Clone("s", "x")) == [Layer(3, 1), Name("x", False, 3, 2048, 5.0, {}, origin=1)]
    assert records(Clone("s", "x", 8192)) == [Layer(3, 1), Name("x", False, 3, 8192, 5.0, {}, origin=1)]
    assert records(Rollback("v", "s")) == [Layer(3, 1), Name("v", False, 3, 2048, 1.0, {"a": "b"}, origin=1)]
    assert records(Rename("v", "x")) == [Name("x", False, 2, 4096, 1.0, {"a": "b"}), Unname("v")]
    assert records(Remove("v")) == [Unname("v")]
    assert records(Resize("v", 8192)) == [Name("v", False, 2, 8192, 1.0, {"a": "b"})]
    assert records(Label("v", {"a": None, "c": "d"})) == [Name("v", False, 2, 4096, 1.0, {"c": "d"})]


def test_a_command_sees_what_those_before_it_in_its_batch_did() -> None:
    made = records(Create("x", 512), Snapshot("x", "y"), Clone("y", "z"), Remove("x"), Rename("z", "x"))
    assert [type(record) for record in made] == [Layer, Name, Name, Layer, Name, Layer, Name, Unname, Name, Unname]
    assert [record.layer for record in made if isinstance(record, Layer)] == [3, 4, 5]
    with pytest.raises(NotFound):
        records(Remove("v"), Resize("v", 512))
    with pytest.raises(Exists):
        records(Create("x", 512), Create("x", 512))


@pytest.mark.parametrize("name", ["a", "debian:12", "web@before", "golden/web-1_2.x", "-", "..", "a" * 255])
def test_a_name_is_ascii_letters_digits_and_a_few_signs(pool: Pool, name: str) -> None:
    pool.create(name, 512)
    pool.snapshot(name, "s")
    pool.rename(name, "other")
    pool.rename("other", name)
    assert [row.name for row in pool.list()] == sorted([name, "s"])


NO_TEXT = [
    pytest.param(name, marks=pytest.mark.interpreted("a call with such an argument is a TypeError"))
    for name in (None, 7)
]


@pytest.mark.parametrize(
    "name",
    ["", "a" * 256, "a b", "a\n", "\na", "ä", "a\0", "a*", "a,b", "a=b", "\u0661", "a\u212a", "../a\\b", *NO_TEXT],
)
def test_another_name_is_refused_in_one_line(pool: Pool, name: str) -> None:
    pool.create("v", 512)
    pool.snapshot("v", "s")
    works: list[Callable[[], object]] = [
        lambda: pool.create(name, 512),
        lambda: pool.snapshot("v", name),
        lambda: pool.clone("s", name),
        lambda: pool.rename("v", name),
    ]
    for work in works:
        with pytest.raises(Invalid, match="not a name") as caught:
            work()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [512, 1536, "10G", "1.5K", MAX_VOLUME])
def test_a_size_is_a_multiple_of_512(pool: Pool, size: int | str) -> None:
    pool.create("v", size)
    pool.remove("v")


@pytest.mark.parametrize("size", [0, 1, 511, 513, -512, "0", "1000", "ten", MAX_VOLUME + 512, "9E", 1 << 70])
def test_another_size_is_refused(pool: Pool, size: int | str) -> None:
    pool.create("v", 512)
    pool.snapshot("v", "s")
    before = pool.list()
    works: list[Callable[[], object]] = [
        lambda: pool.create("x", size),
        lambda: pool.resize("v", size),
        lambda: pool.clone("s", "x", size=size),
    ]
    for work in works:
        with pytest.raises(Invalid):
            work()
    assert pool.list() == before


def test_the_largest_volume_can_be_written_and_read_at_its_end(pool: Pool) -> None:
    pool.create("v", MAX_VOLUME)
    end = pattern(5000)
    pool.volume("v").write(MAX_VOLUME - 5000, end)
    assert pool.volume("v").read(MAX_VOLUME - 6000, 6000) == bytes(1000) + end
    pool.volume("v").trim(0, MAX_VOLUME)
    assert pool.allocator.used == 0


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"a=b": "x"},
        {"k" * (MAX_LABEL + 1): ""},
        {"k": "v" * (MAX_LABEL + 1)},
        {"k": "ä" * (MAX_LABEL // 2 + 1)},
        {"k": "\udcff"},
        {"\udcff": "v"},
        {"k": 5},
        {5: "v"},
        {f"k{number}": "" for number in range(MAX_LABELS + 1)},
    ],
    ids=lambda labels: ascii(labels)[:20],
)
def test_labels_that_are_no_short_text_are_refused_in_one_line(pool: Pool, labels: dict[str, str]) -> None:
    pool.create("v", 512)
    pool.snapshot("v", "s")
    before = pool.list()
    works: list[Callable[[], object]] = [
        lambda: pool.create("x", 512, labels=labels),
        lambda: pool.snapshot("v", "x", labels=labels),
        lambda: pool.clone("s", "x", labels=labels),
        lambda: pool.label("v", labels),
    ]
    for work in works:
        with pytest.raises(Invalid, match="label") as caught:
            work()
        assert len(str(caught.value).splitlines()) == 1
    assert pool.list() == before


def test_labels_are_set_changed_and_removed(pools: Pools) -> None:
    pool = pools.make()
    pool.create("v", 512, labels={"os": "debian", "tier": ""})
    pool.label("v", {"os": "Débian 12 = bookworm", "tier": None, "missing": None})
    pool.snapshot("v", "s", labels={"k": "v" * MAX_LABEL})
    pool = pools.reopen(pool)
    assert pool.show("v").labels == {"os": "Débian 12 = bookworm"}
    assert pool.show("s").labels == {"k": "v" * MAX_LABEL}


def test_as_many_labels_as_there_may_be_are_taken(pool: Pool) -> None:
    pool.create("v", 512, labels={f"k{number}": "" for number in range(MAX_LABELS)})
    with pytest.raises(Invalid, match="too many"):
        pool.label("v", {"more": ""})
    pool.label("v", {"more": "", "k0": None})


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda pool: pool.create("v", 512), Exists, "'v' exists already"),
        (lambda pool: pool.snapshot("v", "s"), Exists, "'s' exists already"),
        (lambda pool: pool.snapshot("v", "v"), Exists, "'v' exists already"),
        (lambda pool: pool.snapshot("s", "x"), Invalid, "'s' is a snapshot, not a volume"),
        (lambda pool: pool.snapshot("no", "x"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.clone("v", "x"), Invalid, "'v' is a volume, not a snapshot"),
        (lambda pool: pool.clone("s", "v"), Exists, "'v' exists already"),
        (lambda pool: pool.clone("s", "x", size=512), Invalid, "a clone cannot be smaller than its snapshot"),
        (lambda pool: pool.clone("no", "x"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.rollback("s", "s"), Invalid, "'s' is a snapshot, not a volume"),
        (lambda pool: pool.rollback("v", "v"), Invalid, "'v' is a volume, not a snapshot"),
        (lambda pool: pool.rollback("v", "no"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.rename("v", "s"), Exists, "'s' exists already"),
        (lambda pool: pool.rename("v", "v"), Exists, "'v' exists already"),
        (lambda pool: pool.rename("no", "x"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.remove("no"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.remove("v", "no"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.remove("v", "v"), NotFound, "no volume or snapshot 'v'"),
        (lambda pool: pool.resize("s", 512), Invalid, "'s' is a snapshot, not a volume"),
        (lambda pool: pool.resize("no", 512), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.label("no", {}), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.show("no"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.volume("no"), NotFound, "no volume or snapshot 'no'"),
        (lambda pool: pool.diff("s", "no"), NotFound, "no snapshot 'no'"),
        (lambda pool: pool.diff("s", "v"), Invalid, "'v' is a volume, which changes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_changes_nothing(
    pool: Pool, work: Callable[[Pool], None], error: type[Error], message: str
) -> None:
    pool.create("v", MiB)
    pool.volume("v").write(0, pattern(BLOCK))
    pool.snapshot("v", "s")
    before = pool.list(), contents(pool), pool.info().sequence
    with pytest.raises(error) as caught:
        work(pool)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
    assert (pool.list(), contents(pool), pool.info().sequence) == before


# -- batches


def test_a_batch_is_one_commit(pool: Pool) -> None:
    before = pool.info().sequence
    with pool.batch():
        pool.create("base", MiB)
        pool.snapshot("base", "image")
        for number in range(100):
            pool.clone("image", f"clone{number}")
    assert pool.info().sequence == before + 1
    assert len(pool.list()) == 102


def test_nothing_of_a_batch_is_there_before_it_ends(pool: Pool) -> None:
    with pool.batch():
        pool.create("a", MiB)
        assert pool.list() == []


def test_a_batch_with_one_refusal_does_nothing(pool: Pool) -> None:
    pool.create("v", MiB)
    before = pool.list(), pool.info().sequence
    with pytest.raises(NotFound), pool.batch():
        pool.create("a", MiB)
        pool.remove("v")
        pool.remove("missing")
    assert (pool.list(), pool.info().sequence) == before


def test_a_batch_that_an_error_leaves_does_nothing(pool: Pool) -> None:
    with pytest.raises(KeyError), pool.batch():
        pool.create("a", MiB)
        raise KeyError
    assert pool.list() == []
    pool.create("a", MiB)


def test_batches_do_not_nest(pool: Pool) -> None:
    with pytest.raises(Invalid, match="a batch is open already"), pool.batch(), pool.batch():
        pass
    with pool.batch():
        pass


def test_a_batch_may_swap_two_names(pool: Pool) -> None:
    for name in "ab":
        pool.create(name, MiB)
        pool.volume(name).write(0, name.encode() * BLOCK)
    with pool.batch():
        pool.rename("a", "c")
        pool.rename("b", "a")
        pool.rename("c", "b")
    assert pool.volume("a").read(0, 1) == b"b"
    assert pool.volume("b").read(0, 1) == b"a"


def test_a_name_can_be_given_anew_in_the_batch_that_takes_it(pool: Pool) -> None:
    pool.create("a", MiB)
    pool.volume("a").write(0, pattern(BLOCK))
    with pool.batch():
        pool.remove("a")
        pool.create("a", 2 * MiB)
    assert (pool.show("a").size, contents(pool)) == (2 * MiB, {"a": []})
    assert pool.allocator.used == 0


def test_growing_goes_together_with_other_changes_of_the_name(pool: Pool) -> None:
    pool.create("old", MiB)
    with pool.batch():
        pool.rename("old", "new")
        pool.resize("new", 2 * MiB)
        pool.snapshot("new", "s")
        pool.create("x", 512)
        pool.resize("x", 1024)
    assert [(row.name, row.size) for row in pool.list()] == [("new", 2 * MiB), ("s", 2 * MiB), ("x", 1024)]


@pytest.mark.parametrize(
    "work",
    [
        lambda pool: pool.snapshot("a", "s"),
        lambda pool: pool.resize("a", MiB),
        lambda pool: pool.rename("a", "b"),
        lambda pool: pool.rename("other", "b"),
        lambda pool: None,
    ],
)
def test_what_lay_behind_a_smaller_end_shows_nowhere(pool: Pool, work: Callable[[Pool], None]) -> None:
    """Whatever else is in the batch: refused as a whole, or gone."""
    pool.create("a", MiB)
    pool.create("other", 512)
    pool.volume("a").write(0, pattern(MiB))
    before = contents(pool)
    try:
        with pool.batch():
            pool.resize("a", 100 * KiB + 512)
            work(pool)
    except Invalid:
        assert contents(pool) == before
        return
    for row in pool.list():
        if row.kind == "snapshot":
            pool.clone(row.name, f"{row.name}-clone", size=MiB)
        else:
            pool.resize(row.name, MiB)
    for row in pool.list():
        if row.size == MiB:
            assert not any(pool.volume(row.name).read(100 * KiB + 512, MiB - 100 * KiB - 512))


def test_two_volumes_can_shrink_in_one_batch(full: Pool) -> None:
    for name in "ab":
        full.create(name, 32 * KiB)
        full.volume(name).write(0, pattern(32 * KiB))
    with full.batch():
        full.resize("a", 512)
        full.resize("b", 16 * KiB + 512)
    assert (full.volume("a").read(0, 512), full.volume("b").read(0, 16 * KiB)) == (pattern(512), pattern(16 * KiB))
    assert full.allocator.used == 3


def test_a_batch_of_shrinks_refused_for_want_of_space_changes_nothing(full: Pool) -> None:
    for name in "ab":
        full.create(name, 32 * KiB)
        full.volume(name).write(0, pattern(32 * KiB))
        full.snapshot(name, f"{name}@1")
    full.create("c", MiB)
    full.volume("c").write(0, pattern(full.allocator.free * 16 * KiB - 16 * KiB))
    full.commit()
    assert full.allocator.free == 1
    before = full.list(), contents(full), full.allocator.used
    with pytest.raises(NoSpace), full.batch():
        full.resize("a", 512)
        full.resize("b", 512)
    assert (full.list(), contents(full), full.allocator.used) == before


def test_a_shrink_refused_for_want_of_space_changes_nothing(full: Pool) -> None:
    full.create("a", 32 * KiB)
    full.volume("a").write(0, pattern(32 * KiB))
    full.snapshot("a", "s")
    fill(full)
    before = full.list(), contents(full), full.allocator.used
    with pytest.raises(NoSpace):
        full.resize("a", 512)
    assert (full.list(), contents(full), full.allocator.used) == before
    full.resize("a", 4 * KiB)
    assert full.volume("a").read(0, 4 * KiB) == pattern(4 * KiB), "an end between two subblocks needs no block"


def test_a_shrink_that_no_commit_followed_has_not_happened(pools: Pools) -> None:
    """Not even to the bytes behind the new end."""
    pool = pools.make(autocommit=False)
    pool.create("a", BLOCK)
    pool.volume("a").write(0, data := pattern(BLOCK))
    pool.commit()
    pool.resize("a", 512)
    pool = pools.open(pools.crash(pool))
    assert (pool.show("a").size, pool.volume("a").read(0, BLOCK)) == (BLOCK, data)
