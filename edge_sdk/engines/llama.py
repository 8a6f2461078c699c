"""A thin shell around llama.cpp: one model, one context that grows with what is asked of it, adapters, sequences, decodes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int8, c_int32, create_string_buffer
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import DataError
from edge_sdk.tokens import Ids

BATCH = 16  # sequences in one decode
TOKENS = 256  # tokens in one decode, unless a single text has more: they all attend to all cells, most of them masked

_lib: Any = llama_cpp
_log = logging.getLogger(__name__)
_ERROR = 4  # ggml's level


@_lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        _log.error("llama.cpp: %s", text.decode(errors="replace").strip())


_lib.llama_log_set(_on_log, None)  # the module keeps the callback alive for as long as llama.cpp may call it


class _Handles:
    """What llama.cpp allocated, freed in the order it needs."""

    def __init__(self) -> None:
        self.model: Any = None
        self.context: Any = None
        self.adapters: list[Any] = []

    def free(self) -> None:
        if self.context is not None:
            _lib.llama_free(self.context)
        for adapter in self.adapters:
            _lib.llama_adapter_lora_free(adapter)
        if self.model is not None:
            _lib.llama_model_free(self.model)
        self.model, self.context, self.adapters = None, None, []


class Runtime:
    """A model and a context of llama.cpp that grows with what is asked of it.

    Raises:
        DataError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._threads, self._size = threads, 0
        self._worn: Any = None
        self._hidden = False
        self._handles = _Handles()
        self.close = weakref.finalize(self, self._handles.free)  # also at exit, before modules are torn down
        params = _lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._handles.model = _lib.llama_model_load_from_file(str(path).encode(), params) if path.is_file() else None
        if not self._handles.model:
            raise DataError(
                f"llama.cpp ({_lib.__version__}) cannot load {path}; fetch the bundle again, or upgrade llama-cpp-python"
            )
        model = self._handles.model
        self.vocabulary = int(_lib.llama_vocab_n_tokens(_lib.llama_model_get_vocab(model)))
        self.width = int(_lib.llama_model_n_embd(model))
        self.layers = int(_lib.llama_model_n_layer(model))
        self.heads = int(_lib.llama_model_n_head(model))
        self.kv_heads = int(_lib.llama_model_n_head_kv(model))
        self.architecture = self._meta("general.architecture")

    def opened(self) -> None:
        """Raises: DataError: the engine is closed."""
        if self._handles.model is None:
            raise DataError("this engine is closed; open another")

    def shut(self) -> None:
        """Frees everything now."""
        self.close()
        self._size, self._worn = 0, None

    def _meta(self, key: str) -> str:
        buffer = create_string_buffer(256)
        found = _lib.llama_model_meta_val_str(self._handles.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if found >= 0 else ""

    def fit(self, tokens: int) -> bool:
        """Makes room for this many tokens at once; True where that threw away what was read before.

        Raises:
            DataError: there is not the memory, or the engine is closed.
        """
        self.opened()
        if tokens <= self._size:
            return False
        if self._handles.context is not None:
            _lib.llama_free(self._handles.context)
            self._handles.context = None
        self._size = -(-tokens // 256) * 256
        self._handles.context = _lib.llama_init_from_model(self._handles.model, self._context_params())
        if not self._handles.context:
            self._handles.context, self._size = None, 0
            raise DataError(f"llama.cpp could not make a context of {tokens} tokens; is there enough memory?")
        self.wear(self._worn)
        return True

    def _context_params(self) -> Any:
        params = _lib.llama_context_default_params()
        params.n_ctx = params.n_batch = self._size
        params.n_ubatch = min(self._size, TOKENS)
        params.n_seq_max = 1 + 2 * BATCH  # the shared one, the texts, and for each a copy to try words on
        params.embeddings = self._hidden
        if not self._hidden:  # which makes every token an output
            params.n_outputs_max = params.n_seq_max  # otherwise one row of the whole vocabulary for each token
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = _lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = True  # a copied sequence shares its cells
        params.swa_full = True  # a window that forgets cannot be shared
        params.no_perf = True
        return params

    def load_adapter(self, path: Path) -> Any:
        """None where llama.cpp refuses the file."""
        loaded = _lib.llama_adapter_lora_init(self._handles.model, str(path).encode())
        if loaded:
            self._handles.adapters.append(loaded)
        return loaded or None

    def free_adapter(self, adapter: Any) -> None:
        self._handles.adapters.remove(adapter)
        _lib.llama_adapter_lora_free(adapter)

    def wear(self, adapter: Any) -> None:
        """Uses a loaded adapter, or none, and forgets what was read.

        Raises:
            DataError: llama.cpp refuses it; the old one stays.
        """
        if self._handles.context is not None:
            count = 0 if adapter is None else 1
            adapters = (_lib.llama_adapter_lora_p_ctypes * count)(*[adapter][:count])
            if _lib.llama_set_adapters_lora(self._handles.context, adapters, count, (c_float * count)(*[1.0][:count])):
                raise DataError("llama.cpp refuses the adapter")
            _lib.llama_memory_clear(self._memory, False)
        self._worn = adapter

    @property
    def _memory(self) -> Any:
        return _lib.llama_get_memory(self._handles.context)

    def copy(self, source: int, target: int) -> None:
        _lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def forget(self, sequence: int) -> None:
        _lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def ask_hidden(self, wanted: bool) -> None:
        """Whether outputs are hidden states instead of scores; the context is made anew for either."""
        self._hidden, self._size = wanted, 0

    def decode(self, parts: Sequence[tuple[int, int, Ids]]) -> list[int]:
        """Reads (sequence, first position, tokens) parts at once; the batch index of each part's last token.

        Raises:
            DataError: llama.cpp reports a failure.
        """
        lengths = [len(ids) for _, _, ids in parts]
        token = np.concatenate([np.asarray(ids, np.int32) for _, _, ids in parts])
        if token.min() < 0 or token.max() >= self.vocabulary:
            raise DataError(f"token id {int(token.max())} is not in the model's vocabulary of {self.vocabulary}; export again")
        position = np.concatenate([np.arange(at, at + len(ids), dtype=np.int32) for _, at, ids in parts])
        sequence = np.repeat(np.array([s for s, _, _ in parts], np.int32), lengths)
        last = np.cumsum(lengths) - 1
        wanted = np.zeros(len(token), np.int8)
        wanted[last] = 1
        if code := _decode(self._handles.context, token, position, sequence, wanted):
            raise DataError(f"llama.cpp could not read {len(token)} tokens (code {code})")
        return [int(i) for i in last]

    def scores(self, index: int) -> NDArray[np.float32]:
        """Scores (vocabulary,) of the token after a batch index; valid until the next decode."""
        pointer = _lib.llama_get_logits_ith(self._handles.context, index)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,))

    def hidden(self, index: int) -> NDArray[np.float32]:
        """Final hidden state (width,) at a batch index; valid until the next decode."""
        pointer = _lib.llama_get_embeddings_ith(self._handles.context, index)
        return np.ctypeslib.as_array(pointer, (self.width,))


def _decode(
    context: Any, token: NDArray[np.int32], position: NDArray[np.int32], sequence: NDArray[np.int32], wanted: NDArray[np.int8]
) -> int:
    """One llama_decode over arrays, each token in one sequence."""
    ones = np.ones(len(token), np.int32)
    pointers = sequence.ctypes.data + sequence.itemsize * np.arange(len(token), dtype=np.uintp)
    batch = _lib.llama_batch(n_tokens=len(token))
    batch.token = token.ctypes.data_as(POINTER(c_int32))
    batch.pos = position.ctypes.data_as(POINTER(c_int32))
    batch.n_seq_id = ones.ctypes.data_as(POINTER(c_int32))
    batch.seq_id = pointers.ctypes.data_as(POINTER(POINTER(c_int32)))
    batch.logits = wanted.ctypes.data_as(POINTER(c_int8))
    return int(_lib.llama_decode(context, batch))
