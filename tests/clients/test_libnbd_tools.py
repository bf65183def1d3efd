"""libnbd's tools and its Python binding: what they are told, what they copy, and what no tool would send."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from nbdthin.units import KiB, MiB
from tests.clients import libnbd
from tests.clients.daemon import PATIENCE, Daemon, nbdthin_command, run, run_json
from tests.clients.libnbd import Handle
from tests.conftest import need

SIZE = 256 * MiB  # of the fixture `volume`
DATA, ZERO, HOLE = 0, 2, 3  # base:allocation
WRAP = (1 << 64) - 512

FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, UNKNOWN = 1, 2, 4, 8, 16, 0x8000


@pytest.fixture
def nbd() -> ModuleType:
    return libnbd.load()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sparse_image(path: Path, size: int, pieces: dict[int, int]) -> Path:
    """A file of `size` bytes with random data: {offset: length}."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in pieces.items():
            file.seek(offset)
            file.write(os.urandom(length))
    return path


def refusal(nbd: ModuleType, request: Callable[[], object]) -> int:
    """The error that the server answers, 0 for success."""
    try:
        request()
    except nbd.Error as error:
        number: int = error.errnum
        return number
    return 0


# -- what is offered


def test_nbdinfo_sees_a_volume_with_everything_the_protocol_offers(volume: str) -> None:
    need("nbdinfo")
    answer = run_json("nbdinfo", "--json", volume)
    assert isinstance(answer, dict)
    assert answer["structured"] is True
    (export,) = answer["exports"]
    assert export["export-size"] == SIZE
    assert [export[f"block_size_{size}"] for size in ("minimum", "preferred", "maximum")] == [1, 4 * KiB, 64 * MiB]
    assert sorted(export["contexts"]) == ["base:allocation", "qemu:allocation-depth"]
    assert export["is_read_only"] is False
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{ability}"] is True, ability


def test_nbdinfo_sees_a_snapshot_as_read_only(shared_daemon: Daemon) -> None:
    need("nbdinfo")
    shared_daemon.create("looked-at", "1 MiB")
    answer = run_json("nbdinfo", "--json", shared_daemon.snapshot("looked-at", "looked-at@1"))
    assert isinstance(answer, dict)
    (export,) = answer["exports"]
    assert export["is_read_only"] is True
    assert export["can_multi_conn"] is True
    assert export["can_trim"] is export["can_zero"] is False


def test_nbdinfo_lists_every_volume_and_snapshot_with_its_description(shared_daemon: Daemon) -> None:
    need("nbdinfo")
    names = ["debian:12", "golden/web", "list/me", "web@before"]
    for name in names[:3]:
        shared_daemon.create(name, "1 MiB")
    shared_daemon.snapshot("list/me", names[3])
    answer = run_json("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={shared_daemon.socket}")
    assert isinstance(answer, dict)
    exports = {export["export-name"]: export for export in answer["exports"]}
    with shared_daemon.connect() as control:
        assert set(exports) == {row.name for row in control.list()}
    assert set(names) <= set(exports)
    assert exports["golden/web"]["description"] == "not to be written"
    assert exports["golden/web"]["is_read_only"] is exports["web@before"]["is_read_only"] is True
    assert exports["list/me"]["is_read_only"] is False


def test_every_name_can_be_reached_over_both_sockets(shared_daemon: Daemon) -> None:
    need("nbdinfo")
    for name in ("a", "Z.z_9-0", "debian:12@a/b", "x" * 255):
        uri = shared_daemon.create(name, "3 MiB")
        assert run("nbdinfo", "--size", uri) == f"{3 * MiB}\n"
        assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{shared_daemon.port}/{name}") == f"{3 * MiB}\n"


