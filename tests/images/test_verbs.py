"""The verbs for images and containers, as users run them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import nbdthin
from nbdthin.cli import images
from nbdthin.images.saving import save
from tests.clients.daemon import Daemon
from tests.conftest import need_root
from tests.images.made import file, layout
from tests.images.trees import directory, make_tar
from tests.test_cli import as_json, onto_a_full_disk, refused, said

SYSTEM = make_tar(directory("etc"), file("etc/name", "system\n"), file("etc/old", "old\n"), directory("srv"))
WEB = make_tar(file("srv/page", "<p>"))


@pytest.fixture
def web(tmp_path: Path, daemon: Daemon) -> str:
    """An image's id; its tag is web:1."""
    need_root()
    said(daemon, "base", "create", "default", "--size", "256M")
    archive = layout(tmp_path / "web", {"1": [SYSTEM, WEB]}, run={"Env": ["A=b"]})
    identity, tag = said(daemon, "image", "load", archive).split()
    assert tag == "web:1"
    return identity


def test_an_image_is_loaded_run_changed_kept_and_saved(web: str, tmp_path: Path, daemon: Daemon) -> None:
    assert said(daemon, "container", "create", "web:1", "a", "b") == ""
    root = Path(said(daemon, "container", "start", "a").rstrip("\n"))
    (root / "etc/old").unlink()
    (root / "srv/new\nline").write_text("")
    assert said(daemon, "container", "diff", "a") == "C /etc\nD /etc/old\nC /srv\nA /srv/new\\nline\n"
    changes = as_json(daemon, "container", "diff", "a")
    assert isinstance(changes, list) and changes[-1] == {"kind": "A", "path": "/srv/new\nline"}
    header, first, second = said(daemon, "container", "ls").splitlines()
    assert header.split() == ["NAME", "IMAGE", "STATE", "SIZE", "EXCLUSIVE", "CREATED", "ROOT"]
    assert first.split()[:3] == ["a", "web:1", "started"] and first.endswith(str(root))
    assert second.split()[:3] == ["b", "web:1", "stopped"]
    identity = said(daemon, "image", "commit", "a", "mine", "--comment", "without old").strip()
    assert said(daemon, "container", "stop", "a", "b") == ""
    newest = said(daemon, "image", "history", identity[:14]).splitlines()[1]
    assert newest.endswith("nbdthin image commit a without old")
    saved = said(daemon, "image", "save", "mine", tmp_path / "mine.tar").strip()
    assert saved.startswith("sha256:") and saved != identity
    with tarfile.open(tmp_path / "mine.tar") as tar:
        assert "index.json" in tar.getnames()
    said(daemon, "container", "rm", "a", "b")
    said(daemon, "image", "rm", "mine", "web:1")
    assert said(daemon, "image", "load", tmp_path / "mine.tar") == f"{saved} mine:latest\n"


def test_images_and_bases_are_listed_a_line_each(web: str, daemon: Daemon) -> None:
    said(daemon, "image", "tag", "web:1", "example.org/web:2", "web")
    header, *lines = said(daemon, "image", "ls").splitlines()
    assert header.split() == ["TAG", "ID", "LAYERS", "SIZE", "FS", "FS", "SIZE", "CREATED"]
    assert [line.split()[:3] for line in lines] == [
        [tag, web[7:19], "2"] for tag in ("example.org/web:2", "web:1", "web:latest")
    ]
    (image,) = as_list(daemon, "image", "ls")
    assert image["tags"] == ["example.org/web:2", "web:1", "web:latest"]
    (base,) = as_list(daemon, "base", "ls")
    assert (base["name"], base["file_system"]["size"]) == ("default", 256 << 20)
    assert said(daemon, "base", "ls").splitlines()[1].split()[:4] == ["default", "ext4", "256", "MiB"]
    config = as_json(daemon, "image", "config", "web")
    assert isinstance(config, dict) and config["config"] == {"Env": ["A=b"]}


def as_list(daemon: Daemon, *arguments: str) -> list[dict[str, Any]]:
    rows = as_json(daemon, *arguments)
    assert isinstance(rows, list)
    return rows


def test_what_cannot_be_is_one_line(web: str, tmp_path: Path, daemon: Daemon) -> None:
    said(daemon, "container", "create", "web:1", "a")
    (tmp_path / "there").mkdir()
    for arguments, complaint in (
        (("image", "load", tmp_path / "none"), "no such file"),
        (
            ("image", "load", tmp_path / "web", "--base", "none"),
            "no base 'none' (`nbdthin base ls` lists what there is)",
        ),
        (("image", "load", tmp_path / "web", "--platform", "linux"), "not a platform"),
        (("image", "load", tmp_path / "web", "--platform", "linux/arm64"), "no image for linux/arm64"),
        (("image", "load", tmp_path / "web", "--tag", "A B"), "not a tag: 'A B'"),
        (("image", "rm"), "remove which image?"),
        (("image", "rm", "web:1"), "'web:1' has containers: a (nbdthin container rm)"),
        (("image", "save", "web:1", tmp_path / "there"), "it is there already"),
        (("image", "commit", "none", "mine"), "no container 'none'"),
        (("container", "create", "web:1", "a"), "'container/a' exists already"),
        (("container", "create", "web:1", "b", "--size", "1M"), "cannot be smaller"),
        (("container", "start", "a", "--root", tmp_path / "none"), "no directory to mount on"),
        (("base", "create", "default"), "there is a base 'default' already"),
        (("base", "grow", "default", "1M"), "a base never shrinks"),
    ):
        assert complaint in refused(daemon, *arguments)


def uses(path: Path) -> dict[str, list[str | Path]]:
    """Each verb with arguments that are good, in an order in which they are."""
    return {
        "base create": ["other", "--size", "64M"],
        "base ls": [],
        "base grow": ["other", "65M"],
        "base rm": ["other"],
        "image load": [path / "web"],
        "image ls": [],
        "image history": ["web:1"],
        "image config": ["web:1"],
        "image tag": ["web:1", "web:2"],
        "container create": ["web:1", "a"],
        "container start": ["a"],
        "container ls": [],
        "container diff": ["a"],
        "image commit": ["a", "mine"],
        "image save": ["mine", path / "saved"],
        "container stop": ["a"],
        "container rm": ["a"],
        "image rm": ["mine"],
    }


@pytest.mark.parametrize("before", [True, False])
def test_every_verb_prints_json(before: bool, web: str, tmp_path: Path, daemon: Daemon) -> None:
    assert uses(tmp_path).keys() == images.VERBS.keys()
    for verb, arguments in uses(tmp_path).items():
        words = ["--json", *verb.split(), *arguments] if before else [*verb.split(), *arguments, "--json"]
        value = json.loads(said(daemon, *words))
        lists = (" ls", " load", " history", " diff")
        assert isinstance(value, list if verb.endswith(lists) else dict), verb


def test_output_onto_a_full_disk_is_one_line_for_every_verb(web: str, tmp_path: Path, daemon: Daemon) -> None:
    for verb, arguments in uses(tmp_path).items():
        status, errors = onto_a_full_disk(daemon, "--json", *verb.split(), *arguments)
        assert (status, errors) == (1, "nbdthin: cannot write output: No space left on device\n"), verb


def test_a_save_that_fails_leaves_nothing(web: str, tmp_path: Path, daemon: Daemon) -> None:
    with daemon.connect() as pool:
        (lower, _) = (name for name in sorted(row.name for row in pool.list()) if name.startswith("layer/"))
        pool.remove(lower)
        with pytest.raises(nbdthin.Error, match="has 2 layers and 1 are left"):
            save(pool, "web:1", tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
