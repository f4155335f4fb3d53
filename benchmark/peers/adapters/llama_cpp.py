"""llama.cpp in process, through its C API: what `llama-bench` and its server call too."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.adapters.gguf_file import write_gguf

FTYPES = {"q8_0": 7, "q4_0": 2}
"""`enum llama_ftype`."""
BATCH = 2048
UBATCH = 512
"""llama.cpp's defaults: tokens of a call, and of a graph."""


class LlamaCpp:
    API = "in process"

    def prepare(self, model: str, target: str, weights: str) -> None:
        plain = Path(target) / "bf16.gguf"
        plain.parent.mkdir(parents=True, exist_ok=True)
        if not plain.exists():
            part = plain.with_suffix(".part")
            write_gguf(Path(model), part)
            part.rename(plain)
        wanted = Path(target) / f"{weights}.gguf"
        if not wanted.exists():
            self._quantize(plain, wanted, FTYPES[weights])

    def _quantize(self, source: Path, target: Path, ftype: int) -> None:
        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = ftype
        params.nthread = 1
        part = target.with_suffix(".part")
        arguments = (str(source).encode(), str(part).encode(), ctypes.byref(params))
        if llama_cpp.llama_model_quantize(*arguments):
            raise RuntimeError("llama_model_quantize failed")
        part.rename(target)

    def start(
        self, model: str, target: str, weights: str, threads: int, context: int, sequences: int
    ) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        path = str(Path(target) / f"{weights}.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(
            path, llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"cannot load {path.decode()}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-context // 256) * 256
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("cannot make a context")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        times: list[list[float]] = []
        last: list[int] = []
        for sequence, prompt in enumerate(prompts):
            last.append(self._prefill(sequence, prompt))
            times.append([time.perf_counter() - start])
        for step in range(new_tokens - 1):
            rows = [
                (token, len(prompt) + step, sequence, True)
                for sequence, (token, prompt) in enumerate(zip(last, prompts, strict=True))
            ]
            self._decode(rows)
            last = [self._greedy(index) for index in range(len(rows))]
            now = time.perf_counter() - start
            for row in times:
                row.append(now)
        return times

    def _prefill(self, sequence: int, prompt: Sequence[int]) -> int:
        size = len(prompt)
        for begin in range(0, size, BATCH):
            end = min(size, begin + BATCH)
            self._decode([(prompt[i], i, sequence, i == size - 1) for i in range(begin, end)])
        return self._greedy(-1)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Run rows of (token, position, sequence, logits wanted)."""
        batch: Any = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _greedy(self, index: int) -> int:
        import numpy

        row = self.api.llama_get_logits_ith(self.context, index)
        return int(numpy.ctypeslib.as_array(row, shape=(self.vocab_size,)).argmax())

    def stop(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def make() -> LlamaCpp:
    return LlamaCpp()
