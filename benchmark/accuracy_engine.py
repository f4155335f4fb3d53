"""The same questions asked of the engine itself: prompt and answer as one prefill, the most likely
token of each position of the answer read from prompt logprobs."""

from __future__ import annotations

import time
from typing import Any

from accuracy_cases import Group, Prompt
from accuracy_choose import Setup
from accuracy_judge import Verdict
from sps_runtime.engine import Engine


class EngineJudge:
    """The embedded model behind the scheduler, as served; its prefix cache keeps documents' pages.

    Args:
        tokens: of the longest prompt.
        ranks: SP ranks.
    """

    def __init__(self, tokens: int, ranks: int = 1) -> None:
        self._engine = Engine(
            "embedded",
            sp_size=ranks,
            csa_min_tokens=1,
            max_total_tokens=3 * tokens,
            log_level="error",
        )

    def close(self) -> None:
        self._engine.shutdown()

    def __call__(self, group: Group, setup: Setup, decode: str = "sparse") -> Verdict:
        """One document's questions; the first alone, so that the others find its pages."""
        begin = time.monotonic()
        self._engine.flush_cache()
        first, *others = group.prompts
        answers = [self._ask([first], setup)[0]]
        for at in range(0, len(others), 8):
            answers += self._ask(others[at : at + 8], setup)
        verdict = Verdict()
        for prompt, answer in zip(group.prompts, answers, strict=True):
            right, nats = judged(prompt, answer["meta_info"])
            verdict.right.append(right)
            verdict.nats.append(round(nats, 4))
        report = answers[0]["meta_info"].get("attention") or {}
        verdict.density = round(float(report.get("density", 1.0)), 5)
        verdict.seconds = round(time.monotonic() - begin, 2)
        return verdict

    def _ask(self, prompts: list[Prompt], setup: Setup) -> list[dict[str, Any]]:
        each: list[dict[str, Any]] = self._engine.generate(
            input_ids=[prompt.prompt + prompt.answer for prompt in prompts],
            sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=[len(prompt.prompt) - 1 for prompt in prompts],
            top_logprobs_num=1,
            attention=asked(setup),
        )
        return each


def asked(setup: Setup) -> dict[str, Any]:
    """The request's ``attention``."""
    if setup.estimator == "dense":
        return {"mode": "exact"}
    settings = setup.settings
    return {
        "mode": "csa",
        "estimator": setup.estimator,
        "tau": settings.tau,
        "budget": settings.budget,
    }


def judged(prompt: Prompt, meta: dict[str, Any]) -> tuple[bool, float]:
    """Whether every token of the answer was the most likely one, and its mean nats."""
    tokens = meta["input_token_logprobs"][-len(prompt.answer) :]
    best = meta["input_top_logprobs"][-len(prompt.answer) :]
    if [token for _, token, *_ in tokens] != prompt.answer:
        raise ValueError("the engine judged other tokens than the answer's")
    right = all(top[0][1] == token for top, token in zip(best, prompt.answer, strict=True))
    return right, -sum(logprob for logprob, *_ in tokens) / len(tokens)
