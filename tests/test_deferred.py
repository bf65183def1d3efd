"""Removal of what clients are connected to: gone for everyone else at once, and for them when they go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

import nbdthin
from nbdthin.errors import InUse, Invalid, NotFound
from nbdthin.pool import live as live_module
from nbdthin.pool.commands import Clone, Create, Remove, Rename, Snapshot
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import lasting_name
from nbdthin.units import KiB, MiB
from tests.clients import libnbd
from tests.clients.daemon import Daemon, nbdthin_command, run, supervised
from tests.clients.hostmount import wait_until
from tests.rawclient import DISC, FLUSH, Client
from tests.test_full import BLOCK, BLOCKS, WAITING, Full
from tests.test_server import Rule, pattern

SIZE = 4 * MiB


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    """A served pool of 63 blocks with a volume `web`."""
    Pool.init(tmp_path / "pool", size=(BLOCKS + 1) * BLOCK, block_size=BLOCK)
    with Full(tmp_path / "pool", tmp_path / "nbd.sock", (Rule("web", description="a rule"),), WAITING) as full:
        full.do(Create("web", SIZE))
        yield full


@pytest.fixture
def web(full: Full) -> Iterator[Client]:
    with contextlib.closing(full.connect("web")) as client:
        yield client


def defer(full: Full, *names: str) -> None:
    full.do(*(Remove(name, deferred=True) for name in names))


def names(full: Full) -> list[str]:
    return [row.name for row in full.live.pool.list()]


def hidden(full: Full) -> list[str]:
    return [row.name for row in full.live.pool.list(deferred=True)]


def leave(client: Client) -> None:
    """End a connection as clients do that will not come back."""
    client.send(DISC, 0, 0)
    assert client.closed()
    client.close()


def freed(full: Full) -> None:
    """Wait until nothing is left of what was removed."""
    full.until(lambda live: not live.pool.state.deferred and not live.pool.allocator.used)


def refused(full: Full, name: str) -> None:
    """Nobody can connect to `name`."""
    with pytest.raises(AssertionError, match="No export has this name"):
        full.connect(name)


# -- what clients see


def test_what_nobody_uses_is_removed_as_always(full: Full) -> None:
    defer(full, "web")
    assert (names(full), hidden(full)) == ([], [])


def test_who_is_connected_goes_on_and_nobody_else_can_come(full: Full, web: Client) -> None:
    assert web.write(0, pattern(1, 8 * KiB)) == 0
    defer(full, "web")
    assert names(full) == []
    (name,) = hidden(full)
    refused(full, "web")
    refused(full, name)
    with contextlib.closing(Client(full.socket)) as other:
        assert other.receive(18)
        other.sock.sendall(bytes((0, 0, 0, 3)))
        assert [kind for kind, _ in other.option(3, b"")] == [1], "no export is listed"
    assert web.read(0, 8 * KiB) == pattern(1, 8 * KiB)
    assert web.write(8 * KiB, b"more") == 0 and web.call(FLUSH, 0, 0) == 0
    assert web.read(8 * KiB, 4) == b"more"
    assert len(full.live.users(name)) == 1 and full.server.open_count(name) == 1
    web.close()
    freed(full)


def test_it_is_freed_after_the_last_close_and_not_before(full: Full, web: Client) -> None:
    web.write(0, bytes(BLOCK))
    with contextlib.closing(full.connect("web")) as second:
        defer(full, "web")
        web.close()
        full.until(lambda live: full.server.connections == 1)
        (name,) = hidden(full)
        assert full.server.open_count(name) == 1
        assert second.write(BLOCK, b"still") == 0
        assert second.read(BLOCK, 5) == b"still"
    freed(full)


def test_a_request_in_work_is_a_user_too(full: Full, web: Client) -> None:
    """A write that waits for space when its client goes has let the volume go only when it has given up."""
    full.do(Create("filler", SIZE))
    with contextlib.closing(full.connect("filler")) as filler:
        assert filler.write(0, bytes(BLOCKS * BLOCK)) == 0
    web.send(1, 0, BLOCK, bytes(BLOCK))
    full.until_waiting(1)
    defer(full, "web")
    assert full.live.waiting == 1, "hiding it ends nothing"
    full.do(Remove("filler"))
    assert web.reply().error == 0
    leave(web)
    freed(full)


def test_its_name_can_be_used_again_at_once_and_each_client_has_its_own(full: Full, web: Client) -> None:
    web.write(0, b"old!")
    full.do(Remove("web", deferred=True), Create("web", SIZE // 2))
    with contextlib.closing(full.connect("web")) as new:
        assert (new.size, new.read(0, 4)) == (SIZE // 2, bytes(4))
        new.write(0, b"new!")
        assert (web.read(0, 4), new.read(0, 4)) == (b"old!", b"new!")
        web.write(0, b"OLD!")
        assert (web.read(0, 4), new.read(0, 4)) == (b"OLD!", b"new!")
        with pytest.raises(InUse):
            full.do(Remove("web"))
        defer(full, "web")
        assert len(hidden(full)) == 2
        leave(web)
        full.until(lambda live: len(live.pool.state.deferred) == 1)
        assert new.read(0, 4) == b"new!"
        leave(new)
    freed(full)


def test_a_snapshot_that_is_read_is_deferred_too_and_its_clones_stay(full: Full, web: Client) -> None:
    web.write(0, pattern(2, BLOCK))
    full.do(Snapshot("web", "web@1"), Clone("web@1", "clone"))
    with contextlib.closing(full.connect("web@1")) as reader:
        web.write(0, bytes(BLOCK))
        defer(full, "web@1")
        with pytest.raises(NotFound):
            full.do(Clone("web@1", "no"))
        assert reader.read(0, BLOCK) == pattern(2, BLOCK)
        leave(reader)
    full.until(lambda live: not live.pool.state.deferred)
    with contextlib.closing(full.connect("clone")) as clone:
        assert clone.read(0, BLOCK) == pattern(2, BLOCK)


def test_all_space_of_a_full_pool_is_there_after_the_last_close(full: Full, web: Client) -> None:
    assert web.write(0, bytes(BLOCKS * BLOCK)) == 0
    full.do(Remove("web", deferred=True), Create("next", SIZE))
    with contextlib.closing(full.connect("next")) as following:
        following.send(1, 0, BLOCK, pattern(3, BLOCK))
        full.until_waiting(1)
        web.close()
        assert following.reply().error == 0
        assert following.write(0, bytes(BLOCKS * BLOCK)) == 0


def test_rules_are_those_of_the_name_that_it_had(full: Full, web: Client) -> None:
    defer(full, "web")
    described = full.server.describe(hidden(full)[0])
    assert described is not None and described.description == "a rule"


def test_events_say_when_it_is_hidden_and_when_it_is_freed(full: Full, web: Client) -> None:
    web.write(0, bytes(3 * BLOCK))
    heard = full.listen()
    defer(full, "web")
    (name,) = hidden(full)
    full.until(lambda live: bool(heard) and heard[-1].kind == "deferred")
    assert heard[-1].facts == {"name": "web", "called": name, "holders": full.live.users(name)}
    assert f"pid {os.getpid()}" in heard[-1].message
    leave(web)
    full.until(lambda live: heard[-1].kind == "freed")
    assert heard[-1].facts == {"name": "web", "called": name, "freed": 3 * BLOCK}


# -- races


@pytest.mark.parametrize("deferred", [False, True])
def test_who_connects_while_a_removal_waits_for_writes_is_counted(full: Full, deferred: bool) -> None:
    """Kata #1758: a device was removed while another pod attached it. Here the removal finds it in use."""
    volume = full.live.open("web")
    held = full.run(volume.acquire([(0, 0)]))  # a write under way

    async def release() -> None:
        volume.release(held)

    def remove() -> Future[None]:
        removing = full.live.execute([Remove("web", deferred=deferred)])
        return asyncio.run_coroutine_threadsafe(removing, full.loop)

    removing = remove()
    full.until(lambda _: volume._gate is not None)
    with contextlib.closing(full.connect("web")) as late:
        full.run(release())
        if deferred:
            removing.result()
            refused(full, "web")
        else:
            with pytest.raises(InUse):
                removing.result()
        assert late.write(0, b"here") == 0
        assert late.read(0, 4) == b"here"
        leave(late)
    full.until(lambda live: not full.server.connections)
    if not deferred:
        remove().result()
    freed(full)


