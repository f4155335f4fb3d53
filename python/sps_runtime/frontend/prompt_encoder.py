"""Prompts to ids, off the event loop where they are long."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sps_runtime.frontend.limits import Limits
from sps_runtime.frontend.query import ChatPrompt, Prompt, Query, TextPrompt, TokenPrompt
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.frontend.validation import too_long
from sps_runtime.types.errors import InvalidRequest

logger = logging.getLogger(__name__)

INLINE_CHARS = 2048
"""Shorter prompts are tokenized at once: the hop to a thread costs more."""
TEMPLATE_CHARS_PER_TOKEN = 4
THREADS = 2
NICENESS = 10
"""Of the threads that tokenize: a tenth of the weight of who else wants the core."""


class PromptEncoder:
    """Renders and tokenizes. `tokenizers` releases the GIL while it works, so the loop goes on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(THREADS, "tokenize", initializer=_step_back)

    async def encode(self, queries: Sequence[Query], limits: Limits) -> list[Sequence[int]]:
        """Return the ids of each query's prompt.

        Raises:
            InvalidRequest: naming the prompt's field.
        """

        def work() -> list[Sequence[int]]:
            return [self._encode_one(query, limits) for query in queries]

        if sum(_prompt_chars(query.prompt) for query in queries) <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _encode_one(self, query: Query, limits: Limits) -> Sequence[int]:
        prompt = query.prompt
        if isinstance(prompt, TokenPrompt):
            return prompt.ids
        field = query.names.get("prompt", "prompt")
        text = prompt.text if isinstance(prompt, TextPrompt) else self.render(prompt, limits)
        least = len(text) // self._tokenizer.longest_token_chars
        if least > limits.context_length:
            raise too_long(field, least, limits, at_least=True)
        try:
            special = isinstance(prompt, TextPrompt) and prompt.add_special_tokens
            return self._tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:  # one prompt's trouble, nobody else's
            logger.warning("a prompt could not be tokenized: %s", type(error).__name__)
            raise InvalidRequest(f"{field} cannot be tokenized", field=field) from None

    def render(self, prompt: ChatPrompt, limits: Limits) -> str:
        """Return a conversation as the model's template writes it."""
        template = self._tokenizer.chat_template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the server with"
                " --chat-template",
                field="messages",
                code="no_chat_template",
            )
        bound = max(TEMPLATE_CHARS_PER_TOKEN * limits.context_length, limits.max_body_bytes)
        return template.render(
            prompt.messages, prompt.variables, max_chars=bound, tools=prompt.tools
        )

    def close(self) -> None:
        """Give the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _step_back() -> None:
    """Let ranks and the event loop go first where all share cores. Niceness is a thread's own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _prompt_chars(prompt: Prompt) -> int:
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    if isinstance(prompt, ChatPrompt):
        if prompt.tools:  # of any size
            return INLINE_CHARS + 1
        return sum(len(str(message.get("content") or "")) for message in prompt.messages)
    return 0
