"""Small images for tests: layers of members, and the OCI layouts that hold them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.images.trees import Member


def file(name: str, content: bytes | str = "", mode: int = 0o644) -> Member:
    return Member(name, content.encode() if isinstance(content, str) else content, mode=mode)


def owned(member: Member, uid: int, gid: int) -> Member:
    return member._replace(owner=(uid, gid))


def device(name: str, major: int, minor: int) -> Member:
    return Member(name, type=tarfile.CHRTYPE, mode=0o600, device=(major, minor))


def attributed(member: Member, xattrs: Mapping[str, bytes]) -> Member:
    records = ((f"SCHILY.xattr.{name}", value.decode("utf-8", "surrogateescape")) for name, value in xattrs.items())
    return member._replace(pax=tuple(records))


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
