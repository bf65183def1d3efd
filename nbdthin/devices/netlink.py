"""The netlink interface of the kernel's nbd driver (linux/nbd-netlink.h), by pyroute2, which has no family for it.

Each call is answered when the kernel has done it. What the driver refuses is an OSError.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from enum import IntEnum

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

FAMILY = "nbd"
VERSION = 1
GROUP = "nbd_mc_group"

_NETLINK_GENERIC, _SOL_NETLINK, _ADD_MEMBERSHIP = 16, 270, 1


class Command(IntEnum):
    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4


class Message(genlmsg):  # type: ignore[misc]  # pyroute2 has no types
    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),  # seconds
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),  # seconds
        ("NBD_ATTR_DEVICE_LIST", "hex"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]
        nla_flags = NLA_F_NESTED
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_flags = NLA_F_NESTED
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))


class Driver:
    """The driver, asked by one thread."""

    def __init__(self, channel: GenericNetlinkSocket) -> None:
        self._channel = channel

    def connect(
        self,
        sockets: Sequence[socket.socket],
        *,
        identity: str,
        size: int,
        block_size: int,
        flags: int,
        timeout: int,
        dead_timeout: int,
    ) -> int:
        """Make a free device of connections behind their handshake; its index. They are the kernel's then.

        `identity` can be read at the device, and must be said to reconfigure it. `timeout`: seconds for a request,
        which is then sent again; `dead_timeout`: seconds that requests wait while no connection is left.
        """
        answer = self._ask(
            Command.CONNECT,
            NBD_ATTR_SIZE_BYTES=size,
            NBD_ATTR_BLOCK_SIZE_BYTES=block_size,
            NBD_ATTR_TIMEOUT=timeout,
            NBD_ATTR_SERVER_FLAGS=flags,
            NBD_ATTR_DEAD_CONN_TIMEOUT=dead_timeout,
            NBD_ATTR_SOCKETS=_items(sockets),
            NBD_ATTR_BACKEND_IDENTIFIER=identity,
        )
        return next(index for index in map(_index, answer) if index is not None)

    def reconfigure(self, index: int, *, identity: str, size: int, sockets: Sequence[socket.socket] = ()) -> None:
        """Give a device its size, and connections in place of dead ones; those that it does not need are not taken."""
        more = {"NBD_ATTR_SOCKETS": _items(sockets)} if sockets else {}
        self._ask(
            Command.RECONFIGURE,
            NBD_ATTR_INDEX=index,
            NBD_ATTR_SIZE_BYTES=size,
            NBD_ATTR_BACKEND_IDENTIFIER=identity,
            **more,
        )

    def disconnect(self, index: int) -> None:
        """End its connections; the device is free when the last who has it open closes it."""
        self._ask(Command.DISCONNECT, NBD_ATTR_INDEX=index)

    def _ask(self, command: Command, **attributes: object) -> list[Message]:
        message = Message()
        message["cmd"] = command
        message["version"] = VERSION
        # In the order of their numbers: without an index, CONNECT finds a free device.
        message["attrs"] = list(attributes.items())
        try:
            return list(self._channel.nlm_request(message, self._channel.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK))
        except NetlinkError as error:
            raise OSError(error.code, str(error)) from error


def _items(sockets: Sequence[socket.socket]) -> dict[str, object]:
    return {"attrs": [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", each.fileno())]}) for each in sockets]}


def _index(message: Message) -> int | None:
    index: int | None = message.get_attr("NBD_ATTR_INDEX")
    return index


@contextlib.contextmanager
def driver() -> Iterator[Driver]:
    """Raises OSError where the kernel has none, or its network namespace is not the first one."""
    channel = GenericNetlinkSocket()
    try:
        channel.asyncore.module_err_level = "debug"
        try:
            channel.bind(FAMILY, Message)
        except NetlinkError as error:
            raise OSError(error.code, "the kernel has no nbd driver") from error
        yield Driver(channel)
    finally:
        channel.close()


class DeadLinks:
    """What the kernel says of connections that died; a file for poll(2)."""

    def __init__(self) -> None:
        with GenericNetlinkSocket() as channel:
            channel.bind(FAMILY, Message)
            self._family = channel.prid
            group = channel.mcast_groups[GROUP]
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> int | None:
        """The index of a device that has one connection less; None for what is not about that."""
        message = Message(self._socket.recv(4096))
        message.decode()
        if message["header"]["type"] != self._family or message["cmd"] != Command.LINK_DEAD:
            return None
        return _index(message)
