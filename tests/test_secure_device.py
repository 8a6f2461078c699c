"""A device in secure averaging: what it must remember is on disk before it speaks, and what it said once it says again."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk import bundle as bundles
from edge_sdk import masking, secure, wire
from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.agent import ADAPTER, Agent
from edge_sdk.cohort import Advertise, Answer, Join, Mask, Masked, Request, Reveal, SealShares, Shares, Survivors, Terms, Unmask
from edge_sdk.errors import DataError, MissingRuntime, WireError
from edge_sdk.masking import Member
from edge_sdk.protocol import PROTOCOL, Finished, Manifest, Train, Trained, Update, Work
from edge_sdk.session import PAUSE_AFTER_FAILED_WORK
from edge_sdk.store import MEMBER, SPENT, UNSEEN, Parcel, Store
from edge_sdk.testing import ServerSimulator
from edge_sdk.training.batches import Training
from edge_server import cohorts, unmasking
from edge_server.unmasking import Cohort
from tests import factories
from tests.test_agent import Enough, PowerCut, World, fill

MANIFEST = factories.manifest()
PEERS = {"a": 5, "c": 9, "d": 2}  # on each side of the device, which is `b`, and what they weigh


def delta(seed: int, spec: AdapterSpec = factories.SPEC) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in spec.update_shapes().items()}


def flat(arrays: dict[str, Array]) -> Array:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def terms(name: str = "one", spec: AdapterSpec = factories.SPEC) -> Terms:
    return Terms(name, 4, 3, cohorts.length(spec), clip=1.0, max_weight=64)


@dataclass
class Circle:
    """The server's side of a cohort of the device `b` and its peers in memory."""

    of: Terms
    version: int = 0
    cohort: Cohort = field(init=False)
    peers: dict[str, Member] = field(default_factory=dict)
    vectors: dict[str, masking.Ring] = field(default_factory=dict)
    off: tuple[str, ...] = ()  # peers that do not answer any more

    def __post_init__(self) -> None:
        self.cohort = Cohort(self.of, deadline=0.0)

    @property
    def done(self) -> bool:
        return self.cohort.phase == "done"

    def request(self) -> Request | None:
        """What the device shall do, once its peers have done the same; None where its answer is there."""
        for peer in PEERS:
            if peer not in self.off and (work := cohorts.plan(self.cohort, 0, peer)) is not None:
                self.take(*self.speak(peer, work))
        return cohorts.plan(self.cohort, self.version, "b")

    def speak(self, peer: str, work: Request) -> tuple[Answer, masking.Ring | None]:
        match work:
            case Join(_, of):
                self.peers[peer], keys = masking.join(of, peer, peer.encode() * 32)
                return keys, None
            case SealShares(_, roster):
                self.peers[peer], shares = masking.share(self.peers[peer], roster)
                return shares, None
            case Mask(_, delivery):
                opened = masking.receive(self.peers[peer], delivery)
                values = np.random.default_rng(ord(peer)).normal(0, 0.1, self.of.length).astype(np.float32)
                self.peers[peer], vector = masking.masked(opened, values, PEERS[peer])
                return Masked(self.of.cohort, peer), vector
            case Unmask(_, survivors):
                self.peers[peer], shown = masking.unmask_shares(self.peers[peer], survivors)
                return shown, None

    def take(self, answer: Answer, vector: masking.Ring | None = None) -> None:
        match answer:
            case Advertise():
                self.cohort = unmasking.advertise(self.cohort, answer)
            case Shares():
                self.cohort = unmasking.take_shares(self.cohort, answer)
            case Masked() if vector is not None:
                self.cohort, self.vectors[answer.device] = unmasking.take_masked(self.cohort, answer, "blob"), vector
            case Reveal():
                self.cohort = unmasking.take_reveal(self.cohort, answer)

    def send(self, parcel: Parcel) -> None:
        """What the device says reaches the server."""
        self.take(*opened(parcel, self.of))

    def end_phase(self) -> None:
        found = unmasking.advance(self.cohort, 1.0, 0.0)
        assert isinstance(found, Cohort)
        self.cohort = found

    def check_mean(self, own: Array, weight: int) -> None:
        """The sum that comes out is of the device and the peers that masked."""
        values, weights = [own], [weight]
        for peer in self.cohort.uploads.keys() - {"b"}:
            values.append(np.random.default_rng(ord(peer)).normal(0, 0.1, self.of.length).astype(np.float32))
            weights.append(PEERS[peer])
        mean, total = unmasking.unmask(self.cohort, self.vectors.values())
        np.testing.assert_allclose(mean, np.average(np.array(values, np.float64), axis=0, weights=weights), atol=1e-6, rtol=0)
        assert total == sum(weights)


