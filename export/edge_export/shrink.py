"""A smaller model of the same family: some of a model's layers, taught on public text by the whole of it, as a bundle.

The emulator of offsite tuning (Xiao et al. 2023), by the recipe of FS-LLM's FedOT (Kuang et al. 2023): layers are kept at an
even stride over the depth, the first and the last among them; then a short distillation, in which all but the embeddings learns.
It may then get a smaller vocabulary of its own (`vocabulary.py`), with which all of it learns a little more.
The model's folder is left beside the bundle: it is the bundle's base, as a downloaded model is that of any other bundle.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from edge_export import bundle, probe, source, vocabulary
from edge_export.bundle import Made, Recipe, Say
from edge_sdk.assets import Asset, resolve
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.tokens import Ids, by_tokens
from edge_sdk.training.base import count_parameters, load_path, quiet, whole_states
from edge_sdk.training.batches import epochs

ARCHITECTURES = ("llama",)
NAME = "shrink.json"  # in the model's folder: what it was made from and how
MAX_FILE = 64_000_000  # bytes
MAX_LINE = 4000  # characters; the rest of a line is not read
LEAST_TEXTS = 64
LEAST_PARAGRAPH = 40  # characters of Python's manual
HELD_OUT = 128  # texts, at most
MICRO_TOKENS = 1024  # whose logits over the whole vocabulary are in memory at a time
WARM_UP = 0.1  # of the steps
Tell = Callable[[int, int, float], None]  # steps done, of how many, the last one's loss
T = TypeVar("T")


class Shrinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to keep of a model and how to teach it.

    Args:
        layers: how many are kept.
        steps: optimizer steps of the distillation; 0 for none.
        batch_size: texts in each step.
        learning_rate: of AdamW at its height; it warms up over a tenth of the steps and falls as a cosine.
        lm: weight of the next token's cross-entropy.
        kd: weight of the KL divergence from the teacher's next token, see `divergence`.
        hidden: weight of the distance of each layer's output from the teacher's, see `distance`.
        top_k: the teacher's likeliest tokens, which `kd` compares one by one.
        tokens: of each text that are read, at most.
        clip: largest norm of one step's gradient.
        seed: orders the texts.
        threads: for training.
        vocabulary: tokens of a smaller tokenizer of its own, learnt from the same texts; 0 for the model's.
        adapt_steps: optimizer steps with that tokenizer, in which everything learns; 0 for none.
    """

    layers: int
    steps: int = 300
    batch_size: int = 4
    learning_rate: float = 1e-3
    lm: float = 0.1
    kd: float = 0.9
    hidden: float = 1.0
    top_k: int = 64
    tokens: int = 128
    clip: float = 1.0
    seed: int = 0
    threads: int = 2
    vocabulary: int = 0
    adapt_steps: int = 300

    def __post_init__(self) -> None:
        if not 2 <= self.layers <= 1000:
            raise SettingsError("layers must be 2 to 1000: the first and the last are always kept")
        if not 0 <= self.steps <= 100_000 or not 1 <= self.batch_size <= 4096 or not 1 <= self.threads <= 1024:
            raise SettingsError("steps must be 0 to 100000, batch_size 1 to 4096, threads 1 to 1024")
        if not 0 < self.learning_rate <= 1 or not 0 < self.clip < math.inf:
            raise SettingsError("learning_rate must be in (0, 1], clip positive and finite")
        weights = (self.lm, self.kd, self.hidden)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise SettingsError("lm, kd and hidden must be 0 or more and finite, and one of them positive")
        if not 1 <= self.top_k <= 1024 or not 2 <= self.tokens <= 4096 or not 0 <= self.seed < 2**63:
            raise SettingsError("top_k must be 1 to 1024, tokens 2 to 4096, seed 0 or more")
        if self.vocabulary and not 256 < self.vocabulary <= 1_000_000:
            raise SettingsError("vocabulary must be 257 to 1000000, since every byte is a token, or 0 for the model's own")
        if not 0 <= self.adapt_steps <= 100_000:
            raise SettingsError("adapt_steps must be 0 to 100000")


