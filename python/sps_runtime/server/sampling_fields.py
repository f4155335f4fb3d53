"""How a token is drawn and when an answer ends, in the words of OpenAI's routes and of vLLM's and
SGLang's further options."""

from __future__ import annotations

import msgspec

from sps_runtime.frontend.query import SamplingOptions


class SamplingFields(msgspec.Struct, kw_only=True):
    """What all routes in OpenAI's manner take; each has its own word for the most tokens."""

    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None

    def sampling_options(self, max_new_tokens: int | None, n: int | None = None) -> SamplingOptions:
        """Return the options in the gate's words."""
        return SamplingOptions(
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            sampling_seed=self.seed,
            stop=self.stop,
            stop_regex=self.stop_regex,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            no_stop_trim=bool(self.no_stop_trim or self.include_stop_str_in_output),
            n=n,
        )
