"""What one model says of public answers, as another model can learn it; pure.

FedMKT (Fan et al. 2024, section 4): a teacher's likeliest tokens at each position of an answer are the student's targets there,
where the teacher says the answer better than the student. Whose word counts is `knowledge.py`'s business, which token of one
model is which of the other `alignment.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_sdk import alignment, wire
from edge_sdk.alignment import Ints, Vocabulary
from edge_sdk.engines import TopK
from edge_sdk.errors import DataError, WireError
from edge_sdk.knowledge import Knowledge, Sheet, Truth, nats_per_byte, select, unpack
from edge_sdk.protocol import Text, Told
from edge_sdk.tokens import PromptEncoder
from edge_sdk.training.batches import Answer, Row, TopTokens

POSITIONS = 1 << 20  # a teacher's: what it can read is its own business

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Voice:
    """How a model spells answers: by its tokenizer for the task, and the token that closes them, None for none."""

    encoder: PromptEncoder
    end: int | None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return alignment.vocabulary(self.encoder.tokenizer)

    def offsets(self, answer: str, tokens: int) -> list[tuple[int, int]]:
        """Where in the spelled answer each of its first `tokens` tokens lies, after one entry for the prompt; see `alignment`."""
        found = alignment.answer_offsets(self.encoder.tokenizer, self.encoder.spelled(answer), ended=self.end is not None)
        return found[: 1 + tokens]

    def size(self, answer: str, tokens: int) -> int:
        """Bytes of UTF-8 that the first `tokens` tokens have read of an answer, without the spaces around it; at least 1.

        It is the whole answer, unless that was cut: then what was not read counts for nobody. A character that was begun counts.
        """
        read = max(end for _, end in self.offsets(answer, tokens))
        return max(len(self.encoder.spelled(answer)[:read].strip().encode()), 1)


@dataclass(frozen=True)
class Heard:
    """Public texts with answers, and what a model that spells them as `voice` does says of them."""

    public: Sequence[Text]
    knowledge: Sequence[Knowledge]
    voice: Voice


def hear(told: Told, texts: bytes, knowledge: bytes, tokenizer: bytes) -> Heard:
    """What the server's LLM says, from its three blobs.

    Raises:
        WireError: a blob is not what `told` says it is.
    """
    public = wire.unpack_lines(texts, Text)
    if not public:
        raise WireError("bad-message", "the lesson has no texts")
    try:
        voice = Voice(PromptEncoder(tokenizer.decode(), (), (), POSITIONS, told.task), told.end)
        spelled = sheet(voice, public)
    except BaseException as error:  # tokenizers' errors have no root but Exception, and its panics not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise WireError("bad-message", f"the LLM's tokenizer cannot be used: {str(error)[:200]}") from error
    return Heard(public, unpack(knowledge, spelled), voice)


def sheet(voice: Voice, public: Sequence[Text]) -> Sheet:
    """Public answers in a model's tokens. Raises: DataError: one has no tokens, an id comes twice, or there are too many."""
    if len({text.id for text in public}) < len(public):
        raise DataError("two public texts have the same id")
    return Sheet(voice.vocabulary.digest, len(voice.vocabulary), {text.id: _truth(voice, text) for text in public})


def _truth(voice: Voice, text: Text) -> Truth:
    try:
        (ids,) = voice.encoder.answers([text.answer], voice.end)
    except DataError as error:
        raise DataError(f"the answer of {text.id!r} cannot be said: {error}") from error
    return Truth(tuple(ids), voice.size(text.answer, len(ids)))


def said(voice: Voice, public: Sequence[Text], found: Sequence[TopK]) -> list[Knowledge]:
    """What a model says of public answers, from its likeliest tokens at each position."""
    sizes = [voice.size(text.answer, len(top.ids)) for text, top in zip(public, found, strict=True)]
    return [Knowledge(t.id, size, top.ids, top.logprobs) for t, size, top in zip(public, sizes, found, strict=True)]