@dataclass(frozen=True)
class Stage:
    """One row of the report: the teacher, what is left of it, that after distillation, and with a vocabulary of its own.

    Args:
        vocabulary: rows of its embeddings.
        perplexity: on held-out texts, of the tokens after the first; only models with the same tokenizer compare.
        nats_per_byte: on the same texts, of the text after the first token; all models compare.
    """

    name: str
    layers: int
    vocabulary: int
    parameters: int
    perplexity: float
    nats_per_byte: float


@dataclass(frozen=True)
class Taught:
    """A shrunk model's history.

    Args:
        kept: which of the teacher's layers.
        stages: teacher, dropped, distilled; then own vocabulary and adapted, if it got one.
        texts: how many were learnt from; held_out: how many judged.
        seconds: of all training.
    """

    kept: tuple[int, ...]
    stages: tuple[Stage, ...]
    texts: int
    held_out: int
    seconds: float


@dataclass(frozen=True)
class Shrunk:
    """A finished bundle, the folder of its base, and how that came about."""

    made: Made
    model: Path
    taught: Taught


# Text -----------------------------------------------------------------------------------------------------------------
def read(paths: Sequence[Path]) -> list[str]:
    """The texts of UTF-8 files, one a line, without control characters, empty lines and repetitions.

    Raises:
        DataError: a file cannot be read, is larger than 64 MB or no UTF-8.
    """
    lines: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                body = file.read(MAX_FILE + 1)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(body) > MAX_FILE:
            raise DataError(f"{path} is larger than {MAX_FILE // 10**6} MB; some thousand lines are enough")
        try:
            lines += body.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    return _distinct(lines)


def manual() -> list[str]:
    """Paragraphs of Python's own manual, which comes with every Python."""
    paragraphs = (paragraph for page in topics.values() for paragraph in page.split("\n\n"))
    return [text for text in _distinct(paragraphs) if len(text) >= LEAST_PARAGRAPH]


def clean(text: str) -> str:
    """One line without control and format characters, not too long; runs of blanks become one."""
    kept = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text[:MAX_LINE])
    return " ".join(kept.split())


def _distinct(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(map(clean, texts)) if text]


def hold_out(rows: Sequence[T]) -> tuple[list[T], list[T]]:
    """What is learnt from, and an eighth, or 128, of the rows that judge, evenly spread.

    Raises:
        DataError: fewer rows than make sense.
    """
    if len(rows) < LEAST_TEXTS:
        raise DataError(f"{len(rows)} texts of two tokens or more are too few; give at least {LEAST_TEXTS}, better some thousand")
    every = max(8, math.ceil(len(rows) / HELD_OUT))
    return [row for at, row in enumerate(rows) if at % every], list(rows[::every])


@dataclass(frozen=True)
class Row:
    """A text as a model reads it.

    Args:
        ids: its tokens, cut.
        text: what they say.
        size: bytes of it that come after the first token, at least 1.
    """

    ids: Ids
    text: str
    size: int


def rows_of(texts: Sequence[str], tokenizer: Any, prefix: Ids, tokens: int) -> list[Row]:
    """The texts as the model reads them, cut; those of one token, which predict nothing, are left out."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode_batch(list(texts), add_special_tokens=False)
    return [_row(text, e, prefix, tokens) for text, e in zip(texts, encoded, strict=True) if len(prefix) + len(e.ids) > 1]


def _row(text: str, encoded: Any, prefix: Ids, tokens: int) -> Row:
    ids = [*prefix, *encoded.ids][:tokens]
    ends = [0] * len(prefix) + [end for _, end in encoded.offsets]
    return Row(ids, text[: ends[len(ids) - 1]], max(1, len(text[ends[0] : ends[len(ids) - 1]].encode())))


# Layers ---------------------------------------------------------------------------------------------------------------
def even(of: int, layers: int) -> tuple[int, ...]:
    """Which layers of `of` are kept: the first, the last, and others at a stride of (of - 1) / (layers - 1), rounded.

    Raises:
        DataError: fewer than two, or no fewer than there are.
    """
    if not 2 <= layers < of:
        raise DataError(f"{layers} layers cannot be kept of a model that has {of}; choose 2 to {of - 1}")
    gaps = layers - 1
    return tuple((2 * i * (of - 1) + gaps) // (2 * gaps) for i in range(layers))


def drop(teacher: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A copy of the teacher with these layers alone, in eval mode."""
    whole: Any = teacher
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = len(kept)
    state, prefix = whole.state_dict(), "model.layers."
    new = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    for at, layer in enumerate(kept):
        inside = f"{prefix}{layer}."
        new |= {f"{prefix}{at}.{n.removeprefix(inside)}": tensor for n, tensor in state.items() if n.startswith(inside)}
    with torch.random.fork_rng(devices=[]):
        student: nn.Module = type(whole)(config)
    student.load_state_dict(new)
    return student.eval()


