"""The build backend: setuptools' own, and with NBDTHIN_COMPILE=1 in the environment a wheel with a compiled data path.

    pip install .                       every module as it is in the tree, on any machine
    NBDTHIN_COMPILE=1 pip install .     COMPILED by mypyc, for this Python on this machine
    tools/compile                       the same for this checkout, in .venv/compiled (`building.py DIRECTORY`)

Nothing is compiled in the tree: what an extension module's file holds there would go on being imported whatever became
of the source beside it. Both kinds of package have every .py file; tracebacks show lines of them.

mypyc takes types for what they say. So that it sees those that `mypy` sees, it gets all that the modules import.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# What a request runs through, from the socket to the data file: by names of modules.
COMPILED = (
    "nbdthin.connection",
    "nbdthin.lent",
    "nbdthin.outbox",
    "nbdthin.polling",
    "nbdthin.pool.allocator",
    "nbdthin.pool.crowd",
    "nbdthin.pool.data",
    "nbdthin.pool.journal",
    "nbdthin.pool.layers",
    "nbdthin.pool.live",
    "nbdthin.pool.livevolume",
    "nbdthin.pool.pool",
    "nbdthin.pool.readers",
    "nbdthin.pool.records",
    "nbdthin.pool.threads",
    "nbdthin.pool.unsynced",
    "nbdthin.pool.volume",
    "nbdthin.pool.volumemap",
    "nbdthin.ways",
)
_LIBRARY = "nbdthin.compiled"  # all are in nbdthin/compiled__mypyc.*.so; the files beside the sources lead there
_LENIENT = ("--no-warn-unused-ignores", "--no-warn-return-any")  # other versions of libraries may have other types
_SOURCES = ("nbdthin", "tools/building.py", "pyproject.toml", "README.md", "LICENSE")

_TREE = Path(__file__).parents[1]
_JOBS = len(os.sched_getaffinity(0))
_Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    with _copy({}):
        requires: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    if not _is_asked_to_compile():
        return requires
    need_compiler()
    project = tomllib.loads((_TREE / "pyproject.toml").read_text())["project"]
    return [*requires, *project["dependencies"], *project["optional-dependencies"]["compile"]]


def build_wheel(wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None) -> str:
    wheel_directory = os.path.abspath(wheel_directory)
    metadata_directory = metadata_directory and os.path.abspath(metadata_directory)
    with _compiling() if _is_asked_to_compile() else _copy({}):
        name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


def build_sdist(sdist_directory: str, config_settings: _Settings = None) -> str:
    """With this module in it: nothing could be built of it otherwise."""
    sdist_directory = os.path.abspath(sdist_directory)
    with _copy({"MANIFEST.in": "include tools/building.py\n"}):
        name: str = build_meta.build_sdist(sdist_directory, config_settings)
    return name


def compile_into(directory: Path) -> None:
    """The package as a wheel has it, compiled. What is said meanwhile goes to stdout and stderr."""
    arguments = ["--quiet", "build", "--build-lib", str(directory.absolute())]
    with _compiling():
        set_up(script_name="setup.py", script_args=arguments)


def _is_asked_to_compile() -> bool:
    return os.environ.get("NBDTHIN_COMPILE", "0") not in ("", "0")


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    need_compiler()
    with _copy({"setup.py": "import building\n\nbuilding.set_up()\n"}):
        yield


@contextlib.contextmanager
def _copy(more: Mapping[str, str]) -> Iterator[None]:
    """Be in a copy of the tree that has `more` files: setuptools leaves in a tree what it was built of."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="nbdthin-build.") as directory:
        for name in _SOURCES:
            source, target = _TREE / name, Path(directory, name)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(source, target)
        for name, text in more.items():
            Path(directory, name).write_text(text)
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(before)


def need_compiler() -> None:
    """Ends the process with a line on what to do; pip shows it, without a traceback."""
    command = [*shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC")), "-fsyntax-only", "-x", "c", "-"]
    command.append(f"-I{sysconfig.get_path('include')}")
    try:
        subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit("nbdthin cannot be compiled: that needs a C compiler and Python.h (apt-get install gcc python3-dev)")


def set_up(**more: Any) -> None:
    """What a setup.py would do. mypyc's own files go to ./build."""
    from mypyc.build import mypycify

    # As one C file, which mypyc's default is, this took gcc three times as long, and was no faster then.
    extensions: list[Any] = mypycify(
        [*_LENIENT, *(f"{name.replace('.', '/')}.py" for name in COMPILED)],
        group_name=_LIBRARY,
        multi_file=True,
        opt_level="2",
        debug_level="0",
    )
    for extension in extensions:
        extension.include_dirs.append("build/nbdthin")  # where a dot in the library's name takes its header
        # No warnings: nobody wrote this C, and another compiler has others. Hidden: calls between the files are direct.
        extension.extra_compile_args += ["-w", "-fvisibility=hidden"]
    options = {"build_ext": {"parallel": str(_JOBS)}}
    setuptools.setup(ext_modules=extensions, cmdclass={"build_ext": _BuildExt}, options=options, **more)


class _BuildExt(build_ext):
    """Compiles files side by side: setuptools does so with extensions, and nearly all is in one of them."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile

        def compile_each(sources: Sequence[str], **arguments: Any) -> list[str]:
            largest_first = sorted(sources, key=os.path.getsize, reverse=True)
            with ThreadPoolExecutor(_JOBS) as threads:
                objects = list(threads.map(lambda source: compile_all([source], **arguments), largest_first))
            return [each for (each,) in objects]

        self.compiler.compile = compile_each
        super().build_extensions()


if __name__ == "__main__":
    compile_into(Path(sys.argv[1]))