def test_clients_that_come_and_go_during_removals_find_their_volume_or_none(full: Full) -> None:
    """Every connection that is made reads what was written before its name was removed; no other is made."""
    made = turned_away = 0
    for turn in range(60):
        name = f"n{turn}"
        full.do(Create(name, MiB))
        with contextlib.closing(full.connect(name)) as first:
            first.write(0, name.encode())
            removing = asyncio.run_coroutine_threadsafe(full.live.execute([Remove(name, deferred=True)]), full.loop)
            try:
                second = full.connect(name)
            except AssertionError:
                turned_away += 1
            else:
                made += 1
                assert second.read(0, len(name)) == name.encode()
                leave(second)
            removing.result()
            assert first.read(0, len(name)) == name.encode()
            leave(first)
    assert made + turned_away == 60
    full.do(Remove("web"))
    freed(full)


def test_one_that_goes_while_it_is_hidden_leaves_nothing(full: Full) -> None:
    for _ in range(30):
        full.do(Create("n", MiB))
        client = full.connect("n")
        removing = asyncio.run_coroutine_threadsafe(full.live.execute([Remove("n", deferred=True)]), full.loop)
        leave(client)
        removing.result()
    full.do(Remove("web"))
    freed(full)


def test_a_batch_that_is_refused_hides_nothing(full: Full, web: Client) -> None:
    with pytest.raises(NotFound):
        full.do(Remove("web", deferred=True), Remove("no"))
    with pytest.raises(InUse):
        full.do(Create("other", MiB), Remove("web", deferred=True), Remove("other"), Rename("web", "x"), Remove("web"))
    with pytest.raises(Invalid, match="somebody may use it"):
        full.do(Remove("web", deferred=True), Remove(f"web~{full.live.pool.state.names['web'].layer}"))
    assert (names(full), hidden(full)) == (["web"], [])
    full.connect("web").close()


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "COMMIT_INTERVAL", 0.02)


