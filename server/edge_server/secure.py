"""Secure averaging in a run: when a cohort is formed, and what comes of it. `cohorts.py` and `unmasking.py` say the rest."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array, Arrays, add
from edge_server import cohorts, unmasking
from edge_server.cohorts import Secure
from edge_server.coordinator import Opened, State, Ticked
from edge_server.storage import Blobs
from edge_server.systems.lpfl import LpFl
from edge_server.unmasking import Cohort, Failed


@dataclass(frozen=True)
class SecureAverage:
    """The server's side.

    Args:
        how: a version is made. secure: settings of the cohorts. run: its id, in their names.
        spec: of the adapter. blobs: where masked vectors lie.
    """

    how: LpFl
    secure: Secure
    run: str
    spec: AdapterSpec
    blobs: Blobs

    def form(self, state: State, now: float) -> Opened | None:
        """A cohort, where none is under way, no shares were revealed for this version, and there is still one to make."""
        match state.cohort:
            case Cohort() | Failed(revealed=True):
                return None
        if state.version >= self.how.versions:
            return None
        name = f"{self.run[:16]}-{state.version}-{state.cohorts}"
        terms = cohorts.terms(self.secure, self.how.buffer_size, self.spec, name, self.how.max_examples)
        return Opened(terms, now + self.secure.join_seconds, self.secure.phase_seconds)

    def due(self, state: State, now: float) -> tuple[Opened | Ticked | None, str]:
        """What is to happen by itself now, and what to say of it: a deadline is over, or a cohort follows one that failed."""
        match state.cohort:
            case Cohort() as cohort if unmasking.advance(cohort, now, state.seconds) is not cohort:
                return Ticked(now), ""
            case Failed(name, reason, revealed=False):
                return self.form(state, now), f"cohort {name} has failed: {reason}; the next one is formed"
        return None, ""

    def patience(self, state: State, now: float) -> float | None:
        """Seconds until the cohort's deadline; None where there is none."""
        cohort = state.cohort
        return max(cohort.deadline - now, 0.01) if isinstance(cohort, Cohort) and cohort.phase != "done" else None

    def average(self, cohort: Cohort, adapter: Arrays) -> dict[str, Array]:
        """The next version's adapter, of a cohort that is done. Raises: WireError: somebody lied."""
        length = cohort.terms.length + 1
        vectors = (wire.unpack_masked(self.blobs.get(blob), length)[1] for blob in cohort.uploads.values())
        mean, _ = unmasking.unmask(cohort, vectors)
        return add(adapter, cohorts.unflatten(mean, self.spec), self.how.server_lr)
