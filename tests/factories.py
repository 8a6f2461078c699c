"""Models of a few thousand parameters and values with defaults, made on the spot.

`python -m tests.factories FOLDER` leaves the bundles there, for tests in an environment without an exporter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from edge_sdk.adapters import ADAPTER_FILE, CONFIG_FILE, AdapterSpec, Arrays, Slot, peft_config
from edge_sdk.assets import Asset
from edge_sdk.bundle import SCHEMA, Bundle
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.tasks import Kind, Task
from edge_sdk.wire import pack_adapter

GOOD = ["great", "lovely", "fine", "nice", "superb", "bright"]
BAD = ["awful", "dull", "poor", "sad", "broken", "grim"]
OTHER = ["a", "the", "film", "phone", "day", "was", "it", "very", "so", "story", "good", "bad", "."]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]

ENCODER_TASK = Task(labels=("negative", "positive"), pattern="{text}", verbalizer=(("it was bad",), ("it was good",)), scale=10.0)
DECODER_TASK = Task(labels=("negative", "positive"), pattern="{text} it was", verbalizer=(("bad",), ("good",)))

PROBE = Path(__file__).with_name("probe.jsonl")  # sentences of the words above

SLOTS = (Slot("layer.0.query", 6, 4), Slot("layer.1.query", 6, 4))
SPEC = AdapterSpec(SLOTS, rank=2, alpha=4.0)


def task(kind: Kind) -> Task:
    return ENCODER_TASK if kind == "encoder" else DECODER_TASK


def bundle(kind: Kind = "encoder", slots: tuple[Slot, ...] = SLOTS) -> Bundle:
    """A description without files."""
    return Bundle(
        schema=SCHEMA,
        kind=kind,
        base="nowhere",
        base_sha256=None,
        license="unknown",
        parameters=1000,
        width=16,
        layers=2,
        positions=64,
        prefix=(1,),
        suffix=(2,),
        end=(),
        slots=slots,
        task=task(kind),
        label_ids=(),
        variants=(),
        files={},
    )


def manifest(spec: AdapterSpec = SPEC) -> Manifest:
    return Manifest(PROTOCOL, "lpfl", ENCODER_TASK, spec, bundle(slots=spec.slots))


def write_model(folder: Path, kind: Kind) -> Path:
    """A transformers folder: two layers of width 16, words as tokens, the same weights every time."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *OTHER, *GOOD, *BAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf: Any = transformers  # its classes carry no types
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), SPECIAL, strict=True))
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "encoder":
            hf.BertModel(hf.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
        else:
            config = hf.LlamaConfig(**sizes, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=True)
            hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_bundle(folder: Path, kind: Kind) -> Path:
    """The bundle of `write_model`; it names the model's folder by its full path."""
    from edge_export.bundle import Recipe, make

    model = write_model(folder.resolve() / kind / "model", kind)
    make(Asset(str(model)), bundle_path(folder, kind), Recipe(("fp32",), task=task(kind), probe=PROBE))
    return bundle_path(folder, kind)


def bundle_path(folder: Path, kind: Kind) -> Path:
    """Where `write_bundle` puts it."""
    return folder / kind / "bundle"


if __name__ == "__main__":
    for each in get_args(Kind):
        write_bundle(Path(sys.argv[1]), each)


def write_peft(folder: Path, arrays: Arrays, spec: AdapterSpec, base: str) -> None:
    """A PEFT directory as the server makes one of each version."""
    (folder / ADAPTER_FILE).write_bytes(pack_adapter(arrays))
    (folder / CONFIG_FILE).write_bytes(peft_config(spec, base))
