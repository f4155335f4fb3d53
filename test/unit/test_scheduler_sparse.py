"""What the scheduler promises to sequences under csa, one promise a test, then at random."""

from __future__ import annotations

import random

import msgspec
import pytest
from test.kit.echo_server import AnyDegree, EchoServer

from sps_runtime.kvcache.placement import divide
from sps_runtime.kvcache.prefix_cache import PrefixCache
from sps_runtime.scheduler.planner import Planner
from sps_runtime.scheduler.sequence import Run, Sequence
from sps_runtime.scheduler.sparsity import SparseRules
from sps_runtime.types.attention import AttentionSpec, SparseSettings
from sps_runtime.types.sampling import LogprobParams

SETTINGS = SparseSettings(block=4, superblock=8, wide_from=32)
CSA = AttentionSpec("csa", SETTINGS)
DECODING = AttentionSpec("csa", msgspec.structs.replace(SETTINGS, decode="sparse"))


def sparse_server(**settings: object) -> EchoServer:
    return EchoServer(**{"csa_min_tokens": 0, "pages": 64, "chunked_prefill_size": 8, **settings})


def idle(server: EchoServer) -> None:
    while not server.scheduler.idle:
        server.turn()
        server.scheduler.check()


@pytest.mark.parametrize("chunk", [2, 8, 20, -1])
@pytest.mark.parametrize("sp", [1, 2, 3])
def test_steps_and_pages_keep_to_superblocks(sp: int, chunk: int) -> None:
    server = sparse_server(sp=sp, chunked_prefill_size=chunk)
    rids = [server.add(range(4, 4 + n % 40), 3, attention=CSA) for n in (5, 8, 31, 39)]
    long = [(7 * n) % 50 for n in range(90)]
    rids.append(server.add(long, 3, attention=CSA))
    server.run()
    assert server.sparse_referee.prefills >= len(rids)
    assert all(server.finals[rid].attention.mode == "csa" for rid in rids)


def test_a_lone_prompt_is_spread_in_superblocks() -> None:
    server = sparse_server(sp=3)
    server.scheduler._policy = AnyDegree(random.Random(0))
    server.scheduler._policy._degree = lambda view, run: 3  # type: ignore[method-assign]
    server.add([(7 * n) % 50 for n in range(30)], 1, attention=CSA)
    server.run()
    step = server.plans[0].sequences[0]
    assert server.plans[0].group == (0, 1, 2) and (step.start, step.count) == (0, 24)


def test_only_whole_superblocks_of_the_prompt_serve_the_next() -> None:
    server = sparse_server()
    prompt = [(7 * n) % 50 for n in range(30)]
    first = server.add(prompt, 20, ignore_eos=True, attention=CSA)
    idle(server)
    following = [*prompt, *server.tokens[first]]
    hits = [(prompt, CSA), (following, CSA), (prompt[:24], CSA), (prompt[:20], CSA)]
    rids = []
    for tokens, attention in hits:
        rids.append(server.add(tokens, 1, attention=attention))
        idle(server)
    assert [server.finals[rid].cached_tokens for rid in rids] == [24, 24, 16, 16]
    server.run()


def test_a_prompts_end_is_scored_by_many_rows_wherever_it_lies() -> None:
    settings = SparseSettings(rows=6, end_rows=32, end=128, superblock=1024, wide_from=2048)
    whole = [settings.scored_rows(at, 1024) for at in range(0, 1024, 64)]
    assert whole == [6] * 14 + [32] * 2
    wide = [settings.scored_rows(2048 + at, 2048) for at in range(0, 2048, 64)]
    assert wide == [6] * 30 + [32] * 2
    assert {settings.scored_rows(1024 + at, 1000) for at in range(0, 1000, 64)} == {32}
    short = settings.for_prompt(4096)
    assert {short.scored_rows(at, 64) for at in range(0, 4096, 64)} == {32}
    every = msgspec.structs.replace(settings, rows=0)
    assert every.scored_rows(0, 1024) == every.scored_rows(960, 1024) == 0


