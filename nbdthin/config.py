"""exports.toml, read into frozen facts: which pool to serve, where to listen, by which rules.

Everything is checked here and nothing afterwards: an unknown key or a value of the wrong type is refused with the
file, the line and the nearest valid key. Relative paths become absolute, from the directory of the file. Nothing is
opened or created.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nbdthin.addresses import NBD_PORT, Address, TcpAddress, UnixAddress, parse_address
from nbdthin.errors import ConfigError, Invalid
from nbdthin.pool.policy import ERROR, QUEUE, Policy
from nbdthin.units import KiB, MiB, parse_size

MAX_DESCRIPTION = 4096  # bytes; the protocol's limit for a string

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolConfig(Policy):
    """Where the pool is, how it is made, and its policy.

    What only the creation of a pool uses is no promise about one that exists: `nbdthin info` tells what it has.
    """

    path: Path = Path("var/pool")  # beside exports.toml: that directory is then complete in itself
    size: int | None = None  # bytes. None: all of a block device, otherwise 100 GiB, sparse
    block_size: int = 64 * KiB  # bytes: validity is kept in sixteenths, 4 KiB, which is what file systems write
    data: Path | None = None  # None: a sparse file in the pool; otherwise a file or a block device


@dataclass(frozen=True, slots=True)
class ServerConfig:
    # The unix socket is the faster one, and its directory says who may connect. NBD knows neither passwords nor
    # encryption: whoever reaches a TCP port reads and writes everything, so by default only this machine does.
    listen: tuple[Address, ...] = (UnixAddress(Path("var/nbd.sock")), TcpAddress("127.0.0.1", NBD_PORT))
    # Clients that wait for each answer get a third more of them; an idle daemon sleeps all the same.
    polling: bool = True


@dataclass(frozen=True, slots=True)
class ControlConfig:
    socket: Path = Path("var/control.sock")  # where the verbs of `nbdthin` look without --socket


@dataclass(frozen=True, slots=True)
class ScrubConfig:
    rate: int = 64 * MiB  # bytes a second: a tenth of what a disk gives, or less


@dataclass(frozen=True, slots=True)
class ExportRule:
    """How volumes and snapshots are exported: the first rule that matches; read-write without one."""

    name: str  # a pattern: * and ? stand for any character, / too
    read_only: bool = False  # a volume is made to be written
    description: str = ""  # what `nbdinfo --list` shows beside the name
    no_space: str | None = None  # for writes to what matches; None: as [pool] says
    trim: bool = True  # clients may give space back


@dataclass(frozen=True, slots=True)
class Config:
    pool: PoolConfig
    server: ServerConfig
    control: ControlConfig
    scrub: ScrubConfig
    exports: tuple[ExportRule, ...]


def load(path: Path | str) -> Config:
    """Read exports.toml. Raises ConfigError, which names file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"no config at {path} (write one, or name it: --config FILE)") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    top = _Table(_Source(path, text), "", 0, values)
    base = path.absolute().parent
    config = Config(
        pool=_pool(top.table("pool"), base),
        server=(server := _server(top.table("server"), base)),
        control=_control(top.table("control"), base, server),
        scrub=_scrub(top.table("scrub")),
        exports=_exports(top.tables("export")),
    )
    top.finish()
    return config


def _pool(table: _Table, base: Path) -> PoolConfig:
    default = PoolConfig()
    result = PoolConfig(
        path=base / table.get("path", default.path, _path),
        size=table.get("size", default.size, _size),
        block_size=table.get("block_size", default.block_size, _size),
        data=table.get("data", default.data, lambda value: base / _path(value)),
        no_space=table.get("no_space", default.no_space, _no_space),
        no_space_timeout=table.get("no_space_timeout", default.no_space_timeout, _seconds),
        min_free=table.get("min_free", default.min_free, _fraction),
        auto_extend=table.get("auto_extend", default.auto_extend, _flag),
        auto_extend_threshold=table.get("auto_extend_threshold", default.auto_extend_threshold, _fraction),
        auto_extend_step=table.get("auto_extend_step", default.auto_extend_step, _step),
        max_size=table.get("max_size", default.max_size, _max_size),
        low_water=table.get("low_water", default.low_water, _levels),
        verify=table.get("verify", default.verify, _flag),
        punch=table.get("punch", default.punch, _flag),
        hook=table.get("hook", default.hook, _command),
    )
    table.finish()
    return result


