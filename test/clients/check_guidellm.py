"""guidellm against a server: ``python check_guidellm.py URL``.

The command as people type it, with synthetic prompts and the served model's tokenizer.
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

REQUESTS = 6


class Bench:
    """Runs `guidellm run` and reads the figures that it writes."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url, self.directory = url, directory
        with urllib.request.urlopen(f"{url}/get_model_info") as answer:
            self.tokenizer = json.load(answer)["tokenizer_path"]

    def run(self, backend: str = "", profile: str = "kind=concurrent,streams=2") -> dict[str, Any]:
        output = self.directory / "figures.json"
        output.unlink(missing_ok=True)
        told = {
            "--backend": f"kind=openai_http,target={self.url},model=default{backend}",
            "--profile": profile,
            "--constraint": f"kind=max_requests,count={REQUESTS}",
            "--tokenizer": f"kind=huggingface_auto,model={self.tokenizer}",
            "--data": "kind=synthetic_text,prompt_tokens=64,output_tokens=8",
            "--output": f"kind=json,path={output}",
        }
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
        command += [part for pair in told.items() for part in pair]
        run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        (figures,) = json.loads(output.read_text())["benchmarks"]
        totals = figures["metrics"]["request_totals"]
        assert totals["successful"] == totals["total"] == REQUESTS, totals
        metrics: dict[str, Any] = figures["metrics"]
        return metrics


def check_chat_stream(bench: Bench) -> None:
    metrics = bench.run()
    first = metrics["time_to_first_token_ms"]["successful"]["mean"]
    assert first > 0 and metrics["output_token_count"]["successful"]["mean"] == 8


def check_completions(bench: Bench) -> None:
    bench.run(",request_format=/v1/completions")


def check_responses(bench: Bench) -> None:
    bench.run(",request_format=/v1/responses")


def check_one_after_the_other(bench: Bench) -> None:
    bench.run(profile="kind=synchronous")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        run_all(globals(), Bench(sys.argv[1], Path(directory)))