def opened(parcel: Parcel, of: Terms) -> tuple[Answer, masking.Ring | None]:
    """An answer as the server reads it."""
    if parcel.content_type == wire.MASKED_TYPE:
        return wire.unpack_masked(parcel.body, of.length + 1)
    assert parcel.content_type == wire.JSON_TYPE
    return wire.decode(parcel.body, Advertise | Shares | Reveal), None  # type: ignore[arg-type]  # a union is fine for msgspec


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The device `b`, which has learned something from 17 texts at version 0."""
    made = Store(tmp_path / "home")
    made.set_fact("device", "b")
    secure.keep(made, Update("b", 0, 17, {}), delta(1))
    yield made
    made.close()


def member(store: Store) -> Member:
    """What is on disk, as another process would read it."""
    again = Store(store.home)
    known = again.fact(MEMBER)
    again.close()
    assert known is not None
    return wire.decode(known.encode(), Member)


def say(store: Store, request: Request | None) -> Parcel:
    assert request is not None
    return secure.speak(store, MANIFEST, request)


def requests(store: Store, circle: Circle) -> Iterator[Request]:
    """The four requests, each answered by the device and its peers before the next comes."""
    for _ in range(4):
        request = circle.request()
        assert request is not None
        yield request
        circle.send(say(store, request))
        circle.end_phase()


# What it says --------------------------------------------------------------------------------------------------------
def test_a_device_goes_through_a_cohort(store: Store) -> None:
    """Four requests, four answers, and what comes out is the plain weighted mean of all four."""
    circle = Circle(terms())
    asked = [type(request) for request in requests(store, circle)]

    assert asked == [Join, SealShares, Mask, Unmask]
    circle.check_mean(flat(delta(1)), 17)


def test_what_it_must_remember_is_on_disk_before_it_speaks(store: Store) -> None:
    """Another process finds the secret, the roster, the opened shares, what was uploaded, and the list that was answered."""
    circle, seen = Circle(terms()), list[Member]()
    for request in requests(store, circle):
        say(store, request)
        seen.append(member(store))
    joined, shared, sent, shown = seen

    assert (joined.terms, joined.device, len(joined.secret)) == (terms(), "b", 32)
    assert (joined.roster, shared.roster) == (None, unmasking.roster(circle.cohort))
    assert (set(shared.inbox), set(sent.inbox)) == (set(), {"a", "b", "c", "d"})
    assert (shared.uploaded, len(sent.uploaded)) == ("", 64)
    assert (sent.answered, shown.answered) == (None, unmasking.survivors(circle.cohort))
    assert {m.secret for m in seen} == {joined.secret}


def test_a_request_repeated_gets_the_same_bytes(store: Store) -> None:
    """At once, and from a new process: no second vector is ever masked, and no second key made."""
    for request in requests(store, Circle(terms())):
        first, before = say(store, request), member(store)
        again = Store(store.home)
        repeated = [say(store, request), say(again, request)]
        again.close()

        assert repeated == [first, first]
        assert member(store) == before


def test_every_cohort_has_its_own_secret(store: Store) -> None:
    """Another name, or other terms under the same name, is another cohort: 32 fresh bytes, and two other keys."""
    others = [terms("one"), terms("two"), msgspec.structs.replace(terms("two"), clip=2.0), terms("one")]
    parcels, known = [], []
    for of in others:
        parcels.append(say(store, Join(0, of)).body)
        known.append(member(store))

    assert [m.terms for m in known] == others
    assert len({m.secret for m in known}) == len(set(parcels)) == 4


def test_two_devices_have_different_secrets(tmp_path: Path) -> None:
    """What a device draws is its own, also where two have one id."""
    found = set()
    for name in "xy":
        store = Store(tmp_path / name)
        store.set_fact("device", "b")
        say(store, Join(0, terms()))
        found.add(member(store).secret)
        store.close()

    assert len(found) == 2


def test_asked_to_join_again_it_forgets_nothing(store: Store) -> None:
    """A server cannot have a second list answered, and so both kinds of share for one device, by letting it join anew."""
    circle = Circle(terms())
    for request in requests(store, circle):
        if isinstance(request, Join):
            joined = say(store, request)
    everything = member(store)

    assert say(store, Join(0, terms())) == joined
    assert member(store) == everything
    with pytest.raises(WireError) as refused:
        say(store, Unmask(0, Survivors("one", ("a", "b", "d"), ("c",))))
    assert refused.value.code == "already-answered"
    other = msgspec.structs.replace(unmasking.roster(circle.cohort).members[0], mask_key=masking.public_key(b"9" * 32))
    roster = msgspec.structs.replace(
        unmasking.roster(circle.cohort), members=(other, *unmasking.roster(circle.cohort).members[1:])
    )
    with pytest.raises(WireError) as refused:
        say(store, SealShares(0, roster))
    assert refused.value.code == "already-answered"


def test_a_refused_request_changes_nothing_on_disk(store: Store) -> None:
    """What a device will not say leaves it where it was, and the right request is answered after it."""
    circle = Circle(terms())
    for request in requests(store, circle):
        if not isinstance(request, SealShares):
            continue
        before = member(store)
        with pytest.raises(WireError) as refused:
            say(store, SealShares(0, msgspec.structs.replace(request.roster, terms=terms("two"))))
        assert refused.value.code == "wrong-cohort"
        assert member(store) == before


def test_a_peer_that_drops_out_is_taken_off(store: Store) -> None:
    """The device tells of the peer that sent no vector its key's share, of all others the seed's, and the mean is right."""
    circle = Circle(terms())
    for request in requests(store, circle):
        if isinstance(request, Mask):
            circle.off = ("c",)
            circle.cohort = unmasking.Cohort(
                circle.of, 0.0, "upload", circle.cohort.adverts, circle.cohort.shares, dict.fromkeys("ad", "blob")
            )
            del circle.vectors["c"]
        if isinstance(request, Unmask):
            shown, _ = opened(say(store, request), circle.of)
            assert isinstance(shown, Reveal)
            assert (set(shown.seeds), set(shown.keys)) == ({"a", "b", "d"}, {"c"})

    circle.check_mean(flat(delta(1)), 17)


# What it has lost ----------------------------------------------------------------------------------------------------
def test_a_device_that_lost_its_keys_says_so(store: Store) -> None:
    """Without them it can answer none of the later requests; the next cohort is another matter."""
    for request in requests(store, Circle(terms())):
        if isinstance(request, Join):
            continue
        kept = store.fact(MEMBER)
        store.drop_fact(MEMBER)
        with pytest.raises(DataError, match="has lost its keys of the cohort; it takes part in the next one"):
            say(store, request)
        assert store.fact(MEMBER) is None
        store.set_fact(MEMBER, str(kept))


def test_a_device_that_lost_what_it_learned_says_so(store: Store) -> None:
    """It masks nothing in its place, and its keys stay as they were."""
    for request in requests(store, Circle(terms())):
        if not isinstance(request, Mask):
            continue
        body, before = (store.home / UNSEEN).read_bytes(), member(store)
        (store.home / UNSEEN).unlink()
        with pytest.raises(DataError, match="what this device learned from version 0 is lost"):
            say(store, request)
        secure.keep(store, Update("b", 1, 17, {}), delta(1))
        with pytest.raises(DataError, match="is from version 1, not 0"):
            say(store, request)
        (store.home / UNSEEN).write_bytes(body[:-1])
        with pytest.raises(WireError) as refused:
            say(store, request)
        assert refused.value.code == "bad-tensors"
        assert member(store) == before
        (store.home / UNSEEN).write_bytes(body)


def test_a_second_training_cannot_be_masked_in_one_cohort(store: Store) -> None:
    """Two vectors under one mask would tell their difference; the first one is sent again all the same."""
    for request in requests(store, Circle(terms())):
        if not isinstance(request, Mask):
            continue
        first = say(store, request)
        secure.keep(store, Update("b", 0, 17, {}), delta(2))
        with pytest.raises(WireError) as refused:
            say(store, request)
        assert refused.value.code == "already-answered"
        secure.keep(store, Update("b", 0, 17, {}), delta(1))
        assert say(store, request) == first


# What was averaged ---------------------------------------------------------------------------------------------------
def averaged(store: Store) -> None:
    """The device goes through a cohort for version 0, and helps to take the masks off."""
    assert len(list(requests(store, Circle(terms())))) == 4


def relearn(store: Store, version: int) -> None:
    """What a device does that is told to train again from the same start, in the same order."""
    secure.keep(store, Update("b", version, 17, {}), delta(1))


def test_what_was_averaged_goes_into_no_other_sum(store: Store) -> None:
    """The difference of two sums, with and without a device, is its update: it forgets that, and joins for a newer version."""
    averaged(store)
    assert not (store.home / UNSEEN).exists()
    relearn(store, 0)
    before = member(store)
    with pytest.raises(DataError, match="what this device learned from version 0 was averaged"):
        say(store, Join(0, terms("two")))
    assert member(store) == before

    relearn(store, 1)
    circle = Circle(terms("three"), version=1)
    assert len(list(requests(store, circle))) == 4
    circle.check_mean(flat(delta(1)), 17)


def test_a_cohort_for_another_version_gets_nothing_that_was_averaged(store: Store) -> None:
    """A server may say one version when it lets a device join and another when it lets it mask; the older is refused."""
    averaged(store)
    relearn(store, 0)
    for request in requests(store, Circle(terms("two"), version=1)):
        if isinstance(request, Mask):
            with pytest.raises(DataError, match="from version 0 was averaged"):
                say(store, msgspec.structs.replace(request, version=0))
            break


def test_an_older_training_stays_averaged(store: Store) -> None:
    """A server that goes back to a version before the last one cannot have that again either."""
    store.set_fact(SPENT, "4")
    for version in range(5):
        with pytest.raises(DataError, match="from version 4 was averaged"):
            secure.check_unspent(store, version)
    secure.check_unspent(store, 5)
    with pytest.raises(DataError, match="from version 4 was averaged"):
        averaged(store)
    assert store.fact(SPENT) == "4"


def test_a_cohort_that_failed_before_costs_no_training(store: Store) -> None:
    """Its vector sent, but no shares revealed: the same training goes into the next cohort."""
    for request in requests(store, Circle(terms())):
        if isinstance(request, Mask):
            say(store, request)
            break
    circle = Circle(terms("two"))
    asked = [type(request) for request in requests(store, circle)]

    assert asked == [Join, SealShares, Mask, Unmask]
    circle.check_mean(flat(delta(1)), 17)


# The agent -----------------------------------------------------------------------------------------------------------
@dataclass
class Round(World):
    """An agent and its server, which forms a cohort with three peers while the agent sleeps."""

    circle: Circle | None = None
    heard: int = 0
    learned: bytes = b""  # what the device keeps to itself
    most_sleeps: int = 40

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        if (circle := self.circle) is None or not self.server.results or circle.done:
            return
        self.learned = self.learned or (self.store.home / UNSEEN).read_bytes()
        said = self.server.answers[self.heard :]
        for answer, body in zip(said, self.server.bodies[1 + self.heard :], strict=True):  # the first is `Trained`
            circle.send(Parcel(wire.MASKED_TYPE if isinstance(answer, Masked) else wire.JSON_TYPE, body))
            circle.end_phase()
        self.heard += len(said)
        if (request := circle.request()) is not None:
            self.server.work.append(request)
        if circle.done:
            last = self.server.keep(wire.pack_adapter(self.spec.start(7)))
            self.server.work.append(Finished(1, last))


@pytest.fixture
def world(tmp_path: Path, encoder_bundle: Path) -> Iterator[Round]:
    bundle = bundles.read(encoder_bundle)
    spec = AdapterSpec(bundle.slots, rank=2, alpha=4.0)
    manifest = Manifest(PROTOCOL, "lpfl", factories.ENCODER_TASK, spec, bundle, secure=terms().quorum)
    server = ServerSimulator(manifest)
    for name in bundle.files:
        server.keep((encoder_bundle / name).read_bytes())
    made = Round(device(tmp_path / "home"), server, tmp_path / "cache", spec, circle=Circle(terms("one", spec)))
    server.work.append(train(made))
    yield made
    made.store.close()


def plain(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, secure=None)


def device(home: Path, kind: type[Store] = Store) -> Store:
    store = kind(home)
    store.set_fact("device", "b")
    fill(store)
    return store


def train(world: World, **more: Any) -> Train:
    adapter = world.server.keep(wire.pack_adapter(world.spec.start(0)))
    return Train(0, adapter, Training(steps=2, batch_size=2), None, seed=1, **{"share": False, "masked": True, **more})


def check_sum(world: Round) -> None:
    """What came out is the mean of what the device kept to itself and its peers' vectors."""
    assert world.circle is not None
    update, learned = wire.unpack(world.learned, wire.update_shapes(world.server.manifest))
    assert (update.device, update.version, update.num_examples, update.metrics) == ("b", 0, 2, {})
    world.circle.check_mean(flat(learned), 2)