def test_what_is_hidden_twice_in_one_batch_is_freed_by_itself(quick_ticks: None, full: Full, web: Client) -> None:
    """The second one has the name of a volume that is in use, and nobody uses it."""
    full.do(Remove("web", deferred=True), Create("web", MiB), Remove("web", deferred=True))
    full.until(lambda live: len(live.pool.state.deferred) == 1)
    assert web.write(0, b"on") == 0


# -- restarts


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with supervised(tmp_path) as daemon:
        daemon.start()
        yield daemon


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_clients_that_come_back_to_the_next_daemon_find_what_they_held(daemon: Daemon, number: signal.Signals) -> None:
    """As the kernel and QEMU do, by the name that they know; what was answered is there though it was not flushed."""
    daemon.create("web", "1 MiB")
    with contextlib.closing(Client(daemon.socket, "web")) as client, daemon.connect() as pool:
        pool.remove("web", deferred=True)
        client.write(0, pattern(4, 8 * KiB))
        daemon.end(number)
    daemon.start()
    with contextlib.closing(Client(daemon.socket, "web")) as client, daemon.connect() as pool:
        assert client.read(0, 8 * KiB) == pattern(4, 8 * KiB)
        assert client.write(0, b"on") == 0
        assert pool.list() == []
        (row,) = pool.list(deferred=True)
        assert (row.open_count, row.uri) == (1, None)
        with contextlib.closing(Client(daemon.socket, "web")) as second:  # it has several connections
            assert second.read(0, 2) == b"on"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_comes_back_by_a_name_that_stands_for_something_else_finds_that(
    daemon: Daemon, number: signal.Signals
) -> None:
    """Nobody finds another one's removed data; by its lasting name everyone finds what is his."""
    daemon.create("web", "1 MiB")
    daemon.create("two", "1 MiB")
    lasting: list[tuple[str, int, bytes]] = []
    with daemon.connect() as pool, contextlib.ExitStack() as stack:
        for turn, name in enumerate(("web", "two", "two")):
            client = stack.enter_context(contextlib.closing(Client(daemon.socket, name)))
            assert client.write(0, pattern(turn, 64 * KiB)) == 0
            lasting.append((lasting_name(name, pool.show(name).created), client.size, pattern(turn, 64 * KiB)))
            pool.remove(name, deferred=True)
            pool.create(name, "2 MiB")
        pool.remove("two")
        daemon.end(number)
    daemon.start()
    with contextlib.closing(Client(daemon.socket, "web")) as client:
        assert (client.size, client.read(0, 64 * KiB)) == (2 * MiB, bytes(64 * KiB))
    with pytest.raises(AssertionError, match="No export has this name"):
        Client(daemon.socket, "two")
    for name, size, data in lasting:
        with contextlib.closing(Client(daemon.socket, name)) as client:
            assert (client.size, client.read(0, 64 * KiB)) == (size, data)
    with daemon.connect() as pool:
        assert pool.info().pool.deferred == 3
        pool.remove(*(row.name for row in pool.list(deferred=True)), force=True)
        assert pool.info().pool.deferred == 0


