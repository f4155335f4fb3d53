"""The calls that score choices after a text.

The tokens of a text and a choice together need not be those of the text followed by those of
the choice: the text's last token may merge with the choice's first. So scoring begins before
the text's end, at the same token as in SGLang's front end, and leaves that token out where the
text ends with it: programs get the same figures from both.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from sps_runtime.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    TokenLogprob,
    logprobs,
)

Ask = Callable[[dict[str, Any]], Any]
_NO_TOKENS = {"max_new_tokens": 0, "temperature": 0}


def decide(
    ask: Ask, text: str, choices: list[str], method: ChoicesSamplingMethod
) -> ChoicesDecision:
    """Score `choices` after `text` and let `method` choose: two calls, three if it wants more."""
    prefilled = ask({"text": text, "sampling_params": _NO_TOKENS})
    start = max(prefilled["meta_info"]["prompt_tokens"] - 2, 0)
    answers = ask(
        {
            "text": [text + choice for choice in choices],
            "sampling_params": _NO_TOKENS,
            "return_logprob": True,
            "return_text_in_logprobs": True,
            "logprob_start_len": start,
        }
    )
    scored = [_unless_kept(text, _scores(answer)) for answer in answers]
    return method(
        choices=choices,
        normalized_prompt_logprobs=[fmean(logprobs(tokens)) for tokens in scored],
        input_token_logprobs=scored,
        output_token_logprobs=[answer["meta_info"]["output_token_logprobs"] for answer in answers],
        unconditional_token_logprobs=(
            _alone(ask, scored) if method.requires_unconditional_logprobs else None
        ),
    )


def _scores(answer: dict[str, Any]) -> list[TokenLogprob]:
    return list(answer["meta_info"]["input_token_logprobs"])


def _unless_kept(text: str, tokens: list[TokenLogprob]) -> list[TokenLogprob]:
    """`tokens` without the first if it is as it was in `text`."""
    kept = len(tokens) > 1 and text.endswith(tokens[0][2])
    return tokens[1:] if kept else tokens


def _alone(ask: Ask, scored: list[list[TokenLogprob]]) -> list[list[TokenLogprob]]:
    """The same tokens' logprobs without the text before them."""
    answers = ask(
        {
            "input_ids": [[token[1] for token in tokens] for tokens in scored],
            "sampling_params": _NO_TOKENS,
            "return_logprob": True,
            "logprob_start_len": 0,
        }
    )
    return [_scores(answer) for answer in answers]
