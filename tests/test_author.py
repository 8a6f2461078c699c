"""The author carries out steps with a simulated LLM: what a sheet holds, who is believed, what is learned, what is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from edge_sdk import wire
from edge_sdk.errors import DataError, WireError
from edge_sdk.protocol import Judgment, Line, Sample, Text, Withdrawal
from edge_server import coordinator
from edge_server.author import Author
from edge_server.compute import JobFailed
from edge_server.coordinator import Enrolled, Judged, Published, State, Withdrawn, Written
from edge_server.knowledge.filters import Filter
from edge_server.llm.jobs import Label, LlmSettings, Perplexity, Texts, Tune, Tuning, Write
from edge_server.storage import Blobs
from edge_server.systems import crosslm
from edge_server.systems.crosslm import DecideSheet, TuneLlm, WriteSheet
from tests import factories, strategies
from tests import server_helpers as helpers
from tests.server_helpers import Simulator, judgment, mood

JUDGES = ("d1", "d2", "d3", "d4")


class Desk:
    """An author on a folder, and the run it works for."""

    def __init__(self, folder: Path, **crosslm: Any) -> None:
        run = helpers.with_llm(**crosslm)
        assert run.crosslm is not None
        self.folder, self.settings = folder, run.crosslm
        self.llm, self.blobs = Simulator(), Blobs(folder)
        self.author = Author(run.crosslm, run.task, self.blobs, self.llm, None, lambda: 1000.0)
        self.state = State()
        start: list[coordinator.Event] = [Published(0, "a0", 0), *(Enrolled(device, "x") for device in JUDGES)]
        for event in start:
            self.apply(event)

    def apply(self, event: coordinator.Event) -> None:
        self.state = coordinator.apply(self.state, event)

    async def do(self, step: crosslm.Step) -> Any:
        """Carries a step out and applies what came of it."""
        event = await self.author.carry_out(step, self.state)
        self.apply(event)
        return event

    def sheet(self, number: int = -1) -> list[Text]:
        return wire.unpack_lines(self.blobs.get(self.state.sheets[number].texts), Text)

    def vote(self, device: str, body: bytes) -> None:
        message = self.author.read(body, self.state)
        decision = coordinator.judge(self.state, message, f"{device} {message.version}", self.blobs.put(body), len(body))
        assert isinstance(decision, Judged)
        self.apply(decision)

    def votes(self, *kinds: str, **more: Any) -> None:
        """Judges of these kinds judge the newest sheet."""
        for i, kind in enumerate(kinds):
            number, form = len(self.state.sheets) - 1, self.settings.form
            self.vote(JUDGES[i], judgment(JUDGES[i], number, self.sheet(), kind, form, **more))

    async def whole_sheet(self, number: int, *kinds: str) -> None:
        await self.do(WriteSheet(number))
        self.votes(*(kinds or ("honest", "honest")))
        await self.do(DecideSheet(number))
        await self.do(TuneLlm(number))

    def names(self) -> set[str]:
        """Of the files in the folder."""
        return {path.name for path in self.folder.iterdir()}

    def good(self) -> list[str]:
        """Texts of the newest sheet that say what they were written to say."""
        return [text.text for text in self.sheet() if mood(text.text) == text.label]

    def feed(self) -> list[Line]:
        return self.author.lines(self.state, [])

    def accepted(self) -> list[str]:
        """Texts of the newest sheet that reached the feed."""
        return [line.text for line in self.feed() if isinstance(line, Sample) and line.version == len(self.state.sheets) - 1]


async def test_a_sheet_holds_what_passed_the_filters(tmp_path: Path) -> None:
    """Short, repeated and leaking texts are counted by reason; the others come in order, with the class asked for."""
    desk = Desk(tmp_path, filter=Filter(min_words=3), samples=5)
    written = (("it  was\ngloomy", "no", "a bad thing it was"), ("It was gloomy!", "was it a happy", "it was so happy"))
    desk.llm.troubles.append(Texts(written, 0.0))
    event = await desk.do(WriteSheet(0))

    assert desk.llm.jobs[0] == Write("", ("a bad day:", "a good day:"), (3, 3), desk.llm.jobs[0].sampling)  # type: ignore[union-attr]
    assert event == Written(0, event.texts, event.drafts, len(desk.blobs.get(event.texts)), 3, "", {**event.dropped}, 1000.0)
    assert event.dropped == {"short": 1, "leak": 1, "duplicate": 1}
    assert [(t.text, t.label) for t in desk.sheet()] == [("it was gloomy", 0), ("was it a happy", 1), ("it was so happy", 1)]


@pytest.mark.parametrize(
    ("names", "kept"), [(("sad", "glad"), ["was it bad"]), ((), ["was it bad", "oh it was bad", "so sad a day"])]
)
async def test_no_text_says_what_its_label_is_called_anywhere(tmp_path: Path, names: tuple[str, ...], kept: list[str]) -> None:
    """Neither as the prompts call it nor as devices do; where prompts have the task's own names, these alone were asked for."""
    desk = Desk(tmp_path, names=names)
    desk.llm.troubles.append(Texts((("was it bad", "oh it was bad", "so sad a day", "a negative day"), ()), 0.0))
    await desk.do(WriteSheet(0))

    assert [text.text for text in desk.sheet()] == kept