def test_nbdsh_connects_and_reads(volume: str) -> None:
    nbdsh = need("nbdsh")
    # nbdsh runs the first python3 of the PATH; only Debian's own has its module.
    printed = subprocess.run(
        [nbdsh, "-u", volume, "-c", "h.pwrite(b'hello', 3)", "-c", "print(bytes(h.pread(6, 2)))"],
        env={**os.environ, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (printed.stdout, printed.returncode) == ("b'\\x00hello'\n", 0), printed.stderr


def test_a_client_that_can_only_name_an_export_gets_it(shared_daemon: Daemon, nbd: ModuleType) -> None:
    shared_daemon.create("by/name", "1 MiB")
    for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE):
        handle = libnbd.new()
        handle.set_handshake_flags(flags)
        handle.set_export_name("by/name")
        handle.connect_unix(str(shared_daemon.socket))
        assert handle.get_size() == MiB
        handle.pwrite(b"x" * 512, 512)
        assert handle.pread(512, 512) == b"x" * 512
        handle.shutdown()


def test_a_client_that_names_a_wrong_export_is_disconnected(shared_daemon: Daemon, nbd: ModuleType) -> None:
    handle = libnbd.new()
    handle.set_handshake_flags(0)
    handle.set_export_name("nowhere")
    with pytest.raises(nbd.Error):
        handle.connect_unix(str(shared_daemon.socket))


def test_a_client_may_look_around_choose_and_go(shared_daemon: Daemon, nbd: ModuleType) -> None:
    shared_daemon.create("chosen", "2 MiB")
    handle = libnbd.new()
    handle.set_opt_mode(True)
    handle.connect_unix(str(shared_daemon.socket))
    names: list[str] = []
    handle.opt_list(lambda name, description: names.append(name))
    assert "chosen" in names
    handle.set_export_name("nowhere")
    with pytest.raises(nbd.Error):
        handle.opt_go()
    handle.set_export_name("chosen")
    contexts: list[str] = []
    handle.opt_list_meta_context(contexts.append)
    assert sorted(contexts) == ["base:allocation", "qemu:allocation-depth"]
    handle.opt_go()
    assert handle.get_size() == 2 * MiB
    handle.shutdown()


def test_a_client_may_leave_during_the_handshake(shared_daemon: Daemon) -> None:
    handle = libnbd.new()
    handle.set_opt_mode(True)
    handle.connect_unix(str(shared_daemon.socket))
    handle.opt_abort()
    assert handle.aio_is_closed()


def test_a_client_without_structured_replies_reads_holes_as_zeroes(volume: str) -> None:
    handle = libnbd.new()
    handle.set_request_structured_replies(False)
    handle.connect_uri(volume)
    assert not handle.get_structured_replies_negotiated()
    handle.pwrite(b"\x07" * 4096, 64 * KiB)
    assert handle.pread(128 * KiB, 0) == bytes(64 * KiB) + b"\x07" * 4096 + bytes(60 * KiB)
    handle.shutdown()


# -- maps


def test_nbdinfo_maps_what_was_written_and_nothing_else(volume: str) -> None:
    need("nbdinfo")
    with libnbd.connected(volume) as handle:
        handle.pwrite(b"a" * 8 * KiB, MiB)
        handle.pwrite(b"b" * 64 * KiB, 2 * MiB)
        handle.trim(4 * KiB, 2 * MiB + 4 * KiB)
    assert map_of(volume) == [
        (0, MiB, HOLE),
        (MiB, 8 * KiB, DATA),
        (MiB + 8 * KiB, 56 * KiB, ZERO),  # the rest of a block that is allocated: zeroes, and room for a write
        (MiB + 64 * KiB, MiB - 64 * KiB, HOLE),
        (2 * MiB, 4 * KiB, DATA),
        (2 * MiB + 4 * KiB, 4 * KiB, ZERO),
        (2 * MiB + 8 * KiB, 56 * KiB, DATA),
        (2 * MiB + 64 * KiB, SIZE - 2 * MiB - 64 * KiB, HOLE),
    ]


def test_nbdinfo_maps_how_deep_the_owner_of_each_range_lies(shared_daemon: Daemon) -> None:
    need("nbdinfo")
    uri = shared_daemon.create("deep", "1 MiB")
    for level in range(3):
        with libnbd.connected(uri) as handle:
            handle.pwrite(bytes([level + 1]) * 64 * KiB, level * 64 * KiB)
        shared_daemon.snapshot("deep", f"deep@{level}")
    with libnbd.connected(uri) as handle:
        handle.pwrite(b"\x09" * 4 * KiB, 4 * KiB)
    assert map_of(uri, "qemu:allocation-depth") == [
        (0, 4 * KiB, 4),
        (4 * KiB, 4 * KiB, 1),
        (8 * KiB, 56 * KiB, 4),
        (64 * KiB, 64 * KiB, 3),
        (128 * KiB, 64 * KiB, 2),
        (192 * KiB, MiB - 192 * KiB, 0),
    ]
    # What is shared is data, not a hole: a copier may skip holes.
    assert map_of(uri) == [(0, 192 * KiB, DATA), (192 * KiB, MiB - 192 * KiB, HOLE)]


def map_of(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
    rows = run_json("nbdinfo", "--json", f"--map={context}", uri)
    assert isinstance(rows, list)
    joined: list[tuple[int, int, int]] = []
    for row in rows:
        offset, length, kind = row["offset"], row["length"], row["type"]
        if joined and joined[-1][2] == kind:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, kind)
        else:
            joined.append((offset, length, kind))
    return joined


def test_block_status_without_a_chosen_context_is_refused(volume: str, nbd: ModuleType) -> None:
    with libnbd.connected(volume) as handle:
        request = lambda: handle.block_status(4 * KiB, 0, lambda *_: None)  # noqa: E731
        assert refusal(nbd, request) == errno.EINVAL
        handle.pwrite(b"alive", 0)


def test_block_status_of_one_extent_stays_inside_the_request(volume: str) -> None:
    with libnbd.connected(volume, "base:allocation") as handle:
        answers: list[list[int]] = []
        handle.block_status(4097, 1, lambda name, offset, entries, error: answers.append(list(entries)), REQ_ONE)
        assert len(answers) == 1
        length, flags = answers[0]
        assert 0 < length <= 4097
        assert flags == HOLE


# -- copies


def test_nbdcopy_brings_an_image_in_and_out_and_holes_stay_holes(shared_daemon: Daemon, tmp_path: Path) -> None:
    need("nbdcopy")
    pieces = {0: MiB, 5 * MiB + 4 * KiB: 4 * KiB, 64 * MiB: 3 * MiB, 127 * MiB: MiB}
    image = sparse_image(tmp_path / "in", 128 * MiB, pieces)
    before = shared_daemon.data_used()
    uri = shared_daemon.create("copied", 128 * MiB)
    run("nbdcopy", "--connections=4", "--requests=32", "--flush", image, uri)
    assert shared_daemon.data_used() - before == 5 * MiB + 64 * KiB
    assert [(offset, length) for offset, length, kind in map_of(uri) if kind == DATA] == list(pieces.items())
    run("nbdcopy", "--connections=4", uri, tmp_path / "out")
    assert sha256(tmp_path / "out") == sha256(image)
    assert (tmp_path / "out").stat().st_blocks == image.stat().st_blocks


def test_nbdcopy_copies_over_what_another_volume_held(shared_daemon: Daemon, tmp_path: Path) -> None:
    need("nbdcopy")
    image = sparse_image(tmp_path / "image", 32 * MiB, {MiB: MiB, 9 * MiB: 12 * KiB})
    source = shared_daemon.create("source", 32 * MiB)
    run("nbdcopy", image, source)
    target = shared_daemon.create("target", 32 * MiB)
    run("nbdcopy", sparse_image(tmp_path / "old", 32 * MiB, {0: 32 * MiB}), target)
    run("nbdcopy", "--connections=2", "--flush", source, target)
    run("nbdcopy", target, tmp_path / "out")
    assert sha256(tmp_path / "out") == sha256(image)
    with shared_daemon.connect() as control:
        assert control.show("target").exclusive == control.show("source").exclusive


# -- requests that a tool would not send

OUT_OF_RANGE: dict[str, Callable[[Handle], object]] = {
    "read behind the end": lambda handle: handle.pread(512, SIZE),
    "read across the end": lambda handle: handle.pread(1024, SIZE - 512),
    "read that wraps at 2^64": lambda handle: handle.pread(1024, WRAP),
    "cache behind the end": lambda handle: handle.cache(512, SIZE),
    "trim behind the end": lambda handle: handle.trim(512, SIZE),
    "trim of almost 4 GiB": lambda handle: handle.trim((1 << 32) - 512, 0),
    "trim that wraps at 2^64": lambda handle: handle.trim(1024, WRAP),
    "block status across the end": lambda handle: handle.block_status(1024, SIZE - 512, lambda *_: None),
}
OUT_OF_SPACE: dict[str, Callable[[Handle], object]] = {
    "write behind the end": lambda handle: handle.pwrite(b"x" * 512, SIZE),
    "write across the end": lambda handle: handle.pwrite(b"x" * 1024, SIZE - 512),
    "write that wraps at 2^64": lambda handle: handle.pwrite(b"x" * 1024, WRAP),
    "write of 64 MiB across the end": lambda handle: handle.pwrite(b"x" * 64 * MiB, SIZE - MiB),
    "zeroes across the end": lambda handle: handle.zero(1024, SIZE - 512),
    "zeroes that wrap at 2^64": lambda handle: handle.zero(1024, WRAP),
    "fast zeroes behind the end": lambda handle: handle.zero(512, SIZE, FAST_ZERO),
}
WRONG_FLAGS: dict[str, Callable[[Handle], object]] = {
    "read with NO_HOLE": lambda handle: handle.pread(512, 0, NO_HOLE),
    "read with an unknown flag": lambda handle: handle.pread(512, 0, UNKNOWN),
    "write with NO_HOLE": lambda handle: handle.pwrite(b"x" * 512, 0, NO_HOLE),
    "write with DF": lambda handle: handle.pwrite(b"x" * 512, 0, DF),
    "write with an unknown flag": lambda handle: handle.pwrite(b"x" * 512, 0, UNKNOWN),
    "trim with FAST_ZERO": lambda handle: handle.trim(512, 0, FAST_ZERO),
    "zeroes with REQ_ONE": lambda handle: handle.zero(512, 0, REQ_ONE),
    "cache with NO_HOLE": lambda handle: handle.cache(512, 0, NO_HOLE),
    "flush with an unknown flag": lambda handle: handle.flush(UNKNOWN),
    "block status with DF": lambda handle: handle.block_status(512, 0, lambda *_: None, DF),
}
REFUSED = [
    pytest.param(request, expected, id=name)
    for table, expected in ((OUT_OF_RANGE, errno.EINVAL), (OUT_OF_SPACE, errno.ENOSPC), (WRONG_FLAGS, errno.EINVAL))
    for name, request in table.items()
]


@pytest.mark.parametrize(("request_", "expected"), REFUSED)
def test_an_illegal_request_is_refused_and_changes_nothing(
    request_: Callable[[Handle], object], expected: int, shared_daemon: Daemon, nbd: ModuleType
) -> None:
    name = "illegal"
    with shared_daemon.connect() as control:
        if name in {row.name for row in control.list()}:
            control.remove(name)
    uri = shared_daemon.create(name, SIZE)
    with libnbd.connected(uri, "base:allocation") as handle:
        handle.pwrite(b"\x55" * 4096, SIZE - 4096)
        used = shared_daemon.data_used()
        assert refusal(nbd, lambda: request_(handle)) == expected
        # The connection is still in step: a payload was consumed, no chunk was left out.
        assert handle.pread(4096, SIZE - 4096) == b"\x55" * 4096
        assert handle.pread(4096, 0) == bytes(4096)
        assert shared_daemon.data_used() == used


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda handle: handle.pwrite(b"x" * 4096, 0), id="write"),
        pytest.param(lambda handle: handle.pwrite(b"x" * 4096, 0, FUA), id="write with FUA"),
        pytest.param(lambda handle: handle.pwrite(b"x" * 8 * MiB, 0), id="write of 8 MiB"),
        pytest.param(lambda handle: handle.trim(4096, 0), id="trim"),
        pytest.param(lambda handle: handle.zero(4096, 0), id="zeroes"),
        pytest.param(lambda handle: handle.zero(4096, 0, NO_HOLE | FAST_ZERO), id="fast zeroes"),
    ],
)
def test_a_snapshot_refuses_every_change(
    change: Callable[[Handle], object], shared_daemon: Daemon, nbd: ModuleType
) -> None:
    with shared_daemon.connect() as control:
        made = {row.name for row in control.list()}
    if "sealed" not in made:
        with libnbd.connected(shared_daemon.create("sealed", "16 MiB")) as handle:
            handle.pwrite(b"kept" * 1024, 0)
        shared_daemon.snapshot("sealed", "sealed@1")
    with libnbd.connected(shared_daemon.uri("sealed@1")) as handle:
        assert handle.is_read_only()
        assert refusal(nbd, lambda: change(handle)) == errno.EPERM
        assert handle.pread(4096, 0) == b"kept" * 1024
        handle.flush()


