"""lm-eval against a server, tasks and data of its own: ``python check_lm_eval.py URL``.

Both models that speak to servers, `local-completions` (prompt logprobs by echo) and
`sglang-generate` (native logprobs), with both kinds of requests, a log likelihood and a generation.
The two paths are one model, so their numbers must agree.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import lm_eval
from checks import run_all
from lm_eval.tasks import TaskManager

CHOICES = """
task: sps_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITING = """
task: sps_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
PAPER = """
task: sps_paper
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
DOCUMENTS = [
    {
        "question": f"What is {n} and one?",
        "choices": [str(n), str(n + 1), "a green house"],
        "label": 1,
    }
    for n in range(8)
]


class Harness:
    """Runs tasks through one of lm-eval's models and keeps every sample's raw answers."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        with urllib.request.urlopen(f"{url}/get_model_info") as answer:
            self.tokenizer = json.load(answer)["tokenizer_path"]
        data = directory / "documents.jsonl"
        data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
        for name, task in (("choices", CHOICES), ("writing", WRITING), ("paper", PAPER)):
            (directory / f"{name}.yaml").write_text(task.format(data=data))
        self.manager = TaskManager(include_path=str(directory), include_defaults=False)

    def run(self, model: str, path: str, task: str, **told: Any) -> Any:
        """The raw answers of a task's samples."""
        arguments = {
            "model": "default",
            "base_url": self.url + path,
            "tokenizer": self.tokenizer,
            "max_retries": 1,
            **told,
        }
        result = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=[task],
            task_manager=self.manager,
            bootstrap_iters=0,
        )
        metrics = [key for key in result["results"][task] if key.endswith(",none")]
        values = [float(result["results"][task][key]) for key in metrics if "_stderr" not in key]
        assert values and all(map(math.isfinite, values)), values
        return [sample["resps"] for sample in result["samples"][task]]


def scores(answers: Any) -> list[float]:
    """The log likelihoods of every sample's choices, in order."""
    return [float(choice[0][0]) for sample in answers for choice in sample]


def check_log_likelihoods(harness: Harness) -> str:
    openai = scores(harness.run("local-completions", "/v1/completions", "sps_choices"))
    native = scores(harness.run("sglang-generate", "/generate", "sps_choices"))
    assert len(openai) == len(native) == 3 * len(DOCUMENTS)
    gap = max(abs(a - b) for a, b in zip(openai, native, strict=True))
    assert all(value < 0 for value in openai) and gap < 0.1, gap
    return f"largest difference between the two paths {gap:.1e}"


def check_generations(harness: Harness) -> None:
    openai = harness.run("local-completions", "/v1/completions", "sps_writing", num_concurrent=4)
    native = harness.run("sglang-generate", "/generate", "sps_writing")
    chat = harness.run("local-completions", "/v1/completions", "sps_writing", batch_size=4)
    assert len(openai) == len(native) == len(chat) == len(DOCUMENTS)
    assert all(isinstance(sample[0][0], str) and "\n" not in sample[0][0] for sample in openai)


def check_rolling_log_likelihoods(harness: Harness) -> None:
    answers = harness.run("local-completions", "/v1/completions", "sps_paper")
    assert len(answers) == len(DOCUMENTS)


def check_chat(harness: Harness) -> None:
    arguments = {"model": "default", "base_url": f"{harness.url}/v1/chat/completions"}
    result = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={**arguments, "max_retries": 1},
        tasks=["sps_writing"],
        task_manager=harness.manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert len(result["samples"]["sps_writing"]) == len(DOCUMENTS)


if __name__ == "__main__":
    print("lm-eval", importlib.metadata.version("lm-eval"))
    with tempfile.TemporaryDirectory() as directory:
        run_all(globals(), Harness(sys.argv[1], Path(directory)))
