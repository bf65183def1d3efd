"""Images into archives: each layer made anew from how the trees of two snapshots differ.

So the layers have the files of those that were loaded, and other digests; and a committed one has a digest at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

from nbdthin import devices
from nbdthin.control.client import Client
from nbdthin.errors import Error
from nbdthin.images import interrupts, store
from nbdthin.images.changes import changes, write_layer
from nbdthin.images.layout import GZIP, new_layout
from nbdthin.images.progress import SILENT, Progress
from nbdthin.images.store import Catalogue


def save(
    pool: Client, reference: str, path: Path, *, compression: str | None = GZIP, progress: Progress = SILENT
) -> str:
    """Write an image as an OCI layout: a tar where `path` ends in .tar, else a directory. Returns the id it has there.

    Under the tag that `reference` is, or all of its tags. `compression` is "gzip", "zstd" or None. Nothing is there if
    it raises: NotFound, Invalid, Exists, Error.
    """
    catalogue = Catalogue.of(pool)
    image = catalogue.find(reference)
    config = store.layered_config(catalogue.exports[image.name])
    if len(image.layers) != len(config.diff_ids):
        raise Error(
            f"{image.shown!r} has {len(config.diff_ids)} layers and {len(image.layers)} are left: "
            "the others were removed by other means than nbdthin image rm"
        )
    named = [tag for tag in image.tags if store.as_tag(reference) == tag]
    written = []
    with (
        interrupts.held() as interrupt,
        new_layout(path) as layout,
        contextlib.closing(_trees(pool, image.layers)) as trees,
    ):
        for name, old, new in trees:
            progress.layer(name)
            with layout.layer(compression) as writer:
                write_layer(changes(old, new), new, _watched(writer.write, progress.advance, interrupt))
            written.append(writer.written)
        saved = config.with_layers([layer.diff_id for layer in written], config.history)
        layout.image(saved, written, named or image.tags)
    return saved.digest


def _trees(pool: Client, layers: tuple[str, ...]) -> Generator[tuple[str, Path | None, Path], None, None]:
    """Each layer with what is below it and what it is, mounted."""
    with contextlib.ExitStack() as last:
        old = None
        for name in layers:
            with contextlib.ExitStack() as this:
                new = this.enter_context(devices.mounted(pool, name, read_only=True))
                yield name, old, new
                last.close()
                last.push(this.pop_all())
            old = new


def _watched(
    write: Callable[[bytes | memoryview], object], advance: Callable[[int], None], interrupt: Callable[[], None]
) -> Callable[[bytes | memoryview], object]:
    def watched(data: bytes | memoryview) -> None:
        interrupt()
        write(data)
        advance(len(data))

    return watched