def test_a_volume_that_a_rule_makes_read_only_refuses_a_write(shared_daemon: Daemon, nbd: ModuleType) -> None:
    with libnbd.connected(shared_daemon.create("golden/image", "1 MiB")) as handle:
        assert handle.is_read_only()
        assert refusal(nbd, lambda: handle.pwrite(b"x", 0)) == errno.EPERM


def test_requests_of_no_length_leave_the_connection_usable(volume: str, nbd: ModuleType) -> None:
    with libnbd.connected(volume, "base:allocation") as handle:
        for request in (
            lambda: handle.pread(0, 0),
            lambda: handle.pwrite(b"", 4096),
            lambda: handle.trim(0, 0),
            lambda: handle.zero(0, 0),
            lambda: handle.cache(0, 0),
            lambda: handle.block_status(0, 0, lambda *_: None),
            lambda: handle.trim(0, SIZE),
            lambda: handle.pwrite(b"", SIZE),
        ):
            assert refusal(nbd, request) in (0, errno.EINVAL)
            assert handle.pread(16, 0) == bytes(16)


def test_bytes_that_no_block_aligns_are_written_trimmed_and_read(volume: str) -> None:
    with libnbd.connected(volume) as handle:
        whole = bytearray(256 * KiB)
        for offset, length in ((1, 1), (4095, 2), (65535, 3), (70000, 99999), (131071, 65538)):
            data = os.urandom(length)
            handle.pwrite(data, offset)
            whole[offset : offset + length] = data
        for offset, length in ((65537, 5), (100001, 12345)):
            handle.zero(length, offset)
            whole[offset : offset + length] = bytes(length)
        assert handle.pread(len(whole), 0) == whole
        assert handle.pread(77777, 65533) == whole[65533 : 65533 + 77777]
        handle.trim(20001, 150001)
        around = handle.pread(len(whole), 0)
        assert around[:150001] == whole[:150001]
        assert around[170002:] == whole[170002:]


