"""Thousands of random requests through the scheduler and echo ranks come out unchanged."""

from __future__ import annotations

import random

import pytest
from test.kit.echo_server import EchoServer

SEEDS = range(120)
REQUESTS = 20


def random_server(seed: int) -> EchoServer:
    """A server of random degree, policy, page and chunk size; its pool is small on purpose."""
    chance = random.Random(seed)
    sp = chance.choice([1, 2, 3, 4])
    hosts = {"nnodes": 2, "dist_init_addr": "host:1"} if sp % 2 == 0 and seed % 3 == 0 else {}
    return EchoServer(
        seed=seed,
        sp=sp,
        tp=chance.choice([1, 1, 2]),
        pages=chance.choice([8, 16, 40]),
        page_size=chance.choice([1, 2, 4]),
        zero_copy=chance.random() < 0.5,
        slices=chance.random() < 0.5,
        chunked_prefill_size=chance.choice([4, 8, -1]),
        max_prefill_tokens=chance.choice([8, 64]),
        conservativeness=chance.choice([0, 0.3, 1]),
        policy=chance.choice(["sps", "sps", "sarathi"]),
        overlap=chance.random() < 0.7,
        schedule_policy=chance.choice(["fcfs", "lpm"]),
        max_steps_in_flight=chance.choice([1, 2, 3]),
        cache={"enable_prefix_cache": chance.random() < 0.85},
        parallel={
            **hosts,
            "arch": chance.choice(["ntp", "ntp", "tp"]),
            "strategy": chance.choice(["auto", "auto", "pass_q", "ulysses", "pass_kv"]),
        },
    )


def random_traffic(server: EchoServer, chance: random.Random) -> None:
    """Requests with shared prefixes, aborted anywhere, between turns of the server."""
    capacity = server.pages * server.page_size * server.parallel.sp_size
    base = [chance.randrange(server.vocab) for _ in range(60)]
    for _ in range(REQUESTS):
        shared = base[: chance.randrange(min(40, capacity) // 2 + 1)]
        own = [chance.randrange(server.vocab) for _ in range(chance.randrange(1, 5))]
        n = chance.randrange(12)
        hidden_state = chance.random() < 0.15
        n = 0 if hidden_state else n
        server.add(
            (shared + own)[: capacity - n] or [1],
            n,
            ignore_eos=chance.random() < 0.5,
            min_new_tokens=chance.choice([0, 0, 2]) if n > 2 else 0,
            presence_penalty=chance.choice([0.0, 0.0, 1.0]),
            grammar=chance.choice(["", "", "2", "7"]),
            hidden_state=hidden_state,
        )
        for _ in range(chance.randrange(6)):
            server.turn()
        if chance.random() < 0.2:
            server.abort(chance.choice(list(server.requests)))


@pytest.mark.parametrize("part", range(4))
def test_every_answer_is_what_echo_says(part: int) -> None:
    retractions = cached = 0
    for seed in SEEDS[part::4]:
        server = random_server(seed)
        try:
            random_traffic(server, random.Random(seed))
            server.run(check=seed % 5 == 0)
        except BaseException:
            print(f"seed {seed}")
            raise
        state = server.scheduler.state()
        retractions += state.retractions_total
        cached += state.cached_tokens_total
    assert retractions > 10 and cached > 1000, "the traffic is too tame to prove anything"
