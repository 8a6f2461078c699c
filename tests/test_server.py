"""HTTP over a real socket: what devices get, and that nothing they send brings the server down or leaves a trace."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import random
import re
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from aiohttp import ClientError, ClientResponse, ClientSession, web
from numpy.typing import NDArray
from safetensors.numpy import save
from yarl import URL

from edge_sdk import wire
from edge_sdk.adapters import read_peft
from edge_sdk.bundle import File
from edge_sdk.cohort import SEALED, SHARE, Advertise, Join, Mask, Masked, Reveal, SealShares, Shares, Unmask
from edge_sdk.errors import Refused, WireError
from edge_sdk.protocol import (
    PROTOCOL,
    Ask,
    Enroll,
    Evaluation,
    Judgment,
    Line,
    Manifest,
    Message,
    Predict,
    Problem,
    Receipt,
    Sample,
    Train,
    Trained,
    Wait,
    Withdraw,
    Withdrawal,
    Work,
)
from edge_sdk.transport import Api, HttpTransport
from edge_sdk.wire import JSON_TYPE, JUDGMENT_TYPE, MASKED_TYPE, MAX_JSON, PROBLEM_TYPE, TENSORS_TYPE, encode
from edge_server import cli, handlers
from edge_server import ledger as ledgers
from edge_server.app import create_app
from edge_server.cohorts import Secure
from edge_server.compute import JobFailed
from edge_server.handlers import MAX_CALL
from edge_server.unmasking import Cohort
from tests import factories
from tests import server_helpers as helpers
from tests.server_helpers import Running, Simulator, judgment, running, settings, sheet, tensors, upload, with_llm, with_message
from tests.test_secure_ledger import Device

ROOT = Path(__file__).parent.parent
EVALUATION = {"result": "evaluation", "device": "d2", "version": 3, "num_examples": 20, "metrics": {"accuracy": 0.75}}
UPDATE = {"result": "update", "device": "d2", "version": 3, "num_examples": 20, "metrics": {"loss": 0.5}}
DELTA = helpers.delta()
HEADER, DATA = helpers.parts(upload("d2", 3))
A = factories.SLOTS[0].a  # name of one tensor


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    """A fresh run that knows the devices d1 and d2; two updates make a version."""
    async with running(tmp_path) as made:
        await made.enroll("d1", "d2")
        yield made


@pytest.fixture
async def at_3(tmp_path: Path) -> AsyncIterator[Running]:
    """A run at version 3, all made from updates of d1; updates may be 1 version old."""
    async with running(tmp_path, settings(buffer_size=1, max_staleness=1)) as made:
        await made.enroll("d1", "d2")
        for version in range(3):
            await made.send(upload("d1", version))
            await made.reaches(version + 1)
        yield made


async def post(server: Running, path: str, body: Any, kind: str = JSON_TYPE, **headers: str) -> ClientResponse:
    return await server.client.post(path, data=body, headers={"Content-Type": kind, **headers})


async def problem(answer: ClientResponse) -> Problem:
    """The problem document of a refused request, with every field as RFC 9457 and our protocol want it."""
    assert answer.content_type == PROBLEM_TYPE
    document = wire.decode(await answer.read(), Problem)
    assert document.type == f"urn:tandem-edge:{document.code}"
    assert document.title == document.code.replace("-", " ")
    assert document.status == answer.status
    assert document.detail
    return document


async def traces(server: Running) -> tuple[object, ...]:
    """Everything a refused request must leave as it was."""
    answer = await server.client.get("/readyz")
    assert (answer.status, await answer.text()) == (200, "ok\n")
    return await server.status(), server.ledger.state, helpers.blobs(server.data), helpers.events(server.data)


def changed(message: Mapping[str, object], **changes: object) -> bytes:
    return json.dumps({**message, **changes}).encode()


def without(message: Mapping[str, object], key: str) -> bytes:
    return json.dumps({name: value for name, value in message.items() if name != key}).encode()


def packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A valid update but for its tensors, whose types are kept."""
    return bytes(save(dict(arrays), {"message": json.dumps(UPDATE)}))


def poisoned(value: float) -> bytes:
    """A valid update but for one number."""
    array = DELTA[A].copy()
    array[1, 2] = value
    return packed({**DELTA, A: array})


# A device's way through a run -----------------------------------------------------------------------------------------
async def test_a_device_enrols_works_and_is_counted(tmp_path: Path) -> None:
    """Enrol, work, upload: two updates make a version, and the status says so."""
    run = settings()
    start = hashlib.sha256(wire.pack_adapter(factories.SPEC.start(0))).hexdigest()
    async with running(tmp_path, run) as server:
        manifest = wire.decode(await (await post(server, "/v1/enroll", encode(Enroll(PROTOCOL, "d1", "one")))).read(), Manifest)
        await server.enroll("d2")
        work = wire.decode(await (await post(server, "/v1/work", encode(Ask("d1", True)))).read(), Train)
        bodies = [upload("d1", work.version, 1), upload("d2", work.version, 2)]
        receipts = [await server.send(body) for body in bodies]
        await server.reaches(1)
        status = await server.status()

    assert manifest == server.ledger.manifest
    assert work == Train(0, start, run.lpfl.training, run.lpfl.soft, 1)
    assert [receipt.version for receipt in receipts] == [0, 0]
    assert (status.version, status.buffered, status.finished) == (1, 0, False)
    assert {(device.id, device.updates, device.uploaded_bytes) for device in status.devices} == {
        ("d1", 1, len(bodies[0])),
        ("d2", 1, len(bodies[1])),
    }
    assert [(m.kind, m.device, m.version, m.num_examples) for m in status.measurements] == [
        ("update", "d1", 0, 10),
        ("update", "d2", 0, 10),
    ]


async def test_the_new_version_is_the_fold_of_the_uploads(server: Running) -> None:
    """The bytes behind the new version's sha256 are the start plus the weighted mean of what was uploaded."""
    await server.send(upload("d1", 0, seed=1, num_examples=10))
    await server.send(upload("d2", 0, seed=2, num_examples=30))
    await server.reaches(1)
    answer = await server.client.get(f"/v1/blobs/{(await server.status()).adapter}")
    arrays = wire.unpack_adapter(await answer.read(), helpers.SHAPES)

    for name, start in factories.SPEC.start(0).items():
        d1, d2 = (helpers.delta(seed)[name].astype(np.float64) for seed in (1, 2))
        assert (arrays[name] == start + ((10 * d1 + 30 * d2) / 40).astype(np.float32)).all()


async def test_a_device_that_has_sent_waits(server: Running) -> None:
    """The device is not asked for a second update of the same version, and waits half to one and a half times `wait_seconds`."""
    await server.send(upload("d1", 0))
    answer = await post(server, "/v1/work", encode(Ask("d1", True)))

    assert 0.125 <= wire.decode(await answer.read(), Wait).seconds < 0.375


async def test_a_repeated_upload_gets_the_first_receipt(server: Running) -> None:
    """Also after the version was made, when the same update would be new again to a forgetful server."""
    first = await server.send(upload("d1", 0))
    again = [await server.send(upload("d1", 0)) for _ in range(3)]
    buffered = (await server.status()).buffered
    await server.send(upload("d2", 0))
    await server.reaches(1)

    assert again == [first] * 3
    assert buffered == 1
    assert await server.send(upload("d1", 0)) == first
    assert [device.updates for device in (await server.status()).devices] == [1, 1]


async def test_the_same_numbers_count_once_for_a_device_and_a_version(at_3: Running) -> None:
    """Under another id, of this version or an older one, they are refused; of the next version, or another device, they count."""
    before = await traces(at_3)
    for version in range(3):
        again = upload("d1", version, num_examples=11)
        refused = await problem(await post(at_3, "/v1/results", again, TENSORS_TYPE))
        assert (refused.code, refused.status) == ("already-answered", 409)
    assert await traces(at_3) == before
    receipts = [await at_3.send(body) for body in (upload("d1", 2), upload("d1", 3), upload("d2", 3))]

    assert len({receipt.id for receipt in receipts}) == 3
    assert [(d.id, d.updates) for d in (await at_3.status()).devices] == [("d1", 4), ("d2", 1)]


