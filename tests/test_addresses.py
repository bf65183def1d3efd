"""Addresses as they are written, the sockets that are bound to them, and the URIs that real clients take."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdthin import addresses
from nbdthin.addresses import TcpAddress, UnixAddress, parse_address
from nbdthin.errors import Error, Invalid


def test_addresses_are_read_as_they_are_shown() -> None:
    base = Path("/base")
    for text in ("unix:/run/nbd.sock", "tcp:127.0.0.1:10809", "tcp:[::1]:0", "tcp:localhost:1"):
        assert str(parse_address(text, base)) == text
    assert parse_address("unix:var/x", base) == UnixAddress(Path("/base/var/x"))
    assert parse_address("tcp:[::1]:10809", base) == TcpAddress("::1", 10809)


@pytest.mark.parametrize("text", ["", "unix", "unix:", "udp:x:1", "tcp:1", "tcp:::1:2", "tcp:[]:1", "tcp:a:b", "/x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="not an address"):
        parse_address(text, Path("/"))


def test_uris_are_those_of_the_nbd_project() -> None:
    unix = UnixAddress(Path("/run/my nbd.sock"))
    assert unix.uri("debian:12/web@1") == "nbd+unix:///debian:12/web@1?socket=/run/my%20nbd.sock"
    assert TcpAddress("127.0.0.1", 10809).uri("a") == "nbd://127.0.0.1/a"
    assert TcpAddress("::1", 4711).uri("a") == "nbd://[::1]:4711/a"
    assert TcpAddress("0.0.0.0", 4711).uri("a") == "nbd://localhost:4711/a"


def test_only_addresses_of_this_machine_count_as_its_own() -> None:
    assert all(TcpAddress(host, 1).loopback for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(TcpAddress(host, 1).loopback for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))


def test_port_0_becomes_the_port_that_was_given() -> None:
    (listening,) = addresses.bind(TcpAddress("127.0.0.1", 0))
    with listening:
        found = addresses.address_of(listening)
        assert isinstance(found, TcpAddress) and found.port > 0
        with socket.create_connection((found.host, found.port)):
            pass


def test_a_busy_tcp_address_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = TcpAddress("127.0.0.1", other.getsockname()[1])
        with pytest.raises(Error, match=f"{address} is in use"):
            addresses.bind(address)


def test_a_private_socket_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        (listening,) = addresses.bind(UnixAddress(tmp_path / "private"), private=True)
        listening.close()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_the_socket_of_a_dead_process_is_replaced_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "socket")
    (first,) = addresses.bind(address)
    with pytest.raises(Error, match="is in use"):
        addresses.bind(address)
    first.close()
    (second,) = addresses.bind(address)
    second.close()
    addresses.unlink(address)
    assert not address.path.exists()


def test_a_living_socket_whose_queue_is_full_is_not_replaced(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(str(address.path))
        other.listen(0)
        waiting.connect(str(address.path))
        with pytest.raises(Error, match="is in use"):
            addresses.bind(address)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_socket_is_not_touched(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "socket"
    make(path)
    with pytest.raises(Error, match="something that is no socket is there"):
        addresses.bind(UnixAddress(path))
    assert os.path.lexists(path)


def test_a_path_that_is_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="too long for a socket"):
        addresses.bind(UnixAddress(tmp_path / ("x" * 108)))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(Error, match=f"there is no directory {tmp_path / 'no'}"):
        addresses.bind(UnixAddress(tmp_path / "no/socket"))
