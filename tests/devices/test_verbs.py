"""The verbs of devices, and doctor, as users and scripts run them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import nbdthin
from nbdthin.cli import devices as verbs
from nbdthin.devices import doctor, kernel
from tests.clients.daemon import Daemon, nbdthin_command
from tests.conftest import need, need_root
from tests.devices.conftest import make_file_system
from tests.test_cli import onto_a_full_disk, refused, said, start


def test_a_session(pool: nbdthin.Client, served: Daemon, tmp_path: Path) -> None:
    make_file_system(pool, "v")
    device = said(served, "attach", "v").strip()
    assert Path(device).is_block_device()
    assert said(None, "devices").splitlines() == [
        "NAME  PATH        WAY   ACCESS       MOUNTED ON",
        f"v     {device}  loop  read, write  -",
    ]
    assert refused(served, "attach", "v").startswith(f"'v' is attached already: {device}")
    assert said(None, "detach", device) == ""
    assert said(served, "mount", "v", tmp_path, "-o", "noatime,nodev", "-o", "nosuid") == ""
    (tmp_path / "file").touch()
    assert said(None, "umount", tmp_path) == ""
    said(served, "snapshot", "v", "v@1")
    said(None, "mount", served.uri("v@1"), tmp_path, "--read-only")
    assert (tmp_path / "file").exists()
    said(None, "umount", "v@1")
    assert said(None, "attach", "--cleanup") == ""


@pytest.mark.parametrize("before", [True, False])
def test_every_verb_prints_json(pool: nbdthin.Client, served: Daemon, tmp_path: Path, before: bool) -> None:
    make_file_system(pool, "v")
    seen = set()
    for verb, *arguments in (
        ("attach", "v"),
        ("devices",),
        ("detach", "v"),
        ("mount", "v", str(tmp_path)),
        ("umount", str(tmp_path)),
        ("attach", "--cleanup"),
        ("doctor",),
    ):
        daemon = served if verb in ("attach", "mount", "doctor") else None
        words = ["--json", verb, *arguments] if before else [verb, *arguments, "--json"]
        assert json.loads(said(daemon, *words)) is not None
        seen.add(verb)
    assert seen == verbs.VERBS.keys()


def test_no_verb_hides_that_its_output_went_nowhere(pool: nbdthin.Client, served: Daemon, tmp_path: Path) -> None:
    make_file_system(pool, "v")
    uses = (("attach", "v"), ("devices",), ("detach", "v"), ("mount", "v", tmp_path), ("umount", "v"), ("doctor",))
    assert {verb for verb, *_ in uses} == verbs.VERBS.keys()
    for verb, *arguments in uses:
        assert onto_a_full_disk(served, "--json", verb, *arguments) == (
            1,
            "nbdthin: cannot write output: No space left on device\n",
        )


def test_wrong_usage_is_one_line(served: Daemon) -> None:
    assert refused(served, "attach") == "attach what? (nbdthin attach NAME; nbdthin attach --cleanup)"
    assert refused(served, "attach", "v", "--cleanup") == "attach --cleanup takes no name: it looks at everything"
    assert refused(served, "attach", "none").startswith("no volume or snapshot 'none'")
    assert refused(None, "detach", "none") == "'none' is not attached (`nbdthin devices` lists what is)"
    assert refused(None, "umount", "/none") == "'/none' is not mounted (`nbdthin devices` lists what is)"


def test_who_is_not_root_is_told_what_to_do(served: Daemon) -> None:
    need_root()
    as_nobody = [need("setpriv"), "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    command = [*as_nobody, *nbdthin_command("attach", "nbd://127.0.0.1/v")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nbdthin: only root can attach devices and mount; without it: nbdfuse")


# -- doctor


def test_doctor_says_which_way_is_used_and_tries_the_pools_file_system(served: Daemon) -> None:
    need_root()
    lines = said(served, "doctor").splitlines()
    assert lines[-1] == f"attach uses {verbs.WAYS['nbd' if kernel.available() else 'loop']}"
    subjects = [line[4:].split(":")[0] for line in lines[:-1]]
    assert {"nbd module", "pyroute2", "fuse", "nbdfuse", "loop", "memlock"} <= set(subjects)
    assert any(line.startswith("ok  hole punching:") and str(served.pool) in line for line in lines)
    assert any(line.startswith("ok  RWF_NOWAIT:") for line in lines)


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernel, "MODULE", tmp_path / "none")
    need_root()
    diagnosis = doctor.diagnose(None)
    assert diagnosis.way is None
    assert doctor.Fact("nbdfuse", False, "not installed", "apt-get install libnbd-bin fuse3") in diagnosis.facts
    done = start(None, "doctor")
    assert done.status == 1
    assert done.errors == "nbdthin: nothing can be attached here: what says NO above is in the way\n"
    assert all(fact.advice for fact in diagnosis.facts if not fact.good)
