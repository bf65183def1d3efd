"""Images as names of a pool: loaded, shared, tagged, removed; and what is left when a load does not come to its end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from nbdthin.images import base, containers, loading, store
from nbdthin.images.store import Catalogue, Image
from nbdthin.units import MiB
from tests.clients.daemon import PATIENCE, Daemon, nbdthin_command
from tests.clients.hostmount import check_file_system
from tests.conftest import need_root
from tests.images.made import device, digest, file, layout, owned
from tests.images.trees import directory, make_tar

SYSTEM = make_tar(directory("etc"), file("etc/name", "system\n"), directory("bin"), file("bin/tool", "#!\n", 0o755))
WEB = make_tar(file("etc/name", "web\n"), directory("srv"), owned(file("srv/page", "<p>"), 33, 33))
MAIL = make_tar(file("etc/.wh.name"), file("etc/mail", "mail\n"), device("etc/null", 1, 3))


@pytest.fixture(autouse=True)
def small_base(pool: nbdthin.Client) -> None:
    need_root()
    base.create(pool, size="256 MiB")


def load(pool: nbdthin.Client, path: Path, images: dict[str, Sequence[bytes]], **options: object) -> list[Image]:
    return loading.load(pool, layout(path, images), **options)  # type: ignore[arg-type]


def files(pool: nbdthin.Client, name: str) -> dict[str, str]:
    """{path: content} of what is no directory."""
    with devices.mounted(pool, name, read_only=True) as root:
        return {
            str(path.relative_to(root)): path.read_text() if path.is_file() else "special"
            for path in root.rglob("*")
            if not path.is_dir()
        }


def names(pool: nbdthin.Client) -> set[str]:
    return {export.name for export in pool.list()}


# -- loading


def test_each_layer_is_a_snapshot_of_the_one_below_and_the_lowest_of_the_base(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    (web,) = load(pool, tmp_path / "web", {"1": [SYSTEM, WEB]})
    assert web.tags == ("web:1",)
    system, top = web.layers
    rows = {row.name: row for row in pool.list()}
    assert (rows[system].parent, rows[top].parent, rows[web.name].parent) == ("base/default", system, top)
    assert {rows[name].kind for name in (system, top, web.name)} == {"snapshot"}
    assert files(pool, system) == {"etc/name": "system\n", "bin/tool": "#!\n"}
    assert files(pool, web.name) == {"etc/name": "web\n", "bin/tool": "#!\n", "srv/page": "<p>"}
    assert names(pool) == {"base/default", system, top, web.name}
    for name in (system, top, web.name):
        check_file_system(daemon.uri(name), "ext4")


def test_a_layer_that_is_there_is_shared_and_not_unpacked_again(tmp_path: Path, pool: nbdthin.Client) -> None:
    (web,) = load(pool, tmp_path / "web", {"1": [SYSTEM, WEB]})
    moment = pool.show(web.layers[0]).created
    (mail,) = load(pool, tmp_path / "mail", {"1": [SYSTEM, MAIL]})
    assert mail.layers[0] == web.layers[0] and mail.layers[1] != web.layers[1]
    assert pool.show(web.layers[0]).created == moment
    assert files(pool, mail.name) == {"bin/tool": "#!\n", "etc/mail": "mail\n", "etc/null": "special"}


def test_an_image_whose_layers_are_all_there_takes_no_space_and_is_not_unpacked(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    load(pool, tmp_path / "web", {"1": [SYSTEM, WEB]})
    used = daemon.data_used()
    other = layout(tmp_path / "other", {"1": [SYSTEM, WEB]}, run={"Cmd": ["true"]})
    for blob in (SYSTEM, WEB):  # what is not needed is not read
        (other / "blobs" / digest(blob).replace(":", "/")).write_bytes(bytes(len(blob)))
    (image,) = loading.load(pool, other)
    assert len(Catalogue.of(pool).images) == 2
    assert daemon.data_used() == used
    assert files(pool, image.name)["etc/name"] == "web\n"


def test_an_archive_loaded_again_only_moves_its_tags(tmp_path: Path, pool: nbdthin.Client) -> None:
    archive = layout(tmp_path / "web", {"1": [SYSTEM, WEB]})
    (first,) = loading.load(pool, archive)
    before = names(pool)
    assert loading.load(pool, archive, tags=["shop:2", "shop"])[0].tags == ("shop:2", "shop:latest", "web:1")
    assert names(pool) == before
    (mail,) = load(pool, tmp_path / "mail", {"1": [SYSTEM, MAIL]}, tags=["shop:2"])
    tags = {image.id: image.tags for image in Catalogue.of(pool).images}
    assert tags == {first.id: ("shop:latest", "web:1"), mail.id: ("shop:2",)}


def test_all_images_of_an_archive_are_loaded_and_one_tag_is_not_for_several(
    tmp_path: Path, pool: nbdthin.Client
) -> None:
    archive = layout(tmp_path / "all", {"web": [SYSTEM, WEB], "mail": [SYSTEM, MAIL]})
    with pytest.raises(nbdthin.Invalid, match="has 2 images"):
        loading.load(pool, archive, tags=["one:1"])
    assert sorted(image.tags for image in loading.load(pool, archive)) == [("all:mail",), ("all:web",)]


def test_an_image_with_a_long_config_keeps_it_byte_by_byte(tmp_path: Path, pool: nbdthin.Client) -> None:
    text = random.Random(5).randbytes(40_000).hex()
    archive = layout(tmp_path / "long", {"1": [SYSTEM]}, run={"Env": [f"A={text}"]})
    (image,) = loading.load(pool, archive)
    raw = store.config_of(pool.show(image.name))
    assert digest(raw) == image.id
    assert json.loads(raw)["config"]["Env"] == [f"A={text}"]


def test_a_config_that_labels_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path, pool: nbdthin.Client) -> None:
    text = random.Random(6).randbytes(400_000).hex()
    archive = layout(tmp_path / "long", {"1": [SYSTEM]}, run={"Env": [f"A={text}"]})
    with pytest.raises(nbdthin.Invalid, match="config is too large"):
        loading.load(pool, archive)
    assert names(pool) == {"base/default"}


# -- loads that fail


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (make_tar(file("../escape", "x")), r"\.\./escape"),
        (
            make_tar(file("big", os.urandom(240 * MiB))),
            "big: No space left .*base 'default' has 256 MiB: nbdthin base grow",
        ),
        (make_tar(file("big", bytes(257 * MiB))), "more than 256 MiB"),
    ],
    ids=["hostile", "too large for the base", "bomb"],
)
def test_a_layer_that_cannot_be_unpacked_leaves_nothing_of_its_image(
    bad: bytes, complaint: str, tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    used = daemon.data_used()
    with pytest.raises(nbdthin.Error, match=complaint):
        load(pool, tmp_path / "bad", {"1": [SYSTEM, bad]})
    assert names(pool) == {"base/default"}
    assert daemon.data_used() == used
    assert not (tmp_path / "escape").exists()


def test_a_layer_with_a_wrong_digest_leaves_nothing(tmp_path: Path, pool: nbdthin.Client) -> None:
    archive = layout(tmp_path / "web", {"1": [SYSTEM, WEB]})
    blob = archive / "blobs" / digest(WEB).replace(":", "/")
    data = bytearray(blob.read_bytes())
    data[data.index(b"<p>")] ^= 1
    blob.write_bytes(data)
    with pytest.raises(nbdthin.Corrupt, match="layer 2 of 2"):
        loading.load(pool, archive)
    assert names(pool) == {"base/default"}


def test_data_that_the_pool_had_no_space_for_at_the_time_leaves_nothing_of_the_image(tmp_path: Path) -> None:
    """Although there was space again for all that came later: the kernel had dropped it and only remembers that."""
    archive = layout(tmp_path / "big", {"1": [make_tar(*(file(f"{n}", os.urandom(MiB)) for n in range(60)))]})
    daemon = Daemon(tmp_path, size=16 * MiB)
    lines = 'auto_extend = false\nno_space = "error"\n[server]'
    daemon.config.write_text(daemon.config.read_text().replace("[server]", lines))
    with contextlib.closing(daemon):
        daemon.start()
        with daemon.connect() as pool, daemon.connect() as listening, daemon.connect() as other:
            base.create(pool, size="256 MiB")
            events = listening.events()
            assert next(events).kind == "listening"

            def make_room() -> None:
                for event in events:
                    if event.kind == "no_space":
                        other.extend(128 * MiB)
                    elif event.kind == "space":
                        return

            maker = threading.Thread(target=make_room)
            maker.start()
            with pytest.raises(nbdthin.NoSpace, match=r"lost some of what was written .*the pool: nbdthin info"):
                loading.load(pool, archive)
            maker.join()
            assert names(pool) == {"base/default"}


def command(daemon: Daemon, *arguments: str | Path) -> subprocess.Popen[str]:
    environment = os.environ | {"NBDTHIN_SOCKET": str(daemon.control)}
    return subprocess.Popen(
        nbdthin_command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def killed_in_the_second_layer(daemon: Daemon, pool: nbdthin.Client, archive: Path) -> None:
    stopped_in_the_second_layer(daemon, pool, archive, signal.SIGKILL, -signal.SIGKILL)


def stopped_in_the_second_layer(
    daemon: Daemon, pool: nbdthin.Client, archive: Path, number: signal.Signals, status: int
) -> None:
    deadline = time.monotonic() + PATIENCE
    with command(daemon, "image", "load", archive) as loader:
        while not [name for name in names(pool) if name.startswith("layer/")]:
            assert loader.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        loader.send_signal(number)
        _, errors = loader.communicate()
        assert loader.returncode == status, errors


def test_a_load_that_was_killed_shows_no_image_and_the_next_goes_on_with_its_layers(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    big = make_tar(*(file(f"big{number}", os.urandom(8 * MiB)) for number in range(20)))
    archive = layout(tmp_path / "web", {"1": [SYSTEM, big]})
    killed_in_the_second_layer(daemon, pool, archive)
    assert Catalogue.of(pool).images == []
    (found,) = [row for row in pool.list() if row.name.startswith("layer/")]
    (image,) = loading.load(pool, archive)
    assert image.layers[0] == found.name and pool.show(found.name).created == found.created
    assert names(pool) == {"base/default", *image.layers, image.name}
    assert Catalogue.of(pool).unfinished == []
    assert len(files_of_size(pool, image.name, 8 * MiB)) == 20


def files_of_size(pool: nbdthin.Client, name: str, size: int) -> list[Path]:
    with devices.mounted(pool, name, read_only=True) as root:
        return [path for path in root.iterdir() if path.stat().st_size == size]


def test_what_a_killed_load_left_goes_with_the_next_removal(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    big = make_tar(*(file(f"big{number}", os.urandom(8 * MiB)) for number in range(20)))
    used = daemon.data_used()
    killed_in_the_second_layer(daemon, pool, layout(tmp_path / "web", {"1": [SYSTEM, big]}))
    with command(daemon, "image", "rm", "--unfinished") as removal:
        output, errors = removal.communicate()
        assert (removal.returncode, errors) == (0, ""), output
    assert names(pool) == {"base/default"}
    assert daemon.data_used() == used


def test_a_load_that_is_interrupted_leaves_nothing(tmp_path: Path, daemon: Daemon, pool: nbdthin.Client) -> None:
    big = make_tar(*(file(f"big{number}", os.urandom(8 * MiB)) for number in range(20)))
    archive = layout(tmp_path / "web", {"1": [SYSTEM, big]})
    stopped_in_the_second_layer(daemon, pool, archive, signal.SIGINT, 130)
    assert names(pool) == {"base/default"}


def test_loads_at_the_same_time_share_their_layers(tmp_path: Path, daemon: Daemon, pool: nbdthin.Client) -> None:
    archives = [layout(tmp_path / name, {"1": [SYSTEM, own]}) for name, own in (("web", WEB), ("mail", MAIL))]
    loaders = [command(daemon, "image", "load", archive) for archive in archives * 2]
    for loader in loaders:
        output, errors = loader.communicate()
        assert (loader.returncode, errors) == (0, ""), output
    images = Catalogue.of(pool).images
    assert sorted(image.tags for image in images) == [("mail:1",), ("web:1",)]
    assert len({layer for image in images for layer in image.layers}) == 3


# -- finding, tagging, removing


def test_an_image_is_found_by_tag_and_by_the_beginning_of_its_id(tmp_path: Path, pool: nbdthin.Client) -> None:
    (web,) = load(pool, tmp_path / "web", {"1": [SYSTEM, WEB]}, tags=["example.org:5000/shop/web"])
    catalogue = Catalogue.of(pool)
    for reference in ("example.org:5000/shop/web", "example.org:5000/shop/web:latest", web.id, web.id[7:13], web.name):
        assert catalogue.find(reference) == web
    for reference in ("web", "web:1", "shop/web", "0", "sha256:", ""):
        with pytest.raises(nbdthin.NotFound, match="no image"):
            catalogue.find(reference)


def test_a_tag_of_dockers_own_registry_is_the_same_with_and_without_its_name(
    tmp_path: Path, pool: nbdthin.Client
) -> None:
    tags = ["docker.io/library/web:1", "index.docker.io/shop/web"]
    (web,) = load(pool, tmp_path / "web", {"1": [SYSTEM]}, tags=tags)
    assert web.tags == ("shop/web:latest", "web:1")
    for reference in ("web:1", "library/web:1", "docker.io/library/web:1", "shop/web", "docker.io/shop/web:latest"):
        assert Catalogue.of(pool).find(reference) == web


def test_an_id_that_two_images_have_is_refused_with_the_names_of_both(tmp_path: Path, pool: nbdthin.Client) -> None:
    archive = layout(tmp_path / "web", {"1": [SYSTEM]})
    base.create(pool, "other", "xfs", "512 MiB")
    (one,) = loading.load(pool, archive)
    (two,) = loading.load(pool, archive, on="other")
    with pytest.raises(nbdthin.Invalid) as refused:
        Catalogue.of(pool).find(one.id[7:19])
    assert one.name in str(refused.value) and two.name in str(refused.value)
    assert Catalogue.of(pool).find("web:1").name == two.name  # the last that was loaded


@pytest.mark.parametrize("tag", ["", "Web:1", "web:", ":1", "web:1:2", "a b:1", "web:-1", "../web:1", "web/:1"])
def test_what_is_no_tag_is_refused(tag: str, tmp_path: Path, pool: nbdthin.Client) -> None:
    with pytest.raises(nbdthin.Invalid, match="not a tag"):
        load(pool, tmp_path / "web", {"1": [SYSTEM]}, tags=[tag])


def test_removing_an_image_frees_its_own_layers_and_leaves_shared_ones(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    big = make_tar(file("big", os.urandom(32 * MiB)))
    (web,) = load(pool, tmp_path / "web", {"1": [SYSTEM, WEB]})
    used = daemon.data_used()
    (large,) = load(pool, tmp_path / "large", {"1": [SYSTEM, big]})
    assert daemon.data_used() - used > 32 * MiB
    assert store.remove(pool, "large:1") == sorted({large.name, large.layers[1]})
    assert daemon.data_used() == used
    assert names(pool) == {"base/default", *web.layers, web.name}
    assert files(pool, web.name)["etc/name"] == "web\n"


def test_an_image_with_containers_is_not_removed_and_they_are_named(tmp_path: Path, pool: nbdthin.Client) -> None:
    load(pool, tmp_path / "web", {"1": [SYSTEM, WEB]})
    load(pool, tmp_path / "mail", {"1": [SYSTEM, MAIL]})
    containers.create(pool, "web:1", *(f"shop{number}" for number in range(7)))
    before = names(pool)
    with pytest.raises(nbdthin.InUse, match="'web:1' has containers: shop0, shop1, shop2, shop3, shop4 and 2 more"):
        store.remove(pool, "mail:1", "web:1")
    assert names(pool) == before
    store.remove(pool, "mail:1")


def test_a_container_that_is_made_while_its_image_is_removed_is_refused_or_keeps_it(
    tmp_path: Path, daemon: Daemon, pool: nbdthin.Client
) -> None:
    archive = layout(tmp_path / "web", {"1": [SYSTEM, WEB]})
    loading.load(pool, layout(tmp_path / "other", {"1": [SYSTEM, WEB]}, run={"Cmd": ["true"]}))  # keeps the layers
    removed = 0
    for number in range(30):
        loading.load(pool, archive)
        with daemon.connect() as other:
            maker = threading.Thread(target=create_or_not, args=(other, number / 5000))
            maker.start()
            try:
                store.remove(pool, "web:1")
                removed += 1
            except nbdthin.InUse:
                pass
            maker.join()
        made = containers.containers(pool)
        assert len(made) + len(Catalogue.of(pool).images) in (1, 3), number  # 1: only the other image is left
        containers.remove(pool, *(container.name for container in made))
    assert removed


def create_or_not(pool: nbdthin.Client, delay: float) -> None:
    time.sleep(delay)
    with contextlib.suppress(nbdthin.NotFound):
        containers.create(pool, "web:1", "shop")


def test_one_of_several_tags_takes_only_itself_away(tmp_path: Path, pool: nbdthin.Client) -> None:
    (web,) = load(pool, tmp_path / "web", {"1": [SYSTEM, WEB]}, tags=["web:1", "web"])
    containers.create(pool, "web:1", "shop")
    assert store.remove(pool, "web") == ["web:latest"]
    assert Catalogue.of(pool).find(web.id).tags == ("web:1",)
    with pytest.raises(nbdthin.InUse):
        store.remove(pool, "web:1")
    containers.remove(pool, "shop")
    store.remove(pool, "web:1")
    assert names(pool) == {"base/default"}


def test_the_history_says_what_each_layer_added(tmp_path: Path, pool: nbdthin.Client) -> None:
    big = make_tar(file("big", os.urandom(8 * MiB)))
    (image,) = load(pool, tmp_path / "large", {"1": [SYSTEM, big]})
    newest, oldest = store.history(pool, "large:1")
    assert (oldest.layer, newest.layer) == image.layers
    assert (oldest.created_by, newest.created_by) == ("layer 0 of 1", "layer 1 of 1")
    assert oldest.size < MiB and 8 * MiB <= newest.size < 9 * MiB
