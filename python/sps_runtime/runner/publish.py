"""Where a sampled token goes beside its `StepResult`: onto the token board of every host that may
need it next.

On one host the rank that sampled stores its tokens. Where a group spans hosts, its ranks first tell
one another what they sampled (8 bytes a token), and on each host the group's first rank there
stores them all. A later plan may therefore name a board slot only if every host of its group was in
the group that sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sps_runtime.distributed.communicator import Communicator
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.types.plan import StepPlan


@dataclass(frozen=True)
class SampledHere:
    """What one rank sampled in a step.

    Attributes:
        sequences: indices in the plan, ascending.
        tokens: one each.
    """

    sequences: Sequence[int]
    tokens: Sequence[int]


def publish(
    plan: StepPlan,
    sampled: SampledHere,
    samplers: Sequence[Sequence[int]],
    hosts: Sequence[int],
    sp: Communicator,
    board: TokenBoard,
) -> None:
    """Bring a step's tokens onto the boards; every SP rank of the group with TP rank 0 calls it.

    Args:
        samplers: for each member of the group, the sequences that it samples.
        hosts: the host of each member.
        sp: the group's SP peers.
    """
    if len(set(hosts)) == 1:
        board.write(plan.epoch, _slots(plan, sampled.sequences), sampled.tokens)
        return
    mine = torch.tensor(sampled.tokens, dtype=torch.int64)
    everyone = [torch.empty(len(sequences), dtype=torch.int64) for sequences in samplers]
    sp.exchange([mine] * sp.size, everyone, "control")
    if list(hosts).index(hosts[sp.rank]) == sp.rank:
        for sequences, tokens in zip(samplers, everyone, strict=True):
            board.write(plan.epoch, _slots(plan, sequences), tokens.tolist())


def _slots(plan: StepPlan, sequences: Sequence[int]) -> list[int]:
    return [plan.sequences[index].slot for index in sequences]
