"""What one request may ask for at most."""

from __future__ import annotations

from dataclasses import dataclass

MIN_BODY_BYTES = 16 << 20
BODY_BYTES_PER_TOKEN = 8


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that the gate and the server apply to every request.

    Attributes:
        context_length: prompt plus generated tokens of one sequence, at most.
        vocab_size: width of the logits; every token id in every field is below it.
        max_choices: `n`.
        max_prompts: prompts in one batch.
        max_sequences: prompts times `n`.
        max_stop_strings, max_stop_chars: how many stop strings, and how long each.
        max_ids: entries of logit_bias, stop_token_ids and token_ids_logprob, each.
        max_top_logprobs: alternatives reported per position.
    """

    context_length: int
    vocab_size: int
    max_choices: int = 16
    max_prompts: int = 64
    max_sequences: int = 64
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_ids: int = 300
    max_top_logprobs: int = 20

    @property
    def max_body_bytes(self) -> int:
        """A context full of text must fit into one request body, written plainly."""
        return max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * self.context_length)
