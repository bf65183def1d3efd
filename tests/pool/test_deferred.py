"""What is removed while it is in use: the records of it, what it is then, and that it keeps its space."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdthin.errors import Error, Exists, Invalid, NotFound
from nbdthin.pool.check import check, check_path
from nbdthin.pool.commands import (
    Clone,
    Command,
    Create,
    Label,
    Quota,
    Remove,
    Rename,
    Reserve,
    Resize,
    Rollback,
    Snapshot,
    check_stored_name,
    plan,
)
from nbdthin.pool.dump import dump, restore
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import Name, Unname
from nbdthin.pool.repair import repair
from nbdthin.pool.salvage import Loss
from nbdthin.units import KiB, MiB

from .conftest import BLOCK, Pools, flip, frames, logs, pattern, used

WEB = Name("web", False, 2, 4096, 1.0, {"a": "b"}, quota=1 << 20, reservation=1 << 16)


def defer(pool: Pool, *names: str) -> None:
    """As a daemon does it for what clients are connected to."""
    pool.execute([Remove(name, deferred=True) for name in names])
    pool.commit()


def hidden(pool: Pool) -> list[str]:
    return [row.name for row in pool.list(deferred=True)]


def test_it_is_a_rename_to_what_nobody_can_ask_for_without_its_reservation() -> None:
    made = plan([Remove("web", deferred=True)], {"web": WEB}, 3, 5.0).records
    assert made == [WEB._replace(name="web~2", reservation=0), Unname("web")]
    again = plan([Remove("web~2", deferred=True)], {"web~2": WEB._replace(name="web~2")}, 3, 5.0)
    assert again.records == [], "it is deferred already"
    with pytest.raises(Exists):
        plan([Remove("web", deferred=True)], {"web": WEB, "web~2": WEB}, 3, 5.0)


def test_the_batch_that_hides_it_cannot_free_it() -> None:
    """Who asks who uses what, asks before the batch, and by the name that it has then."""
    for last in (Remove("web~2"), Remove("web~2", if_exists=True), Remove("web~2", deferred=True)):
        with pytest.raises(Invalid, match="somebody may use it"):
            plan([Remove("web", deferred=True), last], {"web": WEB}, 3, 5.0)


def test_what_a_snapshot_left_of_it_in_the_same_batch_is_what_is_deferred() -> None:
    made = plan([Snapshot("web", "kept"), Remove("web", deferred=True)], {"web": WEB}, 3, 5.0)
    assert made.changed == {
        "kept": Name("kept", True, 2, 4096, 5.0, {}),
        "web": None,
        "web~3": WEB._replace(name="web~3", layer=3, reservation=0),
    }


def test_what_is_not_there_is_an_error_unless_it_is_said_to_be_none(pool: Pool) -> None:
    pool.create("a", MiB)
    with pytest.raises(NotFound, match="no volume or snapshot 'b'"):
        pool.remove("a", "b")
    pool.remove("a", "b", "a", if_exists=True)
    assert pool.list() == []


def test_its_name_is_free_at_once_and_its_open_volume_goes_on(quiet: Pool) -> None:
    quiet.create("web", MiB)
    old = quiet.volume("web")
    old.write(0, b"old" * KiB)
    quiet.execute([Remove("web", deferred=True), Create("web", 2 * MiB)])
    old.write(4 * KiB, b"more")
    (name,) = hidden(quiet)
    assert (old.name, quiet.opened(name)) == (name, old)
    assert [(row.name, row.size) for row in quiet.list()] == [("web", 2 * MiB)]
    assert quiet.volume("web").read(0, 8) == bytes(8)
    quiet.commit()
    assert old.read(0, 3) + old.read(4 * KiB, 4) == b"oldmore"


@pytest.mark.parametrize(
    "command",
    [
        Snapshot("web~1", "new"),
        Clone("snap~2", "new"),
        Rollback("web~1", "kept"),
        Rollback("other", "snap~2"),
        Rename("web~1", "new"),
        Resize("web~1", 2 * MiB),
        Label("web~1", {"a": "b"}),
        Quota("web~1", MiB),
        Reserve("web~1", MiB),
    ],
    ids=str,
)
def test_nothing_can_be_done_with_it_but_remove_it(pool: Pool, command: Command) -> None:
    pool.create("web", MiB)  # layer 1
    pool.create("other", MiB)  # 2, which becomes the snapshots'
    pool.snapshot("other", "snap")
    pool.snapshot("other", "kept")
    defer(pool, "web", "snap")
    before = pool.list(), pool.list(deferred=True)
    assert hidden(pool) == ["snap~2", "web~1"]
    with pytest.raises(Invalid, match=r"is removed: it only waits for its last client"):
        pool.execute([command])
    assert (pool.list(), pool.list(deferred=True)) == before
    pool.remove("web~1", "snap~2")
    assert hidden(pool) == []


@pytest.mark.parametrize("name", ["web~1", "~", "web~", "web~1~2", "web~x"])
def test_nobody_can_give_such_a_name(pool: Pool, name: str) -> None:
    pool.create("a", MiB)
    for command in (Create(name, MiB), Snapshot("a", name), Rename("a", name)):
        with pytest.raises(Invalid, match="not a name"):
            pool.execute([command])


def test_names_that_a_pool_can_hold_are_those_and_names_with_a_number_behind_them() -> None:
    for name in ("web", "web~1", "a" * 255 + "~12345678901234567890"):
        assert check_stored_name(name) == name
    for name in ("~1", "web~", "web~x", "web~1~2", "web~1\n", "a" * 256 + "~1", "web~\u0661"):
        with pytest.raises(Invalid):
            check_stored_name(name)


def test_it_holds_its_space_until_it_is_removed_and_info_says_so(pool: Pool) -> None:
    pool.create("web", MiB)
    pool.volume("web").write(0, pattern(5 * BLOCK))
    pool.snapshot("web", "web@1")
    pool.volume("web").write(0, pattern(2 * BLOCK))
    defer(pool, "web", "web@1")
    info = pool.info()
    assert (info.volumes, info.snapshots, info.deferred) == (0, 0, 2)
    assert info.deferred_held == sum(row.exclusive for row in pool.list(deferred=True)) == 4 * BLOCK
    assert used(pool) == 7
    for name in hidden(pool):
        pool.remove(name)
    assert (used(pool), pool.info().deferred, pool.info().deferred_held) == (0, 0, 0)


def test_a_clone_of_a_snapshot_that_is_deferred_shows_the_next_parent_that_is_there(pool: Pool) -> None:
    pool.create("base", MiB)
    pool.snapshot("base", "one")
    pool.clone("one", "two")
    pool.volume("two").write(0, pattern(BLOCK))
    pool.snapshot("two", "three")
    pool.clone("three", "web")
    defer(pool, "three")
    assert pool.show("web").parent == "one"
    assert pool.volume("web").read(0, BLOCK) == pattern(BLOCK)
    pool.remove(*hidden(pool))
    assert pool.volume("web").read(0, BLOCK) == pattern(BLOCK)


def test_its_quota_holds_and_its_reservation_is_given_back_at_once(pools: Pools) -> None:
    pool = pools.make(size=16 * BLOCK)
    pool.create("web", 32 * BLOCK)
    pool.quota("web", 12 * BLOCK)
    pool.reserve("web", 12 * BLOCK)
    pool.create("other", 32 * BLOCK)
    web = pool.volume("web")
    web.write(0, bytes(2 * BLOCK))
    with pytest.raises(Error, match="cannot keep so much"):
        pool.reserve("other", 6 * BLOCK)
    defer(pool, "web")
    pool.reserve("other", 6 * BLOCK)
    assert pool.show("web~1").quota == 12 * BLOCK
    with pytest.raises(Error, match="reserved for other volumes"):
        web.write(2 * BLOCK, bytes(8 * BLOCK))
    pool.reserve("other", None)
    web.write(2 * BLOCK, bytes(10 * BLOCK))
    with pytest.raises(Error, match="quota"):
        web.write(12 * BLOCK, bytes(BLOCK))


@pytest.mark.parametrize("ending", ["close", "kill", "crash"])
def test_it_is_what_it_was_after_any_end_of_the_process(pools: Pools, ending: str, eager_checkpoints: None) -> None:
    pool = pools.make(autocommit=False)
    pool.create("web", MiB, labels={"k": "v"})
    pool.volume("web").write(0, pattern(BLOCK))
    pool.snapshot("web", "web@1")
    defer(pool, "web", "web@1")
    pool.create("web", 2 * MiB)
    pool.commit()
    assert check(pool) == []
    pool = pools.open({"close": pools.close, "kill": pools.kill, "crash": pools.crash}[ending](pool))
    assert [row.name for row in pool.list()] == ["web"]
    assert [(row.name, row.kind) for row in pool.list(deferred=True)] == [("web@1~1", "snapshot"), ("web~2", "volume")]
    assert pool.show("web~2").labels == {"k": "v"}
    assert pool.volume("web~2").read(0, BLOCK) == pattern(BLOCK)


def test_check_says_that_there_is_some_and_that_it_is_no_problem(pools: Pools) -> None:
    pool = pools.make()
    pool.create("web", MiB)
    defer(pool, "web")
    report = check_path(pools.close(pool))
    assert report.problems == ()
    (note,) = report.notes
    assert note.endswith("removed while in use, to be freed by who serves it next: 1")


def test_a_dump_has_it_and_is_restored_with_it(pools: Pools, tmp_path: Path) -> None:
    pool = pools.make()
    pool.create("web", MiB)
    pool.volume("web").write(0, pattern(BLOCK))
    defer(pool, "web")
    path = pools.close(pool)
    text = "".join(dump(path))
    assert '"web~1"' in text
    (tmp_path / "dump").write_text(text)
    restore(tmp_path / "dump", path, force=True)
    assert "".join(dump(path)) == text
    pool = pools.open(path)
    assert pool.volume("web~1").read(0, BLOCK) == pattern(BLOCK)
    (tmp_path / "dump").write_text(text.replace('"web~1"', '"web~x"'))
    with pytest.raises(Invalid, match="not a name"):
        restore(tmp_path / "dump", pools.close(pool), force=True)


def test_a_repair_keeps_it(pools: Pools) -> None:
    pool = pools.make(autocommit=False)
    pool.create("web", MiB)
    pool.volume("web").write(0, pattern(BLOCK))
    pool.commit()
    defer(pool, "web")
    pool.create("lost", MiB)
    pool.commit()
    pool.create("other", MiB)
    pool.commit()
    path = pools.close(pool)
    (log,) = logs(path)
    start, end = frames(log)[-2]
    for offset in range(start, end):
        flip(log, offset)
    lost = repair(path).lost
    assert lost and all(isinstance(loss, Loss) for loss in lost)
    pool = pools.open(path)
    assert hidden(pool) == ["web~1"]
    assert pool.volume("web~1").read(0, BLOCK) == pattern(BLOCK)
