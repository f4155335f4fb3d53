from __future__ import annotations

import pytest
from test.kit.tokenizers import byte_level_tokenizer

from sps_runtime.grammar.backends import make_backend
from sps_runtime.grammar.protocol import GrammarBackend, Vocabulary

EOS = 2


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """Wider than the tokenizer, as checkpoints are."""
    tokenizer = byte_level_tokenizer()
    return Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size() + 40, (EOS,))


@pytest.fixture(scope="session")
def backend(vocabulary: Vocabulary) -> GrammarBackend:
    return make_backend("llguidance", vocabulary)
