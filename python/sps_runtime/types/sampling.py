"""Sampling parameters as the engine sees them: validated, normalised, complete."""

from __future__ import annotations

import msgspec

GREEDY_TEMPERATURE = 1e-6
"""A temperature below this is greedy (SGLang's rule)."""


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one request's tokens are chosen and when it stops.

    Made by the one gate `frontend.validation`; nothing behind the gate checks a range again.
    Stop strings and expressions are matched on text by the detokenizer, stop ids by the scheduler.

    Attributes:
        max_new_tokens: tokens to generate at most, >= 0 (0: prefill only).
        min_new_tokens: no stop token is sampled before this many tokens.
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: in (0, 1]; 1 is off.
        min_p: in [0, 1]; 0 is off.
        presence_penalty, frequency_penalty: in [-2, 2], over generated tokens.
        repetition_penalty: in (0, 2], over prompt and generated tokens; 1 is off.
        logit_bias: added to the logits of these ids.
        seed: the key of the counter-based generator; the token at position p depends on
            (seed, p) and its logits alone. Always set: the gate draws one where the client did not.
        stop: strings that end the text.
        stop_regex: expressions that end the text.
        stop_token_ids: ids that end the text, EOS ids excluded.
        ignore_eos: do not stop at the model's EOS ids. Without effect under a grammar, which says
            itself where an answer may end.
        grammar: what the answer must follow, as a `grammar.protocol.GrammarBackend` prepared it; ""
            for none.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: str = ""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def penalized(self) -> bool:
        """Whether the sampler needs the tokens that came before."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class LogprobParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which log-probabilities a request wants, of the distribution before temperature.

    Attributes:
        top: alternatives per position, 0 for the chosen token alone.
        token_ids: ids whose logprob is wanted at every position.
        prompt_start: first prompt position wanted; -1 for none of the prompt. Position 0 has no
            logprob (nothing precedes it).
    """

    top: int = 0
    token_ids: tuple[int, ...] = ()
    prompt_start: int = -1