async def test_the_agent_trains_and_takes_part(world: Round) -> None:
    """It sends a word without numbers, then the four answers, and keeps the final adapter; its keys and its update are gone."""
    assert await world.agent().run() == 1

    assert world.server.results == [Trained("b", 0, 1, {})]
    assert [type(answer) for answer in world.server.answers] == [Advertise, Shares, Masked, Reveal]
    assert [line.partition(",")[0] for line in world.lines if line.startswith("secure averaging")] == [
        "secure averaging: sent keys",
        "secure averaging: sent shares",
        "secure averaging: sent what it learned",
        "secure averaging: helped to take the masks off",
    ]
    check_sum(world)
    assert (world.store.home / ADAPTER).read_bytes() == wire.pack_adapter(world.spec.start(7))
    assert (world.store.fact(MEMBER), world.store.fact(SPENT)) == (None, "0")
    assert not (world.store.home / UNSEEN).exists()


async def test_it_does_not_train_for_nothing(world: Round) -> None:
    """A version it has helped to average is refused before anything is downloaded for it; it asks again in a minute."""
    world.store.set_fact(SPENT, "0")
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent().run()

    assert world.said("cannot work: what this device learned from version 0 was averaged")
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]
    assert not [path for _, path in world.server.requests if "/blobs/" in path]


