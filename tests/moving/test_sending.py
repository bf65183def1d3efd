"""Snapshots cross from one pool to another: whole, as differences, in spite of interruptions, and never wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

import nbdthin
from nbdthin.errors import Corrupt, Error, Exists, InUse, Invalid, NoSpace, NotFound, PoolFailed
from nbdthin.moving import receiving
from nbdthin.moving.identity import LABEL
from nbdthin.moving.receiving import TOKEN, receive, resume_token
from nbdthin.moving.sending import resume, send
from nbdthin.units import KiB, MiB, TiB
from tests.clients.daemon import Daemon, nbdthin_command, running

from .conftest import content, disk, holes, names, refused, said

SIZE = 16 * MiB


def sent(pool: nbdthin.Client, snapshot: str, base: str | None = None) -> bytes:
    output = io.BytesIO()
    told = send(pool, snapshot, output, base=base)
    assert told.stream == len(output.getvalue())
    return output.getvalue()


def received(pool: nbdthin.Client, name: str, data: bytes) -> nbdthin.Export:
    return receive(pool, name, io.BytesIO(data), where="the test")


def scribble(pool: nbdthin.Client, volume: str, chance: random.Random, times: int = 20) -> None:
    """Writes, zeroes and trims anywhere."""
    with disk(pool, volume) as each:
        for _ in range(times):
            length = chance.choice((1, 512, 4 * KiB, 64 * KiB, 300 * KiB))
            offset = chance.randrange(each.size - length)
            kind = chance.choice(("write", "write", "zero", "trim"))
            if kind == "write":
                each.write(offset, chance.randbytes(length))
            elif kind == "zero":
                each.zero(offset, length)
            else:
                each.trim(offset // 4096 * 4096, length // 4096 * 4096 or 4096)


@pytest.fixture
def web(pool: nbdthin.Client) -> nbdthin.Client:
    """A pool with the snapshots web@1, web@2 and web@3 of a volume that changes between them."""
    chance = random.Random(5)
    pool.create("web", SIZE)
    for number in (1, 2, 3):
        scribble(pool, "web", chance)
        pool.snapshot("web", f"web@{number}", labels={"number": str(number)})
    return pool


def same(pool: nbdthin.Client, name: str, other: nbdthin.Client, copy: str) -> None:
    assert content(pool, name) == content(other, copy)
    labels = {key: value for key, value in pool.show(name).labels.items() if key != LABEL}
    assert {key: value for key, value in other.show(copy).labels.items() if key != LABEL} == labels
    assert pool.show(name).labels[LABEL] == other.show(copy).labels[LABEL]


def test_a_whole_snapshot_arrives_with_its_holes_and_labels(web: nbdthin.Client, other: nbdthin.Client) -> None:
    received(other, "copy", sent(web, "web@2"))
    same(web, "web@2", other, "copy")
    assert holes(other, "copy") == holes(web, "web@2")
    assert names(other) == ["copy"] and other.show("copy").kind == "snapshot"


def test_differences_arrive_on_top_of_each_other(web: nbdthin.Client, other: nbdthin.Client) -> None:
    whole = sent(web, "web@1")
    received(other, "web@1", whole)
    for before, after in (("web@1", "web@2"), ("web@2", "web@3")):
        received(other, after, sent(web, after, before))
    for number in (1, 2, 3):
        same(web, f"web@{number}", other, f"web@{number}")
        assert holes(other, f"web@{number}") == holes(web, f"web@{number}")
    assert [other.show(f"web@{number}").parent for number in (1, 2, 3)] == [None, "web@1", "web@2"]


def test_a_difference_holds_what_differs_and_nothing_else(pool: nbdthin.Client, other: nbdthin.Client) -> None:
    pool.create("disk", 64 * MiB)
    with disk(pool, "disk") as each:
        each.write(0, random.Random(1).randbytes(8 * MiB))
        pool.snapshot("disk", "disk@1")
        each.write(MiB, b"a page" * 600)
        each.zero(2 * MiB, MiB)
        pool.snapshot("disk", "disk@2")
    received(other, "disk@1", sent(pool, "disk@1"))
    difference = sent(pool, "disk@2", "disk@1")
    assert len(difference) < 2 * KiB
    used = other.info().pool.data_used
    received(other, "disk@2", difference)
    same(pool, "disk@2", other, "disk@2")
    assert other.info().pool.data_used - used <= 64 * KiB


def test_what_was_received_can_be_sent_on_and_back(web: nbdthin.Client, other: nbdthin.Client) -> None:
    received(other, "there@1", sent(web, "web@1"))
    other.clone("there@1", "there")
    scribble(other, "there", random.Random(9))
    other.snapshot("there", "there@2")
    received(web, "back", sent(other, "there@2", "there@1"))
    same(other, "there@2", web, "back")
    assert web.show("back").parent == "web@1"


def test_two_snapshots_that_are_the_same_differ_in_nothing(web: nbdthin.Client, other: nbdthin.Client) -> None:
    web.snapshot("web", "web@4", labels={})
    received(other, "three", sent(web, "web@3"))
    received(other, "four", sent(web, "web@4", "web@3"))
    same(web, "web@4", other, "four")


@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 2, 20 * KiB + 512])
def test_a_difference_may_change_the_size(web: nbdthin.Client, other: nbdthin.Client, size: int) -> None:
    web.resize("web", size)
    web.snapshot("web", "resized")
    received(other, "copy@1", sent(web, "web@1"))
    received(other, "copy@2", sent(web, "resized", "web@1"))
    same(web, "resized", other, "copy@2")
    assert other.show("copy@2").size == size


def test_a_sparse_tebibyte_is_a_small_stream(pool: nbdthin.Client, other: nbdthin.Client) -> None:
    pool.create("huge", TiB)
    pool.snapshot("huge", "huge@1")
    with disk(pool, "huge") as each:
        each.write(TiB - 512, b"\1" * 512)
    pool.snapshot("huge", "huge@2")
    assert len(sent(pool, "huge@1")) < 512
    received(other, "huge@1", sent(pool, "huge@1"))
    received(other, "huge@2", sent(pool, "huge@2", "huge@1"))
    assert holes(other, "huge@2") == holes(pool, "huge@2")


# Refusals --------------------------------------------------------------------------------------------------


def test_a_wrong_base_is_refused(web: nbdthin.Client, other: nbdthin.Client) -> None:
    sent(web, "web@1")
    sent(web, "web@2")
    difference = sent(web, "web@3", "web@2")
    with pytest.raises(NotFound, match=r"differs in from 'web@2', which is not in this pool"):
        received(other, "copy", difference)
    received(other, "web@2", sent(web, "web@1"))  # the name of the base, and not the base
    with pytest.raises(NotFound, match="is not in this pool"):
        received(other, "copy", difference)
    assert names(other) == ["web@2"]


def test_a_name_that_was_given_anew_is_another_snapshot(web: nbdthin.Client, other: nbdthin.Client) -> None:
    received(other, "web@1", sent(web, "web@1"))
    difference = sent(web, "web@2", "web@1")
    other.remove("web@1")
    other.create("volume", SIZE)
    other.snapshot("volume", "web@1")
    with pytest.raises(NotFound, match="is not in this pool"):
        received(other, "web@2", difference)


def test_a_base_that_nobody_has_is_refused_where_it_is_sent(web: nbdthin.Client) -> None:
    with pytest.raises(Invalid, match="'web@1' was never sent or received"):
        sent(web, "web@2", "web@1")


def test_a_volume_is_not_sent(web: nbdthin.Client) -> None:
    with pytest.raises(Invalid, match="snapshot it, and send that"):
        sent(web, "web")
    with pytest.raises(NotFound):
        sent(web, "nobody")


def test_a_name_that_is_taken_is_refused(web: nbdthin.Client, other: nbdthin.Client) -> None:
    other.create("copy", MiB)
    with pytest.raises(Exists, match="'copy' exists already"):
        received(other, "copy", sent(web, "web@1"))
    with pytest.raises(Invalid, match="not a name"):
        received(other, "no name", sent(web, "web@1"))


def test_an_identity_stays_what_it_was_through_renames(web: nbdthin.Client, other: nbdthin.Client) -> None:
    received(other, "web@1", sent(web, "web@1"))
    web.rename("web@1", "first")
    other.rename("web@1", "eins")
    received(other, "zwei", sent(web, "web@2", "first"))
    same(web, "web@2", other, "zwei")


# Damage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(pool: nbdthin.Client) -> bytes:
    """A stream of a few hundred bytes."""
    pool.create("small", MiB)
    with disk(pool, "small") as each:
        each.write(0, b"hello" * 1000)
        each.write(512 * KiB, b"\2" * 4096)
    pool.snapshot("small", "small@1")
    return sent(pool, "small@1")


def test_every_flipped_byte_is_refused_and_leaves_nothing(
    pool: nbdthin.Client, other: nbdthin.Client, small: bytes
) -> None:
    for position in range(len(small)):
        damaged = bytearray(small)
        damaged[position] ^= 0x10
        with pytest.raises(Error) as caught:
            received(other, "copy", bytes(damaged))
        assert "\n" not in str(caught.value)
        # What came whole before the damage may be kept, under its own name, for who goes on from there.
        assert [name for name in names(other) if name != "receiving/copy"] == []
    received(other, "copy", small)
    same(pool, "small@1", other, "copy")


def test_every_truncation_is_refused(pool: nbdthin.Client, other: nbdthin.Client, small: bytes) -> None:
    for length in range(len(small)):
        with pytest.raises(Error):
            received(other, "copy", small[:length])
        assert "copy" not in names(other)


def test_what_breaks_off_before_anything_was_verified_leaves_nothing(other: nbdthin.Client, small: bytes) -> None:
    with pytest.raises(Corrupt, match="it ends in the middle"):
        received(other, "copy", small[:-60])
    assert names(other) == []
    with pytest.raises(NotFound, match="send it from the beginning"):
        resume_token(other, "copy")


# Interruptions ---------------------------------------------------------------------------------------------


@pytest.fixture
def large(pool: nbdthin.Client) -> nbdthin.Client:
    """A pool with a snapshot, and a difference to it, of several frames each."""
    chance = random.Random(7)
    pool.create("large", 64 * MiB)
    with disk(pool, "large") as each:
        each.write(MiB, chance.randbytes(24 * MiB))
        pool.snapshot("large", "large@1")
        each.write(2 * MiB, chance.randbytes(13 * MiB))
        each.zero(16 * MiB, 2 * MiB)
        each.write(50 * MiB, chance.randbytes(6 * MiB))
        pool.snapshot("large", "large@2")
    return pool


@pytest.mark.parametrize("base", [None, "large@1"])
def test_a_stream_that_breaks_off_again_and_again_arrives_in_the_end(
    large: nbdthin.Client, other: nbdthin.Client, base: str | None
) -> None:
    received(other, "large@1", sent(large, "large@1"))
    data = sent(large, "large@2", base)
    offsets = [0]
    for _ in range(20):
        with pytest.raises(Corrupt, match="nbdthin receive --resume-token copy"):
            received(other, "copy", data[: 9 * MiB])
        token = resume_token(other, "copy")
        offsets.append(int(token.rpartition(".")[2]))
        output = io.BytesIO()
        resume(large, token, output)
        data = output.getvalue()
        if len(data) < 9 * MiB:
            break
    assert offsets == sorted(set(offsets)) and len(offsets) > 2
    received(other, "copy", data)
    same(large, "large@2", other, "copy")
    assert names(other) == ["copy", "large@1"]


def test_a_difference_does_not_go_on_where_another_stream_broke_off(
    large: nbdthin.Client, other: nbdthin.Client
) -> None:
    with pytest.raises(Corrupt):
        received(other, "copy", sent(large, "large@1")[: 9 * MiB])
    token = resume_token(other, "copy")
    identity, _, rest = token.partition(".")
    output = io.BytesIO()
    sent(large, "large@2")
    resume(large, f"{large.show('large@2').labels[LABEL]}.{rest}", output)
    with pytest.raises(Invalid, match="of another snapshot"):
        received(other, "copy", output.getvalue())
    output = io.BytesIO()
    resume(large, f"{identity}..4096", output)
    with pytest.raises(Invalid, match="goes on at byte 4096, but"):
        received(other, "copy", output.getvalue())
    with pytest.raises(NotFound, match="send it from the beginning"):
        received(other, "elsewhere", output.getvalue())
    assert resume_token(other, "copy") == token


def test_a_stream_from_the_beginning_replaces_what_broke_off(large: nbdthin.Client, other: nbdthin.Client) -> None:
    whole = sent(large, "large@1")
    with pytest.raises(Corrupt):
        received(other, "copy", whole[: 9 * MiB])
    received(other, "copy", whole)
    same(large, "large@1", other, "copy")
    assert names(other) == ["copy"]


def test_what_is_being_received_is_left_alone_by_another_who_receives(
    large: nbdthin.Client, other: nbdthin.Client, there: Daemon
) -> None:
    whole = sent(large, "large@1")

    class Interrupting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 9 * MiB and not self.seen:
                self.seen = True
                with there.connect() as third, pytest.raises(InUse):
                    received(third, "copy", whole)
            return super().read(size)

        seen = False

    source = Interrupting(whole)
    receive(other, "copy", source)
    assert source.seen
    same(large, "large@1", other, "copy")


@pytest.mark.parametrize(
    "token", ["", "x", "..1", f"{'0' * 32}..x", f"{'0' * 32}..{'9' * 30}", f"{'0' * 31}..1", f"{'0' * 32}.x.1"]
)
def test_what_is_no_token_is_refused(pool: nbdthin.Client, token: str) -> None:
    with pytest.raises(Invalid, match="not a"):
        resume(pool, token, io.BytesIO())


def test_a_token_of_snapshots_that_are_gone_is_refused(large: nbdthin.Client) -> None:
    with pytest.raises(NotFound, match="has not the snapshots"):
        resume(large, f"{'0' * 32}..1", io.BytesIO())


def test_a_write_that_fails_is_not_counted_as_come(tmp_path: Path, large: nbdthin.Client) -> None:
    """The pipeline hears of it later: what was written after it must not become the place to go on from."""
    whole = sent(large, "large@1")
    with running(tmp_path) as daemon:
        daemon.stop()
        subprocess.run(nbdthin_command("init", tmp_path / "small", "--size", "16M"), check=True, capture_output=True)
        config = daemon.config.read_text().replace("[server]", 'no_space = "error"\nauto_extend = false\n[server]')
        daemon.config.write_text(config.replace('path = "pool"', 'path = "small"'))
        daemon.start()
        with daemon.connect() as pool:
            with pytest.raises(NoSpace):
                received(pool, "copy", whole)
            with contextlib.suppress(NotFound):
                offset = int(resume_token(pool, "copy").rpartition(".")[2])
                assert content(pool, "receiving/copy")[:offset] == content(large, "large@1")[:offset]
            assert "copy" not in names(pool)
            pool.extend("64M")
            received(pool, "copy", whole)
            same(large, "large@1", pool, "copy")


def test_the_label_of_an_identity_needs_its_place(web: nbdthin.Client, other: nbdthin.Client) -> None:
    web.label("web@1", {f"label{number}": "x" for number in range(63)})
    with pytest.raises(Invalid, match="too many labels"):
        sent(web, "web@1")
    web.label("web@1", {"label0": None})
    received(other, "copy", sent(web, "web@1"))
    same(web, "web@1", other, "copy")


def test_a_pool_that_can_keep_nothing_any_more_sends_all_the_same(
    web: nbdthin.Client, other: nbdthin.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PoolFailed("the disk refused a sync")

    with monkeypatch.context() as patch:
        patch.setattr(nbdthin.Client, "label", refuse)
        data = sent(web, "web@1")
    received(other, "copy", data)
    assert content(other, "copy") == content(web, "web@1")
    assert LABEL not in web.show("web@1").labels


def test_how_far_it_has_come_is_kept_on_the_way(
    large: nbdthin.Client, other: nbdthin.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "SAVED_EVERY", 0)
    tokens: list[str] = []

    class Looking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if "receiving/copy" in names(large_other):
                tokens.append(large_other.show("receiving/copy").labels[TOKEN])
            return super().read(size)

    large_other = other
    receive(other, "copy", Looking(sent(large, "large@1")))
    assert len(set(tokens)) > 3


# The command -----------------------------------------------------------------------------------------------


def test_a_pipe_that_is_killed_is_gone_on_with(
    large: nbdthin.Client, other: nbdthin.Client, here: Daemon, there: Daemon, tmp_path: Path
) -> None:
    send_line = [*nbdthin_command("send", "large@1"), "--socket", str(here.control)]
    receive_line = [*nbdthin_command("receive", "copy"), "--socket", str(there.control)]
    with subprocess.Popen(send_line, stdout=subprocess.PIPE) as sender:
        assert sender.stdout is not None
        with subprocess.Popen(receive_line, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as receiver:
            assert receiver.stdin is not None and receiver.stderr is not None
            receiver.stdin.write(sender.stdout.read(10 * MiB))
            sender.kill()
            receiver.stdin.close()
            line = receiver.stderr.read().decode()
            assert receiver.wait() == 1
    assert re.fullmatch(r"nbdthin: stdin at byte \d+: the stream is not whole: .*--resume-token copy\)\n", line)
    token = said(there, "receive", "copy", "--resume-token").decode().strip()
    rest = said(here, "send", "--resume", token)
    assert len(rest) < 18 * MiB
    assert said(there, "receive", "copy", stdin=rest).decode().strip() == there.uri("copy")
    same(large, "large@1", other, "copy")


def test_a_receiver_that_is_killed_is_gone_on_with(
    large: nbdthin.Client, other: nbdthin.Client, here: Daemon, there: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sent(large, "large@1")
    program = "from nbdthin.moving import receiving; receiving.SAVED_EVERY = 0; from nbdthin.cli import main; main()"
    line = [nbdthin_command()[0], "-c", program, "receive", "copy", "--socket", str(there.control)]
    with subprocess.Popen(line, stdin=subprocess.PIPE) as receiver:
        assert receiver.stdin is not None
        receiver.stdin.write(whole[: 10 * MiB])
        receiver.stdin.flush()
        while "receiving/copy" not in names(other) or resume_token(other, "copy").endswith(".0"):
            pass
        receiver.kill()
    while other.show("receiving/copy").connections:
        pass
    rest = said(here, "send", "--resume", resume_token(other, "copy"))
    assert len(rest) < len(whole)
    said(there, "receive", "copy", stdin=rest)
    same(large, "large@1", other, "copy")


def test_files_in_place_of_pipes(
    web: nbdthin.Client, other: nbdthin.Client, here: Daemon, there: Daemon, tmp_path: Path
) -> None:
    told = json.loads(said(here, "send", "web@1", "--output", tmp_path / "stream", "--json"))
    assert told["stream"] == (tmp_path / "stream").stat().st_size and told["data"] > 0
    made = json.loads(said(there, "receive", "copy", "--input", tmp_path / "stream", "--json"))
    assert made["name"] == "copy" and made["kind"] == "snapshot"
    same(web, "web@1", other, "copy")
    assert "exists already" in refused(here, "send", "web@1", "--output", tmp_path / "stream")
    assert os.listdir(tmp_path) == ["stream"]


@pytest.mark.parametrize(
    ("arguments", "said_then"),
    [
        (("send",), "say either which SNAPSHOT to send or what to --resume"),
        (("send", "web@1", "--resume", "x"), "say either"),
        (("send", "--resume", "x", "--from", "web@1"), "says itself"),
        (("send", "--resume", "x"), "not a"),
        (("send", "web@1", "--level", "20"), "not a level"),
        (("send", "web"), "is a volume"),
        (("send", "web@2", "--from", "web@1"), "never sent"),
        (("receive", "copy"), "nothing came"),
        (("receive", "copy", "--input", "nothing"), "No such file"),
        (("receive", "copy", "--resume-token"), "nothing is left"),
        (("receive", "web"), "exists already"),
    ],
)
def test_what_cannot_be_is_one_line(
    web: nbdthin.Client, here: Daemon, arguments: tuple[str, ...], said_then: str
) -> None:
    assert said_then in refused(here, *arguments)