async def test_an_evaluation_is_answered_and_shown(at_3: Running) -> None:
    """Numbers of a device that does not train reach the status, once."""
    answers = [await post(at_3, "/v1/results", changed(EVALUATION)) for _ in range(2)]
    receipts = [wire.decode(await answer.read(), Receipt) for answer in answers]
    status = await at_3.status()

    assert receipts[0] == receipts[1]
    assert [(m.device, m.version, m.num_examples, m.metrics) for m in status.measurements if m.kind == "evaluation"] == [
        ("d2", 3, 20, {"accuracy": 0.75})
    ]


async def test_a_compressed_upload_is_the_same_upload(server: Running) -> None:
    """Content-Encoding belongs to the transport: the update is named by its own bytes."""
    first = await server.send(upload("d1", 0))
    answer = await post(server, "/v1/results", gzip.compress(upload("d1", 0)), TENSORS_TYPE, **{"Content-Encoding": "gzip"})

    assert wire.decode(await answer.read(), Receipt) == first


async def test_every_version_loads_as_peft(at_3: Running) -> None:
    """Every folder under versions/ is an adapter of this base model."""
    for version in range(4):
        arrays, spec = read_peft(at_3.data / "versions" / f"{version:04d}", factories.SLOTS)
        assert spec == factories.SPEC
        assert all(np.isfinite(array).all() for array in arrays.values())


async def test_a_restart_serves_the_same_run(tmp_path: Path) -> None:
    """On the same folder a new server is at the same version, with the same adapter, devices and receipts."""
    async with running(tmp_path) as server:
        await server.enroll("d1", "d2")
        receipt = await server.send(upload("d1", 0))
        await server.send(upload("d2", 0))
        await server.reaches(1)
        before = await server.status()
        adapter = await (await server.client.get(f"/v1/blobs/{before.adapter}")).read()
    async with running(tmp_path) as again:
        assert await again.status() == before
        assert await (await again.client.get(f"/v1/blobs/{before.adapter}")).read() == adapter
        assert await again.send(upload("d1", 0)) == receipt
        assert (await again.status()).version == 1


# Blobs ----------------------------------------------------------------------------------------------------------------
async def test_a_blob_is_its_bytes(server: Running) -> None:
    """A blob comes as octets of exactly its length."""
    answer = await server.client.get(f"/v1/blobs/{server.ledger.state.adapter}")

    assert (answer.status, answer.content_type) == (200, "application/octet-stream")
    assert await answer.read() == server.ledger.blobs.get(server.ledger.state.adapter)


@pytest.mark.parametrize(
    ("asked", "part"), [("bytes=100-", slice(100, None)), ("bytes=7-19", slice(7, 20)), ("bytes=-5", slice(-5, None))]
)
async def test_a_part_of_a_blob_can_be_asked_for(server: Running, asked: str, part: slice) -> None:
    """A download can be resumed: 206, the right bytes, and where they lie."""
    whole = server.ledger.blobs.get(server.ledger.state.adapter)
    answer = await server.client.get(f"/v1/blobs/{server.ledger.state.adapter}", headers={"Range": asked})
    start, stop, _ = part.indices(len(whole))

    assert answer.status == 206
    assert await answer.read() == whole[part]
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(whole)}"


async def test_the_devices_client_resumes_a_download(server: Running, tmp_path: Path) -> None:
    """`Api.blob` goes on behind the bytes it has, and checks the whole."""
    sha256 = server.ledger.state.adapter
    whole = server.ledger.blobs.get(sha256)
    (tmp_path / "adapter.part").write_bytes(whole[:200])
    async with HttpTransport(str(server.client.make_url("/"))) as transport:
        await Api(transport).blob(File(sha256, len(whole)), tmp_path / "adapter")

    assert (tmp_path / "adapter").read_bytes() == whole
    assert not (tmp_path / "adapter.part").exists()


@pytest.mark.parametrize(
    "name", ["0" * 64, "0" * 63, "A" * 64, "..%2Fevents.sqlite", "..%2F..%2F..%2Fetc%2Fpasswd", "%00", "incoming-"]
)
async def test_a_blob_that_is_none_is_not_found(server: Running, name: str) -> None:
    """Unknown hashes and paths in disguise are all the same 404."""
    answer = await server.client.get(URL(f"/v1/blobs/{name}", encoded=True))

    assert answer.status == 404
    assert (await problem(answer)).code == "unknown-blob"


# What is refused ------------------------------------------------------------------------------------------------------
async def test_a_page_that_is_none_is_a_problem_document(server: Running) -> None:
    """404 in the same form as every other refusal."""
    answer = await server.client.get("/v2/enroll")

    assert answer.status == 404
    assert (await problem(answer)).code == "http-404"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/results", {"POST"}), ("DELETE", "/v1/work", {"POST"}), ("POST", "/v1/status", {"GET", "HEAD"})],
)
async def test_a_wrong_method_is_a_problem_document(server: Running, method: str, path: str, allowed: set[str]) -> None:
    """405 says which methods there are, as HTTP wants it."""
    answer = await server.client.request(method, path)

    assert answer.status == 405
    assert (await problem(answer)).code == "http-405"
    assert set(answer.headers["Allow"].split(",")) == allowed


