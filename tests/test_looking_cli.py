"""explain, map, du and what show says of a mapping: over the control socket, as people and as programs see it."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Generator
from pathlib import Path
from xml.etree import ElementTree

import pytest

import nbdthin
from nbdthin import drawing
from nbdthin.control import looking
from nbdthin.pool.pool import Pool
from nbdthin.pool.views import Cell, Map, Owner
from nbdthin.units import GiB, KiB, MiB
from tests import rawclient
from tests.clients.daemon import Daemon
from tests.test_cli import as_json, on_terminal, refused, said

BLOCK = 64 * KiB
SUB = 4 * KiB


@pytest.fixture
def daemon(served: Daemon) -> Daemon:
    """One with web, 1 GiB, on the snapshot base: 20 blocks at its start, four of them web's own, and a bit far off."""
    with served.connect() as pool:
        pool.remove(*pool.names(), force=True)  # a connection's end may not have been seen yet
        pool.create("os", GiB)
    write(served, "os", 0, 20 * BLOCK)
    with served.connect() as pool:
        pool.snapshot("os", "base")
        pool.clone("base", "web")
    write(served, "web", 4 * BLOCK, 4 * BLOCK)
    write(served, "web", 900 * MiB, SUB)
    return served


def write(daemon: Daemon, name: str, offset: int, length: int) -> None:
    client = rawclient.Client(daemon.socket, name)
    client.write(offset, bytes([1]) * length)
    client.close()


# -- explain


def explained(daemon: Daemon, *arguments: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in said(daemon, "explain", *arguments).splitlines())


def test_a_byte_is_explained_line_by_line(daemon: Daemon) -> None:
    facts = explained(daemon, "web", "0x44f")
    physical = int(facts["Physical"].split()[1].rstrip(","))
    assert facts["Read"] == f"web 0x44f -> base, block {physical:#x}"
    assert facts["Logical"] == "block 0, subblock 0 of 16"
    assert facts["State"] == "data of base, layer 2 of 2"
    assert facts["Way"] == "web has nothing -> base has data"
    assert facts["Physical"] == f"block {physical}, byte {physical * BLOCK + 0x44F} of {daemon.pool}/data"
    assert facts["Write"] == "of 4096 bytes at 0 takes new blocks (1) and writes to them (subblocks: 1)"
    assert "read from there first" in facts["Write of less"]


def test_what_reads_as_zero_says_why(daemon: Daemon) -> None:
    client = rawclient.Client(daemon.socket, "web")
    assert client.call(rawclient.TRIM, BLOCK, BLOCK) == 0
    client.close()
    assert explained(daemon, "web", str(BLOCK))["State"] == "zero, trimmed or zeroed in web, layer 1 of 2"
    facts = explained(daemon, "web", "500M")
    assert facts["State"] == "never written: reads as zero (layers in the chain: 2)"
    assert facts["Read"] == "web 0x1f400000 -> zeroes" and "Physical" not in facts


def test_what_a_write_of_some_length_does_is_told_in_parts(daemon: Daemon) -> None:
    write = explained(daemon, "web", str(7 * BLOCK + 5), "--length", "64K")["Write"]
    assert write == (
        "of 65536 bytes at 458757 reads 4091 bytes of what it covers in part, overwrites in place (subblocks: 16), "
        "takes new blocks (1) and writes to them (subblocks: 1)"
    )
    write = explained(daemon, "web", "900M", "--length", "8K")["Write"]
    assert write.endswith("overwrites in place (subblocks: 1), goes into blocks that are there (subblocks: 1)")


def test_a_write_that_is_refused_says_by_what(daemon: Daemon) -> None:
    with daemon.connect() as pool:
        pool.create("golden/one", "1M")
        pool.quota("web", 5 * BLOCK)
    assert "it is a snapshot" in explained(daemon, "base", "0")["Write"]
    assert "a rule in exports.toml makes it read-only" in explained(daemon, "golden/one", "0")["Write"]
    assert "'web' is at its quota of 320 KiB" in explained(daemon, "web", "0")["Write"]
    assert "is refused" not in explained(daemon, "web", "900M")["Write"], "in place"


