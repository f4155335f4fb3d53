from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from test.kit import tokenizers as kinds
from test.kit.live_server import LiveServer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kinds.write_directory(
        tmp_path_factory.mktemp("tokenizer"),
        kinds.byte_level_tokenizer(),
        eos_token="<|im_end|>",
    )


@pytest.fixture(scope="module")
def live(tokenizer_directory: Path) -> Iterator[LiveServer]:
    """One server for a module's tests that leave it as it was."""
    with LiveServer(tokenizer_directory) as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=20) as client:
        yield client


@pytest.fixture
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=20)
