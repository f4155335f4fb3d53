"""OpenVINO GenAI in process: its continuous batching pipeline (paged attention) on the CPU.

Parity with the others: bf16 arithmetic and bf16 KV, dynamic quantization off, no prefix cache.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KV_BYTES_PER_TOKEN = 12_288
"""Of the 0.5b shape in bf16; only the size of the cache follows from it."""
BATCHED_TOKENS = 4096
"""New tokens of a step at most. Measured on the 0.5b shape: 512 is 1% slower at 2k, whole prompts
of 8k are slower too."""

SPARSE_BLOCK = 64
"""Tokens of a block of XAttention: its default, and our pages'. Its stride stays 8, the default."""


class OpenVino:
    API = "in process"

    def prepare(self, model: str, target: str, weights: str) -> None:
        if weights != "bf16":
            raise ValueError(f"no weights {weights!r} here")
        if (Path(target) / "openvino_model.bin").exists():
            return
        tool = str(Path(sys.executable).parent / "optimum-cli")
        task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
        command = [tool, "export", "openvino", "-m", model, *task, target]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def start(
        self,
        model: str,
        target: str,
        weights: str,
        threads: int,
        context: int,
        sequences: int,
        density: float = 0.0,
    ) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = max(1, -(-context * KV_BYTES_PER_TOKEN * 5 // 4 >> 30))
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = BATCHED_TOKENS
        scheduler.max_num_seqs = sequences
        if density:
            scheduler.use_sparse_attention = True
            scheduler.sparse_attention_config = genai.SparseAttentionConfig(
                mode=genai.SparseAttentionMode.XATTENTION,
                num_last_dense_tokens_in_prefill=SPARSE_BLOCK,
                xattention_threshold=density,
                xattention_block_size=SPARSE_BLOCK,
            )
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
        }
        self.genai = genai
        self.pipeline = genai.ContinuousBatchingPipeline(target, scheduler, "CPU", properties)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        import numpy
        import openvino

        config = self.genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        arrays = [numpy.array([prompt], dtype=numpy.int64) for prompt in prompts]
        start = time.perf_counter()
        handles = [
            self.pipeline.add_request(index, openvino.Tensor(array), config)
            for index, array in enumerate(arrays)
        ]
        times: list[list[float]] = [[] for _ in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter() - start
            for handle, row in zip(handles, times, strict=True):
                while handle.can_read():
                    fresh = sum(len(part.generated_ids) for part in handle.read().values())
                    row.extend([now] * fresh)
        return times

    def stop(self) -> None:
        del self.pipeline


def make() -> OpenVino:
    return OpenVino()
