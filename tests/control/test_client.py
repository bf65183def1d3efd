"""The verbs from Python, blocking and for asyncio, against a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin import Error, Exists, Extent, InUse, Invalid, NotFound, Unreachable
from nbdthin.control import codec
from nbdthin.units import GiB, KiB
from tests import rawclient
from tests.clients.daemon import Daemon, run, running
from tests.conftest import need


@contextlib.contextmanager
def using(daemon: Daemon, name: str) -> Iterator[rawclient.Client]:
    """A client that is connected to an export meanwhile."""
    client = rawclient.Client(daemon.socket, name)
    with client.sock:
        yield client


def test_a_volume_a_snapshot_and_its_clone(pool: nbdthin.Client) -> None:
    before = time.time()
    pool.create("base", "10 GiB", labels={"os": "debian"})
    pool.snapshot("base", "base@1")
    pool.clone("base@1", "web", size=11 * GiB)
    base, snapshot, web = pool.list()
    assert [row.name for row in (base, snapshot, web)] == ["base", "base@1", "web"]
    assert (base.kind, base.size, base.read_only, base.labels) == ("volume", 10 * GiB, False, {"os": "debian"})
    assert (snapshot.kind, snapshot.parent, snapshot.read_only) == ("snapshot", None, True)
    assert (web.kind, web.size, web.parent, web.exclusive) == ("volume", 11 * GiB, "base@1", 0)
    assert before <= base.created <= time.time()
    assert base.connections == ()


def test_the_uri_of_a_row_is_where_real_clients_find_it(pool: nbdthin.Client) -> None:
    pool.create("images/debian:12", 512 * 3)
    uri = pool.show("images/debian:12").uri
    assert uri is not None
    assert run(need("nbdinfo"), "--size", uri) == "1536\n"


def test_a_rule_makes_a_volume_read_only(pool: nbdthin.Client) -> None:
    pool.create("golden/base", 4096)
    assert pool.show("golden/base").read_only


def test_the_other_verbs(pool: nbdthin.Client) -> None:
    pool.create("a", "1 MiB")
    pool.resize("a", "2 MiB")
    pool.snapshot("a", "a@1", labels={"k": "v"})
    pool.resize("a", "3 MiB")
    pool.rename("a", "b")
    assert pool.show("b").size == 3 << 20
    pool.rollback("b", "a@1")
    assert pool.show("b").size == 2 << 20
    pool.label("a@1", {"k": None, "x": "y", "z": ""})
    assert pool.show("a@1").labels == {"x": "y", "z": ""}
    pool.remove("b", "a@1", "b")
    assert pool.list() == []


def test_a_list_is_of_what_has_all_the_labels(pool: nbdthin.Client) -> None:
    pool.create("a", 512, labels={"os": "debian", "role": "web"})
    pool.create("b", 512, labels={"os": "debian"})
    pool.create("c", 512)
    assert [row.name for row in pool.list(labels={"os": "debian"})] == ["a", "b"]
    assert [row.name for row in pool.list(labels={"os": "debian", "role": "web"})] == ["a"]
    assert pool.list(labels={"os": ""}) == []


def test_a_diff_is_what_was_written_between_two_snapshots(pool: nbdthin.Client) -> None:
    pool.create("a", "1 MiB")
    pool.snapshot("a", "a@1")
    run(need("qemu-io"), "-f", "raw", "-c", "write -P 7 64k 8k", pool.show("a").uri or "")
    pool.snapshot("a", "a@2")
    assert pool.diff("a@1", "a@2") == [Extent(64 * KiB, 8 * KiB, True)]
    with pytest.raises(Invalid, match="take a snapshot of it first"):
        pool.diff("a@1", "a")
    with pytest.raises(NotFound):
        pool.diff("a@1", "no")


def test_the_tree_is_the_lineage(pool: nbdthin.Client) -> None:
    pool.create("base", 512)
    pool.snapshot("base", "base@1")
    pool.clone("base@1", "web")
    pool.snapshot("web", "web@1")
    pool.create("alone", 512)
    assert [(node.depth, node.export.name) for node in pool.tree()] == [
        (0, "alone"),
        (0, "base@1"),
        (1, "base"),
        (1, "web@1"),
        (2, "web"),
    ]


def test_info_tells_of_the_pool_the_process_and_the_disk(daemon: Daemon, pool: nbdthin.Client) -> None:
    pool.create("a", "200 GiB")
    pool.snapshot("a", "a@1")
    info = pool.info()
    assert (info.pool.path, info.pool.volumes, info.pool.snapshots) == (daemon.pool, 1, 1)
    assert info.pool.oversubscription == 200 * GiB / info.pool.data_total
    assert info.listen == (f"unix:{daemon.socket}", f"tcp:127.0.0.1:{daemon.port}")
    assert info.process.pid == daemon.pid and info.process.memory > 0 < info.process.files
    assert 0 <= info.loop.lag_p99 <= info.loop.lag_max
    assert info.disk.mount is not None and daemon.pool.is_relative_to(info.disk.mount)
    assert info.disk.total >= info.disk.available > 0


def test_what_is_refused_raises_its_own_class_and_the_connection_lives(pool: nbdthin.Client) -> None:
    pool.create("a", 512)
    with pytest.raises(Exists):
        pool.create("a", 512)
    with pytest.raises(NotFound):
        pool.show("b")
    with pytest.raises(Invalid):
        pool.create("b", 513)
    with pytest.raises(Invalid):
        pool.create("b", "many")
    with pytest.raises(Invalid):
        pool.create("no spaces", 512)
    with pytest.raises(Invalid):
        pool.create("b\udcff", 512)
    with pytest.raises(Invalid):
        pool.rollback("a", "a")
    assert [row.name for row in pool.list()] == ["a"]


def test_a_batch_is_one_commit(pool: nbdthin.Client) -> None:
    pool.create("base", "1 GiB")
    pool.snapshot("base", "base@1")
    before = pool.info().pool.sequence
    with pool.batch():
        for number in range(1000):
            pool.clone("base@1", f"clone/{number:04}")
    assert pool.info().pool.sequence == before + 1
    assert len(pool.list()) == 1002
    assert pool.info().pool.data_used == 0


def test_a_batch_is_all_or_nothing(pool: nbdthin.Client) -> None:
    with pytest.raises(Exists), pool.batch():
        pool.create("a", 512)
        pool.rename("a", "b")
        pool.create("b", 512)
    assert pool.list() == []


def test_a_batch_that_raises_sends_nothing(pool: nbdthin.Client) -> None:
    with pytest.raises(ZeroDivisionError), pool.batch():
        pool.create("a", 512)
        _ = 1 / 0
    pool.create("b", 512)
    assert [row.name for row in pool.list()] == ["b"]


def test_force_is_no_part_of_a_batch(pool: nbdthin.Client) -> None:
    pool.create("a", 512)
    with pytest.raises(Invalid, match="cannot be undone"), pool.batch():
        pool.remove("a", force=True)
    assert [row.name for row in pool.list()] == ["a"]


@pytest.mark.parametrize("verb", ["remove", "rename", "rollback", "resize"])
def test_what_is_in_use_is_refused_with_who_uses_it(daemon: Daemon, pool: nbdthin.Client, verb: str) -> None:
    pool.create("a", "1 MiB")
    pool.snapshot("a", "a@1")
    with using(daemon, "a"):
        with pytest.raises(InUse, match=f"'a' is in use.*unix:pid {os.getpid()}") as caught:
            {
                "remove": lambda: pool.remove("a@1", "a"),
                "rename": lambda: pool.rename("a", "b"),
                "rollback": lambda: pool.rollback("a", "a@1"),
                "resize": lambda: pool.resize("a", "512 KiB"),
            }[verb]()
        assert len(caught.value.holders) == 1 and caught.value.holders == pool.show("a").connections
        pool.snapshot("a", "a@2")
        assert [row.name for row in pool.list()] == ["a", "a@1", "a@2"]


def test_force_disconnects_who_holds_a_name(daemon: Daemon, pool: nbdthin.Client) -> None:
    pool.create("a", "1 MiB")
    with using(daemon, "a") as client:
        pool.remove("a", force=True)
        assert client.sock.recv(1) == b""
    assert pool.list() == []


def test_force_disconnects_nobody_when_a_name_is_wrong(daemon: Daemon, pool: nbdthin.Client) -> None:
    pool.create("a", "1 MiB")
    with using(daemon, "a"):
        with pytest.raises(NotFound):
            pool.remove("a", "b", force=True)
        assert len(pool.show("a").connections) == 1


def test_a_list_may_be_longer_than_a_frame(pool: nbdthin.Client) -> None:
    labels = {"padding": "x" * 4000}
    with pool.batch():
        for number in range(500):
            pool.create(f"{number:04}", 512, labels=labels)
    rows = pool.list()
    assert len(rows) == 500 and sum(len(row.labels["padding"]) for row in rows) > codec.PART
    with pool.batch():
        for row in rows:
            pool.remove(row.name)


def test_the_same_verbs_are_awaited_with_asyncio(daemon: Daemon, pool: nbdthin.Client) -> None:
    async def use() -> None:
        async with await nbdthin.connect_async(daemon.control) as live:
            await live.create("a", "1 MiB")
            await asyncio.gather(*(live.snapshot("a", f"a@{number}") for number in range(20)))
            async with live.batch() as batch:
                batch.remove(*(f"a@{number}" for number in range(1, 20)))
                batch.clone("a@0", "b")
                await live.label("a", {"not": "in the batch"})
            assert [row.name for row in await live.list()] == ["a", "a@0", "b"]
            assert (await live.show("a")).labels == {"not": "in the batch"}
            assert [node.depth for node in await live.tree()] == [0, 1, 1]
            assert await live.diff("a@0", "a@0") == []
            assert (await live.info()).pool.volumes == 2
            with pytest.raises(Exists):
                await live.create("a", 512)

    asyncio.run(use())


def test_a_cancelled_request_closes_its_connection(daemon: Daemon) -> None:
    async def use() -> None:
        async with await nbdthin.connect_async(daemon.control) as live:
            request = asyncio.create_task(live.list())
            await asyncio.sleep(0)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            with pytest.raises(Unreachable):
                await live.list()

    asyncio.run(use())


def test_where_no_daemon_answers_one_line_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "file", tmp_path / "directory", tmp_path / "file/below"):
        with pytest.raises(Unreachable, match=r"no daemon at .*nbdthin serve"):
            nbdthin.connect(path)
        with pytest.raises(Unreachable, match=r"no daemon at .*nbdthin serve"):
            asyncio.run(nbdthin.connect_async(path))
    with pytest.raises(Unreachable, match="cannot connect to"):
        nbdthin.connect(tmp_path / ("x" * 200))


@pytest.mark.parametrize("answer", [b"", b"\0\0", b"HTTP/1.1 400\r\n", b"\0\0\0\1\x01", b"\0\0\0\1\x80"])
def test_something_else_at_the_socket_is_no_daemon(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        other = threading.Thread(target=answer_once)
        other.start()
        with nbdthin.connect(tmp_path / "socket") as pool, pytest.raises(Unreachable):
            pool.info()
        other.join()


def test_a_daemon_that_goes_away_is_told_of(tmp_path: Path) -> None:
    with running(tmp_path) as own:
        pool = own.connect()
        assert pool.list() == []
        own.stop()
        with pool, pytest.raises(Unreachable, match="has ended"):
            pool.list()


def test_all_errors_have_one_base() -> None:
    assert all(issubclass(kind, Error) for kind in (Exists, InUse, Invalid, NotFound, Unreachable))
