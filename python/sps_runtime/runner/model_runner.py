"""Executes plans: the model's forward over a step's context, sampling, the acknowledgement.

A runner keeps nothing of a sequence. A recorded list of plans, sent in order, makes it compute the
same again (`replay`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.decode_inputs import TokenSource
from sps_runtime.attention.sequence_parallel.build import sequence_attention, sparse_counters
from sps_runtime.attention.sequence_parallel.exact.decode import DecodeAttention
from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight, flight_of
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.config.parallel import Arch
from sps_runtime.layers.placement import GroupLinks, place
from sps_runtime.layers.step import LinearPlacement, StepContext
from sps_runtime.ops.devices import Fence, upload
from sps_runtime.ops.recording import StepRecorder
from sps_runtime.runner.device_board import (
    DeviceBoard,
    LateTokens,
    board_sources,
    known_tokens,
)
from sps_runtime.runner.grammar_masks import GrammarMasks, Masks
from sps_runtime.runner.hidden_states import report_hidden
from sps_runtime.runner.input_batch import InputBatch, build_input, decode_tokens
from sps_runtime.runner.launched import Launched, Ran
from sps_runtime.runner.micro_batches import fly
from sps_runtime.runner.prompt_logprobs import as_runs, judge_prompt
from sps_runtime.runner.publish import SampledHere, publish
from sps_runtime.runner.sampler import sample, sample_late
from sps_runtime.runner.step_graph import StepGraphs
from sps_runtime.runner.steps_ahead import StepsAhead, samples_alone
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.telemetry.timeline import NoTimeline, Timeline
from sps_runtime.types.plan import (
    HiddenState,
    PromptLogprobs,
    SampledToken,
    StepPlan,
    StepResult,
)


class Model(Protocol):
    """What a runner needs of a model (`models.decoder.Decoder`)."""

    def forward(self, input_ids_T: Tensor, step: StepContext) -> Tensor:
        """Ids ``[my tokens]`` -> ``[my tokens, hidden]``."""
        ...

    def logits(self, hidden_RD: Tensor, head: LinearPlacement) -> Tensor:
        """``[my rows, hidden]`` -> ``[my rows, vocab]``."""
        ...

    def norm(self, x: Tensor, /) -> Tensor:
        """The last norm: ``[rows, hidden]`` -> the same shape."""
        ...


@dataclass(frozen=True)
class Step:
    """One plan as this rank sees it.

    Attributes:
        member: this rank's index in the group.
        links: the group's communicators.
        batch: tokens and rows.
        context: what the model's forward is given.
        flight: the step's micro-batches, where it runs in several at once.
    """

    plan: StepPlan
    member: int
    links: GroupLinks
    batch: InputBatch
    context: StepContext
    flight: Flight | None = None


class ModelRunner:
    """One global rank's executor.

    Args:
        model: this TP rank's.
        vocab: ids that the model knows.
        means: pools, links, fences, backend.
        board: the host's token board.
        arch: what sharded tokens meet: whole weights or cut ones.
        token_timeout_s: how long a token that a plan names may take to appear on the board.
        timeline: where spans of steps and their parts go.
        pipeline: keep micro-batches of a long prefill in flight where pages cross hosts.
        recorder: records decode steps to replay them; None runs them all through the model's code.
        grammars: finds what grammars allow; without it requests that have one fail.
        device_board: where sampled ids stay on the device, so that the next step can be launched
            before they are known; None sends all through the host.
    """

    def __init__(
        self,
        model: Model,
        vocab: int,
        means: AttentionContext,
        board: TokenBoard,
        arch: Arch,
        token_timeout_s: float = 300.0,
        timeline: Timeline | None = None,
        pipeline: bool = True,
        recorder: StepRecorder | None = None,
        grammars: GrammarMasks | None = None,
        device_board: DeviceBoard | None = None,
    ) -> None:
        self._model = model
        self._vocab = vocab
        self._means = means
        self._board = board
        self._arch = arch
        self._token_timeout_s = token_timeout_s
        self._timeline: Timeline = timeline or NoTimeline()
        self._pipeline = pipeline
        self._grammars = grammars or GrammarMasks()
        self._device_board = device_board
        self._graphs = StepGraphs(means, self._decode, recorder, self._timeline)

    def record(self, on: bool) -> None:
        """Go on with the timeline, or pause it."""
        self._timeline.record(on)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan that this rank is in; all ranks of its group do, in the order of epochs.

        Raises:
            ConnectionError, TimeoutError: a peer or an awaited token did not come.
            ValueError: the plan contradicts itself.
        """
        return self.launch(plan, late=False).result()

    def ahead(self, plan: StepPlan) -> StepsAhead | None:
        """A burst's steps behind its first, which was executed, to be replayed without coming back
        here; None where each of them is to be executed.

        Raises:
            ValueError: the plan contradicts itself.
        """
        replays = self._graphs.ahead(plan) if samples_alone(plan) else None
        if replays is None:
            return None
        return StepsAhead(plan, self._means, replays, self._board, self._token_timeout_s)

    def runs_late(self, plan: StepPlan) -> bool:
        """Whether a step's tokens can stay on the device: a decode step that this rank runs alone,
        whose tokens are all here."""
        return (
            self._device_board is not None
            and len(plan.group) == 1
            and self._means.mesh.tp_size == 1
            and self._graphs.takes(plan)
            and self._device_board.takes(plan)
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan, late: bool) -> Launched:
        """As `execute`, but the end of the step, and with `late` its tokens, are still to be waited
        for. Results must be asked for in the order of launches, and of all before a plan that is
        not `late`.

        Args:
            late: what `runs_late` says; False always works.
        """
        began, waited = time.perf_counter(), self._board.waited_s
        traffic = self._means.traffic
        traffic.take()
        with self._timeline.span(plan.phase, "step", epoch=plan.epoch, placement=plan.placement):
            run = self._run_decode if self._graphs.takes(plan) else self._run
            ran = self._run_late(plan) if late else run(plan)
        fence = Fence(self._means.device)
        fence.record()
        return Launched(
            plan.epoch,
            self._means.mesh.rank,
            ran,
            fence,
            began,
            traffic.take(),
            self._board.waited_s - waited,
            self._means.store.shape.layers,
        )

    def _run(self, plan: StepPlan) -> Ran:
        span = self._timeline.span
        with span("prepare", "host"):
            step = self._prepare(plan)
            masks = self._grammars.begin(plan, self._sampled_here(step), step.batch.board_tokens)
        rows = len(step.batch.tokens_T)
        with span("forward", "forward", tokens=rows):
            hidden_TD = self._forward(step)
        with span("sample", "host"):
            sampled = self._sample(step, hidden_TD, masks)
        judged = self._judge(step, hidden_TD)
        hidden_states = self._report(step, hidden_TD)
        attention = step.flight.strategy if step.flight else step.context.attend
        return Ran(rows, sampled, judged, hidden_states, sparse_counters(attention))

    def _run_decode(self, plan: StepPlan) -> Ran:
        """A step of one new token a sequence: `StepGraphs` has everything ready but its values."""
        span, member = self._timeline.span, plan.group.index(self._means.mesh.sp_rank)
        with span("prepare", "host"):
            tokens, board_tokens = decode_tokens(plan, self._board, self._token_timeout_s)
            links = self._links(plan.group)
            rows = len(tokens)
            sequences = range(rows) if self._speaks(plan, member) else ()
            masks = self._grammars.begin(plan, sequences, board_tokens)
        with span("forward", "forward", tokens=rows):
            logits_RV = self._graphs.run(plan, tokens, links, self._decode_context)
        with span("sample", "host"):
            found = sample(logits_RV, plan, sequences, board_tokens, masks()) if sequences else []
            if self._means.mesh.tp_rank == 0:
                here = SampledHere(sequences, [token.token for token in found])
                others: list[Sequence[int]] = [()] * (len(plan.group) - 1)
                self._publish(plan, links, here, [range(rows), *others])
        return Ran(rows, tuple(found))

    def _run_late(self, plan: StepPlan) -> Ran:
        """A decode step of this rank alone that the host prepares and launches without knowing its
        tokens."""
        board, span = self._device_board, self._timeline.span
        assert board is not None
        tokens, rows = known_tokens(plan), len(plan.sequences)
        source = TokenSource(board.tokens, board_sources(plan))
        with span("forward", "forward", tokens=rows):
            links, context = self._links(plan.group), self._decode_context
            logits_RV = self._graphs.run(plan, tokens, links, context, source)
        with span("sample", "host"):
            tokens_R = sample_late(logits_RV, plan)
            board.write(plan.epoch, [sequence.slot for sequence in plan.sequences], tokens_R)
        return Ran(rows, (), late=LateTokens(plan, tokens_R, self._board))

    def _decode_context(
        self, plan: StepPlan, links: GroupLinks, positions_T: Tensor, attend: DecodeAttention
    ) -> StepContext:
        counts = (len(plan.sequences),) * len(plan.group)
        linear = place(plan.placement, self._arch, links, counts, self._means.ops)
        return StepContext(positions_T=positions_T, linear=linear, attend=attend)

    def _decode(self, tokens_T: Tensor, context: StepContext) -> Tensor:
        """fp32 logits of all rows; what `StepGraphs` records."""
        hidden_RD = self._model.forward(tokens_T, context)
        logits_RV = self._model.logits(hidden_RD, context.linear)
        if logits_RV.dtype == torch.float32:
            return logits_RV
        out_RV = logits_RV.new_empty(logits_RV.shape, dtype=torch.float32)
        return self._means.ops.moves.copy_(out_RV, logits_RV)

    def _prepare(self, plan: StepPlan) -> Step:
        means, shape = self._means, self._means.store.shape
        layout = ShardLayout(plan, page_size=shape.page_size, pages_per_rank=shape.slots)
        member = layout.member(means.mesh.sp_rank)
        batch = build_input(plan, layout, member, self._board, self._token_timeout_s)
        links, flight = self._links(plan.group), self._flight(plan, layout)
        context = StepContext(
            positions_T=upload(batch.positions_T.numpy(), means.device),
            linear=place(plan.placement, self._arch, links, layout.rows, means.ops),
            attend=flight.attention(0) if flight else sequence_attention(plan, layout, means),
        )
        return Step(plan, member, links, batch, context, flight)

    def _flight(self, plan: StepPlan, layout: ShardLayout) -> Flight | None:
        if not self._pipeline or self._arch != "ntp":
            return None
        return flight_of(plan, layout, self._means)

    def _forward(self, step: Step) -> Tensor:
        if step.flight is None:
            tokens_T = upload(step.batch.tokens_T.numpy(), self._means.device)
            return self._model.forward(tokens_T, step.context)
        return fly(self._model.forward, step.flight, step.batch, step.links)

    def _links(self, group: tuple[int, ...]) -> GroupLinks:
        mesh, mailroom = self._means.mesh, self._means.mailroom
        world = tuple(rank * mesh.tp_size + tp for rank in group for tp in range(mesh.tp_size))
        return GroupLinks(
            sp=mailroom.group(mesh.sp_peers(group)),
            tp=mailroom.group(mesh.tp_peers()),
            world=mailroom.group(world),
        )

    def _logits(self, step: Step, hidden_TD: Tensor, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Logits of some of this rank's rows; `counts` are the rows of each member."""
        head = place(step.plan.placement, self._arch, step.links, counts, self._means.ops)
        if head.whole and not len(rows):
            return hidden_TD.new_empty(0, self._vocab)
        return self._model.logits(hidden_TD[upload(rows.numpy(), hidden_TD.device)], head)

    def _speaks(self, plan: StepPlan, member: int) -> bool:
        """Whether this rank samples and reports: the others of its kind hold the same logits."""
        replica = plan.placement == "replicated" and member > 0
        return self._means.mesh.tp_rank == 0 and not replica

    def _sampled_here(self, step: Step) -> Sequence[int]:
        """The sequences that this rank samples."""
        sequences: list[int] = step.batch.sampled.sequences.tolist()
        return sequences if self._speaks(step.plan, step.member) else []

    def _sample(
        self, step: Step, hidden_TD: Tensor, masks: Callable[[], Masks]
    ) -> tuple[SampledToken, ...]:
        batch, plan = step.batch, step.plan
        rows = batch.sampled
        if not any(rows.per_member):
            return ()
        logits_RV = self._logits(step, hidden_TD, rows.rows, rows.per_member)
        sequences = self._sampled_here(step)
        found = sample(logits_RV, plan, sequences, batch.board_tokens, masks()) if sequences else []
        if self._means.mesh.tp_rank == 0:
            samplers = [sequences.tolist() for sequences in rows.by_member]
            if plan.placement == "replicated":
                samplers[1:] = [[] for _ in samplers[1:]]
            here = SampledHere(sequences, [token.token for token in found])
            self._publish(plan, step.links, here, samplers)
        return tuple(found)

    def _publish(
        self,
        plan: StepPlan,
        links: GroupLinks,
        sampled: SampledHere,
        samplers: Sequence[Sequence[int]],
    ) -> None:
        of_ranks = self._means.boards or self._means.hosts
        hosts = [of_ranks[rank] for rank in plan.group]
        publish(plan, sampled, samplers, hosts, links.sp, self._board)
        if self._device_board is not None and sampled.sequences:
            slots = [plan.sequences[index].slot for index in sampled.sequences]
            tokens = np.array(sampled.tokens, dtype=np.int64)
            self._device_board.write(plan.epoch, slots, upload(tokens, self._means.device))

    def _judge(self, step: Step, hidden_TD: Tensor) -> tuple[PromptLogprobs, ...]:
        judged, sequences = step.batch.judged, step.plan.sequences
        if not any(judged.per_member):
            return ()
        logits = partial(self._logits, step, hidden_TD)
        values = judge_prompt(judged, sequences, self._vocab, logits)
        return as_runs(judged, values, sequences) if self._speaks(step.plan, step.member) else ()

    def _report(self, step: Step, hidden_TD: Tensor) -> tuple[HiddenState, ...]:
        rows = step.batch.reported
        if not len(rows.rows) or not self._speaks(step.plan, step.member):
            return ()
        return report_hidden(rows, step.plan.sequences, self._model.norm(hidden_TD[rows.rows]))


def replay(runner: ModelRunner, plans: Iterable[StepPlan]) -> Iterator[StepResult]:
    """Execute recorded plans in order. Tokens that they name come from the board: what this runner
    and its peers sampled, or a recorded board."""
    for plan in plans:
        yield runner.execute(plan)
