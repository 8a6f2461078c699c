"""The benches' own logic on a tiny model: every method runs, numbers become summaries as documented, and what is measured is
what server and devices do.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.table import Table

from bench import crosslm, fleet, lpfl, mutual, secure
from bench.report import Result, show, spread
from edge_sdk import bundle as bundles
from edge_sdk import masking, verbs, wire
from edge_sdk.adapters import Adapter, Array, Arrays, add
from edge_sdk.engines import Sampling, open_engine
from edge_sdk.judgments import Bytes
from edge_sdk.protocol import Judgment, Sample, Text, Train
from edge_sdk.softlabels import SoftLabels
from edge_sdk.tasks import Example, Private
from edge_sdk.training.batches import Job, Training
from edge_sdk.training.learner import Learner
from edge_server import coordinator, unmasking
from edge_server import settings as run_settings
from edge_server.coordinator import Decided, Enrolled, Published, State, Tuned, Written
from edge_server.llm import jobs
from edge_server.llm.jobs import Hello, LlmSettings, Texts, Write
from edge_server.llm.model import Llm
from edge_server.systems import crosslm as systems
from edge_server.systems.crosslm import CrossLm
from edge_server.systems.lpfl import LpFl
from tests import factories, strategies, tiny
from tests.server_helpers import MOODS, Simulator, mood, with_llm


@pytest.fixture(scope="module")
def lab(encoder_bundle: Path) -> fleet.Lab:
    run = LpFl(versions=2, training=Training(steps=2, batch_size=4), soft=SoftLabels(growth=4, batch_size=4))
    settings = run_settings.RunSettings(task=factories.ENCODER_TASK, lpfl=run)
    bundle = bundles.read(encoder_bundle)
    manifest = run_settings.manifest(settings, bundle)
    engine = open_engine(encoder_bundle, bundle, settings.task)
    learner = Learner.beside(engine, encoder_bundle, bundle, manifest.adapter, settings.task)
    return fleet.Lab(settings, manifest.adapter, bundle.parameters, engine, learner, encoder_bundle)


def some_devices() -> list[Private]:
    words = [(word, int(word in factories.GOOD)) for word in factories.GOOD + factories.BAD]
    examples = [Example(f"the film was {word}", label) for word, label in words]
    texts = tuple(f"a {word} day" for word, _ in words)
    truths = tuple(label for _, label in words)
    return [Private(tuple(examples[i::2]), texts, truths, tuple(examples[1 - i :: 2])) for i in (0, 1)]


@pytest.mark.parametrize("method", lpfl.METHODS)
def test_every_method_gives_one_accuracy_a_device(lab: fleet.Lab, method: str) -> None:
    """All six rows of the table can be made, as fractions."""
    settings = lab.settings.lpfl
    found = lpfl.accuracies(method, lab, some_devices(), settings)

    assert len(found) == 2
    assert all(0 <= value <= 1 for value in found)


def test_zero_shot_is_the_base_model(lab: fleet.Lab) -> None:
    """Version 0's adapter changes nothing, so zero-shot needs no training and no luck."""
    lab.engine.set_adapter(None)
    devices = some_devices()
    expected = []
    for device in devices:
        predicted = lab.engine.logits([e.text for e in device.held_out]).argmax(1)
        expected.append(sum(int(p) == e.label for p, e in zip(predicted, device.held_out, strict=True)) / len(predicted))

    assert lpfl.accuracies("zero_shot", lab, devices, lab.settings.lpfl) == pytest.approx(expected)


def test_methods_differ_only_where_the_table_says_so() -> None:
    """Baselines get LP-FL's versions and batch sizes, and its steps and dropout unless their own were better for them."""
    run = LpFl()
    made = {m: lpfl.settings_of(lpfl.Cell("minilm", "iid", 16, 3, m), run) for m in lpfl.METHODS}

    for method, settings in made.items():
        own = lpfl.SCALES["minilm"].changes.get(method, {})
        assert own.keys() <= {"steps", "learning_rate", "dropout"}
        assert settings.versions == run.versions
        assert settings.training == msgspec.structs.replace(run.training, **own)
        assert (settings.soft is not None) == (method in ("lpfl", "fp_fl"))
        assert settings.seed == 3
    assert "lpfl" not in lpfl.SCALES["minilm"].changes


