"""The command `nbdthin`, run as users and scripts run it."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdthin.cli import GROUPS, VERBS, devices, images, main
from nbdthin.control.codec import MAX_MESSAGE
from nbdthin.pool.pool import Pool
from nbdthin.units import GiB, KiB
from tests import rawclient
from tests.clients.daemon import Daemon, nbdthin_command, run
from tests.conftest import need


@pytest.fixture
def daemon(served: Daemon) -> Daemon:
    """One whose pool is empty."""
    with served.connect() as pool:
        pool.remove(*(row.name for row in pool.list()))
    return served


class Done(NamedTuple):
    status: int
    output: str
    errors: str


def start(daemon: Daemon | None, *arguments: str | Path) -> Done:
    """Run a verb, in this process: hundreds of interpreters would take minutes."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        if daemon is not None:
            patch.setenv("NBDTHIN_SOCKET", str(daemon.control))
        try:
            status = main([str(each) for each in arguments])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
    return Done(status, output.getvalue(), errors.getvalue())


def said(daemon: Daemon | None, *arguments: str | Path) -> str:
    """What a verb prints that goes well."""
    done = start(daemon, *arguments)
    assert (done.status, done.errors) == (0, ""), done
    return done.output


def as_json(daemon: Daemon | None, *arguments: str | Path) -> object:
    return json.loads(said(daemon, *arguments, "--json"))


def refused(daemon: Daemon | None, *arguments: str | Path, status: int = 1) -> str:
    """The one line that a verb says which does not."""
    done = start(daemon, *arguments)
    assert (done.status, done.output) == (status, ""), done
    *usage, last = done.errors.splitlines()
    assert status == 2 or (not usage and last.startswith("nbdthin: ")), done.errors
    return last.removeprefix("nbdthin: ")


# -- verbs


def test_a_session(daemon: Daemon) -> None:
    assert said(daemon, "create", "base", "10G") == f"nbd+unix:///base?socket={daemon.socket}\n"
    assert said(daemon, "snapshot", "base", "base@1") == f"nbd+unix:///base@1?socket={daemon.socket}\n"
    assert run(need("nbdinfo"), "--size", said(daemon, "clone", "base@1", "web").strip()) == f"{10 * GiB}\n"
    assert said(daemon, "label", "web", "role=front", "os=debian") == ""
    assert said(daemon, "label", "web", "os=") == ""
    assert said(daemon, "rename", "web", "www") == ""
    assert said(daemon, "resize", "www", "20GiB") == ""
    lines = said(daemon, "ls").splitlines()
    assert lines[0].split()[:6] == ["NAME", "KIND", "SIZE", "REFERENCED", "EXCLUSIVE", "SHARED"]
    assert [line.split()[0] for line in lines[1:]] == ["base", "base@1", "www"]
    assert lines[3].split()[1:7] == ["volume", "20", "GiB", "0", "B", "0"] and lines[3].endswith("role=front")
    assert said(daemon, "rollback", "www", "base@1") == ""
    assert "Size: 10 GiB (10737418240 bytes)\n" in said(daemon, "show", "www")
    assert said(daemon, "rm", "www", "base", "base@1") == ""
    assert said(daemon, "ls").splitlines() == [
        "NAME  KIND  SIZE  REFERENCED  EXCLUSIVE  SHARED  PARENT  CREATED  USED BY  LABELS"
    ]


def test_ls_finds_by_label(daemon: Daemon) -> None:
    for name, label in (("a", "os=debian"), ("b", "os=arch")):
        said(daemon, "create", name, "1M")
        said(daemon, "label", name, label, "x=y")
    assert [line.split()[0] for line in said(daemon, "ls", "--label", "os=debian").splitlines()] == ["NAME", "a"]
    rows = as_json(daemon, "ls", "--label", "x=y", "--label", "os=arch")
    assert isinstance(rows, list) and [row["name"] for row in rows] == ["b"]