def test_short_prompts_read_more_and_share_no_page_with_long_ones() -> None:
    settings = msgspec.structs.replace(
        SETTINGS, minimum=2, short_to=32, short_minimum=5, short_superblock=4
    )
    server, prompt = sparse_server(), [(7 * n) % 50 for n in range(60)]
    rids = []
    for tokens in (prompt[:31], prompt[:32], prompt[:28], prompt):
        rids.append(server.add(tokens, 1, attention=AttentionSpec("csa", settings)))
        idle(server)
    settled = [plan.sequences[0].attention.sparse for plan in server.plans]
    assert {(s.minimum, s.superblock) for s in settled if s} == {(5, 4), (2, 8)}
    assert [server.finals[rid].cached_tokens for rid in rids] == [0, 0, 24, 32]
    server.run()


def test_csa_and_exact_and_other_settings_share_no_page() -> None:
    server = sparse_server()
    prompt = [(7 * n) % 50 for n in range(30)]
    other = AttentionSpec("csa", msgspec.structs.replace(SETTINGS, budget=0.2))
    rids = []
    for attention in (CSA, AttentionSpec(), other, CSA, AttentionSpec()):
        rids.append(server.add(prompt, 1, attention=attention))
        idle(server)
    assert [server.finals[rid].cached_tokens for rid in rids] == [0, 0, 0, 24, 28]
    server.run()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parallel": {"arch": "tp"}}, "heads"),
        ({"policy": "sarathi"}, "sarathi"),
        ({"csa_min_tokens": 31}, "shorter"),
        ({"no_sparse": "no summaries"}, "summaries"),
        ({"page_size": 16}, "multiple"),
        ({"page_size": 3}, "multiple"),
        ({"pages": 1, "page_size": 4, "sp": 40}, "small"),
    ],
)
def test_where_csa_cannot_be_or_pay_exact_runs_and_says_so(settings, says) -> None:
    server = sparse_server(**settings)
    prompt = [(7 * n) % 50 for n in range(30)]
    rids = []
    for attention in (CSA, AttentionSpec()):
        rids.append(server.add(prompt, 1, attention=attention))
        idle(server)
    report = server.finals[rids[0]].attention
    assert report is not None and report.mode == "exact" and says in report.reason
    assert server.finals[rids[1]].cached_tokens > 0, "exact pages serve exact requests"
    assert server.finals[rids[1]].attention is None
    server.run()


def test_the_cost_model_says_how_long_a_prompt_must_be() -> None:
    server = sparse_server(csa_min_tokens=None)
    rids = [server.add([(7 * n) % 50 for n in range(n)], 1, attention=CSA) for n in (40, 250)]
    server.run()
    reports = [server.finals[rid].attention for rid in rids]
    assert reports[0].mode == "exact" and "sooner" in reports[0].reason


def test_a_superblock_waits_for_room_on_one_rank_and_is_not_overtaken_for_ever() -> None:
    """Small requests keep every rank's room below a superblock; they may not go on doing so."""
    server = sparse_server(sp=2, pages=4, page_size=4, max_running_requests=8)
    chance = random.Random(1)
    small = [server.add([chance.randrange(4, 50)] * 5, 4, ignore_eos=True) for _ in range(3)]
    for _ in range(4):
        server.turn()
    rid = server.add([(7 * n) % 50 for n in range(12)], 1, attention=CSA)
    for _ in range(200):
        if rid in server.finals:
            break
        small.append(server.add([chance.randrange(4, 50)] * 5, 4, ignore_eos=True))
        for _ in range(6):
            server.turn()
    assert rid in server.finals
    server.run()


