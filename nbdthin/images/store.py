"""What a pool holds of images, and how it is written down: as labels of the names themselves.

    base/NAME            snapshot   an empty file system
    layer/CHAIN.FS       snapshot   the file system once a layer was unpacked over the one below
    image/ID.FS          snapshot   the same as its topmost layer, with the image's config and tags
    container/NAME       volume     a clone of an image
    building/...         volume     something that is being made

CHAIN, ID and FS are the beginnings of the layer's chain id, the image's id and the UUID of the file system, which
everything that comes from one base has in common. What stands on what is the pool's own lineage, so names, facts
and data share one commit, and there is no second list that could disagree. Renaming is allowed: nothing is looked up
by name but bases and containers.

Whoever makes or removes holds `locked`, and labels `BUILDING` what is not finished: under the lock, all that has this
label was left by someone who died, and may go.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from nbdthin import devices
from nbdthin.control.client import Client, connect
from nbdthin.control.rows import Export
from nbdthin.errors import Error, InUse, Invalid, NotFound
from nbdthin.images.config import Config, chain_ids
from nbdthin.pool.commands import MAX_LABEL, MAX_LABELS

KIND = "nbdthin.kind"  # base, layer, image or container
FS = "nbdthin.fs"  # ext4 or xfs
UUID = "nbdthin.fs.uuid"
FS_SIZE = "nbdthin.fs.size"  # bytes that the file system was made or grown for
MKFS = "nbdthin.fs.options"  # of a base
CHAIN = "nbdthin.chain"  # of a layer: its chain id
ID = "nbdthin.id"  # of an image: digest of its config
CONFIG = "nbdthin.config."  # and a number: the parts of an image's config
TAG = "nbdthin.tag."  # and REPO:TAG; the value says nothing
FLAT = "nbdthin.flattened"  # of an image: its layers are one
PARENT = "nbdthin.parent"  # of a committed image: the id of the one it was made from
IMAGE = "nbdthin.image"  # of a container: the id of its image
BUILDING = "nbdthin.building"

SHOWN = 12  # digits of an id, for people and in names

_DOCKER = ("index.docker.io/", "docker.io/", "library/")
_REPOSITORY = re.compile(r"(?:[A-Za-z0-9]+(?:[.-]+[A-Za-z0-9]+)*(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True, slots=True)
class FileSystem:
    kind: str
    uuid: str
    size: int  # bytes

    def labels(self) -> dict[str, str]:
        return {FS: self.kind, UUID: self.uuid, FS_SIZE: str(self.size)}

    @classmethod
    def of(cls, export: Export) -> Self:
        labels = export.labels
        try:
            return cls(labels[FS], labels[UUID], int(labels[FS_SIZE]))
        except (KeyError, ValueError) as error:
            raise Error(f"labels of {export.name!r} are missing: which file system it holds is not known") from error


@dataclass(frozen=True, slots=True)
class Base:
    """`name` is without base/."""

    name: str
    file_system: FileSystem
    options: str  # of mkfs
    exclusive: int  # bytes
    created: float


@dataclass(frozen=True, slots=True)
class Image:
    """`id` is the digest of its config, `layers` are names, the lowest first. `size`: bytes it refers to."""

    id: str
    tags: tuple[str, ...]
    created: float
    size: int
    file_system: FileSystem
    layers: tuple[str, ...]
    parent: str | None  # the id of the image that it was committed on top of
    name: str  # of its snapshot

    @property
    def shown(self) -> str:
        """What people call it."""
        return self.tags[0] if self.tags else short(self.id)


class Catalogue:
    """What there is at one moment."""

    def __init__(self, exports: Iterable[Export]) -> None:
        self.exports = {export.name: export for export in exports}
        self._by_kind: dict[str, list[Export]] = {}
        for export in self.exports.values():
            self._by_kind.setdefault(export.labels.get(KIND, ""), []).append(export)

    @classmethod
    def of(cls, pool: Client) -> Self:
        return cls(pool.list())

    @property
    def bases(self) -> list[Base]:
        return [
            Base(
                export.name.removeprefix("base/"),
                FileSystem.of(export),
                export.labels.get(MKFS, ""),
                export.exclusive,
                export.created,
            )
            for export in self.kind("base")
        ]

    @property
    def images(self) -> list[Image]:
        return [self._image(export) for export in self.kind("image")]

    @property
    def containers(self) -> list[Export]:
        return self.kind("container")

    @property
    def unfinished(self) -> list[Export]:
        return [export for export in self.exports.values() if BUILDING in export.labels]

    def kind(self, kind: str) -> list[Export]:
        """All that is finished of one kind."""
        return [export for export in self._by_kind.get(kind, ()) if BUILDING not in export.labels]

    def layer(self, chain: str, uuid: str) -> Export | None:
        """The one with this chain id on the file system `uuid`, finished or not."""
        for export in self._by_kind.get("layer", ()):
            if (export.labels.get(CHAIN), export.labels.get(UUID)) == (chain, uuid):
                return export
        return None

    def image(self, identity: str, uuid: str) -> Image | None:
        for export in self.kind("image"):
            if (export.labels.get(ID), export.labels.get(UUID)) == (identity, uuid):
                return self._image(export)
        return None

    def find(self, reference: str) -> Image:
        """The image with this tag, or this id or the beginning of it. Raises NotFound or Invalid."""
        digits = reference.removeprefix("sha256:")
        tagged = [export for export in self.kind("image") if TAG + as_tag(reference) in export.labels]
        found = tagged or [
            export
            for export in self.kind("image")
            if export.name == reference or (_HEX.fullmatch(digits) and _digits(export.labels[ID]).startswith(digits))
        ]
        if not found:
            raise NotFound(f"no image {reference!r} (`nbdthin image ls` lists what there is)")
        if len(found) > 1:
            names = ", ".join(sorted(export.name for export in found))
            raise Invalid(f"{reference!r} may be any of {names}: give one of these names")
        return self._image(found[0])

    def _image(self, export: Export) -> Image:
        labels = export.labels
        return Image(
            id=labels[ID],
            tags=tuple(sorted(key.removeprefix(TAG) for key in labels if key.startswith(TAG))),
            created=export.created,
            size=export.referenced,
            file_system=FileSystem.of(export),
            layers=tuple(self.layers_below(export.name)),
            parent=labels.get(PARENT),
            name=export.name,
        )

    def layers_below(self, name: str) -> list[str]:
        """The names of the layers that `name` stands on, the lowest first."""
        found = []
        at = self.exports[name].parent
        while at is not None and (export := self.exports.get(at)) is not None:
            if export.labels.get(KIND) == "layer":
                found.append(at)
            at = export.parent
        return found[::-1]

    def free_name(self, kind: str, digest: str, uuid: str) -> str:
        """A name for a new layer or image."""
        brief = f"{kind}/{short(digest)}.{uuid[:8]}"
        return brief if brief not in self.exports else f"{kind}/{_digits(digest)}.{uuid}"


def short(digest: str) -> str:
    return _digits(digest)[:SHOWN]


def _digits(digest: str) -> str:
    return digest.partition(":")[2]


# -- an image's config, in labels


def image_labels(config: Config, file_system: FileSystem, *, parent: str | None = None) -> dict[str, str]:
    """Of a new image. Raises Invalid where its config is too long."""
    above = {} if parent is None else {PARENT: parent}
    return {KIND: "image", ID: config.digest, **file_system.labels(), **above, **_config_labels(config.raw)}


def _config_labels(config: bytes) -> dict[str, str]:
    text = base64.b64encode(zlib.compress(config, 9)).decode()
    parts = [text[start : start + MAX_LABEL] for start in range(0, len(text), MAX_LABEL)]
    if len(parts) > MAX_LABELS - 16:  # tags need some too
        raise Invalid(f"the image's config is too large: {len(config)} bytes, compressed {len(text)}")
    return {f"{CONFIG}{number}": part for number, part in enumerate(parts)}


def config_of(export: Export) -> bytes:
    """The config of an image, byte by byte."""
    parts: list[str] = []
    while (part := export.labels.get(f"{CONFIG}{len(parts)}")) is not None:
        parts.append(part)
    try:
        return zlib.decompress(base64.b64decode("".join(parts), validate=True))
    except (ValueError, zlib.error) as error:
        raise Error(f"labels of {export.name!r} are missing or changed: its config is lost") from error


def layered_config(export: Export) -> Config:
    """The config of an image, with as many layers as it has here. Raises Error."""
    config = Config.parse(config_of(export), export.name)
    if FLAT not in export.labels:
        return config
    step = {"created": config.created, "created_by": "nbdthin image load --flatten"}
    return config.with_layers(chain_ids(config.diff_ids)[-1:], [step])


# -- tags


def check_tag(reference: str) -> str:
    """REPO:TAG of what somebody wrote, `latest` where no tag is named. Raises Invalid."""
    repository, _, tag = as_tag(reference).rpartition(":")
    if not _REPOSITORY.fullmatch(repository) or not _TAG.fullmatch(tag):
        raise Invalid(f"not a tag: {reference!r} (write REPO:TAG, as debian:12 or example.org/tools/web:1.0)")
    return f"{repository}:{tag}"


def as_tag(reference: str) -> str:
    """The tag that a reference would be, as Docker shows it: what its own registry has is called without that."""
    for registry in _DOCKER:
        reference = reference.removeprefix(registry)
    return reference if _has_tag(reference) else f"{reference}:latest"


def _has_tag(reference: str) -> bool:
    return ":" in reference.rpartition("/")[2]


def move_tags(pool: Client, catalogue: Catalogue, tags: Iterable[str], image: str) -> None:
    """Take them from whoever has them and give them to `image`, which exists by then. For use in a batch."""
    for tag in dict.fromkeys(tags):
        for export in catalogue.kind("image"):
            if TAG + tag in export.labels and export.name != image:
                pool.label(export.name, {TAG + tag: None})
        pool.label(image, {TAG + tag: "1"})


def tag(pool: Client, reference: str, *tags: str) -> Image:
    """Give an image more tags; who had them loses them. Raises NotFound or Invalid."""
    wanted = [check_tag(each) for each in tags]
    with locked(pool):
        catalogue = Catalogue.of(pool)
        image = catalogue.find(reference)
        with pool.batch():
            move_tags(pool, catalogue, wanted, image.name)
    return Catalogue.of(pool).find(image.name)


# -- making and removing


@contextlib.contextmanager
def locked(pool: Client, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Held by whoever makes or removes something of an image; others wait, `waiting` is called before.

    It is a descriptor's; a process that has inherited it has the lock, too.
    """
    path = pool.info().pool.path
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Error(f"cannot open {path}, the pool's directory, to lock it: {error.strerror}") from error
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(directory)