async def test_what_is_kept_is_what_would_have_been_sent(world: Round, tmp_path: Path) -> None:
    """Masked or bare, the training is the same; but of a masked one no loss leaves the device."""
    world.circle = None
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent().run()
    world.server.manifest = plain(world.server.manifest)
    world.server.work.append(train(world, share=True, masked=False))
    other = device(tmp_path / "other")
    await Agent(other, world.server, world.cache, "other", say=world.lines.append, sleep=world.sleep).run(updates=1)
    other.close()
    shapes = wire.update_shapes(world.server.manifest)
    kept, learned = wire.unpack((world.store.home / UNSEEN).read_bytes(), shapes)
    sent, shown = wire.unpack(world.server.bodies[1], shapes)

    assert (kept.num_examples, kept.metrics) == (sent.num_examples, {})
    assert sent.metrics
    assert {name: array.tobytes() for name, array in learned.items()} == {name: a.tobytes() for name, a in shown.items()}
    assert world.server.bodies[0] == wire.encode(Trained("b", 0, 1, {}))


async def refuses(world: Round, *work: Work, said: str, **options: Any) -> None:
    """The agent says this to each, downloads nothing for it, and sends nothing."""
    world.circle, world.most_sleeps = None, len(work) - 1
    world.server.work[:] = work
    with pytest.raises(Enough):
        await world.agent(**options).run()

    assert [line for line in world.lines if line.startswith("cannot work")] == [f"cannot work: not-secure: {said}"] * len(work)
    assert world.slept == [PAUSE_AFTER_FAILED_WORK] * len(work)
    assert not [path for _, path in world.server.requests if "/blobs/" in path]
    assert world.server.bodies == []