@pytest.mark.parametrize(("method", "name"), [("lpfl", "grwoth"), ("local_only", "growth")])
def test_a_change_that_does_nothing_is_refused(method: str, name: str) -> None:
    """A misspelt setting in a grid, or one the method has no use for, is an error, not a silent default."""
    cell = lpfl.Cell("minilm", "iid", 16, 0, method, change=((name, 1.0),))
    with pytest.raises(ValueError, match=f"{method} has no setting {name}"):
        lpfl.settings_of(cell, LpFl())


def test_the_json_has_the_promised_shape(tmp_path: Path) -> None:
    """A result file names its bench and machine and keeps rows and summary as they are."""
    pytest.importorskip("optimum", reason="no exporter here, whose version the file names")
    out = tmp_path / "deep" / "out.json"
    show(Result("name", [{"a": 1}], {"m": spread([0.5, 0.7])}, Table()), out)

    content = json.loads(out.read_text())
    assert content.keys() == {"bench", "machine", "rows", "summary"}
    assert content["summary"]["m"]["mean"] == pytest.approx(0.6)
    assert content["summary"]["m"]["std"] == pytest.approx(0.02**0.5)
    assert {"cpu", "cores", "versions", "commit"} <= content["machine"].keys()


def test_targets_are_judged_within_a_seed() -> None:
    """A margin is the mean of differences between runs of the same seed, and a miss is called one."""
    rows = [
        {"slm": "minilm", "seed": seed, "method": method, "accuracy": accuracy + seed / 10}
        for seed in (0, 1)
        for method, accuracy in (("lpfl", 0.5), ("local_only", 0.46), ("fl_no_soft", 0.495), ("fp_fl", 0.5), ("centralized", 0.6))
    ]
    lines = lpfl._targets(rows, {"minilm": {"upload_bytes": 10, "upload_fraction": 0.1}})

    assert "local_only = +0.0400 ±0.0000" in lines[0]
    assert lines[0].endswith("kept")
    assert lines[1].endswith("MISSED")
    assert lines[2].endswith("kept")
    assert lines[3].endswith("MISSED")


# Mutual learning ------------------------------------------------------------------------------------------------------
@dataclass
class Counting:
    """The lab's learner, and every job it was given."""

    trainer: verbs.Fits
    jobs: list[Job] = field(default_factory=list)

    def fit(self, job: Job) -> tuple[dict[str, Array], float]:
        self.jobs.append(job)
        return self.trainer.fit(job)


def mutual_settings(**changes: Any) -> CrossLm:
    """Two sheets of eight texts; devices take other steps alone than with the feed."""
    own = {"alone": Training(steps=1, batch_size=2), "training": Training(steps=2, batch_size=3), "batch_size": 2, "seed": 5}
    made = with_llm(**{**own, **changes}).crosslm
    assert made is not None
    return made


def devices_of(lab: fleet.Lab) -> tuple[mutual.Devices, Counting]:
    trainer = Counting(lab.lora)
    return mutual.Devices(some_devices(), lab.spec, lab.engine, trainer), trainer


def sample(seq: int, text: str = "a great day", soft: tuple[float, ...] = (0.25, 0.75)) -> Sample:
    return Sample(seq, f"s{seq}", text, "positive", soft, 0.75, 0, "llm", "")


def honest(_: int, answer: Bytes) -> Bytes:
    """What a judge says who reads the simulator's texts: of eight, the fourth of each prompt is of the other class."""
    sure = [[255, 0] if MOODS[(prompt + (i == 3)) % 2] == MOODS[0] else [0, 255] for prompt in (0, 1) for i in range(4)]
    assert answer.shape == (len(sure), 2)
    return np.array(sure, np.uint8)


def run_versions(
    devices: mutual.Devices, settings: CrossLm, folder: Path, llm: Simulator | None = None, lie: mutual.Liar | None = honest
) -> list[mutual.Version]:
    compute: Any = llm or Simulator()
    start = devices.spec.start(settings.seed)

    async def collect() -> list[mutual.Version]:
        return [v async for v in mutual.versions(devices, start, settings, factories.ENCODER_TASK, compute, folder, None, lie)]

    return asyncio.run(collect())


