"""The black-box kits of SGLang's newest wheel against a server: ``python sglang_kits.py URL``.

Every file of ``sglang/test/kits`` is either run here, its test methods as they stand, or listed
with the reason why not. The kits import much of SGLang's runtime without using it over HTTP: that
is stood in for (`kit_imports.py`), so that neither torch nor a GPU is needed.
"""

from __future__ import annotations

import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kit_imports
import requests
from checks import Skip, run_one
from kit_hosts import HOSTS

THINKS = "needs a model that thinks aloud"
SPECULATIVE = "measures speculative decoding"
IMAGES = "needs a model that sees images"
KNOWS = "scores a big model's knowledge on data sets that it downloads"
INSIDE = "tests SGLang's own modules, no server"
NOT_RUN = {
    "attention_unittest": INSIDE,
    "dsa_metadata_kit": INSIDE,
    "unified_radix_cache": INSIDE,
    "eval_accuracy_kit": KNOWS,
    "lm_eval_kit": f"{KNOWS}; lm-eval itself is a client of its own here",
    "mmmu_vlm_kit": IMAGES,
    "vlm_perf_kit": IMAGES,
    "fwd_occupancy_kit": "reads SGLang's own metric of a GPU's occupancy",
    "pause_generation_kit": "asks for /pause_generation, which is not served",
    "pd_parity_kit": "starts SGLang's own prefill, decode and router processes",
    "perf_bench_kit": "has no test: it formats figures",
    "reasoning_kit": THINKS,
    "spec_decoding_kit": SPECULATIVE,
    "streaming_session_kit": "asks for /open_session, which is not served",
    "unified_radix_cache_kit": f"{KNOWS}; its log probability tests are kl_divergence_kit's",
}
VOCABULARY = "sends token ids up to 31,999 and 400 prompts in one request"
SKIPPED = {
    "test_tool_result_image_content_conversion": INSIDE,
    "test_waiting_timeout": "needs SGLANG_REQ_WAITING_TIMEOUT, an environment variable of SGLang's",
    "test_running_timeout_no_crash": "needs SGLANG_REQ_RUNNING_TIMEOUT, a variable of SGLang's",
    "test_finish_stop_regex_str": "ends with an expression with $, which is refused by name: what "
    "it means hangs on the cut into tokens; the rest is test_finish_stop_regex_without_anchor",
    "test_ebnf_generate_complex_json": "its grammar allows any order and endless blanks: it trusts "
    "the model; regex_constrained_kit's does not",
    "test_finish_stop_eos": "expects the end tokens of Llama 3 by number",
    "test_prefix_cache_branching": "of hybrid Mamba models: the second request must miss the cache",
    "test_acc_length": SPECULATIVE,
    "test_max_token_one@SpecPerfKit": SPECULATIVE,
    "test_parity_vs_reference": SPECULATIVE,
    "test_sampling_mask": "asks for return_sampling_mask, which is not served",
    "test_return_hidden_states": "asks for return_hidden_states, which is not served",
    "test_grammar_structured_output_no_trailing_tokens": SPECULATIVE,
    "test_grammar_logprob_count_matches_completion_tokens": SPECULATIVE,
    "test_radix_attention": VOCABULARY,
    "test_gsm8k": KNOWS,
    "test_logprob_mixed": "its helper stands in test utilities that import torch",
}


def ran(case: type[unittest.TestCase], method: str) -> Callable[[], None]:
    """One test method as a check."""

    def check() -> None:
        for name in (method, f"{method}@{case.__name__}"):
            if name in SKIPPED:
                raise Skip(SKIPPED[name])
        result = unittest.TestResult()
        unittest.TestSuite([case(method)]).run(result)
        for _, report in result.errors + result.failures:
            raise AssertionError(report)

    return check


def cases(kit: str, url: str) -> list[type[unittest.TestCase]]:
    """A test case for each class of a kit that has tests."""
    module = kit_imports.load(kit)
    made = []
    for name, mixin in vars(module).items():
        own = isinstance(mixin, type) and mixin.__module__ == module.__name__
        if own and any(method.startswith("test_") for method in dir(mixin)):
            host = HOSTS.get(kit, HOSTS["default"])
            made.append(type(name, (host, mixin, unittest.TestCase), {"base_url": url}))
    return made


def run_kit(kit: str, url: str) -> list[bool]:
    """Run or skip one kit; how its tests went."""
    if kit in NOT_RUN:
        print(f"skip {kit}: {NOT_RUN[kit]}")
        return []
    passed = []
    for case in cases(kit, url):
        case.prepare(url, kit_imports.load(kit))
        for method in unittest.TestLoader().getTestCaseNames(case):
            passed.append(run_one(f"{kit}.{method}", ran(case, method)))
    extra: Any = getattr(HOSTS.get(kit), "extra", None)
    if extra is not None:
        passed.append(run_one(f"{kit}.{extra.__name__}", lambda: extra(kit_imports.load(kit), url)))
    assert passed, f"{kit} has no tests"
    return passed


def main() -> None:
    url = sys.argv[1]
    only = set(sys.argv[2:])
    kits = sorted({path.stem for path in Path(kit_imports.prepare()).iterdir()} - {"__pycache__"})
    kits = [kit for kit in kits if not kit.startswith("_")]
    passed = [ok for kit in kits if not only or kit in only for ok in run_kit(kit, url)]
    requests.post(f"{url}/flush_cache", timeout=30)
    print(f"{len(kits)} kits, {len(set(kits) & set(NOT_RUN))} of them not run")
    sys.exit(0 if passed and all(passed) else 1)


if __name__ == "__main__":
    main()
