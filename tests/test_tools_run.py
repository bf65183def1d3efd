"""tools/run as a new user runs it: a fresh copy, an empty home, Debian's Python, a terminal."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone would hold, and a port that nobody else uses."""
    top = tmp_path_factory.mktemp("fresh") / "nbdthin"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=TOP, text=True).split("\0"):
        if name and (TOP / name).exists():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, top / name)
    config = top / "exports.toml"
    config.write_text(config.read_text().replace(":10809", ":0"))
    (top.parent / "home").mkdir()
    return top


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, top: Path, command: list[str]) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(top)
            kept = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
            kept |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
            os.execve(
                command[0], command, kept | {"HOME": str(top.parent / "home"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
            )
        self.shown = ""

    def read_until(self, text: str) -> None:
        while text not in self.shown:
            part = self._read()
            assert part, f"{text!r} was never shown:\n{self.shown}"

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def end(self) -> int:
        while self._read():
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> str:
        try:
            part = os.read(self._terminal, 65536).decode()
        except OSError:  # that is how a terminal ends
            part = ""
        self.shown += part
        return part


@pytest.mark.slow
def test_it_serves_a_volume_says_how_to_attach_and_ends_with_ctrl_c(fresh: Path) -> None:
    first = Terminal(fresh, ["/bin/bash", "tools/run"])
    first.read_until("Ctrl-C ends it.")
    uri = f"nbd+unix:///demo?socket={fresh}/var/nbd.sock"
    assert f"    {uri}\r\n" in first.shown
    assert f"    nbd-client -unix {fresh}/var/nbd.sock /dev/nbd0 -N demo -C 4\r\n" in first.shown
    listed = subprocess.check_output([fresh / ".venv/bin/nbdthin", "ls"], cwd=fresh, text=True)
    assert listed.splitlines()[1].startswith("demo  volume  10 GiB")

    second = Terminal(fresh, ["/bin/bash", "tools/run"])
    assert second.end() == 1
    assert "another process listens there" in second.shown and "making .venv" not in second.shown

    first.type(b"\x03")
    assert first.end() == 0
    assert "Traceback" not in first.shown
    assert [path.name for path in (fresh / "var").iterdir()] == ["pool"]

    again = Terminal(fresh, ["/bin/bash", "tools/run"])
    again.read_until("Ctrl-C ends it.")
    again.type(b"\x03")
    assert again.end() == 0
    assert "making .venv" not in again.shown and "made the pool" not in again.shown


@pytest.mark.slow
def test_a_python_that_is_too_old_is_named(fresh: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    # Debian's Python, but for the version that it tells.
    old.write_text('#!/bin/sh\nexec /usr/bin/python3 -c "import sys; sys.version_info = (3, 9, 2); $2"\n')
    old.chmod(0o755)
    shutil.copytree(fresh / "tools", tmp_path / "nbdthin/tools")
    done = subprocess.run(
        [tmp_path / "nbdthin/tools/_venv"], env=os.environ | {"PYTHON": str(old)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and not (tmp_path / "nbdthin/.venv").exists()
    assert done.stderr == (
        f"tools/_venv: {old} is Python 3.9.2, nbdthin needs 3.11 or later (PYTHON=python3.12 names another one)\n"
    )
