"""Steps whose weights and pages lie on a device: `meta` stands for a GPU, since torch refuses to
mix it with tensors of the host, and a value that the host asks for is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from msgspec import structs
from test.dist.helpers.exact_models import exact_model
from test.kit.fake_flashinfer import FakeFlashInfer
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.distributed.by_device import DeviceMailroom, StagedMailroom
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import NoFence
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.models.loader import LoadSpec, build_model, load_model_on, load_weights
from sps_runtime.ops.operators import TorchOperators
from sps_runtime.runner import model_runner
from sps_runtime.runner.device_board import DeviceBoard
from sps_runtime.runner.model_runner import ModelRunner
from sps_runtime.runner.token_board import TokenBoard, board_bytes
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

META = torch.device("meta")
PAGE, SLOTS = 16, 32


class MetaOperators(TorchOperators):
    """torch's, without the question whether a slot is -1."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def write_kv(
        self, k_TKD: Tensor, v_TKD: Tensor, k_pool: Tensor, v_pool: Tensor, slots_T: Tensor,
        offsets_T: Tensor,
    ) -> None:  # fmt: skip
        everything = (k_TKD, v_TKD, k_pool, v_pool, slots_T, offsets_T)
        assert all(tensor.device == META for tensor in everything)
        assert len(k_TKD) == len(slots_T) == len(offsets_T)
        self.written += len(slots_T)


class MetaFlashInfer(FakeFlashInfer):
    """Computes shapes."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"):
            getattr(self, name)._run = self._shapes
            getattr(self, name)._keep = lambda wrapper, **planned: self.plans.append(planned)

    @staticmethod
    def _shapes(wrapper: object, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert q.device == k.device == v.device == META
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def make_runner(kind: str) -> tuple[ModelRunner, MetaOperators, MetaFlashInfer]:
    exact, ops, library = exact_model(kind), MetaOperators(), MetaFlashInfer()
    config = exact.config
    model = build_model(config, exact.arena(1, "bfloat16", "torch"), 0, META, ops)
    shape = KVShape(config.num_layers, SLOTS, config.num_kv_heads, PAGE, config.head_dim, 2)
    mailroom = ThreadWorld(1).mailroom(0)
    means = AttentionContext(
        mesh=Mesh(1, 1, 0),
        mailroom=DeviceMailroom(mailroom, StagedMailroom(mailroom)),
        store=KVStore([KVPool.private(shape, torch.bfloat16, META)], 0),
        fence=NoFence(),
        backend=FlashInferBackend(library, TorchBackend(), META),
        traffic=Traffic(),
        hosts=(0,),
        ops=ops,
    )
    board = TokenBoard(bytearray(board_bytes(4)))
    return ModelRunner(model, config.vocab_size, means, board, "ntp"), ops, library


def sequence(slot: int, start: int, count: int) -> SequencePlan:
    pages = pack_ids(range(slot * 8, slot * 8 + -(-(start + count) // PAGE)))
    tokens = pack_ids(range(count))
    sample = SamplePlan(SamplingParams(temperature=0.0))
    return SequencePlan(slot, start, count, tokens, pages, sample=sample)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "window"])
@pytest.mark.parametrize("mixed", [False, True])
@torch.inference_mode()
def test_prefill_stays_on_the_device(kind: str, mixed: bool) -> None:
    runner, ops, library = make_runner(kind)
    sequences = (sequence(0, 0, 40), *((sequence(1, 33, 1), sequence(2, 64, 1)) if mixed else ()))
    step = runner._prepare(StepPlan(1, (0,), sequences))
    hidden_TD = runner._forward(step)
    rows = 42 if mixed else 40
    assert hidden_TD.device == META and len(hidden_TD) == rows
    sampled = step.batch.sampled
    logits_RV = runner._logits(step, hidden_TD, sampled.rows, sampled.per_member)
    assert logits_RV.device == META and len(logits_RV) == len(sequences)
    config = exact_model(kind).config
    assert ops.written == rows * config.num_layers
    assert len(library.plans) == len(set(config.layer_windows)), "planned once a step and window"


@pytest.mark.parametrize("kind", ["llama", "window"])
@torch.inference_mode()
def test_decode_stays_on_the_device(kind: str) -> None:
    runner, _, library = make_runner(kind)
    for epoch in range(1, 4):
        sequences = tuple(sequence(slot, 20 * slot + epoch, 1) for slot in range(3))
        plan = StepPlan(epoch, (0,), sequences)
        assert runner._graphs.takes(plan)
        logits_RV = runner._graphs.run(plan, [0, 1, 2], runner._links((0,)), runner._decode_context)
        assert logits_RV.device == META and len(logits_RV) == 3
        assert len(library.plans) == epoch, "each step's tables are planned once"


class Kept:
    """In place of `LateTokens`: nothing can be copied from `meta`."""

    def __init__(self, plan: StepPlan, tokens_R: Tensor, board: TokenBoard) -> None:
        assert tokens_R.device == META and tokens_R.dtype == torch.int64
        assert len(tokens_R) == len(plan.sequences)


MANY_WAYS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=20, min_p=0.05, seed=2),
]


def test_tokens_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From ids that nobody on the host knows to ids that nobody on the host knows."""
    monkeypatch.setattr(model_runner, "LateTokens", Kept)
    runner, _, _ = make_runner("llama")
    board = runner._device_board = DeviceBoard(4, META)
    board.write(1, [0, 1, 2], torch.empty(3, dtype=torch.int64, device=META))
    for epoch in range(2, 5):
        sequences = [sequence(slot, 20 * slot + epoch, 1) for slot in range(3)]
        plan = StepPlan(
            epoch,
            (0,),
            tuple(
                structs.replace(one, tokens=b"", board_epoch=epoch - 1, sample=SamplePlan(params))
                for one, params in zip(sequences, MANY_WAYS, strict=True)
            ),
        )
        assert runner.runs_late(plan)
        started = runner.launch(plan, late=True)
        assert started.done and started.ran.late is not None and not started.ran.sampled
        assert not runner.runs_late(plan), "the board has this epoch's tokens now"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_gpu_gets_its_own_slice(tp: int, tied: bool) -> None:
    """The same tensors as in the memory that CPU ranks share, and no others."""
    exact = exact_model("llama")
    config = replace(exact.config, tie_word_embeddings=tied)
    spec = LoadSpec(exact.directory, tp_size=tp)
    everything = load_weights(config, spec)
    for rank in range(tp):
        alone = load_model_on(config, spec, rank, torch.device("cpu"), TorchOperators())
        shared = build_model(config, everything, rank)
        pairs = [
            (alone.embedding.weight_VD.tensor_NK, shared.embedding.weight_VD.tensor_NK),
            (alone.head.weight_VD.tensor_NK, shared.head.weight_VD.tensor_NK),
            (alone.norm.weight_D, shared.norm.weight_D),
        ]
        for mine, theirs in zip(alone.layers, shared.layers, strict=True):
            pairs += [
                (mine.attention.qkv.weight_ND.tensor_NK, theirs.attention.qkv.weight_ND.tensor_NK),
                (mine.mlp.down.weight_DN.tensor_NK, theirs.mlp.down.weight_DN.tensor_NK),
            ]
        assert all(torch.equal(a, b) for a, b in pairs)
        nbytes = alone.embedding.weight_VD.tensor_NK.untyped_storage().nbytes()
        assert nbytes <= everything.layout.nbytes and (tp == 1 or nbytes < everything.layout.nbytes)
