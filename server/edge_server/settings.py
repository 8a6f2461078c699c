"""A run's settings from one TOML file; a key nobody knows is an error."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from edge_sdk.adapters import AdapterSpec
from edge_sdk.bundle import Bundle
from edge_sdk.errors import EdgeError, SettingsError
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.tasks import Task
from edge_server.systems.lpfl import LpFl


class AdapterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which layers get LoRA.

    Args:
        rank, alpha: y = W x + (alpha / rank) B A x.
        modules: last parts of module names; empty for all slots of the bundle.
        top_layers: only this many layers nearest the output; 0 for every layer.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = ()
    top_layers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 256 or not 0 < self.alpha < math.inf or self.top_layers < 0:
            raise SettingsError("adapter.rank must be between 1 and 256, alpha positive and finite, top_layers not negative")


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file: which system, which task, which adapter."""

    task: Task
    system: Literal["lpfl"] = "lpfl"
    adapter: AdapterSettings = AdapterSettings()
    lpfl: LpFl = LpFl()


def load(path: Path) -> RunSettings:
    """Raises: SettingsError: no such file, not TOML, an unknown key, or a value out of bounds."""
    try:
        return msgspec.convert(tomllib.loads(path.read_bytes().decode()), RunSettings)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    except (msgspec.ValidationError, EdgeError) as error:
        raise SettingsError(f"{path}: {error}") from error


def manifest(settings: RunSettings, bundle: Bundle) -> Manifest:
    """What devices are told. Raises: SettingsError: the adapter's modules are not in the bundle."""
    slots = bundle.pick(settings.adapter.modules, settings.adapter.top_layers)
    spec = AdapterSpec(slots, settings.adapter.rank, settings.adapter.alpha)
    return Manifest(PROTOCOL, settings.system, settings.task, spec, bundle)
