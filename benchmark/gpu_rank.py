"""One rank on one device without a server: plans in, seconds out. `gpu.py` and test/gpu run it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import structs

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.choose import choose_backend, choose_device_backend
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.config.cache import kv_row, resolve_kv_dtype
from sps_runtime.config.model import ModelConfig, parse_model_config
from sps_runtime.distributed.by_device import DeviceMailroom, StagedMailroom
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import NoFence
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.models.loader import LoadSpec, load_model_on
from sps_runtime.ops.cuda_graphs import GraphRecorder
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.kv_rows import storage_dtype
from sps_runtime.runner.device_board import DeviceBoard
from sps_runtime.runner.launched import Lane
from sps_runtime.runner.model_runner import ModelRunner
from sps_runtime.runner.token_board import TokenBoard, board_bytes
from sps_runtime.sparse.dispatch import choose_operators, device_operators, possible
from sps_runtime.types.attention import EXACT, AttentionSpec, SparseSettings
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan, StepResult
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

GREEDY = SamplePlan(SamplingParams(temperature=0.0))
SLOTS = 64


def llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int
) -> ModelConfig:
    """A Llama of this shape."""
    return parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
            "rope_theta": 500000.0,
            "vocab_size": vocab,
            "torch_dtype": "bfloat16",
        }
    )


LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128256, 131072 + 1024)
TINY = llama(256, 512, 2, 4, 2, 512, 4096)


def forced(budget: float) -> AttentionSpec:
    """Page sets of a size that weights do not decide: random ones attend almost uniformly."""
    return AttentionSpec("csa", SparseSettings(tau=0.0, budget=budget, minimum=8, block=128))


@dataclass
class Sequence:
    """One sequence of a `LocalRank`.

    Attributes:
        pages: its page ids.
        length: tokens whose KV lies there.
    """

    slot: int
    pages: list[int]
    length: int = 0


@dataclass(frozen=True)
class Ahead:
    """Attributes:
    step_s: seconds a step.
    tokens: sampled in each step, by sequence.
    """

    step_s: float
    tokens: list[list[int]]


class LocalRank:
    """A model on a device, with room for `pages` pages.

    Args:
        directory: of a checkpoint; None for random weights.
        backend: name of the attention backend, or ``auto``.
        graphs: replay decode steps where the device can.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        pages: int,
        *,
        directory: Path | None = None,
        dtype: str = "auto",
        page_size: int = 128,
        backend: str = "auto",
        kv_dtype: str = "auto",
        graphs: bool = True,
        seed: int = 0,
    ) -> None:
        self.config, self.device, self.page_size = config, device, page_size
        cpu = device.type == "cpu"
        ops = choose_ops("torch" if backend == "torch" else "auto", device=device)
        spec = LoadSpec(directory or Path(), dtype, "auto" if directory else "dummy", seed)
        self.model = load_model_on(config, spec, 0, device, ops.operators)
        self.dtype = self.model.dtype
        self.backend: AttentionBackend = (
            choose_backend(ops, page_size=page_size, head_dim=config.head_dim)
            if cpu
            else choose_device_backend(backend, device, dtype=self.dtype, head_dim=config.head_dim)
        )
        name = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[self.dtype]
        kv_name = resolve_kv_dtype(kv_dtype, name)
        row = kv_row(kv_name)
        self.shape = KVShape(
            config.num_layers, pages, config.num_kv_heads, page_size, config.head_dim, *row
        )
        mailroom = ThreadWorld(1).mailroom(0)
        pool = KVPool.private(self.shape, storage_dtype(kv_name, self.dtype), device)
        sparse = choose_operators(ops.kernels) if cpu else device_operators()
        self.means = AttentionContext(
            mesh=Mesh(1, 1, 0),
            mailroom=DeviceMailroom(mailroom, StagedMailroom(mailroom)),
            store=KVStore([pool], 0),
            fence=NoFence(),
            backend=self.backend,
            traffic=Traffic(),
            hosts=(0,),
            ops=ops.operators,
            sparse=self._sparse(sparse),
            windows=config.layer_windows,
        )
        recorder = GraphRecorder(device) if graphs and not cpu else None
        board = TokenBoard(bytearray(board_bytes(SLOTS)))
        self.runner = ModelRunner(
            self.model,
            config.vocab_size,
            self.means,
            board,
            "ntp",
            recorder=recorder,
            device_board=DeviceBoard(SLOTS, device),
        )
        self._free = list(range(pages))
        self._epoch = 0

    def _sparse(self, operators: object) -> SparseMeans | None:
        shape = self.shape
        whole = possible(shape.page_size, shape.head_dim, native=shape.itemsize > 1)
        if operators is None or not whole:
            return None
        nbytes = operators.summary_nbytes(shape.page_size, shape.head_dim, shape.itemsize)
        room = SummaryShape(shape.layers, shape.slots, shape.kv_heads, nbytes)
        return SparseMeans(operators, SummaryStore([room.private(self.device)], 0))

    def open(self, slot: int, tokens: int) -> Sequence:
        """A sequence with pages for so many tokens."""
        count = -(-tokens // self.page_size)
        pages, self._free = self._free[:count], self._free[count:]
        assert len(pages) == count, "no pages are left"
        return Sequence(slot, pages)

    def close(self, sequence: Sequence) -> None:
        """Its pages are free again."""
        self._free += sequence.pages

    def prefill(
        self,
        sequence: Sequence,
        ids: list[int],
        attention: AttentionSpec = EXACT,
        chunk: int = 1 << 30,
    ) -> tuple[float, list[StepResult]]:
        """Seconds until the first token, and all steps' results.

        Args:
            chunk: new tokens of a step; under csa a multiple of superblocks.
        """
        began, results = time.perf_counter(), []
        for begin in range(0, len(ids), chunk):
            part = ids[begin : begin + chunk]
            last = begin + len(part) == len(ids)
            plan = self._sequence(sequence, part, GREEDY if last else None, attention)
            results.append(self._run((plan,)))
            sequence.length += len(part)
        return time.perf_counter() - began, results

    def decode(self, sequences: list[Sequence], tokens: list[int]) -> tuple[float, list[int]]:
        """One step of one token each: its seconds, and what was sampled."""
        plans = tuple(
            self._sequence(sequence, [token], GREEDY)
            for sequence, token in zip(sequences, tokens, strict=True)
        )
        began = time.perf_counter()
        result = self._run(plans)
        seconds = time.perf_counter() - began
        for sequence in sequences:
            sequence.length += 1
        found = {token.slot: token.token for token in result.sampled}
        return seconds, [found[sequence.slot] for sequence in sequences]

    def decode_ahead(self, sequences: list[Sequence], tokens: list[int], steps: int) -> Ahead:
        """Steps of one token each, launched as a server's rank does: each names the tokens of the
        one before by their place on the board, and is sent when one is under way.

        Args:
            tokens: of the first step.
        """
        answers: list[StepResult] = []
        lane, first = Lane(self.runner, 0, answers.append), self._epoch + 1
        began = time.perf_counter()
        for step in range(steps):
            plans = tuple(self._sequence(sequence, [0], GREEDY) for sequence in sequences)
            if step:
                changes = {"tokens": b"", "board_epoch": self._epoch}
                plans = tuple(structs.replace(plan, **changes) for plan in plans)
            else:
                known = zip(plans, tokens, strict=True)
                plans = tuple(structs.replace(plan, tokens=pack_ids([t])) for plan, t in known)
            self._epoch += 1
            lane.take(StepPlan(self._epoch, (0,), plans))
            for sequence in sequences:
                sequence.length += 1
        lane.drain()
        seconds = time.perf_counter() - began
        assert [answer.epoch for answer in answers] == list(range(first, self._epoch + 1))
        found = [{token.slot: token.token for token in answer.sampled} for answer in answers]
        return Ahead(
            seconds / steps,
            [[step[sequence.slot] for sequence in sequences] for step in found],
        )

    def _sequence(
        self,
        sequence: Sequence,
        ids: list[int],
        sample: SamplePlan | None,
        attention: AttentionSpec = EXACT,
    ) -> SequencePlan:
        end = sequence.length + len(ids)
        pages = sequence.pages[: -(-end // self.page_size)]
        return SequencePlan(
            sequence.slot, sequence.length, len(ids), pack_ids(ids), pack_ids(pages),
            sample=sample, attention=attention,
        )  # fmt: skip

    def _run(self, sequences: tuple[SequencePlan, ...]) -> StepResult:
        self._epoch += 1
        return self.runner.execute(StepPlan(self._epoch, (0,), sequences))
