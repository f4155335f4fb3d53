"""Steps before the first request, so that it does not pay for what happens only once."""

from __future__ import annotations

from sps_runtime.runner.model_runner import ModelRunner
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

TOKENS = 64


def warm_up(
    runner: ModelRunner, sp_size: int, page_size: int, pages_per_rank: int, vocab: int
) -> None:
    """Run small steps of every kind on all ranks; collective. Epoch 0 comes before all real ones,
    and the pages written are free ones."""
    sample = SamplePlan(SamplingParams(temperature=0.0))
    group = tuple(range(sp_size))
    pages_each = min(pages_per_rank, max(1, -(-TOKENS // page_size)))
    pages = [rank * pages_per_rank + slot for rank in group for slot in range(pages_each)]
    count = min(TOKENS, len(pages) * page_size)
    prompt = SequencePlan(
        slot=0,
        start=0,
        count=count,
        tokens=pack_ids(index % vocab for index in range(count)),
        pages=pack_ids(pages[: -(-count // page_size)]),
        sample=sample,
    )
    token = SequencePlan(0, 0, 1, pack_ids([0]), pack_ids(pages[:1]), sample=sample)
    runner.execute(StepPlan(0, group, (prompt,)))
    for _ in range(2):
        runner.execute(StepPlan(0, group, (token,)))
        runner.execute(StepPlan(0, group, (token,), placement="replicated", strategy="pass_q"))
