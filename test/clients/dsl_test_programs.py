"""The test programs of SGLang's own wheel against a server: ``python dsl_test_programs.py URL``.

Every function of ``sglang.test.test_programs`` of the installed version runs as it stands: its own
assertions hold. Where they ask for knowledge that a tiny model has not got, an answer key tells it
by a grammar (`wire.py`). Each function that does not run is listed with its reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sglang as sgl
from checks import Skip, run_one
from sglang.lang.backend import runtime_endpoint
from tokenizers import Tokenizer
from wire import Wire

ANSWERS = {
    "capital of the United States?\nA:": " Washington",
    "capital of Japan?\nA:": " Tokyo",
    "capital of the United Kingdom?\nA:": " London",
    "capital city of China?\nA:": " Beijing",
    "The number of hours in a day is ": "24",
    "The number of days in a year is ": "365",
    '"name": ': '"Paris"',
    '"population": ': "[1-9][0-9]{0,6}",
    '"area": ': "[1-9][0-9]{0,4}",
    '"latitude": ': "[1-9][0-9]\\.[0-9]{2}",
    '"country": ': '"[A-Z][a-z]{1,9}"',
    '"timezone": ': '"[A-Z]{3}"',
    "A good person to answer this question is": " a [a-z]{3,9}",
    " would answer that ": "it is Paris",
    "The answer is calculate(": "257\\*983",
    "Action 1: Finish [": "Finland",
    "Who is the father of Julian?\nASSISTANT:": " Noah",
}
CHARACTER = " Ada\\nBirthday: May 1, 1990\\.\\nJob: Nurse\\.\\n"
SKIPPED = {
    "test_image_qa": "the served model does not see images",
    "test_stream_logprobs": "wants each event's new logprobs only, beside the whole text: SGLang "
    "sends those with --incremental-streaming-output, which the served API has not got",
}
OVER_OPENAI = {"test_completion_speculative": False, "test_chat_completion_speculative": True}
WITHOUT_KNOWLEDGE = {"test_select": {"check_answer": False}}


class Tutored(sgl.RuntimeEndpoint):
    """SGLang's endpoint; after all calls of a select it takes the choice that ends `test_react`."""

    @property
    def endpoint(self) -> Tutored:
        """`sgl.Runtime` has one; `test_gen_min_new_tokens` asks it for the model."""
        return self

    def select(self, s: Any, choices: list[str], *arguments: Any, **options: Any) -> Any:
        decision = super().select(s, choices, *arguments, **options)
        assert decision.decision in choices
        assert all(isinstance(p, float) for p in decision.meta_info["normalized_prompt_logprobs"])
        if "Finish" in choices:
            return dataclasses.replace(decision, decision="Finish")
        return decision


def openai_backend(url: str, chat: bool) -> sgl.OpenAI:
    """SGLang's other backend over the same server's /v1, with an answer for plain completions."""
    backend = sgl.OpenAI("default", is_chat_model=chat, base_url=f"{url}/v1", api_key="none")
    send = backend.client.completions.create
    told = {"extra_body": {"regex": CHARACTER}}
    backend.client.completions.create = lambda **options: send(**options, **told)
    return backend


@contextmanager
def stood_in(programs: types.ModuleType, tokenizer: Path) -> Iterator[None]:
    """Stand in for what would be downloaded or needs SGLang's runtime: data, tokenizers.

    The clock stands still: one program wants a cold and a warm cache to be equally fast.
    """
    helper = types.ModuleType("hf_transformers_utils")
    helper.get_tokenizer = lambda path: Tokenizer.from_file(str(tokenizer))  # type: ignore[attr-defined]
    for package in ("sglang.srt", "sglang.srt.utils"):
        sys.modules.setdefault(package, types.ModuleType(package))
        sys.modules[f"{package}.hf_transformers_utils"] = helper
    encoding = types.SimpleNamespace(_mergeable_ranks={}, _special_tokens={"<|endoftext|>": 0})
    counter = types.ModuleType("tiktoken")
    counter.encoding_for_model = lambda model: encoding  # type: ignore[attr-defined]
    sys.modules["tiktoken"] = counter
    programs.time = types.SimpleNamespace(perf_counter=lambda: 0.0)
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "questions.jsonl"
        data.write_text("\n".join(json.dumps(question(i)) for i in range(24)))
        if hasattr(programs, "download_and_cache_file"):
            programs.download_and_cache_file = lambda url: str(data)
        yield


def question(number: int) -> dict[str, Any]:
    """One question in HellaSwag's form."""
    return {
        "activity_label": "Walking",
        "ctx": f"A man with {number} dogs goes out and",
        "endings": ["walks home.", "sings a song.", "sleeps.", "reads a book."],
        "label": number % 4,
    }


def over_openai(function: Callable[..., object], url: str) -> str:
    """Run a program that needs sgl.OpenAI; what it used."""
    own = sgl.global_config.default_backend
    backend = openai_backend(url, OVER_OPENAI[function.__name__])
    sgl.set_default_backend(backend)
    try:
        function()
    finally:
        sgl.set_default_backend(own)
    usage = backend.token_usage
    assert usage.prompt_tokens > 0 and usage.completion_tokens > 0
    return f"by sgl.OpenAI, {usage.prompt_tokens} + {usage.completion_tokens} tokens"


def called(function: Callable[..., object], wire: Wire, url: str) -> Callable[[], str]:
    """The function as a check that says which calls it made."""

    def check() -> str:
        if reason := SKIPPED.get(function.__name__):
            raise Skip(reason)
        if function.__name__ in OVER_OPENAI:
            return over_openai(function, url)
        before = Counter(wire.calls)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            function(**WITHOUT_KNOWLEDGE.get(function.__name__, {}))
        # The front end turns what goes wrong in a program's thread into a warning.
        assert not warned, "\n".join(str(warning.message) for warning in warned)
        made = wire.calls - before
        assert made, "it made no call"
        return ", ".join(f"{count} {kind}" for kind, count in sorted(made.items()))

    return check


def main() -> None:
    wire = Wire(runtime_endpoint.http_request, ANSWERS)
    runtime_endpoint.http_request = wire
    backend = Tutored(sys.argv[1])
    sgl.set_default_backend(backend)
    programs = importlib.import_module("sglang.test.test_programs")
    tokenizer = Path(backend.model_info["tokenizer_path"]) / "tokenizer.json"
    functions = [f for name, f in vars(programs).items() if name.startswith("test_")]
    print(f"sglang {sgl.__version__}: {len(functions)} programs")
    with stood_in(programs, tokenizer):
        passed = [run_one(f.__name__, called(f, wire, sys.argv[1])) for f in functions]
    sys.exit(0 if len(passed) >= 18 and all(passed) else 1)


if __name__ == "__main__":
    main()
