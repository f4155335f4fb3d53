"""transformers' `generate` in process, attention by torch's scaled_dot_product_attention."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


class Clock:
    """A stopping criterion that never stops: called once after each token of the batch."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter() - self.start)
        return input_ids.new_zeros(input_ids.shape[0], dtype=bool)


class Transformers:
    API = "in process"

    def prepare(self, model: str, target: str, weights: str) -> None:
        if weights != "bf16":
            raise ValueError(f"no weights {weights!r} here")

    def start(
        self, model: str, target: str, weights: str, threads: int, context: int, sequences: int
    ) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, local_files_only=True
        ).eval()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        ids = self.torch.tensor(prompts)
        clock = Clock(time.perf_counter())
        self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        return [list(clock.times) for _ in prompts]

    def stop(self) -> None:
        del self.model


def make() -> Transformers:
    return Transformers()
