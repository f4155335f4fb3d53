"""The loop around the pure scheduler: messages in, one turn of policy, messages out.

It blocks in poll and never sleeps; a turn drains everything that is there, so a burst costs one
round of planning. Whatever one request provokes ends with that request; what would make ranks
diverge ends the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import zmq

from sps_runtime.ipc.heartbeat import Heartbeat
from sps_runtime.ipc.links import Receiver, Sender, encode
from sps_runtime.scheduler.scheduler import Scheduler
from sps_runtime.telemetry.timeline import Timeline
from sps_runtime.types.errors import EngineDead
from sps_runtime.types.messages import (
    Abort,
    EndBurst,
    FlushCache,
    FromRank,
    GetState,
    RankReady,
    Record,
    Reply,
    StopEngine,
    StopReason,
    ToFrontend,
    TokensBatch,
    TokensOut,
    ToRank,
    ToScheduler,
)
from sps_runtime.types.plan import StepPlan
from sps_runtime.types.request import GenerateRequest

logger = logging.getLogger(__name__)

TURN_MS = 250
"""A turn waits no longer than this, so that heartbeat and watchdog keep their time."""
STATE_EVERY_S = 1.0


@dataclass(frozen=True)
class Links:
    """The scheduler's ends of its links. `ranks` by global rank; `results` from this host's ranks,
    and from those of other hosts where there are any."""

    context: zmq.Context[zmq.Socket[bytes]]
    requests: Receiver[ToScheduler]
    results: Sequence[Receiver[FromRank]]
    frontend: Sender[ToFrontend]
    ranks: Sequence[Sender[ToRank]]

    def take_results(self) -> list[FromRank]:
        """What ranks have said, of each in order."""
        return [message for receiver in self.results for message in receiver.take()]

    def check(self) -> None:
        """Raise ConnectionError when a rank of another host is gone."""
        for rank in self.ranks:
            rank.check()

    def close(self) -> None:
        """Close all; what is queued may leave within half a second."""
        self.requests.close()
        for receiver in self.results:
            receiver.close()
        self.frontend.close(linger_ms=500)
        for rank in self.ranks:
            rank.close(linger_ms=500)
        self.context.term()


class Watchdog:
    """Notices when a rank has plans and does not answer, whatever the others do.

    Args:
        ranks: global ranks there are.
        timeout_s: how long a rank may take for one step.
    """

    def __init__(self, ranks: int, timeout_s: float, clock: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._owed = [0] * ranks
        self._since = [clock()] * ranks

    def sent(self, rank: int) -> None:
        """A plan left for a rank."""
        if not self._owed[rank]:
            self._since[rank] = self._clock()
        self._owed[rank] += 1

    def answered(self, rank: int) -> None:
        """A rank answered one plan."""
        self._owed[rank] -= 1
        self._since[rank] = self._clock()

    def slowest(self) -> tuple[float, int]:
        """(seconds, rank): who has let an answer wait longest; 0 seconds when nobody owes one."""
        now = self._clock()
        ages = [
            now - since if owed else 0.0
            for owed, since in zip(self._owed, self._since, strict=True)
        ]
        age = max(ages)
        return age, ages.index(age)

    def check(self) -> None:
        """Raise `EngineDead` when a rank has been silent for too long."""
        age, rank = self.slowest()
        if age > self._timeout_s:
            raise EngineDead(f"rank {rank} has not answered for {age:.1f} s")


class SchedulerLoop:
    """Runs a `Scheduler` until it is told to stop.

    Args:
        tp_size: peers that execute each plan beside every SP rank of its group.
        heartbeat: beaten every turn.
        timeline: where spans of turns go.
    """

    def __init__(
        self,
        core: Scheduler,
        links: Links,
        *,
        tp_size: int,
        watchdog: Watchdog,
        heartbeat: Heartbeat,
        timeline: Timeline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._timeline = timeline
        self._links = links
        self._tp_size = tp_size
        self._watchdog = watchdog
        self._heartbeat = heartbeat
        self._clock = clock
        self._news: list[TokensOut] = []
        self._next_state = clock()
        self._stopping = False
        self._poller = zmq.Poller()
        self._poller.register(links.requests.socket, zmq.POLLIN)
        for receiver in links.results:
            self._poller.register(receiver.socket, zmq.POLLIN)

    def run(self) -> None:
        """Turn until `StopEngine`.

        Raises:
            EngineDead: a rank failed, or does not answer.
        """
        while not self._stopping:
            self._poller.poll(TURN_MS)
            with self._timeline.span("turn", "host"):
                self.turn()

    def turn(self) -> None:
        """Take what is here, plan, send."""
        for result in self._links.take_results():
            self._take_result(result)
        for message in self._links.requests.take():
            self._take_request(message)
        for plan in self._core.next_plans():
            self._send_plan(plan)
        for rank in self._core.hurry():
            self._links.ranks[rank].send(EndBurst())
        self._send_news()
        self._heartbeat.beat()
        self._watchdog.check()
        self._links.check()
        if self._clock() >= self._next_state:
            self._send_state(call=0)

    def _take_result(self, message: FromRank) -> None:
        if isinstance(message, RankReady):
            logger.warning("rank %d says twice that it is ready", message.rank)
            return
        self._news += self._core.on_result(message)
        self._watchdog.answered(message.rank)

    def _take_request(self, message: ToScheduler) -> None:
        match message:
            case GenerateRequest():
                self._add(message)
            case Abort(rid):
                self._news += self._core.abort(rid)
            case FlushCache(call):
                flushed = self._core.flush()
                detail = "" if flushed else "requests are running or waiting"
                self._links.frontend.send(Reply(call, flushed, detail))
            case GetState(call):
                self._send_state(call)
            case Record():
                self._record(message)
            case StopEngine():
                self._stopping = True
                for rank in self._links.ranks:
                    rank.send(StopEngine())

    def _record(self, message: Record) -> None:
        self._timeline.record(message.on)
        for rank in self._links.ranks:
            rank.send(message)
        detail = "" if self._timeline.on else "this server keeps no timeline (--trace-file)"
        self._links.frontend.send(Reply(message.call, self._timeline.on, detail))

    def _add(self, request: GenerateRequest) -> None:
        try:
            self._news += self._core.add(request)
        except Exception:  # this request's trouble, nobody else's
            logger.exception("a request could not be accepted")
            reason = StopReason("abort", message="internal error", status=500)
            self._news.append(TokensOut(request.rid, finish=reason))

    def _send_plan(self, plan: StepPlan) -> None:
        frame = encode(plan)
        first_ranks = (sp_rank * self._tp_size for sp_rank in plan.group)
        ranks = [first + peer for first in first_ranks for peer in range(self._tp_size)]
        for rank in ranks:
            self._links.ranks[rank].send_encoded(frame)
            self._watchdog.sent(rank)

    def _send_news(self) -> None:
        if self._news:
            self._links.frontend.send(TokensBatch(tuple(self._news)))
            self._news.clear()
        for progress in self._core.take_progress():
            self._links.frontend.send(progress)

    def _send_state(self, call: int) -> None:
        age, _ = self._watchdog.slowest()
        state = msgspec.structs.replace(self._core.state(), call=call, step_age_s=age)
        self._links.frontend.send(state)
        self._next_state = self._clock() + STATE_EVERY_S
