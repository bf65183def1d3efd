"""tools/bench, run as its users run it, on images so small that only its correctness shows."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import psutil
import pytest
from benchlib import profile
from benchlib import rounds as rounds_module
from benchlib.__main__ import SERVERS
from benchlib.cold import forget
from benchlib.errors import BenchError
from benchlib.ranges import check_map
from benchlib.rounds import Bench, Plan
from benchlib.servers import Ground, Server, State
from benchlib.standings import Cell, Holds, Ratio, Sample, in_question, standings
from benchlib.works import WORKS, Work

from tests.conftest import missing, need, need_root
from tests.pagecache import is_cached

BENCH = Path(__file__).parents[1] / "tools" / "bench"
pytestmark = pytest.mark.slow
PYTHON = str(Path(sys.executable).parent)  # on PATH first, for checkouts without a .venv


@pytest.fixture(autouse=True)
def programs() -> None:
    for program in ("fio", "nbdkit"):
        if shutil.which(program) is None:
            missing(f"{program} is missing (apt-get install {program})")


def start(directory: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.Popen[str]:
    small = ("--directory", str(directory), "--size", "2M", "--rounds", "1", "--most", "1")
    return subprocess.Popen(
        [BENCH, *small, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{PYTHON}:{path}"},
    )


def until(found: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_cells_are_measured_in_turn_verified_and_told_as_a_table_and_as_json(tmp_path: Path) -> None:
    cells = "read-4k-d32/(nbdthin|nbdkit)|first-4k-d32/(nbdthin|nbdkit)|chain.*/nbdthin/chain of 1$"
    report = tmp_path / "report.json"
    images = tmp_path / "images"
    images.mkdir()
    with start(images, "--seconds", "0.2", "--only", cells, "--most", "2", "--json", str(report)) as bench:
        table, said = bench.communicate(timeout=120)
    assert bench.returncode == 0, table + said
    assert "Warm page cache" in table
    assert "|   nbdkit cow 4K " in table
    assert "|   nbdkit file, raw " in table
    assert "all right" in table
    told = json.loads(report.read_text())
    assert told["sound"]
    for cell in told["cells"]:
        assert cell["per_second"] > 0
        assert cell["failure"] is None
    standings = {standing["work"]: standing for standing in told["standings"]}
    assert standings["read-4k-d32"]["best_peer"] == "nbdkit file", "the bar is over raw peers, and what stores is one"
    assert standings["read-4k-d32"]["best_cow_peer"] == "nbdkit cow 4K"
    assert standings["first-4k-d32"]["best_peer"] == "nbdkit cow 4K", "a raw file is no peer of a clone"
    for standing in standings.values():
        assert standing["holds"] == (standing["ratio"] >= standing["at_least"])
        assert not standing["surely"] and standing["ratio_to"] is None, "two rounds say nothing"
    rounds = {(cell["work"], cell["server"]): len(cell["rounds"]) for cell in told["cells"]}
    assert rounds["read-4k-d32", "nbdthin"] == rounds["read-4k-d32", "nbdkit file"] == 2
    assert rounds["read-4k-d32", "nbdkit cow 4K"] == 1, "the bar is not over it"
    checked = {(verdict["server"], verdict["image"]) for verdict in told["verified"]}
    assert {("nbdthin", "full"), ("nbdthin", "clone"), ("nbdkit file", "full")} <= checked
    assert list(images.iterdir()) == []


def test_quick_proves_the_data_of_each_kind_of_work(tmp_path: Path) -> None:
    """All that has a row in the table but for what the others here measure, each with one peer or a few."""
    need_root()
    for program in ("qemu-nbd", "nbd-server", "nbdcopy", "nbdfuse", "fusermount3", "mkfs.ext4"):
        need(program)
    report, charts, images = tmp_path / "report.json", tmp_path / "charts", tmp_path / "images"
    images.mkdir()
    cells = (
        "(mixed|empty|cold)-4k.*/(nbdthin|nbdkit file|qemu-nbd ext_l2|nbd-server)/|tcp-(read-4k-d32|overwrite-1m)"
        "|chain.*/nbdthin/|(copy-in|copy-out|unpack|trim|map)/(nbdthin|nbdkit file|qemu-nbd qcow2)/"
    )
    told_to = ("--json", str(report), "--charts", str(charts))
    with start(images, "--quick", "--size", "16M", "--only", cells, *told_to) as bench:
        table, said = bench.communicate(timeout=300)
    assert bench.returncode == 0, table + said
    told = json.loads(report.read_text())
    works = {cell["work"] for cell in told["cells"]}
    assert works >= {"mixed-4k-d16-c4", "empty-4k-d32", "cold-4k-d32", "copy-in", "copy-out", "unpack", "trim", "map"}
    for cell in told["cells"]:
        assert cell.get("per_second", 0) > 0, cell
    assert {cell["work"] for cell in told["cells"] if cell["cache"] == "cold"} == {"cold-4k-d32"}
    assert {"chain of 1", "chain of 100", "chain of 1000"} == {
        cell["image"] for cell in told["cells"] if cell["work"] == "chain-4k-d32"
    }
    own = [standing for standing in told["standings"] if standing["work"] == "chain-4k-d32"]
    assert [(each["image"], each["best_peer_image"]) for each in own] == [("chain of 1000", "chain of 1")]
    for chart, words in (("bench-ratios.svg", "nbdkit file, raw"), ("bench-rates.svg", "TRIM of a full volume")):
        assert words in " ".join(ElementTree.parse(charts / chart).getroot().itertext())
    assert list(images.iterdir()) == []


def test_a_map_with_a_hole_too_many_or_too_few_is_wrong() -> None:
    part, data, hole = 64 << 10, 0, 3
    right = [(part, data), (part, hole), (part // 2, data), (part // 2, data), (part, hole)]
    check_map(np.array(right, dtype=np.uint64), 4 * part)
    for wrong, place in (
        ([(part, data), (part, data), (part, data), (part, hole)], f"byte {part}"),
        ([(part, data), (part, hole), (part, hole), (part, hole)], f"byte {2 * part}"),
        ([(part, data), (2 * part, hole), (part, hole)], f"byte {part}"),
        (right[:-1], f"ends at byte {3 * part}"),
    ):
        with pytest.raises(BenchError, match=place):
            check_map(np.array(wrong, dtype=np.uint64), 4 * part)


def measured(server: Server, rates: Sequence[float], work: Work) -> Cell:
    return Cell(work, server, State.FULL, samples=[Sample(rate, 1.0, cpu=0.5) for rate in rates])


READ = next(work for work in WORKS if work.key == "read-4k-d32")  # at least 1.2 of the best raw peer
OURS, *OTHERS = SERVERS
FILE, OVERLAY = (next(each for each in OTHERS if each.name == name) for name in ("nbdkit file", "nbdkit cow 4K"))


def test_servers_are_compared_round_by_round() -> None:
    """A machine that has become twice as slow has done so for both."""
    ours = measured(OURS, [1300, 1250, 650, 1350, 640], READ)
    peer = measured(FILE, [1000, 1000, 500, 1000, 500], READ)
    (standing,) = standings([ours, peer])
    assert standing.ratio == Ratio(median=1.3, low=1.25, high=1.35)
    assert standing.holds is Holds.YES


@pytest.mark.parametrize(
    ("ratios", "holds"),
    [
        ([1.3] * 4, Holds.PERHAPS),  # four rounds agree by chance once in eight times
        ([1.3] * 5, Holds.YES),
        ([1.3] * 4 + [1.1], Holds.PERHAPS),
        ([1.3] * 8 + [1.1], Holds.YES),
        ([1.1] * 3 + [1.3] * 2, Holds.HARDLY),
        ([1.1] * 5, Holds.NO),
        ([1.1] * 8 + [1.3], Holds.NO),
    ],
)
def test_a_row_is_sure_when_its_rounds_agree(ratios: list[float], holds: Holds) -> None:
    (standing,) = standings([measured(OURS, ratios, READ), measured(FILE, [1] * len(ratios), READ)])
    assert standing.holds is holds


def test_further_rounds_leave_out_who_is_surely_behind() -> None:
    ours = measured(OURS, [1.3, 1.1, 1.3, 1.3, 1.3], READ)
    near, far = measured(FILE, [1.0] * 5, READ), measured(OVERLAY, [0.5] * 5, READ)
    server = next(each for each in OTHERS if each.name == "nbd-server")
    behind = measured(server, [0.8] * 5, READ)
    assert in_question([ours, near, far, behind]) == [ours, near]
    assert in_question([ours, behind]) == []


def test_a_row_is_missed_surely_when_one_peer_is_surely_too_near() -> None:
    ours = measured(OURS, [1.1, 1.15, 1.1, 1.15, 1.1], READ)
    near, nearer = (measured(each, [1.0] * 5, READ) for each in (FILE, OVERLAY))
    assert in_question([ours, near, nearer]) == []


@pytest.mark.parametrize(
    ("stolen", "chosen", "again"),
    [([0.0], 100, 0), ([1.0, 0.0], 101, 1), ([9.0, 5.0, 7.0], 101, 2)],
    ids=["not at all", "once", "each time"],
)
def test_a_round_that_the_hypervisor_disturbs_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stolen: list[float], chosen: int, again: int
) -> None:
    taken = [0.0, *itertools.accumulate(stolen)]
    seconds = iter([each for pair in itertools.pairwise(taken) for each in pair])
    rates = itertools.count(100)
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(steal=next(seconds)))
    monkeypatch.setattr(rounds_module, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    monkeypatch.setattr(Bench, "_round", lambda *_: Sample(next(rates), 1.0, cpu=0.5))
    plan = Plan(1, 1.0, 3, 1, 1, warm_up=False, mapped=0, trimmed=0, debian=False)
    cell = measured(OURS, [], READ)
    sample = Bench(Ground(tmp_path, 1), plan, lambda _: None)._undisturbed(cell, 0)
    assert (sample.amount, cell.again) == (chosen, again)


def test_what_a_process_has_mapped_and_read_is_forgotten_too(tmp_path: Path) -> None:
    need_root()
    path, size = tmp_path / "file", 4 << 20
    path.write_bytes(bytes(range(256)) * (size // 256))
    reading = "import mmap, sys; m = mmap.mmap(open(sys.argv[1], 'r+b').fileno(), 0); bytes(m); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", reading, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        reader.stdout.readline()
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert is_cached(file.fileno(), 0, size)
            forget(path)
            assert not is_cached(file.fileno(), 0, size)
        reader.stdin.close()


def test_many_writers_that_flush_are_compared_with_one(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    images = tmp_path / "images"
    images.mkdir()
    cells = "(fsync|slow)-4k.*/(nbdthin|nbdkit file)"
    with start(images, "--seconds", "0.2", "--only", cells, "--json", str(report)) as bench:
        table, said = bench.communicate(timeout=240)
    assert bench.returncode == 0, table + said
    assert "times one writer" in table
    told = {(cell["work"], cell["server"]): cell for cell in json.loads(report.read_text())["cells"]}
    for disk in ("fsync", "slow"):
        for server in ("nbdthin", "nbdkit file"):
            one, many = told[f"{disk}-4k", server], told[f"{disk}-4k-w16", server]
            if shutil.which("cc") is None and disk == "slow":
                assert "compiler" in one["reason"]
                continue
            assert one["ratio_to_one_writer"] is None
            assert many["ratio_to_one_writer"] == many["per_second"] / one["per_second"]
            assert disk == "fsync" or one["per_second"] < 1000, "a sync of a millisecond and more"
    assert list(images.iterdir()) == []


SCRIPT = """
\tffffffff81e2c56c try_to_wake_up ([kernel.kallsyms])
\tffffffff820c9bae sock_def_readable ([kernel.kallsyms])
\tffffffff81e2c56c sock_write_iter ([kernel.kallsyms])
\tffffffff816b774d vfs_writev ([kernel.kallsyms])
\tffffffff821ecc51 do_syscall_64 ([kernel.kallsyms])
\t           fde9d __GI___writev (/usr/lib/x86_64-linux-gnu/libc.so.6)