# Distillation ---------------------------------------------------------------------------------------------------------
def judged(name: str, model: nn.Module, rows: Sequence[Row]) -> Stage:
    """What a model is worth on these texts, of which all tokens after the first are predicted."""
    whole: Any = model
    with torch.no_grad():
        batches = [[rows[i].ids for i in batch] for batch in by_tokens([row.ids for row in rows], MICRO_TOKENS)]
        nats = sum(float(_next_token(whole, sequences, "sum")) for sequences in batches)
    perplexity = math.exp(min(nats / sum(len(row.ids) - 1 for row in rows), 100.0))
    per_byte = nats / sum(row.size for row in rows)
    return Stage(name, len(whole.model.layers), whole.config.vocab_size, count_parameters(model), perplexity, per_byte)


def _next_token(model: Any, sequences: Sequence[Ids], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the tokens after the first of each sequence."""
    states, mask = whole_states(model, "decoder", sequences)
    logits = states[_before(mask)] @ model.get_output_embeddings().weight.T
    return F.cross_entropy(logits, _targets(sequences), reduction=reduction)


def divergence(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """KL(teacher || student) over the teacher's k likeliest tokens and all others as one: (n,).

    Unlike `losses.top_k`, which looks at these k alone, it notices what a student puts on tokens that the teacher excludes.

    Args:
        logits: the student's, over the whole vocabulary, (n, V).
        ids: the teacher's likeliest tokens, (n, k); logprobs: their log-probabilities, (n, k).
    """
    found = logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)
    p = logprobs.exp()
    rest, left = (1 - p.sum(1)).clamp(min=1e-6), (1 - found.exp().sum(1)).clamp(min=1e-6)
    return (p * (logprobs - found)).sum(1) + rest * (rest.log() - left.log())


def distance(states: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each position over the teacher's mean square there: (n,); both (n, width).

    Position by position, since a sequence's first has a hundred times the size of the others.
    """
    return (states - teacher).square().mean(1) / teacher.square().mean(1).clamp(min=1e-12)


def rate(step: int, steps: int) -> float:
    """What the learning rate is multiplied by: up in a line over a tenth of the steps, then down as half a cosine."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def distil(
    teacher: nn.Module,
    student: nn.Module,
    kept: Sequence[int],
    rows: Sequence[Ids],
    settings: Shrinking,
    tell: Tell = lambda *_: None,
) -> None:
    """Trains all of the student but its embeddings.

    Args:
        kept: which of the teacher's layers the student's are.

    Raises:
        DataError: the loss is not finite.
    """
    whole: Any = student
    tables = [whole.get_input_embeddings().weight, whole.get_output_embeddings().weight]
    free = [parameter for parameter in student.parameters() if not any(parameter is table for table in tables)]
    _train(student, free, rows, settings.steps, settings, lambda batch: _loss(teacher, student, kept, batch, settings), tell)


def adapt(student: nn.Module, rows: Sequence[Ids], settings: Shrinking, tell: Tell = lambda *_: None) -> None:
    """Trains all of the student, its embeddings too, on the next token alone: a teacher of other tokens has no say in it.

    Raises:
        DataError: the loss is not finite.
    """
    free = [*student.parameters()]
    _train(student, free, rows, settings.adapt_steps, settings, lambda batch: _next_token(student, batch), tell)


def _train(
    student: nn.Module,
    free: Sequence[nn.Parameter],
    rows: Sequence[Ids],
    steps: int,
    settings: Shrinking,
    mean_loss: Callable[[Sequence[Ids]], Tensor],
    tell: Tell,
) -> None:
    """Moves the free parameters alone.

    Args:
        mean_loss: of a few sequences, over their tokens.

    Raises:
        DataError: the loss is not finite.
    """
    for parameter in student.parameters():
        parameter.requires_grad_(any(parameter is one for one in free))
    optimizer = torch.optim.AdamW(free, lr=settings.learning_rate, weight_decay=0.0, foreach=False)
    rng = np.random.default_rng(settings.seed)
    batches = epochs([len(row) for row in rows], settings.batch_size, steps, rng, bucket=8)
    for step, chosen in enumerate(batches):
        batch = [rows[i] for i in chosen]
        tokens, total = sum(map(len, batch)), 0.0
        for micro in by_tokens(batch, MICRO_TOKENS):
            sequences = [batch[i] for i in micro]
            loss = mean_loss(sequences) * (sum(map(len, sequences)) / tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise DataError(f"the loss of step {step + 1} is not finite; choose a smaller --learning-rate")
        nn.utils.clip_grad_norm_(free, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tell(step + 1, steps, total)
    student.requires_grad_(False)


def _loss(teacher: Any, student: Any, kept: Sequence[int], sequences: Sequence[Ids], settings: Shrinking) -> Tensor:
    """Mean over the tokens of these sequences."""
    ends = [layer - 1 for layer in kept[1:]]  # what enters the next kept layer is what each layer should have made
    with torch.no_grad():
        wanted, last, mask = _states(teacher, sequences, ends)
        inside, before = mask.bool(), _before(mask)
        scores = last[before] @ teacher.get_output_embeddings().weight.T
        logprobs, ids = scores.log_softmax(1).topk(min(settings.top_k, scores.shape[1]))
        del scores
    found, final, _ = _states(student, sequences, range(len(kept) - 1))
    loss = final.new_zeros(())
    if settings.hidden:
        pairs = [*zip(found, wanted, strict=True), (final, last)]
        loss = loss + settings.hidden * torch.stack([distance(a[inside], b[inside]).mean() for a, b in pairs]).mean()
    if settings.lm or settings.kd:
        logits = final[before] @ student.get_output_embeddings().weight.T
        loss = loss + settings.lm * F.cross_entropy(logits, _targets(sequences))
        loss = loss + settings.kd * divergence(logits, ids, logprobs).mean()
    return loss


def _states(model: Any, sequences: Sequence[Ids], layers: Iterable[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """What these layers put out, the final hidden states, all (n, longest, width), and the mask (n, longest)."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)  # a tuple in older transformers

    hooks = [model.model.layers[layer].register_forward_hook(keep) for layer in layers]
    try:
        final, mask = whole_states(model, "decoder", sequences)
    finally:
        for hook in hooks:
            hook.remove()
    return found, final, mask


def _before(mask: Tensor) -> Tensor:
    """Positions (n, longest) that have a next token."""
    return F.pad(mask[:, 1:], (0, 1)).bool()


def _targets(sequences: Sequence[Ids]) -> Tensor:
    """These next tokens, in the order of `_before`."""
    return torch.tensor([token for ids in sequences for token in ids[1:]])


@contextmanager
def _fast(threads: int) -> Iterator[None]:
    """As devices train: oneDNN's kernels may round to bfloat16 on processors made for it. Put back after."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


# The model's folder ---------------------------------------------------------------------------------------------------
def teach(
    asset: Asset,
    folder: Path,
    settings: Shrinking,
    texts: Sequence[str],
    say: Say,
    tell: Tell = lambda *_: None,
    words: Sequence[str] = (),
) -> Taught:
    """Writes the shrunk model to a new `folder`, as transformers reads it, with its history in `shrink.json`.

    Args:
        words: labels, which a vocabulary of its own must not split.

    Raises:
        AssetError: the model could not be had. DataError: it is of no supported architecture, has not that many layers, cannot
        have such a vocabulary, or the texts are too few.
    """
    path = resolve(asset)
    config = source.config_of(path)
    _may_shrink(config, settings)
    kept = even(int(config.num_hidden_layers), settings.layers)
    positions = int(config.max_position_embeddings)
    gguf = path.suffix == ".gguf"
    tokenizer = _portable(source.tokenizer_of(path), gguf)
    learn, judge = hold_out(_read_by(tokenizer, texts, min(settings.tokens, positions)))
    own = tokenizer
    if settings.vocabulary:
        vocabulary.check(settings.vocabulary, tokenizer.backend_tokenizer, source.end_of_text(config, tokenizer))
        say(f"learning a vocabulary of {settings.vocabulary} tokens")
        public = [row.text for row in learn]
        own = _wrap(tokenizer, vocabulary.train(public, settings.vocabulary, tokenizer.backend_tokenizer, words))
    say(f"loading the weights; {len(learn)} texts to learn from, {len(judge)} held out")
    quiet()
    with _fast(settings.threads):
        teacher = load_path(path, "decoder").requires_grad_(False)
        student = drop(teacher, kept)
        if (parameters := _left(student, settings)) > bundle.MOST_PARAMETERS:
            raise DataError(f"{parameters:,} weights are too many for a bundle; choose fewer layers")
        say(f"keeping {len(kept)} of {config.num_hidden_layers} layers: {', '.join(map(str, kept))}")
        stages = [judged("teacher", teacher, judge), judged("dropped", student, judge)]
        say(f"distilling for {settings.steps} steps")
        started = time.perf_counter()
        distil(teacher, student, kept, [row.ids for row in learn], settings, tell)
        seconds = time.perf_counter() - started
        stages.append(judged("distilled", student, judge))
        if settings.vocabulary:
            student = vocabulary.swap(student, tokenizer.backend_tokenizer, own.backend_tokenizer)
            again = _read_by(own, [row.text for row in judge], positions)  # the same text, however many tokens it has now
            stages.append(judged("own vocabulary", student, again))
            say(f"adapting for {settings.adapt_steps} steps")
            started = time.perf_counter()
            adapt(student, [row.ids for row in _read_by(own, [row.text for row in learn], positions)], settings, tell)
            seconds += time.perf_counter() - started
            stages.append(judged("adapted", student, again))
    taught = Taught(kept, tuple(stages), len(learn), len(judge), seconds)
    save: Any = student
    save.save_pretrained(folder)
    own.save_pretrained(folder)
    names = sorted(p.name for p in folder.iterdir())
    history = {"base": bundle._anywhere(asset.reference), "settings": settings, "taught": taught, "files": names}
    (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(history), indent=1) + b"\n")
    return taught


def _may_shrink(config: Any, settings: Shrinking) -> None:
    """Raises: DataError: the model is of another architecture."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise DataError(
            f"a {config.model_type!r} model cannot be shrunk; supported are decoders of type {known}, such as SmolLM2"
        )
    even(int(config.num_hidden_layers), settings.layers)


