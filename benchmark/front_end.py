"""What do HTTP, tokenizing, scheduling and event streams cost, where ranks cost nothing?

A whole server over one echo rank (`--device echo`: real processes and page tables, no mathematics)
and its client on the same two cores.

1. Load: 256 streams at once, stream interval 1, by SGLang's and by OpenAI's API: tokens a second in
   all, events a token (tokens that wait for the same write share one), and how late timers of the
   server's event loop were (its own histogram).
2. Long text: a prompt of 100,000 tokens, sent as text and sent as ids, each beside a prompt of
   eight tokens: what the front end adds to a time to first token, everything that ranks did not do.

    python benchmark/front_end.py [--quick] [--json FILE]

Metrics are defined in benchmark/README.md.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness import Server, arguments, median, quantile, report
from sps_runtime.assets import embedded_model_path
from sps_runtime.frontend.tokenizer import Tokenizer

STREAMS, TOKENS, LONG = 256, 256, 100_000
QUICK_TOKENS, REPEATS = 64, 5
COUNTED = re.compile(rb'"completion_tokens": ?([0-9]+)')
LATE = re.compile(r'sps:event_loop_delay_seconds_bucket\{le="([^"]+)".*?\} ([0-9.e+]+)')


@dataclass(frozen=True)
class Api:
    """How a stream is asked for.

    Attributes:
        event: bytes that every event of tokens holds.
    """

    path: str
    event: bytes

    def body(self, number: int, tokens: int) -> dict[str, Any]:
        text = f"Request {number} asks for {tokens} words."
        if self.path == "/generate":
            params = {"max_new_tokens": tokens, "ignore_eos": True}
            return {"text": text, "stream": True, "sampling_params": params}
        messages = [{"role": "user", "content": text}]
        more = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
        more["stream_options"] = {"include_usage": True}
        return {"model": "default", "messages": messages, **more}


APIS = {
    "sglang": Api("/generate", b'"completion_tokens"'),
    "openai": Api("/v1/chat/completions", b'"delta"'),
}


@dataclass
class Seen:
    """What a client saw of one stream."""

    events: int = 0
    tokens: int = 0
    first_s: float = 0.0


async def stream(port: int, api: Api, number: int, tokens: int) -> Seen:
    """One stream to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    body = json.dumps(api.body(number, tokens)).encode()
    head = f"POST {api.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    began = time.perf_counter()
    writer.write(
        f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body
    )
    seen, rest = Seen(), b""
    while piece := await reader.read(1 << 16):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            seen.events += api.event in line
            if found := COUNTED.search(line):
                seen.tokens = int(found[1])
        if seen.events and not seen.first_s:
            seen.first_s = time.perf_counter() - began
    writer.close()
    return seen


async def load(port: int, api: Api, tokens: int) -> dict[str, float]:
    """All streams at once."""
    began = time.perf_counter()
    found = await asyncio.gather(*(stream(port, api, n, tokens) for n in range(STREAMS)))
    seconds = time.perf_counter() - began
    wrong = [seen.tokens for seen in found if seen.tokens != tokens]
    if wrong:
        raise RuntimeError(f"{len(wrong)} streams had {wrong[:5]} tokens, not {tokens}")
    firsts = [seen.first_s for seen in found]
    return {
        "tokens_per_s": STREAMS * tokens / seconds,
        "events_per_token": sum(seen.events for seen in found) / (STREAMS * tokens),
        "ttft_p50_s": median(firsts),
        "ttft_p99_s": quantile(firsts, 0.99),
    }


def delays(server: Server) -> list[tuple[float, float]]:
    """The cumulative histogram of the event loop's delays: upper bound (s), count."""
    text = server.get("/metrics")[1].decode()
    return [(float(bound), float(count)) for bound, count in LATE.findall(text)]


def p99(before: list[tuple[float, float]], after: list[tuple[float, float]]) -> float:
    """The bucket's upper bound (s) that holds the 99th percentile of what came between."""
    grown = [(bound, now - was) for (bound, now), (_, was) in zip(after, before, strict=True)]
    return next(bound for bound, count in grown if count >= 0.99 * grown[-1][1])


def long_prompts(server: Server, repeats: int) -> Iterator[dict[str, Any]]:
    """Seconds to the first token: of eight tokens, and of many as ids and as text. Every prompt
    begins with a number of its own, so that no prefix is cached."""
    tokenizer = Tokenizer(str(embedded_model_path()))
    line = " The room of Diana Ramos is 9714."
    text = line * (LONG // len(tokenizer.encode(line, add_special_tokens=False)))
    for number in range(repeats):
        for name, prompt in (("short", line), ("ids", text), ("text", text)):
            told = f"{name} {number}:{prompt}"
            ids = tokenizer.encode(told)
            prompt_fields = {"text": told} if name == "text" else {"input_ids": ids}
            yield {"kind": name, "tokens": len(ids), "ttft_s": _first_token(server, prompt_fields)}


def _first_token(server: Server, prompt: dict[str, Any]) -> float:
    stream = server.ask({**prompt, "stream": True, "sampling_params": {"max_new_tokens": 1}})
    return stream.ttft


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    tokens = QUICK_TOKENS if args.quick else TOKENS
    flags = ["--device", "echo", "--max-total-tokens", "400000", "--context-length", "131072"]
    more = ["--enable-metrics", "--max-running-requests", str(STREAMS), "--sp-size", "1"]
    figures: dict[str, float] = {}
    raw: dict[str, Any] = {}
    with Server(*flags, *more) as server:
        for name, api in APIS.items():
            asyncio.run(load(server.port, api, 8))
            before = delays(server)
            found = asyncio.run(load(server.port, api, tokens))
            found["event_loop_delay_p99_s"] = p99(before, delays(server))
            figures |= {f"{key}_{name}_{STREAMS}_streams": value for key, value in found.items()}
        raw["long"] = list(long_prompts(server, 2 if args.quick else REPEATS))
    times = {
        k: [r["ttft_s"] for r in raw["long"] if r["kind"] == k] for k in ("short", "ids", "text")
    }
    for kind, found_s in times.items():
        figures[f"ttft_s_{kind}"] = median(found_s)
    figures["prompt_tokens_long"] = raw["long"][-1]["tokens"]
    figures["text_over_ids_s"] = figures["ttft_s_text"] - figures["ttft_s_ids"]
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
