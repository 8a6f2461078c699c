"""A run's settings from one TOML file; a key nobody knows is an error."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Literal, get_args

import msgspec

from edge_sdk.adapters import AdapterSpec
from edge_sdk.bundle import Bundle
from edge_sdk.cohort import Quorum
from edge_sdk.errors import EdgeError, SettingsError
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.tasks import Task
from edge_server.robust import Krum, Median, TrimmedMean
from edge_server.systems import fedcollm
from edge_server.systems.crosslm import CrossLm
from edge_server.systems.fedcollm import FedCoLlm
from edge_server.systems.fedmkt import FedMkt
from edge_server.systems.lpfl import LpFl

System = Literal["lpfl", "crosslm", "fedcollm", "fedmkt"]
SYSTEMS: tuple[System, ...] = get_args(System)


class AdapterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which layers get LoRA.

    Args:
        rank, alpha: y = W x + (alpha / rank) B A x.
        modules: last parts of module names; empty for all slots of the bundle.
        top_layers: only this many layers nearest the output; 0 for every layer.
        min_layers: a device may train only this many of them, as its memory and speed allow; 0 for no choice.
        min_rank: a device may train only this many components; 0 for no choice.
        freeze_a: train the B factors only (FFA-LoRA): half the upload, exact averaging.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = ()
    top_layers: int = 0
    min_layers: int = 0
    min_rank: int = 0
    freeze_a: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 256 or not 0 < self.alpha < math.inf or self.top_layers < 0:
            raise SettingsError("adapter.rank must be between 1 and 256, alpha positive and finite, top_layers not negative")
        if self.min_layers < 0 or not 0 <= self.min_rank <= self.rank:
            raise SettingsError("adapter.min_layers must not be negative, adapter.min_rank between 0 and adapter.rank")


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file: which system, which task, which adapter."""

    task: Task
    system: System = "lpfl"
    adapter: AdapterSettings = AdapterSettings()
    lpfl: LpFl = LpFl()
    crosslm: CrossLm | None = None
    fedcollm: FedCoLlm | None = None
    fedmkt: FedMkt | None = None

    def __post_init__(self) -> None:
        if self.system == "crosslm":
            if self.crosslm is None:
                raise SettingsError('system = "crosslm" needs a table [crosslm] with at least its prompts')
            if len(self.crosslm.names) not in (0, len(self.task.labels)) or not self.task.labels:
                raise SettingsError("crosslm needs a task with labels, and crosslm.names one name for each, or none")
        if self.system == "fedcollm" and self.fedcollm is None:
            raise SettingsError('system = "fedcollm" needs a table [fedcollm] with at least `auxiliary`')
        if self.system == "fedmkt" and self.fedmkt is None:
            raise SettingsError('system = "fedmkt" needs a table [fedmkt] with at least `public`')
        if (averaged := self.averaged) is None:
            return
        if self.adapter.freeze_a and averaged.average == "products":
            raise SettingsError("with adapter.freeze_a the mean of B is exact already, and products would change A: take factors")
        if averaged.secure is not None and self.system == "crosslm":
            raise SettingsError("crosslm.federated.secure is not there yet; leave it out")
        if averaged.secure is not None and (self.adapter.min_layers or self.adapter.min_rank):
            raise SettingsError("secure averaging sums vectors of one length: leave adapter.min_layers and min_rank at 0")
        if 0 < self.adapter.min_rank < self.adapter.rank and averaged.average == "factors" and not self.adapter.freeze_a:
            raise SettingsError(
                "factors of different ranks have no mean: with adapter.min_rank set lpfl.average to products, or adapter.freeze_a"
            )

        if isinstance(averaged.rule, Median | TrimmedMean | Krum) and (self.adapter.min_layers or self.adapter.min_rank):
            raise SettingsError("lpfl.rule compares updates of one shape: leave adapter.min_layers and min_rank at 0")

    @property
    def averaged(self) -> LpFl | None:
        """How what devices send becomes a version; None in a run where they keep it."""
        if self.system == "crosslm":
            return self.crosslm.federated if self.crosslm is not None else None
        if self.system == "fedcollm" and self.fedcollm is not None:
            return fedcollm.averaging(self.fedcollm)
        if self.system == "fedmkt":
            return None
        return self.lpfl


def load(path: Path, system: str | None = None) -> RunSettings:
    """A run's settings, of the file's system or of another one that the file has settings for.

    Raises:
        SettingsError: no such file, not TOML, an unknown key, or a value out of bounds.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
        return msgspec.convert(content if system is None else {**content, "system": system}, RunSettings)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    except (msgspec.ValidationError, EdgeError) as error:
        raise SettingsError(f"{path}: {error}") from error


def manifest(settings: RunSettings, bundle: Bundle) -> Manifest:
    """What devices are told. Raises: SettingsError: the adapter's modules or layers are not in the bundle."""
    adapter, task = settings.adapter, settings.task
    if task.answer_tokens and bundle.kind != "decoder":
        raise SettingsError("an encoder cannot write: a task with answer_tokens needs decoders")
    if settings.system == "fedmkt" and task.labels:  # each kind of model is asked in its own words
        task = bundle.task
        if task.labels != settings.task.labels:
            raise SettingsError(f"a bundle's labels are {', '.join(task.labels)}, the run's {', '.join(settings.task.labels)}")
    if not bundle.slots:
        raise SettingsError("the bundle has no layer that can carry an adapter")
    spec = AdapterSpec(bundle.pick(adapter.modules, adapter.top_layers), adapter.rank, adapter.alpha, adapter.freeze_a)
    if adapter.min_layers > spec.depth:
        raise SettingsError(f"adapter.min_layers = {adapter.min_layers} is more than the {spec.depth} layers of the adapter")
    least, secure = (adapter.min_layers, adapter.min_rank), _quorum(settings.averaged)
    return Manifest(PROTOCOL, settings.system, task, spec, bundle, "", *least, secure)


def _quorum(averaged: LpFl | None) -> Quorum | None:
    secure = None if averaged is None else averaged.secure
    return None if averaged is None or secure is None else Quorum(averaged.buffer_size, secure.threshold)
