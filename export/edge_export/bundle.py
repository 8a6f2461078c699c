"""A model -> a bundle folder: weights, smoothing, optimum's export, surgery, quantization, measurement, description.

Everything is made aside and put in place by one rename, and only if every variant is good enough.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_export import families, gguf, int8, probe, report, rounding, source
from edge_export import graph as surgery
from edge_export.measure import Measured, measure
from edge_export.smooth import Smoothed, sites, smooth
from edge_sdk import bundle as bundles
from edge_sdk import golden
from edge_sdk.adapters import Adapter, AdapterSpec, row_major
from edge_sdk.assets import Asset, resolve
from edge_sdk.bundle import CONFIG, FINAL, NAME, SCHEMA, TOKENIZER, VOCABULARY, Bundle, Variant, digest, layer_file, seal
from edge_sdk.engines import open_engine
from edge_sdk.engines.onnx import OnnxEngine
from edge_sdk.errors import DataError
from edge_sdk.golden import Expected, Golden
from edge_sdk.tasks import Head, Kind, Task
from edge_sdk.tokens import Ids, PromptEncoder
from edge_sdk.training.base import count_parameters, load_path
from edge_sdk.training.learner import readout

FLOOR = 0.99
HALF = 65504.0  # the largest float16
MOST_PARAMETERS = 530_000_000  # of a model whose fp32 graph stays below protobuf's 2 GB
GGUF = gguf.QUANTS
VARIANTS = ("int8", "fp32", *GGUF)
LLAMA_MINIMUM = "0.3.30"  # llama-cpp-python whose adapters can be swapped
SENTIMENT: dict[Kind, Task] = {
    "decoder": Task(("negative", "positive"), "{text}\nAll in all, it was", ((" bad",), (" good",)), max_tokens=48),
    "encoder": Task(("negative", "positive"), "{text}", (("It was bad.",), ("It was good.",)), scale=20.0, max_tokens=48),
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What to make of a model.

    Args:
        variants: names of `VARIANTS`; the first is what devices run unless told otherwise.
        slots: last parts of the module names that get LoRA; empty for the family's default (q and v).
        task: what the bundle answers by itself; sentiment by default.
        probe: file of texts that calibrate and judge; our own by default.
        floor: smallest agreement r with the fp32 model that a variant may have.
        threads: for measuring.
    """

    variants: tuple[str, ...] = ("int8",)
    slots: tuple[str, ...] = ()
    task: Task | None = None
    probe: Path = probe.DEFAULT
    floor: float = FLOOR
    threads: int = 2


@dataclass(frozen=True)
class Made:
    """A finished bundle and what its variants were measured at; fp32 is always among them, as the reference."""

    bundle: Bundle
    measured: tuple[Measured, ...]
    probe: probe.Probe
    threads: int


def default_variants(asset: Asset) -> tuple[str, ...]:
    """int8, and q8_0 too where the model can be GGUF and llama.cpp is there to measure it."""
    fits = source.config_of(resolve(asset)).model_type in gguf.ARCHITECTURES
    return ("int8", "q8_0") if fits and importlib.util.find_spec("llama_cpp") else ("int8",)


def _possible(recipe: Recipe, path: Path) -> None:
    """Raises: DataError: a variant asked for cannot be made of this model here; said before hours of work."""
    model_type = source.config_of(path).model_type
    families.family_of(model_type)
    for name in set(recipe.variants) & set(GGUF):
        if model_type not in gguf.ARCHITECTURES:
            known = ", ".join(gguf.ARCHITECTURES)
            raise DataError(f"variant {name!r}: a {model_type!r} model cannot be written as GGUF; supported are: {known}")
        if not importlib.util.find_spec("llama_cpp"):
            raise DataError(f"variant {name!r} is measured in llama.cpp, which is not installed: pip install 'tandem-edge[gguf]'")