async def test_a_sheet_repeats_no_earlier_one(tmp_path: Path) -> None:
    """What was written for an earlier sheet, good or bad, is a duplicate in a later one."""
    desk = Desk(tmp_path)
    await desk.whole_sheet(0)
    again = tuple(text.text for text in desk.sheet())
    desk.llm.troubles.append(Texts((again, ("it is new",)), 0.0))
    event = await desk.do(WriteSheet(1))

    assert event.dropped == {"duplicate": 8}
    assert [text.text for text in desk.sheet(1)] == ["it is new"]


async def test_a_sheet_is_written_by_what_was_learned(tmp_path: Path) -> None:
    """The second sheet is asked of the adapter that learned from the first, with another seed."""
    desk = Desk(tmp_path, seed=3)
    await desk.whole_sheet(0)
    await desk.do(WriteSheet(1))
    first, second = (job for job in desk.llm.jobs if isinstance(job, Write) and len(job.prompts) == 2)

    assert (first.adapter, second.adapter) == ("", str(tmp_path / desk.state.tuned[0]))
    assert (first.sampling.seed, second.sampling.seed) == (3_000_000, 3_001_000)
    assert [sheet.adapter for sheet in desk.state.sheets] == ["", desk.state.tuned[0]]


async def test_nothing_usable_is_said_with_reasons(tmp_path: Path) -> None:
    """No empty sheet is made; the operator reads why, and the next attempt is not the same one."""
    desk = Desk(tmp_path)
    desk.llm.troubles.append(Texts((("no", "yes", "so bad"), ()), 0.0))
    with pytest.raises(DataError, match=r"nothing usable \(2 short, 1 leak\)"):
        await desk.do(WriteSheet(0))
    await desk.do(WriteSheet(0))

    first, second = (job.sampling.seed for job in desk.llm.jobs if isinstance(job, Write))
    assert second == first + 1