def new_building() -> str:
    """A name for a volume that something is made in."""
    return f"building/{secrets.token_hex(8)}"


def seal(pool: Client, volume: str, name: str, labels: Mapping[str, str]) -> None:
    """Make a finished snapshot of a building volume. For use in a batch."""
    pool.snapshot(volume, name, labels=labels)
    pool.remove(volume)


def drop_unfinished(pool: Client, *, keep: Iterable[str] = ()) -> list[str]:
    """Remove what those left who died. Under `locked`. Raises InUse where something of it is still attached."""
    kept = set(keep)
    names = [export.name for export in Catalogue.of(pool).unfinished if export.name not in kept]
    if names:
        try:
            pool.remove(*names)
        except InUse:
            devices.cleanup()  # it died with a volume mounted
            pool.remove(*names)
    return names


def give_up(pool: Client) -> None:
    """After a failure: remove what is unfinished. What cannot be, the next who holds the lock removes.

    Over another connection, because one that was interrupted is closed.
    """
    with contextlib.suppress(Error), connect(pool.path) as other:
        drop_unfinished(other)


def remove(pool: Client, *references: str) -> list[str]:
    """Remove images, and the layers that no other image has; all or none. Returns the names that are gone.

    A tag takes only itself away where its image has others, and is returned then. Raises NotFound, Invalid, or InUse,
    which says what containers and images that were committed on top there are.
    """
    with locked(pool):
        drop_unfinished(pool)
        catalogue = Catalogue.of(pool)
        images = {image.name: image for image in map(catalogue.find, references)}
        named = {name: {as_tag(each) for each in references} & set(image.tags) for name, image in images.items()}
        untagged = {name for name, tags in named.items() if tags and tags < set(images[name].tags)}
        going = [image for name, image in images.items() if name not in untagged]
        _refuse_used(catalogue, going)
        gone = {image.name for image in going}
        kept = {layer for image in catalogue.images if image.name not in gone for layer in image.layers}
        gone |= {layer for image in going for layer in image.layers if layer not in kept}
        with _hidden(pool, going) as hidden, pool.batch():
            for name in untagged:
                pool.label(name, {TAG + tag: None for tag in named[name]})
            for name in gone:
                pool.remove(hidden.get(name, name))
    return sorted(gone) + sorted(tag for name in untagged for tag in named[name])


