"""Train the embedded model on CPU with plain torch; resumes from its last checkpoint.

    python -m recipes.embedded_model.train --out DIR --minutes 60

Matrices are trained with Muon, the rest (embeddings, gains) with AdamW. The document length starts
at 64 tokens and doubles whenever answers get right. DIR/state.safetensors (and .json) is written
every 5 minutes; starting again with the same DIR goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .batches import Batch, BatchMaker
from .documents import PLACES, TASKS
from .initialise import initialise
from .model import ModelConfig, Qwen3
from .tokenizer import train_tokenizer, write_tokenizer

SHOWN = ("first", *TASKS, "recap lookalike", "recap multi", "recap chain", *PLACES, "next")
OTHER_SHARE = 0.15  # share of unweighted tokens whose logits are computed at all


@dataclass
class Progress:
    """What a run must remember besides tensors."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    level: int = 1
    scores: dict[str, float] = field(default_factory=dict)


class Trainer:
    """The model, its two optimizers and its progress."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        size = (tokenizer.get_vocab_size() + 63) // 64 * 64
        self.config = ModelConfig(vocab_size=size)
        torch.manual_seed(arguments.seed)
        self.model = Qwen3(self.config)
        initialise(self.model)
        named = dict(self.model.named_parameters())
        self.names = list(named)
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        gains = [p for p in named.values() if p.ndim == 1]
        embeddings = [p for n, p in named.items() if "embed" in n]
        self.muon = torch.optim.Muon(
            matrices, lr=arguments.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(
            [
                {"params": gains, "weight_decay": 0.0, "scale": 1.0},
                {"params": embeddings, "weight_decay": 0.0, "scale": 0.7},
            ],
            lr=arguments.lr,
            betas=(0.9, 0.98),
        )
        self.batches = BatchMaker(
            tokenizer, arguments.seed, self.config.max_position_embeddings - 4096, "<|endoftext|>"
        )
        self.progress = Progress()
        self.stopped = False

    # -- checkpoint -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write all state; a crash in between leaves the older state whole."""
        tensors: dict[str, Tensor] = {f"model/{n}": p for n, p in self.model.named_parameters()}
        for label, optimizer in (("muon", self.muon), ("adam", self.adam)):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"{label}/{index}/{key}"] = torch.as_tensor(value)
        metadata = {"progress": json.dumps(vars(self.progress))}
        temporary = self.out / "state.tmp"
        copies = {k: v.detach().contiguous() for k, v in tensors.items()}
        save_file(copies, temporary, metadata=metadata)
        os.replace(temporary, self.out / "state.safetensors")

    def resume(self) -> None:
        path = self.out / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.progress = Progress(**json.loads(file.metadata()["progress"]))
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
        for label, optimizer in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for name, tensor in tensors.items():
                kind, *rest = name.split("/")
                if kind == label:
                    state[int(rest[0])][rest[1]] = tensor
            whole: dict[str, Any] = optimizer.state_dict()
            whole["state"] = dict(state)
            optimizer.load_state_dict(whole)

    # -- one step -------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Warm up over 60 steps, hold, then fall to zero over the last part of the time."""
        total = self.arguments.minutes * 60
        left = max(0.0, 1 - self.progress.seconds / total)
        return min(1.0, (self.progress.step + 1) / 60, left / self.arguments.decay + 0.01)

    def pick(self, rng: random.Random) -> tuple[int, bool]:
        """The length of the next batch, and whether it is of recaps rather than of chats.

        Recaps, half of them at the longest length reached, teach to find values among many. Where
        the question stands matters once a chat, so chats are mostly short and many.
        """
        level = self.progress.level
        recap = rng.random() < self.arguments.recap_share
        if not recap:
            level = min(level, 1 + int(rng.expovariate(self.arguments.short_chats)))
        elif level > 1 and rng.random() > self.arguments.top_share:
            level = rng.randrange(max(1, level - 4), level)
        return 64 << level, recap

    def step(self) -> dict[str, float]:
        rng = random.Random(f"{self.arguments.seed}/{self.progress.step}")
        length, recap = self.pick(rng)
        count = max(1, self.arguments.tokens // length)
        spread = rng.random() < 1 / 3
        batch = self.batches.batch(self.progress.step, length, count, spread, recap)
        loss, right = self.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.learning_rate()
        for group in self.muon.param_groups:
            group["lr"] = self.arguments.lr * rate
        for group in self.adam.param_groups:
            group["lr"] = self.arguments.lr * rate * group["scale"]
        self.muon.step()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += length * count
        self.score(batch, right, length)
        self.advance(length)
        return {"loss": loss.item(), "length": length}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted loss, and whether each token (B, T) was predicted right."""
        ids = torch.from_numpy(batch.ids)
        target = ids[:, 1:]
        weight = torch.from_numpy(batch.weights)[:, 1:]
        other = (weight > 0) & (weight < 1)
        keep = other & (torch.rand_like(weight) < OTHER_SHARE)
        weight = torch.where(other, keep * weight / OTHER_SHARE, weight)
        chosen = weight > 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model(ids[:, :-1], torch.from_numpy(batch.positions)[:, :-1])
            logits = self.model.head(hidden[chosen])
        logits = logits.float()
        losses = F.cross_entropy(logits, target[chosen], reduction="none")
        loss = (losses * weight[chosen]).sum() / weight.sum()
        right = torch.zeros(ids.shape, dtype=torch.bool)
        right[:, 1:][chosen] = logits.argmax(-1) == target[chosen]
        return loss, right

    # -- curriculum -----------------------------------------------------------------------------

    def score(self, batch: Batch, right: Tensor, length: int) -> None:
        """Moving averages: share of whole answers right, and of first value tokens."""
        tally: dict[str, list[float]] = defaultdict(list)
        for row, answers in enumerate(batch.answers):
            for answer in answers:
                values = [float(right[row, first:last].all()) for first, last in answer.values]
                if answer.place == "recap":
                    tally[f"recap {answer.task}/{length}"] += values
                else:
                    whole = float(right[row, answer.start : answer.stop].all())
                    tally[f"{answer.task}/{length}"].append(whole)
                    tally[f"{answer.place}/{length}"].append(whole)
                if answer.task in ("single", "lookalike"):
                    tally[f"first/{length}"] += [float(right[row, v[0]]) for v in answer.values]
        scores = self.progress.scores
        for key, values in tally.items():
            mean = sum(values) / len(values)
            keep = 0.9 if len(values) >= 8 else 0.97
            scores[key] = keep * scores[key] + (1 - keep) * mean if key in scores else mean

    def advance(self, length: int) -> None:
        level, scores = self.progress.level, self.progress.scores
        if length == 64 << level and length < self.arguments.longest:
            visits = scores.get("visits", 0.0) + 1
            scores["visits"] = visits
            mark = self.arguments.pass_mark
            recaps = scores.get(f"recap lookalike/{length}", 0.0)
            if visits >= 15 and recaps > mark - 0.07 and scores[f"first/{length}"] > mark:
                self.progress.level += 1
                scores["visits"] = 0.0

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        progress = self.progress
        last_save, last_print = time.monotonic(), 0.0
        recent: list[float] = []
        signal.signal(signal.SIGTERM, self.stop)
        while progress.seconds < self.arguments.minutes * 60 and not self.stopped:
            begin = time.monotonic()
            result = self.step()
            recent.append(result["loss"])
            now = time.monotonic()
            progress.seconds += now - begin
            if now - last_print > 20:
                self.report(sum(recent) / len(recent))
                last_print, recent = now, []
            if now - last_save > 300:
                self.save()
                last_save = now
        self.save()

    def stop(self, *_: object) -> None:
        """End after the step under way (a signal handler); ``run`` then saves."""
        self.stopped = True

    def report(self, loss: float) -> None:
        progress = self.progress
        lengths = [64 << i for i in range(progress.level + 1)][-6:]
        parts = [f"{progress.seconds:6.0f}s step {progress.step} loss {loss:.3f}"]
        parts.append(f"{progress.tokens / max(1.0, progress.seconds):.0f} tok/s")
        for name in SHOWN:
            values = [progress.scores.get(f"{name}/{n}") for n in lengths]
            shown = " ".join("-" if v is None else f"{100 * v:.0f}" for v in values)
            parts.append(f"{name} {shown}")
        print(" | ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.36, help="last share of time, lr falls")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens of a batch")
    parser.add_argument("--longest", type=int, default=8192, help="longest documents")
    parser.add_argument("--top-share", type=float, default=0.5)
    parser.add_argument("--pass-mark", type=float, default=0.96)
    parser.add_argument("--short-chats", type=float, default=0.35, help="the higher, the shorter")
    parser.add_argument("--recap-share", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "tokenizer.json"
    if not path.exists():
        write_tokenizer(train_tokenizer(), arguments.out)
    trainer = Trainer(arguments, Tokenizer.from_file(str(path)))
    trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