async def test_a_sheet_has_no_more_texts_than_devices_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts for each prompt are rounded up; what that makes too many is left out."""
    monkeypatch.setattr(wire, "MAX_TEXTS", 7)
    desk = Desk(tmp_path, samples=7)
    event = await desk.do(WriteSheet(0))

    assert event.count == len(desk.sheet()) == 7


@pytest.mark.parametrize("form", ["probabilities", "agree"])
@pytest.mark.parametrize("liar", ["random", "inverted", "constant"])
async def test_three_honest_judges_outvote_a_liar(tmp_path: Path, form: str, liar: str) -> None:
    """The feed holds exactly the texts that say what they were written to say, whatever a fourth judge answers."""
    desk = Desk(tmp_path, form=form, samples=24)
    await desk.do(WriteSheet(0))
    desk.votes(liar, "honest", "honest", "honest")
    event = await desk.do(DecideSheet(0))

    assert desk.accepted() == desk.good()
    assert (event.samples, event.acceptance) == (18, 0.75)
    assert len({s.id for s in desk.feed()} & {text.id for text in desk.sheet()}) == 18


async def test_the_llm_judges_from_the_second_sheet_on(tmp_path: Path) -> None:
    """Only once it has learned, with its newest adapter; then it helps an honest device against a liar."""
    desk = Desk(tmp_path)
    await desk.whole_sheet(0)
    assert not any(isinstance(job, Label) for job in desk.llm.jobs)
    await desk.do(WriteSheet(1))
    desk.votes("honest", "inverted")
    await desk.do(DecideSheet(1))
    label = desk.llm.jobs[-1]

    assert label == Label(str(tmp_path / desk.state.tuned[0]), tuple(text.text for text in desk.sheet()))
    assert desk.accepted() == desk.good()


async def test_a_judge_says_nothing_of_classes_it_does_not_know(tmp_path: Path) -> None:
    """A device with examples of one class judges texts for this class alone; the others are left out."""
    desk = Desk(tmp_path)
    await desk.do(WriteSheet(0))
    desk.votes("honest", covers=(1,))
    event = await desk.do(DecideSheet(0))

    assert desk.accepted() == [text.text for text in desk.sheet() if text.label == mood(text.text) == 1]
    assert event.acceptance == 0.75


async def test_a_lost_judgment_is_named(tmp_path: Path) -> None:
    """A sheet is not decided as if somebody had not answered."""
    desk = Desk(tmp_path)
    await desk.do(WriteSheet(0))
    desk.votes("honest", "honest")
    blob = desk.state.sheets[0].ballots[1].blob
    (tmp_path / blob).unlink()
    with pytest.raises(DataError, match=f"blob {blob} is missing"):
        await desk.do(DecideSheet(0))


async def test_the_llm_learns_from_a_sheet(tmp_path: Path) -> None:
    """Good texts, contrasts, soft labels and the base's own texts; each lesson starts where the last one ended."""
    desk = Desk(tmp_path, seed=5)
    await desk.whole_sheet(0)
    await desk.whole_sheet(1)
    first, second = (job for job in desk.llm.jobs if isinstance(job, Tune))

    assert (first.adapter, second.adapter) == ("", str(tmp_path / desk.state.tuned[0]))
    assert (first.seed, second.seed) == (5, 6)
    assert [good.text for good in second.lessons.good] == desk.good()
    assert {pair.bad for pair in second.lessons.pairs} == {t.text for t in desk.sheet()} - set(desk.good())
    assert len(second.lessons.labelled) == 8
    assert len(first.lessons.leash) == 5
    assert first.lessons.leash == second.lessons.leash
    assert first.lessons.leash[0].startswith("The ")
    lesson = load_file(tmp_path / desk.state.tuned[1])["lesson"]
    assert (lesson == np.array([6, 6], np.float32)).all()
    assert not any(name.startswith("incoming-") for name in desk.names())


async def test_a_withdrawn_sample_teaches_nobody(tmp_path: Path) -> None:
    """What the operator withdraws between decision and lesson is no lesson."""
    desk = Desk(tmp_path)
    await desk.do(WriteSheet(0))
    desk.votes("honest", "honest")
    await desk.do(DecideSheet(0))
    gone = desk.feed()[0]
    assert isinstance(gone, Sample)
    desk.apply(Withdrawn(gone.id))
    await desk.do(TuneLlm(0))
    lessons = desk.llm.jobs[-1].lessons  # type: ignore[union-attr]

    assert len(lessons.good) == 5
    assert gone.text not in {good.text for good in lessons.good} | {x.text for x in lessons.labelled}


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(generation=0, contrast_weight=0, task=0)])
async def test_a_run_goes_on_where_there_is_nothing_to_learn(tmp_path: Path, tuning: Tuning) -> None:
    """No text was judged, or lessons have no weight: the LLM stays the base, and is no judge either."""
    desk = Desk(tmp_path, tuning=tuning)
    await desk.do(WriteSheet(0))
    kept = desk.blobs.get(desk.state.sheets[0].drafts)
    aside = np.array([[0, 0] if text.label else [255, 0] for text in desk.sheet()], np.uint8)  # answers where it has no say
    nothing = wire.pack_judgment(Judgment("d1", 0, 10, {}, (1,)), aside)
    desk.vote("d1", nothing if tuning == Tuning() else judgment("d1", 0, desk.sheet()))
    await desk.do(DecideSheet(0))
    event = await desk.do(TuneLlm(0))
    await desk.do(WriteSheet(1))
    desk.votes("honest", "honest")
    await desk.do(DecideSheet(1))

    assert (event.adapter, event.loss) == ("", 0.0)
    assert not any(isinstance(job, Tune | Label) for job in desk.llm.jobs)
    assert desk.state.sheets[1].adapter == ""
    assert desk.blobs.get(desk.state.sheets[0].drafts) == kept
    assert desk.accepted() == desk.good()


