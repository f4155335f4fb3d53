from __future__ import annotations

import pytest
from test.kit import tokenizers as kinds

from sps_runtime.frontend.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte_level")
    kinds.write_directory(directory, kinds.byte_level_tokenizer(), eos_token="<|im_end|>")
    return Tokenizer(directory)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("sentencepiece")
    return Tokenizer(
        kinds.write_directory(
            directory,
            kinds.sentencepiece_tokenizer(),
            template=None,
            bos_token={"content": "<s>"},
            eos_token="</s>",
        )
    )


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("wordpiece")
    return Tokenizer(kinds.write_directory(directory, kinds.wordpiece_tokenizer(), template=None))
