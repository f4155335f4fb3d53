"""What SGLang's test kits expect of the class that they are mixed into, for `sglang_kits.py`."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import openai
import requests

MODEL = "default"
# A tiny model knows no capitals and loops where a grammar lets it. To the questions below a grammar
# is added that only the known answer fulfils; to requests with a grammar, a bias to what closes a
# string, a word or an object; to stops at a new line, one to that. The kits' assertions stand.
ANSWERS = {
    "Q: What is the capital of France?\nA:": " Paris",
    "What is 17 multiplied by 23? Reply with just the number.\nA:": " 391",
    "Fill in the blank.\nA:": " yellow",
    "Q: What is the capital of Germany?\nA:": " Berlin",
    "Q: What is the capital of Italy?\nA:": " Rome",
    "Q: What is the capital of Japan?\nA:": " Tokyo",
    "Q: What is the capital of Spain?\nA:": " Madrid",
    "Q: What is the capital of Egypt?\nA:": " Cairo",
    "Q: What is the capital of Russia?\nA:": " Moscow",
    "Q: What is the capital of Australia?\nA:": " Canberra",
}
CLOSING = ('"', '"}', "}", '",', '":')
WORD = (" s", " success")
ENDS = {"\n": "\n", "and|or": " and"}


class Process:
    """In place of the server's process: it runs as long as its port answers."""

    def __init__(self, url: str) -> None:
        self._url = url

    def poll(self) -> int | None:
        return None if requests.get(f"{self._url}/health", timeout=30).status_code == 200 else 1


class Host:
    """A kit's class under test: where the server is and what it serves."""

    model = MODEL
    api_key = "none"
    base_url = ""
    process: Process
    client: openai.OpenAI

    @classmethod
    def prepare(cls, url: str, module: Any) -> None:
        """Reach the server; called once before a class's tests, with the kit's module."""
        cls.process = Process(url)
        cls.client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


class Tutored(Host):
    """Requests are helped to their answers; see `ANSWERS`."""

    @classmethod
    def prepare(cls, url: str, module: Any) -> None:
        super().prepare(url, module)
        helper = Helper(url)
        module.requests = helper.requests()
        cls.client = helper.client()
        if hasattr(module, "openai"):
            module.openai = SimpleNamespace(Client=lambda **_: helper.client())


class MatchedStops(Tutored):
    """The kit's test of expressions ends with one that has an anchor; this is its other half."""

    _run_completions_generation: Any
    _run_chat_completions_generation: Any

    def test_finish_stop_regex_without_anchor(self) -> None:
        wanted = {"stop_regex": "and|or", "matched_stop": "and|or", "finish_reason": "stop"}
        self._run_completions_generation(max_tokens=1000, **wanted)
        self._run_chat_completions_generation(max_tokens=1000, **wanted)


class Helper:
    """Adds to requests what a tiny model lacks."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._encode = Tokenizer(url).encode

    def _towards(self, *texts: str) -> dict[str, float]:
        """A bias to the tokens that these texts begin with, and away from blanks."""
        blanks = {str(self._encode(text)[0]): -12.0 for text in (" ", "\n", "\n\n", "  ")}
        return blanks | {str(self._encode(text)[0]): 12.0 for text in texts}

    def told(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body with what it needs."""
        if "sampling_params" not in body:
            ends = body.get("stop") or body.get("stop_regex")
            if "response_format" in body:
                return {**body, "logit_bias": self._towards(*CLOSING)}
            return {**body, "logit_bias": self._towards(ENDS[ends])} if ends in ENDS else body
        if isinstance(body["sampling_params"], list):
            return body
        sampling = dict(body["sampling_params"])
        sampling.pop("stop_token_ids", None)  # of another model's vocabulary
        if sampling.get("max_new_tokens") == 4:  # exactly four are wanted
            sampling["ignore_eos"] = True
        text = body.get("text")
        text = text if isinstance(text, str) else ""
        known = [answer for end, answer in ANSWERS.items() if text.endswith(end)]
        grammar = sampling.get("regex") or sampling.get("ebnf") or sampling.get("json_schema")
        if known:
            sampling["regex"] = known[0]
        elif grammar:
            word = "successfully" in grammar
            sampling["logit_bias"] = self._towards(*(WORD if word else CLOSING))
        return {**body, "sampling_params": sampling}

    def requests(self) -> ModuleType:
        """`requests`, whose posts are helped."""

        def post(url: str, json: Any = None, **options: Any) -> requests.Response:
            return requests.post(url, json=json and self.told(json), **options)

        module = ModuleType("requests")
        module.__dict__.update({**vars(requests), "post": post})
        return module

    def client(self) -> openai.OpenAI:
        """OpenAI's client, whose chats are helped."""
        client = openai.OpenAI(api_key="none", base_url=f"{self._url}/v1", max_retries=0)
        create: Any = client.chat.completions.create
        told: Any = lambda **options: create(**self.told(options))  # noqa: E731
        client.chat.completions.create = told
        return client


