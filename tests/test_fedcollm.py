"""FedCoLLM as a system: what devices are asked, what a version is made of, and that nothing is lost where distilling fails."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map
from safetensors.numpy import load_file, save_file

from edge_sdk import wire
from edge_sdk.adapters import Array, Arrays, read_peft
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.protocol import Evaluate, Finished, Train, Update, Wait
from edge_sdk.softlabels import SoftLabels
from edge_sdk.tasks import Example
from edge_sdk.training.batches import Training
from edge_server import cli
from edge_server import ledger as ledgers
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution, fedbuff
from edge_server.compute import JobFailed
from edge_server.coordinator import Buffered, Device, Published, State
from edge_server.distiller import Distiller
from edge_server.ledger import Ledger
from edge_server.llm.jobs import Distil, Distilled, Job, LlmSettings, Mutual, Outcome, Perplexity
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.storage import Blobs
from edge_server.systems import fedcollm, lpfl
from edge_server.systems.fedcollm import FedCoLlm
from edge_server.systems.lpfl import LpFl
from tests import factories, strategies
from tests import server_helpers as helpers
from tests.server_helpers import AUXILIARY, Hang, Simulator, delta, distilled, take, upload, with_auxiliary
from tests.test_ledger import adapter, equal, folder, learn_and_average, learning, replayed
from tests.test_settings import TASK, Lines, toml

# The system -----------------------------------------------------------------------------------------------------------
EVERY = FedCoLlm("own.jsonl", LpFl(versions=4, buffer_size=2, wait_seconds=7.0, training=Training(steps=3), seed=40))
devices = st.builds(Device, st.just("x"), trained=st.integers(-1, 6), evaluated=st.integers(-1, 6))


def at(version: int, *known: Device, buffered: int = 0) -> State:
    buffer = tuple(Buffered(f"b{i}", f"d{i}", 1, 0) for i in range(buffered))
    adapters = tuple(f"a{v}" for v in range(version + 1))
    return State(version, adapters, buffer, Map({f"d{i}": device for i, device in enumerate(known)}))


def test_devices_train_on_labels_alone() -> None:
    """The run's steps from the newest adapter, and no soft labels, although a table of a file turns them on by default."""
    assert EVERY.averaging.soft is not None
    work = fedcollm.plan(EVERY, at(2), Device("x", trained=1, evaluated=2), can_train=True)

    assert work == Train(2, "a2", Training(steps=3), None, 40 + 1 + 2)
    assert FedCoLlm("own.jsonl").averaging.soft is None


@strategies.fuzzing
@given(devices, st.integers(0, 5), st.booleans(), st.integers(0, 3), st.integers(0, 5))
def test_devices_do_what_they_do_without_an_llm(device: Device, version: int, can_train: bool, every: int, waiting: int) -> None:
    """What is asked, what is due and when it is over are LP-FL's without soft labels: distilling is the server's affair."""
    settings = msgspec.structs.replace(EVERY, averaging=msgspec.structs.replace(EVERY.averaging, evaluate_every=every))
    plain, state = msgspec.structs.replace(settings.averaging, soft=None), at(version, device, buffered=waiting)

    assert fedcollm.plan(settings, state, device, can_train) == lpfl.plan(plain, state, device, can_train)
    assert fedcollm.averaged(settings, state, 0.0) == lpfl.averaged(plain, state, 0.0)
    assert fedcollm.finished(settings, state) == lpfl.finished(plain, state)


def test_a_version_is_due_with_a_full_buffer_until_the_last() -> None:
    """The two oldest updates, no fewer, and none once all versions are made."""
    assert [len(fedcollm.averaged(EVERY, at(1, buffered=count), 0.0)) for count in range(4)] == [0, 0, 2, 2]
    assert fedcollm.averaged(EVERY, at(4, buffered=2), 0.0) == ()


def test_it_is_over_once_everybody_has_measured_the_last_version() -> None:
    """A device measures, and is told to stop; the run waits for the slower one."""
    done, slow = Device("x", trained=3, evaluated=4), Device("x", trained=3, evaluated=3)

    assert fedcollm.plan(EVERY, at(4), slow, can_train=True) == Evaluate(4, "a4")
    assert fedcollm.plan(EVERY, at(4), done, can_train=True) == Finished(4, "a4")
    assert [fedcollm.finished(EVERY, at(4, done, other)) for other in (slow, done)] == [False, True]


