"""Layouts written: other tools take them for what they are, and unpack them to the same trees, file by file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdthin.errors import Error, Exists, Invalid, NotFound
from nbdthin.images.archive import open_archive
from nbdthin.images.changes import changes, write_layer
from nbdthin.images.config import Config, Platform, empty_config
from nbdthin.images.layout import new_layout
from nbdthin.images.unpack import apply
from tests.conftest import need, need_root
from tests.images.trees import Member, make_tar, tree

CREATED = "2020-01-02T03:04:05Z"


@pytest.fixture
def trees(tmp_path: Path) -> list[Path]:
    """What two layers make, one on the other, with something of everything."""
    need_root()
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "usr/bin").mkdir(parents=True)
    (first / "usr/share/doc").mkdir(parents=True)
    (first / "usr/share/doc/readme").write_text("read me")
    (first / "usr/bin/tool").write_bytes(os.urandom(100_000))
    (first / "usr/bin/tool").chmod(0o4755)
    os.link(first / "usr/bin/tool", first / "usr/bin/link")
    (first / "bin").symlink_to("usr/bin")
    (first / "tmp").mkdir()
    (first / "tmp").chmod(0o1777)
    (first / "etc").mkdir()
    (first / "etc/shadow").write_text("root:*")
    os.chown(first / "etc/shadow", 0, 42)
    (first / ("long" * 30) / ("name" * 30)).mkdir(parents=True)
    (first / "gr\u00fc\u00df").write_text("Gott")
    os.mknod(first / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(first / "fifo")
    os.setxattr(first / "usr/bin/tool", "security.capability", bytes.fromhex("01000002002000" + "00" * 13))
    os.setxattr(first / "etc", "user.note", b"\xff\x00binary")
    with (first / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    os.utime(first / "etc/shadow", ns=(0, 1_234_567_890_123_456_789))
    os.utime(first / "bin", ns=(0, 999_999_999_999), follow_symlinks=False)
    subprocess.run(["cp", "-a", first, second], check=True)
    change = """
        rm -r usr/share/doc; rm null; ln etc/shadow etc/gshadow; echo more >> usr/bin/tool
        rm bin; mkdir bin; touch bin/file; rm fifo; ln -s elsewhere fifo; mkdir -p var/lib; chown 7:8 var/lib
    """
    subprocess.run(["sh", "-ec", change], cwd=second, check=True)
    return [first, second]


def save(
    path: Path, trees: Sequence[Path], names: Sequence[str] = ("web:1",), compression: str | None = "gzip"
) -> Config:
    with new_layout(path) as layout:
        layers = []
        for old, new in zip([None, *trees], trees, strict=False):
            with layout.layer(compression) as layer:
                write_layer(changes(old, new), new, layer.write)
            layers.append(layer.written)
        history = [{"created": CREATED, "created_by": f"layer {number}"} for number in range(len(layers))]
        config = empty_config(Platform.host()).with_layers([layer.diff_id for layer in layers], history, CREATED)
        layout.image(config, layers, names)
    return config


def load(path: Path, root: Path) -> dict[str, object]:
    """The tree of the only image at `path`, unpacked here."""
    root.mkdir()
    with open_archive(path) as archive:
        (image,) = archive.images
        for layer in image.layers:
            with layer.chunks(1 << 30) as tar:
                apply(tar, root)
    return dict(tree(root))


def run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["layout", "layout.tar"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", None])
def test_what_is_written_is_read_again(form: str, compression: str | None, trees: list[Path], tmp_path: Path) -> None:
    config = save(tmp_path / form, trees, ["docker.io/library/web:1", "web"], compression)
    with open_archive(tmp_path / form) as archive:
        (image,) = archive.images
        assert image.config.raw == config.raw
        assert image.tags == ("docker.io/library/web:1", "web")
        assert [entry["created_by"] for entry in image.config.history] == ["layer 0", "layer 1"]
        assert image.config.created == CREATED
    assert load(tmp_path / form, tmp_path / "root") == tree(trees[1])


@pytest.mark.parametrize("form", ["layout", "layout.tar"])
def test_skopeo_and_umoci_make_the_same_tree_of_it(form: str, trees: list[Path], tmp_path: Path) -> None:
    save(tmp_path / form, trees)
    source = "oci-archive" if form.endswith(".tar") else "oci"
    run(need("skopeo"), "copy", f"{source}:{tmp_path / form}:web:1", f"oci:{tmp_path / 'copied'}:web")
    run(need("umoci"), "unpack", "--image", f"{tmp_path / 'copied'}:web", tmp_path / "bundle")
    assert tree(tmp_path / "bundle/rootfs") == tree(trees[1])


def test_docker_load_would_find_what_it_wants_in_the_tar(trees: list[Path], tmp_path: Path) -> None:
    save(tmp_path / "layout.tar", trees, ["docker.io/library/web:1", "unnamed"])
    source = f"docker-archive:{tmp_path / 'layout.tar'}:docker.io/library/web:1"
    run(need("skopeo"), "copy", source, f"oci:{tmp_path / 'copied'}:web")
    assert load(tmp_path / "copied", tmp_path / "root") == tree(trees[1])


def test_what_skopeo_writes_as_docker_save_does_is_read(trees: list[Path], tmp_path: Path) -> None:
    save(tmp_path / "layout", trees)
    saved = tmp_path / "saved.tar"
    run(need("skopeo"), "copy", f"oci:{tmp_path / 'layout'}:web:1", f"docker-archive:{saved}:example.org/web:2")
    with open_archive(saved) as archive:
        assert [image.tags for image in archive.images] == [("example.org/web:2",)]
    assert load(saved, tmp_path / "root") == tree(trees[1])


def test_layers_that_umoci_makes_are_unpacked_as_umoci_unpacks_them(trees: list[Path], tmp_path: Path) -> None:
    save(tmp_path / "layout", trees, ["web"])
    image = f"{tmp_path / 'layout'}:web"
    run(need("umoci"), "unpack", "--image", image, tmp_path / "bundle")
    change = """
        rm -r etc; mkdir etc; echo new > etc/new; rm usr/bin/link; ln usr/bin/tool usr/bin/other; chmod 700 var
        rm -r var/lib; ln -s ../tmp var/lib; mknod zero c 1 5
        setfattr -n user.more -v 0x00ff usr/bin/tool; rm fifo; mkdir fifo; touch fifo/file
    """
    need("setfattr")
    subprocess.run(["sh", "-ec", change], cwd=tmp_path / "bundle/rootfs", check=True)
    run(need("umoci"), "repack", "--image", image, tmp_path / "bundle")
    run(need("umoci"), "unpack", "--image", image, tmp_path / "again")
    assert load(tmp_path / "layout", tmp_path / "root") == tree(tmp_path / "again/rootfs")


@pytest.mark.parametrize("form", ["layout", "layout.tar"])
def test_the_same_images_are_the_same_bytes(form: str, trees: list[Path], tmp_path: Path) -> None:
    written = []
    for number in range(2):
        place = tmp_path / str(number)
        place.mkdir()
        save(place / form, trees)
        files = [path for path in place.rglob("*") if path.is_file()]
        written.append({path.relative_to(place): path.read_bytes() for path in files})
    assert written[0] == written[1]


def test_a_blob_that_comes_twice_is_there_once(tmp_path: Path) -> None:
    data = make_tar(Member("file", os.urandom(10_000)))
    for form in ("layout", "layout.tar"):
        with new_layout(tmp_path / form) as layout:
            layers = []
            for _ in range(3):
                with layout.layer() as layer:
                    layer.write(data)
                layers.append(layer.written)
            diff_ids = [layer.diff_id for layer in layers]
            layout.image(empty_config(Platform.host()).with_layers(diff_ids, []), layers)
        with open_archive(tmp_path / form) as archive:
            assert [layer.diff_id for layer in archive.images[0].layers] == diff_ids
            assert archive.images[0].tags == ()
    with tarfile.open(tmp_path / "layout.tar") as tar:
        names = tar.getnames()
        assert len(names) == len(set(names)) == 6  # layer, configuration, manifest, and three beside the blobs
    assert sum(path.is_file() for path in (tmp_path / "layout").rglob("*")) == 5  # the same without manifest.json


@pytest.mark.parametrize("form", ["layout", "layout.tar"])
def test_an_error_leaves_nothing(form: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_layout(tmp_path / form) as layout, layout.layer() as layer:
        layer.write(b"x" * 1000)
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["layout", "layout.tar"])
def test_nothing_that_is_there_is_replaced(form: str, tmp_path: Path) -> None:
    (tmp_path / form).symlink_to("nowhere")
    with pytest.raises(Exists, match="it is there already"), new_layout(tmp_path / form):
        pass
    with pytest.raises(NotFound, match="no such directory"), new_layout(tmp_path / "none" / form):
        pass
    assert os.listdir(tmp_path) == [form]


def test_an_image_that_does_not_add_up_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="of other layers"), new_layout(tmp_path / "layout") as layout:
        with layout.layer() as layer:
            layer.write(b"")
        layout.image(empty_config(Platform.host()), [layer.written])
    with pytest.raises(Error, match="not a compression"), new_layout(tmp_path / "layout") as layout:
        with layout.layer("bzip2"):
            pass
    assert os.listdir(tmp_path) == []


def test_others_may_read_what_is_written_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(tmp_path / "layout", [])
        save(tmp_path / "layout.tar", [])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "layout").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "layout.tar").stat().st_mode) == 0o640


def test_a_new_configuration_keeps_what_nobody_here_knows() -> None:
    raw = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "os.features": ["x"],
            "config": {"Healthcheck": {"Test": ["NONE"]}, "Entrypoint": "/init"},
            "rootfs": {"type": "layers", "diff_ids": []},
        }
    ).encode()
    config = Config.parse(raw, "config")
    assert config.entrypoint == ("/init",)
    changed = config.with_layers(["sha256:" + "0" * 64], [{"created_by": "x"}], CREATED)
    assert changed.fields["os.features"] == ["x"]
    assert changed.fields["config"] == config.fields["config"]
    assert (changed.diff_ids, changed.created, config.created) == (("sha256:" + "0" * 64,), CREATED, "")
