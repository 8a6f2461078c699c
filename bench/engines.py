"""What quantization costs and gains: ONNX int8 and GGUF q8_0 against transformers fp32, on test sentences, in one run.

Quality: movie test sentences in three draws, without an adapter and with one that was trained in torch on 64 training
sentences; the reference is always transformers fp32 (with PEFT for the adapter). Speed: rounds in which every engine scores
the same 150 sentences once, one after the other, so that a noisy machine hurts all of them; ratios are within a round.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench import fleet
from bench.report import Result, spread
from edge_export.probe import Agreement, compare
from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter, AdapterSpec
from edge_sdk.engines import Engine, open_engine
from edge_sdk.tasks import Example
from edge_sdk.tokens import by_length
from edge_sdk.training import base
from edge_sdk.training.batches import Job, Label, Row, Source, Training
from edge_sdk.training.learner import Learner, readout

ROOT = Path(__file__).parent.parent
THREADS = 2
BATCH = 16
DRAWS, PER_DRAW, TIMED = 3, 200, 150
VARIANTS = {"smollm2": ("int8", "fp32", "q8_0"), "minilm": ("int8", "fp32")}
Score = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class Model:
    """One SLM with what its engines are compared on."""

    slm: str
    folder: Path
    bundle: bundles.Bundle
    adapter: Adapter
    tests: Sequence[Example]


def run(full: bool) -> Result:
    """`full` takes more rounds of timing."""
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for slm in VARIANTS:
        console.print(f"{slm}: exporting where that is not done yet, and training the adapter")
        model = _model(slm)
        console.print(f"{slm}: measuring agreement")
        quality = _quality(model)
        console.print(f"{slm}: measuring speed")
        speeds = _speeds(model, 9 if full else 5)
        rows += _rows(model, quality, speeds)
        del model
        gc.collect()
    console.print("measuring swaps, imports and the size of an install")
    summary = _summary(rows) | _swaps() | _device()
    return Result("engines", rows, summary, _table(rows), _notes(summary))


# The models -----------------------------------------------------------------------------------------------------------
def _model(slm: str) -> Model:
    folder = fleet.bundle_of(slm, VARIANTS[slm])
    bundle = bundles.read(folder)
    movie = fleet.domains()["movie"]
    rng = np.random.default_rng(0)
    tests = [movie.test[i] for i in rng.permutation(len(movie.test))[: DRAWS * PER_DRAW]]
    return Model(slm, folder, bundle, _trained(folder, bundle, _balanced(movie.train, 64, rng)), tests)


def _balanced(examples: Sequence[Example], count: int, rng: np.random.Generator) -> list[Example]:
    """As many of each class, in no order."""
    chosen = [e for label in (0, 1) for e in _some([e for e in examples if e.label == label], count // 2, rng)]
    return _some(chosen, count, rng)


def _some(examples: Sequence[Example], count: int, rng: np.random.Generator) -> list[Example]:
    return [examples[i] for i in rng.permutation(len(examples))[:count]]


def _trained(folder: Path, bundle: bundles.Bundle, examples: Sequence[Example]) -> Adapter:
    """LoRA of rank 8, 24 steps of 8 sentences: an adapter that changes the model a lot."""
    engine = open_engine(folder, bundle, variant="fp32", threads=THREADS)
    spec = AdapterSpec(bundle.slots, 8, 16.0)
    learner = Learner.whole(bundle, engine.head, engine.encoder, spec, THREADS)
    rows = [
        Row(ids, Label(e.label or 0)) for ids, e in zip(engine.encoder.prompts([e.text for e in examples]), examples, strict=True)
    ]
    arrays, _ = learner.fit(Job(spec.start(0), [Source(rows, 8)], Training(steps=24, batch_size=8, learning_rate=1e-3), 0))
    return Adapter(arrays, spec)


def _transformers(model: Model, adapted: bool) -> Score:
    """torch fp32, the trunk and the label rows only: the fastest honest way to score with transformers."""
    engine = open_engine(model.folder, model.bundle, variant="fp32", threads=THREADS)
    if adapted:
        learner = Learner.whole(model.bundle, engine.head, engine.encoder, model.adapter.spec, THREADS)
        learner.set(model.adapter.arrays)
        net: Any = learner.model
    else:
        net = base.load(model.bundle)
    rows, scale, encoder, kind = torch.from_numpy(engine.head.rows), engine.head.scale, engine.encoder, model.bundle.kind
    del engine

    def score(texts: Sequence[str]) -> NDArray[np.float32]:
        sequences = encoder.prompts(texts)
        out = np.zeros((len(sequences), len(rows)), np.float32)
        with torch.inference_mode():
            for batch in by_length(sequences, BATCH):
                out[batch] = (scale * readout(net, kind, [sequences[i] for i in batch]) @ rows.T).numpy()
        return out

    return score


# Quality --------------------------------------------------------------------------------------------------------------
def _quality(model: Model) -> dict[str, dict[str, list[Agreement]]]:
    """variant -> `base` or `adapted` -> one agreement for each draw, against transformers."""
    texts = [e.text for e in model.tests]
    found: dict[str, dict[str, list[Agreement]]] = {name: {} for name in VARIANTS[model.slm]}
    for state, adapter in (("base", None), ("adapted", model.adapter)):
        torch.set_float32_matmul_precision("highest")
        score = _transformers(model, adapter is not None)
        torch.set_float32_matmul_precision("highest")  # loading a learner allows less
        reference = score(texts)
        for name in VARIANTS[model.slm]:
            engine = open_engine(model.folder, model.bundle, variant=name, threads=THREADS)
            engine.set_adapter(adapter)
            found[name][state] = _by_draw(reference, engine.logits(texts), model.tests)
    return found


def _by_draw(reference: NDArray[np.float32], scores: NDArray[np.float32], tests: Sequence[Example]) -> list[Agreement]:
    draws = [slice(i * PER_DRAW, (i + 1) * PER_DRAW) for i in range(DRAWS)]
    return [compare(reference[d], scores[d], [e.label for e in tests[d]]) for d in draws]


# Speed ----------------------------------------------------------------------------------------------------------------
def _speeds(model: Model, rounds: int) -> dict[str, list[float]]:
    """Texts a second of everything that scores, round by round."""
    texts = [e.text for e in model.tests[:TIMED]]
    torch_score = _transformers(model, False)
    engines: dict[str, Engine] = {
        name: open_engine(model.folder, model.bundle, variant=name, threads=THREADS) for name in VARIANTS[model.slm]
    }
    contenders: dict[str, Score] = {"transformers fp32": torch_score, "transformers fp32, oneDNN": torch_score}
    contenders |= {name: engine.logits for name, engine in engines.items()}
    if "q8_0" in engines:
        contenders |= _llama_cpp_python(model, engines["q8_0"])
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, score in contenders.items():
            torch.set_float32_matmul_precision("medium" if name.endswith("oneDNN") else "highest")
            started = time.perf_counter()
            score(texts)
            if number:  # the first round warms up
                speeds[name].append(len(texts) / (time.perf_counter() - started))
    return speeds


def _llama_cpp_python(model: Model, engine: Engine) -> dict[str, Score]:
    """llama-cpp-python's own ways to score, on the same file and the same token ids."""
    import llama_cpp

    path, words = model.folder / model.bundle.variant("q8_0").file, [ids[0] for ids in engine.encoder.words()]
    lib: Any = llama_cpp
    options = {"n_ctx": 512, "n_threads": THREADS, "n_threads_batch": THREADS, "verbose": False}
    completing = lib.Llama(str(path), logits_all=True, **options)
    evaluating = lib.Llama(str(path), **options)

    def complete(texts: Sequence[str]) -> NDArray[np.float32]:
        out = []
        for ids in engine.encoder.prompts(texts):
            answer = completing.create_completion(ids, max_tokens=1, temperature=0, logprobs=5)
            out.append(list(answer["choices"][0]["logprobs"]["top_logprobs"][0].values())[:2])
        return np.asarray(out, np.float32)

    def evaluate(texts: Sequence[str]) -> NDArray[np.float32]:
        out = []
        for ids in engine.encoder.prompts(texts):
            evaluating.reset()
            evaluating.eval(ids)
            logits = lib.llama_get_logits_ith(evaluating._ctx.ctx, -1)
            out.append([logits[i] for i in words])
        return np.asarray(out, np.float32)

    return {"llama-cpp-python create_completion": complete, "llama-cpp-python eval": evaluate}


