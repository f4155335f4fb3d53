"""The same questions asked of the engine itself, behind its scheduler and prefix cache.

``sparse``: prompt and answer are one prefill, and the most likely token of each position of the
answer is read from prompt logprobs. ``exact`` and ``decoded`` generate the answer after the prompt,
exactly (the default of a server) or by sparse decode.
"""

from __future__ import annotations

import time
from statistics import mean
from typing import Any

from accuracy_cases import Group, Prompt
from accuracy_choose import Setup
from accuracy_judge import Verdict
from sps_runtime.engine import Engine
from sps_runtime.types.attention import SparseSettings


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
        answers = self._ask([first], setup, decode)
        for at in range(0, len(others), 8):
            answers += self._ask(others[at : at + 8], setup, decode)
        verdict = Verdict()
        for prompt, answer in zip(group.prompts, answers, strict=True):
            right, nats = judged(prompt, answer, decode)
            verdict.right.append(right)
            verdict.nats.append(round(nats, 4))
        report = answers[0]["meta_info"].get("attention") or {}
        if report.get("reason"):
            raise RuntimeError(f"the engine ran exact attention: {report['reason']}")
        verdict.density = round(float(report.get("density", 1.0)), 5)
        verdict.seconds = round(time.monotonic() - begin, 2)
        return verdict

    def _ask(self, prompts: list[Prompt], setup: Setup, decode: str) -> list[dict[str, Any]]:
        fed = decode == "sparse"
        most = [1 if fed else len(prompt.answer) for prompt in prompts]
        each: list[dict[str, Any]] = self._engine.generate(
            input_ids=[p.prompt + p.answer if fed else p.prompt for p in prompts],
            sampling_params=[
                {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} for tokens in most
            ],
            return_logprob=True,
            logprob_start_len=[len(prompt.prompt) - 1 for prompt in prompts],
            top_logprobs_num=1,
            attention=asked(setup, decode),
        )
        return each


def asked(setup: Setup, decode: str) -> dict[str, Any]:
    """The request's ``attention``.

    Raises:
        ValueError: for what a request cannot ask.
    """
    if setup.estimator == "dense":
        return {"mode": "exact"}
    told = {"tau": setup.settings.tau, "budget": setup.settings.budget}
    if setup != Setup(setup.estimator, SparseSettings(**told)):
        raise ValueError("the engine takes an estimator, a budget and tau; the rest is its default")
    how: dict[str, Any] = {"decode": "sparse" if decode == "decoded" else "exact"}
    return {"mode": "csa", "estimator": setup.estimator, **told, **how}


def judged(prompt: Prompt, answer: dict[str, Any], decode: str) -> tuple[bool, float]:
    """Whether every token of the answer was the most likely one, and its mean nats.

    Raises:
        ValueError: the engine judged other tokens.
    """
    if decode != "sparse":
        chosen = answer["meta_info"]["output_token_logprobs"]
        return answer["output_ids"] == prompt.answer, -mean([logprob for logprob, *_ in chosen])
    tokens = answer["meta_info"]["input_token_logprobs"][-len(prompt.answer) :]
    best = answer["meta_info"]["input_top_logprobs"][-len(prompt.answer) :]
    if [token for _, token, *_ in tokens] != prompt.answer:
        raise ValueError("the engine judged other tokens than the answer's")
    right = all(top[0][1] == token for top, token in zip(best, prompt.answer, strict=True))
    return right, -mean([logprob for logprob, *_ in tokens])
