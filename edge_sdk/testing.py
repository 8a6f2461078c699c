"""A server in memory, for testing code that uses the SDK: same protocol, same bytes, no sockets.

    simulator = ServerSimulator(manifest, work=[Train(...), Finished(...)], blobs={sha256: body})
    await Agent(store, simulator, cache, "name").run()
    assert simulator.results[0].num_examples == 16

Set `offline = True` and nothing is reached; put a `WireError` into `refusals` and the next result is refused with it. What
devices say in secure averaging is in `answers`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_sdk import exchange, knowledge
from edge_sdk.bundle import TOKENIZER
from edge_sdk.cohort import Advertise, Answer, Reveal, Shares
from edge_sdk.errors import Unreachable, WireError
from edge_sdk.exchange import Voice
from edge_sdk.judgments import width
from edge_sdk.protocol import (
    Ask,
    Enroll,
    Evaluation,
    Line,
    Manifest,
    Predict,
    Problem,
    Receipt,
    Result,
    Text,
    Train,
    Trained,
    Wait,
    Work,
)
from edge_sdk.tokens import PromptEncoder
from edge_sdk.transport import Response
from edge_sdk.wire import (
    JUDGMENT_TYPE,
    MASKED_TYPE,
    MAX_JSON,
    PROBLEM_TYPE,
    TENSORS_TYPE,
    decode,
    encode,
    pack_lines,
    unpack,
    unpack_judgment,
    unpack_lines,
    unpack_masked,
    update_shapes,
)


class ServerSimulator:
    """Hands out `work` in order, then `Wait`, and keeps what devices send.

    Args:
        manifest: told to every device.
        work: one item for each question.
        blobs: sha256 -> bytes.
    """

    def __init__(self, manifest: Manifest, work: Sequence[Work] = (), blobs: Mapping[str, bytes] | None = None) -> None:
        self.manifest = manifest
        self.work = list(work)
        self.blobs = dict(blobs or {})
        self.feed: list[Line] | None = []  # of synthetic data; None for a run that has none
        self.sheet: Predict | None = None  # the last one handed out
        self.results: list[Result] = []
        self.answers: list[Answer] = []  # of secure averaging
        self.bodies: list[bytes] = []  # of results and answers, as they came
        self.requests: list[tuple[str, str]] = []
        self.refusals: list[WireError] = []
        self.offline = False

    def keep(self, body: bytes) -> str:
        """Serves `body` as a blob and returns its sha256."""
        sha256 = hashlib.sha256(body).hexdigest()
        self.blobs[sha256] = body
        return sha256

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        into: Path | None = None,
        limit: int = MAX_JSON,
    ) -> Response:
        self.requests.append((method, path))
        if self.offline:
            raise Unreachable("the simulated server is offline")
        try:
            answer = self._answer(path, body, dict(headers or {}))
        except WireError as error:
            problem = Problem(f"urn:tandem-edge:{error.code}", error.code, error.status, error.code, error.detail)
            return Response(error.status, encode(problem), {"Content-Type": PROBLEM_TYPE})
        if len(answer) > limit:
            raise Unreachable(f"the answer is longer than {limit} bytes")
        if into is not None:
            into.write_bytes(answer)  # noqa: ASYNC240  # a simulator may block
            return Response(200)
        return Response(200, answer)

    def _answer(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        match path.split("/")[2:]:
            case ["enroll"]:
                decode(body, Enroll)
                return encode(self.manifest)
            case ["work"]:
                ask = decode(body, Ask)
                skip = self.work and isinstance(self.work[0], Train) and not ask.can_train
                work = self.work.pop(0) if self.work and not skip else Wait(1.0)
                self.sheet = work if isinstance(work, Predict) else self.sheet
                return encode(work)
            case ["results"]:
                if self.refusals:
                    raise self.refusals.pop(0)
                result = self._result(body, headers.get("Content-Type", ""))
                self.bodies.append(body)
                if isinstance(result, Answer):
                    self.answers.append(result)
                    return encode(Receipt(hashlib.sha256(body).hexdigest(), 0))
                self.results.append(result)
                return encode(Receipt(hashlib.sha256(body).hexdigest(), result.version))
            case [query] if query.startswith("synthetic?"):
                if self.feed is None:
                    raise WireError("wrong-system", "this run has no synthetic data", 404)
                since, limit = (int(part.split("=")[1]) for part in query.partition("?")[2].split("&"))
                return pack_lines(self.feed[since : since + limit])
            case ["blobs", sha256] if sha256 in self.blobs:
                return self.blobs[sha256]
            case _:
                raise WireError("http-404", f"no {path}", 404)

    def _result(self, body: bytes, content_type: str) -> Result | Answer:
        if content_type == TENSORS_TYPE:
            return unpack(body, update_shapes(self.manifest))[0]
        if content_type == JUDGMENT_TYPE:
            if (sheet := self.sheet) is None:
                raise WireError("unknown-sheet", "no sheet was handed out", 409)
            if self.manifest.task.answer_tokens:
                return knowledge.unpack_judgment(body, lambda _: self._spelled(sheet), MAX_JSON, sheet.top_k)[0]
            classes = len(self.manifest.task.labels)
            return unpack_judgment(body, lambda _: (sheet.count, width(sheet.form, classes)))[0]
        if content_type == MASKED_TYPE:
            length = sum(math.prod(shape) for shape in self.manifest.adapter.update_shapes().values())
            return unpack_masked(body, length + 1)[0]
        kinds = Evaluation | Trained | Advertise | Shares | Reveal
        report: Result | Answer = decode(body, kinds)  # type: ignore[arg-type]  # a union is fine for msgspec
        return report

    def _spelled(self, sheet: Predict) -> knowledge.Sheet:
        """The answers of a sheet as this run's model spells them."""
        bundle, task = self.manifest.bundle, self.manifest.task
        tokenizer = self.blobs[bundle.files[TOKENIZER].sha256].decode()
        encoder = PromptEncoder(tokenizer, bundle.prefix, bundle.suffix, bundle.positions, task)
        public = unpack_lines(self.blobs[sheet.sheet], Text)
        return exchange.sheet(Voice(encoder, next(iter(bundle.end), None)), public)
