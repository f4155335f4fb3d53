"""Drawing a token from a row of logits."""

from __future__ import annotations

from sps_kernel import _core
from sps_kernel.arrays import Array


def sample(
    logits: Array,
    uniform: float,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Draw one token; the same arguments always give the same token.

    Tokens are ordered by logit, ties by index. ``top_k`` keeps the first k; ``top_p`` the shortest
    front of what is left that holds that share of its probability; ``min_p`` drops what is less
    likely than min_p times the most likely. The token drawn is the one at which the probabilities
    of the kept ones, summed in order of index, pass ``uniform``. No sort: the fronts are found by
    a radix descent.

    Parameters
    ----------
    logits : [V], float32 or bfloat16, contiguous
        -inf forbids a token; NaN counts as -inf.
    uniform : float in [0, 1)
        The caller's random number, such as one keyed by (seed, position).
    temperature : float >= 0
        0 is greedy: the first largest logit.
    top_k : int
        0, or anything below, for all.
    top_p : float in (0, 1]
    min_p : float in [0, 1]

    Raises
    ------
    ValueError
        A value out of its range, or no logit above -inf.
    """
    return _core.sample(logits, uniform, temperature, top_k, top_p, min_p)


def largest(logits: Array, out: Array) -> Array:
    """Each row's largest logit: greedy sampling, as ``numpy.argmax`` has it.

    Parameters
    ----------
    logits : [R, V], float32, contiguous
    out : [R], int64
        The first of a row's largest; where it has a NaN, the first of those.

    Raises
    ------
    ValueError
        Rows are empty.
    """
    _core.largest(logits, out)
    return out
