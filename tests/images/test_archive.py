"""Archives read: every form gives the same images, and what is damaged, too large or made up is refused in one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nbdthin.errors import Corrupt, Error, Invalid, NoSpace, NotFound
from nbdthin.images.archive import LIMITS, Layer, open_archive
from nbdthin.images.config import Platform, chain_ids
from tests.conftest import need, need_root
from tests.images.trees import Member, directory, make_tar

AMD64, ARM64, ARMV7 = (Platform.parse(text) for text in ("linux/amd64", "linux/arm64/v8", "linux/arm/v7"))
LIMIT = 1 << 30
OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
TARS = [make_tar(directory("etc"), Member("etc/one", os.urandom(5000))), make_tar(Member("etc/two", bytes(3 << 20)))]


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layout:
    """An OCI layout that is made by hand, with whatever is wrong in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        name = digest(data)
        (self.path / "blobs" / name.replace(":", "/")).write_bytes(data)
        return {"mediaType": kind, "digest": name, "size": len(data), **more}

    def json(self, value: Any, kind: str, **more: Any) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), kind, **more)

    def image(
        self, where: Platform = AMD64, kinds: tuple[str, ...] = ("tar+gzip", "tar"), **more: Any
    ) -> dict[str, Any]:
        """A manifest of two layers; its descriptor says nothing of a platform unless told."""
        pack: dict[str, Callable[[bytes], bytes]] = {
            "tar": bytes,
            "tar+gzip": gzip.compress,
            "tar+zstd": zstandard.ZstdCompressor().compress,
        }
        config = {
            "os": where.os,
            "architecture": where.architecture,
            "variant": where.variant,
            "config": {"Env": ["A=b"], "Entrypoint": ["/bin/sh"], "Labels": {"who": "me"}},
            "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in TARS]},
            "history": [{"created_by": "made"}],
        }
        layers = [self.blob(pack[kind](tar), f"{OCI}layer.v1.{kind}") for kind, tar in zip(kinds, TARS, strict=True)]
        manifest = {"schemaVersion": 2, "config": self.json(config, f"{OCI}config.v1+json"), "layers": layers}
        return self.json(manifest, f"{OCI}manifest.v1+json", **more)

    def index(self, *manifests: dict[str, Any]) -> dict[str, Any]:
        return {"schemaVersion": 2, "manifests": list(manifests)}

    def nested(self, *manifests: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self.json(self.index(*manifests), f"{OCI}index.v1+json", **more)

    def top(self, *manifests: dict[str, Any]) -> Path:
        (self.path / "index.json").write_text(json.dumps(self.index(*manifests)))
        return self.path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def of(where: Platform) -> dict[str, str]:
    return {key: value for key, value in where._asdict().items() if value}


def named(name: str) -> dict[str, str]:
    return {"org.opencontainers.image.ref.name": name}


def packed(directory: Path, *names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names or sorted(os.listdir(directory)):
            tar.add(directory / name, name)
    return buffer.getvalue()


def content(layer: Layer, limit: int = LIMIT) -> bytes:
    with layer.chunks(limit) as chunks:
        return b"".join(chunks)


def docker_save(path: Path) -> Path:
    """As Docker wrote it before it wrote OCI layouts; the last layer is a link to the first, as such are."""
    diff_ids = [digest(TARS[0]), digest(TARS[1]), digest(TARS[0])]
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": diff_ids}}).encode()
    name = digest(config)[7:] + ".json"
    (path / "1").mkdir(parents=True)
    (path / "2").mkdir()
    (path / "3").mkdir()
    (path / "1/layer.tar").write_bytes(TARS[0])
    (path / "2/layer.tar").write_bytes(gzip.compress(TARS[1]))
    (path / "3/layer.tar").symlink_to("../1/layer.tar")
    (path / name).write_bytes(config)
    layers = [f"{number}/layer.tar" for number in (1, 2, 3)]
    (path / "manifest.json").write_text(json.dumps([{"Config": name, "RepoTags": ["web:1"], "Layers": layers}]))
    return path


# -- forms


@pytest.mark.parametrize("form", ["directory", "tar", "gzip", "zstd", "tar with dots"])
def test_a_layout_is_read_in_each_form(form: str, layout: Layout, tmp_path: Path) -> None:
    path = layout.top(layout.image(annotations=named("web:1")))
    tar = packed(path, ".") if form == "tar with dots" else packed(path)
    if form != "directory":
        path = tmp_path / "archive"
        path.write_bytes({"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}.get(form, bytes)(tar))
    with open_archive(path, scratch=tmp_path) as archive:
        (image,) = archive.images
        assert image.tags == ("web:1",)
        assert (image.config.env, image.config.entrypoint) == (("A=b",), ("/bin/sh",))
        assert (image.config.labels, image.config.history) == ({"who": "me"}, [{"created_by": "made"}])
        assert digest(image.config.raw) == image.config.digest
        assert [layer.diff_id for layer in image.layers] == [digest(tar) for tar in TARS]
        assert image.layers[0].chain_id == digest(TARS[0])
        assert image.layers[1].chain_id == digest(f"{digest(TARS[0])} {digest(TARS[1])}".encode())
        assert image.layers[0].size == len(gzip.compress(TARS[0]))
        assert [content(layer) for layer in image.layers] == TARS
    assert set(os.listdir(tmp_path)) == {"layout", path.name}


@pytest.mark.parametrize("form", ["directory", "tar"])
def test_what_docker_saved_is_read(form: str, tmp_path: Path) -> None:
    path = docker_save(tmp_path / "saved")
    if form == "directory":
        shutil.copy(path / "1/layer.tar", path / "3/copy.tar")
        (path / "3/layer.tar").unlink()
        (path / "3/copy.tar").rename(path / "3/layer.tar")
    else:
        (tmp_path / "saved.tar").write_bytes(packed(path))
        path = tmp_path / "saved.tar"
    with open_archive(path) as archive:
        (image,) = archive.images
        assert image.tags == ("web:1",)
        assert [content(layer) for layer in image.layers] == [TARS[0], TARS[1], TARS[0]]
        assert [layer.chain_id for layer in image.layers] == chain_ids(image.config.diff_ids)


def test_what_docker_saves_now_is_both_and_has_the_names_of_both(layout: Layout) -> None:
    image = layout.image(annotations={"io.containerd.image.name": "docker.io/library/web:1", **named("1")})
    manifest = json.loads((layout.path / "blobs" / image["digest"].replace(":", "/")).read_bytes())
    config = "blobs/" + manifest["config"]["digest"].replace(":", "/")
    path = layout.top(image)
    (path / "manifest.json").write_text(json.dumps([{"Config": config, "RepoTags": ["web:1", "web:2"], "Layers": []}]))
    with open_archive(path) as archive:
        (found,) = archive.images
        assert found.tags == ("docker.io/library/web:1", "web:1", "web:2")


@pytest.mark.parametrize("kind", ["tar", "tar+gzip", "tar+zstd"])
def test_layers_of_each_type_are_unpacked(kind: str, layout: Layout) -> None:
    with open_archive(layout.top(layout.image(kinds=(kind, kind)))) as archive:
        assert [content(layer) for layer in archive.images[0].layers] == TARS


@pytest.mark.parametrize(
    ("how", "pack"),
    [
        (
            "gzip in members",
            lambda tar: b"".join(gzip.compress(tar[at : at + 5000]) for at in range(0, len(tar), 5000)),
        ),
        ("gzip with padding", lambda tar: gzip.compress(tar) + bytes(3000)),
        (
            "zstd in frames",
            lambda tar: b"".join(zstandard.compress(tar[at : at + 5000]) for at in range(0, len(tar), 5000)),
        ),
        ("zstd with skippable frames", lambda tar: zstandard.compress(tar) + b"\x50\x2a\x4d\x18\x04\0\0\0skip"),
        ("plain under gzip's name", bytes),
        ("zstd under gzip's name", zstandard.compress),
    ],
)
def test_a_stream_is_what_it_begins_with_and_may_have_parts(
    how: str, pack: Callable[[bytes], bytes], layout: Layout
) -> None:
    descriptor = layout.image()
    manifest = json.loads((layout.path / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes())
    manifest["layers"] = [layout.blob(pack(tar), f"{OCI}layer.v1.tar+gzip") for tar in TARS]
    with open_archive(layout.top(layout.json(manifest, f"{OCI}manifest.v1+json"))) as archive:
        assert [content(layer) for layer in archive.images[0].layers] == TARS


# -- platforms


def test_of_an_index_the_image_of_the_platform_is_taken(layout: Layout) -> None:
    index = layout.nested(*(layout.image(where, platform=of(where)) for where in (AMD64, ARM64, ARMV7)))
    path = layout.top(index)
    for where in (AMD64, ARM64, ARMV7, Platform.parse("linux/arm64")):
        with open_archive(path, platform=where) as archive:
            assert [where.runs(image.config.platform) for image in archive.images] == [True]
    with open_archive(path) as archive:
        assert [Platform.host().runs(image.config.platform) for image in archive.images] == [True]


def test_platforms_are_found_in_indexes_of_indexes_and_where_only_the_configuration_tells(layout: Layout) -> None:
    inner = layout.nested(layout.image(ARM64), layout.image(AMD64))
    with open_archive(layout.top(layout.nested(inner)), platform=ARM64) as archive:
        assert [image.config.platform for image in archive.images] == [ARM64]


def test_a_platform_that_is_not_there_is_refused_with_those_that_are(layout: Layout) -> None:
    attestation = layout.json({}, f"{OCI}manifest.v1+json", platform={"os": "unknown", "architecture": "unknown"})
    path = layout.top(layout.nested(layout.image(ARM64, platform=of(ARM64)), layout.image(ARMV7), attestation))
    with pytest.raises(NotFound, match=r"no image for linux/amd64; it has images for: linux/arm/v7, linux/arm64/v8$"):
        open_archive(path, platform=AMD64)


def test_a_single_image_is_taken_whatever_it_is_for_unless_a_platform_is_asked_for(layout: Layout) -> None:
    path = layout.top(layout.image(Platform("linux", "riscv64")))
    with open_archive(path) as archive:
        assert str(archive.images[0].config.platform) == "linux/riscv64"
    with pytest.raises(NotFound, match=r"for linux/amd64; it has images for: linux/riscv64$"):
        open_archive(path, platform=AMD64)


def test_images_of_several_names_are_all_there_and_one_of_two_names_is_one(layout: Layout) -> None:
    one, two = layout.image(), layout.image(kinds=("tar", "tar"))
    other = layout.image(ARM64)
    path = layout.top(
        {**one, "annotations": named("a:1")}, {**one, "annotations": named("b:1")}, {**other, "annotations": named("c")}
    )
    with open_archive(path) as archive:
        assert [image.tags for image in archive.images] == [("a:1", "b:1"), ("c",)]
    assert two["digest"] != one["digest"]


# -- refusals


def spoil(layout: Layout, change: Callable[[dict[str, Any]], object]) -> Path:
    """The layout of an image whose manifest has been changed."""
    descriptor = layout.image()
    manifest = json.loads((layout.path / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes())
    change(manifest)
    return layout.top(layout.json(manifest, f"{OCI}manifest.v1+json"))


def spoil_config(layout: Layout, change: Callable[[dict[str, Any]], object]) -> Path:
    def config_of(manifest: dict[str, Any]) -> None:
        config = json.loads((layout.path / "blobs" / manifest["config"]["digest"].replace(":", "/")).read_bytes())
        change(config)
        manifest["config"] = layout.json(config, f"{OCI}config.v1+json")

    return spoil(layout, config_of)


REFUSED: dict[str, tuple[Callable[[Layout], Path], str]] = {
    "a foreign layer": (
        lambda layout: spoil(
            layout,
            lambda m: m["layers"][1].update(mediaType=f"{DOCKER}image.rootfs.foreign.diff.tar.gzip", urls=["http://x"]),
        ),
        "layer 2 is not to be distributed",
    ),
    "a nondistributable layer": (
        lambda layout: spoil(
            layout, lambda m: m["layers"][0].update(mediaType=f"{OCI}layer.nondistributable.v1.tar+zstd")
        ),
        "layer 1 is not to be distributed",
    ),
    "a layer of another type": (
        lambda layout: spoil(layout, lambda m: m["layers"][0].update(mediaType="application/x-squashfs")),
        "layer 1 is of a type not known here: 'application/x-squashfs'",
    ),
    "a layer too many": (
        lambda layout: spoil(layout, lambda m: m["layers"].append(m["layers"][0])),
        "3 layers in the manifest, 2 in the configuration",
    ),
    "a digest of another kind": (
        lambda layout: spoil(layout, lambda m: m["layers"][0].update(digest="sha512:" + "0" * 128)),
        "not a sha256 digest",
    ),
    "a digest that is a path": (
        lambda layout: spoil(layout, lambda m: m["layers"][0].update(digest="sha256:../../../../etc/passwd")),
        "not a sha256 digest",
    ),
    "a configuration of something else": (
        lambda layout: spoil(
            layout, lambda m: m["config"].update(mediaType="application/vnd.cncf.helm.config.v1+json")
        ),
        "not a container image",
    ),
    "a configuration that is missing": (
        lambda layout: spoil(layout, lambda m: m["config"].update(digest="sha256:" + "0" * 64)),
        "blobs/sha256/0000",
    ),
    "no configuration": (lambda layout: spoil(layout, lambda m: m.pop("config")), "without a configuration"),
    "a configuration of no platform": (
        lambda layout: spoil_config(layout, lambda config: config.pop("architecture")),
        "'architecture' is missing",
    ),
    "a configuration of no layers": (
        lambda layout: spoil_config(layout, lambda config: config["rootfs"].pop("diff_ids")),
        "no rootfs.diff_ids",
    ),
    "a platform that is a screen's worth": (
        lambda layout: spoil_config(layout, lambda config: config.update(os="linux\n\x1b[2J")),
        "its platform is none: 'linux\\n\\x1b[2J'",
    ),
    "a history that is none": (
        lambda layout: spoil_config(layout, lambda config: config.update(history=["x"])),
        "history",
    ),
    "no images": (lambda layout: layout.top(), "the list in index.json is empty"),
    "a manifest of version 1": (
        lambda layout: layout.top(layout.json({}, f"{DOCKER}distribution.manifest.v1+prettyjws")),
        "manifests of type",
    ),
    "indexes without end": (
        lambda layout: layout.top(layout.nested(layout.nested(layout.nested(layout.nested(layout.nested()))))),
        "indexes within indexes",
    ),
    "an index as large as a layer": (
        lambda layout: layout.top(layout.blob(b"[" + b" " * LIMITS.document + b"]", f"{OCI}index.v1+json")),
        "more than any manifest needs",
    ),
    "an index that is no JSON": (
        lambda layout: layout.top(layout.blob(b"[" * 100_000, f"{OCI}index.v1+json")),
        "not JSON",
    ),
    "an index that is no object": (
        lambda layout: layout.top(layout.blob(b"[]", f"{OCI}index.v1+json")),
        "not a JSON object",
    ),
    "manifests that are no list": (
        lambda layout: layout.top(layout.json({"manifests": "x"}, f"{OCI}index.v1+json")),
        "not a list of descriptors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_is_refused_in_one_line(case: str, layout: Layout) -> None:
    make, said = REFUSED[case]
    path = make(layout)
    with pytest.raises(Error) as refusal:
        open_archive(path)
    assert said in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_a_document_that_was_changed_is_refused(layout: Layout) -> None:
    image = layout.image()
    (layout.path / "blobs" / image["digest"].replace(":", "/")).write_bytes(b"{}")
    with pytest.raises(Corrupt, match=f"{image['digest'][7:]}: its digest is"):
        open_archive(layout.top(image))


@pytest.mark.parametrize("link", ["blobs", "blobs/sha256", "index.json"])
def test_no_link_of_a_layout_is_followed(link: str, layout: Layout, tmp_path: Path) -> None:
    path = layout.top(layout.image())
    (path / link).rename(tmp_path / "elsewhere")
    (path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="cannot be read"):
        open_archive(path)


def test_a_name_that_leads_out_of_the_layout_is_not_followed(tmp_path: Path) -> None:
    path = docker_save(tmp_path / "saved")
    (tmp_path / "secret").write_bytes(TARS[0])
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[0]["Layers"][0] = "1/../../secret"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Corrupt, match="leads out of it"):
        open_archive(path)


def test_lists_are_of_a_bounded_length(layout: Layout) -> None:
    attestation = {"mediaType": f"{OCI}manifest.v1+json", "platform": {"os": "unknown", "architecture": "unknown"}}
    with pytest.raises(Invalid, match="1001 manifests; 1000 are allowed"):
        open_archive(layout.top(*[attestation] * 1001))
    index = layout.nested()
    with pytest.raises(Invalid, match="more than 1000 indexes"):
        open_archive(layout.top(*[index] * 1000))


def test_no_space_to_unpack_an_archive_is_said_as_that(tmp_path: Path) -> None:
    need_root()
    (tmp_path / "archive.tar.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    subprocess.run([need("mount"), "-t", "tmpfs", "-o", "size=64k", "none", scratch], check=True)
    try:
        with pytest.raises(NoSpace, match=r"no space to unpack it in .*scratch"):
            open_archive(tmp_path / "archive.tar.gz", scratch=scratch)
    finally:
        subprocess.run(["umount", scratch], check=True)


def damage_a_bit(data: bytes) -> bytes:
    return data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]


@pytest.mark.parametrize("kind", ["tar", "tar+gzip", "tar+zstd"])
@pytest.mark.parametrize("damage", [damage_a_bit, lambda data: data + b"x", lambda data: data[:-600]])
def test_a_layer_whose_bytes_are_not_those_of_its_digest_raises_before_its_end(
    kind: str, damage: Callable[[bytes], bytes], layout: Layout
) -> None:
    descriptor = layout.image(kinds=(kind, kind))
    manifest = json.loads((layout.path / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes())
    blob = layout.path / "blobs" / manifest["layers"][0]["digest"].replace(":", "/")
    blob.write_bytes(damage(blob.read_bytes()))
    with open_archive(layout.top(descriptor)) as archive:
        with pytest.raises(Corrupt, match=r"layer 1 of 2 \(blobs/sha256/"):
            content(archive.images[0].layers[0])
        assert content(archive.images[0].layers[1]) == TARS[1]


@pytest.mark.parametrize("kind", ["tar", "tar+gzip", "tar+zstd"])
def test_a_layer_that_is_not_what_the_configuration_says_raises_before_its_end(kind: str, layout: Layout) -> None:
    path = spoil_config(layout, lambda config: config["rootfs"].update(diff_ids=[digest(b"a"), digest(b"b")]))
    with (
        open_archive(path) as archive,
        pytest.raises(Corrupt, match=r"its diff_id is sha256:[0-9a-f]*, and should be sha256:"),
    ):
        content(archive.images[0].layers[0])


@pytest.mark.parametrize("kind", ["tar", "tar+gzip", "tar+zstd"])
def test_a_layer_unpacks_to_no_more_than_its_limit(kind: str, layout: Layout) -> None:
    with open_archive(layout.top(layout.image(kinds=(kind, kind)))) as archive:
        layer = archive.images[0].layers[1]
        assert len(content(layer, len(TARS[1]))) == len(TARS[1])
        with pytest.raises(Invalid, match=r"layer 2 of 2 .* unpacks to more than"):
            content(layer, len(TARS[1]) - 1)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_layer_may_be_left_before_its_end(taken: int, layout: Layout) -> None:
    with open_archive(layout.top(layout.image(kinds=("tar", "tar")))) as archive:
        before = len(os.listdir("/proc/self/fd"))
        with archive.images[0].layers[1].chunks(LIMIT) as chunks:
            for _ in range(taken):
                next(chunks)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_an_archive_that_is_a_bomb_stops_at_its_limit_and_leaves_nothing(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (tmp_path / "bomb.tar").write_bytes(pack(bytes(64 << 20)))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(Invalid, match="unpacks to more than 1 MiB"):
        open_archive(tmp_path / "bomb.tar", scratch=tmp_path / "scratch", limits=LIMITS._replace(spool=1 << 20))
    assert os.listdir(tmp_path / "scratch") == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "neither an OCI layout nor from docker save"),
        (b"hello", "is damaged at byte 0, or no tar at all"),
        (b"x" * 5000, "is damaged at byte 0, or no tar at all"),
        (make_tar(Member("index.json", b"{}"))[:1024] + b"x" * 512, "is damaged at byte 1024"),
        (make_tar(Member("big", pax=(("comment", "x" * 5_000_000),))), "larger than any member needs"),
        (make_tar(Member("manifest.json", b'[{"Config": "two\\nlines"}]')), "two\\nlines is missing"),
        (gzip.compress(b"x" * 5000)[:-9], "gzip data end early"),
        (gzip.compress(b"x" * 5000)[:-4] + b"abcd", "gzip data are damaged"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 100, "zstd data are damaged"),
        (make_tar(Member("etc/passwd")), "neither an OCI layout nor from docker save"),
        (make_tar(Member("manifest.json", b"[]")), "the list in manifest.json is empty"),
        (make_tar(Member("manifest.json", b"{}")), "not as docker save writes it"),
        (make_tar(Member("manifest.json", b'[{"Config": "x.json"}]')), "x.json is missing"),
        (make_tar(Member("manifest.json", type=tarfile.SYMTYPE, link="manifest.json")), "is missing"),
        (make_tar(Member("manifest.json", type=tarfile.SYMTYPE, link="/etc/passwd")), "is missing"),
        (make_tar(*(Member(f"{number}") for number in range(101))), "more than 100 members"),
    ],
)
def test_what_is_no_archive_is_refused_in_one_line(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(data)
    with pytest.raises(Error) as refusal:
        open_archive(tmp_path / "archive", limits=LIMITS._replace(members=100))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_configuration_of_docker_save_is_verified_by_its_name(tmp_path: Path) -> None:
    path = docker_save(tmp_path / "saved")
    config = next(name for name in path.glob("*.json") if name.stem != "manifest")
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(Corrupt, match="which is not its name"):
        open_archive(path)


def test_nothing_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file or directory"):
        open_archive(tmp_path / "nothing")
    with pytest.raises(Invalid, match="neither a directory nor a regular file"):
        open_archive(Path("/dev/null"))
    with pytest.raises(Invalid, match=r"no index\.json"):
        open_archive(tmp_path)


@pytest.mark.parametrize("text", ["amd64", "linux/", "/amd64", "a/b/c/d", ""])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="not a platform"):
        Platform.parse(text)
