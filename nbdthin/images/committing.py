"""A container, kept as a new image.

Its volume's head is sealed as the new layer, so nothing is copied and nothing has to be mounted, however much it has
changed. What the layer's tar would be nobody knows yet, so what stands for its digest in the image's config is one that
no tar has; `saving` works out the real ones.
"""

from __future__ import annotations

import secrets
import time

from nbdthin.control.client import Client
from nbdthin.images import containers, store
from nbdthin.images.config import Config, chain_ids, digest_of
from nbdthin.images.store import Catalogue, FileSystem, Image


def commit(pool: Client, name: str, *tags: str, comment: str = "") -> Image:
    """Make an image of what container `name` holds now; the container goes on, on top of it. It may be started.

    Raises NotFound, Invalid, InUse, Error.
    """
    wanted = [store.check_tag(tag) for tag in tags]
    with store.locked(pool) as lock:
        container = containers.find(pool, name)
        catalogue = Catalogue.of(pool)
        parent = containers.image_of(catalogue, container)
        below = store.layered_config(catalogue.exports[parent.name])
        config = _config(below, name, comment)
        chain = chain_ids(config.diff_ids)[-1]
        file_system = FileSystem.of(container)
        layer = catalogue.free_name("layer", chain, file_system.uuid)
        image = catalogue.free_name("image", config.digest, file_system.uuid)
        volume = store.new_building()
        with containers.at_rest(pool, container, lock), pool.batch():
            pool.snapshot(
                container.name, layer, labels={store.KIND: "layer", store.CHAIN: chain, **file_system.labels()}
            )
            pool.clone(layer, volume)
            store.seal(pool, volume, image, store.image_labels(config, file_system, parent=parent.id))
            store.move_tags(pool, catalogue, wanted, image)
    return Catalogue.of(pool).find(image)


def _config(below: Config, name: str, comment: str) -> Config:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"created": now, "created_by": f"nbdthin image commit {name}"}
    if comment:
        entry["comment"] = comment
    no_tar = digest_of(secrets.token_bytes(32))
    return below.with_layers([*below.diff_ids, no_tar], [*below.history, entry], now)
