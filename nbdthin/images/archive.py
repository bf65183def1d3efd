"""Image archives: an OCI layout, as a directory or a tar, or what `docker save` writes; also compressed as a whole.

    with open_archive(path) as archive:
        for image in archive.images:
            for layer in image.layers:
                with layer.chunks(limit) as tar:
                    apply(tar, root)

Everything that an archive says is checked before it is believed: sizes and counts against `Limits`, every blob against
its digest, every layer against its diff_id. A layer is verified while it streams, so what came of it is worth something
only when the last chunk was taken: taking that raises where a digest is wrong, and the caller throws away what it has.

What is read: media types of OCI and of Docker's manifest version 2, layers plain or compressed with gzip or zstd.
Not read: manifests of version 1, layers that lie elsewhere (foreign, nondistributable).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import posixpath
import queue
import stat
import tempfile
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

from nbdthin.errors import Corrupt, Invalid, NoSpace, NotFound
from nbdthin.images.config import Config, Platform, chain_ids, check_digest, digest_of, parse_json, parse_object
from nbdthin.images.tape import FileTape, Headers, shown
from nbdthin.units import GiB, KiB, MiB, format_size

CHUNK = 256 * KiB  # bytes of a layer that are handed on at once: they stay in a core's cache meanwhile
_AHEAD = 32  # chunks that are ready before anyone wants them

_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_LAYERS = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
_ELSEWHERE = (
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)

_REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"  # what containerd and newer `docker save` add: the name with its registry

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_COMPRESSED = (_GZIP, _ZSTD)
_ZSTD_WINDOW = 128 * MiB  # what `zstd --ultra --long=27` asks for; more is refused, as it is taken from memory


class Limits(NamedTuple):
    """How large what an archive has may be, before it is taken for an attack."""

    document: int = 4 * MiB  # bytes of one index, manifest or configuration, as registries have it
    documents: int = 1000  # indexes, manifests and configurations together, and entries in one of them
    depth: int = 4  # indexes within indexes
    members: int = 100_000  # of the archive itself, which has one for each blob
    spool: int = 256 * GiB  # bytes that an archive compressed as a whole may unpack to, in `scratch`


LIMITS = Limits()


class Blobs(Protocol):
    """The files of an archive, by their path in it."""

    def names(self) -> Sequence[str]: ...

    def open(self, name: str) -> tuple[BinaryIO, int]:
        """A new reader of the file, for any thread, and its size in bytes. Raises NotFound and Corrupt."""
        ...

    def close(self) -> None: ...


class _Directory:
    """An OCI layout as a directory. No link is followed: it could lead anywhere."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> Sequence[str]:
        return os.listdir(self._path)

    def open(self, name: str) -> tuple[BinaryIO, int]:
        parts = name.split("/")
        if ".." in parts:
            raise Corrupt(self._path, None, f"{shown(name)} leads out of it")
        where = os.open(self._path, os.O_PATH | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=where)
                os.close(where)
                where = below
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=where)
        except FileNotFoundError:
            raise NotFound(f"{self._path}: {shown(name)} is missing") from None
        except OSError as error:
            raise Corrupt(self._path, None, f"{shown(name)} cannot be read: {error.strerror}") from None
        finally:
            os.close(where)
        status = os.fstat(fd)
        file = open(fd, "rb", buffering=0)
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise Corrupt(self._path, None, f"{shown(name)} is not a regular file")
        return file, status.st_size

    def close(self) -> None:
        pass


