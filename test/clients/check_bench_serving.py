"""sglang.bench_serving against a server: ``python check_bench_serving.py URL``.

The command as people type it, with data that it makes itself and the served model's tokenizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from checks import run_all

PROMPTS = 6


class Bench:
    """Runs the command and reads the line of figures that it writes."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url, self.directory = url, directory
        with urllib.request.urlopen(f"{url}/get_model_info") as answer:
            self.tokenizer = json.load(answer)["tokenizer_path"]

    def run(self, backend: str, *arguments: str) -> dict[str, Any]:
        output = self.directory / "figures.jsonl"
        output.unlink(missing_ok=True)
        command = [sys.executable, "-m", "sglang.bench_serving", "--base-url", self.url]
        command += ["--backend", backend, "--model", self.tokenizer, "--num-prompts", str(PROMPTS)]
        command += ["--tokenizer", self.tokenizer, "--output-file", str(output), "--disable-tqdm"]
        run = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        figures: dict[str, Any] = json.loads(output.read_text().splitlines()[-1])
        assert figures["completed"] == PROMPTS, run.stdout + run.stderr
        assert figures["total_output_tokens"] > 0 and figures["mean_ttft_ms"] > 0
        return figures


LENGTHS = ("--random-input-len", "64", "--random-output-len", "8", "--random-range-ratio", "0.5")
RANDOM = ("--dataset-name", "random-ids", *LENGTHS)


def check_native(bench: Bench) -> str:
    figures = bench.run("sglang", *RANDOM, "--return-logprob")
    assert figures["mean_itl_ms"] > 0
    return f"{figures['total_output_tokens']} tokens"


def check_native_whole(bench: Bench) -> None:
    bench.run("sglang", *RANDOM, "--disable-stream", "--flush-cache")


def check_openai_completions(bench: Bench) -> None:
    bench.run("sglang-oai", *RANDOM, "--request-rate", "50")


def check_openai_chat(bench: Bench) -> None:
    bench.run("sglang-oai-chat", *RANDOM, "--max-concurrency", "2")


def check_as_a_vllm_server(bench: Bench) -> None:
    bench.run("vllm", *RANDOM)


def check_shared_prefixes(bench: Bench) -> None:
    groups = ("--gsp-num-groups", "2", "--gsp-prompts-per-group", "3", "--gsp-output-len", "4")
    lengths = ("--gsp-system-prompt-len", "128", "--gsp-question-len", "16")
    bench.run("sglang", "--dataset-name", "generated-shared-prefix", *groups, *lengths)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        run_all(globals(), Bench(sys.argv[1], Path(directory)))
