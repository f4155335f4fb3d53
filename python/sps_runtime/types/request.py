"""A request as the scheduler accepts it."""

from __future__ import annotations

import msgspec

from sps_runtime.types.attention import EXACT, AttentionSpec
from sps_runtime.types.sampling import LogprobParams, SamplingParams


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="generate"):
    """One tokenized, validated request. Only `frontend.validation` makes it.

    Attributes:
        rid: the engine's own id, 128 random bits in hex, unique for ever. Never the client's.
        tokens: the prompt, packed int32 ids (`types.tokens`), at least one.
        sampling: how to sample.
        tenant: the cache namespace, chosen by the server.
        attention: how attention is computed.
        logprobs: which logprobs are wanted, None for none.
        hidden_state: the answer is the hidden state of the prompt's last token; `sampling` asks for
            no tokens then.
        live: its tokens are wanted as they are sampled; otherwise they may come later, together.
    """

    rid: str
    tokens: bytes
    sampling: SamplingParams
    tenant: str = ""
    attention: AttentionSpec = EXACT
    logprobs: LogprobParams | None = None
    hidden_state: bool = False
    live: bool = True
