"""A whole model on a GPU by the definition of exact (docs/design.md, contract 6), against the
same weights on the CPU: fp32 token by token, bf16 by the error of its logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))

from gpu_rank import LocalRank, forced
from sps_runtime.config.model import load_model_config
from sps_runtime.launch.checks import embedded_model

MARGIN, LOGIT_ERROR, BF16_RATIO = 1e-3, 1e-4, 1.25
PROMPT, NEW = 700, 24
CPU = torch.device("cpu")


class Seen:
    """A rank whose logits are kept, decode steps' too."""

    def __init__(self, device: torch.device, **settings: object) -> None:
        directory = embedded_model()
        config = load_model_config(directory)
        page = {"page_size": 64} if device.type == "cpu" else {"page_size": 128}
        self.rank = LocalRank(config, device, 64, directory=directory, **page, **settings)
        self.logits: list[Tensor] = []
        model, graphs = self.rank.model, self.rank.runner._graphs
        logits, run = model.logits, graphs.run

        def kept(hidden: Tensor, head: object) -> Tensor:
            found = logits(hidden, head)
            if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
                self.logits.append(found.detach())
            return found

        def kept_run(*arguments: object) -> Tensor:
            found = run(*arguments)
            self.logits.append(found.clone())
            return found

        model.logits, graphs.run = kept, kept_run

    def answer(self, ids: list[int], follow: list[int] | None = None, chunk: int = 1 << 30):
        """Greedy tokens and the logits of each; with `follow`, teacher-forced."""
        sequence = self.rank.open(0, len(ids) + NEW + 1)
        rows, tokens = [], []
        _, results = self.rank.prefill(sequence, ids, chunk=chunk)
        token = results[-1].sampled[0].token
        for step in range(NEW):
            rows.append(self.logits[-1][-1].float().cpu())
            tokens.append(token)
            self.logits.clear()
            fed = token if follow is None else follow[step]
            _, (token,) = self.rank.decode([sequence], [fed])
        self.rank.close(sequence)
        return tokens, torch.stack(rows)


def prompt(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, 1000, (PROMPT,), generator=generator).tolist()


@pytest.fixture(scope="module")
def truth() -> tuple[list[int], Tensor]:
    """fp32 on the CPU, by torch's reference operators."""
    return Seen(CPU, dtype="float32", backend="torch").answer(prompt(0))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("chunk", [1 << 30, 256])
def test_fp32_tokens(
    truth: tuple[list[int], Tensor], backend: str, chunk: int, device: torch.device
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens, want = truth
    seen = Seen(device, dtype="float32", backend=backend)
    found, _ = seen.answer(prompt(0), chunk=chunk)
    same = next((i for i, (a, b) in enumerate(zip(found, tokens, strict=True)) if a != b), NEW)
    if same < NEW:
        first, second = want[same].topk(2).values.tolist()
        assert first - second < MARGIN
    _, rows = seen.answer(prompt(0), follow=tokens, chunk=chunk)
    assert (rows - want).abs().max() < LOGIT_ERROR


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", ["flashinfer", "triton", "torch"])
def test_bf16_logits(
    truth: tuple[list[int], Tensor], backend: str, graphs: bool, device: torch.device
) -> None:
    """RMS error at most 1.25 times that of the CPU engine's bf16, over the same tokens."""
    tokens, want = truth
    _, here = Seen(CPU, dtype="bfloat16").answer(prompt(0), follow=tokens)
    try:
        seen = Seen(device, dtype="bfloat16", backend=backend, graphs=graphs)
    except Exception as error:
        pytest.skip(f"{backend}: {error}")
    _, there = seen.answer(prompt(0), follow=tokens)
    mine, theirs = ((rows - want).square().mean().sqrt() for rows in (there, here))
    assert mine <= BF16_RATIO * theirs, f"{mine:.2e} where the CPU has {theirs:.2e}"


def test_graphs_replay_what_eager_steps_compute(device: torch.device) -> None:
    answers = [
        Seen(device, dtype="bfloat16", graphs=graphs).answer(prompt(1)) for graphs in (True, False)
    ]
    assert answers[0][0] == answers[1][0]
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=0, atol=2e-2)


@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_tokens_that_stay_on_the_device(backend: str, graphs: bool, device: torch.device) -> None:
    """Steps launched ahead sample what steps through the host do, and none waits for another."""
    try:
        rank = Seen(device, dtype="bfloat16", backend=backend, graphs=graphs).rank
    except Exception as error:
        pytest.skip(f"{backend}: {error}")
    sequences, firsts = [], []
    for slot, seed in enumerate((3, 4, 5)):
        sequences.append(rank.open(slot, PROMPT + 2 * NEW))
        _, results = rank.prefill(sequences[-1], prompt(seed))
        firsts.append(results[-1].sampled[0].token)
    through_host, tokens = [], firsts
    for _ in range(NEW):
        _, tokens = rank.decode(sequences, tokens)
        through_host.append(tokens)
    for sequence in sequences:
        sequence.length = PROMPT
    assert rank.decode_ahead(sequences, firsts, NEW).tokens == through_host


def test_sparse_prompts(device: torch.device) -> None:
    """Forced page sets run, and keep about what they were told."""
    rank = Seen(device, dtype="bfloat16").rank
    if rank.means.sparse is None:
        pytest.skip("nothing chooses pages here")
    sequence = rank.open(0, 4096)
    ids = (prompt(2) * 6)[:4096]
    _, results = rank.prefill(sequence, ids, forced(0.1))
    (counts,) = results[-1].sparse
    assert 0 < counts.read_pairs < counts.causal_pairs
