"""Steps whose tokens stay on the device: the next one is launched before they are known, and all is
as exact as through the host. A CPU stands for the device, with events that come late."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import check
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import SLOTS, Run, ThreadEngine, drive
from test.kit.fake_flashinfer import FakeFlashInfer

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.runner import device_board, launched, model_runner
from sps_runtime.runner.device_board import DeviceBoard, LateTokens
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.types.sampling import SamplingParams

LATE_S = 2e-3
PAGES = 120


class LateFence:
    """An event that comes some time after it was recorded."""

    def __init__(self, device: torch.device) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.monotonic() + LATE_S

    @property
    def done(self) -> bool:
        return time.monotonic() >= self.at

    def wait(self) -> None:
        time.sleep(max(0.0, self.at - time.monotonic()))


class Log:
    """What ran, in order: launches, and tokens that came to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[tuple[str, int]] = []
        for module in (device_board, launched, model_runner):
            monkeypatch.setattr(module, "Fence", LateFence)
        launch, settle = model_runner.ModelRunner.launch, LateTokens.settle

        def launches(runner: object, plan: object, late: bool) -> object:
            self.entries.append(("late" if late else "launched", plan.epoch))
            return launch(runner, plan, late)

        def settles(tokens: LateTokens) -> object:
            self.entries.append(("known", tokens._plan.epoch))
            return settle(tokens)

        monkeypatch.setattr(model_runner.ModelRunner, "launch", launches)
        monkeypatch.setattr(LateTokens, "settle", settles)

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.entries)

    def ahead(self) -> int:
        """Launches of which the tokens of the step before were not known."""
        open_, found = 0, 0
        for what, _ in self.entries:
            found += what == "late" and open_ > 0
            open_ += {"late": 1, "known": -1, "launched": 0}[what]
        assert open_ == 0
        return found


def engine_of(kind: str, sp: int = 1, flashinfer: bool = False, **options: object) -> ThreadEngine:
    model = exact_model(kind)

    def make_backend() -> AttentionBackend:
        fallback = TorchBackend()
        if not flashinfer:
            return fallback
        return FlashInferBackend(FakeFlashInfer(), fallback, torch.device("cpu"))

    engine = ThreadEngine(
        model.config, model.arena(1, ops="torch"), sp=sp, page_size=16, pages_per_rank=PAGES,
        ops=choose_ops("torch"), make_backend=make_backend, **options,
    )  # fmt: skip
    for runner in engine.runners:
        runner._device_board = DeviceBoard(SLOTS, torch.device("cpu"))
    return engine


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def recordable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "recordable", True)


@pytest.mark.usefixtures("recordable")
@pytest.mark.parametrize("flashinfer", [True, False])
@pytest.mark.parametrize(("kind", "sp"), [("llama", 1), ("window", 1), ("llama", 2)])
def test_exact(kind: str, sp: int, flashinfer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts come while others decode; one is cancelled and its slot's tokens are surplus."""
    log = Log(monkeypatch)
    engine = engine_of(kind, sp, flashinfer)
    shape = Shape(sp, 16, PAGES, chunk=64, decode="turns", elastic=False, seed=sp)
    requests = [
        Request(prompt(151)),
        Request(prompt(15), arrival=2),
        Request(prompt(64), arrival=3, cancel_after=9),
    ]
    try:
        run = drive(engine, Planner(shape), requests)
        ahead, late, others = log.ahead(), log.count("late"), log.count("launched")
        check(kind, engine, shape, requests, run)
    finally:
        engine.close()
    if sp == 1:
        assert ahead > 30 and others < 12, "only steps with prompts pass through the host"
    else:
        assert late == 0, "ranks of a group tell one another through the host"


def sampled(device: bool, params: list[SamplingParams], monkeypatch: pytest.MonkeyPatch) -> Run:
    log = Log(monkeypatch)
    engine = engine_of("llama", flashinfer=True)
    if not device:
        engine.runners[0]._device_board = None
    shape = Shape(1, 16, PAGES, decode="sharded")
    requests = [Request(prompt(20 + i), 24, params=p) for i, p in enumerate(params)]
    try:
        run = drive(engine, Planner(shape), requests)
    finally:
        engine.close()
    assert (log.count("late") > 0) == device
    return run


def test_drawn_tokens_are_those_of_the_host() -> None:
    """By seed and position, whatever is cut off, with and without the device's board."""
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=5),
        SamplingParams(temperature=1.5, top_k=7, seed=6),
        SamplingParams(temperature=1.2, top_p=0.8, min_p=0.01, seed=7),
    ]
    tokens = []
    for device in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            run = sampled(device, params, patched)
        tokens.append(
            [(t.slot, t.token) for step in run.results for result in step for t in result.sampled]
        )
    assert sorted(tokens[0]) == sorted(tokens[1]) and len(tokens[0]) == 24 * len(params)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, logit_bias={3: 5.0}),
    ],
)
def test_what_needs_the_host_goes_through_it(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(monkeypatch)
    engine = engine_of("llama", flashinfer=True)
    requests = [Request(prompt(20), 12), Request(prompt(30), 6, params=params)]
    shape = Shape(1, 16, PAGES, decode="sharded", overlap=False)
    try:
        drive(engine, Planner(shape), requests)
    finally:
        engine.close()
    assert log.count("late") > 2, "the other goes on alone"
    both = requests[1].samples_planned
    assert log.count("launched") >= both == 6


def test_only_the_epoch_that_was_written_is_taken() -> None:
    board = DeviceBoard(8, torch.device("cpu"))
    board.write(5, [2, 4], torch.tensor([70, 71]))
    assert board._holds(2, 5) and board._holds(4, 5)
    assert not board._holds(2, 4) and not board._holds(3, 5) and not board._holds(0, 0)
    board.write(6, [4], torch.tensor([9]))
    assert not board._holds(4, 5) and board._holds(4, 6)
    assert board.tokens[[2, 4]].tolist() == [70, 9]


def held(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_results_wait_for_their_own_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's board has a step's tokens when its result is out, not before."""
    from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
    from sps_runtime.runner.token_board import board_bytes

    for module in (device_board, launched):
        monkeypatch.setattr(module, "Fence", LateFence)
    board = TokenBoard(bytearray(board_bytes(4)))
    sample = SamplePlan(SamplingParams(temperature=0.0))
    plan = StepPlan(9, (0,), (SequencePlan(3, 0, 1, b"", b"", 8, sample),))
    tokens = torch.tensor([41])
    late = LateTokens(plan, tokens, board)
    tokens[0] = 99  # what comes next writes there again
    assert int(board._words[3]) == 0
    assert held(late.settle) >= LATE_S / 2
    assert int(board._words[3]) == 9 << 32 | 41
