"""The kernel's own nbd driver, in a guest of tools/vm: the client that volumes are made for."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nbdthin.units import MiB
from tests.clients import libnbd
from tests.clients.daemon import Daemon, nbdthin_command
from tests.conftest import need

HERE = Path(__file__).parent
RUN = HERE.parents[1] / "tools/vm/run.sh"
PROGRAMS = ("qemu-system-x86_64", "busybox", "nbd-client", "cpio", "modprobe", "unxz", "mkfs.ext4", "mkfs.xfs")

pytestmark = [pytest.mark.guest, pytest.mark.slow]


def run_guest(daemon: Daemon, script: Path, **variables: str | int) -> str:
    """Run a guest script against a daemon; its `host WORDS` are verbs of nbdthin. Returns the console."""
    for program in PROGRAMS:
        need(program)
    hook = shlex.join(nbdthin_command("--socket", daemon.control))
    options = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
    command = [str(RUN), "--hook", hook, *options, str(daemon.port), str(script)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as guest:
        try:
            console = guest.communicate()[0].decode(errors="replace")
        finally:
            guest.terminate()  # nothing to do unless this test was interrupted: run.sh then ends QEMU
    assert guest.returncode == 0, f"status {guest.returncode}\n{console}"
    return console


@pytest.mark.parametrize(("kind", "block_size"), [("ext4", 512), ("xfs", 4096)])
def test_the_kernel_formats_mounts_trims_and_checks_a_volume_its_snapshot_and_its_clone(
    kind: str, block_size: int, daemon: Daemon
) -> None:
    daemon.create("disk", "1 GiB")
    console = run_guest(daemon, HERE / "guest/disk.sh", KIND=kind, BLOCK_SIZE=block_size)
    assert "127.0.0.1" in console.split("@@ HOST rm disk:")[1].splitlines()[0], "who holds the disk"
    full, trimmed = (int(used) for used in re.findall(r'"data_used": (\d+)', console))
    assert full - trimmed >= 45 * MiB
    with daemon.connect() as control:
        rows = {row.name: row for row in control.list()}
    assert rows["clone"].parent == rows["disk"].parent == "disk@load"
    assert not any(row.connections for row in rows.values())
    with libnbd.connected(daemon.uri("clone")) as handle:
        assert handle.pread(4096, 0) != bytes(4096)