def _left(student: Any, settings: Shrinking) -> int:
    """Weights of the finished model."""
    tables = {id(part.weight): part.weight for part in (student.get_input_embeddings(), student.get_output_embeddings())}
    spared = sum((len(table) - settings.vocabulary) * table.shape[1] for table in tables.values()) if settings.vocabulary else 0
    return count_parameters(student) - spared


def _read_by(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[Row]:
    """What a model with this portable tokenizer reads of the texts."""
    prefix, _ = source.frame(tokenizer, "decoder", gguf=False)
    return rows_of(texts, tokenizer, list(prefix), tokens)


def _portable(tokenizer: Any, gguf: bool) -> Any:
    """A tokenizer that reads alike from a folder; what comes out of a GGUF file would add BOS there, see `source.frame`."""
    if not gguf:
        return tokenizer
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return _wrap(tokenizer, backend)


def _wrap(like: Any, backend: Tokenizer) -> Any:
    """Another backend under the same names of special tokens and the same chat template."""
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=backend, chat_template=like.chat_template, **like.special_tokens_map)


# The bundle -----------------------------------------------------------------------------------------------------------
def make(
    asset: Asset,
    out: Path,
    settings: Shrinking,
    texts: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    model: Path | None = None,
    say: Say = lambda _: None,
    tell: Tell = lambda *_: None,
) -> Shrunk:
    """Shrinks the model of `asset` and writes the bundle of the result to `out`; older ones are replaced if all went well.

    Args:
        texts: public; Python's manual by default.
        recipe: of the bundle; int8 with sentiment by default.
        model: folder of the shrunk model, which `Bundle.base` names; `out` with `-model` behind it by default.
        say: told one line per stage. tell: told of each step.

    Raises:
        What `teach` and `bundle.make` raise. A shrunk model that replaced no other stays where only the bundle failed.
    """
    out = out.expanduser().resolve()
    folder = (model or out.with_name(f"{out.name}-model")).expanduser().resolve()
    recipe = recipe or Recipe()
    _possible(asset, out, folder, settings, recipe)
    texts = manual() if texts is None else _distinct(texts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".shrink-") as work:
        new, old = Path(work) / "new", Path(work) / "old"
        task = recipe.task or bundle.SENTIMENT["decoder"]
        taught = teach(asset, new, settings, texts, say, tell, [word for words in task.verbalizer for word in words])
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        say(f"the shrunk model is in {folder}")
        try:
            made = bundle.make(Asset(str(folder), license=asset.license), out, recipe, say)
        except BaseException:
            if old.exists():
                folder.rename(new)
                old.rename(folder)
            raise
    return Shrunk(made, folder, taught)