def test_a_lone_prompt_whose_prefix_lies_in_the_way_runs_exact() -> None:
    """The run's own pages leave every rank less than a superblock: nobody else will go."""
    server = sparse_server(sp=2, pages=4, page_size=4)
    rid = server.add([(7 * n) % 50 for n in range(30)], 1, attention=CSA)
    pages = server.scheduler._cache
    assert pages.allocator.total == 8
    right = pages.available
    pages.available = lambda rank: min(1, right(rank))  # type: ignore[method-assign]
    for _ in range(20):
        server.turn()
        if server.scheduler._sequences[rid].sparse is None:
            break
    pages.available = right  # type: ignore[method-assign]
    server.run()
    report = server.finals[rid].attention
    assert report is not None and report.mode == "exact" and "room" in report.reason


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_report_sums_what_every_rank_counted(n: int) -> None:
    remote = set()
    for seed in range(8):
        server = sparse_server(sp=2, seed=seed, chunked_prefill_size=-1)
        server.scheduler._policy._degree = lambda view, run: 2  # type: ignore[method-assign]
        rid = server.add([(7 * k) % 50 for k in range(30)], n, ignore_eos=True, attention=CSA)
        server.run()
        report = server.finals[rid].attention
        assert report is not None and (report.mode, report.density) == ("csa", 0.25)
        assert report.union_share == 0.25
        remote.add(report.remote_bytes)
    assert remote == {8 * 4}, "8 pages of 4 tokens, each remote to one of two ranks"


def test_retracted_csa_requests_answer_as_ever() -> None:
    retractions = 0
    for seed in range(10):
        server = sparse_server(sp=2, pages=8, seed=seed, conservativeness=0.0)
        attention = DECODING if seed % 2 else CSA
        for begin in range(4, 9):
            server.add(
                [(begin * n) % 50 for n in range(12)], 14, ignore_eos=True, attention=attention
            )
        server.run()
        retractions += server.scheduler.state().retractions_total
    assert retractions > 5


def test_a_prefix_under_way_is_waited_for_only_as_far_as_it_will_be_cached() -> None:
    server = sparse_server(sp=2)
    prompt = [(7 * n) % 50 for n in range(45)]
    rids = [server.add([*prompt, end], 2, attention=CSA) for end in (1, 2)]
    server.run()
    assert [server.finals[rid].cached_tokens for rid in rids] == [0, 32]


def test_summaries_are_sent_once_a_rank_and_run() -> None:
    server = sparse_server(sp=2, csa_min_tokens=0)
    server.add([(7 * n) % 50 for n in range(90)], 1, attention=CSA)
    server.run()
    starts = [s.summaries_from for p in server.plans for s in p.sequences if s.attention.sparse]
    assert starts[0] == 0 and server.sparse_referee.repeated > 0


def random_sparse_server(seed: int) -> tuple[EchoServer, AttentionSpec]:
    chance = random.Random(seed)
    sp = chance.choice([1, 2, 2, 3, 4])
    hosts = {"nnodes": 2, "dist_init_addr": "host:1"} if sp % 2 == 0 and seed % 3 == 0 else {}
    strategy = chance.choice(["auto", "auto", "pass_q", "ulysses", "pass_kv"])
    server = EchoServer(
        seed=seed,
        sp=sp,
        tp=chance.choice([1, 1, 2]),
        pages=chance.choice([6, 8, 16, 40]),
        page_size=chance.choice([1, 2, 4]),
        zero_copy=chance.random() < 0.5,
        chunked_prefill_size=chance.choice([2, 8, 16, -1]),
        max_prefill_tokens=chance.choice([8, 64]),
        conservativeness=chance.choice([0, 0.3, 1]),
        overlap=chance.random() < 0.7,
        schedule_policy=chance.choice(["fcfs", "lpm"]),
        max_steps_in_flight=chance.choice([1, 2, 3]),
        csa_min_tokens=chance.choice([0, 0, 10]),
        cache={"enable_prefix_cache": chance.random() < 0.85},
        parallel={**hosts, "strategy": strategy},
    )
    if chance.random() < 0.7:
        server.scheduler._policy = AnyDegree(chance)
    settings = SparseSettings(
        block=4,
        superblock=chance.choice([4, 8]),
        wide_from=16,
        decode=chance.choice(["exact", "exact", "sparse"]),
    )
    return server, AttentionSpec("csa", settings)


