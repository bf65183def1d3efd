"""What can be asked must be documented: these fail when a verb, command, key or attribute is not."""

from __future__ import annotations

import argparse
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import nbdthin
from nbdthin import cli, config, errors
from nbdthin.control import rows
from nbdthin.control.client import AsyncClient, Changes, Client
from nbdthin.control.codec import MAX_FRAME, VERSION
from nbdthin.control.commands import COMMANDS
from nbdthin.pool import commands as pool_commands
from nbdthin.pool import views

TOP = Path(__file__).parent.parent
CLI = (TOP / "docs/cli.md").read_text()
PYTHON = (TOP / "docs/python.md").read_text()
DEVICEMAPPER = (TOP / "docs/devicemapper.md").read_text()
KEYS = {
    "pool": config.PoolConfig,
    "server": config.ServerConfig,
    "control": config.ControlConfig,
    "scrub": config.ScrubConfig,
    "export": config.ExportRule,
}


def section(title: str) -> str:
    """What stands under a heading of cli.md."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", CLI, re.DOTALL | re.MULTILINE)
    assert found is not None, f"docs/cli.md has no heading {title!r}"
    return found[1]


def words(text: str) -> set[str]:
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_documented_with_its_arguments(verb: str) -> None:
    text = section(f"nbdthin {verb}")
    usage = next(line for line in text.splitlines() if line.startswith("    "))
    assert usage.startswith(f"    nbdthin {verb}")
    parser = argparse.ArgumentParser(add_help=False)
    cli.VERBS[verb].arguments(parser)
    for action in parser._actions:
        shown = action.option_strings[-1] if action.option_strings else str(action.metavar)
        assert shown in usage, f"{shown} is not in the usage of {verb}"


def test_no_verb_is_documented_that_does_not_exist() -> None:
    assert set(re.findall(r"^### nbdthin ([\w -]+)$", CLI, re.MULTILINE)) == set(cli.VERBS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_control_command_is_documented_with_its_arguments(command: str) -> None:
    row = next(line for line in section("The control protocol").splitlines() if line.startswith(f"| `{command}` |"))
    arguments = words(row.split("|")[2])
    for field in dataclasses.fields(COMMANDS[command].arguments):
        assert field.name in arguments


def test_the_control_protocol_is_described_as_it_is() -> None:
    text = section("The control protocol")
    assert f'"version": {VERSION}' in text and f"{MAX_FRAME >> 20} MiB" in text
    assert {*errors.BY_CODE, errors.Error.code} <= words(text)


@pytest.mark.parametrize("table", KEYS)
def test_every_config_key_is_documented_and_in_the_example(table: str) -> None:
    keys = {field.name for field in dataclasses.fields(KEYS[table])}
    header = f"[[{table}]]" if table == "export" else f"[{table}]"
    documented = set(re.findall(rf"`{re.escape(header)} (\w+)`", section("exports.toml")))
    assert documented == keys
    example = re.sub(r"^# (\w+ = )", r"\1", (TOP / "exports.toml").read_text(), flags=re.MULTILINE)
    values = tomllib.loads(example)[table]
    assert (values[0] if table == "export" else values).keys() == keys


def test_every_public_name_is_documented() -> None:
    assert {name for name in nbdthin.__all__ if name not in words(PYTHON)} == set()


@pytest.mark.parametrize("kind", [Changes, Client, AsyncClient])
def test_every_method_is_documented(kind: type) -> None:
    methods = {name for name in vars(kind) if not name.startswith("_")}
    assert {name for name in methods if f"`{name}(" not in PYTHON} == set()


def test_pools_and_daemons_have_the_same_verbs() -> None:
    changes = {name for name in vars(Changes) if not name.startswith("_")}
    assert {
        name
        for name in changes | {"batch", "list", "show", "diff", "explain", "map", "du", "info"}
        if not hasattr(nbdthin.Pool, name)
    } == set()


@pytest.mark.parametrize(
    "kind",
    [
        *(nbdthin.Row, nbdthin.Export, nbdthin.Node, nbdthin.Extent),
        *(nbdthin.Explanation, views.Look, views.WritePlan, nbdthin.Map, views.Owner, views.Cell, nbdthin.DiskUse),
        *(nbdthin.Info, nbdthin.PoolInfo, rows.ProcessFacts, rows.LoopFacts, rows.DiskFacts),
    ],
)
def test_every_attribute_is_documented(kind: type) -> None:
    assert {field.name for field in dataclasses.fields(kind) if field.name not in words(PYTHON)} == set()


def test_the_limits_are_those_of_the_pool() -> None:
    assert f"up to {pool_commands.MAX_LABELS}, text of up to {pool_commands.MAX_LABEL} bytes" in CLI


def rows_of_devicemapper() -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in DEVICEMAPPER.splitlines() if re.match(r"\| [FP]\d+ \|", line)]


def test_each_row_of_devicemapper_is_answered_once_and_with_tests() -> None:
    rows = rows_of_devicemapper()
    assert [row[0] for row in rows] == [f"F{n}" for n in range(1, 91)] + [f"P{n}" for n in range(1, 16)]
    for row in rows:
        assert row[2] in ("same", "better", "less", "not applicable"), row
        assert len(row) == 5 or (len(row) == 4 and row[2] == "not applicable"), f"no test shows it: {row}"


def test_every_test_that_devicemapper_names_is_there() -> None:
    for row in rows_of_devicemapper():
        for name in row[4].split() if len(row) > 4 else ():
            found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", name)
            assert found is not None, f"not the name of a test: {name}"
            text = (TOP / found[1]).read_text()
            assert re.search(rf"^(async )?def {found[2]}\(", text, re.MULTILINE), f"there is no {name}"


def test_devicemapper_knows_the_options_and_the_keys_by_their_names() -> None:
    keys = re.findall(r"`\[+(\w+)\]+ (\w+)", DEVICEMAPPER)
    assert keys
    for table, key in keys:
        assert key in {field.name for field in dataclasses.fields(KEYS[table])}, key
    options = re.findall(r"`(?!lvconvert)([a-z][a-z -]*?) (--[a-z-]+)`", DEVICEMAPPER)
    assert options
    for verb, option in options:
        parser = argparse.ArgumentParser(add_help=False)
        cli.VERBS[verb].arguments(parser)
        assert option in parser._option_string_actions, f"{verb} has no {option}"


def test_the_options_and_fields_of_docker_are_all_answered() -> None:
    def rows(title: str) -> list[str]:
        text = DEVICEMAPPER.split(f"\n### {title}\n")[1].split("\n#")[0]
        return re.findall(r"^\| (.+?) \| .+ \|$", text, re.MULTILINE)[1:]

    assert (len(set(rows("The options"))), len(set(rows("The fields of docker info")))) == (23, 20)
    assert sum(len(row.split(", ")) for row in rows("The tools")) == 13


def anchors(page: Path) -> set[str]:
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (TOP / "docs").glob("*.md"))])
def test_every_link_leads_somewhere(page: str) -> None:
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (TOP / page).read_text()):
        target = (TOP / page).parent / file if file else TOP / page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"