# Devices --------------------------------------------------------------------------------------------------------------
def _swaps() -> dict[str, Any]:
    """Median milliseconds from one loaded adapter to another, and whether the base comes back bit for bit."""
    found: dict[str, float] = {}
    restored = True
    for slm, variants in VARIANTS.items():
        folder = fleet.bundle_of(slm, variants)
        bundle = bundles.read(folder)
        spec = AdapterSpec(bundle.slots, 8, 16.0)
        adapters = [Adapter({n: a + np.float32(0.01) for n, a in spec.start(seed).items()}, spec) for seed in (1, 2)]
        for name in (v for v in variants if v != "fp32"):
            engine = open_engine(folder, bundle, variant=name, threads=THREADS)
            before = engine.logits(["it was a day"])
            for adapter in adapters:
                engine.set_adapter(adapter)
                engine.logits(["it was a day"])
            times = []
            for turn in range(200):
                started = time.perf_counter()
                engine.set_adapter(adapters[turn % 2])
                times.append(1e3 * (time.perf_counter() - started))
            found[f"{slm} {name}"] = statistics.median(times)
            engine.set_adapter(None)
            restored &= bool((engine.logits(["it was a day"]) == before).all())
    return {"swap_ms": max(found.values()), "swap_ms_by_variant": found, "base_restored": restored}