def test_it_starts_with_an_adapter_that_changes_nothing() -> None:
    """Drawn from the seed of the averaging, the only one there is."""
    assert equal(fedcollm.start(EVERY, factories.SPEC), factories.SPEC.start(40))


def test_settings_that_cannot_work_are_refused() -> None:
    """No texts of its own, or an LLM behind an address, which nobody can train."""
    with pytest.raises(SettingsError, match=r"fedcollm\.auxiliary names the file"):
        FedCoLlm("")
    with pytest.raises(SettingsError, match=r"fedcollm\.llm\.endpoint: .* leave it empty"):
        FedCoLlm("own.jsonl", llm=LlmSettings(endpoint="http://127.0.0.1:8000/v1"))


# Files ----------------------------------------------------------------------------------------------------------------
FEDCOLLM: dict[str, Lines] = {"": {"system": '"fedcollm"'}, "task": TASK, "fedcollm": {"auxiliary": '"own.jsonl"'}}


def test_the_servers_texts_are_all_a_file_needs(tmp_path: Path) -> None:
    """Everything else has a default; devices are told the system, and nothing of the server's texts."""
    loaded = run_settings.load(toml(tmp_path, FEDCOLLM))
    made = run_settings.manifest(loaded, factories.bundle())

    assert (loaded.system, loaded.fedcollm, made.system) == ("fedcollm", FedCoLlm("own.jsonl"), "fedcollm")
    assert loaded.averaged == LpFl(soft=None)
    assert b"own.jsonl" not in wire.encode(made)


def test_every_table_reaches_its_settings(tmp_path: Path) -> None:
    """Values land where the file puts them; soft labels of `averaging` are left aside, and a table [lpfl] counts for nothing."""
    tables: dict[str, Lines] = {
        **FEDCOLLM,
        "fedcollm.averaging": {"versions": "6", "average": '"products"'},
        "fedcollm.averaging.training": {"steps": "4"},
        "fedcollm.averaging.soft": {"growth": "9"},
        "fedcollm.mutual": {"passes": "2", "batch_size": "4", "weight": "0.5", "slm_learning_rate": "1e-3"},
        "fedcollm.llm": {"model": '"here"', "layers": "3"},
        "lpfl": {"versions": "2"},
    }
    loaded = run_settings.load(toml(tmp_path, tables))
    averaging = LpFl(versions=6, average="products", training=Training(steps=4), soft=SoftLabels(growth=9))

    mutual = Mutual(passes=2, batch_size=4, weight=0.5, slm_learning_rate=1e-3)
    assert loaded.fedcollm == FedCoLlm("own.jsonl", averaging, mutual, LlmSettings("here", layers=3))
    assert loaded.averaged == msgspec.structs.replace(averaging, soft=None)
    assert RunSettings(loaded.task, fedcollm=loaded.fedcollm, lpfl=loaded.lpfl).averaged == loaded.lpfl  # its table waits


@pytest.mark.parametrize("section", ["", ".averaging", ".averaging.training", ".mutual", ".llm"])
def test_an_unknown_key_is_named(tmp_path: Path, section: str) -> None:
    """As everywhere in the file."""
    name = f"fedcollm{section}"
    with pytest.raises(SettingsError, match=r"run\.toml: .*`colour`"):
        run_settings.load(toml(tmp_path, {**FEDCOLLM, name: {**FEDCOLLM.get(name, {}), "colour": "1"}}))


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("fedcollm", "auxiliary", '""', r"fedcollm\.auxiliary names the file"),
        ("fedcollm", "auxiliary", "1", r"\$\.fedcollm\.auxiliary"),
        ("fedcollm.averaging", "versions", "0", "versions"),
        ("fedcollm.mutual", "passes", "0", r"mutual\.passes"),
        ("fedcollm.mutual", "weight", "-1", "weight"),
        ("fedcollm.mutual", "weight", "inf", "weight"),
        ("fedcollm.mutual", "llm_learning_rate", "0", "llm_learning_rate"),
        ("fedcollm.llm", "tries", "0", r"llm\.tries"),
        ("fedcollm.llm", "endpoint", '"http://127.0.0.1:1/v1"', r"fedcollm\.llm\.endpoint"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, section: str, key: str, value: str, said: str) -> None:
    """Before a server starts, with file and setting."""
    with pytest.raises(SettingsError, match=rf"run\.toml: .*{said}"):
        run_settings.load(toml(tmp_path, {**FEDCOLLM, section: {**FEDCOLLM.get(section, {}), key: value}}))


