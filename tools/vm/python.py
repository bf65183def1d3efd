"""Collect, in the directory ROOT, what a guest needs to run `nbdthin attach` and its watcher with this Python.

    PYTHON tools/vm/python.py ROOT

It imports what they import and copies what has been loaded by then, with the shared libraries below it: 400 files of a
distribution's many thousands, because a guest unpacks them at every boot. Prints the environment that they need there.
Everything is compiled in a way that asks for no times, as an initramfs keeps none.
"""

from __future__ import annotations

import importlib
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
MODULES = (
    "nbdthin.devices.watch",
    "nbdthin.devices.netlink",
    "nbdthin.devices.doctor",
    "encodings.idna",  # of host names
)
HOME = "/python"  # of what is not the standard library


def main(root: Path) -> None:
    sys.path.insert(0, str(TOP))
    for name in MODULES:
        importlib.import_module(name)
    from nbdthin.cli import make_parser

    make_parser()
    files = [str(TOP / "nbdthin/__main__.py")]  # which would run
    for name, module in list(sys.modules.items()):
        if name != "__main__" and (file := getattr(module, "__file__", None)):
            files.append(file)
    for source in map(Path, files):
        target = put(source, root, place(source))
        if target.suffix == ".py":
            py_compile.compile(
                str(target),
                dfile=place(source),
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
    put(Path(sys.executable).resolve(), root, "/bin/python3")
    for binary in (sys.executable, *(file for file in files if ".so" in file)):
        libraries = subprocess.run(["ldd", binary], capture_output=True, text=True).stdout
        for library in re.findall(r"(/\S+) \(0x", libraries):
            put(Path(library), root, library)
    print(f"export PYTHONHOME={sys.base_prefix} PYTHONPATH={HOME}")


def place(file: Path) -> str:
    """Where it is in the guest: the standard library is where it is here."""
    if file.is_relative_to(sys.base_prefix) and "site-packages" not in file.parts and "dist-packages" not in file.parts:
        return str(file)
    entry = max((entry for entry in sys.path if file.is_relative_to(entry)), key=len)
    return f"{HOME}/{file.relative_to(entry)}"


def put(source: Path, root: Path, path: str) -> Path:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target


if __name__ == "__main__":
    main(Path(sys.argv[1]))