class Aborts(Host):
    abort_all_num_requests = 8
    abort_all_max_new_tokens = 8000


class Speculative(Tutored):
    """The kits of servers that speculate: most of their tests are of decoding as such."""

    @classmethod
    def prepare(cls, url: str, module: Any) -> None:
        super().prepare(url, module)
        cls.tokenizer = Tokenizer(url)

    def run_decode(self, sampling: dict[str, Any]) -> None:
        options = {"max_new_tokens": 48, "temperature": 0.7, **sampling}
        body = {
            "text": "Write of a journey.",
            "sampling_params": options,
            "return_logprob": True,
            "top_logprobs_num": 5,
            "logprob_start_len": 0,
        }
        assert requests.post(f"{self.base_url}/generate", json=body, timeout=60).status_code == 200

    def send_request(self) -> None:
        self.run_decode({"temperature": 0, "max_new_tokens": 200})

    def send_requests_abort(self) -> None:
        time.sleep(random.uniform(0, 0.5))
        body = {"text": "A story:", "sampling_params": {"max_new_tokens": 1024, "ignore_eos": True}}
        with contextlib.suppress(requests.exceptions.ReadTimeout):
            requests.post(f"{self.base_url}/generate", json=body, timeout=0.5)


class Tokenizer:
    """The served model's tokenizer, over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url
        (self.eos_token_id,) = self.encode("<|im_end|>")

    def encode(self, text: str, **_: Any) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        answer = requests.post(f"{self._url}/tokenize", json=body, timeout=30)
        tokens: list[int] = answer.json()["tokens"]
        return tokens


class Divergence(Host):
    """Log probabilities of decoding and of prefills must agree; the prompts are random ids here."""

    kl_div_thres = 0.005
    kl_div_max_samples = 8
    kl_div_prefill_max_new_tokens = 32
    kl_div_decode_max_new_tokens = 96  # more than a page, so that each is found again

    @classmethod
    def prepare(cls, url: str, module: Any) -> None:
        super().prepare(url, module)
        helper: Any = sys.modules["sglang.test.kl_test_utils"]
        made = random.Random(5)
        prompts = [[made.randrange(300, 2000) for _ in range(400 + 50 * i)] for i in range(8)]
        helper.get_tokenizer = lambda *_, **__: Tokenizer(url)
        helper.get_input_ids = lambda **_: [list(prompt) for prompt in prompts]


class CacheHits(Host):
    """A kit without test methods: its function is called."""

    @staticmethod
    def extra(module: Any, url: str) -> str:
        """Several rounds of several conversations: what is cached must be found again."""
        module.get_tokenizer = lambda path: None
        result = module.run_multiturn_cache_hit_test(
            url, MODEL, num_clients=4, num_rounds=3, request_length=256, output_length=16
        )
        assert result["overall"]["cache_hit_rate"] > 0.4, result
        return f"{result['overall']['cache_hit_rate']:.0%} of the prompts cached"


class RadixTree(Host):
    """A tree of prompts as the kit makes it, within our vocabulary and batches."""

    @staticmethod
    def extra(module: Any, url: str) -> None:
        """`gen_radix_tree` gives the nodes; its own caller sends ids beyond the vocabulary."""
        nodes = module.gen_radix_tree(num_nodes=60, chunk_len=96)[:60]
        body = {
            "input_ids": [[token % 2000 for token in node["input_ids"]] for node in nodes],
            "sampling_params": [
                {"max_new_tokens": node["decode_len"] // 8, "temperature": 0} for node in nodes
            ],
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=120)
        assert answer.status_code == 200 and len(answer.json()) == len(nodes), answer.text


HOSTS: dict[str, type[Host]] = {
    "default": Host,
    "abort_timeout_kit": Aborts,
    "basic_decode_correctness_kit": Tutored,
    "basic_scheduler_stress_kit": Tutored,
    "ebnf_constrained_kit": Tutored,
    "json_constrained_kit": Tutored,
    "json_mode_kit": Tutored,
    "matched_stop_kit": MatchedStops,
    "regex_constrained_kit": Tutored,
    "cache_hit_kit": CacheHits,
    "kl_divergence_kit": Divergence,
    "radix_cache_server_kit": RadixTree,
    "spec_server_kits": Speculative,
}
