"""The offline engine: `/generate` as a function call, over the same processes as the server."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from sps_runtime.config.options import EMBEDDED, make_options
from sps_runtime.config.process import FrontendConfig, LogConfig
from sps_runtime.config.server import ServerConfig
from sps_runtime.engine.bridge import LoopThread, Put
from sps_runtime.engine.family import Family
from sps_runtime.frontend.output_group import OutputGroup
from sps_runtime.frontend.query import Query
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.frontend.tokenizer_manager import TokenizerManager
from sps_runtime.launch.checks import check_model
from sps_runtime.launch.processes import EngineProcesses
from sps_runtime.launch.sizing import settle
from sps_runtime.server.answers import Answer, raise_failure
from sps_runtime.server.auth import Identity
from sps_runtime.server.embeddings import encode_queries, encoded
from sps_runtime.server.process import ZmqEngineLink, build_service
from sps_runtime.server.score import ScoreBody, score_queries, scores_of
from sps_runtime.server.sglang_generate import NativeWriter, native_queries
from sps_runtime.server.sglang_types import EncodeBody, GenerateBody
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.messages import EngineState

_OFFLINE = Identity(admin=True)
Body = TypeVar("Body", bound=msgspec.Struct)


class Engine:
    """A model on its ranks, without HTTP.

    Arguments and answers of `generate` are those of SGLang's ``/generate``: one prompt gives one
    dict with ``text``, ``output_ids`` and ``meta_info``, a list of prompts (or ``n`` > 1) a list.
    Methods may be called from any thread; the ``async_`` ones from any event loop.

    Example::

        with Engine("Qwen/Qwen2.5-0.5B-Instruct", sp_size=2) as engine:
            print(engine.generate("Once upon a time", {"max_new_tokens": 20})["text"])

    Args:
        model_path: a directory, a hub name, or ``embedded``.
        settings: see `config.options.make_options`.

    Raises:
        ConfigError: for what cannot be; nothing was started.
        EngineDead: a process did not start; the message says why.
    """

    def __init__(self, model_path: str = EMBEDDED, **settings: Any) -> None:
        options = make_options({"log_level": "warning", **settings, "model_path": model_path})
        directory, model = check_model(options)
        config = settle(options, model, directory)
        log = LogConfig(options.log_level, options.log_format, options.trace_file)
        self._exit = contextlib.ExitStack()
        self._family = Family(EngineProcesses(config, model, log))
        self._exit.callback(self._family.close)
        try:
            self._family.start()
            self._loop = LoopThread()
            self._exit.callback(self._loop.close)
            self._frontend = FrontendConfig(
                server=ServerConfig(),
                engine=config,
                endpoints=self._family.processes.endpoints,
                eos_token_ids=model.eos_token_ids,
                vocab_size=model.vocab_size,
                log=log,
            )
            self._manager: TokenizerManager = self._loop.run(self._open())
            self._family.wait_ready()
            self._loop.run(self._manager.wait_ready())
        except BaseException:
            self._exit.close()
            raise
        self._family.watch(self._engine_died)
        atexit.register(self.shutdown)

    # ------------------------------------------------------------------------------- requests

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """Generate; with `stream` an iterator of cumulative answers (batches carry ``index``).

        Args:
            prompt: text, or several; or give `input_ids`.
            fields: further fields of ``/generate``: return_logprob, logprob_start_len,
                top_logprobs_num, token_ids_logprob, return_text_in_logprobs, attention.

        Raises:
            InvalidRequest: naming the field.
            EngineDead: the engine is gone.
        """
        fields["sampling_params"] = sampling_params
        body = _body(GenerateBody, prompt, input_ids, fields)
        if not stream:
            return self._loop.run(self._complete(body))
        iterator: Iterator[dict[str, Any]] = self._loop.stream(lambda put: self._stream(body, put))
        return iterator

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """`generate` for an event loop; with `stream` it returns an async iterator."""
        fields["sampling_params"] = sampling_params
        body = _body(GenerateBody, prompt, input_ids, fields)
        if not stream:
            return await self._loop.run_async(self._complete(body))
        iterator: AsyncIterator[dict[str, Any]] = self._loop.stream_async(
            lambda put: self._stream(body, put)
        )
        return iterator

    def encode(
        self,
        prompt: str | list[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """Hidden states of prompts' last tokens, as ``/encode`` answers them: one dict with
        ``embedding`` and ``meta_info``, or a list for a list.

        Args:
            fields: normalize (true unless told), attention.

        Raises:
            InvalidRequest: naming the field.
            EngineDead: the engine is gone.
        """
        body = _body(EncodeBody, prompt, input_ids, fields)
        answers = self._loop.run(self._run_all(encode_queries(_OFFLINE, body)))
        vectors = [encoded(answer, normalize=body.normalize is not False) for answer in answers]
        return vectors if body.is_batch else vectors[0]

    def score(
        self,
        query: str | list[int],
        items: str | list[str] | list[list[int]],
        label_token_ids: list[int],
        *,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """How likely given tokens are to follow the query and each item, as ``/v1/score`` says.

        Raises:
            InvalidRequest: naming the field.
            EngineDead: the engine is gone.
        """
        fields = {"query": query, "items": items, "label_token_ids": label_token_ids}
        flags = {"apply_softmax": apply_softmax, "item_first": item_first}
        body = _decoded(ScoreBody, {**fields, **flags})
        answers = self._loop.run(self._run_all(score_queries(_OFFLINE, body)))
        return [scores_of(answer, body) for answer in answers]

    def flush_cache(self) -> bool:
        """Drop every cached page; False while requests run or wait."""
        return self._loop.run(self._manager.calls.flush_cache()).ok

    def state(self) -> EngineState:
        """What the scheduler counts now."""
        return self._loop.run(self._manager.calls.fetch_state())

    @property
    def tokenizer(self) -> Tokenizer:
        return self._manager.tokenizer

    # ------------------------------------------------------------------------------- the life

    def shutdown(self) -> None:
        """End all processes and leave nothing behind; harmless when done already."""
        atexit.unregister(self.shutdown)
        self._exit.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    async def _open(self) -> TokenizerManager:
        """The front end, on the engine's loop."""
        link = ZmqEngineLink(self._frontend)
        self._exit.callback(link.close)
        manager = build_service(self._frontend, link).manager
        self._exit.callback(manager.close)
        self._receiving = asyncio.ensure_future(manager.run())
        return manager

    def _engine_died(self, why: str) -> None:
        self._loop.loop.call_soon_threadsafe(self._manager.fail_all, why)

    async def _submit(self, body: GenerateBody) -> tuple[OutputGroup, NativeWriter, bool]:
        queries = native_queries(_OFFLINE, body)
        many = body.is_batch or any((query.options.n or 1) > 1 for query in queries)
        group = await self._manager.submit(queries)
        return group, NativeWriter(self._manager.tokenizer, body, many), many

    async def _complete(self, body: GenerateBody) -> Any:
        group, writer, many = await self._submit(body)
        payloads = [writer.payload(answer) for answer in await _gather(group)]
        return payloads if many else payloads[0]

    async def _run_all(self, queries: Sequence[Query]) -> list[Answer]:
        """Any number of queries, as many at a time as a batch may have."""
        batch, answers = self._manager.limits.max_prompts, list[Answer]()
        for begin in range(0, len(queries), batch):
            answers += await _gather(await self._manager.submit(queries[begin : begin + batch]))
        return answers

    async def _stream(self, body: GenerateBody, put: Put) -> None:
        group, writer, _ = await self._submit(body)
        writer.begin(group.states)
        try:
            async for output in group:
                raise_failure(output.finish)
                for event in writer.events(output):
                    put(event)
        finally:
            group.abort()


async def _gather(group: OutputGroup) -> list[Answer]:
    """All answers of a group, in order."""
    answers = [Answer(state) for state in group.states]
    try:
        async for output in group:
            raise_failure(output.finish)
            answers[output.state.index].add(output)
    finally:
        group.abort()
    return answers


def _body(
    kind: type[Body],
    prompt: str | list[str] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    fields: dict[str, Any],
) -> Body:
    """The request as HTTP would bring it, checked by the same types."""
    unknown = set(fields) - set(kind.__struct_fields__) - {"stream"}
    if unknown:
        name = min(unknown)
        raise InvalidRequest(f"{name} is no field of a request", field=name)
    return _decoded(kind, {"text": prompt, "input_ids": input_ids, **fields})


def _decoded(kind: type[Body], content: dict[str, Any]) -> Body:
    try:
        body: Body = msgspec.json.decode(msgspec.json.encode(content), type=kind)
    except (msgspec.ValidationError, TypeError, UnicodeEncodeError) as error:
        raise InvalidRequest(str(error)) from None
    return body
