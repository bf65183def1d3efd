"""exports.toml: what it means, and how what is wrong with it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdthin import config
from nbdthin.addresses import TcpAddress, UnixAddress
from nbdthin.config import ExportRule
from nbdthin.errors import ConfigError
from nbdthin.units import GiB, KiB

EXAMPLE = Path(__file__).parent.parent / "exports.toml"


def refusal(directory: Path, text: str) -> str:
    """What is said of `text`, behind the file's name."""
    path = directory / "exports.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def test_the_example_shows_the_defaults() -> None:
    example = config.load(EXAMPLE)
    base = EXAMPLE.parent
    assert example.pool.path == base / "var/pool"
    assert (example.pool.size, example.pool.block_size, example.pool.data) == (100 * GiB, 64 * KiB, None)
    assert example.server.listen == (UnixAddress(base / "var/nbd.sock"), TcpAddress("127.0.0.1", 10809))
    assert example.control.socket == base / "var/control.sock"
    assert [(rule.name, rule.read_only) for rule in example.exports] == [("golden/*", True)]


def test_an_empty_file_means_the_defaults_beside_it(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text("")
    empty = config.load(tmp_path / "exports.toml")
    assert empty.pool.path == tmp_path / "var/pool"
    assert empty.server.listen == (UnixAddress(tmp_path / "var/nbd.sock"), TcpAddress("127.0.0.1", 10809))
    assert empty.control.socket == tmp_path / "var/control.sock"
    assert empty.exports == ()


def test_relative_paths_are_relative_to_the_file_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/exports.toml").write_text(
        '[pool]\npath = "../pool"\ndata = "disk"\n[server]\nlisten = ["unix:/run/nbd.sock"]\n'
    )
    monkeypatch.chdir(tmp_path)
    found = config.load("etc/exports.toml")
    assert found.pool.path == tmp_path / "etc/../pool"
    assert found.pool.data == tmp_path / "etc/disk"
    assert found.server.listen == (UnixAddress(Path("/run/nbd.sock")),)


def test_rules_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text('[[export]]\nname = "b"\n[[export]]\nname = "a*"\nread_only = true\n')
    assert config.load(tmp_path / "exports.toml").exports == (ExportRule("b"), ExportRule("a*", read_only=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[pool]\n\npth = "x"', ":3: unknown key 'pth' in [pool] (did you mean 'path'?)"),
        ("[pool]\nzzz = 1", ":2: unknown key 'zzz' in [pool] (valid are path, size, block_size, data, no_space,"),
        ("[sever]\n", ":1: unknown key 'sever' (did you mean 'server'?)"),
        ('export.name = "x"', ":1: 'export' is a list of tables: write [[export]]"),
        ('[[export]]\nname = "a"\n[[export]]\nname = "b"\nreadonly = true', ":5: unknown key 'readonly' in [export]"),
        ("[[export]]\nread_only = true", ":1: [[export]] has no 'name'"),
        ('[[export]]\nname = "a"\n\n[[export]]', ":4: [[export]] has no 'name'"),
        ("pool = 3", ":1: 'pool' is a table: write [pool]"),
        ("pool.path = 3", ":1: path: text is wanted, not 3"),
        ('[pool]\npath = ""', ":2: path: text is wanted, not ''"),
        ('[server]\n\n[pool]\n"size" = true', ":4: size: a size is wanted"),
        ('[pool]\nsize = "10 apples"', ":2: size: not a size: '10 apples'"),
        ("[pool]\nsize = -1", ":2: size: a size cannot be negative"),
        ('[server]\nlisten = "unix:x"', ":2: listen: a list of addresses is wanted"),
        ('# listen\n[server]\nlisten = ["tcp:::1:10809"]', ":3: listen: not an address: 'tcp:::1:10809'"),
        ('[server]\nlisten = ["tcp:localhost:65536"]', ":2: listen: not an address"),
        ('[server]\nlisten = ["unix:"]', ":2: listen: not an address"),
        ('[[export]]\nname = "a"\nread_only = "yes"', ":3: read_only: true or false is wanted, not 'yes'"),
        (f'[[export]]\nname = "a"\ndescription = "{"x" * 4097}"', ":3: description: text of up to 4096 bytes"),
        (
            '[[export]]\nname = "a"\n[[export]]\nname = "a"',
            ":4: name: 'a' is there twice, and only the first would count",
        ),
        ("[pool]\nmax_size = 0", ":2: max_size: more than 0 bytes are wanted"),
        ('[server]\nlisten = ["unix:/x", "unix:/x"]', ":2: listen: unix:/x is there twice"),
        (
            '[server]\nlisten = ["unix:/x"]\n[control]\nsocket = "/x"',
            ":4: socket: NBD clients are served at /x already",
        ),
        ("[pool\n", ": not TOML: Expected ']' at the end of a table declaration (at line 1"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


def test_any_free_port_may_be_wanted_twice(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text('[server]\nlisten = ["tcp:127.0.0.1:0", "tcp:127.0.0.1:0"]')
    assert len(config.load(tmp_path / "exports.toml").server.listen) == 2


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="not UTF-8 text at byte 2"):
        config.load(tmp_path / "exports.toml")


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config FILE"):
        config.load(tmp_path / "exports.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)
