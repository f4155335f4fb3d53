"""``attention``: how a client wants its prompt computed, over the server's defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import msgspec

from sps_runtime.config.attention import (
    RANGES,
    AttentionConfig,
    estimator_name,
    interval,
    known_estimators,
)
from sps_runtime.types.attention import AttentionReport, AttentionSpec
from sps_runtime.types.errors import ConfigError, InvalidRequest

FIELD = "attention"


class AttentionOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request's ``attention``: None is "not told"; the names are those of `AttentionConfig`."""

    mode: Literal["exact", "csa"] | None = None
    tau: float | None = None
    max_tau: float | None = None
    estimator: str | None = None
    budget: float | None = None
    decode: Literal["exact", "sparse"] | None = None
    stride: int | None = None


def attention_spec(
    options: AttentionOptions | None, defaults: AttentionConfig, field: str = FIELD
) -> AttentionSpec:
    """What a request's attention is: its own settings, the server's where it does not tell.

    A `tau` of 0 and no budget drops nothing.

    Args:
        field: how the client calls the options.

    Raises:
        InvalidRequest: naming what cannot be, or what would have no effect.
    """
    if options is None:
        return defaults.spec()
    fields = msgspec.structs.asdict(options)
    told = {name: value for name, value in fields.items() if value is not None}
    for name, value in told.items():
        _check(f"{field}.{name}", name, value)
    if options.mode is None and told and defaults.mode == "exact":
        raise _invalid(f"{field}.mode", "must be csa for the other settings to have an effect")
    if options.tau == 0 and options.budget is None:
        told["budget"] = 1.0
    try:
        return replace(defaults, **told).spec()
    except ConfigError as error:  # settings that exclude one another
        raise _invalid(field, f"cannot be: {error}") from None


def report_fields(report: AttentionReport) -> dict[str, Any]:
    """A report as answers show it."""
    return msgspec.structs.asdict(report)


def _check(path: str, name: str, value: Any) -> None:
    if name in RANGES:
        low, high = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _invalid(path, "must be a number")
        if not low <= value <= high or (name == "budget" and value == 0):
            raise _invalid(path, f"must lie in {interval(name)}")
    elif name == "estimator" and estimator_name(value) is None:
        raise _invalid(path, f"is not known here; known are {known_estimators()}")
    elif name == "stride" and value < 1:
        raise _invalid(path, "must be at least 1")


def _invalid(path: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{path} {why}", field=path)