def make(asset: Asset, out: Path, recipe: Recipe = Recipe(), say: Say = lambda _: None) -> Made:  # frozen
    """Writes the bundle of `asset` to `out`, replacing what was there only when everything worked.

    Args:
        say: told one line per stage.

    Raises:
        AssetError: the model could not be had. DataError: it is of no supported family, its graph has no such layers, the
        task does not fit, a variant is below the floor, or `out` holds other files.
    """
    out = out.expanduser().resolve()
    _may_replace(out)
    for name in recipe.variants:
        if name not in VARIANTS or recipe.variants.count(name) > 1:
            raise DataError(f"variant {name!r} does not exist or comes twice; there are: {', '.join(VARIANTS)}")
    if not 0 <= recipe.floor <= 1:
        raise DataError(f"the floor is a correlation between 0 and 1, not {recipe.floor}")
    path = resolve(asset)
    _possible(recipe, path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as temporary:
        made = _Making(asset, path, recipe, Path(temporary), say).run()
        _replace(Path(temporary) / "bundle", out)
    return made


class _Making:
    """The stages, in order; each leaves what the next needs."""

    def __init__(self, asset: Asset, path: Path, recipe: Recipe, work: Path, say: Say) -> None:
        self.asset, self.path, self.recipe, self.work, self.say = asset, path, recipe, work, say
        self.folder = work / "bundle"
        self.folder.mkdir()
        say("loading the weights")
        config, self.tokenizer = source.config_of(path), source.tokenizer_of(path)
        self.family = families.family_of(config.model_type)
        self.config = config
        model: Any = load_path(path, self.family.kind)
        self.model = model
        self.parameters = count_parameters(model)
        if self.parameters > MOST_PARAMETERS:
            raise DataError(f"{self.parameters:,} weights do not fit into one ONNX file of 2 GB; at most {MOST_PARAMETERS:,} do")
        self.plain = work / "plain"
        model.save_pretrained(self.plain)
        self.tokenizer.save_pretrained(self.plain)
        shutil.copyfile(self.plain / TOKENIZER, self.folder / TOKENIZER)
        self._weights()
        self.task = recipe.task or SENTIMENT[self.family.kind]
        self.probe = probe.read(recipe.probe, self.task.labels)
        self.bundle = self._describe()
        self.encoder = PromptEncoder(
            self.folder / TOKENIZER, self.bundle.prefix, self.bundle.suffix, self.bundle.positions, self.task
        )

    def run(self) -> Made:
        prompts = self.encoder.prompts(self.probe.calibrate)
        exact = _torch_readout(self.model, self.family.kind, prompts[:8])
        smoothed: Smoothed | None = None
        read: Mapping[str, torch.Tensor] = {}
        if "int8" in self.recipe.variants:
            self.say("smoothing activations")
            smoothed, read = smooth(self.model, self.family, prompts, rounding.WEIGHT_BITS)
        graph = self._export(smoothed)
        onnx.save(graph, self.work / "model.fp32.onnx")
        self.bundle = msgspec.structs.replace(self.bundle, slots=self.slots)
        base = self._open("fp32", self.work)
        _same(exact, base, prompts[:8])
        self.choose, self.judge, self.head = base.logits(self.probe.choose), base.logits(self.probe.judge), self._head(base)
        del base
        self.say("measuring fp32")
        measured = [measure("fp32", partial(self._open, "fp32", self.work), self.work / "model.fp32.onnx", self.probe, None)]
        for name in self.recipe.variants:
            self.say(f"making and measuring {name}")
            if name == "fp32":
                shutil.copyfile(self.work / "model.fp32.onnx", self.folder / "model.fp32.onnx")
                continue
            if name == "int8":
                self._int8(graph, read, prompts)
            else:
                self._gguf(name)
            path = self.folder / self._variant(name, 1.0, 0.0).file
            measured.append(measure(name, partial(self._open, name), path, self.probe, self.judge))
            self._refuse(measured[-1])
        return self._finish(tuple(measured))

    # Description ------------------------------------------------------------------------------------------------------
    def _describe(self) -> Bundle:
        """All that is known before any variant exists."""
        config, kind = self.config, self.family.kind
        prefix, suffix = source.frame(self.tokenizer, kind, self.path.suffix == ".gguf")
        encoder = PromptEncoder(self.folder / TOKENIZER, prefix, suffix, int(config.max_position_embeddings), self.task)
        words = tuple(tuple(ids) for ids in encoder.words()) if kind == "decoder" else ()
        layers = int(config.num_hidden_layers)
        return Bundle(
            schema=SCHEMA,
            kind=kind,
            base=_anywhere(self.asset.reference),
            base_sha256=self.asset.sha256,
            license=self.asset.license,
            parameters=self.parameters,
            width=int(config.hidden_size),
            layers=layers,
            positions=int(config.max_position_embeddings),
            prefix=prefix,
            suffix=suffix,
            end=source.end_of_text(config, self.tokenizer),
            slots=(),
            task=self.task,
            label_ids=words,
            variants=(),
            files={},
        )

    def _variant(self, name: str, r: float, kl: float) -> Variant:
        if name in ("int8", "fp32"):
            return Variant(name, "onnxruntime", surgery.MINIMUM, f"model.{name}.onnx", r, kl)
        return Variant(name, "llama.cpp", LLAMA_MINIMUM, f"model.{name}.gguf", r, kl)

    def _open(self, name: str, folder: Path | None = None) -> Any:
        """An engine on a variant that is not described yet."""
        variant, folder = self._variant(name, 1.0, 0.0), folder or self.folder
        shutil.copyfile(self.plain / TOKENIZER, folder / TOKENIZER)
        files = {file: digest(folder / file) for file in (TOKENIZER, variant.file)}
        bundle = msgspec.structs.replace(self.bundle, variants=(variant,), files=files)
        return open_engine(folder, bundle, self.task, name, self.recipe.threads)

    def _weights(self) -> None:
        """What a device trains on: each layer, what follows the last one, and a decoder's vocabulary; before any smoothing."""
        state = {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}

        def keep(file: str, prefix: str) -> None:
            inside = {name.removeprefix(prefix): array for name, array in state.items() if prefix and name.startswith(prefix)}
            if any(np.abs(array).max(initial=0) > HALF for array in inside.values()):
                raise DataError(f"weights of {prefix}* do not fit into float16; this model cannot be trained on devices")
            save_file({name: array.astype(np.float16) for name, array in inside.items()}, self.folder / file)

        for layer in range(int(self.config.num_hidden_layers)):
            keep(layer_file(layer), f"{self.family.layers}.{layer}.")
        keep(FINAL, f"{self.family.final}." if self.family.final else "")
        if self.family.kind == "decoder":
            state = {"head.weight": self.model.get_output_embeddings().weight.detach().numpy()}
            keep(VOCABULARY, "head.")
        shutil.copyfile(self.plain / CONFIG, self.folder / CONFIG)

    # Variants ---------------------------------------------------------------------------------------------------------
    def _export(self, smoothed: Smoothed | None) -> onnx.ModelProto:
        """The fp32 graph with LoRA inputs and all outputs."""
        self.say("exporting to ONNX through optimum")
        folder = self.work / "smoothed"
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        model = source.export(folder, self.family.kind, self.work / "exported")
        surgery.set_opset(model)
        graph, family = model.graph, self.family
        columns, rows = (_numpy(s) for s in (smoothed.columns, smoothed.rows)) if smoothed else ({}, {})
        self.slots = surgery.add_lora(graph, self.recipe.slots or family.slots, columns, rows)
        if family.kind == "decoder":
            surgery.decoder_readout(graph)
            if family.plain_attention and (rotary := source.rotary_of(self.model)) is not None:
                layers = [f"{family.layers}.{i}.self_attn" for i in range(self.bundle.layers)]
                surgery.fuse_attention(graph, layers, rotary)
        else:
            surgery.encoder_readout(graph, self.bundle.width)
        surgery.expose_hidden(graph, [f"{family.layers}.{i}" for i in range(self.bundle.layers)], self.bundle.width)
        surgery.prune(graph)
        return model

    def _head(self, engine: OnnxEngine) -> Head:
        """The class rows; of words of several tokens the rows of their first ones."""
        if self.family.kind == "encoder":
            return engine.head
        table = self.model.get_output_embeddings().weight.detach().numpy()
        return Head(table[[ids[0] for ids in self.bundle.label_ids]], self.task.scale)

    def _int8(self, model: onnx.ModelProto, read: Mapping[str, torch.Tensor], prompts: Sequence[Ids]) -> None:
        """Rounds the weights; gives layers finer activations, the worst first, until the texts for choosing agree."""
        places = list(sites(self.model, self.family))
        rounded = rounding.round_all(places, read)
        matrices = {
            name: int8.IntMatrix(r.integers.numpy().T.astype(np.int8).copy(), r.scale.numpy()) for name, r in rounded.items()
        }
        score = partial(_margin, self.family.kind, self.head)
        harm = rounding.damage(self.model, places, rounded, prompts[:32], score)
        cost = {place.name: sum(linear.weight.numel() for linear in place.linears) for place in places}
        order = sorted(harm, key=lambda name: harm[name] / cost[name], reverse=True)
        members = {place.name: place.names for place in places}
        goal = 1 - 0.3 * (1 - self.recipe.floor)  # well above the floor, since it is measured on few texts
        for share in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1):
            fine = {name for site in order[: round(share * len(order))] for name in members[site]}
            self._write_int8(model, matrices, fine)
            chosen = probe.compare(self.choose, self._open("int8").logits(self.probe.choose))
            self.say(f"int8 with {share:.0%} of the layers' activations in 16 bits: r = {chosen.r:.4f}")
            if chosen.r >= goal:
                break

    def _write_int8(self, model: onnx.ModelProto, matrices: Mapping[str, int8.IntMatrix], fine: set[str]) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        tables = {w.name for w in copy.graph.initializer if w.name.endswith(("embed_tokens.weight", "word_embeddings.weight"))}
        tables |= {w.name for w in copy.graph.initializer if w.name == "lm_head.weight"}
        int8.quantize(copy.graph, matrices, fine, tables)
        surgery.prune(copy.graph)
        onnx.save(copy, self.folder / "model.int8.onnx")

    def _gguf(self, quant: str) -> None:
        gguf.write(self.plain, self.folder / f"model.{quant}.gguf", quant)

    def _refuse(self, measured: Measured) -> None:
        """Raises: DataError: the variant is below the floor."""
        r = measured.agreement.r
        if not r >= self.recipe.floor:
            raise DataError(
                f"variant {measured.name!r} agrees with fp32 at r = {r:.4f}, below the floor of {self.recipe.floor}: nothing "
                "was written. Try a finer variant (q8_0, fp32), texts nearer to what devices read (--probe), or, if you can "
                "live with it, --floor"
            )

    # Finish -----------------------------------------------------------------------------------------------------------
    def _finish(self, measured: tuple[Measured, ...]) -> Made:
        """Golden vectors, the page to look at, and `bundle.json`."""
        self.say("writing golden vectors")
        agreements = {m.name: m.agreement for m in measured}
        variants = tuple(self._variant(n, agreements[n].r, agreements[n].kl) for n in self.recipe.variants)
        self._golden(variants)
        made = Made(self.bundle, measured, self.probe, self.recipe.threads)
        (self.folder / report.NAME).write_text(report.page(made), encoding="utf-8")
        files = {path.name: digest(path) for path in sorted(self.folder.iterdir())}
        bundle = seal(msgspec.structs.replace(self.bundle, variants=variants, files=files))
        bundles.write(self.folder, bundle)
        return replace(made, bundle=bundle)

    def _golden(self, variants: Sequence[Variant]) -> None:
        spec = AdapterSpec(self.slots, rank=2, alpha=4.0)
        rng = np.random.default_rng(0)
        arrays = {
            name: (rng.normal(0, 0.05 if "lora_B" in name else shape[1] ** -0.5, shape)).astype(np.float32)
            for name, shape in spec.shapes().items()
        }
        save_file(row_major(arrays), self.folder / golden.ADAPTER)
        sequences = tuple(tuple(ids) for ids in self.encoder.prompts(self.probe.judge[:6]))
        vectors = Golden(sequences, spec.rank, spec.alpha, {})
        for variant in variants:
            base, adapted = golden.answers(self._open(variant.name), vectors, Adapter(arrays, spec))
            tolerance = (0.001 if variant.name == "fp32" else 0.02) * float(np.std(base) + 0.01)
            vectors.expected[variant.name] = Expected(base, adapted, tolerance)
        (self.folder / golden.JSON).write_bytes(msgspec.json.encode(vectors) + b"\n")