\tffffffff816b774d ext4_file_write_iter ([ext4])
\tffffffff816b774d vfs_write ([kernel.kallsyms])
\t          147bcf [unknown] (/usr/bin/python3.11)

\tffffffff821f8054 __schedule ([kernel.kallsyms])
\t          147bcf [unknown] (/usr/bin/python3.11)

\t          147bcf [unknown] (/usr/bin/python3.11)
\t               0 [unknown] ([unknown])

\t          4d9ac9 PyLong_FromLong (/usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0)

\t           f83b7 uv__io_poll (/venv/lib/python3.11/site-packages/uvloop/loop.cpython-311-x86_64-linux-gnu.so)

\t    7ffd85a6e9d0 __vdso_clock_gettime ([vdso])
"""


def test_each_sample_of_a_server_is_told_by_what_it_was_for() -> None:
    found = profile.parts(SCRIPT)
    wanted = {"send": 1, profile.WAKING: 1, "write file": 1, profile.OTHER: 1, profile.INTERPRETER: 2, profile.OWN: 2}
    assert {part: count for part, count in found.items() if count} == wanted
    assert profile.shares(found)["write file"] == 1 / 7
    assert list(profile.shares(found)) == list(profile.COLUMNS)
    assert profile.shares(profile.parts("")) == {}


def test_a_run_under_perf_tells_where_each_servers_time_goes_and_counts_for_nothing_else(tmp_path: Path) -> None:
    need("perf")
    trial = ["perf", "record", "-q", "-e", "cpu-clock", "-g", "-o", str(tmp_path / "trial"), "true"]
    if (done := subprocess.run(trial, capture_output=True, text=True)).returncode:
        pytest.skip(f"perf cannot record here: {done.stderr.strip()}")
    report = tmp_path / "report.json"
    images = tmp_path / "images"
    images.mkdir()
    only = "^(write-4k-d32/(nbdthin|nbdkit file)|(first-4k-d32|copy-out)/nbdthin)"
    with start(
        images, "--seconds", "0.3", "--size", "16M", "--quick", "--perf", "--only", only, "--json", str(report)
    ) as bench:
        table, said = bench.communicate(timeout=240)
    assert bench.returncode == 0, table + said
    assert "the server's CPU us each" in table
    for cell in json.loads(report.read_text())["cells"]:
        assert len(cell["rounds"]) == 1
        shares = cell["profile"]
        if cell["work"] == "first-4k-d32":  # of which there are milliseconds, and few samples
            continue
        assert sum(shares.values()) - shares[profile.WAKING] == pytest.approx(1)
        assert (shares[profile.INTERPRETER] > 0.05) == (cell["server"] == "nbdthin")
        assert shares["send"] > 0
        assert cell["work"] == "copy-out" or shares["write file"] > 0.05
    assert list(images.iterdir()) == []


def test_where_perf_may_not_look_its_own_words_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perf = tmp_path / "perf"
    perf.write_text("#!/bin/sh\necho Error: >&2\necho 'Access is limited.' >&2\nexit 255\n")
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BenchError, match=r"^perf: Access is limited\.$"), profile.recording(os.getpid(), Counter()):
        pytest.fail("nothing is recorded")


def test_mapped(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    images = tmp_path / "images"
    images.mkdir()
    only = ("--mapped", "16K", "--seconds", "0.2", "--only", "/nbdthin/mapped", "--json", str(report))
    with start(images, *only) as bench:
        table, said = bench.communicate(timeout=240)
    assert bench.returncode == 0, table + said
    told = {trial["work"]: trial for trial in json.loads(report.read_text())["trials"]}
    assert told.keys() == {"load", "checkpoint-d1", "checkpoint-d16", "merge-d1", "merge-d16"}
    assert told["load"]["figures"]["blocks"] == 16 * 16 * 1024
    for trial in told.values():
        assert trial["failure"] is None
        if trial["work"] != "load":
            assert trial["figures"]["count"] >= 2
            assert trial["figures"]["reads_with"] > 0
    assert list(images.iterdir()) == []


def test_containers(tmp_path: Path) -> None:
    """They are told what they read back."""
    need_root()
    for program in ("nbdfuse", "fusermount3", "mkfs.ext4", "qemu-img"):
        need(program)
    report = tmp_path / "report.json"
    images = tmp_path / "images"
    images.mkdir()
    with start(images, "--quick", "--only", "^containers/", "--json", str(report)) as bench:
        table, said = bench.communicate(timeout=240)
    assert bench.returncode == 0, table + said
    (trial,) = json.loads(report.read_text())["trials"]
    assert trial["failure"] is None and trial["figures"]["at_once"] == 16
    assert all(figure > 0 for figure in trial["figures"].values())
    assert list(images.iterdir()) == []


def test_a_server_that_gives_back_other_data_fails_the_bench(tmp_path: Path) -> None:
    with start(tmp_path, "--seconds", "1", "--only", "read-4k-d1/nbdkit file") as bench:
        until(lambda: "fio" in {process.name() for process in working_in(tmp_path)})  # the image is filled by then
        (image,) = tmp_path.glob("*/nbdkit-file.*/image")
        with image.open("r+b") as file:
            file.seek(40960)
            file.write(b"lost")
        table, _ = bench.communicate(timeout=60)
    assert bench.returncode == 1
    assert "NOT VERIFIED: nbdkit file, full, each block read back: 1 wrong blocks from byte 40960 on" in table


def test_an_interrupted_bench_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    with start(tmp_path, "--seconds", "60", "--only", "read-4k-d1/(nbdthin|nbdkit file)") as bench:
        until(lambda: {"nbdkit", "fio"} <= {process.name() for process in working_in(tmp_path)})
        assert len(working_in(tmp_path)) >= 3  # nbdthin, too
        bench.send_signal(signal.SIGINT)
        _, said = bench.communicate(timeout=60)
    assert bench.returncode == 130
    assert "interrupted" in said
    assert working_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def working_in(directory: Path) -> list[psutil.Process]:
    """The servers and clients of a bench: all have a path in its directory among their arguments."""
    paths = f"{directory}/nbench-"
    processes = psutil.process_iter(["cmdline"])
    return [each for each in processes if any(paths in argument for argument in each.info["cmdline"] or ())]


def test_a_missing_program_is_one_line_with_its_package(tmp_path: Path) -> None:
    with start(tmp_path, "--only", "nbdkit file", path="") as bench:
        _, said = bench.communicate(timeout=60)
    assert bench.returncode == 1
    assert said == "tools/bench: programs are missing: apt-get install fio nbdkit\n"