def test_only_bytes_that_are_there_are_explained(daemon: Daemon) -> None:
    assert "there is no byte 1073741824" in refused(daemon, "explain", "web", "1G")
    assert "not an offset: '0xno'" in refused(daemon, "explain", "web", "0xno")
    assert "not a size: 'no'" in refused(daemon, "explain", "web", "no")
    assert "no volume or snapshot 'no'" in refused(daemon, "explain", "no", "0")
    assert "a write there has 1 to" in refused(daemon, "explain", "web", "0", "--length", "0")


def test_a_long_way_is_told_at_both_ends(daemon: Daemon) -> None:
    with daemon.connect() as pool, pool.batch():
        for number in range(40):
            pool.snapshot("web", f"web@{number}")
    way = explained(daemon, "web", "0")["Way"].split(" -> ")
    assert (way[0], way[6], way[-1]) == ("web has nothing", "30 more have nothing", "base has data")
    seen = as_json(daemon, "explain", "web", "0")
    assert isinstance(seen, dict) and len(seen["layers"]) == 42 and seen["depth"] == 41


# -- map


def test_a_map_is_text_where_there_is_no_terminal(daemon: Daemon) -> None:
    first, scale, *picture = said(daemon, "map", "web").splitlines()
    assert first == (
        "web: 1.25 MiB of 1 GiB hold data, the last ends at 900 MiB; 4 runs in the data file, 321 KiB on average"
    )
    assert scale == "each character is 1 MiB"
    lines, table = picture[:16], picture[16:]
    assert [len(line) for line in lines] == [64] * 16
    assert "".join(lines) == "Aa" + "." * 898 + "b" + "." * 123
    assert [re.split(r"\s{2,}", line.strip()) for line in table] == [
        ["OWNER", "DATA", "SHARE", "RUNS", "AVERAGE RUN"],
        ["B", "web", "260 KiB", "20.2 %", "2", "130 KiB"],
        ["A", "base", "1 MiB", "79.8 %", "2", "512 KiB"],
    ]


def test_a_map_is_drawn_in_colours_on_a_terminal(daemon: Daemon) -> None:
    shown = on_terminal(daemon, "map", "web", columns=80)
    assert "\x1b[" in shown and "█" in shown and "░" in shown and "·" in shown
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "█ base  █ web" in text and "AVERAGE RUN" in text
    lines = [line.strip() for line in text.splitlines() if "·" in line]
    assert {len(line) for line in lines[:-1]} == {80}


def test_a_map_as_svg_stands_by_itself(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "web.svg"
    assert "each character" not in said(daemon, "map", "web", "--svg", path), "the picture is in the file"
    text = path.read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "it loads nothing"
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "base: 1 MiB, 2 runs" in words and "web: 260 KiB, 2 runs" in words
    drawn = [element for element in root.iter("{http://www.w3.org/2000/svg}rect") if element.get("fill-opacity")]
    titles = [title.text or "" for element in drawn for title in element]
    assert "from byte 943718400 on: 4 KiB of data, most of web" in titles
    assert "No such file" in refused(daemon, "map", "web", "--svg", tmp_path / "no/web.svg")


def test_whatever_a_name_holds_is_no_markup() -> None:
    owners = tuple(Owner(number, f"<&\"{number}'>", 100 - number, 1) for number in range(40))
    cells = tuple(Cell(number, 4096) for number in range(40))
    shown = Map("<&>", "volume", 40 * 4096, 40 * 4096, 40 * 4096, 40, owners, 4096, cells)
    root = ElementTree.fromstring(drawing.svg(shown))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert f"<&\"7'>: {100 - 7} B, 1 runs" in words
    assert words[-1] == "32 more: 2.39 KiB", "beyond the colours that can be told apart"


def test_the_map_of_a_program_has_all_that_is_drawn(daemon: Daemon) -> None:
    shown = as_json(daemon, "map", "web")
    assert isinstance(shown, dict)
    assert (shown["data"], shown["highest"], shown["runs"]) == (20 * BLOCK + SUB, 900 * MiB + SUB, 4)
    assert [(owner["name"], owner["data"]) for owner in shown["owners"]] == [
        ("web", 4 * BLOCK + SUB),
        ("base", 16 * BLOCK),
    ]
    assert len(shown["cells"]) == 4096 and shown["cell"] == GiB // 4096
    assert shown["cells"][:5] == [
        {"owner": 1, "data": 256 * KiB},
        {"owner": 0, "data": 256 * KiB},
        *[{"owner": 1, "data": 256 * KiB}] * 3,
    ]


def test_show_says_what_dm_thin_says(daemon: Daemon) -> None:
    text = said(daemon, "show", "web")
    assert f"Mapped: 1.25 MiB ({20 * BLOCK + SUB} bytes)\n" in text
    assert f"Highest mapped: 900 MiB ({900 * MiB + SUB} bytes)\n" in text
    assert "Runs: 4 in the data file\n" in text


def test_info_says_what_must_stay_free(daemon: Daemon) -> None:
    assert "bytes), for new volumes and clones\n" in said(daemon, "info")
    with daemon.connect() as pool:
        info = pool.info().pool
    assert info.min_free == int(0.1 * (info.data_used + info.data_available))


# -- du


def test_du_adds_what_removing_all_of_it_frees(daemon: Daemon) -> None:
    lines = said(daemon, "du", "os", "base").splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "base", "os", "removing"]
    assert lines[-1] == "removing all of these frees 256 KiB (262144 bytes) of 1.56 MiB in use"
    assert said(daemon, "du", "web").splitlines()[-1].startswith("removing this frees 320 KiB ")
    lines = said(daemon, "du").splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["base", "os", "web"]
    assert lines[-1] == "removing all of these frees 1.56 MiB (1638400 bytes) of 1.56 MiB in use"