def random_traffic(server: EchoServer, spec: AttentionSpec, chance: random.Random) -> None:
    capacity = server.pages * server.page_size * server.parallel.sp_size
    base = [chance.randrange(server.vocab) for _ in range(80)]
    for _ in range(16):
        shared = base[: chance.randrange(min(70, capacity) * 2 // 3 + 1)]
        own = [chance.randrange(server.vocab) for _ in range(chance.randrange(1, 5))]
        n = chance.randrange(10)
        prompt = (shared + own)[: capacity - n] or [1]
        judged = chance.choice([None, None, None, LogprobParams(top=1, prompt_start=0)])
        server.add(
            prompt,
            n,
            ignore_eos=chance.random() < 0.5,
            presence_penalty=chance.choice([0.0, 0.0, 1.0]),
            logprobs=judged,
            attention=spec if chance.random() < 0.7 else AttentionSpec(),
        )
        for _ in range(chance.randrange(6)):
            server.turn()
        if chance.random() < 0.15:
            server.abort(chance.choice(list(server.requests)))


@pytest.mark.parametrize("part", range(4))
def test_every_csa_answer_is_what_echo_says(part: int) -> None:
    prefills = repeated = retractions = exact = 0
    for seed in range(part, 100, 4):
        server, spec = random_sparse_server(seed)
        try:
            random_traffic(server, spec, random.Random(seed))
            server.run(check=seed % 5 == 0)
        except BaseException:
            print(f"seed {seed}")
            raise
        prefills += server.sparse_referee.prefills
        repeated += server.sparse_referee.repeated
        retractions += server.scheduler.state().retractions_total
        reports = [final.attention for final in server.finals.values()]
        exact += sum(report is not None and report.mode == "exact" for report in reports)
    assert prefills > 100 and repeated > 10 and retractions > 1 and exact > 3


def exact_in_a_csa_namespace(monkeypatch):
    monkeypatch.setattr(Run, "sparse_now", property(lambda self: None))


def placed_by_page(monkeypatch):
    def pages(sizes, room, place):
        return place(divide(min(sum(sizes), sum(room.values())), room))

    monkeypatch.setattr("sps_runtime.scheduler.planner.divide_units", pages)


def matched_by_page(monkeypatch):
    monkeypatch.setattr(Sequence, "aligned", lambda self, position: position)


def chunked_by_page(monkeypatch):
    def chunk_end(settings, start, target, limit):
        return min(target, start + (limit or 99))

    monkeypatch.setattr("sps_runtime.scheduler.sequence.sparse_chunk_end", chunk_end)


def summaries_for_the_last_group(monkeypatch):
    def summaries_from(run, mask):
        return max(run.summarised.values(), default=0)

    monkeypatch.setattr(Planner, "_summaries_from", staticmethod(summaries_from))


def summaries_of_replaced_pages(monkeypatch):
    right = PrefixCache.commit

    def commit(self, handle, tokens, written):
        right(self, handle, tokens, written)

    monkeypatch.setattr(PrefixCache, "commit", commit)


def waits_for_ever(monkeypatch):
    right = Planner._reserve_superblocks

    def reserve(self, run, settings, end, room):
        end = right(self, run, settings, end, room)
        run.short = False
        return end

    monkeypatch.setattr(SparseRules, "_fits", lambda self, settings, prompt_len: True)
    monkeypatch.setattr(Planner, "_reserve_superblocks", reserve)


@pytest.mark.parametrize(
    "mutant",
    [
        exact_in_a_csa_namespace,
        placed_by_page,
        matched_by_page,
        chunked_by_page,
        summaries_for_the_last_group,
        summaries_of_replaced_pages,
        waits_for_ever,
    ],
)
def test_a_mutant_is_caught(mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    for seed in range(120):
        server, spec = random_sparse_server(seed)
        try:
            random_traffic(server, spec, random.Random(seed))
            server.run(check=False, limit=3_000)
        except Exception:
            return
    pytest.fail("the mutant went unseen")
