"""Small images for tests: layers member by member, and the OCI layouts that hold them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MTIME = 1_700_000_000  # of every member


def directory(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return _member(name, tarfile.DIRTYPE, mode), b""


def file(name: str, content: bytes | str = "", mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    data = content.encode() if isinstance(content, str) else content
    member = _member(name, tarfile.REGTYPE, mode)
    member.size = len(data)
    return member, data


def owned(member: tuple[tarfile.TarInfo, bytes], uid: int, gid: int) -> tuple[tarfile.TarInfo, bytes]:
    member[0].uid, member[0].gid = uid, gid
    return member


def attributed(member: tuple[tarfile.TarInfo, bytes], **xattrs: bytes) -> tuple[tarfile.TarInfo, bytes]:
    """With extended attributes; in their names a dot is written as two underscores."""
    for name, value in xattrs.items():
        key = f"SCHILY.xattr.{name.replace('__', '.')}"
        member[0].pax_headers = {**member[0].pax_headers, key: value.decode("utf-8", "surrogateescape")}
    return member


def device(name: str, major: int, minor: int) -> tuple[tarfile.TarInfo, bytes]:
    member = _member(name, tarfile.CHRTYPE, 0o600)
    member.devmajor, member.devminor = major, minor
    return member, b""


def _member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.mtime = kind, mode, MTIME
    return member


def layer(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def layout(path: Path, images: Mapping[str, Sequence[bytes]], *, run: Mapping[str, object] | None = None) -> Path:
    """An OCI layout of the layers of each image, by its tag; `run` is what their configs say about running them."""
    manifests = []
    (path / "blobs/sha256").mkdir(parents=True)
    for tag, layers in images.items():
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(run or {}),
            "rootfs": {"type": "layers", "diff_ids": [digest(data) for data in layers]},
            "history": [{"created_by": f"layer {number} of {tag}"} for number, _ in enumerate(layers)],
        }
        manifest = {
            "schemaVersion": 2,
            "config": _blob(path, json.dumps(config).encode(), "config.v1+json"),
            "layers": [_blob(path, data, "layer.v1.tar") for data in layers],
        }
        annotations = {"org.opencontainers.image.ref.name": tag}
        manifests.append({**_blob(path, json.dumps(manifest).encode(), "manifest.v1+json"), "annotations": annotations})
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return path


def _blob(path: Path, data: bytes, kind: str) -> dict[str, Any]:
    name = digest(data)
    (path / "blobs" / name.replace(":", "/")).write_bytes(data)
    return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": name, "size": len(data)}


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
