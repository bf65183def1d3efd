"""The control socket against those who do not speak its protocol, or only nearly."""

from __future__ import annotations

import os
import socket
import stat
import threading

import msgpack
import pytest

import nbdthin
from nbdthin.control import codec
from nbdthin.control.commands import COMMANDS
from tests.clients.daemon import Daemon


def connected(daemon: Daemon) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(daemon.control))
    return client


def exchange(client: socket.socket, message: object) -> dict[str, object]:
    """Send any msgpack as one frame; the reply's only frame."""
    payload = msgpack.packb(message)
    client.sendall(codec.LENGTH.pack(len(payload)) + payload)
    return receive(client)


def receive(client: socket.socket) -> dict[str, object]:
    with client.makefile("rb") as stream:
        return codec.unpack(stream.read(codec.frame_length(stream.read(4))))


def request(command: str, **arguments: object) -> dict[str, object]:
    return {"version": codec.VERSION, "command": command, "arguments": arguments}


def refusal(client: socket.socket, message: object) -> str:
    error = exchange(client, message)["error"]
    assert isinstance(error, dict) and error["code"] == "invalid", error
    return str(error["message"])


def test_only_its_owner_may_use_the_socket(daemon: Daemon) -> None:
    mode = daemon.control.stat()
    assert (stat.S_IMODE(mode.st_mode), mode.st_uid) == (0o600, os.geteuid())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        bytes(4),
        b"\0\0\0\1\xc1",
        b"\0\0\0\3\x93\1\2",
        codec.LENGTH.pack(5000) + b"\x91" * 5000,
        b"\0\0\0\4\xdd\xff\xff\xff",
    ],
)
def test_garbage_closes_that_connection_only(daemon: Daemon, pool: nbdthin.Client, garbage: bytes) -> None:
    with connected(daemon) as client:
        client.sendall(garbage)
        assert client.recv(1) == b""
    assert pool.list() == []


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\0\0\7", b"\0\0\0\7abc"])
def test_a_client_that_leaves_in_the_middle_of_a_frame_leaves_nothing_behind(
    daemon: Daemon, pool: nbdthin.Client, sent: bytes
) -> None:
    before = pool.info().process.files
    with connected(daemon) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert pool.info().process.files <= before


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (request("creat"), "unknown command 'creat' (did you mean 'create'?)"),
        (request("create", name="a"), "create: argument 'size' is missing"),
        (request("create", name="a", size="1G"), "create: size: an integer is wanted, not '1G'"),
        (request("create", name="a", size=512, labels={"a": None}), "create: labels: text is wanted, not None"),
        (request("create", name="a", size=-512), "not a volume's size: -512 bytes"),
        (request("create", name="a", size=1 << 63), "not a volume's size"),
        (request("create", name="", size=512), "not a name: ''"),
        (request("create", name="x" * 256, size=512), "not a name"),
        (request("show", name="a", nme=1), "show: unknown argument 'nme' (did you mean 'name'?)"),
        (request("info", verbose=True), "info: unknown argument 'verbose'"),
        (request("remove", names="a"), "remove: names: a list is wanted, not 'a'"),
        (request("batch", commands=[{"command": "create"}]), "batch: commands: argument 'arguments' is missing"),
        (
            request("batch", commands=[{"command": "list", "arguments": {}}]),
            "command 1 of the batch: list cannot be part of one",
        ),
        (
            request("batch", commands=[{"command": "batch", "arguments": {"commands": []}}]),
            "command 1 of the batch: batch cannot be part of one",
        ),
        ({"command": "list", "arguments": {}}, "argument 'version' is missing"),
        (request("list") | {"version": 2}, "the daemon speaks version 1 of the control protocol, not 2"),
        (request("list") | {"more": 1}, "unknown argument 'more'"),
        (request("list") | {"arguments": []}, "arguments: a map is wanted, not []"),
    ],
)
def test_a_wrong_request_is_answered_and_changes_nothing(
    daemon: Daemon, pool: nbdthin.Client, message: object, said: str
) -> None:
    with connected(daemon) as client:
        assert refusal(client, message).startswith(said)
        assert exchange(client, request("list")) == {"part": []}
    assert pool.list() == []


def test_what_a_client_sent_is_not_echoed_at_length(daemon: Daemon) -> None:
    with connected(daemon) as client:
        assert len(refusal(client, request("create", name="x" * 1_000_000, size=512))) <= codec.MAX_MESSAGE


def test_requests_that_come_in_pieces_and_all_at_once_are_answered_in_order(
    daemon: Daemon, pool: nbdthin.Client
) -> None:
    frames = b"".join(codec.pack(request("create", name=f"v{n}", size=512)) for n in range(50))
    with connected(daemon) as client:
        for start in range(0, len(frames), 7):
            client.sendall(frames[start : start + 7])
        with client.makefile("rb") as stream:
            for _ in range(50):
                assert codec.unpack(stream.read(codec.frame_length(stream.read(4)))) == {"result": None}
    assert len(pool.list()) == 50


def test_requests_that_come_before_a_stream_has_ended_are_answered_behind_it(pool: nbdthin.Client) -> None:
    """Whoever has seen the end of a stream may ask on before the daemon has seen it."""
    for _ in range(200):
        assert list(pool.scrub())


def test_many_clients_at_once_are_served(daemon: Daemon, pool: nbdthin.Client) -> None:
    def work(number: int) -> None:
        with daemon.connect() as own:
            for step in range(10):
                own.create(f"{number}/{step}", 512)
            own.remove(*(f"{number}/{step}" for step in range(5)))

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pool.list()) == 40


def test_every_command_has_a_line_that_says_what_it_does() -> None:
    assert all(row.doc and "\n" not in row.doc for row in COMMANDS.values())