def _server(table: _Table, base: Path) -> ServerConfig:
    default = tuple(parse_address(str(address), base) for address in ServerConfig().listen)
    result = ServerConfig(
        listen=table.get("listen", default, lambda value: _addresses(value, base)),
        polling=table.get("polling", ServerConfig().polling, _flag),
    )
    table.finish()
    return result


def _control(table: _Table, base: Path, server: ServerConfig) -> ControlConfig:
    def own(value: object) -> Path:
        path = _path(value)
        if UnixAddress(base / path) in server.listen:
            raise Invalid(f"NBD clients are served at {path} already ([server] listen)")
        return path

    result = ControlConfig(socket=base / table.get("socket", ControlConfig().socket, own))
    table.finish()
    return result


def _scrub(table: _Table) -> ScrubConfig:
    result = ScrubConfig(rate=table.get("rate", ScrubConfig().rate, _rate))
    table.finish()
    return result


def _exports(tables: Iterable[_Table]) -> tuple[ExportRule, ...]:
    rules: dict[str, ExportRule] = {}
    for table in tables:
        rule = _export(table, rules)
        rules[rule.name] = rule
    return tuple(rules.values())


def _export(table: _Table, before: Container[str]) -> ExportRule:
    def new(value: object) -> str:
        name = _text(value)
        if name in before:
            raise Invalid(f"{name!r} is there twice, and only the first would count")
        return name

    rule = ExportRule(
        name=table.require("name", new),
        read_only=table.get("read_only", False, _flag),
        description=table.get("description", "", _description),
        no_space=table.get("no_space", None, _no_space),
        trim=table.get("trim", True, _flag),
    )
    table.finish()
    return rule


# -- values: each says what is wanted


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Invalid(f"text is wanted, not {value!r}")
    return value


def _path(value: object) -> Path:
    return Path(_text(value))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise Invalid(f"true or false is wanted, not {value!r}")
    return value


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Invalid(f'a size is wanted, as in "100 GiB", not {value!r}')
    return parse_size(value)


def _max_size(value: object) -> int:
    size = _size(value)
    if not size:
        raise Invalid("more than 0 bytes are wanted (leave it out for no limit; auto_extend = false for no growth)")
    return size


def _rate(value: object) -> int:
    rate = _size(value)
    if not rate:
        raise Invalid("a rate is more than 0 bytes a second")
    return rate


def _no_space(value: object) -> str:
    if value not in (QUEUE, ERROR):
        raise Invalid(f'"{QUEUE}" or "{ERROR}" is wanted, not {value!r}')
    return str(value)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise Invalid(f"seconds are wanted, as in 60, not {value!r}")
    return float(value)


def _percent(value: object) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?%", value, re.ASCII) if isinstance(value, str) else None
    if match is None:
        raise Invalid(f'a percentage is wanted, as in "10%", not {value!r}')
    return float(match[1]) / 100


def _fraction(value: object) -> float:
    fraction = _percent(value)
    if fraction >= 1:
        raise Invalid(f"less than 100% is wanted, not {value!r}")
    return fraction


def _step(value: object) -> float:
    step = _percent(value)
    if not 0 < step <= 10:
        raise Invalid(f"more than 0% and up to 1000% is wanted, not {value!r}")
    return step


def _levels(value: object) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise Invalid(f'a list of percentages is wanted, as in ["80%", "95%"], not {value!r}')
    levels = tuple(_fraction(item) for item in value)
    if any(after <= before for before, after in zip((0.0, *levels), levels, strict=False)):
        raise Invalid(f"ascending percentages above 0% are wanted, not {value!r}")
    return levels


