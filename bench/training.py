"""Split training against PEFT and transformers' Trainer: seconds, memory, disk, accuracy, on SmolLM2-135M and movie sentences.

Every training runs in a process of its own, whose peak memory is its own; methods take turns within a seed, and speeds are
ratios within a seed. All share sentences, rank, batch size, slots (q and v), dropout (none) and number of passes. Rates were
chosen on validation text (bench/training_settings.py). Accuracy is counted on test text, in the int8 engine that devices serve.

    trainer        transformers.Trainer as its documentation has it: PEFT on every layer, loss over the vocabulary
    trainer_tuned  the same with what split training has too: loss on the label rows, batches of similar length, oneDNN
    split k        the top k layers on cached hidden states of the int8 engine; all: every layer, nothing cached but embeddings
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import fleet
from bench.report import Result, spread
from edge_sdk import bundle as bundles
from edge_sdk import conditions
from edge_sdk.adapters import Adapter, AdapterSpec, Array
from edge_sdk.engines import open_engine
from edge_sdk.tasks import Example, accuracy
from edge_sdk.training import depth
from edge_sdk.training.batches import Done, Job, Label, Row, Source, Training

SLM, THREADS = "smollm2", 2
PASSES, BATCH, RANK, ALPHA, BUCKET = 5, 8, 8, 16.0, 8
SENTENCES, TESTS = 64, 400
RATES = {4: 8e-3, 8: 4e-3, 12: 2e-3, 20: 1e-3, 30: 5e-4}  # by k; chosen in bench/training_settings.py
TRAINER_RATE = RATES[30]
HEADLINE = 12  # the fewest layers within half a point of full depth on validation text
METHODS = ("trainer", "trainer_tuned", *(f"split {k}" for k in RATES))


class Plan(NamedTuple):
    """One training: what, on how many sentences, with which seed and rate, on which text it is judged."""

    method: str
    sentences: int
    seed: int
    rate: float
    part: fleet.Part = "test"


@dataclass(frozen=True)
class Trained:
    """What came of a plan: seconds of each pass, peak bytes, bytes of the cache, seconds before the first pass, the adapter."""

    passes: list[float]
    peak: int
    cache: int
    load: float
    arrays: dict[str, Array]


def run(full: bool) -> Result:
    """Five seeds on 64 sentences, some 35 minutes; `full` takes 256 sentences too, with one seed."""
    console = Console(stderr=True)
    _plain()
    plans = [Plan(m, SENTENCES, seed, _rate(m)) for seed in range(5) for m in METHODS]
    plans += [Plan(m, 256, 0, _rate(m)) for m in METHODS] if full else []
    rows = [measure(plan, console) for plan in plans]
    summary = _summary([row for row in rows if row["sentences"] == SENTENCES])
    return Result("training", rows, summary, _table(rows), _notes(summary))


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Trains in a fresh process and judges the adapter here."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        trained = pool.submit(_trained, plan).result()
    score = _judge(plan, trained.arrays)
    console.print(
        f"{plan.method}, {plan.sentences} sentences, seed {plan.seed}, rate {plan.rate:g}: {trained.passes[0]:.1f} s, then "
        f"{statistics.fmean(trained.passes[1:]):.1f} s a pass, {trained.peak / 1e6:.0f} MB, accuracy {score:.3f}"
    )
    return {
        **plan._asdict(),
        "first_pass_seconds": trained.passes[0],
        "later_pass_seconds": statistics.fmean(trained.passes[1:]),
        "total_seconds": sum(trained.passes),
        "load_seconds": trained.load,
        "peak_bytes": trained.peak,
        "cache_bytes": trained.cache,
        "accuracy": score,
    }


def _plain() -> Path:
    """The model as a folder of float32 safetensors, whose loading takes no more memory than it has to; made once."""
    bundle = fleet.bundle_of(SLM)
    folder = bundle.with_name(f"{bundle.name}-plain")
    if not folder.exists():
        from edge_sdk.training import base

        whole: Any = base.load(bundles.read(bundle))
        whole.save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return folder


# In a process of its own ----------------------------------------------------------------------------------------------
def _trained(plan: Plan) -> Trained:
    folder = fleet.bundle_of(SLM)
    bundle = bundles.read(folder)
    examples = _sentences(plan)
    if plan.method.startswith("split"):
        return _split(folder, bundle, examples, plan, int(plan.method.split()[1]))
    return _trainer(folder, bundle, examples, plan)


def _split(folder: Path, bundle: bundles.Bundle, examples: Sequence[Example], plan: Plan, layers: int) -> Trained:
    from edge_sdk.training.hidden import HiddenStates

    began = time.perf_counter()
    engine = open_engine(folder, bundle, variant="int8", threads=THREADS)
    spec = AdapterSpec(bundle.pick((), layers), RANK, ALPHA)
    rows = [
        Row(ids, Label(e.label or 0)) for ids, e in zip(engine.encoder.prompts([e.text for e in examples]), examples, strict=True)
    ]
    steps = -(-len(rows) // BATCH)
    training = Training(steps * PASSES, BATCH, plan.rate, dropout=0.0, bucket=BUCKET)
    with tempfile.TemporaryDirectory() as home:
        split = bundle.layers - layers
        states = HiddenStates(lambda s: engine.hidden(s, split), "bench", Path(home) / "hidden.sqlite")
        head, encoder, reading = engine.head, engine.encoder, time.perf_counter()
        states.advance(states.missing([row.ids for row in rows]), float("inf"))
        read = time.perf_counter()
        engine.close()
        conditions.trim()
        from edge_sdk.training.learner import Learner  # as the agent does: torch comes when the engine is gone
        from edge_sdk.training.trainer import Trainer

        learner = Learner.split(folder, bundle, head, encoder, spec, states, layers, threads=THREADS)
        job = Job(spec.start(plan.seed), [Source(rows, BATCH)], training, plan.seed)
        trainer = Trainer(learner, job, Path(home) / "training.safetensors")
        load = reading - began + time.perf_counter() - read
        times, at = [time.perf_counter()], [0]
        while not isinstance(state := trainer.step(1.0), Done):  # small steps, each kept on disk
            times.append(time.perf_counter())
            at.append(state.step)
        ends = np.interp(np.arange(PASSES + 1) * steps, [*at, steps * PASSES], [*times, time.perf_counter()])
        ends[0] -= read - reading  # reading belongs to the first pass
        return Trained(np.diff(ends).tolist(), _peak(), states.size(), load, state.arrays)


def _trainer(folder: Path, bundle: bundles.Bundle, examples: Sequence[Example], plan: Plan) -> Trained:
    """PEFT + transformers.Trainer; the label's word follows the prompt, and is all that counts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from edge_sdk.bundle import TOKENIZER
    from edge_sdk.tokens import PromptEncoder
    from edge_sdk.training import base

    began = time.perf_counter()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(THREADS)
    tuned = plan.method == "trainer_tuned"
    torch.set_float32_matmul_precision("medium" if tuned else "highest")
    encoder = PromptEncoder(folder / TOKENIZER, bundle.prefix, bundle.suffix, bundle.positions, bundle.task)
    words = [ids[0] for ids in encoder.words()]
    whole: Any = base.load_path(_plain(), bundle.kind)
    modules = [slot.module for slot in bundle.pick(())]
    alpha: Any = ALPHA
    torch.manual_seed(plan.seed)
    model: Any = get_peft_model(
        whole, LoraConfig(r=RANK, lora_alpha=alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM")
    )
    prompts = encoder.prompts([e.text for e in examples])
    data = [{"input_ids": ids, "label": words[e.label or 0]} for ids, e in zip(prompts, examples, strict=True)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch) + 1
        ids, mask, labels = (torch.full((len(batch), longest), fill) for fill in (0, 0, -100))
        for i, row in enumerate(batch):
            n = len(row["input_ids"])
            ids[i, :n], ids[i, n], mask[i, : n + 1], labels[i, n] = torch.tensor(row["input_ids"]), row["label"], 1, row["label"]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Tuned(Trainer):
        """The loss over the label rows alone, at the prompt's last position."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            bare, at = model.get_base_model(), inputs["attention_mask"].sum(1) - 2
            ids, mask = inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]
            hidden = bare.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            rows = bare.get_output_embeddings().weight[words]
            scores = hidden[torch.arange(len(at)), at] @ rows.T
            wanted = torch.tensor([words.index(int(labels.max())) for labels in inputs["labels"]])
            loss = torch.nn.functional.cross_entropy(scores, wanted)
            return (loss, {"scores": scores}) if return_outputs else loss

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {"group_by_length": True} if tuned else {}
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=BATCH,
            num_train_epochs=PASSES,
            learning_rate=plan.rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=plan.seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            **settings,
        )
        kind: Any = Tuned if tuned else Trainer
        kind(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    arrays = {
        name.replace(".default.", "."): p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad
    }
    return Trained(np.diff(times).tolist(), _peak(), 0, times[0] - began, arrays)


def _peak() -> int:
    """Peak resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# Judging --------------------------------------------------------------------------------------------------------------
def _sentences(plan: Plan) -> list[Example]:
    """As many of each class, of the training text; other seeds, other sentences, and others for choosing settings."""
    rng = np.random.default_rng(plan.seed + (1000 if plan.part == "validation" else 0))
    movie = fleet.domains()["movie"].train
    order = [movie[i] for i in rng.permutation(len(movie))]
    chosen = [e for label in (0, 1) for e in [e for e in order if e.label == label][: plan.sentences // 2]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _judge(plan: Plan, arrays: dict[str, Array]) -> float:
    folder = fleet.bundle_of(SLM)
    bundle = bundles.read(folder)
    engine = open_engine(folder, bundle, variant="int8", threads=THREADS)
    slots = tuple(slot for slot in bundle.slots if slot.a in arrays)
    engine.set_adapter(Adapter(arrays, AdapterSpec(slots, RANK, ALPHA)))
    movie = fleet.domains()["movie"]
    texts = movie.test if plan.part == "test" else movie.validation
    some = [texts[i] for i in np.random.default_rng(plan.seed).permutation(len(texts))[:TESTS]]
    return accuracy(engine.logits([e.text for e in some]), [e.label or 0 for e in some])


def _rate(method: str) -> float:
    return RATES[int(method.split()[1])] if method.startswith("split") else TRAINER_RATE


# Reporting ------------------------------------------------------------------------------------------------------------
def _compared(rows: Sequence[dict[str, Any]], method: str, to: str) -> dict[str, dict[str, float]]:
    """A method against a baseline, seed by seed."""
    ours = {row["seed"]: row for row in rows if row["method"] == method}
    theirs = {row["seed"]: row for row in rows if row["method"] == to}
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return {
        "speedup_later_passes": spread([b["later_pass_seconds"] / a["later_pass_seconds"] for a, b in pairs]),
        "speedup_total": spread([b["total_seconds"] / a["total_seconds"] for a, b in pairs]),
        "rss_ratio": spread([a["peak_bytes"] / b["peak_bytes"] for a, b in pairs]),
        "accuracy_delta": spread([a["accuracy"] - b["accuracy"] for a, b in pairs]),
    }


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speed and memory against the Trainer as it comes, `tuned` against the tuned one; accuracy against the tuned one in both."""
    stock = _compared(rows, f"split {HEADLINE}", "trainer")
    tuned = _compared(rows, f"split {HEADLINE}", "trainer_tuned")
    return {
        **{name: value["mean"] for name, value in stock.items()},
        "accuracy_delta": tuned["accuracy_delta"]["mean"],
        "accuracy_delta_std": tuned["accuracy_delta"]["std"],
        "k": HEADLINE,
        "tuned": {name: value["mean"] for name, value in tuned.items()},
        "by_k": {str(k): {n: v["mean"] for n, v in _compared(rows, f"split {k}", "trainer_tuned").items()} for k in RATES},
    }


def _lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line a method and number of sentences: means over seeds."""
    lines = []
    for count, method in dict.fromkeys((r["sentences"], r["method"]) for r in rows):
        own = [r for r in rows if (r["sentences"], r["method"]) == (count, method)]
        first, later, total = (spread([r[n] for r in own]) for n in ("first_pass_seconds", "later_pass_seconds", "total_seconds"))
        score = spread([r["accuracy"] for r in own])
        lines.append(
            [
                method.replace("split 30", "split all"),
                str(count),
                f"{own[0]['rate']:g}",
                f"{first['mean']:.1f}",
                f"{later['mean']:.1f} ± {later['std']:.1f}",
                f"{total['mean']:.0f}",
                f"{statistics.fmean(r['peak_bytes'] for r in own) / 1e6:.0f}",
                f"{statistics.fmean(r['cache_bytes'] for r in own) / 1e6:.1f}",
                f"{score['mean']:.3f} ± {score['std']:.3f}",
            ]
        )
    return lines


HEADS = ("method", "sentences", "rate", "first pass, s", "later, s", f"{PASSES} passes, s", "peak MB", "cache MB", "accuracy")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as the docs show it."""
    lines = [" | ".join(HEADS), " | ".join(["---"] * len(HEADS)), *(" | ".join(line) for line in _lines(rows))]
    return "\n".join(f"| {line} |" for line in lines)


def ratios(summary: dict[str, Any]) -> str:
    """The headline as the docs say it."""

    def said(found: dict[str, float]) -> str:
        later, total = found["speedup_later_passes"], found["speedup_total"]
        rss = found["rss_ratio"]
        return f"later passes {later:.1f} times as fast, all five together {total:.1f} times, peak memory {rss:.2f}"

    return f"k = {summary['k']}: against the Trainer {said(summary)}; against the tuned one {said(summary['tuned'])}."


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{SLM}, movie sentences, batch {BATCH}, rank {RANK}, {THREADS} threads; mean over seeds")
    for head in HEADS:
        table.add_column(head, justify="left" if head == "method" else "right")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def _notes(summary: dict[str, Any]) -> list[str]:
    lines = []
    for baseline, found in (("the Trainer", summary), ("the tuned Trainer", summary["tuned"])):
        targets = (
            ("later passes at least 4 times as fast", found["speedup_later_passes"], found["speedup_later_passes"] >= 4),
            ("all passes together at least 2.5 times as fast", found["speedup_total"], found["speedup_total"] >= 2.5),
            ("peak memory at most 0.4", found["rss_ratio"], found["rss_ratio"] <= 0.4),
            ("accuracy within 1 point of full depth", 100 * found["accuracy_delta"], found["accuracy_delta"] >= -0.01),
        )
        lines += [f"{'met   ' if met else 'MISSED'} {name} ({baseline}): {value:.3g}" for name, value, met in targets]
    bundle = bundles.read(fleet.bundle_of(SLM))
    for k in RATES:
        c = depth.cost(bundle, "int8", k, 8 * 50)
        lines.append(f"arithmetic, k = {k}: {c.memory / 1e6:.0f} MB, {c.operations / 1e6:.0f} M operations a token and pass")
    return [*lines, json.dumps(summary)]
