"""Containers: clones of an image, started and stopped, kept as new images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from nbdthin.images import base, committing, containers, loading, store
from nbdthin.images.store import Catalogue
from nbdthin.units import GiB, KiB, MiB
from tests.clients import libnbd
from tests.clients.daemon import PATIENCE, Daemon, run
from tests.clients.hostmount import check_file_system, wait_until
from tests.conftest import need, need_root
from tests.images.made import file, layout
from tests.images.trees import directory, make_tar

SYSTEM = make_tar(directory("etc"), file("etc/name", "system\n"), file("etc/old", "old\n"), directory("srv"))
KINDS = ("ext4", "xfs")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def system(tmp_path: Path, pool: nbdthin.Client) -> str:
    """An image, and its tag."""
    return loaded(tmp_path, pool, "ext4")


def loaded(tmp_path: Path, pool: nbdthin.Client, kind: str) -> str:
    need_root()
    base.create(pool, "base", kind, "512 MiB")
    loading.load(pool, layout(tmp_path / "system", {"1": [SYSTEM]}), on="base")
    return "system:1"


def found(pool: nbdthin.Client, name: str) -> containers.Container:
    (container,) = [each for each in containers.containers(pool) if each.name == name]
    return container


# -- creating


def test_a_thousand_containers_are_one_commit_and_no_data_block(
    system: str, daemon: Daemon, pool: nbdthin.Client
) -> None:
    used, before = daemon.data_used(), pool.info().pool.sequence
    names = [f"web/{number}" for number in range(1000)]
    assert containers.create(pool, system, *names) == [f"container/{name}" for name in names]
    assert pool.info().pool.sequence == before + 1
    assert daemon.data_used() == used
    assert {each.name for each in containers.containers(pool)} == set(names)
    containers.remove(pool, *names)
    assert containers.containers(pool) == []


def test_of_several_containers_all_are_made_or_none(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "b")
    with pytest.raises(nbdthin.Exists, match="container/b"):
        containers.create(pool, system, "a", "b")
    assert [each.name for each in containers.containers(pool)] == ["b"]
    with pytest.raises(nbdthin.NotFound, match="no image 'other'"):
        containers.create(pool, "other", "c")
    with pytest.raises(nbdthin.NotFound, match="no container 'c'"):
        containers.start(pool, "c")


# -- starting and stopping


def test_a_container_keeps_what_is_written_to_it_and_the_image_stays(
    kind: str, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    loaded(tmp_path, pool, kind)
    containers.create(pool, "system:1", "a", "b")
    root = containers.start(pool, "a")
    assert (root / "etc/name").read_text() == "system\n"
    (root / "etc/name").write_text("a\n")
    assert (found(pool, "a").state, found(pool, "b").state) == ("started", "stopped")
    assert found(pool, "a").root == root
    containers.stop(pool, "a")
    assert not root.exists()
    assert (found(pool, "a").state, found(pool, "a").connections) == ("stopped", ())
    for name, content in (("a", "a\n"), ("b", "system\n")):
        root = containers.start(pool, name, tmp_path)
        assert root == tmp_path
        assert (root / "etc/name").read_text() == content
        containers.stop(pool, name)
        check_file_system(daemon.uri(f"container/{name}"), kind)


def test_starting_twice_and_stopping_twice_change_nothing(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "a")
    root = containers.start(pool, "a")
    assert containers.start(pool, "a") == root
    containers.stop(pool, "a")
    containers.stop(pool, "a")
    assert found(pool, "a").root is None


def test_a_container_that_is_mounted_with_options_is_started(
    system: str, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    """With `discard` it gives back the space of a removed file by itself."""
    containers.create(pool, system, "a")
    root = tmp_path / "root"
    root.mkdir()
    devices.mount(pool, "container/a", root, options=["discard"])
    assert containers.start(pool, "a") == root
    (root / "srv/big").write_bytes(os.urandom(32 * MiB))
    run("sync", "-f", root)
    full = daemon.data_used()
    (root / "srv/big").unlink()
    run("sync", "-f", root)
    wait_until(lambda: daemon.data_used() < full - 31 * MiB, "the file's space has come back")
    containers.stop(pool, "a")


def test_a_container_is_started_with_options_of_mount(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "a")
    root = containers.start(pool, "a", options=["nosuid", "noatime"])
    (options,) = [line.split()[3] for line in Path("/proc/mounts").read_text().splitlines() if f" {root} " in line]
    assert {"nosuid", "noatime"} <= set(options.split(","))
    containers.stop(pool, "a")


def test_names_with_slashes_have_roots_of_their_own(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "a", "a/b")
    roots = [containers.start(pool, name) for name in ("a", "a/b")]
    assert len({root.parent for root in roots}) == 1
    containers.stop(pool, "a", "a/b")


def test_a_container_with_a_process_in_it_is_not_stopped(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "a")
    root = containers.start(pool, "a")
    with subprocess.Popen(["sleep", "1000"], cwd=root / "etc") as process:
        try:
            with pytest.raises(nbdthin.InUse):
                containers.stop(pool, "a")
            with pytest.raises(nbdthin.InUse):
                containers.remove(pool, "a", force=True)
            assert found(pool, "a").root == root
        finally:
            process.kill()
    containers.stop(pool, "a")


def test_a_started_container_goes_only_by_force(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "a", "b")
    containers.start(pool, "a")
    with pytest.raises(nbdthin.InUse, match="started: a "):
        containers.remove(pool, "a", "b")
    assert len(containers.containers(pool)) == 2
    containers.remove(pool, "a", "b", force=True)
    assert containers.containers(pool) == []


def test_a_container_that_others_use_is_shown_so_and_goes_only_by_force(
    system: str, daemon: Daemon, pool: nbdthin.Client
) -> None:
    containers.create(pool, system, "a")
    with libnbd.connected(daemon.uri("container/a")):
        assert found(pool, "a").state == "in use"
        with pytest.raises(nbdthin.InUse):
            containers.remove(pool, "a")
        with pytest.raises(nbdthin.InUse, match="could be caught in the middle"):
            committing.commit(pool, "a", "mine")
        containers.remove(pool, "a", force=True)
    assert containers.containers(pool) == []


# -- sizes


def test_a_container_is_larger_than_its_image_and_grows(
    kind: str, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    loaded(tmp_path, pool, kind)
    containers.create(pool, "system:1", "a", size="1 GiB")
    for size in (1, 2):
        if size == 2:
            pool.resize("container/a", 2 * GiB)
        root = containers.start(pool, "a")
        status = os.statvfs(root)
        assert 0.9 * size * GiB < status.f_blocks * status.f_frsize <= size * GiB
        assert (root / "etc/name").read_text() == "system\n"
        containers.stop(pool, "a")
        check_file_system(daemon.uri("container/a"), kind)
    with pytest.raises(nbdthin.Invalid, match="cannot be smaller"):
        containers.create(pool, "system:1", "b", size="64 MiB")
    committing.commit(pool, "a", "large:1")
    assert Catalogue.of(pool).find("large:1").file_system.size == 2 * GiB


# -- commit


def test_a_committed_container_is_an_image_and_nothing_was_copied(
    kind: str, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    loaded(tmp_path, pool, kind)
    containers.create(pool, "system:1", "a")
    root = containers.start(pool, "a")
    (root / "srv/big").write_bytes(os.urandom(32 * MiB))
    containers.stop(pool, "a")
    used = daemon.data_used()
    image = committing.commit(pool, "a", "mine:1", comment="with a big file")
    assert daemon.data_used() == used
    assert image.tags == ("mine:1",)
    assert (len(image.layers), image.parent) == (2, Catalogue.of(pool).find("system:1").id)
    newest, _ = store.history(pool, "mine:1")
    assert (newest.created_by, newest.comment, newest.layer) == (
        "nbdthin image commit a",
        "with a big file",
        image.layers[1],
    )
    assert 32 * MiB <= newest.size < 36 * MiB
    with pytest.raises(nbdthin.InUse, match="'system:1' has containers: a"):
        store.remove(pool, "system:1")
    containers.remove(pool, "a")
    with pytest.raises(nbdthin.InUse, match="'mine:1' was committed on top of 'system:1'"):
        store.remove(pool, "system:1")
    containers.create(pool, "mine:1", "b")
    root = containers.start(pool, "b")
    assert (root / "srv/big").stat().st_size == 32 * MiB
    containers.remove(pool, "b", force=True)
    store.remove(pool, "system:1", "mine:1")
    assert [row.name for row in pool.list()] == ["base/base"]


def test_a_commit_of_a_started_container_has_all_that_was_written_before_it(
    kind: str, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    """Not only what had reached the disk; and the container goes on."""
    loaded(tmp_path, pool, kind)
    containers.create(pool, "system:1", "a")
    root = containers.start(pool, "a")
    stop = threading.Event()
    written: list[int] = []

    def write() -> None:
        while not stop.is_set():
            number = len(written)
            (root / f"srv/{number}").write_text(f"{number}\n" * 500)
            written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        commits = {}
        for number in range(3):
            wait_for(written, 50 * (number + 1))
            before = list(written)
            commits[committing.commit(pool, "a", f"mine:{number}").name] = before
            wait_for(written, len(written) + 10)
    finally:
        stop.set()
        writer.join()
        containers.stop(pool, "a")
    for name, numbers in commits.items():
        check_file_system(daemon.uri(name), "ext4") if kind == "ext4" else None
        with devices.mounted(pool, name, read_only=True) as directory:
            for number in numbers:
                assert (directory / f"srv/{number}").read_text() == f"{number}\n" * 500


def wait_for(written: list[int], count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(written) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_container_goes_on_after_its_commit_from_where_it_was(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "a")
    root = containers.start(pool, "a")
    (root / "srv/one").write_text("1")
    first = committing.commit(pool, "a", "mine:1")
    (root / "srv/two").write_text("2")
    second = committing.commit(pool, "a", "mine:2")
    containers.stop(pool, "a")
    listings = []
    for image in (first, second):
        with devices.mounted(pool, image.name, read_only=True) as directory:
            listings.append(sorted(os.listdir(directory / "srv")))
    assert listings == [["one"], ["one", "two"]]
    assert (len(first.layers), len(second.layers)) == (2, 3)
    assert {first.parent, second.parent} == {Catalogue.of(pool).find(system).id}


def test_what_only_the_journal_of_a_crashed_container_has_is_in_its_diff_and_its_image(
    kind: str, tmp_path: Path, pool: nbdthin.Client
) -> None:
    loaded(tmp_path, pool, kind)
    containers.create(pool, "system:1", "a")
    root = containers.start(pool, "a")
    with (root / "srv/new").open("w") as new:
        new.write("new\n")
        new.flush()
        os.fsync(new.fileno())
    pool.snapshot("container/a", "at-the-crash")
    for name in ("b", "c"):
        pool.clone("at-the-crash", f"container/{name}", labels=pool.show("container/a").labels)
    containers.stop(pool, "a")
    assert changed(pool, "b") == [("C", "srv"), ("A", "srv/new")]
    image = committing.commit(pool, "c", "mine:1")
    with devices.mounted(pool, image.name, read_only=True) as directory:
        assert (directory / "srv/new").read_text() == "new\n"


def changed(pool: nbdthin.Client, name: str) -> list[tuple[str, str]]:
    """What `container diff` says, without the root."""
    found = [(str(change.kind), os.fsdecode(change.path)) for change in containers.diff(pool, name)]
    return [(kind, path) for kind, path in found if path]


def test_the_diff_of_a_container_is_what_docker_would_say(system: str, pool: nbdthin.Client) -> None:
    containers.create(pool, system, "a")
    assert changed(pool, "a") == []
    root = containers.start(pool, "a")
    (root / "srv/www").mkdir()
    (root / "srv/www/page").write_text("<p>")
    (root / "etc/old").unlink()
    (root / "etc/name").chmod(0o600)
    expected = [
        ("C", "etc"),
        ("C", "etc/name"),
        ("D", "etc/old"),
        ("C", "srv"),
        ("A", "srv/www"),
        ("A", "srv/www/page"),
    ]
    assert changed(pool, "a") == expected
    containers.stop(pool, "a")
    assert changed(pool, "a") == expected
    committing.commit(pool, "a", "mine")
    assert changed(pool, "a") == expected  # what it was made of stays its image


DIES_FROZEN = """
import os, pathlib, signal, sys
import nbdthin
from nbdthin.images import containers, store
with nbdthin.connect(sys.argv[1]) as pool, store.locked(pool) as lock:
    with containers.frozen(pathlib.Path(sys.argv[2]), lock):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_container_goes_on_when_what_froze_it_is_killed(
    kind: str, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    loaded(tmp_path, pool, kind)
    containers.create(pool, "system:1", "a")
    root = containers.start(pool, "a")
    killed = subprocess.run([sys.executable, "-c", DIES_FROZEN, daemon.control, root])
    assert killed.returncode == -signal.SIGKILL
    with store.locked(pool):  # nobody has it before the file system is thawed
        subprocess.run(["touch", root / "srv/thawed"], check=True, timeout=PATIENCE)
    containers.stop(pool, "a")


# -- running


def test_programs_run_in_a_started_container(tmp_path: Path, pool: nbdthin.Client) -> None:
    need_root()
    busybox = Path(need("busybox")).read_bytes()
    tools = make_tar(directory("bin"), file("bin/busybox", busybox, 0o755))
    base.create(pool, size="256 MiB")
    loading.load(pool, layout(tmp_path / "tools", {"1": [SYSTEM, tools]}))
    containers.create(pool, "tools:1", "a")
    root = containers.start(pool, "a")
    try:
        script = "busybox cat /etc/name; echo ran > /srv/ran; busybox rm /etc/old"
        assert run(need("chroot"), root, "/bin/busybox", "sh", "-c", f"PATH=/bin; {script}") == "system\n"
        assert (root / "srv/ran").read_text() == "ran\n"
    finally:
        containers.stop(pool, "a")
    assert found(pool, "a").exclusive < 512 * KiB
