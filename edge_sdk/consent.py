"""What a device does for no server: show what it learned by itself where it is to be averaged unseen; pure.

Whether a run averages unseen, and among how many devices, stands in its manifest, and stays so for the run. An owner who does not
trust the server's word on it starts the device with `only_secure`.
"""

from __future__ import annotations

from edge_sdk.cohort import Join, Request
from edge_sdk.errors import WireError
from edge_sdk.protocol import Manifest, Train, Work


def check_manifest(known: Manifest | None, manifest: Manifest) -> None:
    """A run that averages unseen does so to its end.

    Args:
        known: the manifest this device met last.

    Raises:
        WireError: `not-secure`: `manifest` is of the same run, and says something else of it.
    """
    if known is not None and known.run == manifest.run and known.secure not in (None, manifest.secure):
        raise WireError("not-secure", "the server says now that this run averages otherwise than it has said before", 409)


def check(manifest: Manifest, work: Work, only_secure: bool) -> None:
    """Whether the device does this work.

    Raises:
        WireError: `not-secure`: it would share a bare update, and the run averages unseen or the device is `only_secure`; it is
            secure averaging, of which the manifest says nothing; or a cohort of other size or threshold.
    """
    if bare(work) and only_secure:
        raise WireError("not-secure", "this device shares what it learned only in secure averaging, as its owner wants", 409)
    if bare(work) and manifest.secure is not None:
        raise WireError("not-secure", "this run averages unseen, and the server asks for the update by itself", 409)
    if manifest.secure is None and (isinstance(work, Request) or (isinstance(work, Train) and work.masked)):
        raise WireError("not-secure", "this run's manifest says nothing of secure averaging", 409)
    if isinstance(work, Join) and work.terms.quorum != manifest.secure:
        raise WireError("not-secure", "the cohort has another size or threshold than the manifest says", 409)


def bare(work: Work) -> bool:
    """Whether the server would get what this device learned, by itself."""
    return isinstance(work, Train) and work.share and not work.masked
