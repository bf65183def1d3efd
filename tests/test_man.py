"""Man pages: made by tools/man as users make them, read by both programs that read man pages."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from nbdthin.cli import VERBS
from tests.conftest import need
from tests.test_docs import KEYS, TOP, section

MAKE = TOP / "tools/man"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    done = subprocess.run([MAKE, directory], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return directory


def shown(page: Path) -> str:
    """A page as it is read, in one line."""
    text = subprocess.run(
        [need("mandoc"), "-T", "ascii", "-O", "width=1000", page], capture_output=True, text=True, check=True
    ).stdout
    return " ".join(re.sub(".\x08", "", text).split())


def page(made: Path, verb: str) -> Path:
    return made / f"man1/nbdthin-{verb.replace(' ', '-')}.1"


def test_every_verb_has_a_page_and_nothing_else_does(made: Path) -> None:
    pages = {made / "man1/nbdthin.1", *(page(made, verb) for verb in VERBS), made / "man5/nbdthin-exports.toml.5"}
    assert set(made.rglob("*.*")) == pages


def test_who_reads_man_pages_has_nothing_to_say_against_them(made: Path) -> None:
    pages = sorted(made.rglob("*.[15]"))
    lint = subprocess.run([need("mandoc"), "-T", "lint", "-W", "warning", *pages], capture_output=True, text=True)
    assert (lint.returncode, lint.stdout) == (0, "")
    man = [need("man"), "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", *map(str, pages)]
    done = subprocess.run(man, capture_output=True, text=True, env={**os.environ, "MANWIDTH": "80"})
    assert (done.returncode, done.stderr) == (0, "")


def test_man_finds_them_and_knows_what_they_are_about(made: Path) -> None:
    for name in ("nbdthin", "nbdthin-rm", "nbdthin-exports.toml"):
        found = subprocess.run([need("man"), "-M", made, "-w", name], capture_output=True, text=True)
        assert Path(found.stdout.strip()).is_relative_to(made), found.stderr
    done = subprocess.run(["lexgrog", page(made, "rm")], capture_output=True, text=True)
    assert f'"nbdthin-rm - {VERBS["rm"].doc}"' in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_says_what_the_documentation_says_and_every_option(made: Path, verb: str) -> None:
    text = shown(page(made, verb))
    usage, _, rest = section(f"nbdthin {verb}").strip("\n").partition("\n\n")
    assert " ".join(usage.split()) in text
    for option in re.findall(r"--[\w-]+", usage):
        assert option in text.partition("OPTIONS")[2]
    for part in rest.split("\n\n"):
        if part and part[0] not in " |`-":
            for piece in re.split(r"\[([^]]*)\]\([^)]*\)", part):  # at links
                assert " ".join(re.sub(r"[`*]", "", piece).split()) in text


def test_the_pages_of_the_whole_name_every_verb_and_key(made: Path) -> None:
    text = shown(made / "man1/nbdthin.1")
    assert all(f"nbdthin-{verb.replace(' ', '-')}(1) {doc.doc}" in text for verb, doc in VERBS.items())
    text = shown(made / "man5/nbdthin-exports.toml.5")
    for table, kind in KEYS.items():
        for key in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            assert f"[{table}] {key} " in text.replace("[[export]]", "[export]")


def test_the_same_sources_make_the_same_pages(made: Path, tmp_path: Path) -> None:
    subprocess.run([MAKE, tmp_path], check=True)
    for one in made.rglob("*.[15]"):
        assert one.read_text() == (tmp_path / one.relative_to(made)).read_text()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run([MAKE, tmp_path / "file"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"tools/man: {tmp_path}/file/man1: Not a directory\n")