@pytest.mark.parametrize("step", [WriteSheet(1), DecideSheet(0), TuneLlm(0)])
async def test_an_llm_that_fails_or_talks_nonsense_changes_nothing(tmp_path: Path, step: crosslm.Step) -> None:
    """The error reaches the caller, no half file is left, and the same step succeeds later."""
    desk = Desk(tmp_path, leash=0)
    await desk.do(WriteSheet(0))
    desk.votes("honest", "honest")
    if not isinstance(step, DecideSheet):
        await desk.do(DecideSheet(0))
    else:  # the LLM is asked only once it has learned
        desk.state = replace(desk.state, tuned=(desk.blobs.put(b"adapter"),))
    before = desk.names()
    nonsense = Perplexity(1.0)
    for trouble, error in ((JobFailed("out of memory"), "out of memory"), (nonsense, "answered Perplexity")):
        desk.llm.troubles.append(trouble)
        with pytest.raises((JobFailed, DataError), match=error):
            await desk.author.carry_out(step, desk.state)

    assert desk.names() == before
    await desk.do(step)


async def test_a_lost_adapter_is_named(tmp_path: Path) -> None:
    """The base is not taken for what was learned."""
    desk = Desk(tmp_path)
    await desk.whole_sheet(0)
    (tmp_path / desk.state.tuned[0]).unlink()
    with pytest.raises(DataError, match=f"blob {desk.state.tuned[0][:12]} is missing"):
        await desk.do(WriteSheet(1))


async def test_an_answer_that_means_nothing_is_refused(tmp_path: Path) -> None:
    """A byte that is none of the four `agree` answers would stop the decision later, so it is not taken in."""
    desk = Desk(tmp_path, form="agree")
    await desk.do(WriteSheet(0))
    for value, fine in ((3, True), (4, False), (255, False)):
        body = wire.pack_judgment(Judgment("d1", 0, 10, {}, (0, 1)), np.full((8, 1), value, np.uint8))
        if fine:
            assert desk.author.read(body, desk.state).device == "d1"
        else:
            with pytest.raises(WireError, match="none of the four") as refused:
                desk.author.read(body, desk.state)
            assert (refused.value.code, refused.value.status) == ("bad-message", 400)


async def test_without_labels_there_is_no_vote(tmp_path: Path) -> None:
    """A device that covers no class has nothing to judge by: it does not judge everything."""
    desk = Desk(tmp_path)
    await desk.do(WriteSheet(0))
    with pytest.raises(WireError, match="covers no class") as refused:
        desk.votes("honest", num_examples=0, covers=())

    assert refused.value.code == "bad-message"
    assert desk.state.sheets[0].ballots == ()


@pytest.mark.parametrize(("answered", "fine"), [(8, True), (4, True), (3, False), (0, False)])
async def test_who_says_nothing_ends_no_sheet(tmp_path: Path, answered: int, fine: bool) -> None:
    """At least half of the texts must be answered, or the judgment is not taken in."""
    desk = Desk(tmp_path)
    await desk.do(WriteSheet(0))
    answer = np.full((8, 2), 100, np.uint8)
    answer[answered:] = 0
    body = wire.pack_judgment(Judgment("d1", 0, 10, {}, (0, 1)), answer)
    if fine:
        assert desk.author.read(body, desk.state).device == "d1"
    else:
        with pytest.raises(WireError, match="fewer than half") as refused:
            desk.author.read(body, desk.state)
        assert refused.value.code == "bad-message"


