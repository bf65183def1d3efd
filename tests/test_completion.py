"""Completion, by the shells themselves: what stands on the line after a TAB."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdthin.cli import VERBS, make_parser
from nbdthin.cli.completion import FILES, SCRIPTS, candidates
from tests.clients.daemon import PATIENCE, Daemon, nbdthin_command
from tests.conftest import need
from tests.test_cli import said_lightly

NAMES = ("debian:12", "debian:13", "golden/base", "web", "web@before", "web@later")


@pytest.fixture(scope="module")
def daemon(served: Daemon) -> Daemon:
    """One with NAMES: volumes, and for those with an @ snapshots of web."""
    with served.connect() as pool:
        for name in NAMES:
            if "@" in name:
                pool.snapshot("web", name)
            else:
                pool.create(name, "1M")
    return served


@pytest.fixture
def environment(daemon: Daemon, tmp_path: Path) -> dict[str, str]:
    """In which `nbdthin` is this one, as installed, and finds that daemon."""
    command = tmp_path / "bin/nbdthin"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.join(nbdthin_command())} "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "NBDTHIN_SOCKET": str(daemon.control), "TERM": "dumb", "HOME": str(tmp_path)}


# -- what may come next


@pytest.fixture
def asked(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDTHIN_SOCKET", str(daemon.control))


def words(*typed: str) -> list[str]:
    return [each.word for each in candidates(make_parser(), typed)]


@pytest.mark.usefixtures("asked")
def test_verbs_come_first_and_begin_as_typed() -> None:
    assert words("") == list(dict.fromkeys(name.split()[0] for name in VERBS))
    assert words("res") == ["restore", "resize", "reserve"]
    assert words("frobnicate", "") == []


@pytest.mark.usefixtures("asked")
def test_names_are_of_the_kind_that_the_verb_wants() -> None:
    assert words("rm", "") == list(NAMES)
    assert words("rm", "web", "--force", "w") == ["web@before", "web@later"], "what is named already is not named again"
    assert words("snapshot", "") == ["debian:12", "debian:13", "golden/base", "web"]
    assert words("clone", "") == ["web@before", "web@later"]
    assert words("rollback", "web", "w") == ["web@before", "web@later"]
    assert words("show", "web", "") == [], "it takes one"


@pytest.mark.usefixtures("asked")
def test_a_name_that_is_to_be_made_is_not_completed() -> None:
    for typed in (["create", ""], ["snapshot", "web", ""], ["clone", "web@later", ""], ["rename", "web", ""]):
        assert words(*typed) == []


@pytest.mark.usefixtures("asked")
def test_verbs_of_two_words_know_their_own_names_without_what_is_before_them(daemon: Daemon) -> None:
    with daemon.connect() as pool:
        pool.create("container/web", "1M")
    assert "stop" in words("container", "") and words("container", "c") == ["create"]
    assert words("container", "stop", "") == words("container", "stop", "w") == words("image", "commit", "") == ["web"]
    assert words("container", "create", "") == words("container", "create", "image", "") == []
    with daemon.connect() as pool:
        pool.remove("container/web")


@pytest.mark.usefixtures("asked")
def test_options_are_those_of_the_verb_and_take_their_values() -> None:
    assert words("rm", "--") == ["--help", "--json", "--socket", "--force", "--deferred", "--if-exists"]
    assert words("rm", "--force", "--f") == []
    assert words("ls", "--label", "a=b", "--l") == ["--label"], "it may be repeated"
    assert words("scrub", "--rate", "") == [] and words("scrub", "--rate", "1M", "gol") == ["golden/base"]
    assert words("--socket", "") == words("check", "") == words("map", "web", "--svg", "") == [FILES]
    assert words("completion", "") == list(SCRIPTS)


@pytest.mark.usefixtures("asked")
def test_the_daemon_that_is_named_on_the_line_is_asked(tmp_path: Path) -> None:
    assert words("--socket", str(tmp_path / "no"), "show", "") == []
    assert words("show", "--socket", str(tmp_path / "no"), "") == []
    assert words("show", f"--socket={tmp_path}/no", "") == []


def test_without_a_daemon_there_are_no_names_and_no_complaint(tmp_path: Path) -> None:
    done = subprocess.run(
        nbdthin_command("completion", "bash", "--socket", tmp_path / "no", "rm", ""), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_completing_a_name_loads_nothing_heavy(daemon: Daemon) -> None:
    assert said_lightly(daemon, "completion", "bash", "rm", "w") == "web\nweb@before\nweb@later\n"


# -- shells


class Terminal:
    """An interactive shell that shows its line, between marks, on ^Xp."""

    def __init__(self, environment: dict[str, str], directory: Path, *command: str) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(directory)
            os.execvpe(command[0], command, environment)
        self._seen = ""

    def run(self, line: str) -> None:
        self._send(f"{line}; echo do''ne\r")
        self._wait(r"done\r?\n")

    def completed(self, typed: str) -> str:
        """What the line is after `typed` and a TAB."""
        self._send(f"{typed}\t\x18p")
        line = self._wait(r"LINE<(.*?)>END")
        self._send("\x15")
        return line

    def _send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def _wait(self, pattern: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self._seen, re.DOTALL)) is None:
            ready, _, _ = select.select([self._fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"the shell says no more than {self._seen!r}"
            self._seen += os.read(self._fd, 65536).decode(errors="replace")
        self._seen = self._seen[found.end() :]
        return found[1] if found.re.groups else ""

    def close(self) -> None:
        os.close(self._fd)  # a hang-up
        os.waitpid(self._pid, 0)


@pytest.fixture
def bash(environment: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(environment, tmp_path, "bash", "--norc", "--noprofile", "-i")
    terminal.run("source <(nbdthin completion bash)")
    terminal.run("""bind -x '"\\C-xp": printf "LINE<%s>EN""D\\n" "$READLINE_LINE"'""")
    yield terminal
    terminal.close()


@pytest.fixture
def zsh(environment: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(environment, tmp_path, need("zsh"), "-f", "-i")
    terminal.run("autoload -Uz compinit && compinit -u -D && source <(nbdthin completion zsh)")
    terminal.run("""_line() { print -r -- "LINE<$BUFFER>EN""D" }; zle -N _line; bindkey '^Xp' _line""")
    yield terminal
    terminal.close()


LINES = {
    "nbdthin roll": "nbdthin rollback ",
    "nbdthin rm g": "nbdthin rm golden/base ",
    "nbdthin rm --fo": "nbdthin rm --force ",
    "nbdthin clone w": "nbdthin clone web@",
    "nbdthin clone web@": "nbdthin clone web@",
    "nbdthin clone web@b": "nbdthin clone web@before ",
    "nbdthin --json rm --force deb": "nbdthin --json rm --force debian:1",
    "nbdthin show debian:12": "nbdthin show debian:12 ",
    "nbdthin rollback web web@l": "nbdthin rollback web web@later ",
    "nbdthin create we": "nbdthin create we",
    "nbdthin dump so": "nbdthin dump some-pool/",
    "nbdthin map web --svg so": "nbdthin map web --svg some-pool/",
}


def test_bash_completes_verbs_options_names_and_files(bash: Terminal, tmp_path: Path) -> None:
    (tmp_path / "some-pool").mkdir()
    assert {typed: bash.completed(typed) for typed in LINES} == LINES


def test_bash_completes_where_host_names_are_no_matter(bash: Terminal) -> None:
    """@ then ends no word, as with Debian's own completions."""
    bash.run("shopt -u hostcomplete")
    assert bash.completed("nbdthin clone web@b") == "nbdthin clone web@before "


