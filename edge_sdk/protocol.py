"""Every message between a device and the server, as frozen typed values; version 6.

A device enrols and gets the `Manifest`, then asks for work again and again: `Train`, `Predict`, `Evaluate`, `Wait` or
`Finished`. What came of it goes back as an `Update` or a `Judgment` (beside tensors), an `Evaluation` or `Trained`, and is
answered by a `Receipt`. Synthetic texts are a feed of their own, of `Sample` and `Withdrawal` lines. Secure averaging has
messages of its own, in `cohort.py`. Bytes are `wire.py`'s business.
"""

from __future__ import annotations

import math

import msgspec

from edge_sdk.adapters import AdapterSpec
from edge_sdk.bundle import Bundle, File
from edge_sdk.codec import Encoding
from edge_sdk.cohort import Quorum, Request
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.judgments import Form
from edge_sdk.softlabels import SoftLabels
from edge_sdk.tasks import Task
from edge_sdk.training.batches import Training

PROTOCOL = 6
MAX_K = 256  # tokens that a position of knowledge may have

Metrics = dict[str, float]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages; carries no behaviour."""


class Enroll(Message, frozen=True):
    """Device -> server, first contact; repeating it changes nothing.

    `model` chooses among the bundles of a run that has several; "" for the first. `token` admits the device where the server
    knows its devices, once; "" afterwards.
    """

    protocol: int
    device: str
    name: str
    model: str = ""
    token: str = ""


class Manifest(Message, frozen=True):
    """Server -> device: everything that stays the same for the whole run, whose id is `run`.

    Args:
        adapter: what is averaged, as a whole.
        min_layers, min_rank: a device may train so much less of it, the layers nearest the output and the first components;
            0 for no choice.
        secure: of how many devices a cohort is, where the server averages what they learn without seeing any single update; None
            where it does not.
    """

    protocol: int
    system: str
    task: Task
    adapter: AdapterSpec
    bundle: Bundle
    run: str = ""
    min_layers: int = 0
    min_rank: int = 0
    secure: Quorum | None = None

    def part(self, layers: int, rank: int) -> AdapterSpec:
        """What a device trains that chose so many layers and so large a rank; 0 for all there are.

        Raises:
            DataError: the run does not allow this choice.
        """
        spec = self.adapter
        fewest, lowest = self.min_layers or spec.depth, self.min_rank or spec.rank
        if not fewest <= (layers or spec.depth) <= spec.depth or not lowest <= (rank or spec.rank) <= spec.rank:
            raise DataError(
                f"this run trains {fewest} to {spec.depth} layers at rank {lowest} to {spec.rank}, not {layers} at rank {rank}"
            )
        return spec.part(layers or spec.depth, rank or spec.rank)


class Ask(Message, frozen=True):
    """Device -> server: what shall I do? A device without torch cannot train, but can still measure."""

    device: str
    can_train: bool


class Mix(Message, frozen=True):
    """Synthetic texts in training: those of the feed up to line `until`, `batch_size` in each step, their loss times `weight`.

    `temperature` below 1 sharpens their soft labels (p^(1/T), normalized).
    """

    until: int
    weight: float = 1.0
    batch_size: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise SettingsError("mix.temperature must be positive and finite")
        if not 0 <= self.until < 2**63 or not 0 <= self.weight < math.inf or not 1 <= self.batch_size <= 4096:
            raise SettingsError("mix.until and mix.weight must not be negative, mix.batch_size must be 1 to 4096")


class Lesson(Message, frozen=True):
    """Public texts in training, with their labels and what the server's LLM says of them: `count` lines of the blob `blob`.

    `batch_size` of them are in each step. A text is learned by `label_weight` of its label and the rest of what the LLM says,
    where that says the label better than the device itself; else by its label alone (FedMKT). Where answers are texts, the blob
    is a `Told`.
    """

    blob: str
    count: int
    label_weight: float
    batch_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.label_weight <= 1 or not 1 <= self.batch_size <= 4096:
            raise SettingsError("lesson.label_weight must be in [0, 1], lesson.batch_size 1 to 4096")


class Told(Message, frozen=True):
    """What the server's LLM says of public answers, and how it spells them; all in blobs.

    Args:
        texts: lines of `Text`. knowledge: its likeliest tokens at each position of their answers (`knowledge.unpack`).
        tokenizer: its `tokenizer.json`. task: how it is asked. end: the token that closes its answers, None for none.
    """

    texts: File
    knowledge: File
    tokenizer: File
    task: Task
    end: int | None


class Train(Message, frozen=True, tag="train", tag_field="verb"):
    """Start from the global adapter of `version`, learn from private data, send the difference.

    `seed` orders the examples, so a device that lost power repeats the same work and sends the same bytes.

    Args:
        synthetic: texts of the feed to learn from too.
        share: whether the difference is sent; else the device keeps what it learned, and answers `Trained`.
        lesson: public texts to learn from too, and the device goes on from its own adapter, where it has one.
        masked: the difference waits on the device until a cohort averages it; it answers `Trained`, without numbers.
        upload: how the numbers of the difference travel.
    """

    version: int
    adapter: str
    training: Training
    soft: SoftLabels | None
    seed: int
    synthetic: Mix | None = None
    share: bool = True
    masked: bool = False
    lesson: Lesson | None = None
    upload: Encoding = "fp32"


class Predict(Message, frozen=True, tag="predict", tag_field="verb"):
    """Judge the `count` synthetic texts of sheet `version`, the blob `sheet` of `size` bytes: what class is each?

    The device answers with the adapter it trained last, or the global one, `adapter`, where it has trained none. Where answers
    are texts, it tells the `top_k` likeliest tokens at each position of the answers that the sheet holds.
    """

    version: int
    adapter: str
    sheet: str
    size: int
    count: int
    form: Form
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.top_k <= MAX_K:
            raise SettingsError(f"predict.top_k must be 0 to {MAX_K}")


class Evaluate(Message, frozen=True, tag="evaluate", tag_field="verb"):
    """Measure the global adapter of `version` on held-out private data, send numbers only."""

    version: int
    adapter: str


class Wait(Message, frozen=True, tag="wait", tag_field="verb"):
    """Nothing to do now; ask again after `seconds`."""

    seconds: float


class Finished(Message, frozen=True, tag="finished", tag_field="verb"):
    """The run is over; `adapter` of `version` is its result."""

    version: int
    adapter: str


Work = Train | Predict | Evaluate | Wait | Finished | Request


class Update(Message, frozen=True, tag="update", tag_field="result"):
    """Device -> server, beside the tensors of adapter(trained) - adapter(version) for the part that was trained.

    `layers` and `rank` name that part as `Manifest.part` does; 0 for all. `encoding` says how the numbers are written, whatever
    the server asked for.
    """

    device: str
    version: int
    num_examples: int
    metrics: Metrics
    layers: int = 0
    rank: int = 0
    encoding: Encoding = "fp32"


class Evaluation(Message, frozen=True, tag="evaluation", tag_field="result"):
    """Device -> server: metrics of the global adapter of `version` on `num_examples` held-out examples."""

    device: str
    version: int
    num_examples: int
    metrics: Metrics


class Trained(Message, frozen=True, tag="trained", tag_field="result"):
    """Device -> server: what it learned from the adapter of `version` stays on the device; numbers only."""

    device: str
    version: int
    num_examples: int
    metrics: Metrics


class Judgment(Message, frozen=True, tag="judgment", tag_field="result"):
    """Device -> server, beside one tensor of bytes (see `judgments.py`): what it makes of the texts of sheet `version`.

    Args:
        num_examples: how many labelled examples of its own it rests on.
        metrics: `accuracy` on its own held-out data, where it has some.
        covers: classes it has examples of.
    """

    device: str
    version: int
    num_examples: int
    metrics: Metrics
    covers: tuple[int, ...] = ()


Result = Update | Judgment | Evaluation | Trained


class Text(Message, frozen=True, omit_defaults=True):
    """One line of a sheet: a synthetic text to be judged, and the class it was written for; or a public text and its answer."""

    id: str
    text: str
    label: int
    answer: str = ""


class Sample(Message, frozen=True, tag="sample", tag_field="line"):
    """One line of the feed of synthetic data: a text that devices judged good.

    Args:
        seq: the line's number; ask for what comes after it.
        label: the class it was written for. soft: the judges' probabilities (n_classes,). quality: that of `label`.
        version: of the LLM that wrote it. model: its name. adapter: sha256 of its adapter, "" for the base.
    """

    seq: int
    id: str
    text: str
    label: str
    soft: tuple[float, ...]
    quality: float
    version: int
    model: str
    adapter: str


class Withdrawal(Message, frozen=True, tag="withdrawal", tag_field="line"):
    """One line of the feed: sample `id` shall not be used any more; devices drop it."""

    seq: int
    id: str


Line = Sample | Withdrawal


class Withdraw(Message, frozen=True):
    """Operator -> server: sample `id` shall not be used any more."""

    id: str


class Receipt(Message, frozen=True):
    """Server -> device: the result is on disk; `id` names it, `version` is the server's newest."""

    id: str
    version: int


class Problem(Message, frozen=True):
    """RFC 9457 problem document, `application/problem+json`; `code` is stable, `detail` is for people."""

    type: str
    title: str
    status: int
    code: str
    detail: str


class DeviceStatus(Message, frozen=True):
    """What the server knows of one device."""

    id: str
    name: str
    updates: int
    uploaded_bytes: int


class Measurement(Message, frozen=True):
    """One result's numbers as the server keeps them; `kind` is `update`, `evaluation`, `kept` or `judgment`."""

    kind: str
    device: str
    version: int
    num_examples: int
    metrics: Metrics


class SheetStatus(Message, frozen=True):
    """Synthetic texts of one version: how many were written, who judged them, how many were good; -1 while that is open."""

    written: int
    judges: int
    accepted: int
    acceptance: float


class Status(Message, frozen=True):
    """Server -> operator: where the run stands; `adapters` names that of every version, from 0 on."""

    system: str
    version: int
    adapter: str
    buffered: int
    finished: bool
    devices: tuple[DeviceStatus, ...]
    measurements: tuple[Measurement, ...]
    sheets: tuple[SheetStatus, ...] = ()
    adapters: tuple[str, ...] = ()
