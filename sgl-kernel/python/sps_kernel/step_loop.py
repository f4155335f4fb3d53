"""A recorded step run again and again, each from the tokens of the one before."""

from __future__ import annotations

from collections.abc import Sequence

from sps_kernel import _core
from sps_kernel.arrays import Array
from sps_kernel.program import Program


class StepLoop:
    """Steps of a batch that does not change, without the interpreter between two of them.

    The program computes logits from token ids and other arrays. Step *i* of the loop finds in
    ``tokens`` what step *i - 1* sampled, and in every array of ``feeds`` the values that are its
    own. Steps are counted from 0; whoever makes a loop has run step 0 by other means.

    Tokens lie on a board, memory that all ranks of a host map: a line of 64 bytes that begins with
    a word to sleep on, then 64-bit words ``epoch << 32 | token``, one a slot. Step *i* has the
    epoch ``epoch + i``. One rank leads: it samples, and before each step writes 1, "go on", to the
    slot of verdicts under the epoch of the step before. The others follow: they take verdicts and
    tokens from the board.

    Parameters
    ----------
    program : Program
        Recorded; not run by others meanwhile.
    logits : [R, V], float32, contiguous
        What the program computes.
    tokens : [R], int64
        What it reads.
    feeds : pairs (array, values)
        ``values`` has the array's shape and dtype behind a dim of steps; both are contiguous.
    board : [n], uint8
    slots : [R], int64
        Each row's; copied.
    epoch : int
        Of step 0.
    verdict : int
        The slot of verdicts; -1 where nobody follows.
    spin_us : float
        How long a wait looks before it sleeps; 0 where ranks outnumber cores.

    Raises
    ------
    ValueError
        Arrays do not fit one another.
    """

    def __init__(
        self,
        program: Program,
        logits: Array,
        tokens: Array,
        feeds: Sequence[tuple[Array, Array]],
        *,
        board: Array,
        slots: Array,
        epoch: int,
        verdict: int = -1,
        spin_us: float = 0.0,
    ) -> None:
        self._loop = _core.StepLoop(
            program.native, logits, tokens, feeds, board, slots, epoch, verdict, spin_us
        )

    def lead(
        self,
        first: int,
        last: int,
        *,
        each: bool = False,
        sampled: Array | None = None,
        stops: Array | None = None,
        seconds: float = 0.0,
        descriptor: int = -1,
    ) -> int:
        """Run steps from ``first`` on, each sampled by its rows' largest logits; how many were run.

        The verdict "go on" on the step before ``first`` is written, unless it was; that on the last
        one which was run has been written where :attr:`goes_on` says so, and else is the
        caller's: "end", or another call.

        Parameters
        ----------
        first, last : int
            1 <= first <= last; step ``first - 1`` has been sampled. At least one is run; no other
            one after a row sampled what ends it, or after ``last``.
        each : bool
            Return after one step, which others go on from meanwhile if nothing ends it.
        sampled : [steps, R], int64
            Where the steps' tokens go, beside the board. None: one step is run, and the caller
            samples it.
        stops : [n, 2], int64
            Pairs of a row and an id that ends it.
        seconds : float
            No other step begins when so many have gone by.
        descriptor : int
            No other step begins when this file descriptor is readable; -1 for none.

        Raises
        ------
        RuntimeError
            A token of the step before is not on the board.
        ConnectionError, ValueError
            As :meth:`Program.run` does.
        """
        return self._loop.lead(first, last, each, sampled, stops, seconds, descriptor)

    @property
    def goes_on(self) -> bool:
        """Whether others were told to go on from the newest step that was led."""
        return self._loop.goes_on

    def follow(self, first: int, last: int, timeout_s: float) -> int:
        """Run steps from ``first`` on as the leading rank says, up to ``last``; how many were run.

        Raises
        ------
        TimeoutError
            No verdict came for so long.
        RuntimeError, ConnectionError, ValueError
            As :meth:`lead` does.
        """
        return self._loop.follow(first, last, timeout_s)

    @property
    def waited_s(self) -> float:
        """Seconds that were spent waiting for verdicts."""
        return self._loop.waited_s
