"""The token board of a rank on a device: sampled ids stay there, and the next step takes its own.

Through the host's board a decode step waits for the one before: ids are read back, told, looked up
and uploaded while the device does nothing. Here the rank that samples also writes its ids to a
tensor on its device, one element per board slot; a later step of the same rank gathers its input
ids from it, in the order of the stream. A copy in pinned memory follows behind an event, and
becomes a `StepResult` and words of the host's board when somebody asks for it.

The contract is the host board's (`runner.token_board`): a plan names (slot, epoch). Which epoch a
slot's element is of is known on the host, because steps are launched in the order in which they
run; a plan that names any other epoch goes to the host's board, as plans of several ranks do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sps_runtime.ops.devices import Fence, empty_pinned, upload
from sps_runtime.runner.logit_edits import has_edits
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.types.plan import SampledToken, StepPlan

Ints = npt.NDArray[np.int64]

NEVER = -1


class LateTokens:
    """The tokens of one step, on their way to the host.

    Args:
        plan: all of its sequences were sampled.
        tokens_R: their ids on the device; may be written again by what is launched next.
        board: the host's, written when they have come.
    """

    def __init__(self, plan: StepPlan, tokens_R: Tensor, board: TokenBoard) -> None:
        self._plan, self._board = plan, board
        self._host = empty_pinned(tuple(tokens_R.shape), tokens_R.dtype, tokens_R.device)
        self._host.copy_(tokens_R, non_blocking=True)
        self._fence = Fence(tokens_R.device)
        self._fence.record()

    def settle(self) -> tuple[SampledToken, ...]:
        """Wait for them, and put them on the host's board."""
        self._fence.wait()
        tokens: list[int] = self._host.tolist()
        slots = [sequence.slot for sequence in self._plan.sequences]
        self._board.write(self._plan.epoch, slots, tokens)
        return tuple(SampledToken(*pair) for pair in zip(slots, tokens, strict=True))


class DeviceBoard:
    """One rank's.

    Args:
        slots: as the host's board has.

    Attributes:
        tokens: int64 ``[slots]`` on the device.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._epochs = np.full(slots, NEVER, dtype=np.int64)

    def takes(self, plan: StepPlan) -> bool:
        """Whether a decode step of one rank can run without the host knowing a token: all that it
        does not know lies here, and what it samples depends on nothing but logits, seeds and
        positions, and is told as ids alone."""
        return all(
            sequence.sample is not None
            and sequence.sample.logprobs is None
            and not has_edits(sequence.sample)
            and (sequence.board_epoch < 0 or self._holds(sequence.slot, sequence.board_epoch))
            for sequence in plan.sequences
        )

    def write(self, epoch: int, slots: Sequence[int], tokens_R: Tensor) -> None:
        """Take the tokens that the step `epoch` sampled, in the order of the stream."""
        where = np.array(slots, dtype=np.int64)
        self._epochs[where] = epoch
        self.tokens.index_copy_(0, upload(where, self.tokens.device), tokens_R)

    def _holds(self, slot: int, epoch: int) -> bool:
        return bool(self._epochs[slot] == epoch)


def board_sources(plan: StepPlan) -> Ints:
    """For each sequence of a decode step the board slot that its token is taken from, -1 where the
    plan has it."""
    return np.array([s.slot if s.board_epoch >= 0 else -1 for s in plan.sequences], dtype=np.int64)


def known_tokens(plan: StepPlan) -> list[int]:
    """The ids of a decode step, 0 for those on the board."""
    return [int.from_bytes(sequence.tokens[:4], "little") for sequence in plan.sequences]
