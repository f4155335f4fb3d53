"""vLLM's CPU build in process: its V1 engine, stepped by hand, one rank on all threads."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any


def settings(threads: int) -> dict[str, str]:
    """Environment that vLLM reads at import: cores to bind to, and no process or network more."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Vllm:
    API = "in process"

    def prepare(self, model: str, target: str, weights: str) -> None:
        if weights != "bf16":
            raise ValueError(f"no weights {weights!r} here")

    def start(
        self, model: str, target: str, weights: str, threads: int, context: int, sequences: int
    ) -> None:
        os.environ.update(settings(threads))
        from vllm import EngineArgs, SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = EngineArgs(
            model=model,
            dtype="bfloat16",
            max_model_len=context,
            max_num_seqs=sequences,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.sampling = SamplingParams
        self.engine = LLMEngine.from_engine_args(arguments)
        self.sent = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        params: Any = self.sampling(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        times: dict[str, list[float]] = {}
        start = time.perf_counter()
        for prompt in prompts:
            self.sent += 1
            times[str(self.sent)] = []
            self.engine.add_request(str(self.sent), {"prompt_token_ids": list(prompt)}, params)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                row = times[output.request_id]
                row.extend([now] * (len(output.outputs[0].token_ids) - len(row)))
        return list(times.values())

    def stop(self) -> None:
        del self.engine


def make() -> Vllm:
    return Vllm()