class _Part:
    """A range of a file as a file of its own; each has its own position, and any number may be read at once."""

    def __init__(self, fd: int, position: int, size: int) -> None:
        self._fd = fd
        self._position = position
        self._end = position + size

    def read(self, size: int = -1) -> bytes:
        left = self._end - self._position
        data = os.pread(self._fd, left if size < 0 else min(size, left), self._position)
        self._position += len(data)
        return data

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class _Tar:
    """The same as a tar, which is not unpacked: where each of its files lies is enough.

    `docker save` writes a layer that it has written before as a symbolic link to that; both kinds of links are
    followed within the archive.
    """

    def __init__(self, path: Path, file: BinaryIO, limits: Limits) -> None:
        self._path = path
        self._file = file
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        for number, member in enumerate(Headers(FileTape(file), str(path)).all()):
            if number >= limits.members:
                raise Invalid(f"{path}: more than {limits.members} members, so this is no image archive")
            name = posixpath.normpath(member.name)
            if member.isreg() and member.sparse is None:
                self._files[name] = (member.offset_data, member.size)
            elif member.issym():
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                self._links[name] = posixpath.normpath(member.linkname)

    def names(self) -> Sequence[str]:
        return [*self._files, *self._links]

    def open(self, name: str) -> tuple[BinaryIO, int]:
        wanted = name = posixpath.normpath(name)
        for _ in range(8):  # a link to a link is as much as was ever seen
            if name in self._files:
                position, size = self._files[name]
                return _Part(self._file.fileno(), position, size), size  # type: ignore[return-value]  # reads, closes
            name = self._links.get(name, "")
        raise NotFound(f"{self._path}: {shown(wanted)} is missing")

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Layer:
    """One layer of an image, still in the archive, which has to be open to read it."""

    diff_id: str
    chain_id: str
    size: int  # bytes in the archive, compressed as they are there
    name: str  # for people: "layer 2 of 3 (blobs/sha256/...)"
    _blob: str = field(repr=False)
    _digest: str | None = field(repr=False)  # of what is in the archive; docker save's older form has none
    _archive: Archive = field(repr=False)

    @contextmanager
    def chunks(self, limit: int) -> Iterator[Iterator[bytes]]:
        """The uncompressed tar in pieces, of up to `limit` bytes together; read and unpacked by a thread of its own.

        Going on after the last piece raises Corrupt where a digest is wrong, Invalid beyond the limit.
        """
        reader = _Ahead(self._verified(limit))
        try:
            yield iter(reader)
        finally:
            reader.close()

    def _verified(self, limit: int) -> Generator[bytes, None, None]:
        path, where = self._archive.path, self.name
        plain = packed = hashlib.sha256()  # one is enough for what is not compressed
        file, size = self._archive.blobs.open(self._blob)
        with file:
            if size != self.size:
                raise Corrupt(path, None, f"{where}: it has {size} bytes, and should have {self.size}")
            raw = _read_chunks(file)
            first = next(raw, b"")
            raw = itertools.chain([first], raw)
            if self._digest is not None and first.startswith(_COMPRESSED):
                packed = hashlib.sha256()
                raw = _hashed(raw, packed.update)
            total = 0
            try:
                for chunk in decompressed(raw):
                    total += len(chunk)
                    if total > limit:
                        raise Invalid(f"{path}: {where}: it unpacks to more than {format_size(limit)}")
                    plain.update(chunk)
                    yield chunk
                for _ in raw:  # what follows the compressed data counts for the digest
                    pass
            except _BadStream as error:
                raise Corrupt(path, None, f"{where}: {error}") from None
        for what, wanted, got in (("digest", self._digest, packed), ("diff_id", self.diff_id, plain)):
            if wanted is not None and wanted != f"sha256:{got.hexdigest()}":
                raise Corrupt(path, None, f"{where}: its {what} is sha256:{got.hexdigest()}, and should be {wanted}")


@dataclass(frozen=True)
class Image:
    config: Config
    layers: tuple[Layer, ...]  # the lowest first
    tags: tuple[str, ...]  # names that the archive has for it, as they are there