def test_a_payload_of_64_mib_goes_in_and_comes_out(volume: str) -> None:
    data = os.urandom(MiB) * 64
    with libnbd.connected(volume) as handle:
        handle.pwrite(data, 12345)
        assert handle.pread(64 * MiB, 12345) == data


def test_every_command_takes_fua(volume: str) -> None:
    with libnbd.connected(volume, "base:allocation") as handle:
        handle.pwrite(b"x" * 4096, 0, FUA)
        assert handle.pread(4096, 0, FUA) == b"x" * 4096
        handle.cache(4096, 0, FUA)
        handle.zero(4096, 0, FUA)
        handle.trim(4096, 0, FUA)
        handle.flush(FUA)
        assert libnbd.extents(handle, "base:allocation", 4096, flags=FUA) == [(4096, HOLE)]


def test_zeroes_leave_a_hole_unless_a_hole_is_refused(volume: str) -> None:
    with libnbd.connected(volume, "base:allocation") as handle:
        for offset in (0, 64 * KiB, 128 * KiB):
            handle.pwrite(b"x" * 64 * KiB, offset)
        handle.zero(64 * KiB, 0)
        handle.zero(64 * KiB, 64 * KiB, NO_HOLE)
        handle.zero(64 * KiB, 128 * KiB, FAST_ZERO)
        assert handle.pread(192 * KiB, 0) == bytes(192 * KiB)
        for offset in (0, 128 * KiB):
            assert libnbd.extents(handle, "base:allocation", 64 * KiB, offset) == [(64 * KiB, HOLE)]


