"""tools/growth, run as its users run it, so small that only its correctness shows; and the charts that it draws."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from growthlib import charts
from growthlib.model import Bound, Curve

from tests.conftest import missing

GROWTH = Path(__file__).parents[1] / "tools" / "growth"
PYTHON = str(Path(sys.executable).parent)  # on PATH first, for checkouts without a .venv
SVG = "{http://www.w3.org/2000/svg}"


def growth(directory: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    command = [str(GROWTH), "--quick", "--directory", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": f"{PYTHON}:{path}"})


@pytest.mark.slow
def test_every_statement_is_measured_and_told_as_tables_json_and_charts(tmp_path: Path) -> None:
    for program in ("fio", "nbdkit"):
        if shutil.which(program) is None:
            missing(f"{program} is missing (apt-get install {program})")
    pools, drawn, told = tmp_path / "p", tmp_path / "charts", tmp_path / "growth.json"
    pools.mkdir()
    drawn.mkdir()
    done = growth(pools, "--json", str(told), "--charts", str(drawn))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(pools.iterdir()) == []
    report = json.loads(told.read_text())
    curves = [curve for statement in report["statements"] for curve in statement["curves"]]
    assert {path.name for path in drawn.iterdir()} == {f"growth-{curve['key']}.svg" for curve in curves}
    for statement in report["statements"]:
        assert statement["failure"] is None
        assert statement["title"] in done.stdout and statement["bounds"]
        for curve in statement["curves"]:
            assert all(y >= 0 for series in curve["series"].values() for _, y in series)
        for bound in statement["bounds"]:
            assert bound["what"] in done.stdout


def test_a_statement_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    done = growth(tmp_path, "--only", "weather")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("tools/growth: --only leaves none of names, ")


def test_a_missing_program_is_one_line_with_its_package(tmp_path: Path) -> None:
    done = growth(tmp_path, "--only", "sequential", path="")
    assert done.returncode == 1
    assert done.stderr == "tools/growth: programs are missing: apt-get install fio nbdkit\n"


def test_a_chart_has_a_line_for_each_series_and_a_decade_as_wide_as_the_next() -> None:
    curve = Curve("key", "Title & more", "names", "ms")
    for x, y in ((10, 1.0), (100, 3.0), (1000, 2.0)):
        curve.add("<clone>", x, y)
        curve.add("snapshot", x, 2 * y)
    root = ElementTree.fromstring(charts.draw(curve))
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert {"Title & more", "<clone>", "snapshot", "names", "ms", "10", "100", "1,000"} <= set(texts)
    lines = [each.attrib["points"].split() for each in root.iter(f"{SVG}polyline")]
    assert len(lines) == 2
    across, down = zip(*(map(float, point.split(",")) for point in lines[0]), strict=True)
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert down[1] < down[2] < down[0], "higher is further up"


def test_a_chart_of_one_place_or_of_nothing_but_zeroes_is_drawn() -> None:
    curve = Curve("key", "Title", "x", "y")
    curve.add("one", 10, 0.0)
    assert "nan" not in charts.draw(curve)


@pytest.mark.parametrize(("value", "least", "holds"), [(1.0, False, True), (1.1, False, False), (0.9, True, False)])
def test_a_bound_holds_up_to_its_limit_and_a_least_one_from_it_on(value: float, least: bool, holds: bool) -> None:
    assert Bound("what", value, 1.0, "ms", least).holds is holds
