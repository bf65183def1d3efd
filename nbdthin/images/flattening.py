"""Images as one layer, for who is not root: unpacked into a directory, that `mke2fs -d` makes a file system of.

Owners, devices and attributes are right although nobody may set them: unpacking and mke2fs run below `fakeroot`, which
remembers for the second what the first was refused. That is a process of its own, which this module is the program of.
It needs room for the image twice in the directory for temporary files.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from nbdthin.control.client import Client
from nbdthin.errors import Error, Invalid
from nbdthin.images import archive, base, programs, store
from nbdthin.images.config import Platform
from nbdthin.images.loading import tags_of
from nbdthin.images.progress import SILENT, Progress
from nbdthin.images.store import Catalogue, FileSystem, Image
from nbdthin.images.unpack import apply


def load(
    pool: Client,
    path: Path,
    *,
    on: str | None = None,
    platform: Platform | None = None,
    tags: Sequence[str] = (),
    progress: Progress = SILENT,
) -> list[Image]:
    """As `loading.load`, each image as one layer, on an ext4 of its own: with the size and options of base `on`.

    Raises NotFound, Invalid, Corrupt, NoSpace, Error.
    """
    wanted = [store.check_tag(tag) for tag in tags]
    with archive.open_archive(path, platform=platform) as opened, store.locked(pool, progress.waiting):
        store.drop_unfinished(pool)
        if wanted and len(opened.images) > 1:
            raise Invalid(f"{path} has {len(opened.images)} images: a tag can be given to one (load it without --tag)")
        return [
            _load(pool, opened.path, image, on, wanted or tags_of(image, path), progress) for image in opened.images
        ]


def _load(
    pool: Client, path: Path, source: archive.Image, on: str | None, tags: Sequence[str], progress: Progress
) -> Image:
    catalogue = Catalogue.of(pool)
    for export in catalogue.kind("image"):
        if export.labels[store.ID] == source.config.digest and store.FLAT in export.labels:
            with pool.batch():
                store.move_tags(pool, catalogue, tags, export.name)
            return Catalogue.of(pool).find(export.name)
    if not source.layers:
        raise Invalid(f"{path}: image {source.config.digest} has no layer")
    below = None if on is None else base.find(pool, on)
    if below is not None and below.file_system.kind != "ext4":
        raise Invalid(f"base {below.name!r} is {below.file_system.kind}: only ext4 can be made of a directory")
    size = base.DEFAULT_SIZE if below is None else below.file_system.size
    file_system = FileSystem("ext4", str(uuid.uuid4()), size)
    chain = source.layers[-1].chain_id
    layer = catalogue.free_name("layer", chain, file_system.uuid)
    image = catalogue.free_name("image", source.config.digest, file_system.uuid)
    labels = {**store.image_labels(source.config, file_system), store.FLAT: "1"}
    with base.temporary_file(size) as file:
        _make(path, source, file, file_system, "" if below is None else below.options, progress)
        with base.filled(pool, file) as volume, pool.batch():
            pool.snapshot(volume, layer, labels={store.KIND: "layer", store.CHAIN: chain, **file_system.labels()})
            store.seal(pool, volume, image, labels)
            store.move_tags(pool, catalogue, tags, image)
    return Catalogue.of(pool).find(image)


def _make(
    path: Path, source: archive.Image, file: Path, file_system: FileSystem, options: str, progress: Progress
) -> None:
    """Run `main` below fakeroot, or as root without it, and tell how it goes on."""
    before = [] if os.geteuid() == 0 else [programs.find("fakeroot"), "--"]
    what = [str(path.resolve()), source.config.digest, str(source.config.platform)]
    command = [*before, sys.executable, "-m", __name__, *what, str(file), file_system.uuid, options]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True) as made,
    ):
        assert made.stdout is not None
        for line in made.stdout:
            word, _, value = line.rstrip("\n").partition(" ")
            if word == "layer":
                progress.layer(value)
            else:
                progress.advance(int(value))
        if made.wait():
            errors.seek(0)
            raise Error(errors.read().strip().rpartition("\n")[2] or f"unpacking {path} ended with {made.returncode}")


def main(path: str, digest: str, platform: str, file: str, identity: str, options: str) -> None:
    """The process below fakeroot: archive to file system. Says on stdout how far it is."""
    disk = Path(file)
    root = disk.with_name("root")
    root.mkdir()
    with archive.open_archive(Path(path), platform=Platform.parse(platform)) as opened:
        image = next(image for image in opened.images if image.config.digest == digest)
        for layer in image.layers:
            print("layer", layer.name, flush=True)
            with layer.chunks(disk.stat().st_size) as tar:
                apply((_told(chunk) for chunk in tar), root)
    status = root.stat()
    file_system = FileSystem("ext4", identity, disk.stat().st_size)
    base.make_file_system(disk, file_system, [*shlex.split(options), "-d", str(root)])
    # The root directory itself is not copied.
    facts = {
        "mode": f"0{status.st_mode:o}",
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime": f"@{int(status.st_mtime)}",
    }
    commands = disk.with_name("commands")
    commands.write_text("".join(f"set_inode_field / {field} {value}\n" for field, value in facts.items()))
    programs.run("debugfs", "-w", "-f", commands, disk)


def _told(chunk: bytes) -> bytes:
    print("data", len(chunk), flush=True)
    return chunk


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Error, OSError) as error:
        sys.exit(str(error))
