"""Lets LLM and SLM distil each other on the server's own texts, once for each version (FedCoLLM)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from edge_sdk import wire
from edge_sdk.adapters import Array, Arrays
from edge_sdk.tasks import Example
from edge_server.compute import Compute, expect
from edge_server.coordinator import State
from edge_server.llm.jobs import Distil, Distilled
from edge_server.storage import Blobs
from edge_server.systems.fedcollm import FedCoLlm


@dataclass(frozen=True)
class Distiller:
    """The server's side of a run.

    Args:
        examples: its own labelled texts. blobs: where the LLM's adapters lie. compute: where the models are.
    """

    settings: FedCoLlm
    examples: tuple[Example, ...]
    blobs: Blobs
    compute: Compute

    async def refine(self, averaged: Arrays, state: State) -> tuple[dict[str, Array], str, str]:
        """A version's adapter, the blob of the LLM's, and what to say of it. Raises: as `distil`."""
        learned, llm, how = await self.distil(averaged, state)
        return learned, llm, f"; distilled in {how.seconds:.0f} s, losses {how.slm_loss:.3f} and {how.llm_loss:.3f} (LLM)"

    async def distil(self, averaged: Arrays, state: State) -> tuple[dict[str, Array], str, Distilled]:
        """The SLM's adapter after learning from the LLM, the blob of the LLM's, and how it went.

        Raises:
            JobFailed, DataError, OSError: it cannot be done now.
        """
        slm, slm_out, llm_out = (self.blobs.incoming() for _ in range(3))
        try:
            await asyncio.to_thread(slm.write_bytes, wire.pack_adapter(averaged))
            job = Distil(
                str(self.blobs.file(state.tuned[-1])) if state.tuned else "",
                str(slm),
                str(llm_out),
                str(slm_out),
                self.examples,
                self.settings.mutual,
                self.settings.averaging.seed + state.version + 1,
            )
            outcome = expect(await self.compute.run(job), Distilled)
            shapes = {name: array.shape for name, array in averaged.items()}
            learned = wire.unpack_adapter(await asyncio.to_thread(slm_out.read_bytes), shapes)
            return learned, await asyncio.to_thread(self.blobs.take, llm_out), outcome
        finally:
            for path in (slm, slm_out, llm_out):
                path.unlink(missing_ok=True)