@contextlib.contextmanager
def _hidden(pool: Client, images: Sequence[Image]) -> Iterator[dict[str, str]]:
    """Images under other names, {old: new}, when nobody can make a container of them any more and nobody has.

    Containers are made without the lock, which a load may hold for minutes.
    """
    names = {image.name: new_building() for image in images}
    with pool.batch():
        for old, new in names.items():
            pool.rename(old, new)
            pool.label(new, {BUILDING: "1"})
    try:
        _refuse_used(Catalogue.of(pool), images)
        yield names
    except BaseException:
        with pool.batch():
            for old, new in names.items():
                pool.rename(new, old)
                pool.label(old, {BUILDING: None})
        raise


def _refuse_used(catalogue: Catalogue, images: Sequence[Image]) -> None:
    gone = {(image.id, image.file_system.uuid): image for image in images}
    for export in catalogue.containers:
        image = gone.get((export.labels.get(IMAGE, ""), export.labels.get(UUID, "")))
        if image is not None:
            users = sorted(
                other.name.removeprefix("container/")
                for other in catalogue.containers
                if (other.labels.get(IMAGE), other.labels.get(UUID)) == (image.id, image.file_system.uuid)
            )
            raise InUse(f"{image.shown!r} has containers: {listed(users)} (nbdthin container rm)")
    for child in catalogue.images:
        image = gone.get((child.parent or "", child.file_system.uuid))
        if image is not None and (child.id, child.file_system.uuid) not in gone:
            raise InUse(f"{child.shown!r} was committed on top of {image.shown!r} (remove it too)")


def listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- looking


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an image's history, the newest first. `size`: bytes that it changed, in steps of 4 KiB."""

    layer: str | None  # None: it changed no file
    created: str  # RFC 3339, as the image says
    created_by: str
    comment: str
    size: int


def history(pool: Client, reference: str) -> list[Step]:
    """Raises NotFound or Invalid."""
    catalogue = Catalogue.of(pool)
    image = catalogue.find(reference)
    config = layered_config(catalogue.exports[image.name])
    layers = list(image.layers)
    steps = []
    for entry in config.history or [{} for _ in layers]:
        layer = layers.pop(0) if layers and not entry.get("empty_layer") else None
        size = 0 if layer is None else _size(pool, catalogue, layer)
        created, by, comment = (str(entry.get(key) or "") for key in ("created", "created_by", "comment"))
        steps.append(Step(layer, created, by, comment, size))
    return steps[::-1]


def _size(pool: Client, catalogue: Catalogue, layer: str) -> int:
    """Bytes in which it differs from what is below it."""
    export = catalogue.exports[layer]
    if export.parent is None:
        return export.referenced
    return sum(extent.length for extent in pool.diff(export.parent, layer) if extent.data)