@pytest.mark.parametrize("averaged", [False, True])
async def test_a_server_that_asks_for_the_bare_update_gets_nothing(world: Round, averaged: bool) -> None:
    """Neither instead of the masked one, nor once more for a version that it has averaged."""
    if averaged:
        world.store.set_fact(SPENT, "0")
    bare = train(world, share=True, masked=False)
    await refuses(world, bare, said="this run averages unseen, and the server asks for the update by itself")


async def test_a_server_does_not_choose_who_is_in_a_cohort_with_it(world: Round) -> None:
    """A cohort of two, of which one is the server's, would tell it the other's update."""
    two = msgspec.structs.replace(terms("two", world.spec), size=2, threshold=2)
    await refuses(world, Join(0, two), said="the cohort has another size or threshold than the manifest says")


async def test_a_run_that_averages_plainly_asks_for_no_masked_update(world: Round) -> None:
    """Neither training for a cohort, nor one of any size."""
    world.server.manifest = plain(world.server.manifest)
    join = Join(0, terms("one", world.spec))
    await refuses(world, train(world), join, said="this run's manifest says nothing of secure averaging")


async def test_a_device_may_be_for_secure_averaging_only(world: Round) -> None:
    """Its owner need not believe what a manifest says: no bare update in any run, and in a secure one it takes part."""
    secure_run, world.server.manifest = world.server.manifest, plain(world.server.manifest)
    circle, work, most = world.circle, world.server.work[:], world.most_sleeps
    said = "this device shares what it learned only in secure averaging, as its owner wants"
    await refuses(world, train(world, share=True, masked=False), said=said, only_secure=True)

    world.server.manifest, world.circle, world.most_sleeps = secure_run, circle, most
    world.server.work[:] = work
    await world.agent(only_secure=True).run()
    check_sum(world)


