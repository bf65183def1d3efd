"""Verbs for images, the bases below them and the containers above them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbdthin import display
from nbdthin.cli.verb import (
    Verb,
    connect,
    mount_options,
    names,
    no_arguments,
    path_argument,
    print_json,
    wants_json,
)
from nbdthin.control.codec import printable
from nbdthin.units import format_size

if TYPE_CHECKING:
    from nbdthin.images.containers import Container
    from nbdthin.images.progress import Progress
    from nbdthin.images.store import Base, Image, Step


# -- bases


def _base_create_arguments(parser: ArgumentParser) -> None:
    names("NAME")(parser)
    parser.add_argument("--fs", choices=("ext4", "xfs"), default="ext4", help="default: ext4")
    parser.add_argument("--size", default="10G", help="of the file system (default: 10G)")
    parser.add_argument("--mkfs-option", metavar="OPTIONS", action="append", default=[], help="further ones for mkfs")


def _base_create(arguments: Namespace) -> Base:
    from nbdthin.images import base

    with connect(arguments) as pool:
        return base.create(pool, arguments.name, arguments.fs, arguments.size, options=" ".join(arguments.mkfs_option))


def _base_ls(arguments: Namespace) -> list[Base]:
    from nbdthin.images.store import Catalogue

    with connect(arguments) as pool:
        return Catalogue.of(pool).bases


def _show_bases(bases: Sequence[Base]) -> None:
    columns = ("NAME", "FS", "SIZE", "TAKES", "UUID", "OPTIONS", "CREATED")
    rows = [
        (
            base.name,
            base.file_system.kind,
            format_size(base.file_system.size),
            format_size(base.exclusive),
            base.file_system.uuid,
            printable(base.options) or "-",
            display.moment(base.created),
        )
        for base in bases
    ]
    display.show_table(columns, rows, ("SIZE", "TAKES"))


def _base_grow(arguments: Namespace) -> Base:
    from nbdthin.images import base

    with connect(arguments) as pool:
        return base.grow(pool, arguments.name, arguments.size)


def _base_rm(arguments: Namespace) -> dict[str, str]:
    from nbdthin.images import base

    with connect(arguments) as pool:
        base.remove(pool, arguments.name)
    return {"removed": arguments.name}


# -- images


def _load_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("archive", metavar="ARCHIVE", type=path_argument, help="OCI layout or from docker save")
    parser.add_argument("--base", metavar="NAME", help="what to unpack on (default: default, made if there is none)")
    parser.add_argument("--platform", metavar="OS/ARCH", help="of several (default: this machine's)")
    parser.add_argument("--tag", action="append", default=[], metavar="REPO:TAG", help="instead of the archive's")
    parser.add_argument("--flatten", action="store_true", help="one layer, ext4: nobody has to be root")


def _load(arguments: Namespace) -> list[Image]:
    from nbdthin.images import flattening, loading
    from nbdthin.images.config import Platform

    platform = None if arguments.platform is None else Platform.parse(arguments.platform)
    path = Path(arguments.archive)
    with connect(arguments) as pool, _progress(quiet=wants_json(arguments)) as progress:
        load = flattening.load if arguments.flatten else loading.load
        return load(pool, path, on=arguments.base, platform=platform, tags=arguments.tag, progress=progress)


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress]:
    """A bar for each layer, on a terminal."""
    from nbdthin.images import progress

    if quiet or not sys.stdout.isatty():
        yield progress.SILENT
        return
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Bars(*columns, TransferSpeedColumn(), TimeElapsedColumn()) as bars:

        class Shown(progress.Progress):
            def __init__(self) -> None:
                self._task = bars.add_task("", total=None, visible=False)
                self._done = 0

            def waiting(self) -> None:
                bars.console.print("another process is at the images of this pool: waiting for it")

            def layer(self, name: str) -> None:
                bars.update(self._task, total=self._done)  # the one before is whole
                self._task = bars.add_task(escape(printable(name.partition(" (")[0])), total=None)
                self._done = 0

            def advance(self, count: int) -> None:
                self._done += count
                bars.update(self._task, completed=self._done)

        yield Shown()


def _show_loaded(images: Sequence[Image]) -> None:
    for image in images:
        print(" ".join((image.id, *image.tags)))


def _image_ls(arguments: Namespace) -> list[Image]:
    from nbdthin.images.store import Catalogue

    with connect(arguments) as pool:
        return Catalogue.of(pool).images


def _show_images(images: Sequence[Image]) -> None:
    from nbdthin.images.store import short

    columns = ("TAG", "ID", "LAYERS", "SIZE", "FS", "FS SIZE", "CREATED")
    rows = [
        (
            tag,
            short(image.id),
            str(len(image.layers)),
            format_size(image.size),
            image.file_system.kind,
            format_size(image.file_system.size),
            display.moment(image.created),
        )
        for image in images
        for tag in image.tags or ("-",)
    ]
    display.show_table(columns, sorted(rows), ("LAYERS", "SIZE", "FS SIZE"))


def _history(arguments: Namespace) -> list[Step]:
    from nbdthin.images import store

    with connect(arguments) as pool:
        return store.history(pool, arguments.image)


def _show_history(steps: Sequence[Step]) -> None:
    rows = [
        (
            printable(step.created) or "-",
            format_size(step.size),
            step.layer or "-",
            printable(" ".join(filter(None, (step.created_by, step.comment)))) or "-",
        )
        for step in steps
    ]
    display.show_table(("CREATED", "SIZE", "LAYER", "BY"), rows, ("SIZE",))


def _config(arguments: Namespace) -> object:
    from nbdthin.images import store

    with connect(arguments) as pool:
        catalogue = store.Catalogue.of(pool)
        return json.loads(store.config_of(catalogue.exports[catalogue.find(arguments.image).name]))


def _tag_arguments(parser: ArgumentParser) -> None:
    names("IMAGE")(parser)
    parser.add_argument("tags", nargs="+", metavar="REPO:TAG")


def _tag(arguments: Namespace) -> Image:
    from nbdthin.images import store

    with connect(arguments) as pool:
        return store.tag(pool, arguments.image, *arguments.tags)


def _image_rm_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--unfinished", action="store_true", help="what a load that was killed has left")


def _image_rm(arguments: Namespace) -> dict[str, list[str]]:
    from nbdthin.errors import Invalid
    from nbdthin.images import store

    if not arguments.images and not arguments.unfinished:
        raise Invalid("remove which image? (nbdthin image rm IMAGE; nbdthin image rm --unfinished)")
    with connect(arguments) as pool:
        gone = []
        if arguments.unfinished:
            with store.locked(pool):
                gone += store.drop_unfinished(pool)
        if arguments.images:
            gone += store.remove(pool, *arguments.images)
    return {"removed": gone}


def _commit_arguments(parser: ArgumentParser) -> None:
    names("CONTAINER")(parser)
    parser.add_argument("tag", metavar="REPO:TAG")
    parser.add_argument("--comment", default="", metavar="TEXT", help="for the image's history")


def _commit(arguments: Namespace) -> Image:
    from nbdthin.images import committing

    with connect(arguments) as pool:
        return committing.commit(pool, arguments.container, arguments.tag, comment=arguments.comment)


def _save_arguments(parser: ArgumentParser) -> None:
    names("IMAGE")(parser)
    parser.add_argument("path", metavar="FILE_OR_DIR", type=path_argument)
    parser.add_argument("--compression", choices=("gzip", "zstd", "none"), default="gzip", help="default: gzip")


def _save(arguments: Namespace) -> dict[str, str]:
    from nbdthin.images import saving

    compression = None if arguments.compression == "none" else arguments.compression
    with connect(arguments) as pool, _progress(quiet=wants_json(arguments)) as progress:
        identity = saving.save(pool, arguments.image, Path(arguments.path), compression=compression, progress=progress)
    return {"id": identity}


def _print_saved(result: dict[str, str]) -> None:
    print(result["id"])


# -- containers


def _container_create_arguments(parser: ArgumentParser) -> None:
    names("IMAGE")(parser)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--size", help="larger than the image's file system")


def _container_create(arguments: Namespace) -> dict[str, list[str]]:
    from nbdthin.images import containers

    with connect(arguments) as pool:
        return {"created": containers.create(pool, arguments.image, *arguments.names, size=arguments.size)}


def _container_ls(arguments: Namespace) -> list[Container]:
    from nbdthin.images import containers

    with connect(arguments) as pool:
        return containers.containers(pool)


def _show_containers(containers: Sequence[Container]) -> None:
    columns = ("NAME", "IMAGE", "STATE", "SIZE", "EXCLUSIVE", "CREATED", "ROOT")
    rows = [
        (
            container.name,
            container.image,
            container.state,
            format_size(container.size),
            format_size(container.exclusive),
            display.moment(container.created),
            printable(str(container.root or "-")),
        )
        for container in containers
    ]
    display.show_table(columns, rows, ("SIZE", "EXCLUSIVE"))


def _start_arguments(parser: ArgumentParser) -> None:
    names("NAME")(parser)
    parser.add_argument("--root", metavar="DIR", type=path_argument, help="where to mount it")
    mount_options(parser)


def _start(arguments: Namespace) -> dict[str, Path]:
    from nbdthin.images import containers

    with connect(arguments) as pool:
        root = None if arguments.root is None else Path(arguments.root)
        return {"root": containers.start(pool, arguments.name, root, options=arguments.options)}


def _several(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")


def _stop(arguments: Namespace) -> dict[str, list[str]]:
    from nbdthin.images import containers

    with connect(arguments) as pool:
        containers.stop(pool, *arguments.names)
    return {"stopped": arguments.names}


def _container_diff(arguments: Namespace) -> list[dict[str, str]]:
    from nbdthin.images import containers

    with connect(arguments) as pool:
        return [
            {"kind": change.kind, "path": "/" + os.fsdecode(change.path)}
            for change in containers.diff(pool, arguments.name)
            if change.path
        ]


def _show_changes(changes: Sequence[dict[str, str]]) -> None:
    for change in changes:
        print(change["kind"], printable(change["path"]))


def _container_rm_arguments(parser: ArgumentParser) -> None:
    _several(parser)
    parser.add_argument("--force", action="store_true", help="stop and disconnect them first")


def _container_rm(arguments: Namespace) -> dict[str, list[str]]:
    from nbdthin.images import containers

    with connect(arguments) as pool:
        containers.remove(pool, *arguments.names, force=arguments.force)
    return {"removed": arguments.names}


def _print_root(result: dict[str, Path]) -> None:
    print(result["root"])


GROUPS: dict[str, str] = {
    "base": "empty file systems, that images begin with",
    "image": "container images, each layer a snapshot",
    "container": "clones of images",
}

VERBS: dict[str, Verb] = {
    "base create": Verb("make an empty file system for images", _base_create_arguments, _base_create),
    "base ls": Verb("every base", no_arguments, _base_ls, _show_bases),
    "base grow": Verb("make a base larger for what is loaded from now on", names("NAME", "SIZE"), _base_grow),
    "base rm": Verb("remove a base; images on it stay", names("NAME"), _base_rm),
    "image load": Verb("images of an archive, a snapshot for each layer", _load_arguments, _load, _show_loaded),
    "image ls": Verb("every image", no_arguments, _image_ls, _show_images),
    "image history": Verb("how an image was made", names("IMAGE"), _history, _show_history),
    "image config": Verb("what an image says of running it", names("IMAGE"), _config, print_json),
    "image tag": Verb("give an image more tags", _tag_arguments, _tag),
    "image rm": Verb("remove images, and layers that no other has", _image_rm_arguments, _image_rm),
    "image commit": Verb("make an image of a container", _commit_arguments, _commit, lambda image: print(image.id)),
    "image save": Verb("write an image as an OCI layout", _save_arguments, _save, _print_saved),
    "container create": Verb("containers of an image", _container_create_arguments, _container_create),
    "container ls": Verb("every container", no_arguments, _container_ls, _show_containers),
    "container start": Verb("attach and mount a container", _start_arguments, _start, _print_root),
    "container stop": Verb("unmount and detach containers", _several, _stop),
    "container diff": Verb("what a container has changed", names("NAME"), _container_diff, _show_changes),
    "container rm": Verb("remove containers", _container_rm_arguments, _container_rm),
}
