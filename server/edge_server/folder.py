"""A run's folder: it belongs to one run, and holds every version as a folder that PEFT can load."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_sdk import files
from edge_sdk.adapters import AdapterSpec, Arrays, write_peft
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.wire import unpack_adapter
from edge_server.failpoints import Reached, nothing
from edge_server.settings import RunSettings
from edge_server.storage import EventLog


@dataclass(frozen=True)
class Versions:
    """The versions' folders; `spec` is that of their adapters, and `base` names the model they adapt."""

    root: Path
    spec: AdapterSpec
    base: str
    reached: Reached = nothing

    def write(self, version: int, arrays: Arrays) -> bytes:
        """Makes a version's folder; its adapter's bytes."""
        write_peft(self._folder(version), arrays, self.spec, self.base)
        self.reached("version-written")
        return self._read(version)

    def mend(self, version: int, body: bytes) -> None:
        """Makes it again where its adapter is not `body`, as after a power cut."""
        with contextlib.suppress(OSError):
            if self._read(version) == body:
                return
        self.write(version, unpack_adapter(body, self.spec.shapes()))

    def _read(self, version: int) -> bytes:
        return (self._folder(version) / "adapter_model.safetensors").read_bytes()

    def _folder(self, version: int) -> Path:
        return self.root / f"{version:04d}"


def run_of(path: Path, log: EventLog, settings: RunSettings, manifest: Manifest, others: Mapping[str, Manifest]) -> str:
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
    return log.run


def _differences(a: object, b: object, path: str = "") -> Iterator[str]:
    """Dotted names of what differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)
    elif a != b:
        yield path