def test_a_file_without_the_table_or_its_texts_is_refused(tmp_path: Path) -> None:
    """What is missing is said by its name."""
    with pytest.raises(SettingsError, match=r"run\.toml: .*needs a table \[fedcollm\] with at least `auxiliary`"):
        run_settings.load(toml(tmp_path, {"": FEDCOLLM[""], "task": TASK}))
    with pytest.raises(SettingsError, match=r"run\.toml: .*missing required field `auxiliary`"):
        run_settings.load(toml(tmp_path, {**FEDCOLLM, "fedcollm": {}}))


def test_ranks_that_have_no_mean_are_refused_by_the_averaging_that_counts(tmp_path: Path) -> None:
    """`fedcollm.averaging` says how it is averaged, whatever a table [lpfl] that nobody reads may say."""
    bad = {**FEDCOLLM, "adapter": {"rank": "4", "min_rank": "2"}, "lpfl": {"average": '"products"'}}
    with pytest.raises(SettingsError, match="factors of different ranks have no mean"):
        run_settings.load(toml(tmp_path, bad))
    good = run_settings.load(toml(tmp_path, {**bad, "fedcollm.averaging": {"average": '"products"'}}))

    assert good.averaged == LpFl(average="products", soft=None)


# The server's own texts -----------------------------------------------------------------------------------------------
@pytest.fixture
def serve(tmp_path: Path) -> Callable[[str | None], int]:
    """`edge-server serve` with these texts, or none, beside the run's file; its exit code."""
    helpers.write_bundle(tmp_path / "bundle")
    (tmp_path / "settings").mkdir()
    task = {"labels": '["negative", "positive"]', "pattern": '"{text}"', "verbalizer": '[["poor"], ["fine"]]'}
    config = toml(tmp_path / "settings", {**FEDCOLLM, "task": task})

    def run(texts: str | None) -> int:
        if texts is not None:
            (tmp_path / "settings" / "own.jsonl").write_text(texts)
        return cli.main(
            [
                "serve",
                "--config",
                str(config),
                "--bundle",
                str(tmp_path / "bundle"),
                "--data",
                str(tmp_path / "data"),
                "--port",
                "0",
            ]
        )

    return run


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (None, "No such file or directory"),
        ("", "no text with a label that is not held out; add some"),
        ('{"text": "a film"}\n', "no text with a label"),
        ('{"text": "a film", "label": "positive", "held_out": true}\n', "no text with a label"),
        ('{"text": "a film", "label": "positive"}\n{"text": "a day"\n', "own.jsonl:2: not a JSON object"),
        ('{"text": "a film", "label": "positive", "split": "train"}\n', "own.jsonl:1: unknown keys split; allowed: text, label"),
        ('{"text": "a film", "label": "great"}\n', "label 'great' is not one of this task's: negative, positive"),
    ],
)
def test_texts_that_cannot_be_used_are_told_before_anything_is_made(
    serve: Callable[[str | None], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: str | None, said: str
) -> None:
    """Exit code 2 and one line that names the setting, the file beside the run's and what is wrong with it."""
    assert serve(texts) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edge-server: fedcollm.auxiliary: {tmp_path / 'settings' / 'own.jsonl'}")
    assert said in line
    assert ("; mend it, or name another file: " in line) == ("no text with" not in said)
    assert not (tmp_path / "data").exists()


# The distiller --------------------------------------------------------------------------------------------------------
class Desk:
    """A distiller on a folder."""

    def __init__(self, home: Path, llm: Simulator | None = None) -> None:
        run = with_auxiliary()
        assert run.fedcollm is not None
        self.home, self.llm, self.blobs = home, llm or Simulator(), Blobs(home)
        self.distiller = Distiller(run.fedcollm, AUXILIARY, self.blobs, self.llm)

    def names(self) -> set[str]:
        return {path.name for path in self.home.iterdir()}


def lessons(data: Path, sha256: str) -> list[float]:
    """The seeds of everything that this adapter of the simulated LLM has learned."""
    seeds: list[float] = load_file(data / sha256)["seeds"].tolist()
    return seeds


async def test_each_distillation_starts_where_the_last_one_ended(tmp_path: Path) -> None:
    """The SLM's at the mean it is given, the LLM's at its newest adapter; every version has a seed of its own."""
    desk = Desk(tmp_path)
    first, llm, outcome = await desk.distiller.distil(delta(1), at(0))
    second, newer, _ = await desk.distiller.distil(delta(2), replace(at(1), tuned=(llm,)))
    third, newest, _ = await desk.distiller.distil(delta(2), replace(at(2), tuned=(llm, newer)))

    assert [equal(a, distilled(delta(i), s)) for a, i, s in ((first, 1, 4), (second, 2, 5), (third, 2, 6))] == [True] * 3
    assert outcome == Distilled(0.5, 0.25, 0.0)
    jobs = [job for job in desk.llm.jobs if isinstance(job, Distil)]
    assert [job.llm for job in jobs] == ["", str(tmp_path / llm), str(tmp_path / newer)]
    assert [job.seed for job in jobs] == [4, 5, 6]
    assert all((job.examples, job.how) == (AUXILIARY, Mutual(passes=3)) for job in jobs)
    assert [lessons(tmp_path, sha256) for sha256 in (llm, newer, newest)] == [[4], [4, 5], [4, 5, 6]]
    assert desk.names() == {llm, newer, newest}
    assert [hashlib.sha256((tmp_path / sha256).read_bytes()).hexdigest() for sha256 in (llm, newer)] == [llm, newer]


class Wrong(Simulator):
    """Answers as it should, with an adapter of these arrays."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.arrays = arrays

    async def run(self, job: Job) -> Outcome:
        outcome = await super().run(job)
        assert isinstance(job, Distil)
        save_file(dict(self.arrays), job.slm_out)
        return outcome


NUMBERLESS: dict[str, Array] = {name: array * np.float32(np.nan) for name, array in delta().items()}


@pytest.mark.parametrize(
    ("llm", "error", "said"),
    [
        (Simulator([JobFailed("out of memory")]), JobFailed, "out of memory"),
        (Simulator([OSError("no space left")]), OSError, "no space left"),
        (Simulator([Perplexity(1.0)]), DataError, "the LLM's process answered Perplexity"),
        (Simulator([Distilled(0.1, 0.1, 0.0)]), WireError, "bad-tensors"),  # it says so and has written nothing
        (Wrong({}), WireError, "wrong-shape"),
        (Wrong(NUMBERLESS), WireError, "not-finite"),
    ],
)
async def test_what_goes_wrong_leaves_nothing(tmp_path: Path, llm: Simulator, error: type[Exception], said: str) -> None:
    """The error reaches the caller, and no file stays."""
    desk = Desk(tmp_path, llm)
    with pytest.raises(error, match=said):
        await desk.distiller.distil(delta(), at(0))

    assert desk.names() == set()


async def test_a_distillation_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """A server that is stopped in the middle of one has no files lying around."""
    desk = Desk(tmp_path, Simulator([Hang()]))
    job = asyncio.create_task(desk.distiller.distil(delta(), at(0)))
    await helpers.until(lambda: bool(desk.llm.jobs))
    assert len(desk.names()) == 3
    job.cancel()
    await asyncio.wait([job])

    assert job.cancelled()
    assert desk.names() == set()


async def test_a_lost_adapter_is_named(tmp_path: Path) -> None:
    """The base is not taken for what was learned."""
    desk = Desk(tmp_path)
    with pytest.raises(DataError, match=f"blob {'0' * 12} is missing"):
        await desk.distiller.distil(delta(), replace(at(0), tuned=("0" * 64,)))

    assert (desk.llm.jobs, desk.names()) == ([], set())


async def reaches(ledger: Ledger, version: int) -> None:
    await helpers.until(lambda: ledger.state.version == version)


# A run ----------------------------------------------------------------------------------------------------------------
def expected(versions: int) -> list[Arrays]:
    """Every version's adapter: the mean over what `learn_and_average` uploads for the one before it, distilled."""
    found: list[Arrays] = [factories.SPEC.start(3)]
    for version in range(versions):
        batch = [Contribution(delta(10 * version + i), 10 * (i + 1), 0) for i in range(2)]
        found.append(distilled(fedbuff(found[-1], batch, 0.5, cap=20), 3 + version + 1))
    return found


async def test_a_version_is_what_was_distilled(tmp_path: Path) -> None:
    """The mean, distilled: what devices get, PEFT loads and the next mean starts from; the LLM's adapter is told beside it."""
    llm, said = Simulator(), list[str]()
    async with learning(tmp_path, llm, with_auxiliary(), say=said.append) as ledger:
        while ledger.state.version < 1:
            for i, device in enumerate(("d1", "d2")):
                if isinstance(ledger.plan(device, can_train=True), Train):
                    await take(ledger, upload(device, 0, seed=i, num_examples=10 * (i + 1)))
            await asyncio.sleep(0.002)
        work = ledger.plan("d1", can_train=True)
        assert work == Train(1, ledger.state.adapters[1], Training(), None, 3 + 1 + 1)
        await learn_and_average(ledger)
        state, status = ledger.state, ledger.status()

    versions = expected(3)
    assert [equal(adapter(tmp_path, sha256), array) for sha256, array in zip(state.adapters, versions, strict=True)] == [True] * 4
    published = [event for event in helpers.events(tmp_path) if isinstance(event, Published)]
    assert [(event.version, event.folded, event.llm) for event in published] == [
        (0, 0, ""),
        *((version, 2, state.tuned[version - 1]) for version in (1, 2, 3)),
    ]
    assert [lessons(tmp_path / "blobs", sha256) for sha256 in state.tuned] == [[4], [4, 5], [4, 5, 6]]
    for version in (1, 2, 3):
        assert equal(read_peft(folder(tmp_path, version), factories.SLOTS)[0], versions[version])
    assert state == replayed(tmp_path)
    assert (status.system, status.version, status.buffered, status.finished) == ("fedcollm", 3, 0, True)
    assert llm.closed
    assert said == [
        f"version {version} from 2 updates (staleness 0, 0); distilled in 0 s, losses 0.500 and 0.250 (LLM)"
        for version in (1, 2, 3)
    ]
    assert not any(name.startswith("incoming") for name in helpers.blobs(tmp_path))


@pytest.mark.parametrize("after", range(1, 15))
async def test_a_restart_at_any_event_goes_on(tmp_path: Path, after: int) -> None:
    """Whatever was on disk when the server died, the run ends with the same versions, LLM adapters and files."""
    async with learning(tmp_path / "undisturbed", Simulator(), with_auxiliary(), now=lambda: 7.0) as ledger:
        await learn_and_average(ledger)
        state = ledger.state
    log = helpers.events(tmp_path / "undisturbed")
    assert len(log) == 1 + 2 + 3 * (2 + 1) + 2  # start, devices; of each version its updates and itself; who measures the last
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "died")
    with contextlib.closing(sqlite3.connect(tmp_path / "died" / "events.sqlite", isolation_level=None)) as disk:
        disk.execute("DELETE FROM events WHERE seq > ?", [after])
    async with learning(tmp_path / "died", Simulator(), with_auxiliary(), now=lambda: 7.0) as again:
        await learn_and_average(again)

        assert (again.state.adapters, again.state.tuned) == (state.adapters, state.tuned)
        assert again.state == replayed(tmp_path / "died")
    assert helpers.blobs(tmp_path / "died") == helpers.blobs(tmp_path / "undisturbed")
    assert {repr(event) for event in helpers.events(tmp_path / "died")} == {repr(event) for event in log}