def _command(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Invalid(f'a command and its arguments are wanted, as in ["/usr/bin/logger", "-t"], not {value!r}')
    return tuple(_text(item) for item in value)


def _description(value: object) -> str:
    if not isinstance(value, str) or "\0" in value or len(value.encode()) > MAX_DESCRIPTION:
        raise Invalid(f"text of up to {MAX_DESCRIPTION} bytes is wanted")
    return value


def _addresses(value: object, base: Path) -> tuple[Address, ...]:
    if not isinstance(value, list):
        raise Invalid(f'a list of addresses is wanted, as in ["unix:var/nbd.sock"], not {value!r}')
    addresses = tuple(parse_address(_text(item), base) for item in value)
    for index, address in enumerate(addresses):
        any_port = isinstance(address, TcpAddress) and not address.port
        if address in addresses[:index] and not any_port:
            raise Invalid(f"{address} is there twice")
    return addresses


# -- tables, and where they stand


class _Table:
    """One table of the file. The keys that were asked for are the valid ones: `finish` refuses all others."""

    def __init__(self, source: _Source, name: str, index: int, values: Mapping[str, object]) -> None:
        self._source = source
        self._name = name
        self._index = index  # which of the tables of this name
        self._values = values
        self._asked: list[str] = []

    def get(self, key: str, default: T, convert: Callable[[object], T]) -> T:
        self._asked.append(key)
        return self._convert(key, convert) if key in self._values else default

    def require(self, key: str, convert: Callable[[object], T]) -> T:
        self._asked.append(key)
        if key not in self._values:
            raise self._error(key, f"[[{self._name}]] has no {key!r}")
        return self._convert(key, convert)

    def table(self, key: str) -> _Table:
        self._asked.append(key)
        return self._inner(key, 0, self._values.get(key, {}), f"[{key}]")

    def tables(self, key: str) -> list[_Table]:
        self._asked.append(key)
        values = self._values.get(key, [])
        if not isinstance(values, list):
            raise self._error(key, f"{key!r} is a list of tables: write [[{key}]]")
        return [self._inner(key, index, value, f"[[{key}]]") for index, value in enumerate(values)]

    def finish(self) -> None:
        for key in self._values:
            if key not in self._asked:
                near = difflib.get_close_matches(key, self._asked, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(self._asked)}"
                where = f" in [{self._name}]" if self._name else ""
                raise self._error(key, f"unknown key {key!r}{where} ({hint})")

    def _convert(self, key: str, convert: Callable[[object], T]) -> T:
        try:
            return convert(self._values[key])
        except Invalid as error:
            raise self._error(key, f"{key}: {error}") from error

    def _inner(self, key: str, index: int, value: object, header: str) -> _Table:
        if not isinstance(value, dict):
            raise self._error(key, f"{key!r} is a table: write {header}")
        return _Table(self._source, key, index, value)

    def _error(self, key: str, what: str) -> ConfigError:
        line = self._source.find(self._name, self._index, key)
        return ConfigError(f"{self._source.path}{'' if line is None else f':{line}'}: {what}")


class _Source:
    """The text that the values came from, to say where they stand: tomllib does not tell."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._lines = text.splitlines()

    def find(self, table: str, index: int, key: str) -> int | None:
        """The line of `key` in the `index`th table of that name, else of the table, in whatever way it is written."""
        lines = list(self._places())
        for number, place, name in lines:
            if place == (table, index) and (name == key or name.startswith(f"{key}.")):
                return number
        if not table:  # the key is a table's header
            return next((number for number, place, _ in lines if place[0] == key), None)
        dotted = (number for number, place, name in lines if place == ("", 0) and name in (table, f"{table}.{key}"))
        return next((number for number, place, _ in lines if place == (table, index)), next(dotted, None))

    def _places(self) -> Iterator[tuple[int, tuple[str, int], str]]:
        """Each line that is a header or an assignment: its number, the table it stands in, the key it sets."""
        seen: dict[str, int] = {}
        place = ("", 0)
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
                name = _bare(header[1])
                place = (name, seen.get(name, 0))
                seen[name] = place[1] + 1
                yield number, place, ""
            elif key := re.match(r"""\s*([\w."' -]+?)\s*=""", line):
                yield number, place, _bare(key[1])


def _bare(key: str) -> str:
    return re.sub(r"""["'\s]""", "", key)
