"""What attention a request gets that does not say: the server's defaults, and their bounds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Any, Literal

from sps_runtime.types.attention import AttentionSpec, SparseSettings
from sps_runtime.types.errors import ConfigError

Mode = Literal["exact", "csa"]
DecodeAttention = Literal["exact", "sparse"]

ESTIMATORS = {
    "block": "block",
    "mean": "mean",
    "quest": "quest",
    "xattention": "xattention",
    "vertical_slash": "vertical_slash",
    "null": "null",
    "oracle": "oracle",
    "stride": "stride",
    "random": "random",
}
"""What clients may name, and what `SparseSettings.estimator` calls it."""

RANGES = {"tau": (0.0, 1.0), "max_tau": (0.0, 1.0), "budget": (0.0, 1.0)}
"""Closed intervals; a budget of 0 is refused beside them."""

PLUGINS = "sps_runtime.plugins"
"""The entry-point group of `registry`."""

_DEFAULT = SparseSettings()


@dataclass(frozen=True)
class AttentionConfig:
    """Attributes:
    mode: ``csa`` prefills prompts block-sparsely where that pays.
    estimator: a name of `ESTIMATORS`, or a plug-in's.
    budget, tau, max_tau, decode, stride: as `types.attention.SparseSettings` has them.
    """

    mode: Mode = "exact"
    estimator: str = "block"
    budget: float = _DEFAULT.budget
    tau: float = _DEFAULT.tau
    max_tau: float = _DEFAULT.max_tau
    decode: DecodeAttention = _DEFAULT.decode
    stride: int = _DEFAULT.stride

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high or (name == "budget" and value == 0):
                raise ConfigError(f"csa_{name} must lie in {interval(name)}, not {value}")
        if self.mode not in ("exact", "csa"):
            raise ConfigError(f"attention_mode {self.mode!r} is none of exact, csa")
        if self.decode not in ("exact", "sparse"):
            raise ConfigError(f"csa_decode {self.decode!r} is none of exact, sparse")
        if estimator_name(self.estimator) is None:
            raise ConfigError(f"csa_estimator {self.estimator!r}: known are {known_estimators()}")
        if self.stride < 1:
            raise ConfigError(f"csa_stride must be at least 1, not {self.stride}")
        if self.estimator == "stride" and self.decode == "sparse":
            raise ConfigError("csa_decode sparse needs an estimator of pages, not stride")

    def spec(self) -> AttentionSpec:
        """How a request is computed that has these settings."""
        if self.mode == "exact":
            return AttentionSpec()
        settings = SparseSettings(
            estimator=estimator_name(self.estimator) or self.estimator,
            budget=self.budget,
            tau=self.tau,
            max_tau=self.max_tau,
            decode=self.decode,
            stride=self.stride,
        )
        return AttentionSpec("csa", settings)


def interval(name: str) -> str:
    """A range as errors word it."""
    low, high = RANGES[name]
    return f"{'(' if name == 'budget' else '['}{low:g}, {high:g}]"


def estimator_name(name: str) -> str | None:
    """What `SparseSettings` calls an estimator that a client names; None when nobody knows it."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    return name if name in _plugins() else None


def known_estimators() -> str:
    """All names, for errors."""
    return ", ".join(sorted([*ESTIMATORS, *_plugins()]))


def _plugins() -> list[str]:
    """Estimators of entry points ``estimator.<name>``."""
    names = (entry.name for entry in entry_points(group=PLUGINS))
    return [name.removeprefix("estimator.") for name in names if name.startswith("estimator.")]


def add_attention_flags(group: argparse._ArgumentGroup) -> None:
    """``--attention-mode`` and the ``--csa-*`` flags."""
    add, default = group.add_argument, AttentionConfig()
    add(
        "--attention-mode",
        default=default.mode,
        choices=["exact", "csa"],
        help="of requests that do not say; csa: block-sparse prefill where it pays",
    )
    add("--csa-estimator", default=default.estimator, help="how pages are judged")
    add("--csa-budget", type=float, default=default.budget, help="share of pages read, at most")
    add("--csa-tau", type=float, default=default.tau, help="estimated share that may be dropped")
    add(
        "--csa-max-tau",
        type=float,
        default=default.max_tau,
        help="measured share above which attention is widened, then exact; 1: only measured",
    )
    add("--csa-decode", default=default.decode, choices=["exact", "sparse"])
    add("--csa-stride", type=int, default=default.stride, help="of the estimator stride")
    add("--csa-min-tokens", type=int, help="shorter prompts run exact; by cost unless told")


def attention_config(settings: dict[str, Any]) -> AttentionConfig:
    """The defaults from flat names: ``attention_mode`` and ``csa_*``; others are not looked at."""
    told = {name: settings[_flat(name)] for name in _names() if _flat(name) in settings}
    return AttentionConfig(**told)


def attention_names() -> set[str]:
    """The flat names that `attention_config` reads."""
    return {_flat(name) for name in _names()}


def _names() -> list[str]:
    return [entry.name for entry in fields(AttentionConfig)]


def _flat(name: str) -> str:
    return "attention_mode" if name == "mode" else f"csa_{name}"