def _possible(asset: Asset, out: Path, folder: Path, settings: Shrinking, recipe: Recipe) -> None:
    """Raises: DataError: what would fail only after the training."""
    if out == folder or out in folder.parents or folder in out.parents:
        raise DataError(f"{folder} and {out} lie in each other; choose another folder for the model")
    bundle._may_replace(out)
    _may_replace(folder)
    if unknown := [name for name in recipe.variants if name not in bundle.VARIANTS]:
        raise DataError(f"variant {unknown[0]!r} does not exist; there are: {', '.join(bundle.VARIANTS)}")
    probe.read(recipe.probe, ())
    path = resolve(asset)
    _may_shrink(source.config_of(path), settings)
    bundle._possible(recipe, path)


def _may_replace(folder: Path) -> None:
    """Raises: DataError: the folder is no shrunk model of ours and not empty."""
    if not folder.exists():
        return
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    try:
        ours = {NAME, *json.loads((folder / NAME).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if present - ours:
        raise DataError(f"{folder} holds other files ({sorted(present - ours)[0]}, ...); choose another folder for the model")


# What people see ------------------------------------------------------------------------------------------------------
@contextmanager
def progress() -> Iterator[tuple[Say, Tell]]:
    """A bar on a terminal; elsewhere a line for each stage and each tenth of the steps; both on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line, _every_tenth
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)

        def say(line: str) -> None:
            bar.console.print(f"[dim]{line}[/dim]")
            bar.reset(task, description=line, total=None)

        def tell(done: int, steps: int, loss: float) -> None:
            bar.update(task, completed=done, total=steps, description=f"step {done} of {steps}, loss {loss:.3f}")

        yield say, tell


def _line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _every_tenth(done: int, steps: int, loss: float) -> None:
    if done % max(1, steps // 10) == 0 or done == steps:
        _line(f"step {done} of {steps}, loss {loss:.3f}")


def as_json(shrunk: Shrunk) -> dict[str, Any]:
    """What the table says, for scripts."""
    taught = shrunk.taught
    stages = [{**asdict(stage), "megabytes": megabytes(stage)} for stage in taught.stages]
    return {"model": str(shrunk.model), "kept": taught.kept, "stages": stages, "seconds": taught.seconds}


def megabytes(stage: Stage) -> float:
    """Of the weights in float32."""
    return 4 * stage.parameters / 1e6


def show(taught: Taught) -> None:
    """Prints the table."""
    table = Table(title=f"perplexity on {taught.held_out} held-out texts; {taught.seconds:.0f} s of training")
    for heading in ("model", "layers", "vocabulary", "parameters", "MB, fp32", "perplexity", "nats per byte"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for s in taught.stages:
        size = (str(s.layers), f"{s.vocabulary:,}", f"{s.parameters:,}", f"{megabytes(s):.0f}")
        table.add_row(s.name, *size, f"{s.perplexity:,.1f}", f"{s.nats_per_byte:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