_IMPORT = "import numpy, time; t = time.perf_counter(); import edge_sdk; print(time.perf_counter() - t)"
_AGENT = """
import sys
from pathlib import Path
import edge_sdk.agent, edge_sdk.transport
from edge_sdk import bundle as bundles
from edge_sdk.engines import open_engine
folder = Path(sys.argv[1])
engine = open_engine(folder, bundles.read(folder))
engine.score(["it was a day like any other, and the film was long"] * 64)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)  # ru_maxrss has the parent's
"""


def _device() -> dict[str, Any]:
    """What a device pays before it does anything: disk, import time, memory."""
    imports = [float(_python(sys.executable, _IMPORT)) for _ in range(5)]
    minilm = fleet.bundle_of("minilm", VARIANTS["minilm"])
    with tempfile.TemporaryDirectory() as folder:
        small = _installed(Path(folder) / "small", ["-r", str(ROOT / "requirements-device.txt")], ["--no-compile", "--no-deps"])
        rss = float(_python(str(Path(folder) / "small" / "bin" / "python"), _AGENT, str(minilm)))
        plain = _installed(Path(folder) / "plain", [], [])
    return {
        "install_mb": small,
        "install_mb_with_hub_client_and_bytecode": plain,
        "import_seconds": statistics.median(imports),
        "agent_rss_mb": rss,
    }


def _python(executable: str, code: str, *arguments: str) -> str:
    command = [executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tempfile.gettempdir()).stdout.strip()