class Archive:
    """An archive that is open; a context manager. `path` is for messages."""

    def __init__(self, path: Path, blobs: Blobs, platform: Platform | None, limits: Limits) -> None:
        self.path = path
        self.blobs = blobs
        self._limits = limits
        self._documents = 0
        names = set(blobs.names())
        if "index.json" in names:
            self.images = self._from_index(platform, "manifest.json" in names)
        elif "manifest.json" in names:
            self.images = self._from_docker(platform)
        else:
            raise Invalid(f"{path}: neither an OCI layout nor from docker save: no index.json, no manifest.json")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.blobs.close()

    # -- documents

    def _document(self, name: str, digest: str | None = None) -> bytes:
        """All of a small file, verified if it has a digest."""
        self._documents += 1
        if self._documents > self._limits.documents:
            raise Invalid(f"{self.path}: more than {self._limits.documents} indexes, manifests and configurations")
        file, size = self.blobs.open(name)
        with file:
            if size > self._limits.document:
                raise Invalid(f"{self.path}: {shown(name)} has {format_size(size)}, more than any manifest needs")
            data = b"".join(_read_chunks(file))
        if digest is not None and digest_of(data) != digest:
            raise Corrupt(self.path, None, f"{shown(name)}: its digest is {digest_of(data)}, and should be {digest}")
        return data

    def _blob_document(self, descriptor: Mapping[str, Any], what: str) -> bytes:
        digest = check_digest(descriptor.get("digest"), f"{self.path}: {what}")
        return self._document(_blob_name(digest), digest)

    # -- OCI layouts

    def _from_index(self, platform: Platform | None, docker: bool) -> tuple[Image, ...]:
        names = self._docker_names() if docker else {}
        index = parse_object(self._document("index.json"), f"{self.path}: index.json")
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for descriptor in self._descriptors(index, "manifests", "index.json"):
            groups.setdefault(_name_of(descriptor), []).append(descriptor)
        if not groups:
            raise Invalid(f"{self.path}: it has no image: the list in index.json is empty")
        found: dict[str, Image] = {}
        for name, descriptors in groups.items():
            for manifest in self._choose(descriptors, platform):
                image = self._image(manifest, (name,) if name else ())
                known = found.get(image.config.digest, image)
                more = names.get(image.config.digest, ())
                found[image.config.digest] = replace(known, tags=_union(known.tags, image.tags, more))
        return tuple(found.values())

    def _choose(self, descriptors: list[Mapping[str, Any]], platform: Platform | None) -> list[Mapping[str, Any]]:
        """The manifests among these, and in the indexes among these, that are for the platform."""
        manifests: dict[str, tuple[Platform, Mapping[str, Any]]] = {}
        indexed = len(descriptors) > 1
        waiting = [(descriptor, 1) for descriptor in descriptors]
        while waiting:
            descriptor, depth = waiting.pop(0)
            kind = descriptor.get("mediaType")
            if kind in _INDEXES:
                if depth > self._limits.depth:
                    raise Invalid(f"{self.path}: indexes within indexes, more than {self._limits.depth} deep")
                what = f"index {shown(str(descriptor.get('digest')))}"
                index = parse_object(self._blob_document(descriptor, "index"), f"{self.path}: {what}")
                waiting += [(inner, depth + 1) for inner in self._descriptors(index, "manifests", what)]
                indexed = True
                continue
            if kind not in _MANIFESTS:
                raise Invalid(f"{self.path}: manifests of type {shown(str(kind))!r} are not known here")
            where = _platform_of(descriptor, f"{self.path}: an index")
            if where is not None and where.os == "unknown":
                continue  # a build's attestation: no image
            manifest = parse_object(self._blob_document(descriptor, "manifest"), f"{self.path}: manifest")
            if where is None:
                where = self._config_of(manifest).platform
            manifests.setdefault(str(descriptor["digest"]), (where, manifest))
        wanted = platform or (Platform.host() if indexed else None)
        chosen = [manifest for where, manifest in manifests.values() if wanted is None or wanted.runs(where)]
        if not chosen:
            there = ", ".join(sorted({str(where) for where, _ in manifests.values()})) or "none"
            raise NotFound(f"{self.path}: no image for {wanted}; it has images for: {there}")
        return chosen

    def _descriptors(self, document: Mapping[str, Any], key: str, what: str) -> list[Mapping[str, Any]]:
        items = document.get(key)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise Invalid(f"{self.path}: {what}: its {key!r} is not a list of descriptors")
        if len(items) > self._limits.documents:
            raise Invalid(f"{self.path}: {what}: {len(items)} {key}; {self._limits.documents} are allowed")
        return items

    def _config_of(self, manifest: Mapping[str, Any]) -> Config:
        descriptor = manifest.get("config")
        if not isinstance(descriptor, dict):
            raise Invalid(f"{self.path}: a manifest without a configuration")
        kind = descriptor.get("mediaType")
        if kind not in _CONFIGS:
            raise Invalid(f"{self.path}: not a container image: its configuration is of type {shown(str(kind))!r}")
        raw = self._blob_document(descriptor, "configuration")
        return Config.parse(raw, f"{self.path}: configuration {digest_of(raw)}")

    def _image(self, manifest: Mapping[str, Any], tags: tuple[str, ...]) -> Image:
        blobs = []
        for number, descriptor in enumerate(self._descriptors(manifest, "layers", "manifest"), start=1):
            kind, size = descriptor.get("mediaType"), descriptor.get("size")
            if isinstance(kind, str) and kind.startswith(_ELSEWHERE):
                raise Invalid(f"{self.path}: layer {number} is not to be distributed ({kind}): it lies elsewhere")
            if kind not in _LAYERS:
                raise Invalid(f"{self.path}: layer {number} is of a type not known here: {shown(str(kind))!r}")
            if not isinstance(size, int):
                raise Invalid(f"{self.path}: layer {number} has no size")
            digest = check_digest(descriptor.get("digest"), f"{self.path}: layer {number}")
            blobs.append((_blob_name(digest), digest, size))
        config = self._config_of(manifest)
        return Image(config, self._layers(config, blobs), tags)

    def _layers(self, config: Config, blobs: Sequence[tuple[str, str | None, int]]) -> tuple[Layer, ...]:
        """The layers, of (name in the archive, digest, bytes) of each."""
        if len(blobs) != len(config.diff_ids):
            raise Invalid(
                f"{self.path}: {len(blobs)} layers in the manifest, {len(config.diff_ids)} in the configuration"
            )
        return tuple(
            Layer(diff_id, chain_id, size, f"layer {number} of {len(blobs)} ({shown(name)})", name, digest, self)
            for number, (diff_id, chain_id, (name, digest, size)) in enumerate(
                zip(config.diff_ids, chain_ids(config.diff_ids), blobs, strict=True), start=1
            )
        )

    # -- docker save

    def _docker_entries(self) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
        """Of each image in manifest.json: the names of its configuration, tags and layers."""
        entries = parse_json(self._document("manifest.json"), f"{self.path}: manifest.json")
        for entry in entries if isinstance(entries, list) else [None]:
            fields = entry if isinstance(entry, dict) else {}
            config, tags, layers = fields.get("Config"), fields.get("RepoTags") or [], fields.get("Layers") or []
            if not isinstance(config, str) or not _all_strings(tags) or not _all_strings(layers):
                raise Invalid(f"{self.path}: manifest.json is not as docker save writes it")
            yield config, tuple(tags), layers

    def _docker_names(self) -> dict[str, tuple[str, ...]]:
        """Tags by the digest of the configuration, from an archive of both forms."""
        names: dict[str, tuple[str, ...]] = {}
        for config, tags, _ in self._docker_entries():
            digest = f"sha256:{posixpath.basename(config).removesuffix('.json')}"
            names[digest] = _union(names.get(digest, ()), tags)
        return names

    def _from_docker(self, platform: Platform | None) -> tuple[Image, ...]:
        images, there = [], set()
        for name, tags, layers in self._docker_entries():
            raw = self._document(name)
            config = Config.parse(raw, f"{self.path}: {shown(name)}")
            if posixpath.basename(name).removesuffix(".json") != config.digest.removeprefix("sha256:"):
                raise Corrupt(self.path, None, f"{shown(name)}: its digest is {config.digest}, which is not its name")
            there.add(str(config.platform))
            if platform is not None and not platform.runs(config.platform):
                continue
            blobs = []
            for layer in layers:
                file, size = self.blobs.open(layer)
                file.close()
                blobs.append((layer, None, size))
            images.append(Image(config, self._layers(config, blobs), tags))
        if not images:
            if platform is None:
                raise Invalid(f"{self.path}: it has no image: the list in manifest.json is empty")
            raise NotFound(f"{self.path}: no image for {platform}; it has images for: {', '.join(sorted(there))}")
        return tuple(images)


