"""An image's configuration: what the OCI image-spec's config.md says of it, as far as anyone here looks at it.

The bytes are kept as they came, since their digest names the image. A changed configuration is new bytes, with every
field that is not known here as it was.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

from nbdthin.errors import Invalid

_WORD = re.compile(r"[\w.+-]{0,50}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

# What Go, and so every image, calls the machines that Python names otherwise, with the variant.
_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "i386": ("386", ""),
    "loongarch64": ("loong64", ""),
}


class Platform(NamedTuple):
    """As users and indexes write it: os/architecture, with the variant where there is one."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises Invalid."""
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise Invalid(f"not a platform: {text!r} (write linux/amd64 or linux/arm/v7)")
        return cls(*parts)

    @classmethod
    def checked(cls, os: object, architecture: object, variant: object, *, what: str) -> Self:
        """Of an archive's own words, which are shown to people. Raises Invalid, naming `what`."""
        for word in (os, architecture, variant):
            if not isinstance(word, str) or not _WORD.fullmatch(word):
                raise Invalid(f"{what}: its platform is none: {os!a:.50}, {architecture!a:.50}, {variant!a:.50}")
        return cls(str(os), str(architecture), str(variant))

    @classmethod
    def host(cls) -> Self:
        machine = platform.machine()
        return cls("linux", *_MACHINES.get(machine, (machine, "")))

    def runs(self, other: Platform) -> bool:
        """Whether an image of the platform `other` is one of this. A variant matters where both have one."""
        return self[:2] == other[:2] and (not self.variant or not other.variant or self.variant == other.variant)

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_digest(text: object, what: str) -> str:
    """`text`, which is a sha256 digest, the one kind that the tools in use write. Raises Invalid."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise Invalid(f"{what}: not a sha256 digest: {str(text)[:100]!r}")
    return text


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The image-spec's ChainID of each layer: what it is on top of those below."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


@dataclass(frozen=True)
class Config:
    raw: bytes  # as the archive has them
    fields: Mapping[str, Any]  # all of them, as JSON has them: the border; what follows is checked

    @classmethod
    def parse(cls, raw: bytes, what: str) -> Self:
        """Raises Invalid, naming `what`, for what is no image configuration."""
        fields = parse_object(raw, what)
        config = cls(raw, fields)
        for name, value, kind in (
            ("os", fields.get("os"), str),
            ("architecture", fields.get("architecture"), str),
            ("rootfs", fields.get("rootfs"), dict),
            ("config", fields.get("config") or {}, dict),
            ("history", fields.get("history") or [], list),
        ):
            if not isinstance(value, kind):
                raise Invalid(f"{what}: its {name!r} is missing or of the wrong kind")
        diff_ids = fields["rootfs"].get("diff_ids")
        if not isinstance(diff_ids, list):
            raise Invalid(f"{what}: it has no rootfs.diff_ids")
        for diff_id in diff_ids:
            check_digest(diff_id, f"{what}: diff_ids")
        Platform.checked(fields["os"], fields["architecture"], fields.get("variant") or "", what=what)
        if not all(isinstance(entry, dict) for entry in config.history):
            raise Invalid(f"{what}: its history is not a list of objects")
        return config

    @cached_property
    def digest(self) -> str:
        """The image's ID."""
        return digest_of(self.raw)

    @property
    def platform(self) -> Platform:
        return Platform(self.fields["os"], self.fields["architecture"], self.fields.get("variant") or "")

    @property
    def diff_ids(self) -> tuple[str, ...]:
        return tuple(self.fields["rootfs"]["diff_ids"])

    @property
    def created(self) -> str:
        """RFC 3339, or empty."""
        return str(self.fields.get("created") or "")

    @property
    def history(self) -> list[dict[str, Any]]:
        """The oldest first; an entry with `empty_layer` true has no layer."""
        return list(self.fields.get("history") or [])

    def _run(self, name: str) -> Any:
        return (self.fields.get("config") or {}).get(name)

    @property
    def env(self) -> tuple[str, ...]:
        return _strings(self._run("Env"))

    @property
    def entrypoint(self) -> tuple[str, ...]:
        return _strings(self._run("Entrypoint"))

    @property
    def command(self) -> tuple[str, ...]:
        return _strings(self._run("Cmd"))

    @property
    def workdir(self) -> str:
        return str(self._run("WorkingDir") or "")

    @property
    def user(self) -> str:
        return str(self._run("User") or "")

    @property
    def labels(self) -> dict[str, str]:
        labels = self._run("Labels")
        return {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}

    def with_layers(
        self, diff_ids: Sequence[str], history: Sequence[Mapping[str, Any]], created: str | None = None
    ) -> Config:
        """The same with these layers and this history instead, and made at `created` (RFC 3339) if given."""
        fields = dict(self.fields) | {
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
            "history": [dict(entry) for entry in history],
        }
        if created is not None:
            fields["created"] = created
        return Config.parse(json_bytes(fields), "the new configuration")


def empty_config(where: Platform) -> Config:
    """A configuration of no layers and nothing to run."""
    fields = {"architecture": where.architecture, "os": where.os, "config": {}, "rootfs": {"diff_ids": []}}
    if where.variant:
        fields["variant"] = where.variant
    return Config.parse(json_bytes(fields), "the new configuration").with_layers([], [])


def json_bytes(value: object) -> bytes:
    """The one way in which JSON is written here: the same value, the same digest."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises Invalid, naming `what`."""
    value = parse_json(raw, what)
    if not isinstance(value, dict):
        raise Invalid(f"{what}: not a JSON object")
    return value


def parse_json(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what}: not JSON: {error}") from None


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(item) for item in value) if isinstance(value, list) else ()
