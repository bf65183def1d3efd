"""The service files, and the daemon under a service manager: sockets handed over, states told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdthin
from nbdthin import config
from nbdthin.addresses import UnixAddress
from nbdthin.daemon import CONTROL_FD
from tests import rawclient
from tests.clients.daemon import CONFIG, HAND_OVER, free_port, handing_over, nbdthin_command
from tests.conftest import missing, need

UNITS = Path(__file__).parent.parent / "systemd"


def test_systemd_accepts_the_units() -> None:
    units = [str(UNITS / name) for name in ("nbdthin.service", "nbdthin.socket", "nbdthin-control.socket")]
    done = subprocess.run([need("systemd-analyze"), "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_service_keeps_to_its_directories() -> None:
    service = (UNITS / "nbdthin.service").read_text()
    served = config.load(UNITS / "exports.toml")
    assert "--config /etc/nbdthin/exports.toml" in service
    assert "StateDirectory=nbdthin\n" in service and served.pool.path == Path("/var/lib/nbdthin/pool")
    assert "RuntimeDirectory=nbdthin\n" in service and served.control.socket == Path("/run/nbdthin/control.sock")
    assert served.server.listen == ()
    control = (UNITS / "nbdthin-control.socket").read_text()
    assert f"\nFileDescriptorName={CONTROL_FD}\n" in control and "\nService=nbdthin.service\n" in control
    assert "\nListenStream=/run/nbdthin/" not in control, "the service's directory goes with it"


@contextlib.contextmanager
def manager(directory: Path) -> Iterator[socket.socket]:
    """What a service manager listens to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(directory / "notify"))
        yield channel


def test_the_manager_is_told_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text(CONFIG.format(size=100, port=free_port()))
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with manager(tmp_path) as channel:
        process = subprocess.Popen(nbdthin_command("serve", "--config", tmp_path / "exports.toml"), env=environment)
        assert channel.recv(100) == b"READY=1"
        with nbdthin.connect(tmp_path / "control.sock") as pool:
            assert pool.list() == []
        process.terminate()
        assert channel.recv(100) == b"STOPPING=1"
        assert process.wait() == 0


def test_a_refused_start_tells_no_readiness(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text("[server]\nlisten = []")
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with manager(tmp_path) as channel:
        command = nbdthin_command("serve", "--config", tmp_path / "exports.toml")
        assert subprocess.run(command, env=environment, capture_output=True).returncode == 1
        channel.setblocking(False)
        with pytest.raises(BlockingIOError):
            channel.recv(100)


def test_a_socket_that_systemd_opened_is_served_and_stays(tmp_path: Path) -> None:
    need("systemd-analyze")
    activate = shutil.which("systemd-socket-activate") or missing("systemd-socket-activate is missing")
    (tmp_path / "exports.toml").write_text("[server]\nlisten = []\n[control]\nsocket = 'control.sock'")
    nbd = tmp_path / "nbd.sock"
    listen = [f"--listen={nbd}", "--fdname=nbd", "--setenv=PYTHONPATH"]
    command = [activate, *listen, *nbdthin_command("serve", "--config", tmp_path / "exports.toml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Listening on"):
                break
        # The first connection starts the daemon; it waits in the queue until it is served.
        drain = threading.Thread(target=process.stderr.read)
        first = rawclient.Client(nbd)
        drain.start()
        assert first.receive(18)[:16] == b"NBDMAGICIHAVEOPT"
        with nbdthin.connect(tmp_path / "control.sock") as pool:
            pool.create("a", "1 MiB")
            row, info = pool.show("a"), pool.info()
        assert info.listen == (f"unix:{nbd}",) and row.uri == UnixAddress(nbd).uri("a")
        client = rawclient.Client(nbd, "a")
        assert client.write(0, b"x" * 512) == 0
        client.close()
        first.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        drain.join()
    assert nbd.exists() and not (tmp_path / "control.sock").exists()


def test_a_control_socket_may_be_handed_over_too(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text(CONFIG.format(size=100, port=free_port()))
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "handed"))
        control.listen()
        serve = nbdthin_command("serve", "--config", tmp_path / "exports.toml")
        process = subprocess.Popen([*handing_over({"control": control}), *serve], pass_fds=[control.fileno()])
    with nbdthin.connect(tmp_path / "handed") as pool:
        assert pool.info().listen[0] == f"unix:{tmp_path}/nbd.sock"
    process.terminate()
    assert process.wait() == 0
    assert (tmp_path / "handed").exists() and not (tmp_path / "control.sock").exists()


def test_a_control_client_starts_the_daemon_and_both_sockets_outlive_it(tmp_path: Path) -> None:
    need("systemd-analyze")
    activate = shutil.which("systemd-socket-activate") or missing("systemd-socket-activate is missing")
    (tmp_path / "exports.toml").write_text('[control]\nsocket = "unused.sock"')
    nbd, control = tmp_path / "nbd.sock", tmp_path / "control.sock"
    listen = [f"--listen={nbd}", f"--listen={control}", "--fdname=nbd:control", "--setenv=PYTHONPATH"]
    command = [activate, *listen, *nbdthin_command("serve", "--json", "--config", tmp_path / "exports.toml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        listening = 0
        while listening < 2:
            listening += process.stderr.readline().startswith("Listening on")
        said: list[str] = []
        stderr = process.stderr
        drain = threading.Thread(target=lambda: said.append(stderr.read()))
        drain.start()
        with nbdthin.connect(control) as pool:  # it waits in the queue for the daemon that it starts
            pool.create("a", "1 MiB")
            assert pool.info().listen == (f"unix:{nbd}",)
        process.send_signal(signal.SIGTERM)
        ready = json.loads(process.stdout.read())
        assert process.wait() == 0
        drain.join()
    assert ready["control"] == str(control) and f"; control at {control}\n" in said[0]
    assert nbd.exists() and control.exists() and not (tmp_path / "unused.sock").exists()


@pytest.mark.parametrize("kind", ["tcp", "datagram", "deaf", "file", "two"])
def test_what_cannot_be_the_control_socket_is_refused_in_a_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "exports.toml").write_text(CONFIG.format(size=100, port=free_port()))
    with contextlib.ExitStack() as stack:
        family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
        sockets = [
            stack.enter_context(socket.socket(family, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM))
            for _ in range(2 if kind == "two" else 1)
        ]
        for number, each in enumerate(sockets):
            each.bind(("127.0.0.1", 0) if kind == "tcp" else str(tmp_path / f"handed{number}"))
            if kind not in ("datagram", "deaf"):
                each.listen()
        fds = [each.fileno() for each in sockets]
        if kind == "file":
            fds = [stack.enter_context(open(tmp_path / "exports.toml")).fileno()]
        hand_over = [sys.executable, "-c", HAND_OVER, ":".join(["control"] * len(fds)), ",".join(map(str, fds))]
        command = [*hand_over, *nbdthin_command("serve", "--config", tmp_path / "exports.toml")]
        done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("nbdthin: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "pool").exists()


def test_sockets_for_another_process_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "exports.toml").write_text(CONFIG.format(size=100, port=free_port()))
    environment = os.environ | {"LISTEN_PID": "1", "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")}
    with manager(tmp_path) as channel:
        process = subprocess.Popen(nbdthin_command("serve", "--config", tmp_path / "exports.toml"), env=environment)
        assert channel.recv(100) == b"READY=1"
        with nbdthin.connect(tmp_path / "control.sock") as pool:
            assert len(pool.info().listen) == 2
        process.terminate()
        assert process.wait() == 0