def open_archive(
    path: Path, *, platform: Platform | None = None, scratch: Path | None = None, limits: Limits = LIMITS
) -> Archive:
    """The images at `path`, of `platform`.

    Without one: of an index with several, the host's; a single image is taken whatever it is for. An archive that is
    compressed as a whole is unpacked to a file without a name in `scratch` (the system's place for such by default).
    Raises NotFound (nothing there, no image of the platform), Invalid (no image archive), Corrupt, NoSpace, OSError.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file or directory") from None
    if stat.S_ISDIR(mode):
        return Archive(path, _Directory(path), platform, limits)
    if not stat.S_ISREG(mode):
        raise Invalid(f"{path}: neither a directory nor a regular file")
    with ExitStack() as stack:
        file: BinaryIO = stack.enter_context(open(path, "rb"))
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(_COMPRESSED):
            with file:
                file = stack.enter_context(_spooled(path, file, scratch, limits.spool))
        archive = Archive(path, _Tar(path, file, limits), platform, limits)
        stack.pop_all()
    return archive


def _spooled(path: Path, file: BinaryIO, scratch: Path | None, limit: int) -> BinaryIO:
    """A compressed file's content as a file, which is gone when it is closed."""
    with ExitStack() as stack:
        spool: BinaryIO = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
        try:
            for chunk in decompressed(_read_chunks(file)):
                if spool.tell() + len(chunk) > limit:
                    raise Invalid(f"{path}: it unpacks to more than {format_size(limit)}")
                spool.write(chunk)
            spool.flush()
        except _BadStream as error:
            raise Corrupt(path, None, str(error)) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = scratch or tempfile.gettempdir()
            raise NoSpace(f"{path}: no space to unpack it in {place} (TMPDIR names another place)") from error
        spool.seek(0)
        stack.pop_all()
    return spool


