"""An import from dm-thin through a daemon: metadata by thin_restore and thin_dump, data in a file."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nbdthin import nbd
from nbdthin.errors import Corrupt, Error, Exists, Invalid, NoSpace
from nbdthin.moving import thin
from nbdthin.units import GiB, KiB, MiB
from tests.clients.daemon import Daemon, nbdthin_command, run, run_json, running
from tests.conftest import need
from tests.moving.conftest import Stop
from tests.moving.thinpool import ThinPool

BLOCK = 64 * KiB
BLOCKS = 64  # of the thin pool


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path) as daemon:
        yield daemon


class OldPool:
    """A thin pool whose blocks have been written: what each device reads as is known."""

    def __init__(self, directory: Path, block_size: int = BLOCK) -> None:
        self.metadata, self.data = directory / "pool.xml", directory / "pool.data"
        self.block_size = block_size
        self.pool = ThinPool()
        self.content: dict[int, bytes] = {}  # of physical blocks

    def write(self, number: int, block: int, content: bytes) -> None:
        """Whole blocks, so that nothing depends on what dm-thin copies."""
        self.pool.write(number, block)
        self.content[self.pool.devices[number][block][0]] = content

    def finish(self) -> None:
        """Through real metadata: what thin_dump says is read."""
        made, metadata = self.metadata.with_suffix(".made"), self.metadata.with_suffix(".bin")
        made.write_text(self.pool.xml(self.block_size, BLOCKS))
        metadata.write_bytes(bytes(4 * MiB))
        run(need("thin_restore"), "-i", made, "-o", metadata)
        self.metadata.write_text(run(need("thin_dump"), metadata))
        with self.data.open("wb") as file:
            for physical in range(BLOCKS):  # what no device maps is not to be seen
                file.write(self.content.get(physical, b"\xdb" * self.block_size))

    def reads_as(self, number: int, size: int) -> bytes:
        device = self.pool.devices[number]
        whole = b"".join(
            self.content[device[block][0]] if block in device else bytes(self.block_size)
            for block in range(-(-size // self.block_size))
        )
        return whole[:size]

    @property
    def used(self) -> set[int]:
        return {physical for device in self.pool.devices.values() for physical, _ in device.values()}


def content_of(daemon: Daemon, name: str) -> bytes:
    with nbd.connect(daemon.uri(name)) as disk:
        return bytes(disk.read(0, disk.size))


def import_thin(daemon: Daemon, old: OldPool, *options: str) -> dict[str, object]:
    base = nbdthin_command("--json", "--socket", daemon.control)
    result = run_json(*base, "import-thin", "--metadata", old.metadata, "--data", old.data, *options)
    assert isinstance(result, dict)
    return result


def refused(daemon: Daemon, old: OldPool, *options: str) -> str:
    """The one line of a verb that fails."""
    command = nbdthin_command("--socket", daemon.control, "import-thin", "--metadata", old.metadata, "--data", old.data)
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    with daemon.connect() as pool:
        assert pool.list() == []
    return done.stderr


def lived(old: OldPool, seed: int) -> OldPool:
    """A pool with a history: writes, snapshots of snapshots, discards, deletions, an independent device."""
    chance = random.Random(seed)
    pool = old.pool
    pool.create(0)
    for number in range(1, 12):
        for _ in range(6):
            among = chance.choice(sorted(pool.devices))
            old.write(among, chance.randrange(10), chance.randbytes(old.block_size))
        pool.snapshot(chance.choice(sorted(pool.devices)), number)
        pool.discard(chance.choice(sorted(pool.devices)), chance.randrange(10))
        if number % 4 == 0:
            pool.delete(chance.choice(sorted(pool.devices)))
    pool.create(99)
    old.write(99, 3, chance.randbytes(old.block_size))
    old.finish()
    return old


@pytest.mark.parametrize(("block_size", "seed"), [(BLOCK, 1), (BLOCK, 2), (192 * KiB, 3), (MiB, 4)])
def test_every_device_reads_as_it_did_and_takes_what_it_took(
    block_size: int, seed: int, tmp_path: Path, daemon: Daemon
) -> None:
    old = lived(OldPool(tmp_path, block_size), seed)
    size = 10 * block_size
    sizes = [f"--size={number}={size}" for number in old.pool.devices]
    result = import_thin(daemon, old, *sizes)
    with daemon.connect() as pool:
        assert {row.name: row.size for row in pool.list()} == {f"thin/{number}": size for number in old.pool.devices}
    for number in old.pool.devices:
        assert content_of(daemon, f"thin/{number}") == old.reads_as(number, size), f"device {number}"
    assert daemon.data_used() == len(old.used) * block_size
    totals = result["totals"]
    assert isinstance(totals, dict)
    assert totals["distinct"] == totals["stored"] == len(old.used) * block_size and totals["unshared"] == 0
    assert totals["mapped"] == sum(map(len, old.pool.devices.values())) * block_size > totals["distinct"]


def test_what_was_shared_stays_so_when_devices_are_removed(tmp_path: Path, daemon: Daemon) -> None:
    old = OldPool(tmp_path)
    old.pool.create(0)
    for block in range(8):
        old.write(0, block, random.Random(block).randbytes(BLOCK))
    for number in (1, 2):
        old.pool.snapshot(0, number)
        old.write(0, number, b"\1" * BLOCK)
    old.finish()
    import_thin(daemon, old)
    with daemon.connect() as pool:
        pool.remove("thin/0", "thin/2")
    assert content_of(daemon, "thin/1") == old.reads_as(1, 8 * BLOCK)
    with daemon.connect() as pool:
        while pool.info().pool.layers > 1:  # merged in the background
            time.sleep(0.01)
        assert pool.show("thin/1").exclusive == 8 * BLOCK == pool.info().pool.data_used
    assert content_of(daemon, "thin/1") == old.reads_as(1, 8 * BLOCK)


def test_zeroes_become_holes_also_over_what_they_have_overwritten(tmp_path: Path, daemon: Daemon) -> None:
    old = OldPool(tmp_path, 256 * KiB)
    old.pool.create(0)
    data = random.Random(1).randbytes(256 * KiB)
    old.write(0, 0, data)
    old.write(0, 1, data[:BLOCK] + bytes(2 * BLOCK) + data[:BLOCK])
    old.write(0, 2, data)
    old.pool.snapshot(0, 1)
    old.pool.snapshot(0, 2)
    old.write(1, 0, bytes(256 * KiB))
    old.write(1, 2, bytes(3 * BLOCK) + data[:BLOCK])
    old.pool.discard(1, 1)
    old.finish()
    import_thin(daemon, old)
    for number in range(3):
        assert content_of(daemon, f"thin/{number}") == old.reads_as(number, 3 * 256 * KiB)
    assert daemon.data_used() == (4 + 2 + 4 + 1) * BLOCK


def test_devices_of_other_sizes_share_too(tmp_path: Path, daemon: Daemon) -> None:
    old = OldPool(tmp_path)
    old.pool.create(0)
    for block in range(6):
        old.write(0, block, bytes([block + 1]) * BLOCK)
    for number in (1, 2, 3):
        old.pool.snapshot(0, number)
    for block in range(3, 6):
        old.pool.discard(1, block)
    old.write(2, 9, b"\xff" * BLOCK)
    old.finish()
    sizes = {0: 6 * BLOCK, 1: 3 * BLOCK - 4096, 2: 32 * MiB, 3: 5 * BLOCK + 4096}
    import_thin(daemon, old, *(f"--size={number}={size}" for number, size in sizes.items()))
    for number, size in sizes.items():
        with daemon.connect() as pool:
            assert pool.show(f"thin/{number}").size == size
        part = content_of(daemon, f"thin/{number}")[: 20 * BLOCK]
        assert part == old.reads_as(number, min(size, 20 * BLOCK)), f"device {number}"
    assert daemon.data_used() == 7 * BLOCK
    with daemon.connect() as pool:
        pool.resize("thin/1", 6 * BLOCK)
    assert content_of(daemon, "thin/1")[3 * BLOCK - 4096 :] == bytes(3 * BLOCK + 4096)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (("mkfs.ext4", "-q", "-F", "{}"), 200 * MiB),
        (("mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "^64bit", "{}"), 201 * MiB),
        (("mkfs.xfs", "-q", "{}"), 400 * MiB),
    ],
)
def test_the_file_system_says_how_large_a_device_is(
    make: tuple[str, ...], size: int, tmp_path: Path, daemon: Daemon
) -> None:
    need(make[0])
    old = OldPool(tmp_path)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(size)
    run(*(word.format(image) for word in make))
    old.pool.create(0)
    with image.open("rb") as file:
        for block in range(40):  # its end is not mapped
            if any(content := file.read(BLOCK)):
                old.write(0, block, content)
    old.finish()
    import_thin(daemon, old)
    with daemon.connect() as pool:
        assert pool.show("thin/0").size == size


def test_a_partition_table_says_how_large_a_device_is(tmp_path: Path) -> None:
    old = OldPool(tmp_path)
    old.pool.create(0)
    header = b"EFI PART" + bytes(24) + (2 * GiB // 512 - 1).to_bytes(8, "little")
    old.write(0, 0, bytes(512) + header + bytes(BLOCK - 512 - len(header)))
    old.finish()
    with thin.survey(str(old.metadata), str(old.data)) as found:
        assert [volume.size for volume in found.volumes] == [2 * GiB]


def small(tmp_path: Path) -> OldPool:
    """Three devices: 7, a snapshot of it, 8, and 9, that is empty."""
    old = OldPool(tmp_path)
    old.pool.create(7)
    for block in range(40):
        old.write(7, block, bytes([block + 1]) * BLOCK)
    old.pool.snapshot(7, 8)
    old.write(7, 5, b"\xee" * BLOCK)
    old.pool.create(9)
    old.finish()
    return old


def test_devices_get_the_names_and_sizes_that_are_given(tmp_path: Path, daemon: Daemon) -> None:
    old = small(tmp_path)
    import_thin(daemon, old, "--name", "8=web@before", "--prefix", "vg.", "--size", "9=1 GiB", "--size", "7=3M")
    with daemon.connect() as pool:
        sizes = {row.name: row.size for row in pool.list()}
    assert sizes == {"vg.7": 3 * MiB, "web@before": 40 * BLOCK, "vg.9": GiB}


def test_dockers_metadata_give_names_and_sizes_and_say_what_is_deleted(tmp_path: Path, daemon: Daemon) -> None:
    old = small(tmp_path)
    docker = tmp_path / "metadata"
    docker.mkdir()
    row = {"device_id": 7, "size": 10 * GiB, "transaction_id": 1, "initialized": True, "deleted": False}
    (docker / "base").write_text(json.dumps(row))
    (docker / "0123abcd-init").write_text(json.dumps({**row, "device_id": 8}))
    (docker / "4567").write_text(json.dumps({**row, "device_id": 9, "deleted": True}))
    (docker / "89ab").write_text(json.dumps({**row, "device_id": 1000}))
    (docker / "deviceset-metadata").write_text('{"next_device_id":10,"BaseDeviceUUID":"x"}')
    (docker / "transaction-metadata").write_text('{"open_transaction_id":3,"device_hash":"x","device_id":9}')
    import_thin(daemon, old, "--docker", str(docker), "--prefix", "docker/")
    with daemon.connect() as pool:
        sizes = {row.name: row.size for row in pool.list()}
    assert sizes == {"docker/base": 10 * GiB, "docker/0123abcd-init": 10 * GiB}
    (docker / "cdef").write_text("{}")
    with pytest.raises(Corrupt, match="not Docker's metadata of a device"):
        thin.survey(str(old.metadata), str(old.data), docker=str(docker))


def test_a_dry_run_says_what_would_be_done_and_asks_no_daemon(tmp_path: Path) -> None:
    old = small(tmp_path)
    command = nbdthin_command("--socket", tmp_path / "no.sock", "import-thin", "--dry-run", "--data", old.data)
    assert run(*command, "--metadata", old.metadata).splitlines() == [
        "thin/7: device 7, 2.5 MiB, 2.5 MiB of it mapped",
        "thin/8: device 8, 2.5 MiB, 2.5 MiB of it mapped",
        "thin/9: device 9, 64 KiB, 0 B of it mapped",
        "3 devices map 5 MiB, which is 2.56 MiB of data; to write: 2.56 MiB",
    ]
    with old.metadata.open("rb") as file:
        done = subprocess.run([*command, "--json", "--metadata", "-"], stdin=file, capture_output=True, check=True)
    result = json.loads(done.stdout)
    assert result["dry_run"] and result["totals"]["stored"] == 41 * BLOCK
    assert result["volumes"][1] == {"device": 8, "name": "thin/8", "size": 40 * BLOCK, "mapped": 40 * BLOCK}


def test_what_is_stored_more_than_once_is_said(tmp_path: Path) -> None:
    old = OldPool(tmp_path)
    for number, blocks in enumerate(((0, 1), (0, 2), (3, 1), (3, 2))):
        old.pool.create(number)
        old.pool.devices[number] = {place: (physical, 0) for place, physical in enumerate(blocks)}
    old.finish()
    command = nbdthin_command("import-thin", "--dry-run", "--data", old.data, "--metadata", old.metadata)
    last = run(*command).splitlines()[-1]
    assert last == "4 devices map 512 KiB, which is 256 KiB of data; to write: 384 KiB, 128 KiB of it more than once"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"names": {6: "web"}}, r"no device 6 \(it has: 7, 8, 9\)"),
        ({"sizes": {6: GiB}}, "no device 6"),
        ({"names": {7: "a b"}}, "not a name"),
        ({"prefix": "a b"}, "not a name"),
        ({"names": {7: "thin/8"}}, "devices 7 and 8 would both be 'thin/8'"),
        ({"sizes": {7: 1000}}, "not a volume's size"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], line: str, tmp_path: Path) -> None:
    old = small(tmp_path)
    with pytest.raises(Invalid, match=line):
        thin.survey(str(old.metadata), str(old.data), **options)


def test_what_is_not_the_data_of_the_metadata_is_refused(tmp_path: Path) -> None:
    old = small(tmp_path)
    with old.data.open("r+b") as file:
        file.truncate(40 * BLOCK)
    with pytest.raises(Invalid, match="not the data of these metadata"):
        thin.survey(str(old.metadata), str(old.data))
    for other in ("/dev/null", str(tmp_path)):
        with pytest.raises(Invalid, match="neither a file nor a block device"):
            thin.survey(str(old.metadata), other)


def test_what_fails_is_a_line_and_leaves_nothing(tmp_path: Path, daemon: Daemon) -> None:
    old = small(tmp_path)
    assert "not a device" in refused(daemon, old, "--name", "seven=web")
    assert "twice for device 7" in refused(daemon, old, "--name", "7=a", "--name", "7=b")
    assert f"{tmp_path}/none: No such file" in refused(daemon, old, "--docker", str(tmp_path / "none"))
    old.metadata.write_bytes(old.metadata.read_bytes()[:-20])
    assert "cut short" in refused(daemon, old)


def test_a_name_that_is_taken_is_found_before_anything_is_copied(tmp_path: Path, daemon: Daemon) -> None:
    old = small(tmp_path)
    daemon.create("thin/8", MiB)
    steps: list[int] = []
    with thin.survey(str(old.metadata), str(old.data)) as found, daemon.connect() as pool:
        with pytest.raises(Exists, match="'thin/8' exists"):
            found.bring(pool, lambda done, total: steps.append(done))
    assert steps == []


@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_ends_in_the_middle_leaves_nothing(after: int, tmp_path: Path, daemon: Daemon) -> None:
    old = small(tmp_path)
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        assert total == 41 * BLOCK
        if len(seen) > after:
            raise Stop

    with thin.survey(str(old.metadata), str(old.data)) as found, daemon.connect() as pool:
        with suppress(Stop):
            found.bring(pool, stop)
        assert len(seen) == after + 1
        assert pool.list() == []


def test_data_that_become_shorter_meanwhile_are_an_error_that_leaves_nothing(tmp_path: Path, daemon: Daemon) -> None:
    old = small(tmp_path)
    with thin.survey(str(old.metadata), str(old.data)) as found, daemon.connect() as pool:
        with old.data.open("r+b") as file:
            file.truncate(20 * BLOCK)
        with pytest.raises(Error, match="has become shorter"):
            found.bring(pool)
        assert pool.list() == []


def test_a_pool_that_is_too_small_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    old = small(tmp_path)
    daemon = Daemon(tmp_path, size=2 * MiB)
    settings = '[pool]\nauto_extend = false\nno_space = "error"\nmin_free = "0%"'
    daemon.config.write_text(daemon.config.read_text().replace("[pool]", settings))
    daemon.start()
    try:
        with thin.survey(str(old.metadata), str(old.data)) as found, daemon.connect() as pool:
            with pytest.raises(NoSpace):
                found.bring(pool)
            assert pool.list() == []
    finally:
        daemon.close()


def test_a_daemon_that_dies_is_named_with_what_it_may_have_left(tmp_path: Path, daemon: Daemon) -> None:
    old = small(tmp_path)

    def kill(done: int, total: int) -> None:
        if done:
            daemon.kill()

    with thin.survey(str(old.metadata), str(old.data)) as found:
        with daemon.connect() as pool, pytest.raises(Error, match=r"importing/thin/7@\.\.\. may be left"):
            found.bring(pool, kill)
        daemon.start()
        with daemon.connect() as pool:
            left = [row.name for row in pool.list()]
            assert left and all(name.startswith("importing/thin/7@") for name in left)
            found.bring(pool)
            rows = pool.list()
        assert [row.name for row in rows] == ["thin/7", "thin/8", "thin/9"], "the second try removes the first"
    for number in (7, 8):
        assert content_of(daemon, f"thin/{number}") == old.reads_as(number, 40 * BLOCK)
