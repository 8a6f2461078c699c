"""FedCoLLM: the server's LLM and the devices' SLM teach each other through the SLM's adapter (Fan et al. 2024, 2411.11707).

    server:  theta^0 <- LoRA that changes nothing
    device:  theta_k <- Train(theta^t; private labels)                                  edge_sdk/verbs.py
    server:  theta <- mean of theta_k                                                   `lpfl.step`
             for each batch of D_a: theta <- CE + lambda KL(LLM || SLM), omega <- CE + lambda KL(SLM || LLM)    llm/distil.py
             theta^(t+1) <- theta

The paper averages all devices, unweighted, in synchronous rounds: that is a buffer of as many updates as there are devices, each
with as many examples; an asynchronous, weighted mean is what other settings give.
"""

from __future__ import annotations

import msgspec

from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import Work
from edge_server.coordinator import Buffered, Device, State
from edge_server.llm.jobs import LlmSettings, Mutual
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl


class FedCoLlm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a run.

    Args:
        auxiliary: the server's own labelled texts (D_a): a file of JSON lines with text and label, as `edge-agent add` reads
            them. A relative path is one beside the run's file.
        averaging: how devices train, and how many of them make a version; soft labels are not used.
        mutual: how LLM and SLM distil each other. llm: which LLM it is.
    """

    auxiliary: str
    averaging: LpFl = LpFl(soft=None)
    mutual: Mutual = Mutual()
    llm: LlmSettings = LlmSettings()

    def __post_init__(self) -> None:
        if not self.auxiliary:
            raise SettingsError("fedcollm.auxiliary names the file of the server's own labelled texts")
        if self.llm.endpoint:
            raise SettingsError("fedcollm.llm.endpoint: what another server runs cannot be trained here; leave it empty")


def averaging(settings: FedCoLlm) -> LpFl:
    """Labels alone."""
    return msgspec.structs.replace(settings.averaging, soft=None)


def start(settings: FedCoLlm, spec: AdapterSpec) -> dict[str, Array]:
    """Version 0: an adapter that changes nothing."""
    return lpfl.start(settings.averaging, spec)


def plan(settings: FedCoLlm, state: State, device: Device, can_train: bool) -> Work:
    """What a device that asks should do now: train on its labels, once for each version, and measure."""
    return lpfl.plan(averaging(settings), state, device, can_train)


def averaged(settings: FedCoLlm, state: State, now: float) -> tuple[Buffered, ...]:
    """The updates the next version is made from."""
    return lpfl.averaged(settings.averaging, state, now)


def finished(settings: FedCoLlm, state: State) -> bool:
    """Whether the last version is made and every device has measured it."""
    return lpfl.finished(settings.averaging, state)