def _installed(folder: Path, requirements: Sequence[str], options: Sequence[str]) -> float:
    """Megabytes of a new environment with the base install, pip and setuptools aside."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    before = _megabytes(folder)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    pip += ["--constraint", str(ROOT / "constraints.txt")]
    if requirements:
        subprocess.run([*pip, *requirements], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*pip, str(ROOT)], check=True, stderr=subprocess.DEVNULL)
    return _megabytes(folder) - before


def _megabytes(folder: Path) -> float:
    return sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink()) / 1e6


# Reporting ------------------------------------------------------------------------------------------------------------
def _rows(model: Model, quality: dict[str, dict[str, list[Agreement]]], speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    first = speeds["transformers fp32"]
    sizes = {v.name: model.bundle.files[v.file].size for v in model.bundle.variants}
    rows = []
    for name, values in speeds.items():
        row: dict[str, Any] = {
            "slm": model.slm,
            "engine": name,
            "texts_per_second": spread(values),
            "speedup": spread([v / f for v, f in zip(values, first, strict=True)]),
        }
        if name in sizes:
            row |= {"size": sizes[name], "size_ratio": sizes[name] / sizes["fp32"]}
        for state, agreements in quality.get(name, {}).items():
            row[state] = {
                "r": spread([a.r for a in agreements]),
                "kl": spread([a.kl for a in agreements]),
                "accuracy_delta": spread([a.accuracy_change or 0.0 for a in agreements]),
            }
        rows.append(row)
    return rows


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the targets; accuracies as fractions, speed as the median's mean ratio to transformers fp32."""
    by = {(row["slm"], row["engine"]): row for row in rows}
    int8, q8, mini = by["smollm2", "int8"], by["smollm2", "q8_0"], by["minilm", "int8"]

    def quality(row: dict[str, Any]) -> dict[str, float]:
        return {
            "r": row["base"]["r"]["mean"],
            "r_adapted": row["adapted"]["r"]["mean"],
            "accuracy_delta": row["base"]["accuracy_delta"]["mean"],
            "accuracy_delta_adapted": row["adapted"]["accuracy_delta"]["mean"],
        }

    def speed(row: dict[str, Any]) -> dict[str, float]:
        dnn = by[row["slm"], "transformers fp32, oneDNN"]["speedup"]["mean"]
        return {"speedup": row["speedup"]["mean"], "speedup_over_onednn": row["speedup"]["mean"] / dnn}

    others = {name: by["smollm2", f"llama-cpp-python {name}"]["speedup"]["mean"] for name in ("create_completion", "eval")}
    return {
        "onnx_int8": {**quality(int8), **speed(int8), "size_ratio": int8["size_ratio"]},
        "gguf_q8": {
            **quality(q8),
            "speedup_vs_llama_cpp_python": q8["speedup"]["mean"] / others["create_completion"],
            "speedup_vs_llama_cpp_python_eval": q8["speedup"]["mean"] / others["eval"],
        },
        "minilm_int8": {**quality(mini), **speed(mini), "size_ratio": mini["size_ratio"]},
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"scoring movie test sentences, {THREADS} threads of {os.cpu_count()} cores; accuracy in points")
    for heading in ("model", "engine", "texts/s", "x transformers", "size", "r", "r, adapted", "accuracy", "accuracy, adapted"):
        table.add_column(heading, justify="left" if heading in ("model", "engine") else "right")
    for row in rows:
        size = f"{row['size'] / 1e6:.0f} MB" if "size" in row else ""
        cells = [row["slm"], row["engine"], _pm(row["texts_per_second"], 0), _pm(row["speedup"], 2), size]
        for key, digits, scale in (("r", 4, 1), ("accuracy_delta", 1, 100)):
            for state in ("base", "adapted"):
                cells.append(_pm(row[state][key], digits, scale) if state in row else "")
        table.add_row(*cells)
    return table


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of README and docs: the rows that are engines of ours, and what they are compared with."""
    headings = "| model | engine | texts/s | x transformers | size | r | r, adapted | accuracy | accuracy, adapted |"
    lines = [headings, "| --- " * 9 + "|"]
    for row in rows:
        size = f"{row['size'] / 1e6:.0f} MB" if "size" in row else ""
        cells = [row["slm"], row["engine"], f"{row['texts_per_second']['mean']:.0f}", f"{row['speedup']['mean']:.1f}", size]
        for state in ("base", "adapted"):
            cells.append(f"{row[state]['r']['mean']:.4f}" if state in row else "")
        for state in ("base", "adapted"):
            cells.append(f"{100 * row[state]['accuracy_delta']['mean']:+.1f}" if state in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pm(value: dict[str, float], digits: int, scale: float = 1) -> str:
    return f"{scale * value['mean']:.{digits}f} ± {scale * value['std']:.{digits}f}"


def _notes(summary: dict[str, Any]) -> list[str]:
    int8, q8, mini = summary["onnx_int8"], summary["gguf_q8"], summary["minilm_int8"]
    plain = summary["install_mb_with_hub_client_and_bytecode"]
    targets = {
        "SmolLM2 int8 r >= 0.99": (int8["r"] >= 0.99, int8["r"]),
        "accuracy within 0.5 point": (abs(int8["accuracy_delta"]) <= 0.005, 100 * int8["accuracy_delta"]),
        "speed >= 2.0 (goal 3.0)": (int8["speedup"] >= 2, int8["speedup"]),
        "file <= 0.3": (int8["size_ratio"] <= 0.3, int8["size_ratio"]),
        "MiniLM int8 r >= 0.995": (mini["r"] >= 0.995, mini["r"]),
        "speed >= 2.5": (mini["speedup"] >= 2.5, mini["speedup"]),
        "GGUF q8_0 r >= 0.995": (q8["r"] >= 0.995, q8["r"]),
        "3 x create_completion": (q8["speedup_vs_llama_cpp_python"] >= 3, q8["speedup_vs_llama_cpp_python"]),
        "3 x eval loop": (q8["speedup_vs_llama_cpp_python_eval"] >= 3, q8["speedup_vs_llama_cpp_python_eval"]),
        "swap < 1 ms": (summary["swap_ms"] < 1, summary["swap_ms"]),
        "install <= 150 MB (requirements-device.txt)": (summary["install_mb"] <= 150, summary["install_mb"]),
        "install <= 150 MB (plain pip)": (plain <= 150, plain),
        "import <= 0.1 s": (summary["import_seconds"] <= 0.1, summary["import_seconds"]),
        "agent <= 150 MB": (summary["agent_rss_mb"] <= 150, summary["agent_rss_mb"]),
    }
    lines = [f"{'met   ' if met else 'MISSED'} {name}: {value:.4g}" for name, (met, value) in targets.items()]
    return [*lines, json.dumps(summary)]
