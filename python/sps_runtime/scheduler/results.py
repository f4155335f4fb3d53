"""From sampled tokens to what clients are told."""

from __future__ import annotations

import msgspec

from sps_runtime.scheduler.sequence import Flight, Run, Sequence
from sps_runtime.types.attention import AttentionReport, SparseCounters
from sps_runtime.types.errors import EngineDead
from sps_runtime.types.messages import StopReason, TokensOut
from sps_runtime.types.plan import SampledToken, TokenLogprobs


def collect(run: Run) -> list[TokensOut]:
    """Take the tokens of a live run's plans, in order, up to the first that is still missing.

    The last message has `finish` set when the sequence ends there; what was sampled beyond is
    surplus of the overlap and stays untaken.

    Raises:
        EngineDead: every rank answered a plan and none named its token.
    """
    news: list[TokensOut] = []
    for flight in run.flights:
        if not flight.due:
            continue
        if len(flight.tokens) < flight.samples and flight.complete:
            raise EngineDead(f"no rank sampled a token in epoch {flight.epoch}")
        if len(flight.tokens) < flight.samples or _waits_for_prompt(run, flight):
            break
        while flight.due and not (news and news[-1].finish):
            sampled = flight.tokens[flight.taken]
            if sampled.failure is not None:
                news.append(_fail(run, flight, sampled.failure))
            elif _waits_for_report(run, sampled.token):
                return news
            else:
                news.append(_take(run, flight, sampled))
        if news[-1].finish is not None:
            break
    return news


def shorten(run: Run, flight: Flight, steps: int) -> None:
    """A burst ended after `steps` steps: what its plan promised beyond them is not there."""
    surplus = flight.samples - steps
    flight.samples -= surplus
    flight.end -= surplus
    run.sent -= surplus
    run.unknown -= surplus


def joined(news: list[TokensOut]) -> list[TokensOut]:
    """News of one request's tokens in one message, where all that they have are tokens."""
    if len(news) < 2 or any(item.prompt_logprobs or item.attention for item in news):
        return news
    return [
        msgspec.structs.replace(
            news[-1],
            tokens=tuple(token for item in news for token in item.tokens),
            logprobs=tuple(entry for item in news for entry in item.logprobs),
            first=news[0].first,
        )
    ]


def final(sequence: Sequence, reason: StopReason) -> TokensOut:
    """A last message without tokens."""
    return _news(sequence, finish=reason)


def prefill_only(run: Run) -> TokensOut | None:
    """The one message of a request for no tokens, once its whole prompt is written."""
    if run.sequence.max_new or run.acked < run.target:
        return None
    if run.sequence.request.hidden_state and not run.hidden_state:
        raise EngineDead("no rank reported a hidden state")
    return _news(
        run.sequence,
        finish=StopReason("length"),
        prompt_logprobs=_prompt_logprobs(run),
        hidden_state=run.hidden_state,
    )


def _take(run: Run, flight: Flight, sampled: SampledToken) -> TokensOut:
    sequence = run.sequence
    flight.taken += 1
    run.unknown -= 1
    sequence.append(sampled.token)
    return _news(
        sequence,
        tokens=(sampled.token,),
        first=sequence.generated - 1,
        finish=_stop_reason(sequence, sampled.token),
        logprobs=(sampled.logprobs,) if sampled.logprobs is not None else (),
        prompt_logprobs=_prompt_logprobs(run),
        report=_first_report(run),
    )


def _first_report(run: Run) -> AttentionReport | None:
    """What sparse attention did, once, as soon as every rank of the prefill has answered."""
    sparsity = run.sequence.sparsity
    counted = not any(flight.sparse and not flight.complete for flight in run.flights)
    if sparsity is None or sparsity.reported or not counted:
        return None
    sparsity.reported = True
    return sparsity.report()


def _fail(run: Run, flight: Flight, why: str) -> TokensOut:
    """End a request whose grammar has no next token."""
    flight.taken += 1
    run.unknown -= 1
    return _news(run.sequence, finish=StopReason("abort", message=why, status=400))


def _stop_reason(sequence: Sequence, token: int) -> StopReason | None:
    if token in sequence.stop_ids:
        return StopReason("stop", matched=token)
    return StopReason("length") if sequence.generated >= sequence.max_new else None


def _waits_for_prompt(run: Run, flight: Flight) -> bool:
    """Prompt logprobs go with the first token, so every rank that has some must have answered."""
    due = run.sequence.prompt_logprobs_due
    return due and not (flight.complete and flight is run.flights[0])


def _waits_for_report(run: Run, token: int) -> bool:
    """The last message says what sparse attention did, so every rank of the prefill must have
    answered."""
    sequence = run.sequence
    ends = token in sequence.stop_ids or sequence.generated + 1 >= sequence.max_new
    return ends and any(flight.sparse and not flight.complete for flight in run.flights)


def take_counters(run: Run, flight: Flight, counters: SparseCounters) -> None:
    """Sum up what sparse attention did for a prompt; sparse decode is not counted."""
    if flight.sparse and run.sequence.sparsity is not None:
        run.sequence.sparsity.counters.append(counters)


def _prompt_logprobs(run: Run) -> tuple[TokenLogprobs, ...]:
    """The wanted prompt logprobs, once; position 0, which nothing precedes, has logprob None."""
    sequence, wants = run.sequence, run.sequence.request.logprobs
    if not sequence.prompt_logprobs_due or wants is None:
        return ()
    sequence.prompt_logprobs_due = False
    values: list[TokenLogprobs] = []
    if wants.prompt_start == 0:
        values.append(TokenLogprobs(token=sequence.tokens[0], logprob=None))
    for piece in sorted(run.prompt_pieces, key=lambda piece: piece.start):
        values.extend(piece.values)
    run.prompt_pieces.clear()
    if len(values) != max(0, sequence.prompt_len - wants.prompt_start):
        raise EngineDead("ranks reported too few prompt logprobs")
    return tuple(values)


def _news(
    sequence: Sequence,
    *,
    tokens: tuple[int, ...] = (),
    first: int = -1,
    finish: StopReason | None = None,
    logprobs: tuple[TokenLogprobs, ...] = (),
    prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    report: AttentionReport | None = None,
    hidden_state: bytes = b"",
) -> TokensOut:
    if finish is not None and sequence.sparsity is not None:
        report = sequence.sparsity.report()
    return TokensOut(
        rid=sequence.rid,
        tokens=tokens,
        finish=finish,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        prompt_tokens=sequence.prompt_len,
        cached_tokens=sequence.cached,
        retractions=sequence.retractions,
        attention=report,
        hidden_state=hidden_state,
        first=first,
    )