# -- streams


class _BadStream(Exception):
    """What is compressed is damaged or ends early."""


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _hashed(chunks: Iterator[bytes], update: Callable[[bytes], object]) -> Iterator[bytes]:
    for chunk in chunks:
        update(chunk)
        yield chunk


def decompressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """What is in a stream that is plain, or in gzip or zstd, in pieces of at most CHUNK.

    By its first bytes: media types are wrong often enough that no tool goes by them, and a tar begins with neither.
    """
    first = next(chunks, b"")
    if first.startswith(_GZIP):
        return _gunzip(first, chunks)
    if first.startswith(_ZSTD):
        return _unzstd(first, chunks)
    return itertools.chain([first] if first else [], chunks)


def _gunzip(data: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """All members of the stream: pigz and estargz write many."""
    inflate = zlib.decompressobj(wbits=31)
    while True:
        try:
            piece = inflate.decompress(data, CHUNK)
        except zlib.error as error:
            raise _BadStream(f"its gzip data are damaged: {error}") from None
        if piece:
            yield piece
        if inflate.eof:
            data = inflate.unused_data.lstrip(b"\0")  # padding is allowed, and written to tapes
            while not data and (more := next(chunks, b"")):
                data = more.lstrip(b"\0")
            if not data:
                return
            inflate = zlib.decompressobj(wbits=31)
            continue
        data = inflate.unconsumed_tail
        if not data and not piece:
            data = next(chunks, b"")
            if not data:
                raise _BadStream("its gzip data end early")


def _unzstd(data: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """All frames of the stream: zstd:chunked writes many, some of them skippable."""
    import zstandard

    source = _Joined(data, chunks)
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(
            source,  # type: ignore[arg-type]  # it reads, and no more is asked of it
            read_size=CHUNK,
            read_across_frames=True,
        )
        while piece := reader.read(CHUNK):
            yield piece
    except zstandard.ZstdError as error:
        raise _BadStream(f"its zstd data are damaged: {error}") from None


class _Joined:
    """Chunks as a file, each given whole: none is larger than what is asked for."""

    def __init__(self, first: bytes, rest: Iterator[bytes]) -> None:
        self._first: bytes | None = first
        self._rest = rest

    def read(self, size: int) -> bytes:
        first, self._first = self._first, None
        return next(self._rest, b"") if first is None else first


class _Ahead:
    """What an iterator gives, made by a thread that is up to _AHEAD ahead: hashing and inflating leave the GIL."""

    def __init__(self, source: Generator[bytes, None, None]) -> None:
        self._source = source
        self._ready: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="layer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        last: BaseException | None = None
        try:
            with closing(self._source):
                for item in self._source:
                    self._ready.put(item)
                    if self._given_up:
                        return
        except BaseException as error:  # raised again where it is waited for
            last = error
        self._ready.put(last)

    def __iter__(self) -> Iterator[bytes]:
        while not isinstance(item := self._ready.get(), BaseException | None):
            yield item
        self._ready.put(item)  # the end stays the end
        if item is not None:
            raise item

    def close(self) -> None:
        """Let the thread end, wherever it is."""
        self._given_up = True
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()


# -- small things


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _name_of(descriptor: Mapping[str, Any]) -> str:
    """The name that an index gives an image; empty if none."""
    notes = descriptor.get("annotations")
    name = (notes.get(_FULL_NAME) or notes.get(_REF_NAME)) if isinstance(notes, dict) else None
    return name if isinstance(name, str) else ""


def _platform_of(descriptor: Mapping[str, Any], what: str) -> Platform | None:
    where = descriptor.get("platform")
    if not isinstance(where, dict):
        return None
    return Platform.checked(*(where.get(key) or "" for key in ("os", "architecture", "variant")), what=what)


def _union(*groups: Sequence[str]) -> tuple[str, ...]:
    """Each name once, in the order of its first appearance."""
    return tuple(dict.fromkeys(name for group in groups for name in group))


def _all_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