def test_what_was_trained_is_not_trained_again(lab: fleet.Lab) -> None:
    """The same settings and feed give the same adapters without a step; another feed, seed or temperature is another training."""
    devices, trainer = devices_of(lab)
    settings, feed = mutual_settings(), (sample(1), sample(2, "a sad day", (0.875, 0.125)))
    start = lab.spec.start(5)
    alone, mixed = devices.train(start, settings), devices.train(start, settings, feed)
    assert len(trainer.jobs) == 4
    assert devices.train(start, settings) is alone
    assert devices.train(start, settings, list(feed)) is mixed
    assert devices.train(start, msgspec.structs.replace(settings, tuning=jobs.Tuning(steps=9), judges=9), feed) is mixed
    assert len(trainer.jobs) == 4

    others = [
        devices.train(start, settings, feed[:1]),
        devices.train(start, settings, (feed[0], sample(2, "a fine story", (0.875, 0.125)))),
        devices.train(start, msgspec.structs.replace(settings, seed=6), feed),
        devices.train(start, msgspec.structs.replace(settings, label_temperature=1.0), feed),
        devices.train(start, msgspec.structs.replace(settings, weight=0.5), feed),
        devices.train(start, msgspec.structs.replace(settings, training=settings.alone), feed),
    ]
    assert len(trainer.jobs) == 4 + 2 * len(others)
    ends = {b"".join(array.tobytes() for array in own[0].values()) for own in (alone, mixed, *others)}
    assert len(ends) == 2 + len(others)


def test_devices_of_the_bench_train_as_the_server_tells_devices(lab: fleet.Lab, tmp_path: Path) -> None:
    """For each version: the work that `crosslm.plan` hands out, done with a device's verbs, ends at the same arrays."""
    devices, _ = devices_of(lab)
    settings = mutual_settings()
    found = run_versions(devices, settings, tmp_path)
    start, state = lab.spec.start(5), coordinator.apply(State(), Published(0, "start", 0))
    state = coordinator.apply(state, Enrolled("0", "x"))
    for number, version in enumerate(found):
        work = systems.plan(settings, state, state.devices["0"], can_train=True)
        assert isinstance(work, Train)
        assert work.version == number
        for private, own in zip(devices.fleet, version.own, strict=True):
            feed = version.feed[: work.synthetic.until if work.synthetic else 0]
            learned = verbs.prepare(
                *(number, start, lab.spec, private, work.training, work.soft, work.seed, lab.engine, None, feed, work.synthetic)
            )
            assert strategies.same(add(start, learned.learned(*lab.lora.fit(learned.job)).delta), own)
        for event in (Written(number, "t", "d", 9, 8, "", {}, 0.0), Decided(number, "j", 6, 0.75), Tuned(number, "llm", 0.5)):
            state = coordinator.apply(state, event)


def test_a_run_without_a_network_is_a_run(lab: fleet.Lab, tmp_path: Path) -> None:
    """First what devices learn alone, then a version a sheet: its good texts join the feed, the LLM's adapter is a file."""
    devices, _ = devices_of(lab)
    settings, llm = mutual_settings(), Simulator()
    first, second, third = run_versions(devices, settings, tmp_path, llm)

    assert (first.own, first.feed, first.llm, first.acceptance, first.traffic) == (
        devices.train(lab.spec.start(5), settings),
        (),
        "",
        0.0,
        0,
    )
    assert [v.acceptance for v in (second, third)] == [0.75, 0.75]
    assert [[line.seq for line in v.feed] for v in (second, third)] == [list(range(1, 7)), list(range(1, 13))]
    assert third.feed[:6] == second.feed
    assert all(line.label == factories.ENCODER_TASK.labels[mood(line.text)] for line in third.feed)
    assert [line.version for line in third.feed] == [0] * 6 + [1] * 6
    assert Path(second.llm).is_file()
    assert Path(third.llm).is_file()
    assert second.llm != third.llm
    assert [type(job).__name__ for job in llm.jobs] == ["Write", "Write", "Tune", "Write", "Label", "Write", "Tune"]
    assert [job.adapter for job in llm.jobs if isinstance(job, jobs.Tune)] == ["", second.llm]


