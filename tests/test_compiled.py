"""The compiled data path: what tools/compile makes passes the tests unchanged, and wheels are what pip installs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from building import COMPILED, need_compiler

from .clients.daemon import Daemon, run, running
from .conftest import missing, need

pytestmark = pytest.mark.slow
TOP = Path(__file__).parent.parent
COMPILE = TOP / "tools/compile"
HISTORIES = ("merge_with_copies", "deferred", "trim")
FILES = {
    "tests": ("nbd", "server", "outbox", "live", "full", "deferred", "scrub"),
    "tests/pool": ("model", "pool", "layers", "volume", "merge", "unsynced", "journal", "faults", "full"),
    "tests/clients": ("kill", "shutdown"),
}
TESTS = (
    "tests/wire",
    *(f"{directory}/test_{name}.py" for directory, names in FILES.items() for name in names),
    *(f"tests/test_simulate.py::test_a_cut_at_any_call_of_a_history_loses_nothing[{name}]" for name in HISTORIES),
)
STUFF = os.urandom(3 << 20)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        need_compiler()
    except SystemExit as error:
        missing(str(error))


@pytest.fixture(scope="module")
def compiled(compiler: None) -> Path:
    run(COMPILE)
    return Path(run(COMPILE, "--where").strip())


def test_protocol_model_and_crash_tests_pass_unchanged(compiled: Path) -> None:
    """conftest.py sees there that the data path is compiled, and leaves out what replaces parts of it."""
    environment = os.environ | {"PYTHONPATH": str(compiled), "PYTHONSAFEPATH": "1"}
    # A test that is left out half-way leaves its sockets open.
    options = ["-q", "-rs", "--import-mode=append", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    command = [sys.executable, "-m", "pytest", *options, *TESTS]
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert "compiled: nothing can take the place of DataFile." in done.stdout, "it was not compiled"
    print(done.stdout)


def test_a_daemon_says_that_it_is_compiled(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for path, is_compiled in ((compiled, True), (TOP, False)):
        monkeypatch.setenv("PYTHONPATH", str(path))
        directory = tmp_path / path.name
        directory.mkdir()
        with running(directory) as daemon, daemon.connect() as pool:
            assert pool.info().process.compiled == is_compiled


def test_what_is_compiled_already_is_not_compiled_again(compiled: Path) -> None:
    done = subprocess.run([COMPILE], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_without_a_compiler_one_line_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TOP / "tools/building.py", tmp_path / "made"],
        env=os.environ | {"CC": str(tmp_path / "no-compiler")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "made").exists()
    assert done.stderr == (
        "nbdthin cannot be compiled: that needs a C compiler and Python.h (apt-get install gcc python3-dev)\n"
    )


def wheel(directory: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(TOP)]
    subprocess.run(command, env=os.environ | environment, check=True)
    (made,) = directory.iterdir()
    return made


def names(made: Path) -> set[str]:
    with zipfile.ZipFile(made) as archive:
        return set(archive.namelist())


def test_a_wheel_is_for_any_machine_unless_it_was_asked_to_be_compiled(tmp_path: Path) -> None:
    made = wheel(tmp_path, NBDTHIN_COMPILE="0")
    assert made.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(made) if name.endswith(".so")]


def test_a_compiled_wheel_serves_in_a_fresh_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wheel(tmp_path / "wheels", NBDTHIN_COMPILE="1")
    assert {"nbdthin/connection.py", "nbdthin/py.typed", "nbdthin/pool/FORMAT.md"} < names(made)
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh/bin/python"
    run(python, "-m", "pip", "install", "--quiet", made)

    monkeypatch.setattr(sys, "executable", str(python))  # which daemons are started with
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "stuff").write_bytes(STUFF)
    daemon = Daemon(tmp_path)
    try:
        daemon.start()
        uri = daemon.create("v", len(STUFF))
        run(need("nbdcopy"), tmp_path / "stuff", uri)
        daemon.snapshot("v", "v@1")
        daemon.kill()
        daemon.start()
        run("nbdcopy", daemon.uri("v@1"), tmp_path / "read")
        with daemon.connect() as pool:
            assert pool.info().process.compiled
    finally:
        daemon.close()
    assert (tmp_path / "read").read_bytes() == STUFF


def _walk(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        yield from ast.walk(node)


@pytest.mark.parametrize("module", COMPILED)
def test_compiled_code_waits_in_no_handler_and_leaves_no_generator_to_be_made_a_list(module: str) -> None:
    """mypyc keeps an error current while a handler waits: any other coroutine may raise it then. And what a generator
    expression yields it makes all at once, but for the functions that it knows.
    """
    known = {"all", "any", "dict", "list", "max", "min", "next", "set", "sorted", "sum", "tuple"}
    tree = ast.parse((TOP / f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            inside = _walk([*node.handlers, *node.finalbody])
            assert not [each.lineno for each in inside if isinstance(each, ast.Await | ast.AsyncFor | ast.AsyncWith)]
        elif isinstance(node, ast.Call) and any(isinstance(each, ast.GeneratorExp) for each in node.args):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert name in known | {"extend", "fromkeys", "join", "update"}, f"{module}, line {node.lineno}"
