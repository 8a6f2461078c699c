"""A bundle: one folder with everything a device needs to run a model, described by its `bundle.json`.

`edge_export` writes bundles, devices download and verify them. Quantized variants get their own file names in `files`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from edge_sdk.adapters import Slot
from edge_sdk.errors import AssetError, SettingsError
from edge_sdk.tasks import Kind

SCHEMA = 2
NAME = "bundle.json"


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """sha256 in lower-case hex, size in bytes."""

    sha256: str
    size: int


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `bundle.json` says.

    Args:
        schema: version of this description.
        kind: `decoder` (read out at the last position) or `encoder` (read out as the unit-length mean).
        base: asset reference of the original weights, which training loads; see `assets.py`.
        base_sha256: of the base's download; None for a local path or a hub model.
        license: SPDX identifier of the base, or `unknown`.
        parameters: how many weights the base has; uploads are compared with it.
        width: length of a readout.
        positions: longest sequence the base can read, in tokens.
        prefix: token ids that start every sequence; suffix: those that end it.
        slots: linear layers that can carry LoRA.
        files: name -> size and hash of every other file of the folder.
    """

    schema: int
    kind: Kind
    base: str
    base_sha256: str | None
    license: str
    parameters: int
    width: int
    positions: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    slots: tuple[Slot, ...]
    files: dict[str, File]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise SettingsError(f"bundle schema {self.schema} is not {SCHEMA}; export the bundle again with this version")
        for name in self.files:
            if name != Path(name).name or name in ("", ".", "..", NAME):
                raise SettingsError(f"bundle file name {name!r} must be a plain file name")

    def pick(self, modules: tuple[str, ...], top_layers: int = 0) -> tuple[Slot, ...]:
        """The slots whose module ends in one of `modules` ("q_proj", "self.query"), all slots where none is named.

        Args:
            top_layers: only slots of this many layers nearest the output; 0 for every layer.

        Raises:
            SettingsError: a name matches no slot.
        """
        for wanted in modules:
            if not any(slot.module.endswith(f".{wanted}") for slot in self.slots):
                known = sorted({slot.module.rsplit(".", 1)[-1] for slot in self.slots})
                raise SettingsError(f"the bundle has no layer named {wanted!r}; it has: {', '.join(known)}")
        named = tuple(s for s in self.slots if not modules or any(s.module.endswith(f".{m}") for m in modules))
        if not top_layers:
            return named
        lowest = max(_layer(slot) for slot in named) - top_layers
        return tuple(slot for slot in named if _layer(slot) > lowest)


def _layer(slot: Slot) -> int:
    """The first whole number in a module path: `model.layers.7.self_attn.q_proj` -> 7; -1 where there is none."""
    return next((int(part) for part in slot.module.split(".") if part.isdigit()), -1)


def read(folder: Path) -> Bundle:
    """Raises: AssetError: there is no readable `bundle.json`."""
    try:
        return msgspec.json.decode((folder / NAME).read_bytes(), type=Bundle)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AssetError(f"{folder} is not a bundle ({error}); make one with `edge-export bundle`") from error


def digest(path: Path) -> File:
    """Size and sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return File(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def verify(folder: Path, bundle: Bundle) -> None:
    """Raises: AssetError: a file is missing, truncated or changed."""
    for name, expected in bundle.files.items():
        if not intact(folder / name, expected):
            raise AssetError(f"{folder / name} is missing or damaged; delete {folder} and fetch it again")


def intact(path: Path, expected: File) -> bool:
    """Whether a file is there, whole and unchanged."""
    return path.is_file() and path.stat().st_size == expected.size and digest(path) == expected