def test_traffic_is_what_goes_over_the_wire(lab: fleet.Lab, tmp_path: Path) -> None:
    """For 1,000 texts: the sheet, the largest judgment of it with its metrics, and the feed's new lines, compressed."""
    devices, _ = devices_of(lab)
    _, second, third = run_versions(devices, mutual_settings(), tmp_path)
    answer, sizes = np.zeros((8, 2), np.uint8), []
    for k, private in enumerate(devices.fleet):
        _, metrics = verbs.evaluate(devices.train(lab.spec.start(5), mutual_settings())[k], lab.spec, private, lab.engine)
        message = Judgment(str(k), 0, len(private.labelled), metrics, (0, 1))
        sizes.append(len(wire.pack_judgment(message, answer)))

    sheet = [Text(f"0-{'0' * 16}", line.text, 0) for line in second.feed]  # its six good texts
    feed = len(gzip.compress(wire.pack_lines(second.feed)))
    assert (max(sizes) + len(wire.pack_lines(sheet)) + feed) / 8 < second.traffic / 1000 < (max(sizes) + feed + 8 * 90) / 8
    assert abs(third.traffic - second.traffic) < 0.1 * second.traffic  # old lines do not travel again


def test_a_liar_changes_what_is_accepted(lab: fleet.Lab, tmp_path: Path) -> None:
    """Devices that turn every answer round have the LLM's bad texts accepted, and are told apart by their number."""
    asked: list[int] = []

    def inverted(k: int, answer: Bytes) -> Bytes:
        asked.append(k)
        return np.asarray(255 - honest(k, answer), np.uint8)

    devices, _ = devices_of(lab)
    found = run_versions(devices, mutual_settings(versions=1), tmp_path, lie=inverted)

    assert asked == [0, 1]
    assert found[1].acceptance == 0.25
    assert all(line.label != factories.ENCODER_TASK.labels[mood(line.text)] for line in found[1].feed)
    assert len(found[1].feed) == 2


def test_the_base_writes_as_many_sheets_as_a_run_has(tmp_path: Path) -> None:
    """Nobody judges and nobody tells it anything: every job is the base's, each sheet has its own draws and ids."""
    llm, settings = Simulator(), mutual_settings(versions=3)
    compute: Any = llm
    found = asyncio.run(mutual.sheets(settings, factories.ENCODER_TASK, compute, tmp_path, None))

    assert len(found) == len({text.id for text in found}) == len({text.text for text in found}) == 24
    assert [text.label for text in found] == [0, 0, 0, 0, 1, 1, 1, 1] * 3
    assert [job.adapter for job in llm.jobs if isinstance(job, Write)] == [""] * 3
    assert len({job.sampling.seed for job in llm.jobs if isinstance(job, Write)}) == len(llm.jobs) == 3


def test_what_the_base_writes_is_written_once(tmp_path: Path) -> None:
    """Kept on disk by model and job, so that it comes again without a model; what an adapter writes is never kept."""
    model = tiny.write(tmp_path / "model", "llama")
    settings = LlmSettings(model=str(model), layers=2, rank=2, pattern="{text} it was", words=("bad", "good"), threads=1)
    hello, llm = Hello(str(model), factories.ENCODER_TASK, settings), Llm(model, factories.ENCODER_TASK, settings)
    cache = tmp_path / "cache"
    cache.mkdir()
    job = Write("", ("the film was", "a"), (2, 1), Sampling(4, 1.0, 0.9, 3))
    first = asyncio.run(mutual.Here(llm, hello, cache).run(job))
    nothing: Any = None

    assert isinstance(first, Texts)
    assert [len(texts) for texts in first.texts] == [2, 1]
    assert asyncio.run(mutual.Here(nothing, hello, cache).run(job)) == first
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(AttributeError):  # another model, or another job: there is nothing to read
        asyncio.run(mutual.Here(nothing, Hello("another", factories.ENCODER_TASK, settings), cache).run(job))
    with pytest.raises(AttributeError):
        asyncio.run(mutual.Here(nothing, hello, cache).run(msgspec.structs.replace(job, counts=(1, 1))))
    out = str(tmp_path / "llm.safetensors")
    lessons = jobs.Lessons(good=(jobs.Good("a", "great day", 1.0),))
    asyncio.run(mutual.Here(llm, hello, cache).run(jobs.Tune("", out, lessons, jobs.Tuning(steps=1), 0)))
    asyncio.run(mutual.Here(llm, hello, cache).run(msgspec.structs.replace(job, adapter=out)))
    assert len(list(cache.iterdir())) == 1


