"""aiperf against a server: ``python check_aiperf.py URL``.

The command as people type it, with synthetic prompts. Offline it takes a tokenizer only by the name
it has in the hub's cache, so one is laid out here with the served model's tokenizer in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from checks import run_all

REQUESTS = 6
NAME = "local/served"
REVISION = "0" * 40


class Bench:
    """Runs `aiperf profile` and reads the figures that it writes."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url, self.directory = url, directory
        with urllib.request.urlopen(f"{url}/get_model_info") as answer:
            served = Path(json.load(answer)["tokenizer_path"])
        cached = directory / "hub" / f"models--{NAME.replace('/', '--')}"
        snapshot = cached / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(REVISION)
        for path in served.glob("*.json"):
            shutil.copy(path, snapshot)

    def run(self, *arguments: str) -> dict[str, Any]:
        output = self.directory / "artifacts"
        shutil.rmtree(output, ignore_errors=True)
        command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--url", self.url]
        command += ["--model", "default", "--tokenizer", NAME, "--ui", "none"]
        command += ["--request-count", str(REQUESTS), "--concurrency", "2"]
        command += ["--isl", "64", "--osl", "8", "--artifact-dir", str(output), *arguments]
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
            env={**os.environ, "HF_HOME": str(self.directory), "HF_HUB_OFFLINE": "1"},
        )
        assert run.returncode == 0, run.stdout + run.stderr
        figures: dict[str, Any] = json.loads((output / "profile_export_aiperf.json").read_text())
        assert figures["request_count"]["avg"] == REQUESTS, figures
        assert not figures.get("error_summary"), figures["error_summary"]
        assert figures["request_latency"]["avg"] > 0
        return figures


def check_chat_stream(bench: Bench) -> str:
    figures = bench.run("--endpoint-type", "chat", "--streaming", "--use-server-token-count")
    assert figures["time_to_first_token"]["avg"] > 0
    assert 0 < figures["output_sequence_length"]["avg"] <= 8
    return f"{figures['output_sequence_length']['avg']:.1f} tokens a request"


def check_completions_stream(bench: Bench) -> None:
    ignored = ("--extra-inputs", "ignore_eos:true")
    figures = bench.run("--endpoint-type", "completions", "--streaming", *ignored)
    assert figures["time_to_first_token"]["avg"] > 0


def check_chat_whole(bench: Bench) -> None:
    bench.run("--endpoint-type", "chat")


def check_responses(bench: Bench) -> None:
    bench.run("--endpoint-type", "responses", "--streaming")


def check_messages(bench: Bench) -> None:
    bench.run("--endpoint-type", "messages", "--streaming")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        run_all(globals(), Bench(sys.argv[1], Path(directory)))