def test_zeroes_without_a_hole_keep_their_space(shared_daemon: Daemon) -> None:
    with libnbd.connected(shared_daemon.create("provisioned", "16 MiB")) as handle:
        before = shared_daemon.data_used()
        handle.zero(MiB, 0, NO_HOLE)
        handle.flush()
        assert shared_daemon.data_used() - before == MiB
        assert handle.pread(MiB, 0) == bytes(MiB)


def test_fast_zeroes_are_done_or_refused_as_not_supported(volume: str, nbd: ModuleType) -> None:
    with libnbd.connected(volume) as handle:
        handle.pwrite(b"x" * 64 * KiB, 0)
        for flags in (FAST_ZERO, FAST_ZERO | NO_HOLE):
            before = handle.pread(64 * KiB, 0)
            error = refusal(nbd, lambda flags=flags: handle.zero(64 * KiB, 0, flags))  # type: ignore[misc]
            assert error in (0, errno.ENOTSUP)
            assert handle.pread(64 * KiB, 0) == (before if error else bytes(64 * KiB))


def test_a_read_tells_holes_from_data_unless_it_must_not_be_fragmented(volume: str, nbd: ModuleType) -> None:
    with libnbd.connected(volume) as handle:
        handle.pwrite(b"d" * 4096, 64 * KiB)
        chunks: list[tuple[int, int, int]] = []

        def collect(data: bytes, offset: int, status: int, error: object) -> None:
            chunks.append((offset, len(data), status))

        expected = bytes(64 * KiB) + b"d" * 4096 + bytes(60 * KiB)
        assert handle.pread_structured(128 * KiB, 0, collect) == expected
        assert {status for *_, status in chunks} == {nbd.READ_DATA, nbd.READ_HOLE}
        assert sum(length for _, length, status in chunks if status == nbd.READ_DATA) == 4096
        chunks.clear()
        assert handle.pread_structured(128 * KiB, 0, collect, DF) == expected
        assert chunks == [(0, 128 * KiB, nbd.READ_DATA)]