def test_the_tree_shows_what_stands_on_what(daemon: Daemon) -> None:
    for command in ("create base 1M", "snapshot base base@1", "clone base@1 web", "snapshot web web@1", "create z 1M"):
        said(daemon, *command.split())
    assert said(daemon, "tree") == (
        "NAME         KIND       SIZE  REFERENCED  EXCLUSIVE  SHARED\n"
        "base@1       snapshot  1 MiB         0 B        0 B     0 B\n"
        "├── base     volume    1 MiB         0 B        0 B     0 B\n"
        "└── web@1    snapshot  1 MiB         0 B        0 B     0 B\n"
        "    └── web  volume    1 MiB         0 B        0 B     0 B\n"
        "z            volume    1 MiB         0 B        0 B     0 B\n"
    )


def test_a_diff_is_ranges_in_bytes(daemon: Daemon) -> None:
    said(daemon, "create", "a", "1M")
    said(daemon, "snapshot", "a", "a@1")
    run(need("qemu-io"), "-f", "raw", "-c", "write 64k 8k", daemon.uri("a"))
    said(daemon, "snapshot", "a", "a@2")
    assert said(daemon, "diff", "a@1", "a@2") == "65536 8192 data\n"
    assert as_json(daemon, "diff", "a@2", "a@1") == [{"offset": 65536, "length": 8192, "data": False}]


def test_info_says_what_docker_info_said_and_more(daemon: Daemon) -> None:
    said(daemon, "create", "a", "200G")
    facts = dict(line.strip().split(": ", 1) for line in said(daemon, "info").splitlines())
    assert facts["Pool"] == str(daemon.pool)
    assert facts["Block size"] == "64 KiB"
    assert facts["Volumes"] == "1" and facts["Snapshots"] == "0" and facts["Oversubscription"] == "2.00"
    assert {"Data used", "Data total", "Data available", "Metadata used", "Journal", "Memory", "CPU"} <= facts.keys()
    assert facts["Loop lag"].endswith("samples in the last minute")
    assert facts["Process"] == str(daemon.pid)
    assert {"Disk", "Mounted at", "Available"} <= facts.keys()


def test_who_uses_a_volume_is_shown_and_kept_unless_forced(daemon: Daemon) -> None:
    said(daemon, "create", "a", "1M")
    client = rawclient.Client(daemon.socket, "a")
    holder = f"unix:pid {os.getpid()}"
    assert holder in said(daemon, "ls") and f"Used by: {holder}" in said(daemon, "show", "a")
    assert holder in refused(daemon, "rm", "a")
    assert said(daemon, "rm", "--force", "a") == ""
    assert client.closed()
    client.close()


