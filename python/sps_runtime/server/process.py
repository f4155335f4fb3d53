"""The HTTP process: ``python -m sps_runtime.server.process``, started by the launcher."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import signal
import socket
from collections.abc import Sequence

import uvloop

from sps_runtime.config.model import load_model_config
from sps_runtime.config.process import FrontendConfig, GrammarWorkerConfig
from sps_runtime.frontend.grammar_checker import GrammarChecker
from sps_runtime.frontend.health import Health
from sps_runtime.frontend.limits import Limits
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.frontend.tokenizer_manager import TokenizerManager
from sps_runtime.frontend.validation import Gate, SamplingDefaults
from sps_runtime.ipc.links import AsyncReceiver, Sender, new_context
from sps_runtime.ipc.process import ChildContext, child_context
from sps_runtime.server.app import build_app
from sps_runtime.server.auth import Keys
from sps_runtime.server.generation_probe import GenerationProbe
from sps_runtime.server.http_server import HttpServer
from sps_runtime.server.metrics import Metrics
from sps_runtime.server.service import Service, Timeouts
from sps_runtime.telemetry.logs import setup_logging
from sps_runtime.types.messages import ToFrontend, ToScheduler

logger = logging.getLogger(__name__)


class ZmqEngineLink:
    """`frontend.engine_link.EngineLink` over the links of a run."""

    def __init__(self, config: FrontendConfig) -> None:
        context = new_context()
        self._receiver: AsyncReceiver[ToFrontend] = AsyncReceiver(
            context, config.endpoints.frontend, ToFrontend
        )
        self._sender: Sender[ToScheduler] = Sender(context, config.endpoints.scheduler)

    def send(self, message: ToScheduler) -> None:
        self._sender.send(message)

    async def receive(self) -> Sequence[ToFrontend]:
        return await self._receiver.receive()

    def close(self) -> None:
        self._sender.close(linger_ms=100)
        self._receiver.close()


def build_service(config: FrontendConfig, link: ZmqEngineLink) -> Service:
    """Put the process's parts together.

    Raises:
        ConfigError: when the tokenizer or a chat template cannot be read.
    """
    engine, server = config.engine, config.server
    tokenizer = Tokenizer(engine.tokenizer_path or engine.model_path, server.chat_template)
    metrics = Metrics(
        server.served_model_name or engine.model_path, log_requests=server.log_requests
    )
    scheduler = engine.scheduler
    manager = TokenizerManager(
        link,
        tokenizer,
        Gate(
            Limits(context_length=engine.context_length, vocab_size=config.vocab_size),
            _sampling_defaults(engine.model_path),
            attention=engine.attention,
        ),
        max_inflight=scheduler.max_running_requests + scheduler.max_queued_requests,
        stream_interval=server.stream_interval,
        grammars=_grammar_checker(config),
        health=Health(watchdog_s=engine.watchdog_timeout_s),
        observer=metrics,
    )
    timeouts = Timeouts()
    service = Service(
        manager=manager,
        server=server,
        engine=engine,
        metrics=metrics,
        probe=GenerationProbe(manager, timeouts.probe),
        timeouts=timeouts,
    )
    if service.tool_format is None or service.reasoning_format is None:
        logger.debug("answers are not searched for tool calls, or not for reasoning")
    return service


def _grammar_checker(config: FrontendConfig) -> GrammarChecker | None:
    engine = config.engine
    if engine.grammar_backend == "none":
        return None
    return GrammarChecker(
        GrammarWorkerConfig(
            backend=engine.grammar_backend,
            tokenizer_path=engine.tokenizer_path or engine.model_path,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
        )
    )


def _sampling_defaults(model_path: str) -> SamplingDefaults:
    told = dict(load_model_config(model_path).sampling_defaults)
    top_k = told.pop("top_k", None)
    return SamplingDefaults(
        temperature=told.get("temperature"),
        top_p=told.get("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=told.get("min_p"),
        repetition_penalty=told.get("repetition_penalty"),
    )


async def serve(child: ChildContext[FrontendConfig]) -> bool:
    """Serve until stopped; whether that was in good order."""
    config = child.config
    link = ZmqEngineLink(config)
    try:
        service = build_service(config, link)
        keys = Keys(config.server.api_key_hashes, config.server.admin_key_hashes)
        listener = socket.socket(fileno=child.fds["http"])
        listener.setblocking(False)
        gc.collect()
        gc.freeze()  # what lives for ever is not searched again: shorter pauses
        http = HttpServer(build_app(service, keys), service.manager, config.server.drain_timeout_s)
        beside = [service.metrics.watch_loop(), _report_ready(child, service.manager)]
        return await http.serve_until_stopped(listener, beside)
    finally:
        link.close()


async def _report_ready(child: ChildContext[FrontendConfig], manager: TokenizerManager) -> None:
    await manager.wait_ready()
    child.ready(f"context length {manager.limits.context_length}")


def main() -> int:
    """Run the process; its exit status."""
    with child_context(FrontendConfig) as child:
        setup_logging(child.config.log.level, child.config.log.format, child.name)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # below it speak only clients
        faulthandler.register(signal.SIGUSR1)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return 0 if runner.run(serve(child)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
