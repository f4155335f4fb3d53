"""Does the engine make tokens?"""

from __future__ import annotations

import asyncio

from sps_runtime.frontend.query import Query, SamplingOptions, TokenPrompt
from sps_runtime.frontend.tokenizer_manager import TokenizerManager
from sps_runtime.types.errors import EngineDead, InvalidRequest, QueueFull


class GenerationProbe:
    """/health_generate: one real token, one probe at a time for all who ask.

    Args:
        manager: the engine.
        timeout_s: how long the token may take. A busy engine that beats is healthy without it.
    """

    def __init__(self, manager: TokenizerManager, timeout_s: float) -> None:
        self._manager = manager
        self._timeout_s = timeout_s
        self._running: asyncio.Task[bool] | None = None

    async def healthy(self) -> bool:
        """Whether a token came, or the engine visibly works on others."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._probe())
        return await asyncio.shield(self._running)

    async def _probe(self) -> bool:
        options = SamplingOptions(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        try:
            group = await self._manager.submit([Query(prompt=TokenPrompt([0]), options=options)])
        except QueueFull:
            return self._manager.health.serving
        except (InvalidRequest, EngineDead):
            return False
        try:
            async with asyncio.timeout(self._timeout_s):
                ends = [output.finish async for output in group]
            return any(end is not None and end.kind in ("stop", "length") for end in ends)
        except TimeoutError:
            return self._manager.health.serving and self._manager.health.engine.running > 0
        finally:
            group.abort("the probe took too long")
