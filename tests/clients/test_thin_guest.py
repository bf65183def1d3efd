"""A pool that real dm-thin has made, in a guest of tools/vm, is brought over on the host."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nbdthin import nbd
from nbdthin.moving import thin
from nbdthin.units import KiB, MiB
from tests.clients.daemon import Daemon, nbdthin_command, run
from tests.clients.test_guest import HERE, run_guest
from tests.conftest import need

pytestmark = [pytest.mark.guest, pytest.mark.slow]


def mapped_blocks(xml: str) -> set[int]:
    """The physical blocks that any device maps."""
    result: set[int] = set()
    for mapping in ElementTree.fromstring(xml).iterfind("device/*"):
        if mapping.tag == "single_mapping":
            result.add(int(mapping.attrib["data_block"]))
        else:
            first = int(mapping.attrib["data_begin"])
            result.update(range(first, first + int(mapping.attrib["length"])))
    return result


def pieces_that_hold_something(data: Path, blocks: set[int], block_size: int) -> int:
    """How many 64 KiB of these blocks are not zeroes."""
    count = 0
    with data.open("rb") as file:
        for block in blocks:
            file.seek(block * block_size)
            content = file.read(block_size)
            count += sum(any(content[at : at + 64 * KiB]) for at in range(0, block_size, 64 * KiB))
    return count


def checksum(daemon: Daemon, name: str) -> str:
    digest = hashlib.sha256()
    with nbd.connect(daemon.uri(name)) as disk:
        for _, part in disk.read_many([(0, disk.size)]):
            digest.update(part)
    return digest.hexdigest()


@pytest.mark.parametrize("block_size", [64 * KiB, 512 * KiB])
def test_a_pool_of_dm_thin_comes_over_byte_for_byte_and_shares_what_it_shared(
    block_size: int, tmp_path: Path, daemon: Daemon
) -> None:
    metadata, data, xml = tmp_path / "metadata", tmp_path / "data", tmp_path / "pool.xml"
    for path, size in ((metadata, 8 * MiB), (data, 128 * MiB)):
        with path.open("wb") as file:
            file.truncate(size)
    console = run_guest(daemon, HERE / "guest/thin.sh", disks=(metadata, data), SECTORS=block_size // 512)
    sums = {
        int(number): (int(size), digest) for number, size, digest in re.findall(r"@@ SUM (\d+) (\d+) (\w+)", console)
    }
    assert sorted(sums) == [1, 3, 4, 5, 20, 21, 22, 23, 24, 16777215]

    xml.write_text(run(need("thin_dump"), metadata))
    sizes = [f"--size={number}={size}" for number, (size, _) in sums.items()]
    importing = nbdthin_command("--socket", daemon.control, "import-thin", "--metadata", xml, "--data", data)
    print(run(*importing, *sizes))

    with daemon.connect() as pool:
        rows = {row.name: row.size for row in pool.list()}
    assert rows.pop("thin/30") == block_size, "nothing says how large it was"
    assert rows == {f"thin/{number}": size for number, (size, _) in sums.items()}
    for number, (_, digest) in sums.items():
        assert checksum(daemon, f"thin/{number}") == digest, f"device {number}"

    blocks = mapped_blocks(xml.read_text())
    assert f" {len(blocks)}/" in console.split(" thin-pool ")[1], "the kernel counts as many"
    assert daemon.data_used() == pieces_that_hold_something(data, blocks, block_size) * 64 * KiB
    with thin.survey(str(xml), str(data)) as found:
        assert found.totals.stored == found.totals.distinct == len(blocks) * block_size
        assert found.totals.mapped > 1.25 * found.totals.distinct
        of_file_systems = {volume.device: volume.size for volume in found.volumes if volume.device < 6}
    assert of_file_systems == {number: 32 * MiB for number in (1, 3, 4, 5)}, "5 is larger than what is in it"

    live = tmp_path / "live.xml"  # what can be had while a pool is in use
    live.write_text(run("thin_dump", "--metadata-snap", metadata))
    with thin.survey(str(live), str(data)) as kept:
        assert kept.volumes == found.volumes and kept.totals == found.totals