def test_a_device_ends_with_the_better_of_its_versions(lab: fleet.Lab, tmp_path: Path) -> None:
    """On its own held-out text, from the first to the last version; where two do alike, the later one."""
    words = factories.GOOD + factories.BAD
    rng, start = np.random.default_rng(5), lab.spec.start(0)
    other = {**start, **{s.b: rng.normal(size=start[s.b].shape).astype(np.float32) for s in lab.spec.slots}}
    texts = [f"the {noun} was {word}" for noun in ("film", "phone", "day") for word in words]

    def said(adapter: Arrays) -> list[int]:
        lab.engine.set_adapter(Adapter(adapter, lab.spec))
        labels: list[int] = lab.engine.logits(texts).argmax(1).tolist()
        return labels

    def device(labels: Sequence[int]) -> Private:
        return Private((), (), (), tuple(Example(text, label) for text, label in zip(texts, labels, strict=True)))

    assert said(start) != said(other)
    again = {name: array.copy() for name, array in start.items()}
    mine = (start, other, again)  # of both devices; one is best served by the first and the last, the other by the middle one
    devices = mutual.Devices([device(said(start)), device(said(other))], lab.spec, lab.engine, lab.lora)
    kept: tuple[Arrays, ...] = (start, start)
    for adapter in mine[1:]:
        kept = devices.better(kept, (adapter, adapter))

    assert kept[0] is again
    assert kept[1] is other


# The table of mutual learning -----------------------------------------------------------------------------------------
GAINS = {
    "zero_shot": 0.0,
    "standalone": 0.0625,
    "datafree_kd": 0.125,
    "no_feedback": 0.1875,
    "no_contrast": 0.25,
    "crosslm": 0.25,
}


def about_llm(name: str, task: float, **more: float) -> dict[str, Any]:
    numbers = {"task": task, "task_balanced": task + 0.125, "foreign_perplexity": 16.0, "other_task_balanced": 0.625}
    return {"llm": name, **numbers, **more}


