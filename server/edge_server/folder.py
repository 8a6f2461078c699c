"""A run's folder: it belongs to one run, and holds every version as a folder that PEFT can load."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_sdk import files
from edge_sdk.adapters import ADAPTER_FILE, CONFIG_FILE, AdapterSpec, Arrays, peft_config
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.wire import pack_adapter
from edge_server.failpoints import Reached, nothing
from edge_server.settings import RunSettings
from edge_server.storage import Blobs, EventLog


@dataclass(frozen=True)
class Versions:
    """The versions' folders; `spec` is that of their adapters, and `base` names the model they adapt.

    They are copies of blobs, which are synced before the event that names them. So nobody waits for the disk here, which would
    cost three times what writing does: what a power cut takes away, `mend` makes again.
    """

    root: Path
    spec: AdapterSpec
    base: str
    reached: Reached = nothing

    def write(self, version: int, arrays: Arrays) -> bytes:
        """Makes a version's folder; its adapter's bytes."""
        body = pack_adapter(arrays)
        self._make(version, body)
        self.reached("version-written")
        return body

    def mend(self, adapters: Sequence[str], blobs: Blobs) -> None:
        """Makes every folder again that is not what it was.

        That is a config of other bytes, an adapter of another size, or, in the newest, of other bytes: a file that never reached
        the disk is short, and hashing thousands would take minutes.

        Args:
            adapters: the blob of each version. Older ones that are lost or damaged cannot be made again, and stay as they are.

        Raises:
            DataError: the newest version's blob is missing or damaged.
        """
        for version, sha256 in enumerate(adapters[:-1]):
            blob = blobs.path(sha256)
            if blob is not None and not self._fits(version, blob.stat().st_size):
                with contextlib.suppress(DataError):
                    self._make(version, blobs.get(sha256))
        newest, body = len(adapters) - 1, blobs.get(adapters[-1])
        if not self._fits(newest, len(body)) or (self._folder(newest) / ADAPTER_FILE).read_bytes() != body:
            self._make(newest, body)

    def _fits(self, version: int, size: int) -> bool:
        """Whether both files are there, with an adapter of this size in bytes."""
        folder = self._folder(version)
        with contextlib.suppress(OSError):
            config = (folder / CONFIG_FILE).read_bytes()
            return (folder / ADAPTER_FILE).stat().st_size == size and config == peft_config(self.spec, self.base)
        return False

    def _make(self, version: int, body: bytes) -> None:
        folder = self._folder(version)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {ADAPTER_FILE: body, CONFIG_FILE: peft_config(self.spec, self.base)}.items():
            files.write(folder / name, content, durable=False)
            self.reached("version-file-written")

    def _folder(self, version: int) -> Path:
        return self.root / f"{version:04d}"


def run_of(
    path: Path,
    log: EventLog,
    settings: RunSettings,
    manifest: Manifest,
    others: Mapping[str, Manifest],
    reached: Reached = nothing,
) -> str:
    """The run's id, with which the folder and its database say that they belong together.

    Raises:
        SettingsError: they do not, or the run is of other settings or other bundles.
    """
    now = json.loads(msgspec.json.encode({"settings": settings, "manifest": manifest, "others": others, "protocol": PROTOCOL}))
    if path.exists():
        try:
            known = json.loads(path.read_bytes())
            run = str(known.pop("run"))
        except (ValueError, KeyError, AttributeError) as error:
            raise SettingsError(f"{path} is damaged ({error}); restore it, or use another --data folder") from error
        if different := list(_differences(now, known)):
            some = ", ".join(different[:3])
            raise SettingsError(
                f"{path.parent} holds a run with other settings or another bundle ({some}); use another --data folder"
            )
        if run != log.run:
            raise SettingsError(
                f"{path.parent} holds another run than its database; use the --state it was made with, or another --data folder"
            )
        return run
    if log.newest:
        raise SettingsError(f"this database holds a run, {path.parent} none; use that run's --data folder, or another database")
    files.write(path, json.dumps({"run": log.run, **now}, indent=1).encode())
    reached("run-written")
    return log.run


def _differences(a: object, b: object, path: str = "") -> Iterator[str]:
    """Dotted names of what differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)
    elif a != b:
        yield path
