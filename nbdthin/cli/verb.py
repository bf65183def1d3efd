"""What a verb of the command is, and what verbs share."""

from __future__ import annotations

import argparse
import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from nbdthin.control import client
from nbdthin.control.client import Client
from nbdthin.control.codec import plain
from nbdthin.errors import Invalid

DEFAULT_SOCKET = "var/control.sock"
PATHS = {"POOL", "FILE", "NAME_OR_PATH", "DIR_OR_NAME"}  # arguments that are, or may be, a place


@dataclass(frozen=True, slots=True)
class Verb:
    doc: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], object]
    show: Callable[..., None] = lambda _: None  # success is quiet
    failed: Callable[..., str] = lambda _: ""  # what is wrong although the verb itself went well
    offline: bool = False  # asks no daemon
    prints_itself: bool = False  # line by line, also as JSON


def no_arguments(_: ArgumentParser) -> None:
    pass


def path_argument(text: str) -> str:
    """Where something is. What a script's unset variable leaves is no place, and not the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def names(*names: str) -> Callable[[ArgumentParser], None]:
    """Positional arguments, in this order."""

    def add(parser: ArgumentParser) -> None:
        for name in names:
            parser.add_argument(name.lower(), metavar=name, type=path_argument if name in PATHS else str)

    return add


def default_socket() -> str:
    """Of the daemon that is asked where no --socket says which."""
    return os.environ.get("NBDTHIN_SOCKET", "") or DEFAULT_SOCKET


def connect(arguments: Namespace) -> Client:
    """The daemon that is asked."""
    path: str = getattr(arguments, "socket", "") or default_socket()
    return client.connect(path)


def wants_json(arguments: Namespace) -> bool:
    return getattr(arguments, "json", False)


def print_json(value: object) -> None:
    print(json.dumps(value, default=plain, indent=2))


def mount_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS", help="for the mount, with commas"
    )


def offset(text: str) -> int | str:
    """What somebody wrote for a place, for who takes sizes. Raises Invalid."""
    if not text.lower().startswith("0x"):
        return text
    try:
        return int(text, 16)
    except ValueError as error:
        raise Invalid(f"not an offset: {text!r} (write 0x1f0000, 2M or bytes)") from error