def bench_rows(labels: int = 16, seeds: tuple[int, ...] = (0, 1), **changes: float) -> list[dict[str, Any]]:
    """Every second seed is 1/4 better in everything, so that differences within a seed have no spread; two versions each."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        shift = 0.25 * (seed % 2)
        own = [{"method": m, "accuracy": 0.5 + gain + shift} for m, gain in {**GAINS, **changes}.items()]
        own[4]["acceptance"] = [0.125, 0.125]
        own[5] |= {"traffic": 500.0 + seed, "panel": [0.25 + shift, 0.5, 0.375]}
        own += [
            about_llm("before", 0.25 + shift),
            about_llm("version 1", 0.375 + shift, acceptance=0.5, feed=8),
            about_llm("version 2", 0.5 + shift, acceptance=0.75, feed=16, foreign_perplexity=16.5),
            about_llm("upper_bound", 0.625 + shift),
        ]
        rows += [{"slm": "minilm", "labels": labels, "seed": seed, **row} for row in own]
    return rows


def test_a_summary_has_means_over_seeds() -> None:
    """Methods by labels, the LLM before, after its last version and at best, and the largest traffic."""
    rows = [*bench_rows(), *bench_rows(32, (2,), crosslm=0.375)]
    found = crosslm.summary(rows)
    std = 0.25 / 2**0.5

    assert found["slm"].keys() == GAINS.keys()  # methods nobody measured are left out
    assert found["slm"]["crosslm"] == pytest.approx({"mean": 0.875, "std": std})
    assert found["slm"]["zero_shot"] == pytest.approx({"mean": 0.625, "std": std})
    assert found["slm_32_labels"]["crosslm"] == {"mean": 0.875, "std": 0.0}
    assert {name: value["mean"] for name, value in found["llm"].items()} == {
        "task_before": 0.375,
        "task_before_balanced": 0.5,
        "task_after": 0.625,
        "task_after_balanced": 0.75,
        "task_upper_bound": 0.75,
        "foreign_perplexity_ratio": 1.03125,
        "other_task_before": 0.625,
        "other_task_after": 0.625,
        "acceptance_first": 0.5,
        "acceptance_last": 0.75,
    }
    assert found["llm"]["task_after"]["std"] == pytest.approx(std)
    assert found["llm"]["foreign_perplexity_ratio"]["std"] == 0.0
    assert found["bytes_per_device_version"] == 502.0
    assert crosslm.summary(bench_rows())["slm_32_labels"] == {}
    judged = found["acceptance_by_judges_that_never_learn"]
    assert judged == {"crosslm": {"first": pytest.approx({"mean": 0.375, "std": std}), "last": {"mean": 0.375, "std": 0.0}}}
    assert found["slm_smollm2"] == {}


def test_a_summary_does_not_mix_slms() -> None:
    """Another SLM with as many labels has numbers of its own."""
    other = [{**row, "slm": "smollm2"} for row in bench_rows(16, (0,), crosslm=0.375) if "method" in row]
    found = crosslm.summary([*bench_rows(), *other])

    assert found["slm"] == crosslm.summary(bench_rows())["slm"]
    assert found["slm_smollm2"]["crosslm"] == {"mean": 0.875, "std": 0.0}
    assert found["llm"] == crosslm.summary(bench_rows())["llm"]


def test_foreign_text_of_the_test_was_never_chosen_by() -> None:
    """What the leash was chosen on and what it is reported on are different texts."""
    test, validation = crosslm.foreign("test"), crosslm.foreign("validation")

    assert not set(test) & set(validation)
    assert len(test) == len(validation) == 25
    assert all(100 < len(text) <= 400 for text in (*test, *validation))


def test_a_perplexity_ratio_is_one_of_a_seed() -> None:
    """Twice the perplexity in one seed and half of it in the other is a mean ratio of 1.25, not of the means."""
    rows = bench_rows()
    for row in rows:
        if row.get("llm") in ("before", "version 2"):
            row["foreign_perplexity"] = {(0, "before"): 8.0, (0, "version 2"): 16.0, (1, "before"): 40.0, (1, "version 2"): 20.0}[
                row["seed"], row["llm"]
            ]

    assert crosslm.summary(rows)["llm"]["foreign_perplexity_ratio"]["mean"] == 1.25


def test_the_markdown_of_a_table() -> None:
    """A line for each SLM and number of labels, in the order measured, a column for each method, empty where it was not."""
    table = crosslm.markdown([*bench_rows(), *bench_rows(32, (2,), crosslm=0.375)]).splitlines()

    assert table == [
        "| SLM | labels | zero shot | standalone | datafree kd | no feedback | no contrast | crosslm | unchosen | lpfl "
        "| crosslm plus lpfl |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| MiniLM | 16 | 0.625 | 0.688 | 0.750 | 0.812 | 0.875 | 0.875 |  |  |  |",
        "| MiniLM | 32 | 0.500 | 0.562 | 0.625 | 0.688 | 0.750 | 0.875 |  |  |  |",
    ]


def test_targets_of_mutual_learning_are_kept_or_missed_by_name() -> None:
    """Differences are within a seed, and a difference of nothing keeps a target of nothing."""
    lines = crosslm._targets(bench_rows())

    assert [line.split(" = ")[0] for line in lines] == [
        *(f"MiniLM, 16 labels: crosslm - {base}" for base in ("standalone", "datafree_kd", "no_feedback", "no_contrast")),
        "LLM's task accuracy, after - before (target >= +0.10)",
        "after / upper bound (target >= 0.90)",
        "acceptance, last - first (target > 0)",
        "perplexity on foreign text, x (target <= 1.01)",
        "bytes of 1,000 texts (target <= 300,000)",
        "acceptance by judges that never learn, crosslm: 0.375 to 0.375",
        "the LLM's gain with balanced thresholds, which take calibration out",
        "the LLM on a task nobody trained (movie or product, balanced), after - before",
    ]
    assert lines[0] == "MiniLM, 16 labels: crosslm - standalone = +0.1875 ±0.0000, target >= +0.058: kept"
    assert lines[3] == "MiniLM, 16 labels: crosslm - no_contrast = +0.0000 ±0.0000, target >= +0.000: kept"
    assert [line.rsplit(": ", 1)[1] for line in lines[:9]] == [*["kept"] * 5, "MISSED", "kept", "MISSED", "kept"]
    assert lines[5] == "after / upper bound (target >= 0.90) = 0.8333: MISSED"
    assert lines[7] == "perplexity on foreign text, x (target <= 1.01) = 1.031: MISSED"
    assert [line.rsplit(" = ", 1)[1] for line in lines[10:]] == ["+0.2500", "+0.0000"]


def test_targets_that_are_missed() -> None:
    """A margin that is too small, and a difference below nothing; what was not measured with 32 labels is not judged there."""
    few = [row for row in bench_rows(32, (2,), standalone=0.2) if row.get("method") not in ("no_feedback", "no_contrast")]
    rows = bench_rows(datafree_kd=0.24, no_feedback=0.3, no_contrast=0.25)
    for row in rows:
        if (row["seed"], row.get("method")) == (1, "no_contrast"):
            row["accuracy"] -= 0.125
    lines = crosslm._targets([*rows, *few])

    assert [line.split(", target")[0] for line in lines[:6]] == [
        "MiniLM, 16 labels: crosslm - standalone = +0.1875 ±0.0000",
        "MiniLM, 16 labels: crosslm - datafree_kd = +0.0100 ±0.0000",
        "MiniLM, 16 labels: crosslm - no_feedback = -0.0500 ±0.0000",
        "MiniLM, 16 labels: crosslm - no_contrast = +0.0625 ±0.0884",
        "MiniLM, 32 labels: crosslm - standalone = +0.0500 ±0.0000",
        "MiniLM, 32 labels: crosslm - datafree_kd = +0.1250 ±0.0000",
    ]
    assert [line.endswith("kept") for line in lines[:6]] == [True, False, False, True, False, True]


# Secure averaging -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("devices", [4, 5, 7])
def test_a_secure_mean_of_the_bench_is_the_plain_one(devices: int) -> None:
    """With one device dropped, no element is off by more than is promised, and that is less than 1e-5."""
    assert 0 < secure.error(factories.SPEC, devices) <= secure.terms_of(devices, 40).error < 1e-5


def test_a_cohort_of_the_bench_is_what_server_and_devices_do() -> None:
    """The last two never send what they masked: the sum is the weighted mean of the rest, and costs what its messages weigh."""
    rng = np.random.default_rng(3)
    values, weights = [rng.normal(0, 1, 6).astype(np.float32) for _ in range(7)], [1, 60, 7, 11, 13, 2, 3]
    ended = secure.run_cohort(secure.terms_of(7, 6), values, weights, 2, seed=4)
    mean, weight = unmasking.unmask(ended.cohort, ended.vectors)

    assert (ended.cohort.phase, len(ended.vectors), weight) == ("done", 5, 92)
    assert list(ended.cohort.uploads) == [f"{i:032x}" for i in range(5)]
    assert ended.cohort.adverts.keys() == ended.cohort.shares.keys() == {f"{i:032x}" for i in range(7)}
    np.testing.assert_allclose(mean, np.average(values[:5], axis=0, weights=weights[:5]), atol=1e-6, rtol=0)
    messages = [*ended.cohort.adverts.values(), *ended.cohort.shares.values(), *ended.cohort.reveals.values()]
    assert ended.sent == sum(len(wire.encode(message)) for message in messages) // 7
    for value, own, vector in zip(values, weights, ended.vectors, strict=False):
        assert not (masking.encode(value, own, ended.cohort.terms) == vector).any()


def test_too_many_dropouts_end_the_bench() -> None:
    """A cohort of four with two missing is none, and no row is made of it."""
    values = [np.zeros(6, np.float32)] * 4
    with pytest.raises(RuntimeError, match="only 2 devices answered in the phase `upload`"):
        secure.run_cohort(secure.terms_of(4, 6), values, [1] * 4, 2, seed=0)


def test_a_row_of_secure_averaging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sums start from the same updates, agree, and the ratio is that of the two times."""
    monkeypatch.setattr(secure, "SPEC", factories.SPEC)
    row = secure.measure(4, 1, repeat=1)

    assert (row["devices"], row["dropped"]) == (4, 1)
    assert row["ratio"] == row["secure_seconds"] / row["plain_seconds"]
    assert 0 < row["phases_seconds"] < row["secure_seconds"]
    assert 0 < row["error"] <= 1e-5
    assert row["protocol_bytes"] > 4 * (44 + 44)