# The feed -------------------------------------------------------------------------------------------------------------
@strategies.fuzzing
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=8), st.lists(st.integers(0, 12), max_size=4))
def test_the_feed_is_numbered_and_only_grows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]], looks: list[int]
) -> None:
    """Lines count from 1 without a gap, withdrawals stand where they happened, and what was read once is never read anew."""
    desk = Desk(tmp_path_factory.mktemp("feed"))
    expected: list[tuple[str, str]] = []
    done: list[Line] = []
    for at, (withdraws, count) in enumerate(steps):
        known = [id for kind, id in expected if kind == "sample" and ("withdrawal", id) not in expected]
        if withdraws and known:
            desk.apply(Withdrawn(known[count % len(known)]))
            expected.append(("withdrawal", known[count % len(known)]))
        else:
            number = len(desk.state.sheets)
            drafts = [crosslm.Draft("p", 0, f"text {number} {i}") for i in range(count)]
            rows = [crosslm.Judged(draft, (0.9, 0.1), 0.9, True, False) for draft in drafts]
            desk.apply(Written(number, "t", "d", 1, count, "llm", {}, 0.0))
            desk.apply(coordinator.Decided(number, desk.blobs.put(msgspec.json.encode(rows)), count, 1.0))
            expected += [("sample", crosslm.id_of(number, draft)) for draft in drafts]
        if at in looks:
            done = desk.author.lines(desk.state, done)
    whole = desk.feed()

    assert [line.seq for line in whole] == list(range(1, len(expected) + 1))
    assert [("sample" if isinstance(line, Sample) else "withdrawal", line.id) for line in whole] == expected
    assert desk.author.lines(desk.state, done) == whole
    assert desk.state.lines == len(whole)


async def test_an_endpoint_writes_and_the_llm_learns(tmp_path: Path) -> None:
    """With a writer of its own, sheets come from it and name no adapter; the LLM is still tuned and still a judge."""
    desk = Desk(tmp_path, llm=LlmSettings(model="simulated", endpoint="http://127.0.0.1:9/v1", endpoint_model="theirs"))
    writer = helpers.Simulator()
    desk.author = replace(desk.author, writer=writer)
    await desk.whole_sheet(0)
    await desk.whole_sheet(1)

    assert {line.model for line in desk.feed() if isinstance(line, Sample)} == {"theirs"}
    assert [type(job) for job in writer.jobs] == [Write, Write]
    assert {sheet.adapter for sheet in desk.state.sheets} == {""}
    assert all(desk.state.tuned)
    leash = [job for job in desk.llm.jobs if isinstance(job, Write)]
    assert all(job.adapter == "" for job in leash)
    assert [type(job) for job in desk.llm.jobs if not isinstance(job, Write)] == [Tune, Label, Tune]


async def test_a_sample_says_where_it_comes_from(tmp_path: Path) -> None:
    """Label by name, what the judges think, and which LLM with which adapter wrote it; read through the wire it is the same."""
    desk = Desk(tmp_path, llm=LlmSettings(model="simulated", endpoint_model="nobody's"))  # there is no endpoint
    await desk.whole_sheet(0)
    await desk.whole_sheet(1)
    desk.apply(Withdrawn("gone"))
    lines = desk.feed()
    sample = lines[6]

    assert isinstance(sample, Sample)
    assert (sample.version, sample.model, sample.adapter) == (1, "simulated", desk.state.tuned[0])
    assert (sample.seq, sample.text) == (7, desk.good()[0])
    assert sample.label == factories.ENCODER_TASK.labels[mood(sample.text)]
    assert sample.quality == sample.soft[mood(sample.text)] > 0.8
    assert lines[-1] == Withdrawal(13, "gone")
    assert wire.unpack_lines(wire.pack_lines(lines), Line) == lines  # type: ignore[arg-type]  # a union is fine for msgspec