async def test_a_bare_update_that_waits_is_not_sent_any_more(world: Round) -> None:
    """An owner who restarts the device as one for secure averaging only gets what was asked for; other words are sent."""
    world.store.post(Parcel(wire.TENSORS_TYPE, wire.pack(Update("b", 0, 2, {}), delta(1, world.spec))))
    world.server.work.clear()
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(only_secure=True).run()
    assert world.said("dropped an update that was to be shared by itself")
    assert (world.store.pending(), world.server.bodies) == (None, [])

    world.store.post(Parcel(wire.JSON_TYPE, wire.encode(Trained("b", 0, 1, {}))))
    with pytest.raises(Enough):
        await world.agent(only_secure=True).run()
    assert world.server.results == [Trained("b", 0, 1, {})]


async def test_a_run_that_has_averaged_unseen_does_not_end_to(world: Round) -> None:
    """Another manifest for the same run is refused, by a new process too, and what the device keeps to itself stays."""
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent().run()
    kept, told = (world.store.home / UNSEEN).read_bytes(), world.store.fact("manifest")
    world.server.manifest = plain(world.server.manifest)
    world.server.work[:] = [train(world, share=True, masked=False)]
    asked = len(world.server.requests)
    with pytest.raises(Enough):
        await world.agent().run()

    assert world.said("cannot work: not-secure: the server says now that this run averages otherwise than it has said before")
    assert world.server.requests[asked:] == [("POST", "/v1/enroll")]
    assert ((world.store.home / UNSEEN).read_bytes(), world.store.fact("manifest")) == (kept, told)
    assert world.server.results == [Trained("b", 0, 1, {})]


class Dying(Store):
    """A store whose device loses power when it would put its n-th result into the outbox."""

    deaths: int = 0
    parcels: tuple[Parcel, ...] = ()

    def post(self, parcel: Parcel, residual: bytes | None = None) -> None:
        self.parcels += (parcel,)
        if len(self.parcels) == self.deaths:
            raise PowerCut
        super().post(parcel, residual)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5], ids=["trained", "join", "share", "mask", "unmask"])
async def test_power_may_fail_between_remembering_and_sending(world: Round, at: int) -> None:
    """The member is on disk, the parcel is not: after the cut the device says the very bytes it would have said."""
    home = world.store.home
    world.store.close()
    world.store = dying = Dying(home)
    dying.deaths = at
    with pytest.raises(PowerCut):
        await world.agent().run()
    dying.close()
    assert len(world.server.bodies) == at - 1
    world.store = Store(home)
    assert await world.agent().run() == 1

    assert world.server.bodies[at - 1] == dying.parcels[-1].body
    assert [type(answer) for answer in world.server.answers] == [Advertise, Shares, Masked, Reveal]
    check_sum(world)


class Forgetful(Store):
    """A store whose disk fails when the device would write this fact for the n-th time."""

    what: str = ""
    left: int = 0

    def set_fact(self, name: str, value: str) -> None:
        if name == self.what:
            self.left -= 1
            if not self.left:
                raise PowerCut
        super().set_fact(name, value)


