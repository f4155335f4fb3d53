"""Hidden states as answers: what embeddings are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps_runtime.runner.input_batch import RowSet
from sps_runtime.types.plan import HiddenState, SequencePlan


def report_hidden(
    rows: RowSet, sequences: Sequence[SequencePlan], hidden_RD: Tensor
) -> tuple[HiddenState, ...]:
    """What this rank reports.

    Args:
        rows: this rank's, one for each sequence that ends here.
        sequences: of the plan.
        hidden_RD: ``[rows, hidden]`` after the last norm, in any floating dtype.
    """
    values_RD = hidden_RD.to("cpu", torch.float32).contiguous().numpy()
    return tuple(
        HiddenState(sequences[index].slot, value_D.tobytes())
        for index, value_D in zip(rows.sequences.tolist(), values_RD, strict=True)
    )
