"""Exports a model into a bundle folder: optimum -> graph surgery -> `model.onnx`, `tokenizer.json`, `bundle.json`."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx

from edge_export import graph as surgery
from edge_sdk.assets import Asset, resolve
from edge_sdk.bundle import NAME, SCHEMA, Bundle, digest
from edge_sdk.errors import AssetError, DataError
from edge_sdk.tasks import Kind
from edge_sdk.training.base import count_parameters, load_path

SLOTS: dict[Kind, tuple[str, ...]] = {"decoder": ("q_proj", "v_proj"), "encoder": ("query", "value")}


def make(asset: Asset, kind: Kind, out: Path, slots: tuple[str, ...] = (), say: Callable[[str], None] = lambda _: None) -> Bundle:
    """Writes the bundle of `asset` to `out`, replacing what was there only when everything worked.

    Args:
        kind: `decoder` for a causal LM, `encoder` for a sentence encoder with mean pooling.
        slots: last parts of the module names that get LoRA; empty for the kind's default (q and v).
        say: told one line per stage.

    Raises:
        AssetError: the model could not be had. DataError: its graph has no such layers, or `out` holds other files.
    """
    _may_replace(out)
    source = resolve(asset)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as temporary:
        work = Path(temporary)
        say("loading the weights")
        parameters = _save_plain(source, kind, work / "plain")
        say("exporting to ONNX through optimum")
        model = _export(work / "plain", kind, work / "exported")
        say("adding LoRA inputs and the readout")
        found = surgery.add_lora(model.graph, slots or SLOTS[kind])
        prefix, suffix = _frame(work / "plain", kind)
        width, positions = _sizes(work / "plain")
        if kind == "decoder":
            surgery.decoder_readout(model.graph)
        else:
            surgery.encoder_readout(model.graph, width)
        surgery.prune(model.graph)
        staged = work / "bundle"
        staged.mkdir()
        onnx.save(model, staged / "model.onnx")
        shutil.copyfile(work / "plain" / "tokenizer.json", staged / "tokenizer.json")
        files = {path.name: digest(path) for path in sorted(staged.iterdir())}
        bundle = Bundle(
            SCHEMA,
            kind,
            _anywhere(asset.reference),
            asset.sha256,
            asset.license,
            parameters,
            width,
            positions,
            prefix,
            suffix,
            found,
            files,
        )
        (staged / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(bundle), indent=1) + b"\n")
        if out.exists():
            shutil.rmtree(out)
        staged.rename(out)
    return bundle


def _save_plain(source: Path, kind: Kind, folder: Path) -> int:
    """Writes fp32 weights, config and a fast tokenizer as one transformers folder; returns the number of weights."""
    model = load_path(source, kind)
    model.save_pretrained(folder)  # type: ignore[operator]  # every transformers model has it
    tokenizer = _tokenizer(source)
    if not tokenizer.is_fast:
        raise DataError(f"{source} has no fast tokenizer, and a device reads only tokenizer.json")
    tokenizer.save_pretrained(folder)
    return count_parameters(model)


def _export(plain: Path, kind: Kind, folder: Path) -> onnx.ModelProto:
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise AssetError("exporting needs the export extra: pip install 'tandem-edge[export]'") from error
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it warns of is optimum's to mend
    task = "text-generation" if kind == "decoder" else "feature-extraction"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's constants are constants; tests compare the graph with torch
        main_export(str(plain), output=folder, task=task, do_validation=False, library_name="transformers")
    return onnx.load(folder / "model.onnx")


def _frame(plain: Path, kind: Kind) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before and after every sequence: [CLS] and [SEP] of an encoder; none for a decoder.

    A GGUF tokenizer puts BOS before everything it encodes; the label words were measured without it, so it stays out.
    """
    if kind == "decoder":
        return (), ()
    tokenizer = _tokenizer(plain)
    return (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    if source.suffix == ".gguf":
        return auto.from_pretrained(source.parent, gguf_file=source.name)
    return auto.from_pretrained(source)


def _sizes(plain: Path) -> tuple[int, int]:
    """Width of a hidden state, and the longest sequence the model was made for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(plain)
    return int(config.hidden_size), int(config.max_position_embeddings)


def _anywhere(reference: str) -> str:
    """A reference that does not depend on the folder one is in; a local path still names this machine only."""
    return reference if reference.startswith(("pypi:", "hf:")) else str(Path(reference).expanduser().resolve())


def _may_replace(out: Path) -> None:
    """Raises: DataError: `out` holds something that is not a bundle."""
    if out.is_dir() and any(out.iterdir()) and not (out / NAME).exists():
        raise DataError(f"{out} holds other files; choose a new or an empty folder")