@pytest.mark.parametrize(
    ("what", "at", "heard"),
    [(MEMBER, 1, 0), (MEMBER, 2, 1), (MEMBER, 3, 2), (MEMBER, 4, 3), (SPENT, 1, 3)],
    ids=["join", "share", "mask", "unmask", "spent"],
)
async def test_what_is_not_remembered_is_not_said(world: Round, what: str, at: int, heard: int) -> None:
    """Where the power fails before it is on disk, nothing has left the device, and the run goes on after it."""
    home = world.store.home
    world.store.close()
    world.store = forgetful = Forgetful(home)
    forgetful.what, forgetful.left = what, at
    with pytest.raises(PowerCut):
        await world.agent().run()
    assert (forgetful.pending(), len(world.server.answers)) == (None, heard)
    forgetful.close()
    world.store = Store(home)
    await world.agent().run()

    check_sum(world)


async def test_a_network_that_fails_loses_no_answer(world: Round) -> None:
    """A server that fails once at each answer gets the same bytes a moment later."""
    for _ in range(5):
        world.server.refusals.append(WireError("internal", "the server failed", 500))
    await world.agent().run()

    assert [type(answer) for answer in world.server.answers] == [Advertise, Shares, Masked, Reveal]
    check_sum(world)


@pytest.mark.parametrize("code", ["too-late", "cohort-failed", "wrong-cohort", "no-cohort", "cohort-full", "already-answered"])
async def test_an_answer_that_comes_too_late_is_dropped(world: Round, code: str) -> None:
    """The cohort went on without it: the device asks for work at once, and takes part in what comes."""
    world.server.work[:] = [Join(0, terms("gone", world.spec)), Join(0, terms("next", world.spec))]
    world.server.refusals.append(WireError(code, "the phase is over", 409))
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent().run()

    assert [answer.cohort for answer in world.server.answers] == ["next"]
    assert world.said(f"dropped a result the server refused ({code})")
    assert world.slept == [1.0]  # only once there is nothing to do


async def test_a_request_it_will_not_answer_is_said(world: Round) -> None:
    """A server that asks for shares before keys, or for what it must not have, gets nothing; it asks again in a minute."""
    world.server.work[:] = [Unmask(0, Survivors("one", ("a", "b"), ()))]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent().run()

    assert world.said("cannot work: this device has lost its keys of the cohort")
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]
    assert world.server.answers == []


@pytest.mark.parametrize("work", [train, lambda world: Join(0, terms("one", world.spec))], ids=["train", "join"])
async def test_without_cryptography_it_says_what_to_install(
    world: Round, monkeypatch: pytest.MonkeyPatch, work: Callable[[World], Any]
) -> None:
    """The agent ends with the command, before it has downloaded or trained anything in vain."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "cryptography" else found(name, *args))
    world.server.work[:] = [work(world)]
    with pytest.raises(MissingRuntime, match=r"pip install 'tandem-edge\[secure\]'"):
        await world.agent().run()

    assert not [path for _, path in world.server.requests if "/blobs/" in path]
    assert world.server.bodies == []


async def test_without_cryptography_plain_training_works(world: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who averages masked updates needs the package."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "cryptography" else found(name, *args))
    world.server.manifest = plain(world.server.manifest)
    world.server.work[:] = [train(world, share=True, masked=False)]
    await world.agent().run(updates=1)

    assert len(world.server.results) == 1


async def test_what_belongs_to_another_run_is_dropped(world: Round) -> None:
    """Keys and the update of an old run are gone before the first word to the new one."""
    world.store.set_fact("run", "the old one")
    secure.keep(world.store, Update("b", 0, 17, {}), delta(1, world.spec))
    say(world.store, Join(0, terms("one", world.spec)))
    world.store.set_fact(SPENT, "3")
    world.server.work.clear()
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent().run()

    assert (world.store.fact(MEMBER), world.store.fact(SPENT)) == (None, None)
    assert not (world.store.home / UNSEEN).exists()
    assert world.said("another run")


def test_every_request_has_words() -> None:
    """The one line an owner sees for each of the four."""
    of = terms()
    asked: list[Request] = [
        Join(0, of),
        SealShares(0, unmasking.roster(Cohort(of, 0.0, "share"))),
        Mask(0, unmasking.delivery(Cohort(of, 0.0, "upload", shares={"b": Shares("one", "b", {})}), "b")),
        Unmask(0, Survivors("one", (), ())),
    ]

    assert [secure.told(request) for request in asked] == [
        "sent keys",
        "sent shares",
        "sent what it learned, masked",
        "helped to take the masks off",
    ]