def test_init_and_check_need_no_daemon(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert said(None, "init", pool, "--size", "1G", "--block-size", "128K") == f"{pool}: 1 GiB in blocks of 128 KiB\n"
    assert said(None, "check", pool) == f"{pool} is sound: 0 names, 0 layers, 0 blocks in use\n"
    assert as_json(None, "check", pool) == {
        "path": str(pool),
        "names": 0,
        "layers": 0,
        "blocks": 0,
        "frames": 0,
        "problems": [],
        "notes": [],
    }


def test_check_finds_damage_and_says_so_with_its_exit_status(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    said(None, "init", pool, "--size", "1G")
    with (pool / "superblock").open("r+b") as file:
        file.seek(12)
        file.write(b"\xff")
    assert start(None, "check", pool) == (
        1,
        f"{pool}/superblock at byte 8: the superblock is damaged: its checksum does not match\n",
        f"nbdthin: {pool} does not add up (problems: 1)\n",
    )


def with_names(path: Path) -> None:
    """A pool with volume a, its snapshot a@1, and more in a."""
    Pool.init(path, size="16M")
    with Pool.open(path) as pool:
        pool.create("a", "1M")
        pool.snapshot("a", "a@1")
        pool.volume("a").write(8192, bytes([1]) * 4096)


def test_repair_says_what_was_damaged_what_is_lost_and_what_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with_names(path)
    assert said(None, "repair", path) == f"{path} is not damaged: nothing was changed\n"
    with (path / "superblock").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    damage = f"damaged: {path}/superblock at byte 8: the superblock is damaged: its checksum does not match\n"
    assert said(None, "repair", "--dry-run", path) == f"{damage}lost: nothing\n"
    assert said(None, "repair", path) == f"{damage}lost: nothing\nkept: {path}/superblock.damaged-1\n"
    assert said(None, "check", path) == f"{path} is sound: 2 names, 2 layers, 1 blocks in use\n"


def test_repair_with_loss_tells_of_dumps_and_is_asked_to_let_go(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with_names(path)
    assert "nothing to let go of" in refused(None, "repair", path, "--release")
    (log,) = (path / "journal").glob("*.log")
    with log.open("r+b") as file:
        file.seek(60)
        file.write(bytes(40))
    shown = said(None, "repair", path)
    assert "lost: commit" in shown and "if there is a\nnote: dump, restore it before serving the pool;" in shown
    assert f"note: {path}/repaired: what a repair has lost;" in said(None, "check", path)
    assert said(None, "repair", path, "--release") == ""
    assert "repaired" not in said(None, "check", path)


def test_what_is_dumped_can_be_restored(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with_names(path)
    text = said(None, "dump", path)
    assert [json.loads(line)["type"] for line in text.splitlines()][::6] == ["pool", "range"]
    assert said(None, "dump", path, "--output", tmp_path / "dump") == ""
    assert (tmp_path / "dump").read_text() == text
    assert "is sound" in refused(None, "restore", tmp_path / "dump", path)
    kept = path / "journal.damaged-1"
    assert said(None, "restore", tmp_path / "dump", path, "--force") == f"kept: {kept}\n"
    assert said(None, "dump", path) == text


def test_delta_shows_where_a_volume_differs_from_a_snapshot(tmp_path: Path) -> None:
    with_names(tmp_path / "pool")
    assert said(None, "delta", tmp_path / "pool", "a@1", "a") == "8192 4096 data\n"
    assert said(None, "delta", tmp_path / "pool", "a", "a@1") == "8192 4096 zero\n"
    assert "no volume or snapshot 'b'" in refused(None, "delta", tmp_path / "pool", "a", "b")


def test_whose_names_all_who_lose_something_with_a_place_on_the_disk(tmp_path: Path) -> None:
    Pool.init(tmp_path / "pool", size="64M")
    with Pool.open(tmp_path / "pool") as pool:
        pool.create("a", "1M")
        pool.volume("a").write(256 * KiB, b"1" * 8 * KiB)
        pool.snapshot("a", "a@1")
        pool.clone("a@1", "b")
        pool.volume("a").write(256 * KiB, b"2" * 4 * KiB)
        places = [pool.volume(name).segments(256 * KiB, 4 * KiB)[0][0] for name in ("b", "a")]
    old, new = places
    assert said(None, "whose", tmp_path / "pool", hex(old + 100)) == (
        f"{old // 65536 * 65536}: 8 KiB of a@1 (1) at 262144, shown by a, a@1, b\n"
    )
    assert said(None, "whose", tmp_path / "pool", str(new)) == (
        f"{new // 65536 * 65536}: 4 KiB of a (2) at 262144, shown by a\n"
    )
    both = as_json(None, "whose", tmp_path / "pool", "0", "--length", "60M")
    assert isinstance(both, list) and [place["shown_by"] for place in both] == [["a", "a@1", "b"], ["a"]]
    assert said(None, "whose", tmp_path / "pool", "0") == "nobody's\n"
    assert "no 1 bytes at 1073741824" in refused(None, "whose", tmp_path / "pool", "1G")
    assert "not an offset: '0xg'" in refused(None, "whose", tmp_path / "pool", "0xg")


def test_verbs_without_a_daemon_refuse_a_pool_in_use(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with_names(path)
    said(None, "dump", path, "--output", tmp_path / "dump")
    uses: list[tuple[str | Path, ...]] = [
        ("check", path),
        ("repair", path),
        ("dump", path),
        ("restore", tmp_path / "dump", path, "--force"),
        ("delta", path, "a", "a"),
        ("whose", path, "0x10000"),
    ]
    with Pool.open(path):
        for arguments in uses:
            assert "is open in another process" in refused(None, *arguments), arguments


def test_init_can_put_the_data_elsewhere(tmp_path: Path) -> None:
    said(None, "init", tmp_path / "pool", "--data", tmp_path / "disk", "--size", "1G")
    assert (tmp_path / "disk").stat().st_size == GiB
    assert "holds something already" in refused(None, "init", tmp_path / "other", "--data", tmp_path / "disk")
    info = as_json(None, "init", tmp_path / "other", "--data", tmp_path / "disk", "--size", "1G", "--force")
    assert isinstance(info, dict) and info["data_path"] == str(tmp_path / "disk")


# -- JSON


def test_a_dump_does_not_go_into_the_pool(tmp_path: Path) -> None:
    said(None, "init", tmp_path / "pool")
    before = (tmp_path / "pool/superblock").read_bytes()
    for place in ("pool/superblock", "pool/journal/x", "pool/../pool/data"):
        assert "inside the pool" in refused(None, "dump", tmp_path / "pool", "--output", tmp_path / place)
    assert (tmp_path / "pool/superblock").read_bytes() == before


def no_devices(directory: Path) -> list[str | Path]:
    """What import-thin takes: an empty pool of dm-thin."""
    metadata = directory / "thin.xml"
    metadata.write_text('<superblock data_block_size="128"/>')
    return ["--metadata", metadata, "--data", metadata]


def test_every_verb_prints_json_with_json_before_or_behind_it(daemon: Daemon, tmp_path: Path) -> None:
    uses: dict[str, list[str | Path]] = {
        "init": [tmp_path / "pool"],
        "create": ["a", "1M"],
        "snapshot": ["a", "a@1"],
        "clone": ["a@1", "b"],
        "rollback": ["b", "a@1"],
        "rename": ["b", "c"],
        "resize": ["c", "2M"],
        "label": ["c", "k=v"],
        "quota": ["c", "1M"],
        "reserve": ["c", "none"],
        "extend": ["200G"],
        "ls": [],
        "show": ["c"],
        "tree": [],
        "info": [],
        "diff": ["a@1", "a@1"],
        "explain": ["c", "0x1000", "--length", "8K"],
        "map": ["c"],
        "du": ["c", "a"],
        "completion": ["bash"],
        "rm": ["c"],
        "check": [tmp_path / "pool"],
        "repair": [tmp_path / "pool"],
        "dump": [tmp_path / "pool", "--output", tmp_path / "dump"],
        "restore": [tmp_path / "dump", tmp_path / "pool", "--force"],
        "scrub": [],
        "delta": [tmp_path / "filled", "a", "a"],
        "whose": [tmp_path / "filled", "64K"],
        "import": [tmp_path / "raw", "imported", "--format", "raw"],
        "export": ["imported", tmp_path / "exported"],
        "send": ["a@1", "--output", tmp_path / "stream"],
        "receive": ["received", "--input", tmp_path / "stream"],
        "import-thin": no_devices(tmp_path),
    }
    with_names(tmp_path / "filled")
    (tmp_path / "raw").write_bytes(bytes(512))
    # Two end with the daemon, and those of devices and images need root: devices/test_verbs.py, images/test_verbs.py.
    assert uses.keys() == VERBS.keys() - {"serve", "events"} - devices.VERBS.keys() - images.VERBS.keys()
    for verb, arguments in uses.items():
        value = json.loads(said(daemon, "--json", verb, *arguments))
        assert isinstance(value, list if verb in ("ls", "tree", "diff", "delta", "whose") else dict), verb
    assert as_json(daemon, "show", "a") == json.loads(said(daemon, "--json", "show", "a"))
    assert as_json(daemon, "rm", "a", "a@1") == {"removed": ["a", "a@1"]}


def test_serve_says_in_json_that_it_is_ready(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text('[server]\nlisten = ["tcp:127.0.0.1:0"]')
    command = nbdthin_command("serve", "--json", "--config", tmp_path / "exports.toml")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            text += process.stdout.readline()
        ready = json.loads(text)
        assert ready["control"] == str(tmp_path / "var/control.sock")
        info = as_json(None, "--socket", ready["control"], "info")
        assert isinstance(info, dict) and info["listen"] == ready["listen"]
        process.terminate()
    assert process.returncode == 0


def test_the_socket_option_is_stronger_than_the_environment(daemon: Daemon, tmp_path: Path) -> None:
    for arguments in (("--socket", tmp_path / "no", "ls"), ("ls", "--socket", tmp_path / "no")):
        assert refused(daemon, *arguments).startswith(f"no daemon at {tmp_path}/no (")


def test_without_either_the_socket_below_the_working_directory_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NBDTHIN_SOCKET", raising=False)
    assert refused(None, "ls").startswith("no daemon at var/control.sock (start one: `nbdthin serve`")


# -- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "start_of_line"),
    [
        ("create a 513", "not a volume's size: 513 bytes"),
        ("create a 0", "not a volume's size"),
        ("create a lots", "not a size: 'lots'"),
        ("create a 99999999999E", "not a size: '99999999999E' is not less than 8 EiB"),
        ("extend 0", "not a pool's size: 0 bytes"),
        ("create a~b 1M", "not a name: 'a~b'"),
        ("show no", "no volume or snapshot 'no'"),
        ("snapshot no no@1", "no volume or snapshot 'no'"),
        ("clone no x", "no volume or snapshot 'no'"),
        ("rm no", "no volume or snapshot 'no'"),
        ("label no k=v", "no volume or snapshot 'no'"),
        ("label no key", "not a label: 'key' (write KEY=VALUE)"),
        ("label no =x", "not a label: '=x'"),
        ("ls --label x", "not a label: 'x'"),
        ("diff a b", "no snapshot 'a'"),
        ("check /nonexistent", "no pool at /nonexistent"),
        ("init /proc/x", "/proc/"),
        ("init /tmp --size 1G", "/tmp exists and is not empty"),
        ("init pool --size 1X", "not a size: '1X'"),
        ("init pool --block-size 100", "not a block size"),
        ("serve --config /nonexistent", "no config at /nonexistent"),
    ],
)
def test_bad_input_is_one_line_and_status_1(daemon: Daemon, arguments: str, start_of_line: str) -> None:
    assert refused(daemon, *arguments.split()).startswith(start_of_line)


@pytest.mark.parametrize(
    "arguments",
    ["", "frobnicate", "create", "create a", "create a 1M extra", "ls --lable x=y", "serve --socket x", "--json", "rm"],
)
def test_wrong_usage_is_status_2(arguments: str) -> None:
    assert "error: " in refused(None, *arguments.split(), status=2)


def test_names_that_are_no_text_are_refused(daemon: Daemon) -> None:
    assert refused(daemon, "create", os.fsdecode(b"\xff"), "1M") == "cannot be sent: '\\udcff' is not UTF-8 text"


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", ""],
        ["check", ""],
        ["repair", ""],
        ["dump", ""],
        ["dump", "pool", "--output", ""],
        ["delta", "", "a", "b"],
        ["whose", "", "1M"],
        ["restore", "", "pool"],
        ["restore", "dump", "pool", "--data", ""],
        ["serve", "--config", ""],
        ["detach", ""],
        ["umount", ""],
        ["--socket", "", "ls"],
    ],
)
def test_a_path_that_is_empty_is_wrong_usage_and_not_the_working_directory(arguments: list[str]) -> None:
    assert "the path is empty" in refused(None, *arguments, status=2)


def test_extending_to_the_size_that_there_is_says_so(daemon: Daemon) -> None:
    with daemon.connect() as pool:
        size = pool.info().pool.data_total
    assert said(daemon, "extend", str(size + 64 * KiB)).endswith(
        " already: nothing was changed\n"
    )  # the header's block
    assert "nothing was changed" not in said(daemon, "--json", "extend", str(size + 64 * KiB))


def test_a_long_argument_leaves_the_line_its_end(daemon: Daemon) -> None:
    for arguments in (("show", "x" * 5000), ("create", "a", "x" * 5000), ("check", "x" * 5000)):
        line = refused(daemon, *arguments)
        assert len(line) <= MAX_MESSAGE
        assert line.endswith(("(`nbdthin ls` lists what there is)", "64KiB or bytes)", "File name too long")), line


# -- what goes wrong on disk


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everyone may enter, which pytest's own are not for."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def nobody(directory: Path, *arguments: str | Path) -> Done:
    """Run a verb in `directory` as one whose rights count."""
    command = nbdthin_command(*arguments)
    if os.geteuid() == 0:
        command = [need("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


def given_away(path: Path) -> None:
    if os.geteuid() == 0:
        for each in (path, *path.rglob("*")):
            os.chown(each, 65534, 65534)


def test_what_cannot_be_written_is_called_by_the_name_that_was_given(public: Path) -> None:
    with_names(public / "pool")
    given_away(public / "pool")
    closed = public / "closed"
    closed.mkdir(mode=0o555)
    (closed / "exports.toml").write_text(
        f'[pool]\npath = "made"\n[server]\nlisten = ["tcp:127.0.0.1:0"]\n[control]\nsocket = "{public}/c/s"'
    )
    (public / "c").mkdir(mode=0o777)
    (public / "c").chmod(0o777)
    uses: list[tuple[list[str | Path], str]] = [
        (["init", closed / "made"], f"{closed}/made: Permission denied"),
        (["init", public / "pool/data/x"], f"{public}/pool/data/x: Not a directory"),
        (["init", public / ("x" * 250)], f"{public}/{'x' * 250}: File name too long"),
        (["dump", public / "pool", "--output", closed / "made"], f"{closed}/made: Permission denied"),
        (
            ["dump", public / "pool", "--output", public / "no/made"],
            f"{public}/no/made: No such file or directory",
        ),
        (["serve", "--config", closed / "exports.toml"], f"{closed}/made: Permission denied"),
    ]
    for arguments, line in uses:
        status, output, errors = nobody(public, *arguments)
        assert (status, output) == (1, "") and errors.endswith(f"{line}\n"), errors
        assert errors.count("\n") == 1 and errors.startswith("nbdthin: ") and ".new" not in errors


def test_a_pool_that_nobody_may_look_into_is_not_called_missing(public: Path) -> None:
    with_names(public / "pool")
    given_away(public / "pool")
    (public / "pool").chmod(0)
    for verb in (["check"], ["repair"], ["dump"], ["init"]):
        done = nobody(public, *verb, "pool")
        assert (done.status, done.errors) == (1, "nbdthin: pool/superblock: Permission denied\n"), verb
    (public / "pool").chmod(0o700)
    (public / "pool/data").chmod(0)
    (public / "free").mkdir()
    (public / "free").chmod(0o777)
    done = nobody(public, "dump", "pool", "--output", "free/dump")
    assert (done.status, done.errors) == (1, "nbdthin: pool/data: Permission denied\n"), "not of the file it goes to"


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with_names(tmp_path / "pool")
    (tmp_path / "exports.toml").write_text(
        '[pool]\npath = "loop"\n[server]\nlisten = ["tcp:127.0.0.1:0"]\n[control]\nsocket = "c"'
    )
    uses: list[list[str | Path]] = [
        ["init", tmp_path / "loop"],
        ["check", tmp_path / "loop"],
        ["repair", tmp_path / "loop"],
        ["dump", tmp_path / "loop"],
        ["dump", tmp_path / "loop", "--output", tmp_path / "x"],
        ["dump", tmp_path / "pool", "--output", tmp_path / "loop"],
        ["serve", "--config", tmp_path / "exports.toml"],
    ]
    for arguments in uses:
        done = subprocess.run(nbdthin_command(*arguments), capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(f"nbdthin: {tmp_path}/loop"), done.stderr
        assert done.stderr.endswith(": Too many levels of symbolic links\n") and done.stderr.count("\n") == 1


def test_a_dump_replaces_nothing_but_files(tmp_path: Path) -> None:
    with_names(tmp_path / "pool")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        assert "is there and no file" in refused(None, "dump", tmp_path / "pool", "--output", tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "directory").is_dir()


def test_a_pool_does_not_take_the_place_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path):
        assert "is the working directory" in refused(None, "init", name)


def test_who_meets_damage_is_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a pool"
    with_names(path)
    config = tmp_path / "exports.toml"
    config.write_text('[pool]\npath = "a pool"\n[server]\nlisten = ["tcp:127.0.0.1:0"]\n[control]\nsocket = "c"')
    with (path / "superblock").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    hint = f"(see all of it: `nbdthin check '{path}'`; then: `nbdthin repair '{path}'`)"
    uses: list[list[str | Path]] = [
        ["dump", path],
        ["dump", path, "--output", tmp_path / "x"],
        ["delta", path, "a", "a"],
        ["whose", path, "1M"],
    ]
    for arguments in uses:
        assert refused(None, *arguments).endswith(hint)
    served = subprocess.run(nbdthin_command("serve", "--config", config), capture_output=True, text=True)
    assert served.returncode == 1 and served.stderr.endswith(f"{hint}\n") and served.stderr.count("\n") == 1
    said(None, "repair", path)
    assert said(None, "dump", path)


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert said(None, "--version") == f"nbdthin {project['version']}\n"


def test_help_names_every_verb() -> None:
    texts = {"": said(None, "--help"), **{group: said(None, group, "--help") for group in GROUPS}}
    for verb in (*VERBS, *GROUPS):
        group, _, last = verb.rpartition(" ")
        assert f"\n    {last} " in texts[group]


# -- where the output goes


def test_output_into_a_closed_pipe_is_no_complaint(daemon: Daemon) -> None:
    with daemon.connect() as pool, pool.batch():
        for number in range(400):  # more than a pipe holds
            pool.create(f"{'x' * 200}{number}", 512)
    script = f"{' '.join(nbdthin_command('ls'))} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"NBDTHIN_SOCKET": str(daemon.control)},
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def onto_a_full_disk(daemon: Daemon, *arguments: str | Path, unbuffered: str = "") -> tuple[int, str]:
    with open("/dev/full", "w") as full:
        environment = os.environ | {"NBDTHIN_SOCKET": str(daemon.control), "PYTHONUNBUFFERED": unbuffered}
        command = nbdthin_command(*arguments)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    return done.returncode, done.stderr


def test_output_onto_a_full_disk_is_one_line_for_every_verb(daemon: Daemon, tmp_path: Path) -> None:
    with_names(tmp_path / "pool")
    with_names(tmp_path / "replaced")
    said(None, "dump", tmp_path / "pool", "--output", tmp_path / "dump")
    (tmp_path / "exports.toml").write_text('[server]\nlisten = ["tcp:127.0.0.1:0"]\n[control]\nsocket = "c"')
    for command in ("create a 1M", "snapshot a a@1"):
        said(daemon, *command.split())
    uses: dict[str, list[str | Path]] = {
        "init": [tmp_path / "new"],
        "serve": ["--config", tmp_path / "exports.toml"],
        "create": ["b", "1M"],
        "snapshot": ["a", "a@2"],
        "clone": ["a@1", "c"],
        "rollback": ["c", "a@1"],
        "rename": ["c", "d"],
        "resize": ["d", "2M"],
        "label": ["d", "k=v"],
        "quota": ["d", "1M"],
        "reserve": ["d", "none"],
        "extend": ["200G"],
        "ls": [],
        "show": ["d"],
        "tree": [],
        "info": [],
        "diff": ["a@1", "a@1"],
        "explain": ["d", "0"],
        "map": ["d"],
        "du": [],
        "completion": ["zsh"],
        "rm": ["d"],
        "events": [],
        "scrub": [],
        "check": [tmp_path / "pool"],
        "repair": [tmp_path / "pool"],
        "dump": [tmp_path / "pool"],
        "restore": [tmp_path / "dump", tmp_path / "pool", "--force"],
        "delta": [tmp_path / "replaced", "a", "a"],
        "whose": [tmp_path / "replaced", "64K"],
        "import": [tmp_path / "dump", "imported", "--format", "raw"],
        "export": ["imported", tmp_path / "exported"],
        "send": ["a@1", "--output", tmp_path / "stream"],
        "receive": ["received", "--input", tmp_path / "stream"],
        "import-thin": no_devices(tmp_path),
    }
    # Those of devices and images need root: devices/test_verbs.py, images/test_verbs.py.
    assert uses.keys() == VERBS.keys() - devices.VERBS.keys() - images.VERBS.keys()
    for verb, arguments in uses.items():
        status, errors = onto_a_full_disk(daemon, "--json", verb, *arguments)
        last = errors.splitlines()[-1] if verb == "serve" else errors.rstrip("\n")  # its log goes before
        assert (status, last) == (1, "nbdthin: cannot write output: No space left on device"), (verb, errors)
    with_arguments: dict[str, list[str | Path]] = {"dump": [tmp_path / "pool"], "send": ["a@1"], "export": ["a", "-"]}
    for option in ("--help", "--version", "info", *with_arguments):
        more = with_arguments.get(option, [])
        for unbuffered in ("", "1"):
            status, errors = onto_a_full_disk(daemon, option, *more, unbuffered=unbuffered)
            assert (status, errors) == (1, "nbdthin: cannot write output: No space left on device\n")


def test_where_nobody_can_be_told_the_exit_status_tells(daemon: Daemon) -> None:
    with open("/dev/full", "w") as full:
        command = nbdthin_command("--socket", daemon.control, "show", "no")
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 1


def on_terminal(daemon: Daemon, *arguments: str, columns: int) -> str:
    """What a verb shows on a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(NBDTHIN_SOCKET=str(daemon.control), COLUMNS=str(columns), TERM="xterm")
        os.execv(sys.executable, nbdthin_command(*arguments))
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # that is how a terminal ends
            break
        shown += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return shown.decode()


def test_a_narrow_terminal_cuts_nothing_off(daemon: Daemon) -> None:
    name = "a-name-of-some-length/that-one-would-like-to-see-whole@1"
    said(daemon, "create", name, "1M")
    said(daemon, "label", name, "note=[bold]no markup[/bold] of ours", "color=\x1b[31mred")
    for columns in (20, 80, 300):
        shown = on_terminal(daemon, "ls", columns=columns)
        assert name in shown and "note=[bold]no markup[/bold] of ours" in shown
        assert "\x1b[31m" not in shown and "color=\\x1b[31mred" in shown


def test_labels_that_the_output_cannot_show_are_escaped(daemon: Daemon) -> None:
    said(daemon, "create", "a", "1M")
    said(daemon, "label", "a", "note=größe ✓")
    done = subprocess.run(
        nbdthin_command("show", "a"),
        env=os.environ | {"NBDTHIN_SOCKET": str(daemon.control), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "note=gr\\xf6\\xdfe \\u2713" in done.stdout
    assert "note=größe ✓" in said(daemon, "show", "a")


def said_lightly(daemon: Daemon, *arguments: str) -> str:
    """What a verb prints in a process of its own, in which it loads nothing that takes long."""
    program = (
        "import sys; from nbdthin.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'numpy', 'uvloop', 'rich', 'psutil'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"NBDTHIN_SOCKET": str(daemon.control)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_asking_a_daemon_loads_neither_numpy_nor_uvloop_nor_rich(daemon: Daemon) -> None:
    said_lightly(daemon, "ls")