def lessons(
    voice: Voice,
    public: Sequence[Text],
    own: Sequence[Knowledge],
    teachers: Sequence[tuple[Voice, Sequence[Knowledge]]],
    label_weight: float,
) -> tuple[list[Row], Ints]:
    """Public texts and answers as a model should learn them: label_weight * answer + (1 - label_weight) * the chosen teacher.

    A text is learned by its answer alone where no teacher says that better than the model itself. At a position that the teacher
    does not share there is label_weight * answer, and nothing else. So whatever a teacher says, what a position teaches is least
    where the answer's own token has label_weight of the probability, or more.

    Args:
        voice: the learner's. own: what it says of each text, in the same order, with as many tokens a position as the teachers.
        teachers: what others say, each of any of the texts.

    Returns:
        A row for each text, and (n,) whom it is learned from: a teacher's index, or -1.

    Raises:
        DataError: knowledge is not of these texts, or two patterns end differently.
    """
    if [known.id for known in own] != [text.id for text in public]:
        raise DataError("what a model says of public texts comes in their order")
    truths = sheet(voice, public).truths
    nats = np.array([nats_per_byte(known, truths[known.id], len(voice.vocabulary)) for known in own])
    heard = [(other, sheet(other, public).truths, {known.id: known for known in knowns}) for other, knowns in teachers]
    theirs = [
        [nats_per_byte(known[t.id], spelled[t.id], len(other.vocabulary)) if t.id in known else np.inf for t in public]
        for other, spelled, known in heard
    ]
    chosen = select(nats, np.array(theirs).reshape(len(heard), len(public)))
    maps = {key: _map(other, voice) for key, other in {_key(other): other for other, _ in teachers}.items()}
    rows = []
    for text, prompt, teacher in zip(public, voice.encoder.prompts([t.text for t in public]), chosen, strict=True):
        ids = truths[text.id].tokens
        target: Answer | TopTokens | None = None
        if teacher >= 0:
            other, spelled, known = heard[teacher]
            theirs_ids, mapping = spelled[text.id].tokens, maps[_key(other)]
            target = _told(text, len(prompt), voice, ids, other, theirs_ids, known[text.id], mapping, label_weight)
        rows.append(Row([*prompt, *ids], target or Answer(len(prompt))))
    return rows, chosen


def _told(
    text: Text,
    start: int,
    voice: Voice,
    ids: Tokens,
    other: Voice,
    theirs: Tokens,
    known: Knowledge,
    mapping: Ints,
    label_weight: float,
) -> TopTokens | None:
    """A teacher's word on one answer in the learner's tokens; None where they share no position."""
    spelled = voice.encoder.spelled(text.answer)
    if other.encoder.spelled(text.answer) != spelled:
        raise DataError("the patterns of two models end differently, one in a space: their answers do not start alike")
    if (other.vocabulary.digest, theirs) == (voice.vocabulary.digest, ids):  # also inside a character, and where both are cut
        positions = np.arange(len(ids))
    else:
        places = other.offsets(text.answer, len(theirs)), voice.offsets(text.answer, len(ids))
        positions = alignment.align(spelled, *places, whole=True)
    alike = mapping[np.asarray(theirs)[positions]] == np.asarray(ids)  # else the learner cuts the word elsewhere than the map
    positions = np.where((positions >= 0) & alike, positions, -1)
    found = alignment.taught(alignment.translate(known.ids, known.logprobs, mapping), positions, start)
    return None if found is None else TopTokens(found.start, found.ids, found.logprobs, label_weight)


def _key(voice: Voice) -> tuple[str, int | None]:
    return voice.vocabulary.digest, voice.end


def _map(source: Voice, target: Voice) -> Ints:
    ends: Mapping[int, int] = {} if source.end is None or target.end is None else {source.end: target.end}
    return alignment.vocabulary_map(source.vocabulary, target.vocabulary, ends).ids