def test_the_lasting_name_leads_to_the_same_volume_whatever_becomes_of_its_name(full: Full, web: Client) -> None:
    row = full.live.pool.show("web")
    name = lasting_name("web", row.created)
    web.write(0, b"mine")
    with contextlib.closing(full.connect(name)) as before:
        assert before.read(0, 4) == b"mine"
        assert full.server.open_count("web") == 2
        leave(before)
    full.do(Snapshot("web", "s"), Remove("web", deferred=True), Create("web", MiB))
    with contextlib.closing(full.connect(name)) as after:
        assert after.read(0, 4) == b"mine"
        leave(after)
    refused(full, name + "1")
    refused(full, hidden(full)[0])
    leave(web)
    full.until(lambda live: not live.pool.state.deferred)
    refused(full, name)


def test_who_uses_the_lasting_name_and_breaks_off_without_a_goodbye_may_come_back(
    full: Full, web: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel's client does when a request took too long. Meanwhile the other name leads there, too."""
    monkeypatch.setattr(live_module, "COME_BACK", 0.5)
    web.write(0, b"kept")
    lasting = full.connect(lasting_name("web", full.live.pool.show("web").created))
    defer(full, "web")
    lasting.close()
    full.until(lambda live: full.server.connections == 1)
    web.close()
    full.until(lambda live: not full.server.connections)
    assert len(hidden(full)) == 1
    with contextlib.closing(full.connect("web")) as again:
        assert again.read(0, 4) == b"kept"
        full.until(lambda live: not live.awaited("web"))
        refused(full, "web")
        assert again.read(0, 4) == b"kept"
        leave(again)
    freed(full)


def test_of_two_that_had_the_name_the_one_that_is_left_is_come_back_to(full: Full) -> None:
    with contextlib.ExitStack() as stack:
        for text in (b"one!", b"two!"):
            client = stack.enter_context(contextlib.closing(full.connect("web")))
            client.write(0, text)
            full.do(Remove("web", deferred=True), Create("web", SIZE))
        full.do(Remove("web"))
        full.stop()
    with Full(full.path, full.socket, (), WAITING) as again:
        refused(again, "web")
        again.do(Remove(hidden(again)[0]))
        with contextlib.closing(again.connect("web")) as back:
            assert back.read(0, 4) == b"two!"


def test_what_nobody_comes_back_to_is_freed_after_a_while(full: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "COME_BACK", 0.3)
    with contextlib.closing(full.connect("web")) as web:
        web.write(0, bytes(BLOCK))
        defer(full, "web")
        full.stop()
    with Full(full.path, full.socket, (), WAITING) as again:
        with contextlib.closing(again.connect("web")) as web:
            again.until(lambda live: not live.awaited("web"))
            refused(again, "web")
            assert web.read(0, BLOCK) == bytes(BLOCK)
            assert len(hidden(again)) == 1
            leave(web)
        freed(again)
    with Pool.open(full.path) as pool:
        assert pool.list() == pool.list(deferred=True) == []


def test_one_connection_of_a_client_that_comes_back_may_go_again_meanwhile(full: Full) -> None:
    with contextlib.closing(full.connect("web")) as web:
        web.write(0, b"kept")
        defer(full, "web")
        full.stop()
    with Full(full.path, full.socket, (), WAITING) as again:
        leave(again.connect("web"))
        again.until(lambda live: not again.server.connections)
        with contextlib.closing(again.connect("web")) as web:
            assert web.read(0, 4) == b"kept"


def test_a_kill_between_the_last_close_and_the_free_loses_neither(daemon: Daemon) -> None:
    """Whatever the kill falls into: it is freed, or it is freed by the next daemon; what was made since is there."""
    for turn in range(8):
        daemon.create(f"old{turn}", "1 MiB")
        client = Client(daemon.socket, f"old{turn}")
        client.write(0, bytes(64 * KiB))
        with daemon.connect() as pool:
            with pool.batch():
                pool.remove(f"old{turn}", deferred=True)
                pool.create(f"new{turn}", "1 MiB")
        leave(client)
        if turn % 2:
            daemon.kill()
            daemon.start()
    with daemon.connect() as pool:
        assert [row.name for row in pool.list()] == [f"new{turn}" for turn in range(8)]
        for row in pool.list(deferred=True):
            assert row.open_count == 0
            pool.remove(row.name, if_exists=True)
        wait_until(lambda: pool.info().pool.data_used == 0, "all is freed")


# -- the command and the client


def test_the_command_shows_and_ends_what_is_deferred(daemon: Daemon) -> None:
    def nbdthin_run(*arguments: str) -> str:
        return run(*nbdthin_command("--socket", daemon.control, *arguments))

    daemon.create("web", "1 MiB")
    with contextlib.closing(Client(daemon.socket, "web")) as client:
        client.write(0, bytes(64 * KiB))
        assert nbdthin_run("rm", "web", "--deferred") == ""
        assert nbdthin_run("ls").split("\n")[1:] == [""]
        line = nbdthin_run("ls", "--deferred").splitlines()[1]
        assert line.startswith("web~") and f"pid {os.getpid()}" in line
        (row,) = json.loads(nbdthin_run("ls", "--deferred", "--json"))
        assert (row["open_count"], row["uri"], row["read_only"]) == (1, None, False)
        assert "Deferred: 1 removed and not yet freed, 64 KiB (65536 bytes)" in nbdthin_run("info")
        assert "web" not in nbdthin_run("tree")
        assert row["name"] in nbdthin_run("du"), "it is part of what the pool holds"
        with daemon.connect() as pool:
            assert pool.names() == []
        assert "web~" in nbdthin_run("show", row["name"])
        assert nbdthin_run("rm", "--force", row["name"]) == ""
        assert client.closed()
    with daemon.connect() as pool:
        assert pool.info().pool.deferred == 0
        wait_until(lambda: pool.info().pool.data_used == 0, "it is freed")
    assert nbdthin_run("rm", "--if-exists", "web", "--force") == ""
    assert "Deferred" not in nbdthin_run("info")


def test_force_and_deferred_exclude_each_other(daemon: Daemon) -> None:
    daemon.create("web", "1 MiB")
    with daemon.connect() as pool:
        with pytest.raises(Invalid, match="either disconnect"):
            pool.remove("web", force=True, deferred=True)
        with pytest.raises(NotFound):
            pool.remove("no", "web", deferred=True)
        pool.remove("no", "web", deferred=True, if_exists=True)
        assert pool.list() == []


def test_a_real_client_goes_on(daemon: Daemon) -> None:
    uri = daemon.create("web", "8 MiB")
    with libnbd.connected(uri) as handle, daemon.connect() as pool:
        handle.pwrite(b"a" * 64 * KiB, 0)
        pool.remove("web", deferred=True)
        handle.pwrite(b"b" * 64 * KiB, 64 * KiB)
        handle.flush()
        assert handle.pread(128 * KiB, 0) == b"a" * 64 * KiB + b"b" * 64 * KiB
        with pytest.raises(libnbd.load().Error, match="has no export"), libnbd.connected(uri):
            pass
    with daemon.connect() as pool:
        wait_until(lambda: pool.info().pool.data_used == 0, "it is freed")


def test_asyncio_clients_have_it(daemon: Daemon) -> None:
    async def work() -> None:
        async with await nbdthin.connect_async(daemon.control) as pool:
            await pool.create("a", MiB)
            with contextlib.closing(await asyncio.to_thread(Client, daemon.socket, "a")):
                await pool.remove("a", deferred=True)
                assert [row.open_count for row in await pool.list(deferred=True)] == [1]

    asyncio.run(work())
