"""Writing images: an OCI layout, as a directory or as one tar, which `docker load` takes too.

    with new_layout(Path("web.tar")) as layout:
        with layout.layer() as layer:
            write_layer(changes(old, new), new, layer.write)
        layout.image(config, [layer.written], ["web:1"])

What is written has its name when it is whole, or does not exist. The same content gives the same bytes: no time, no
owner, nothing of this machine is in it, but for the compression, which a new version of its library may do better.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nbdthin.errors import Exists, Invalid, NotFound
from nbdthin.images.config import Config, digest_of, json_bytes

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"

GZIP, ZSTD = "gzip", "zstd"


class Written(NamedTuple):
    """A layer that a layout has."""

    diff_id: str
    digest: str  # of the blob
    size: int  # bytes of the blob
    media_type: str


class _Target(Protocol):
    """Where a layout's files go, one after the other."""

    def begin(self) -> None:
        """A blob is to be written, whose digest will be known at its end."""
        ...

    def write(self, data: bytes) -> None: ...

    def end(self, name: str) -> None:
        """What was written is the file `name`, which may be there already: then it is the same."""
        ...

    def finish(self, path: Path) -> None: ...

    def discard(self) -> None: ...


class _Directory:
    def __init__(self, path: Path) -> None:
        self._draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        self._blob = self._draft / ".blob"

    def begin(self) -> None:
        self._file = open(self._blob, "xb")

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def end(self, name: str) -> None:
        self._file.close()
        path = self._draft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._blob.rename(path)

    def finish(self, path: Path) -> None:
        self._draft.chmod(0o777 & ~_umask())
        os.rename(self._draft, path)

    def discard(self) -> None:
        with suppress(AttributeError):
            self._file.close()
        shutil.rmtree(self._draft, ignore_errors=True)


class _Tar:
    """A blob's header is written when its name is known, into the block that was left for it."""

    def __init__(self, path: Path) -> None:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        self._draft = Path(name)
        self._file = open(fd, "w+b")
        self._begun = 0
        self._names: set[str] = set()

    def begin(self) -> None:
        self._begun = self._file.tell()
        self._file.write(bytes(tarfile.BLOCKSIZE))

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def end(self, name: str) -> None:
        if name in self._names:
            self._file.seek(self._begun)
            self._file.truncate()
            return
        self._names.add(name)
        member = tarfile.TarInfo(name)
        member.size = self._file.tell() - self._begun - tarfile.BLOCKSIZE
        self._file.write(bytes(-member.size % tarfile.BLOCKSIZE))
        after = self._file.tell()
        self._file.seek(self._begun)
        self._file.write(member.tobuf(tarfile.GNU_FORMAT))
        self._file.seek(after)

    def finish(self, path: Path) -> None:
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.flush()
        os.fchmod(self._file.fileno(), 0o666 & ~_umask())
        self._file.close()
        os.rename(self._draft, path)

    def discard(self) -> None:
        self._file.close()
        self._draft.unlink(missing_ok=True)


class LayerWriter:
    """Takes the uncompressed tar of one layer. `written` is set when its context ends."""

    written: Written

    def __init__(self, target: _Target, compression: str | None) -> None:
        self._target = target
        self._compressor = _compressor(compression)
        self._media_type = _LAYER + (f"+{compression}" if compression else "")
        self._plain, self._packed = hashlib.sha256(), hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._plain.update(data)
        self._put(self._compressor.compress(data) if self._compressor else bytes(data))

    def _put(self, data: bytes) -> None:
        if data:
            self._packed.update(data)
            self._size += len(data)
            self._target.write(data)

    def _end(self) -> None:
        if self._compressor:
            self._put(self._compressor.flush())
        digest = f"sha256:{self._packed.hexdigest()}"
        self.written = Written(f"sha256:{self._plain.hexdigest()}", digest, self._size, self._media_type)
        self._target.end(_blob_name(digest))


class Layout:
    """A layout that is being written; see the module."""

    def __init__(self, target: _Target, docker: bool) -> None:
        self._target = target
        self._docker = docker
        self._manifests: list[dict[str, Any]] = []
        self._saved: list[dict[str, Any]] = []  # for manifest.json

    @contextmanager
    def layer(self, compression: str | None = GZIP) -> Iterator[LayerWriter]:
        """A new blob. Raises Invalid for a compression that is neither gzip nor zstd nor None."""
        writer = LayerWriter(self._target, compression)
        self._target.begin()
        yield writer
        writer._end()

    def image(self, config: Config, layers: Sequence[Written], names: Sequence[str] = ()) -> str:
        """An image of layers written here before, whose diff_ids `config` has. Returns the digest of its manifest."""
        if tuple(layer.diff_id for layer in layers) != config.diff_ids:
            raise Invalid("the configuration is of other layers than those of the image")
        self._file(_blob_name(config.digest), config.raw)
        manifest = json_bytes(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": {"mediaType": _CONFIG, "digest": config.digest, "size": len(config.raw)},
                "layers": [
                    {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers
                ],
            }
        )
        digest = digest_of(manifest)
        self._file(_blob_name(digest), manifest)
        where = config.platform
        descriptor = {
            "mediaType": _MANIFEST,
            "digest": digest,
            "size": len(manifest),
            "platform": {key: value for key, value in where._asdict().items() if value},
        }
        for name in names or [""]:
            notes = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
            self._manifests.append(descriptor | notes)
        self._saved.append(
            {
                "Config": _blob_name(config.digest),
                "RepoTags": [name for name in names if ":" in name],
                "Layers": [_blob_name(layer.digest) for layer in layers],
            }
        )
        return digest

    def _file(self, name: str, data: bytes) -> None:
        self._target.begin()
        self._target.write(data)
        self._target.end(name)

    def _finish(self) -> None:
        self._file("oci-layout", json_bytes({"imageLayoutVersion": "1.0.0"}))
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json"}
        self._file("index.json", json_bytes(index | {"manifests": self._manifests}))
        if self._docker:
            self._file("manifest.json", json_bytes(self._saved))


@contextmanager
def new_layout(path: Path) -> Iterator[Layout]:
    """A layout at `path`: one tar if the name ends in .tar, else a directory; nothing if the context ends in an error.

    Raises Exists, NotFound where there is no directory to put it in, and OSError.
    """
    if os.path.lexists(path):
        raise Exists(f"{path}: it is there already; remove it, or write to another place")
    if not path.parent.is_dir():
        raise NotFound(f"{path.parent}: no such directory")
    tar = path.suffix == ".tar"
    target: _Target = _Tar(path) if tar else _Directory(path)
    try:
        layout = Layout(target, docker=tar)
        yield layout
        layout._finish()
        target.finish(path)
    except BaseException:
        target.discard()
        raise


class _Compressor(Protocol):
    def compress(self, data: bytes | memoryview, /) -> bytes: ...

    def flush(self) -> bytes: ...


def _compressor(compression: str | None) -> _Compressor | None:
    if compression == GZIP:
        return zlib.compressobj(wbits=31)
    if compression == ZSTD:
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).compressobj()
    if compression is None:
        return None
    raise Invalid(f"not a compression of layers: {compression!r} (gzip, zstd or none)")


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _umask() -> int:
    """What a plain new file would not get; a temporary one is its owner's alone."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("\nUmask:")[2].split()[0], 8)
