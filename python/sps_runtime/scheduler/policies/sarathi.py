"""Sarathi-Serve (OSDI 2024): chunked prefill in stall-free mixed batches, tensor parallel only."""

from __future__ import annotations

from sps_runtime.scheduler.policies.view import Phase, Step, View


class Sarathi:
    """Every step has one token of every decoding request, and fills its fixed token budget with
    chunks of prompts in order of arrival. All ranks compute every token with slices of the weights;
    the budget is `chunked_prefill_size`, or `max_prefill_tokens` for whole prompts.
    """

    def steps(self, view: View) -> list[Step]:
        mask, page_size = view.all_ranks, view.cache_config.page_size
        decoding = [run for run in view.runs.values() if run.decodes]
        late = [run for run in decoding if not view.may_decode(run, mask)]
        if any(run.sent > run.target for run in late):
            return []
        decoding = [run for run in decoding if run not in late]
        size = view.config.chunked_prefill_size
        budget = size if size > 0 else view.config.max_prefill_tokens
        items = [(run, 1) for run in decoding]
        left = max(0, budget - len(items))
        for run in view.runs.values():
            if left > 0 and view.may_prefill(run):
                limit = left if size > 0 or items else None
                end = run.chunk_end(page_size, limit)
                items.append((run, end - run.sent))
                left -= end - run.sent
        if not items:
            return []
        phase: Phase = "mixed" if decoding else "prefill"
        if len(items) == len(decoding):
            phase = "decode"
        return [Step(mask, items, phase, "replicated", "pass_q", spread=True)]