def _margin(kind: Kind, head: Any, model: Any, ids: Ids) -> torch.Tensor:
    """How far the first class's score lies from the mean of all."""
    scores = readout(model, kind, [ids]) @ torch.from_numpy(head.rows).T * head.scale
    margin: torch.Tensor = scores[0, 0] - scores[0].mean()
    return margin


def _numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _torch_readout(model: Any, kind: Kind, sequences: Sequence[Ids]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(readout(model, kind, sequences).numpy())


def _same(exact: NDArray[np.float32], engine: OnnxEngine, sequences: Sequence[Ids]) -> None:
    """Raises: DataError: the exported fp32 graph does not compute what the original weights compute in torch."""
    found = engine.readout(sequences)
    error = float(np.abs(found - exact).max() / np.abs(exact).max())
    if not error < 1e-3:
        raise DataError(
            f"the exported graph differs from the model in torch by {error:.1e}; this exporter does not fit this model"
        )


def _anywhere(reference: str) -> str:
    """A reference that does not depend on the folder one is in; a local path still names this machine only."""
    return reference if reference.startswith(("pypi:", "hf:")) else str(Path(reference).expanduser().resolve())


def _may_replace(out: Path) -> None:
    """Raises: DataError: `out` is no folder, or holds anything that is not part of a bundle."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; choose a new or an empty folder")
    present = {path.name for path in out.iterdir()}
    try:
        ours = {NAME, ".lock", *json.loads((out / NAME).read_bytes())["files"]} if NAME in present else set()
    except (ValueError, KeyError, TypeError):
        ours = {NAME}
    if present - ours:
        raise DataError(f"{out} holds other files ({sorted(present - ours)[0]}, ...); choose a new or an empty folder")


def _replace(staged: Path, out: Path) -> None:
    """Puts a folder in the place of another; what was there is deleted last."""
    if out.exists():
        out.rename(staged.with_name("old"))  # deleted with the temporary folder
    staged.rename(out)