# -- several connections


def test_a_flush_on_one_connection_keeps_what_another_wrote_for_a_third(daemon: Daemon) -> None:
    uri = daemon.create("shared", "64 MiB")
    data = os.urandom(MiB)
    with libnbd.connected(uri) as writer, libnbd.connected(uri) as flusher, libnbd.connected(uri) as reader:
        assert writer.can_multi_conn()
        writer.pwrite(data, 12288)
        assert reader.pread(MiB, 12288) == data
        flusher.flush()
        writer.pwrite(b"fua!" * 1024, 32 * MiB, FUA)
        daemon.kill()
    daemon.start()
    with libnbd.connected(uri) as again:
        assert again.pread(MiB, 12288) == data
        assert again.pread(4096, 32 * MiB) == b"fua!" * 1024


def test_a_command_that_was_answered_has_happened_after_a_kill(daemon: Daemon) -> None:
    uri = daemon.create("kept", "1 MiB")
    with libnbd.connected(uri) as handle:
        handle.pwrite(b"before" * 512, 0)
        daemon.snapshot("kept", "kept@1")
        daemon.kill()
    daemon.start()
    with libnbd.connected(daemon.uri("kept@1")) as handle:
        assert handle.pread(3072, 0) == b"before" * 512


def test_a_name_in_use_is_removed_only_by_force(daemon: Daemon) -> None:
    need("nbdinfo")
    uri = daemon.create("held", "1 MiB")
    with libnbd.connected(uri) as handle:
        with daemon.connect() as control:
            (holder,) = control.show("held").connections
            remove = nbdthin_command("--socket", daemon.control, "rm", "held")
            refused = subprocess.run(remove, capture_output=True, text=True)
            assert refused.returncode == 1
            assert holder in refused.stderr
            handle.pwrite(b"alive", 0)
            run(*remove, "--force")
            assert control.list() == []
        deadline = PATIENCE
        while not (handle.aio_is_dead() or handle.aio_is_closed()) and deadline:
            handle.poll(1000)
            deadline -= 1
        assert handle.aio_is_dead() or handle.aio_is_closed()