async def test_a_distillation_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both updates wait, no version is published, the reason is told in /readyz, and a later try makes the same version."""
    monkeypatch.setattr(ledgers, "RETRY_SECONDS", 0.05)
    llm = Simulator([JobFailed("the LLM cannot distil: out of memory"), *[Perplexity(1.0)] * 10**5])
    async with helpers.running(tmp_path, with_auxiliary(), llm) as server:
        await server.enroll("d1", "d2", "d3")
        for i, device in enumerate(("d1", "d2")):
            await server.send(upload(device, 0, seed=i, num_examples=10 * (i + 1)))
        await helpers.until(lambda: len(llm.jobs) > 2)
        known = {server.ledger.state.adapter, *(waiting.blob for waiting in server.ledger.state.buffer)}
        answer = await server.client.get("/readyz")
        assert (answer.status, await answer.text()) == (
            503,
            "version 1 cannot be made: the LLM's process answered Perplexity\n",
        )
        assert server.ledger.plan("d1", can_train=True) == Wait(0.25)
        assert (server.ledger.state.version, len(server.ledger.state.buffer), server.ledger.state.tuned) == (0, 2, ())
        assert not folder(tmp_path, 1).exists()
        assert {name for name in helpers.blobs(tmp_path) if not name.startswith("incoming")} == known
        await server.send(upload("d3", 0))  # is taken meanwhile, and is for the next version
        llm.troubles.clear()
        await helpers.until(lambda: server.ledger.state.version == 1 and not server.ledger.trouble)
        assert (await server.client.get("/readyz")).status == 200
        state = server.ledger.state

    assert equal(adapter(tmp_path, state.adapter), expected(1)[1])
    assert [state.version - waiting.version for waiting in state.buffer] == [1]
    assert len({msgspec.json.encode(_without_files(job)) for job in llm.jobs}) == 1  # the same job each time


def _without_files(job: Job) -> Job:
    assert isinstance(job, Distil)
    return msgspec.structs.replace(job, slm="", slm_out="", llm_out="")


async def test_devices_are_served_while_the_models_learn(tmp_path: Path) -> None:
    """An update that comes during a distillation waits for the next version; the server can be stopped, and goes on later."""
    async with learning(tmp_path, Simulator([Hang()]), with_auxiliary()) as ledger:
        await ledger.enroll("d3", "d3")
        for i, device in enumerate(("d1", "d2")):
            await take(ledger, upload(device, 0, seed=i, num_examples=10 * (i + 1)))
        await helpers.until(lambda: any(name.startswith("incoming") for name in helpers.blobs(tmp_path)))
        assert isinstance(ledger.plan("d3", can_train=True), Train)
        await take(ledger, upload("d3", 0))
        assert (ledger.trouble, ledger.state.version, len(ledger.state.buffer)) == ("", 0, 3)
    assert not any(name.startswith("incoming") for name in helpers.blobs(tmp_path))
    async with learning(tmp_path, Simulator(), with_auxiliary()) as again:
        await reaches(again, 1)
        assert equal(adapter(tmp_path, again.state.adapter), expected(1)[1])
        assert len(again.state.buffer) == 1


async def test_devices_send_what_they_learn_and_get_no_feed(tmp_path: Path) -> None:
    """A mere word of a training, or a question for synthetic texts, is told that this is another system."""
    async with learning(tmp_path, Simulator(), with_auxiliary()) as ledger:
        refused = []
        for ask in (helpers.train(ledger, "d1", 0), ledger.synthetic(0, 10)):
            with pytest.raises(WireError) as error:
                await ask
            refused.append((error.value.code, error.value.status, "fedcollm" in error.value.detail))

    assert refused == [("wrong-system", 404, True)] * 2


async def test_updates_as_old_as_the_averaging_allows_are_taken(tmp_path: Path) -> None:
    """`fedcollm.averaging.max_staleness` counts, not that of a table [lpfl]."""
    async with learning(tmp_path, Simulator(), with_auxiliary(max_staleness=1)) as ledger:
        await ledger.enroll("d3", "d3")
        await ledger.enroll("d4", "d4")
        for version in range(2):
            for i, device in enumerate(("d1", "d2")):
                await take(ledger, upload(device, version, seed=i))
            await reaches(ledger, version + 1)
        with pytest.raises(WireError, match="too-stale"):
            await take(ledger, upload("d3", 0))
        await take(ledger, upload("d4", 1))

        assert [ledger.state.version - waiting.version for waiting in ledger.state.buffer] == [1]


@pytest.mark.parametrize(("compute", "auxiliary"), [(None, AUXILIARY), (Simulator(), ())])
def test_a_run_needs_models_and_texts(tmp_path: Path, compute: Simulator | None, auxiliary: tuple[Example, ...]) -> None:
    """Refused before anything is made, so that the same folder can be used at once."""
    run = with_auxiliary()
    manifest = run_settings.manifest(run, factories.bundle())
    with pytest.raises(SettingsError, match=r"fedcollm needs a process .* fedcollm\.auxiliary"):
        Ledger(run, manifest, tmp_path / "data", compute=compute, auxiliary=auxiliary)
    assert not (tmp_path / "data").exists()
    Ledger(run, manifest, tmp_path / "data", compute=Simulator(), auxiliary=AUXILIARY).close()


async def test_a_frozen_a_goes_through_a_version(tmp_path: Path) -> None:
    """With adapter.freeze_a devices send B alone, and the models are still given, and give back, the whole adapter."""
    run = msgspec.structs.replace(with_auxiliary(), adapter=AdapterSettings(helpers.SPEC.rank, helpers.SPEC.alpha, freeze_a=True))
    only = [{name: array for name, array in delta(i).items() if "lora_B" in name} for i in range(2)]
    async with learning(tmp_path, Simulator(), run) as ledger:
        for device, arrays in zip(("d1", "d2"), only, strict=True):
            await take(ledger, wire.pack(Update(device, 0, 10, {}), arrays))
        await reaches(ledger, 1)
        state = ledger.state

    start = factories.SPEC.start(3)
    mean = fedbuff(start, [Contribution(arrays, 10, 0) for arrays in only], 0.5, cap=20)
    assert equal(adapter(tmp_path, state.adapter), distilled(mean, 4))
    assert all((mean[name] == array).all() for name, array in start.items() if "lora_A" in name)
