"""ONNX Runtime on a bundle: class scores for texts, with any adapter swapped in by name.

The whole engine protocol is `set_adapter` and `scores`; another runtime offers the same two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_sdk.adapters import AdapterSpec, Arrays, mismatch, shapes_of
from edge_sdk.bundle import Bundle
from edge_sdk.errors import DataError
from edge_sdk.tasks import Head, Task
from edge_sdk.tokens import Ids, PromptEncoder, by_length, pad


class OnnxEngine:
    """Runs `model.onnx` of a bundle folder for one task.

    Args:
        folder: the bundle; its files are trusted to be verified.
        threads: of ONNX Runtime inside one operator.

    Raises:
        DataError: the task's words do not fit the bundle's tokenizer or kind.
    """

    def __init__(self, folder: Path, bundle: Bundle, task: Task, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # one warning per optional input otherwise
        self._session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._slots = {slot.a: slot for slot in bundle.slots}
        self._feeds: dict[str, NDArray[np.float32]] = {}
        self.encoder = PromptEncoder(folder / "tokenizer.json", bundle.prefix, bundle.suffix, bundle.positions, task)
        self.head = Head(self._rows(bundle, task), task.scale)

    def set_adapter(self, arrays: Arrays | None, spec: AdapterSpec) -> None:
        """Uses an adapter from the next call on; None goes back to the base model.

        Raises:
            DataError: names or shapes do not fit the spec, or the spec does not fit this bundle.
        """
        if arrays is None:
            self._feeds = {}
            return
        if problem := mismatch(shapes_of(arrays), spec.shapes()):
            raise DataError(f"the adapter does not fit: {problem}")
        unknown = [slot.module for slot in spec.slots if slot != self._slots.get(slot.a)]
        if unknown:
            raise DataError(f"this bundle has no adapter slot for {unknown[0]}")
        self._feeds = {s.a: np.ascontiguousarray(arrays[s.a], np.float32) for s in spec.slots}
        self._feeds |= {s.b: np.ascontiguousarray(arrays[s.b] * np.float32(spec.scaling)) for s in spec.slots}

    def scores(self, texts: Sequence[str], batch_size: int = 16) -> NDArray[np.float32]:
        """Class scores (n, n_classes) before the softmax, in the order of `texts`."""
        return self.head.scores(self._readout(self.encoder.prompts(texts), batch_size))

    def _readout(self, sequences: Sequence[Ids], batch_size: int = 16) -> NDArray[np.float32]:
        width = self._session.get_outputs()[0].shape[1]
        out = np.zeros((len(sequences), width), np.float32)
        for batch in by_length(sequences, batch_size):
            ids, mask = pad([sequences[i] for i in batch])
            feeds = {"input_ids": ids, "attention_mask": mask, **self._feeds}
            if "token_type_ids" in self._inputs:
                feeds["token_type_ids"] = np.zeros_like(ids)
            if "position_ids" in self._inputs:
                feeds["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
            if "label_ids" in self._inputs:
                feeds["label_ids"] = np.zeros(0, np.int64)
            (out[batch],) = self._session.run(["readout"], feeds)
        return out

    def _rows(self, bundle: Bundle, task: Task) -> NDArray[np.float32]:
        """Decoder: output embeddings of the label words. Encoder: unit-length mean of each label's descriptions."""
        if bundle.kind == "encoder":
            means = [self._readout([self.encoder.description(d) for d in words]).mean(0) for words in task.verbalizer]
            return np.stack([m / np.linalg.norm(m) for m in means]).astype(np.float32)
        if any(len(words) != 1 for words in task.verbalizer):
            raise DataError("a decoder needs exactly one label word per class")
        ids = np.array([self.encoder.word(words[0]) for words in task.verbalizer], np.int64)
        if len(set(ids.tolist())) < len(ids):
            raise DataError("two label words are the same token of this tokenizer; choose others")
        some = np.ones((1, 1), np.int64)
        feeds = {"input_ids": some, "attention_mask": some, "position_ids": some - 1, "label_ids": ids}
        (rows,) = self._session.run(["rows"], {k: v for k, v in feeds.items() if k in self._inputs})
        return np.asarray(rows, np.float32)
