"""Names of ways to compute attention: ``estimator`` or ``estimator:field=value,field=value``.

Fields are those of `SparseSettings` and of `Setup`. What is not named is the default of ``block``,
save for published methods (`PUBLISHED`): each block of 64 chooses for itself, by all of its rows,
with no tail, as their authors have it. ``as=block`` gives them what ``block`` has, which is how the
engine runs them: common sets of superblocks, as many rows, the tail.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec

from accuracy_choose import ESTIMATORS, PAGE, Setup
from sps_runtime.types.attention import SparseSettings

PUBLISHED = ("stride", "null", "mean", "quest", "vertical_slash", "xattention")
AS_PUBLISHED = {"superblock": PAGE, "rows": 0, "tail": "none", "tau": 0.0}
_OF_SETUP = {field.name for field in fields(Setup)} - {"estimator", "settings"}


def setup(name: str) -> Setup:
    """The setup of a name.

    Raises:
        ValueError: for an estimator or a field that there is not.
    """
    estimator, _, rest = name.partition(":")
    if estimator not in (*ESTIMATORS, "dense", "stride"):
        raise ValueError(f"no estimator is called {estimator!r}")
    given = dict(part.split("=") for part in rest.split(",") if part)
    values: dict[str, Any] = dict(AS_PUBLISHED) if estimator in PUBLISHED else {}
    if given.pop("as", "") == "block":
        values = {"tau": 0.0}
    outer: dict[str, Any] = {}
    for key, text in given.items():
        (outer if key in _OF_SETUP else values)[key] = _value(text)
    settings = msgspec.convert(values, SparseSettings)
    return Setup(estimator, settings, **outer)


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
