"""What clients call their requests. A label is never an identity: the engine's ids are its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from sps_runtime.types.errors import InvalidRequest


class LabelTable:
    """Running sequences by owner and by the owner's label; matching is exact."""

    def __init__(self) -> None:
        self._rids: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._label_of: dict[str, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._label_of)

    def refuse_duplicates(self, labels: Iterable[tuple[str, str]]) -> None:
        """Raise `InvalidRequest` when a nonempty label is given twice or is running."""
        named = [label for label in labels if label[1]]
        if len(set(named)) < len(named) or any(label in self._rids for label in named):
            raise InvalidRequest(
                "rid names a request that is running", field="rid", code="duplicate_rid"
            )

    def add(self, rid: str, owner: str, label: str) -> None:
        self._rids[owner, label].add(rid)
        self._label_of[rid] = (owner, label)

    def remove(self, rid: str) -> None:
        label = self._label_of.pop(rid, None)
        if label is not None:
            self._rids[label].discard(rid)
            if not self._rids[label]:
                del self._rids[label]

    def rids(self, owner: str, label: str) -> list[str]:
        """Return the sequences that `owner` calls `label`."""
        return sorted(self._rids.get((owner, label), ()))

    def owned(self, rid: str, owner: str | None) -> bool:
        """Whether a sequence runs and is the owner's (None: anyone's)."""
        label = self._label_of.get(rid)
        return label is not None and owner in (None, label[0])

    def of_owner(self, owner: str) -> list[str]:
        """Return all sequences of an owner."""
        return [rid for rid, label in self._label_of.items() if label[0] == owner]