def test_bash_completes_what_the_line_is_before_the_cursor(bash: Terminal) -> None:
    assert bash.completed("nbdthin clone web@b x\x1b[D\x1b[D") == "nbdthin clone web@before x"


def test_zsh_completes_verbs_options_names_and_files(zsh: Terminal, tmp_path: Path) -> None:
    (tmp_path / "some-pool").mkdir()
    assert {typed: zsh.completed(typed) for typed in LINES} == LINES


def test_fish_completes_verbs_options_names_and_files(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "some-pool").mkdir()
    asks = "; ".join(f"echo '<{typed}'; complete -C {shlex.quote(typed)}" for typed in LINES)
    program = f"nbdthin completion fish | source; {asks}"
    done = subprocess.run(
        [need("fish"), "--no-config", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    answers = dict(part.split("\n", 1) for part in done.stdout.split("<")[1:])
    found = {typed: [line.split("\t")[0] for line in text.splitlines()] for typed, text in answers.items()}
    assert found == {
        "nbdthin roll": ["rollback"],
        "nbdthin rm g": ["golden/base"],
        "nbdthin rm --fo": ["--force"],
        "nbdthin clone w": ["web@before", "web@later"],
        "nbdthin clone web@": ["web@before", "web@later"],
        "nbdthin clone web@b": ["web@before"],
        "nbdthin --json rm --force deb": ["debian:12", "debian:13"],
        "nbdthin show debian:12": ["debian:12"],
        "nbdthin rollback web web@l": ["web@later"],
        "nbdthin create we": [],
        "nbdthin dump so": ["some-pool/"],
        "nbdthin map web --svg so": ["some-pool/"],
    }
    assert "rollback\tmake a volume what a snapshot is" in done.stdout