def test_what_du_promised_comes_back(daemon: Daemon) -> None:
    with daemon.connect() as pool:
        promised, before = pool.du("os", "base").freed, pool.info().pool.data_used
        pool.remove("os", "base", force=True)
        while pool.info().pool.merging:
            pass
        assert before - pool.info().pool.data_used == promised


def test_du_of_an_empty_pool_is_nothing(daemon: Daemon) -> None:
    with daemon.connect() as pool:
        pool.remove(*pool.names(), force=True)
    use = as_json(daemon, "du")
    assert isinstance(use, dict) and (use["rows"], use["freed"]) == ([], 0)
    assert said(daemon, "du").splitlines()[0].split()[0] == "NAME"


# -- from Python


def test_names_are_told_by_kind_and_beginning(daemon: Daemon) -> None:
    with daemon.connect() as pool:
        assert pool.names() == ["base", "os", "web"]
        assert pool.names("b") == pool.names(kind="snapshot") == ["base"]
        assert pool.names("w", "snapshot") == []
        with pytest.raises(nbdthin.Invalid, match="not 'image'"):
            pool.names(kind="image")


def test_an_asyncio_client_is_told_the_same(daemon: Daemon) -> None:
    async def ask() -> list[object]:
        async with await nbdthin.connect_async(daemon.control) as pool:
            explanation = dataclasses.replace(await pool.explain("web", "1M", "8K"), checksum=False)
            return [explanation, await pool.map("web", 7), await pool.du("web"), await pool.names("o")]

    with daemon.connect() as pool:
        # Its checksum may be computed between the two.
        explanation = dataclasses.replace(pool.explain("web", MiB, 8192), checksum=False)
        told = [explanation, pool.map("web", 7), pool.du("web"), pool.names("o")]
    assert asyncio.run(ask()) == told


def test_a_pool_without_a_daemon_says_the_same(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.connect() as pool:
        shown, freed, seen = pool.map("web", 64), pool.du("os", "base").freed, pool.explain("web", 5)
    daemon.stop()
    try:
        with Pool.open(daemon.pool) as own:
            assert (own.map("web", 64), own.du("os", "base").freed) == (shown, freed)
            # In between its checksum may have been computed.
            assert dataclasses.replace(own.explain("web", 5), checksum=False) == dataclasses.replace(
                seen, checksum=False
            )
    finally:
        daemon.start()


def test_long_answers_let_the_loop_turn() -> None:
    """One that takes many turns' time gives others many turns."""

    def steps() -> Generator[None, None, None]:
        for _ in range(50):
            started = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - started < 2 * looking.TURN:
                pass
            yield

    async def ask() -> int:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.ensure_future(count())
        await looking._in_turns(steps())
        counting.cancel()
        return turns

    assert asyncio.run(ask()) >= 49