REFUSED_JSON = [
    pytest.param("/v1/enroll", b"", "bad-message", 400, id="no body"),
    pytest.param("/v1/enroll", b"{", "bad-message", 400, id="broken JSON"),
    pytest.param("/v1/enroll", b"\xff\xfe", "bad-message", 400, id="not UTF-8"),
    pytest.param("/v1/enroll", b"[]", "bad-message", 400, id="a list"),
    pytest.param("/v1/enroll", b"[" * MAX_CALL, "bad-message", 400, id="too deep"),
    pytest.param("/v1/enroll", b'{"protocol":1,"device":"d9","name":"x","admin":true}', "bad-message", 400, id="unknown field"),
    pytest.param("/v1/enroll", b'{"protocol":1,"device":"d9"}', "bad-message", 400, id="missing field"),
    pytest.param("/v1/enroll", b'{"protocol":"1","device":"d9","name":"x"}', "bad-message", 400, id="wrong type"),
    pytest.param("/v1/enroll", encode(Enroll(1, "d9", "x")), "wrong-protocol", 400, id="another protocol"),
    pytest.param("/v1/enroll", encode(Enroll(PROTOCOL, "../../d9", "x")), "bad-device", 400, id="a path as id"),
    pytest.param("/v1/enroll", encode(Enroll(PROTOCOL, "d9", "\x1b[2J")), "bad-device", 400, id="a name of control characters"),
    pytest.param("/v1/enroll", b" " * (MAX_CALL + 1), "too-large", 413, id="a message too long"),
    pytest.param("/v1/work", encode(Ask("stranger", True)), "unknown-device", 403, id="work for a stranger"),
    pytest.param("/v1/work", b'{"device":"d2"}', "bad-message", 400, id="ask without can_train"),
    pytest.param("/v1/results", changed(EVALUATION, device="stranger"), "unknown-device", 403, id="numbers of a stranger"),
    pytest.param("/v1/results", changed(EVALUATION, version=4), "unknown-version", 409, id="numbers of the future"),
    pytest.param("/v1/results", changed(EVALUATION, version=-1), "bad-message", 400, id="numbers of version -1"),
    pytest.param("/v1/results", changed(EVALUATION, num_examples=-1), "bad-message", 400, id="negative examples"),
    pytest.param("/v1/results", changed(EVALUATION, num_examples=10**7 + 1), "bad-message", 400, id="too many examples"),
    pytest.param("/v1/results", changed(EVALUATION, num_examples=10**40), "bad-message", 400, id="an endless number"),
    pytest.param("/v1/results", changed(EVALUATION, metrics={"a": None}), "bad-message", 400, id="a metric that is none"),
    pytest.param("/v1/results", changed(EVALUATION, metrics={str(i): 0 for i in range(65)}), "bad-message", 400, id="65 metrics"),
    pytest.param("/v1/results", changed(EVALUATION, metrics={"m" * 65: 0.0}), "bad-message", 400, id="a long metric"),
    pytest.param("/v1/results", b'{"result":"evaluation","device":"d2","version":3,"num_examples":1,"metrics":{"a":1e999}}',
                 "bad-message", 400, id="a metric beyond float64"),
    pytest.param("/v1/results", changed(EVALUATION, accuracy=1.0), "bad-message", 400, id="an extra field"),
    pytest.param("/v1/results", without(EVALUATION, "version"), "bad-message", 400, id="no version"),
    pytest.param("/v1/results", changed(UPDATE), "bad-message", 400, id="an update without tensors"),
    pytest.param("/v1/results", upload("d2", 3), "bad-message", 400, id="tensors as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "code", "status"), REFUSED_JSON)
async def test_a_bad_message_is_refused_without_a_trace(at_3: Running, path: str, body: bytes, code: str, status: int) -> None:
    """Whatever is wrong with a message has its code, and changes nothing."""
    before = await traces(at_3)
    answer = await post(at_3, path, body)
    document = await problem(answer)

    assert (document.code, document.status) == (code, status)
    assert await traces(at_3) == before


def span(begin: object, end: object, **changes: object) -> bytes:
    """A valid body but for where the header says one tensor lies, or of which type it is."""
    return tensors({**HEADER, A: {**HEADER[A], "data_offsets": [begin, end], **changes}}, DATA)


REFUSED_TENSORS = [
    pytest.param(poisoned(np.nan), "not-finite", 422, id="NaN"),
    pytest.param(poisoned(-np.inf), "not-finite", 422, id="infinity"),
    pytest.param(packed({**DELTA, A: np.zeros((3, 6), np.float32)}), "wrong-shape", 422, id="another rank"),
    pytest.param(packed({**DELTA, A: DELTA[A].T.copy()}), "wrong-shape", 422, id="transposed"),
    pytest.param(packed({**DELTA, A: np.zeros((2, 6))}), "wrong-shape", 422, id="float64"),
    pytest.param(packed({f"my.{name}": array for name, array in DELTA.items()}), "wrong-shape", 422, id="other names"),
    pytest.param(packed({**DELTA, "more": DELTA[A]}), "wrong-shape", 422, id="one tensor more"),
    pytest.param(packed({A: DELTA[A]}), "wrong-shape", 422, id="one tensor only"),
    pytest.param(packed({}), "wrong-shape", 422, id="no tensors"),
    pytest.param(b"", "bad-tensors", 400, id="no body"),
    pytest.param(upload("d2", 3)[:7], "bad-tensors", 400, id="cut in the length"),
    pytest.param(upload("d2", 3)[:100], "bad-tensors", 400, id="cut in the header"),
    pytest.param(upload("d2", 3)[:-1], "bad-tensors", 400, id="cut in the data"),
    pytest.param(upload("d2", 3) + b"\0", "bad-tensors", 400, id="a byte too many"),
    pytest.param(b"\xff" * 1000, "bad-tensors", 400, id="a header of 2^64 bytes"),
    pytest.param(tensors(b"{"), "bad-tensors", 400, id="a header that is not JSON"),
    pytest.param(tensors([]), "bad-tensors", 400, id="a header that is a list"),
    pytest.param(tensors(b'{"a":' * 5000 + b"1" + b"}" * 5000), "bad-tensors", 400, id="a deep header"),
    pytest.param(tensors({str(i): 0 for i in range(5000)}), "bad-tensors", 400, id="5000 tensors"),
    pytest.param(span(0, 2**62), "bad-tensors", 400, id="a tensor beyond the end"),
    pytest.param(span(-48, 0), "bad-tensors", 400, id="a tensor before the start"),
    pytest.param(span(4, 52), "bad-tensors", 400, id="overlapping tensors"),
    pytest.param(span(0.0, 48.5), "wrong-shape", 422, id="offsets between bytes"),
    pytest.param(span(0, 48, dtype="I32"), "wrong-shape", 422, id="int32"),
    pytest.param(span(0, 48, dtype="F16"), "wrong-shape", 422, id="float16"),
    pytest.param(span(0, 48, shape=[2**40, 2**40]), "wrong-shape", 422, id="a shape of 2^80"),
    pytest.param(span(0, 48, shape=[-2, -6]), "wrong-shape", 422, id="a negative shape"),
    pytest.param(span(0, 48, shape="26"), "wrong-shape", 422, id="a shape of letters"),
    pytest.param(tensors(json.dumps({**HEADER, "\ud800": HEADER[A]}).encode(), DATA), "bad-tensors", 400, id="half a surrogate"),
    pytest.param(tensors({n: v for n, v in HEADER.items() if n != "__metadata__"}, DATA), "bad-message", 400, id="no metadata"),
    pytest.param(tensors({**HEADER, "__metadata__": {}}, DATA), "bad-message", 400, id="no message"),
    pytest.param(tensors({**HEADER, "__metadata__": [1]}, DATA), "bad-tensors", 400, id="metadata that are a list"),
    pytest.param(with_message("{"), "bad-message", 400, id="a broken message"),
    pytest.param(with_message({**UPDATE, "extra": 1}), "bad-message", 400, id="an extra field"),
    pytest.param(with_message(EVALUATION), "bad-message", 400, id="an evaluation beside tensors"),
    pytest.param(with_message({**UPDATE, "num_examples": 0}), "bad-message", 400, id="an update of no examples"),
    pytest.param(with_message({**UPDATE, "num_examples": -5}), "bad-message", 400, id="negative examples"),
    pytest.param(with_message({**UPDATE, "num_examples": 2**70}), "bad-message", 400, id="2^70 examples"),
    pytest.param(with_message({**UPDATE, "version": -1}), "bad-message", 400, id="version -1"),
    pytest.param(with_message({**UPDATE, "metrics": {str(i): 1 for i in range(65)}}), "bad-message", 400, id="65 metrics"),
    pytest.param(with_message(json.dumps(UPDATE).replace("0.5", "1e999")), "bad-message", 400, id="a metric beyond float64"),
    pytest.param(with_message(json.dumps(UPDATE).replace("0.5", "NaN")), "bad-message", 400, id="a metric that is NaN"),
    pytest.param(with_message({**UPDATE, "device": "stranger"}), "unknown-device", 403, id="a stranger"),
    pytest.param(with_message({**UPDATE, "device": "d" * 100_000}), "unknown-device", 403, id="a long stranger"),
    pytest.param(with_message({**UPDATE, "version": 4}), "unknown-version", 409, id="a version of the future"),
    pytest.param(with_message({**UPDATE, "version": 2**70}), "unknown-version", 409, id="version 2^70"),
    pytest.param(with_message({**UPDATE, "version": 1}), "too-stale", 409, id="too stale"),
    pytest.param(upload("d1", 2, seed=7), "already-answered", 409, id="a second update of a version"),
    pytest.param(upload("d1", 2, num_examples=11), "already-answered", 409, id="the same tensors under another claim"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "status"), REFUSED_TENSORS)
async def test_a_bad_upload_is_refused_without_a_trace(at_3: Running, body: bytes, code: str, status: int) -> None:
    """Whatever is wrong with an update has its code; no blob, no event, no version comes of it."""
    before = await traces(at_3)
    answer = await post(at_3, "/v1/results", body, TENSORS_TYPE)
    document = await problem(answer)

    assert (document.code, document.status) == (code, status)
    assert await traces(at_3) == before


async def test_the_refused_uploads_are_wrong_in_one_thing_only(at_3: Running) -> None:
    """The bodies the cases above start from are accepted as they are."""
    first = await at_3.send(tensors(HEADER, DATA))
    await at_3.reaches(4)
    second = await at_3.send(with_message({**UPDATE, "version": 4}))

    assert (first.version, second.version) == (3, 4)
    assert [device.updates for device in (await at_3.status()).devices] == [3, 2]


async def test_the_refused_messages_are_wrong_in_one_thing_only(at_3: Running) -> None:
    """The evaluation the cases above start from is accepted as it is."""
    assert (await post(at_3, "/v1/results", changed(EVALUATION))).status == 200


@pytest.mark.parametrize("kind", ["", "text/plain", "application/octet-stream", "application/x-python-pickle", ";;;"])
async def test_another_content_type_is_refused(at_3: Running, kind: str) -> None:
    """Results are safetensors or JSON; nothing is guessed from the bytes."""
    before = await traces(at_3)
    document = await problem(await post(at_3, "/v1/results", upload("d2", 3), kind))

    assert (document.code, document.status) == ("wrong-type", 415)
    assert await traces(at_3) == before


async def chunks(total: int) -> AsyncIterator[bytes]:
    """A body that does not say how long it will be."""
    for _ in range(total >> 16):
        yield bytes(1 << 16)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("path", "kind"), [("/v1/results", TENSORS_TYPE), ("/v1/results", JSON_TYPE), ("/v1/work", JSON_TYPE)])
async def test_a_body_over_the_limit_is_refused(at_3: Running, path: str, kind: str, chunked: bool) -> None:
    """With a Content-Length and without, a body ends where the limit is."""
    before = await traces(at_3)
    size = 2 * at_3.ledger.body_limit
    document = await problem(await post(at_3, path, chunks(size) if chunked else bytes(size), kind))

    assert (document.code, document.status) == ("too-large", 413)
    assert await traces(at_3) == before


async def test_the_limit_itself_is_allowed(at_3: Running) -> None:
    """A body of the largest size is refused for what it holds, one of a byte more for its size."""
    limit = at_3.ledger.body_limit
    bodies = [upload("d2", 3).ljust(size, b"\0") for size in (limit, limit + 1)]

    assert [(await problem(await post(at_3, "/v1/results", body, TENSORS_TYPE))).code for body in bodies] == [
        "bad-tensors",
        "too-large",
    ]


async def test_a_compressed_bomb_is_refused(at_3: Running) -> None:
    """The limit holds for what comes out of a compressed body: 50 MB in 50 kB are not kept."""
    before = await traces(at_3)
    bomb = gzip.compress(bytes(50 << 20))
    document = await problem(await post(at_3, "/v1/results", bomb, TENSORS_TYPE, **{"Content-Encoding": "gzip"}))

    assert len(bomb) < 100_000
    assert (document.code, document.status) == ("too-large", 413)
    assert await traces(at_3) == before


async def test_a_body_that_is_not_compressed_as_it_says_is_refused(at_3: Running) -> None:
    """Broken compression is the sender's fault, not the server's."""
    before = await traces(at_3)
    document = await problem(await post(at_3, "/v1/results", upload("d2", 3), TENSORS_TYPE, **{"Content-Encoding": "gzip"}))

    assert (document.code, document.status) == ("bad-message", 400)
    assert await traces(at_3) == before


async def test_a_long_lie_gets_a_short_answer(at_3: Running) -> None:
    """A refusal quotes no more than a few words of what it refuses: answers stay below the client's limit."""
    answer = await post(at_3, "/v1/results", b'{"' + b"a" * 60_000 + b'":1}')

    assert (await problem(answer)).code == "bad-message"
    assert len(await answer.read()) < 2000


async def raw(server: Running, head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request written by hand, for what a well-behaved client does not send."""
    reader, writer = await asyncio.open_connection(server.client.host, server.client.port)
    writer.write(f"POST /v1/results HTTP/1.1\r\nHost: x\r\nContent-Type: {TENSORS_TYPE}\r\n{head}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def test_a_claimed_length_over_the_limit_is_refused_before_a_byte_is_read(at_3: Running) -> None:
    """A device that announces a terabyte need not send it to learn that it is too much."""
    before = await traces(at_3)
    reader, writer = await raw(at_3, "Content-Length: 1000000000000")
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    writer.close()

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert await traces(at_3) == before


async def test_an_upload_that_breaks_off_leaves_no_file(at_3: Running) -> None:
    """A device that hangs up in the middle of an upload leaves neither a file nor a trace."""
    before = await traces(at_3)
    _, writer = await raw(at_3, "Content-Length: 1000", upload("d2", 3)[:500])
    await helpers.until(lambda: any(name.startswith("incoming-") for name in helpers.blobs(at_3.data)))
    writer.close()
    await helpers.until(lambda: not any(name.startswith("incoming-") for name in helpers.blobs(at_3.data)))

    assert await traces(at_3) == before


async def test_http_that_is_none_does_not_stop_the_server(at_3: Running) -> None:
    """Requests that break HTTP itself are answered with a 4xx by the library, and change nothing."""
    before = await traces(at_3)
    for head in ("Content-Length: many", "Transfer-Encoding: chunked\r\n\r\nZZZ", "X: " + "a" * 20_000):
        reader, writer = await raw(at_3, head)
        assert (await asyncio.wait_for(reader.readline(), 60)).split()[1].startswith(b"4")
        writer.close()

    assert await traces(at_3) == before


async def test_no_damaged_upload_is_a_server_error(at_3: Running) -> None:
    """300 uploads with random bytes changed, cut or doubled: each is taken as an update or refused, never a 5xx."""
    rng = random.Random(11)
    blobs = helpers.blobs(at_3.data)
    codes: dict[str, int] = {}
    for _ in range(300):
        body = bytearray(upload("d2", 3))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(8 if rng.random() < 0.1 else len(body))
            match rng.choice(["flip", "cut", "double"]):
                case "flip":
                    body[at] ^= 1 << rng.randrange(8)
                case "cut":
                    del body[at : at + rng.randint(1, 9)]
                case _:
                    body[at:at] = body[at : at + rng.randint(1, 9)]
        try:
            answer = await post(at_3, "/v1/results", bytes(body), TENSORS_TYPE)
        except ClientError as error:
            pytest.fail(f"no answer to {bytes(body)!r}: {error}")
        code = "accepted" if answer.status == 200 else (await problem(answer)).code
        codes[code] = codes.get(code, 0) + 1

    assert "internal" not in codes
    assert {"bad-tensors", "wrong-shape", "bad-message"} <= codes.keys()
    await helpers.until(lambda: len(helpers.blobs(at_3.data)) <= len(blobs) + 2)  # one update and its version at most
    assert (await at_3.client.get("/readyz")).status == 200


async def test_the_devices_client_reads_the_refusals(server: Running) -> None:
    """What `edge_sdk.transport.Api` raises has the server's code and no wish for a retry."""
    async with HttpTransport(str(server.client.make_url("/"))) as transport:
        with pytest.raises(Refused) as refused:
            await Api(transport).send(JSON_TYPE, encode(Evaluation("stranger", 0, 1, {})))

    assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("unknown-device", 403, None)


async def test_messages_are_only_what_the_protocol_says(server: Running) -> None:
    """No answer holds a field its type does not know: each decodes strictly."""
    answers: list[tuple[ClientResponse, type[Message]]] = [
        (await post(server, "/v1/enroll", encode(Enroll(PROTOCOL, "d1", "x"))), Manifest),
        (await post(server, "/v1/work", encode(Ask("d1", True))), Train),
        (await post(server, "/v1/results", upload("d1", 0), TENSORS_TYPE), Receipt),
        (await post(server, "/v1/work", encode(Ask("d1", True))), Wait),
    ]

    for answer, kind in answers:
        assert answer.content_type == JSON_TYPE
        assert isinstance(wire.decode(await answer.read(), kind), kind)


async def test_trouble_with_a_version_is_told_to_whoever_watches(tmp_path: Path) -> None:
    """While no version can be made, `/readyz` answers 503 with the reason, and updates are still taken; then all is well."""
    async with helpers.running(tmp_path) as server:
        await server.enroll("d1", "d2", "d3")
        in_the_way = tmp_path / "versions" / "0001"
        in_the_way.write_text("not a folder")
        for device in ("d1", "d2"):
            await server.send(helpers.upload(device, 0))
        await helpers.until(lambda: bool(server.ledger.trouble))
        answer = await server.client.get("/readyz")
        assert answer.status == 503
        assert "version 1 cannot be made" in await answer.text()

        in_the_way.unlink()
        await server.send(helpers.upload("d3", 0))
        await server.reaches(1)
        await helpers.until(lambda: not server.ledger.trouble)
        assert (await server.client.get("/readyz")).status == 200


@pytest.mark.parametrize(("seconds", "told"), [(0.0, "1"), (0.01, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")])
def test_a_pause_is_told_in_whole_seconds_and_never_too_short(seconds: float, told: str) -> None:
    """`Retry-After` has no fractions: a device that comes back when it was told is not early; without a pause there is none."""
    assert handlers._problem(429, "too-often", "wait", seconds).headers["Retry-After"] == told
    assert "Retry-After" not in handlers._problem(400, "bad-message", "no").headers


async def test_a_body_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that stops in the middle of an upload is answered 408, and its half file is gone."""
    monkeypatch.setattr(handlers, "BODY_SECONDS", 0.05)
    async with helpers.running(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
        head = f"POST /v1/results HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.TENSORS_TYPE}\r\nContent-Length: 100\r\n\r\n"
        writer.write(head.encode() + b"abc")
        async with asyncio.timeout(handlers.IDLE_SECONDS / 2):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"too-slow" in answer
        assert not list((tmp_path / "blobs").glob("incoming-*"))
        writer.close()


@pytest.mark.parametrize("head", [b"", b"POST /v1/results HTTP/1.1\r\nHost: x\r\nX-Slow: a"], ids=["nothing", "half"])
async def test_a_head_that_never_ends_is_closed(tmp_path: Path, head: bytes) -> None:
    """Also of a connection on which a request was answered before; none of them is an error of the server's."""
    runner = cli._runner(create_app(helpers.open_ledger(tmp_path)), head_seconds=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        for before in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
            writer.write(before + head)
            async with asyncio.timeout(cli.HEAD_SECONDS / 2):
                assert (await reader.read()).startswith(b"HTTP/1.1 200 " if before else b"")
            writer.close()
    finally:
        await runner.cleanup()


# A run with an LLM ----------------------------------------------------------------------------------------------------
@asynccontextmanager
async def learning(data: Path, llm: Simulator | None = None) -> AsyncIterator[Running]:
    """A run with a simulated LLM that knows the devices d1 and d2, with its first sheet open."""
    async with running(data, with_llm(), llm or Simulator()) as made:
        await made.enroll("d1", "d2")
        await helpers.until(lambda: len(made.ledger.state.sheets) == 1)
        yield made


@pytest.fixture
async def judging(tmp_path: Path) -> AsyncIterator[Running]:
    async with learning(tmp_path) as made:
        yield made


@pytest.fixture
async def decided(judging: Running) -> Running:
    """Sheet 0 is decided: six samples are in the feed; sheet 1 is open."""
    for device in ("d1", "d2"):
        await judging.send(judgment(device, 0, sheet(judging.ledger)), JUDGMENT_TYPE)
    await helpers.until(lambda: len(judging.ledger.state.sheets) == 2)
    return judging


async def feed(server: Running, query: str = "") -> list[Line]:
    answer = await server.client.get(f"/v1/synthetic{query}")
    assert (answer.status, answer.content_type) == (200, "application/x-ndjson")
    return wire.unpack_lines(await answer.read(), Line)  # type: ignore[arg-type]  # a union is fine for msgspec


async def test_a_device_judges_over_http(judging: Running) -> None:
    """It trains, gets the sheet's blob, answers, and the status counts it; the same bytes again get the first receipt."""
    await post(judging, "/v1/results", encode(Trained("d1", 0, 10, {"accuracy": 0.5})))
    work = wire.decode(await (await post(judging, "/v1/work", encode(Ask("d1", True)))).read(), Predict)
    blob = await (await judging.client.get(f"/v1/blobs/{work.sheet}")).read()
    body = judgment("d1", work.version, sheet(judging.ledger))
    receipts = [await judging.send(body, JUDGMENT_TYPE) for _ in range(2)]
    status = await judging.status()

    assert (work.version, work.size, work.count) == (0, len(blob), 8)
    assert b"day:" not in blob  # prompts stay on the server
    assert receipts == [Receipt(wire.update_id("d1", 0, hashlib.sha256(body).hexdigest()), 0)] * 2
    assert [(s.written, s.judges, s.accepted) for s in status.sheets] == [(8, 1, -1)]
    assert [(m.kind, m.version) for m in status.measurements] == [("kept", 0), ("judgment", 0)]


async def test_the_feed_can_be_read_in_pages(decided: Running) -> None:
    """`since` is the last line somebody has, `limit` how many more it wants."""
    lines = await feed(decided)

    assert [line.seq for line in lines] == [1, 2, 3, 4, 5, 6]
    assert await feed(decided, "?since=4") == lines[4:]
    assert await feed(decided, "?since=1&limit=2") == lines[1:3]
    assert await feed(decided, "?limit=0") == await feed(decided, "?since=6") == await feed(decided, "?since=1099511627776") == []


@pytest.mark.parametrize(
    "query", ["since=-1", "since=", "since=a", "since=1.0", "since=%D9%A1", "since=1099511627777", "limit=1001", "limit=1e3"]
)
async def test_a_query_that_is_no_number_is_refused(decided: Running, query: str) -> None:
    """Whole ASCII numbers within bounds, nothing else."""
    answer = await decided.client.get(URL(f"/v1/synthetic?{query}", encoded=True))

    assert answer.status == 400
    assert (await problem(answer)).code == "bad-query"


async def test_a_feed_is_of_one_task(decided: Running) -> None:
    """Who names the task gets its lines; who names another is told which one it is."""
    other = await decided.client.get("/v1/synthetic?task=weather")

    assert await feed(decided, "?task=default&since=4") == (await feed(decided))[4:]
    assert (other.status, (await problem(other)).detail) == (404, "this feed is of the task 'default'")


async def test_a_page_that_has_not_changed_is_not_sent_again(decided: Running) -> None:
    """304 without a body for the ETag of the same page; another one once the feed has grown."""
    etag = (await decided.client.get("/v1/synthetic")).headers["ETag"]
    again = await decided.client.get("/v1/synthetic", headers={"If-None-Match": f'"other", {etag}'})
    other = await decided.client.get("/v1/synthetic?since=1", headers={"If-None-Match": etag})
    await post(decided, "/v1/synthetic/withdraw", encode(Withdraw((await feed(decided))[0].id)))
    grown = await decided.client.get("/v1/synthetic", headers={"If-None-Match": etag})

    whatever = await decided.client.get("/v1/synthetic", headers={"If-None-Match": "*"})

    assert etag.startswith('W/"')
    assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", etag)
    assert [other.status, grown.status, whatever.status] == [200, 200, 304]
    assert grown.headers["ETag"] not in (etag, other.headers["ETag"])


async def test_a_page_is_compressed_for_who_wants_it(decided: Running) -> None:
    """The same lines, with gzip and without."""
    url = decided.client.make_url("/v1/synthetic")
    async with ClientSession(auto_decompress=False) as session:
        packed = await session.get(url, headers={"Accept-Encoding": "gzip"})
        plain = await session.get(url, headers={"Accept-Encoding": "identity"})

        assert packed.headers["Content-Encoding"] == "gzip"
        assert "Content-Encoding" not in plain.headers
        assert packed.headers["ETag"] == plain.headers["ETag"]  # weak: not the same bytes
        assert packed.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
        assert gzip.decompress(await packed.read()) == await plain.read()


async def test_the_feed_is_exported_to_a_file(decided: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it cannot be written one sentence says so, and nothing is left behind."""
    (tmp_path / "folder").mkdir()
    url = str(decided.client.make_url("/"))
    codes = [
        await asyncio.to_thread(cli.main, ["synthetic", "export", url, str(tmp_path / name)])
        for name in ("feed.jsonl", "none/feed.jsonl", "folder", "feed.jsonl/x")
    ]
    said = capsys.readouterr().err.splitlines()

    assert codes == [0, 2, 2, 2]
    assert wire.unpack_lines((tmp_path / "feed.jsonl").read_bytes(), Sample) == await feed(decided)
    cannot = f"edge-server: cannot write {tmp_path}/none/feed.jsonl: No such file or directory; name a file in a folder"
    assert said[0].startswith(cannot)
    assert not list(tmp_path.rglob("*.part"))  # noqa: ASYNC240  # a test may block


async def test_a_sample_is_withdrawn_over_http(decided: Running) -> None:
    """The feed gets one line more, once; an unknown sample is a problem."""
    first = (await feed(decided))[0]
    answers = [await post(decided, "/v1/synthetic/withdraw", encode(Withdraw(first.id))) for _ in range(2)]
    unknown = await post(decided, "/v1/synthetic/withdraw", encode(Withdraw("nobody")))
    lines = await feed(decided)

    assert isinstance(first, Sample)
    assert [answer.status for answer in answers] == [200, 200]
    assert (unknown.status, (await problem(unknown)).code) == (404, "unknown-sample")
    assert lines[6:] == [Withdrawal(7, first.id)]


@pytest.mark.parametrize(
    ("method", "path", "kind", "body"),
    [
        ("GET", "/v1/synthetic", JSON_TYPE, b""),
        ("POST", "/v1/synthetic/withdraw", JSON_TYPE, encode(Withdraw("0-a"))),
        ("POST", "/v1/results", JUDGMENT_TYPE, wire.pack_judgment(Judgment("d1", 0, 1, {}), np.zeros((8, 2), np.uint8))),
        ("POST", "/v1/results", JSON_TYPE, encode(Trained("d1", 0, 10, {}))),
    ],
)
async def test_a_run_without_an_llm_has_no_synthetic_data(
    server: Running, method: str, path: str, kind: str, body: bytes
) -> None:
    """Everything that belongs to another system is one 404."""
    before = await traces(server)
    answer = await server.client.request(method, path, data=body, headers={"Content-Type": kind})

    assert answer.status == 404
    assert (await problem(answer)).code == "wrong-system"
    assert await traces(server) == before


def says(answer: NDArray[np.uint8] | None = None, **changes: Any) -> bytes:
    """A judgment of sheet 0 by d2 that is good but for these changes."""
    fields = {"device": "d2", "version": 0, "num_examples": 10, "metrics": {"accuracy": 0.9}, "covers": (0, 1), **changes}
    return wire.pack_judgment(Judgment(**fields), np.full((8, 2), 7, np.uint8) if answer is None else answer)


GOOD_HEADER, GOOD_ANSWER = helpers.parts(says())


def entry(**changes: object) -> bytes:
    """A judgment that is good but for what its header says of the tensor."""
    return tensors({**GOOD_HEADER, "answer": {**GOOD_HEADER["answer"], **changes}}, GOOD_ANSWER)


REFUSED_JUDGMENTS = [
    pytest.param(says(np.zeros((7, 2), np.uint8)), "wrong-shape", 422, id="a text too few"),
    pytest.param(says(np.zeros((8, 3), np.uint8)), "wrong-shape", 422, id="a class too many"),
    pytest.param(says(np.zeros((8, 1), np.uint8)), "wrong-shape", 422, id="another form"),
    pytest.param(entry(dtype="F32"), "wrong-shape", 422, id="float32, which could be NaN"),
    pytest.param(entry(data_offsets=[0, 15]), "bad-tensors", 400, id="a byte too few"),
    pytest.param(entry(shape=[2**40, 2**40]), "wrong-shape", 422, id="a shape of 2^80"),
    pytest.param(says() + b"0", "bad-tensors", 400, id="a byte too many"),
    pytest.param(says()[:20], "bad-tensors", 400, id="cut off"),
    pytest.param(b"", "bad-tensors", 400, id="no body"),
    pytest.param(upload("d2", 0), "bad-message", 400, id="an update"),
    pytest.param(encode(Trained("d2", 0, 10, {})), "bad-tensors", 400, id="JSON"),
    pytest.param(says(version=1), "unknown-sheet", 409, id="a sheet that is not written"),
    pytest.param(says(version=2**70), "unknown-sheet", 409, id="sheet 2^70"),
    pytest.param(says(version=-1), "bad-message", 400, id="sheet -1"),
    pytest.param(says(covers=(2,)), "bad-message", 400, id="covers a class that is none"),
    pytest.param(says(covers=(-1,)), "bad-message", 400, id="covers class -1"),
    pytest.param(says(covers=()), "bad-message", 400, id="covers nothing"),
    pytest.param(says(np.zeros((8, 2), np.uint8)), "bad-message", 400, id="says nothing"),
    pytest.param(says(covers=(0,) * 65), "bad-message", 400, id="covers too much"),
    pytest.param(says(num_examples=-1), "bad-message", 400, id="negative examples"),
    pytest.param(says(metrics={"m" * 65: 0.0}), "bad-message", 400, id="a long metric"),
    pytest.param(says(device="stranger"), "unknown-device", 403, id="a stranger"),
    pytest.param(says(device="d1"), "already-answered", 409, id="a second judgment"),
    pytest.param(bytes(MAX_JSON + 1), "too-large", 413, id="a huge body"),
]


@pytest.mark.parametrize(("body", "code", "status"), REFUSED_JUDGMENTS)
async def test_a_bad_judgment_is_refused_without_a_trace(judging: Running, body: bytes, code: str, status: int) -> None:
    """Whatever is wrong with a judgment has its code; no blob, no event, no vote comes of it."""
    await judging.send(judgment("d1", 0, sheet(judging.ledger)), JUDGMENT_TYPE)
    before = await traces(judging)
    document = await problem(await post(judging, "/v1/results", body, JUDGMENT_TYPE))

    assert (document.code, document.status) == (code, status)
    assert await traces(judging) == before


async def test_a_judgment_comes_too_late(decided: Running) -> None:
    """A decided sheet takes no more votes."""
    await decided.enroll("d3")
    document = await problem(await post(decided, "/v1/results", says(device="d3"), JUDGMENT_TYPE))

    assert (document.code, document.status) == ("too-stale", 409)


@pytest.mark.parametrize("kind", [JSON_TYPE, TENSORS_TYPE])
async def test_a_judgment_under_another_type_is_refused(judging: Running, kind: str) -> None:
    """A judgment is known by its content type; as anything else it is nothing."""
    before = await traces(judging)
    answer = await post(judging, "/v1/results", says(), kind)

    assert 400 <= answer.status < 500
    assert (await problem(answer)).code == ("bad-message" if kind == JSON_TYPE else "wrong-system")
    assert await traces(judging) == before


async def test_the_refused_judgments_are_wrong_in_one_thing_only(judging: Running) -> None:
    """The judgment the cases above start from is accepted as it is."""
    await judging.send(tensors(GOOD_HEADER, GOOD_ANSWER), JUDGMENT_TYPE)


async def test_no_damaged_judgment_is_a_server_error(judging: Running) -> None:
    """200 judgments with a random byte changed, cut or doubled: each is taken or refused, never a 5xx."""
    rng = random.Random(5)
    statuses = set()
    for _ in range(200):
        body = bytearray(says())
        at = rng.randrange(len(body))
        match rng.choice(["flip", "cut", "double"]):
            case "flip":
                body[at] ^= 1 << rng.randrange(8)
            case "cut":
                del body[at : at + rng.randint(1, 9)]
            case _:
                body[at:at] = body[at : at + rng.randint(1, 9)]
        statuses.add((await post(judging, "/v1/results", bytes(body), JUDGMENT_TYPE)).status)

    assert statuses <= {200, 400, 403, 409, 422}
    assert {400, 422} <= statuses


async def test_an_llm_that_fails_is_told_to_whoever_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with the reason while the LLM fails; devices get work all the same, and once it works all is well."""
    monkeypatch.setattr(ledgers, "RETRY_SECONDS", 0.05)
    llm = Simulator([JobFailed("the LLM cannot write: no memory")] * 10**6)
    async with running(tmp_path, with_llm(), llm) as server:
        await helpers.until(lambda: bool(server.ledger.trouble))
        answer = await server.client.get("/readyz")
        assert (answer.status, await answer.text()) == (503, "version 1 cannot be made: the LLM cannot write: no memory\n")
        await server.enroll("d1")
        wire.decode(await (await post(server, "/v1/work", encode(Ask("d1", True)))).read(), Train)
        assert await feed(server) == []

        llm.troubles.clear()
        await helpers.until(lambda: len(server.ledger.state.sheets) == 1 and not server.ledger.trouble)
        assert (await server.client.get("/readyz")).status == 200
    assert llm.closed


# Secure averaging -----------------------------------------------------------------------------------------------------
UNSEEN = settings(buffer_size=3, secure=Secure(threshold=3))


@asynccontextmanager
async def averaging(data: Path, phase: str = "") -> AsyncIterator[tuple[Running, dict[str, Device]]]:
    """A run of masked updates with d1, d2 and d3 in a cohort that has just come to a phase, and d4 that is not in it."""
    async with running(data, UNSEEN) as made:
        await made.enroll("d1", "d2", "d3", "d4")
        devices = {id: Device(id) for id in ("d1", "d2", "d3")}
        while phase and not (isinstance(cohort := made.ledger.state.cohort, Cohort) and cohort.phase == phase):
            for device in devices.values():
                if not (isinstance(cohort := made.ledger.state.cohort, Cohort) and cohort.phase == phase):
                    await device.act(made.ledger)
        yield made, devices


def name_of(server: Running) -> str:
    assert isinstance(server.ledger.state.cohort, Cohort)
    return server.ledger.state.cohort.terms.cohort


def said(server: Running, device: Device) -> tuple[bytes, str]:
    """What this device would send next, and its content type."""
    work = server.ledger.plan(device.id, can_train=True)
    assert isinstance(work, Join | SealShares | Mask | Unmask)
    answer, vector = device.say(work)
    if vector is None or not isinstance(answer, Masked):
        return encode(answer), JSON_TYPE
    return wire.pack_masked(answer, vector), MASKED_TYPE


async def test_a_cohort_over_http(tmp_path: Path) -> None:
    """Three devices ask, train, join, share, mask and unmask over the wire, say everything twice, and the version is made."""
    verbs: dict[str, list[str]] = {"d1": [], "d2": [], "d3": []}
    async with averaging(tmp_path) as (server, devices):
        while server.ledger.state.version == 0:
            for id, device in devices.items():
                body = await (await post(server, "/v1/work", encode(Ask(id, True)))).read()
                work: Any = wire.decode(body, Work)  # type: ignore[arg-type]  # a union is fine for msgspec
                verb = json.loads(body)["verb"]
                if verb == "wait" or server.ledger.state.version:
                    continue
                verbs[id].append(verb)
                if isinstance(work, Train):
                    sent, kind = encode(Trained(id, work.version, 1, {})), JSON_TYPE
                else:
                    answer, vector = device.say(work)
                    masked = isinstance(answer, Masked) and vector is not None
                    sent, kind = (wire.pack_masked(answer, vector), MASKED_TYPE) if masked else (encode(answer), JSON_TYPE)  # type: ignore[arg-type]
                first = await server.send(sent, kind)
                again = await post(server, "/v1/results", sent, kind)
                assert again.status == 409 or wire.decode(await again.read(), Receipt) == first  # the version may be made by now
        status = await server.status()

    assert verbs["d1"] == ["train", "join", "seal-shares", "mask", "unmask"]
    assert [d.updates for d in status.devices] == [1, 1, 1, 0]
    assert {(m.kind, m.num_examples) for m in status.measurements} == {("kept", 1)}


NOBODY = {"d1": b"1" * SEALED, "d4": b"4" * SEALED}
TOO_LARGE = {f"d{i}": b"\xff" * SHARE for i in (1, 2, 3)}
REFUSED_ANSWERS = [
    pytest.param("", lambda c: Advertise("c", "d1", b"1" * 32, b"2" * 32), "no-cohort", 409, id="no cohort yet"),
    pytest.param("advertise", lambda c: Advertise("c", "d1", b"1" * 32, b"2" * 32), "wrong-cohort", 409, id="another cohort"),
    pytest.param("advertise", lambda c: Advertise(c, "d1", b"1" * 32, b"1" * 32), "bad-keys", 422, id="one key for both"),
    pytest.param("advertise", lambda c: Advertise(c, "d1", bytes(32), b"1" * 32), "bad-keys", 422, id="a key of low order"),
    pytest.param("advertise", lambda c: Advertise(c, "d1", b"\xff" * 32, b"1" * 32), "bad-keys", 422, id="no canonical key"),
    pytest.param("advertise", lambda c: Advertise(c, "d9", b"1" * 32, b"2" * 32), "unknown-device", 403, id="a stranger"),
    pytest.param("advertise", lambda c: Shares(c, "d1", {}), "too-early", 409, id="shares before keys"),
    pytest.param("advertise", lambda c: Reveal(c, "d1", {}, {}), "too-early", 409, id="seeds before keys"),
    pytest.param("share", lambda c: Advertise(c, "d4", b"1" * 32, b"2" * 32), "too-late", 409, id="keys too late"),
    pytest.param("share", lambda c: Advertise(c, "d1", b"1" * 32, b"2" * 32), "already-answered", 409, id="other keys"),
    pytest.param("share", lambda c: Shares(c, "d4", NOBODY), "not-in-cohort", 403, id="shares of one that is not in it"),
    pytest.param("share", lambda c: Shares(c, "d2", {}), "bad-list", 422, id="shares for nobody"),
    pytest.param("share", lambda c: Shares(c, "d2", NOBODY), "bad-list", 422, id="shares for one that is not in it"),
    pytest.param("share", lambda c: Shares(c, "d1", {"d1": NOBODY["d1"], "d2": NOBODY["d1"]}), "bad-list", 422, id="for itself"),
    pytest.param("upload", lambda c: Reveal(c, "d1", {}, {}), "too-early", 409, id="seeds before vectors"),
    pytest.param("unmask", lambda c: Shares(c, "d4", NOBODY), "not-in-cohort", 403, id="shares too late, and not in it"),
    pytest.param("unmask", lambda c: Reveal(c, "d1", {}, {}), "bad-list", 422, id="seeds of nobody"),
    pytest.param("unmask", lambda c: Reveal(c, "d1", {}, TOO_LARGE), "bad-list", 422, id="keys for seeds"),
    pytest.param("unmask", lambda c: Reveal(c, "d1", TOO_LARGE, {}), "bad-shares", 422, id="too large"),
    pytest.param("unmask", lambda c: Reveal(c, "d4", {}, {}), "not-in-cohort", 403, id="seeds of one that is not in it"),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "make", "code", "status"), REFUSED_ANSWERS)
async def test_a_bad_answer_is_refused_without_a_trace(tmp_path: Path, phase: str, make: Any, code: str, status: int) -> None:
    """Whatever is wrong with what a device of a cohort says has its code, and changes nothing."""
    async with averaging(tmp_path, phase) as (server, _):
        before = await traces(server)
        document = await problem(await post(server, "/v1/results", encode(make(name_of(server) if phase else ""))))

        assert (document.code, document.status) == (code, status)
        assert await traces(server) == before


def masked(vector: Any = None, device: str = "d1", cohort: str = "{cohort}", **more: Any) -> bytes:
    """A masked vector that is good but for these changes."""
    arrays = {"vector": np.full(41, 7, np.uint32) if vector is None else vector, **more}
    return bytes(save(arrays, {"message": encode(Masked("COHORT", device)).decode().replace("COHORT", cohort)}))


MASKED_HEADER, MASKED_DATA = helpers.parts(masked(cohort="c"))
U32 = np.uint32


def ring(**changes: object) -> bytes:
    """A masked vector that is good but for what its header says of it."""
    header = {**MASKED_HEADER, "vector": {**MASKED_HEADER["vector"], **changes}}
    return tensors(json.dumps(header).replace('\\"c\\"', '\\"{cohort}\\"').encode(), MASKED_DATA)


REFUSED_VECTORS = [
    pytest.param(masked(np.zeros(40, U32)), "wrong-shape", 422, id="an element too few"),
    pytest.param(masked(np.zeros(42, U32)), "wrong-shape", 422, id="an element too many"),
    pytest.param(masked(np.zeros(0, U32)), "wrong-shape", 422, id="no element"),
    pytest.param(masked(np.zeros((1, 41), U32)), "wrong-shape", 422, id="a matrix"),
    pytest.param(masked(np.zeros(41, np.float32)), "wrong-shape", 422, id="float32"),
    pytest.param(masked(np.zeros(41, np.int32)), "wrong-shape", 422, id="int32"),
    pytest.param(masked(np.zeros(41, np.uint64)), "wrong-shape", 422, id="uint64"),
    pytest.param(masked(more=np.zeros(1, U32)), "wrong-shape", 422, id="a tensor more"),
    pytest.param(masked(plain=helpers.delta()[A]), "wrong-shape", 422, id="the bare update beside it"),
    pytest.param(ring(shape=[2**40]), "wrong-shape", 422, id="2^40 elements"),
    pytest.param(ring(shape=[10**400]), "wrong-shape", 422, id="10^400 elements"),
    pytest.param(ring(shape=[-41]), "wrong-shape", 422, id="-41 elements"),
    pytest.param(ring(shape=[]), "wrong-shape", 422, id="no shape"),
    pytest.param(ring(extra=1), "wrong-shape", 422, id="an extra field of the entry"),
    pytest.param(ring(data_offsets=[0, 160]), "bad-tensors", 400, id="a span too short"),
    pytest.param(ring(data_offsets=[4, 168]), "bad-tensors", 400, id="a span beyond the end"),
    pytest.param(masked() + b"\0", "bad-tensors", 400, id="a byte too many"),
    pytest.param(masked()[:-1], "bad-tensors", 400, id="a byte too few"),
    pytest.param(b"", "bad-tensors", 400, id="no body"),
    pytest.param(encode(Masked("c", "d1")), "bad-tensors", 400, id="JSON"),
    pytest.param(upload("d1", 0), "bad-message", 400, id="an update"),
    pytest.param(masked(device="d/1"), "bad-message", 400, id="a device that is no id"),
    pytest.param(masked(cohort="a cohort"), "bad-message", 400, id="a cohort that is no id"),
    pytest.param(masked(cohort="other"), "wrong-cohort", 409, id="another cohort"),
    pytest.param(masked(device="d4"), "not-in-cohort", 403, id="one that is not in it"),
    pytest.param(masked(device="d9"), "unknown-device", 403, id="a stranger"),
]


@pytest.mark.parametrize(("body", "code", "status"), REFUSED_VECTORS)
async def test_a_bad_vector_is_refused_without_a_trace(tmp_path: Path, body: bytes, code: str, status: int) -> None:
    """Whatever is wrong with a masked vector has its code; no blob, no event come of it, and the right one is taken after it."""
    async with averaging(tmp_path, "upload") as (server, devices):
        before = await traces(server)
        document = await problem(await post(server, "/v1/results", of(server, body), MASKED_TYPE))

        assert (document.code, document.status) == (code, status)
        assert await traces(server) == before
        await server.send(*said(server, devices["d1"]))


def of(server: Running, body: bytes) -> bytes:
    """The body for the cohort under way."""
    if b"{cohort}" not in body:
        return body
    name = name_of(server).encode()
    (length,) = struct.unpack("<Q", body[:8])
    header = body[8 : 8 + length].replace(b"{cohort}", name)
    return struct.pack("<Q", len(header)) + header + body[8 + length :]


async def test_the_refused_vectors_are_wrong_in_one_thing_only(tmp_path: Path) -> None:
    """The vector the cases above start from is accepted as it is: nobody can see that it is none."""
    async with averaging(tmp_path, "upload") as (server, _):
        assert (await post(server, "/v1/results", of(server, masked()), MASKED_TYPE)).status == 200
        assert (await post(server, "/v1/results", of(server, ring()), MASKED_TYPE)).status == 409  # other bytes of one device
        assert (await post(server, "/v1/results", of(server, masked(device="d2")), MASKED_TYPE)).status == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_vector_over_the_limit_is_refused(tmp_path: Path, chunked: bool) -> None:
    """With a Content-Length and without, a masked vector ends where an update does; a compressed one too."""
    async with averaging(tmp_path, "upload") as (server, _):
        before = await traces(server)
        size = 2 * server.ledger.body_limit
        bomb = gzip.compress(bytes(50 << 20))
        answers = [
            await post(server, "/v1/results", chunks(size) if chunked else bytes(size), MASKED_TYPE),
            await post(server, "/v1/results", bomb, MASKED_TYPE, **{"Content-Encoding": "gzip"}),
        ]

        assert [(await problem(answer)).code for answer in answers] == ["too-large"] * 2
        assert await traces(server) == before


@pytest.mark.parametrize("kind", [JSON_TYPE, TENSORS_TYPE, JUDGMENT_TYPE])
async def test_a_vector_under_another_type_is_refused(tmp_path: Path, kind: str) -> None:
    """A masked vector is known by its content type; as anything else it is nothing."""
    async with averaging(tmp_path, "upload") as (server, _):
        before = await traces(server)
        document = await problem(await post(server, "/v1/results", of(server, masked()), kind))

        assert document.code == ("bad-message" if kind == JSON_TYPE else "wrong-system")
        assert await traces(server) == before


async def test_no_bytes_are_a_server_error(tmp_path: Path) -> None:
    """300 masked vectors with random bytes changed, cut or doubled, and 100 of nothing but random bytes: none is a 5xx."""
    rng, codes = random.Random(3), set[str]()
    async with averaging(tmp_path, "upload") as (server, _):
        whole = of(server, masked())
        for i in range(400):
            body = bytearray(whole if i % 4 else rng.randbytes(rng.randint(0, 300)))
            if i % 8 == 0:  # behind an honest length
                body[:8] = struct.pack("<Q", max(len(body) - 8, 0))
            for _ in range(rng.randint(1, 3) if i % 4 else 0):
                at = rng.randrange(8 if rng.random() < 0.1 else len(body))
                match rng.choice(["flip", "cut", "double"]):
                    case "flip":
                        body[at] ^= 1 << rng.randrange(8)
                    case "cut":
                        del body[at : at + rng.randint(1, 9)]
                    case _:
                        body[at:at] = body[at : at + rng.randint(1, 9)]
            answer = await post(server, "/v1/results", bytes(body), MASKED_TYPE)
            codes.add("accepted" if answer.status == 200 else (await problem(answer)).code)
        assert (await server.client.get("/readyz")).status == 200

    assert "internal" not in codes
    assert {"accepted", "already-answered", "bad-tensors", "wrong-shape", "bad-message"} <= codes


async def test_no_damaged_answer_is_a_server_error(tmp_path: Path) -> None:
    """300 answers in JSON with a random byte changed, cut or doubled, in each of three phases: each is taken or refused."""
    rng, statuses = random.Random(4), set[int]()
    for phase in ("advertise", "share", "unmask"):
        async with averaging(tmp_path / phase, phase) as (server, devices):
            while isinstance(server.ledger.plan("d3", can_train=True), Train):
                await devices["d3"].act(server.ledger)
            whole = said(server, devices["d3"])[0]
            for _ in range(100):
                body = bytearray(whole)
                at = rng.randrange(len(body))
                match rng.choice(["flip", "cut", "double"]):
                    case "flip":
                        body[at] ^= 1 << rng.randrange(8)
                    case "cut":
                        del body[at : at + rng.randint(1, 9)]
                    case _:
                        body[at:at] = body[at : at + rng.randint(1, 9)]
                statuses.add((await post(server, "/v1/results", bytes(body))).status)

    assert statuses <= {200, 400, 403, 409, 422}
    assert {400, 409} <= statuses


async def test_a_cohort_that_has_failed_takes_nothing(tmp_path: Path) -> None:
    """Between a failure and the next cohort a device is told to ask for work; the server that ticks goes on by itself."""
    hours = [1000.0]
    ledger = helpers.open_ledger(tmp_path, UNSEEN, now=lambda: hours[0])
    await ledger.open()
    for id in ("d1", "d2"):
        await ledger.enroll(id, id)
        await ledger.take_trained(Trained(id, 0, 1, {}), "0" * 64)
    assert isinstance(ledger.state.cohort, Cohort)
    hours[0] = ledger.state.cohort.deadline
    keys = Device("d1").say(Join(0, ledger.state.cohort.terms))[0]
    await ledger.take_answer(keys)
    with pytest.raises(WireError) as refused:
        await ledger.take_answer(keys)
    ledger.close()

    assert (refused.value.code, refused.value.status) == ("cohort-failed", 409)
    assert "only 1 devices answered in the phase `advertise`" in refused.value.detail


DOCUMENTED = (ROOT / "docs/protocol.md").read_text()


def test_every_code_that_is_raised_is_documented() -> None:
    """Each problem code in the source of SDK and server has a row in docs/protocol.md, with a status that the source gives it."""
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", DOCUMENTED, re.MULTILINE))
    folders = (ROOT / "edge_sdk", ROOT / "server/edge_server")
    source = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    raised = set(re.findall(r'WireError\(\s*"([a-z-]+)"', source))

    assert len(raised) > 25
    assert raised - rows.keys() == set()
    for code, status in {(param.values[2], str(param.values[3])) for param in REFUSED_ANSWERS}:
        assert rows[code] == status


def test_every_verb_and_content_type_is_documented() -> None:
    """The tables name what a server may ask and take, and the version that both sides speak."""
    verbs = {str(kind.__struct_config__.tag) for kind in get_args(Work)}

    assert verbs == set(re.findall(r"^\| `([a-z-]+)` \| `[a-z]", DOCUMENTED, re.MULTILINE))
    assert "one of the nine verbs" in DOCUMENTED
    assert len(verbs) == 9
    for kind in (JSON_TYPE, TENSORS_TYPE, MASKED_TYPE, JUDGMENT_TYPE):
        assert f"`POST /v1/results`, `{kind}`" in DOCUMENTED
    assert DOCUMENTED.startswith(f"# The wire, version {PROTOCOL}\n")
    assert f'"protocol": {PROTOCOL},' in DOCUMENTED
