"""The figures of benchmark/peers.py, computed by hand."""

from __future__ import annotations

import math

import pytest

from peers.cells import PAIRS, SHORT, Cell, Pair, Side, estimate_s
from peers.maths import (
    Floor,
    compare,
    decode_rate,
    decode_share,
    prefill_flops,
    prefill_share,
    step_bytes,
)
from peers.rounds import Store
from peers.table import figures, lines, markdown

FLOOR = Floor(gemm_flops_per_s=800e9, read_bytes_per_s=40e9)
PAIR = Pair("fake-pair", Side("fake", "fake"), Side("ours"), (Cell(1, 512), Cell(8, 512)))


def test_the_work_of_the_model() -> None:
    assert prefill_flops(1) == pytest.approx(716e6, rel=1e-3)
    assert prefill_flops(8192) - 8192 * prefill_flops(1) == pytest.approx(43008 * 8192**2, rel=1e-3)
    assert step_bytes(1, 0) == pytest.approx(773e6, rel=1e-3)
    assert step_bytes(8, 100) - step_bytes(8, 0) == 8 * 100 * 12288
    assert step_bytes(1, 0, "q4_0") == pytest.approx(step_bytes(1, 0) * 4.5 / 16)


def test_shares_of_the_floor() -> None:
    at_floor = prefill_flops(2048) / FLOOR.gemm_flops_per_s
    assert prefill_share(2048, at_floor, FLOOR) == pytest.approx(1.0)
    assert prefill_share(2048, 2 * at_floor, FLOOR) == pytest.approx(0.5)
    steps_per_s = FLOOR.read_bytes_per_s / step_bytes(8, 512)
    assert decode_share(8, 512, 8 * steps_per_s, FLOOR) == pytest.approx(1.0)
    assert FLOOR.best(Floor(1.0, 41e9)) == Floor(800e9, 41e9)


def test_decode_counts_only_while_all_streams_decode() -> None:
    assert decode_rate([[1.0, 1.5, 2.0]]) == pytest.approx(2.0)
    # The second stream starts at 2.0 and the first ends at 4.0: (3, 4) and (2.5, 3.5) are inside.
    assert decode_rate([[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.5, 4.5]]) == pytest.approx(4 / 2.0)
    assert decode_rate([[1.0, 2.0], [3.0, 4.0]]) == 0.0


def test_ratios_are_paired_and_small_gaps_are_ties() -> None:
    # The machine is twice as fast in the second repetition: pairing takes that out of the ratio.
    drifting = compare([110.0, 220.0], [100.0, 200.0])
    assert drifting.ratio == pytest.approx(1.1)
    assert drifting.spread == pytest.approx(2.0)
    assert drifting.verdict == "tie"
    assert drifting.ours == pytest.approx(math.sqrt(110 * 220))
    assert compare([120.0, 121.0], [100.0, 101.0]).verdict == "ahead"
    assert compare([100.0, 101.0], [120.0, 121.0]).verdict == "behind"
    assert compare([100.0, 103.0], [101.0, 101.0]).verdict == "tie"


@pytest.mark.parametrize(("ours", "other"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_what_does_not_pair_is_refused(ours: list[float], other: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot pair"):
        compare(ours, other)


def store_of(cell: str, ours: tuple[float, float], other: tuple[float, float]) -> Store:
    """A run in which TTFT is as given and decoding gives 100 / TTFT tokens/s."""
    store = Store(None, {})
    rows = [
        {"side": side, "repetition": i, "ttft_s": ttft, "decode_tokens_per_s": 100 / ttft}
        for side, times in (("ours", ours), ("other", other))
        for i, ttft in enumerate(times)
    ]
    for gemm, read in ((700e9, 40e9), (800e9, 30e9)):
        floor = {"gemm_flops_per_s": gemm, "read_bytes_per_s": read}
        store.add({"kind": "floor", "pair": PAIR.name, **floor})
    store.add({"kind": "cell", "pair": PAIR.name, "cell": cell, "rows": rows})
    return store


def test_a_table_says_both_sides_their_shares_and_the_ratio() -> None:
    store = store_of("b1_512", (1.0, 1.01), (2.0, 2.0))
    prefill, decode = lines([PAIR], store)
    assert prefill.comparison.ratio == pytest.approx(2.0, rel=0.01)
    assert prefill.comparison.other == pytest.approx(256.0)
    assert prefill.other_share == pytest.approx(prefill_share(512, 2.0, FLOOR))
    assert decode.our_share == pytest.approx(decode_share(1, 512 + 32.5, 99.5, FLOOR), rel=1e-3)
    assert prefill.comparison.verdict == "ahead"
    named = figures([PAIR], store)
    assert named["prefill_fake_pair_b1_512_tokens_per_s_other"] == pytest.approx(256.0)
    text = markdown([PAIR], store)
    assert "| fake-pair | b1_512 | prefill tok/s | 256 |" in text
    assert "floors 800 GFLOP/s, 40.0 GB/s" in text


def test_a_batch_has_no_prefill_line() -> None:
    (only,) = lines([PAIR], store_of("b8_512", (1.0, 1.0), (2.0, 2.0)))
    assert only.quantity == "decode tok/s"


def test_what_was_skipped_is_told() -> None:
    store = Store(None, {})
    store.add({"kind": "skipped", "pair": PAIR.name, "side": "other", "why": "not installed"})
    assert "fake-pair: other skipped: not installed" in markdown([PAIR], store)


def test_both_sides_get_the_same_tokens_and_no_side_gets_them_twice() -> None:
    cell = Cell(8, 32)
    assert cell.prompts(0) == cell.prompts(0)
    first, second = cell.prompts(0), cell.prompts(1)
    assert [len(prompt) for prompt in first] == [32] * 8
    assert not {tuple(p) for p in first} & {tuple(p) for p in second}
    assert first[0] != first[1]


def test_every_pair_has_room_for_its_cells() -> None:
    for pair in PAIRS.values():
        assert pair.context >= max(cell.batch * (cell.length + 65) for cell in pair.cells)
        assert pair.ours.threads == pair.other.threads
        assert estimate_s(pair, SHORT, FLOOR) > 0
