"""Images out of archives: each layer unpacked over the one below it, and sealed.

The layers that are missing are unpacked one after the other in a volume that stays mounted; after each its file system
is made to wait, and a snapshot of the volume is the layer. Until the end all of it has a label that says that it is not
finished; one commit takes the labels away, and gives the image its name. Of a load that died, complete layers are used.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nbdthin import devices
from nbdthin.control.client import Client
from nbdthin.errors import Error, Invalid, NoSpace
from nbdthin.images import archive, base, containers, interrupts, store, writeback
from nbdthin.images.archive import Layer
from nbdthin.images.config import Platform
from nbdthin.images.progress import SILENT, Progress
from nbdthin.images.store import Base, Catalogue, Image
from nbdthin.images.unpack import apply
from nbdthin.units import format_size


def load(
    pool: Client,
    path: Path,
    *,
    on: str | None = None,
    platform: Platform | None = None,
    tags: Sequence[str] = (),
    progress: Progress = SILENT,
) -> list[Image]:
    """The images of an archive, on base `on`: without one the default base, which is made where there is none.

    `tags` replace those of the archive. A layer that is there on the same base already is shared, and if all are,
    nobody has to be root. Nothing is left of an image that does not load whole. Raises NotFound, Invalid, Corrupt,
    NoSpace, Error.
    """
    wanted = [store.check_tag(tag) for tag in tags]
    with archive.open_archive(path, platform=platform) as opened, store.locked(pool, progress.waiting) as lock:
        if wanted and len(opened.images) > 1:
            raise Invalid(f"{path} has {len(opened.images)} images: a tag can be given to one (load it without --tag)")
        below = base.find_or_make(pool, on)
        return [_load(pool, image, below, wanted or tags_of(image, path), lock, progress) for image in opened.images]


def _load(
    pool: Client, source: archive.Image, below: Base, tags: Sequence[str], lock: int, progress: Progress
) -> Image:
    file_system = below.file_system
    catalogue = Catalogue.of(pool)
    if (known := catalogue.image(source.config.digest, file_system.uuid)) is not None:
        with pool.batch():
            store.move_tags(pool, catalogue, tags, known.name)
        return Catalogue.of(pool).find(known.name)
    present = [catalogue.layer(layer.chain_id, file_system.uuid) for layer in source.layers]
    store.drop_unfinished(pool, keep=[export.name for export in present if export is not None])
    start, count = f"base/{below.name}", 0
    for number, export in enumerate(present, 1):
        if export is not None:
            start, count = export.name, number
    finished = [export.name for export in present if export is not None and store.BUILDING in export.labels]
    name = catalogue.free_name("image", source.config.digest, file_system.uuid)
    labels = store.image_labels(source.config, file_system)
    volume = store.new_building()
    try:
        pool.clone(start, volume, labels={store.BUILDING: "1"})
        if missing := source.layers[count:]:
            finished += _unpack(pool, volume, missing, below, catalogue, lock, progress)
        with pool.batch():
            for layer in finished:
                pool.label(layer, {store.BUILDING: None})
            store.seal(pool, volume, name, labels)
            store.move_tags(pool, catalogue, tags, name)
    except BaseException:
        store.give_up(pool)
        raise
    return Catalogue.of(pool).find(name)


def _unpack(
    pool: Client, volume: str, layers: Sequence[Layer], below: Base, catalogue: Catalogue, lock: int, progress: Progress
) -> list[str]:
    """Unpack `layers` into the volume. Returns their names, which have the label still."""
    file_system = below.file_system
    if os.geteuid() != 0:
        raise Error("only root can mount a file system to unpack layers into it (or load it as one layer: --flatten)")
    names = []
    with interrupts.held() as interrupt, devices.mounted(pool, volume) as root:
        for layer in layers:
            progress.layer(layer.name)
            with _space_explained(below), layer.chunks(file_system.size) as tar:
                with writeback.behind(root) as put:
                    apply(_watched(tar, interrupt, progress.advance, put), root)
                name = catalogue.free_name("layer", layer.chain_id, file_system.uuid)
                labels = {store.KIND: "layer", store.CHAIN: layer.chain_id, store.BUILDING: "1", **file_system.labels()}
                with containers.frozen(root, lock):
                    pool.snapshot(volume, name, labels=labels)
            names.append(name)
    return names


def _watched(chunks: Iterator[bytes], interrupt: Callable[[], None], *counts: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        interrupt()
        for count in counts:
            count(len(chunk))
        yield chunk


@contextlib.contextmanager
def _space_explained(below: Base) -> Iterator[None]:
    try:
        yield
    except NoSpace as error:
        size = format_size(below.file_system.size)
        raise NoSpace(f"{error} (base {below.name!r} has {size}: nbdthin base grow; the pool: nbdthin info)") from error


def tags_of(image: archive.Image, path: Path) -> list[str]:
    """What an archive calls its image. A layout may give a tag alone: its own name is the repository then."""
    repository = re.sub(r"(\.oci|\.docker)?(\.tar(\.gz|\.zst)?|\.tgz)?$", "", path.resolve().name.lower())
    tags = []
    for tag in image.tags:
        with contextlib.suppress(Invalid):  # a name for others, not for people
            tags.append(store.check_tag(tag if ":" in tag or "/" in tag else f"{repository}:{tag}"))
    return tags
