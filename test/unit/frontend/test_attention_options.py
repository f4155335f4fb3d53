"""``attention`` of a request: over the server's defaults field by field, refused by name."""

from __future__ import annotations

import pytest

from sps_runtime.config.attention import ESTIMATORS, AttentionConfig
from sps_runtime.frontend.attention_options import AttentionOptions, attention_spec
from sps_runtime.types.attention import EXACT, SparseSettings
from sps_runtime.types.errors import ConfigError, InvalidRequest

EXACT_SERVER = AttentionConfig()
CSA_SERVER = AttentionConfig(mode="csa", budget=0.2, tau=0.05, decode="sparse")


def settings(options: AttentionOptions | None, defaults: AttentionConfig) -> SparseSettings:
    found = attention_spec(options, defaults).sparse
    assert found is not None
    return found


def test_nothing_told_is_the_servers_default() -> None:
    assert attention_spec(None, EXACT_SERVER) == EXACT
    assert attention_spec(AttentionOptions(), EXACT_SERVER) == EXACT
    assert settings(None, CSA_SERVER).budget == 0.2
    assert settings(AttentionOptions(mode="csa"), EXACT_SERVER) == SparseSettings()


def test_a_request_overrides_field_by_field() -> None:
    found = settings(AttentionOptions(tau=0.5, max_tau=0.9, estimator="mean"), CSA_SERVER)
    assert (found.tau, found.max_tau, found.estimator) == (0.5, 0.9, ESTIMATORS["mean"])
    assert (found.budget, found.decode) == (0.2, "sparse")
    assert attention_spec(AttentionOptions(mode="exact", tau=0.5), CSA_SERVER) == EXACT
    assert settings(AttentionOptions(decode="exact"), CSA_SERVER).decode == "exact"


def test_a_tau_of_nothing_reads_every_page_unless_a_budget_is_told() -> None:
    assert settings(AttentionOptions(tau=0.0), CSA_SERVER).budget == 1.0
    assert settings(AttentionOptions(tau=0, budget=0.3), CSA_SERVER).budget == 0.3


def test_equal_wishes_share_pages_and_others_do_not() -> None:
    def fidelity(**told: object) -> str:
        return attention_spec(AttentionOptions(mode="csa", **told), EXACT_SERVER).fidelity

    assert fidelity(budget=0.1) == fidelity()
    different = [fidelity(), fidelity(budget=0.2), fidelity(tau=0.3), fidelity(max_tau=0.2)]
    different += [fidelity(estimator="mean"), EXACT.fidelity, fidelity(estimator="stride")]
    different += [fidelity(estimator="stride", stride=8)]
    assert fidelity(decode="sparse") == fidelity(), "decode leaves no page to others"
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("told", "field"),
    [
        ({"tau": -0.1}, "tau"),
        ({"tau": 1.5}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"max_tau": 2}, "max_tau"),
        ({"max_tau": True}, "max_tau"),
        ({"budget": 0}, "budget"),
        ({"budget": 1.01}, "budget"),
        ({"estimator": "tea leaves"}, "estimator"),
        ({"stride": 0}, "stride"),
    ],
)
@pytest.mark.parametrize("prefix", ["attention", "attention[3]"])
def test_what_cannot_be_is_named(told: dict[str, object], field: str, prefix: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        attention_spec(AttentionOptions(mode="csa", **told), EXACT_SERVER, prefix)
    assert (caught.value.field, caught.value.status) == (f"{prefix}.{field}", 400)
    assert caught.value.message.startswith(f"{prefix}.{field} ")


def test_an_unknown_estimator_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"block.*quest"):
        attention_spec(AttentionOptions(mode="csa", estimator="x"), EXACT_SERVER)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        attention_spec(AttentionOptions(tau=0.1), EXACT_SERVER)
    assert caught.value.field == "attention.mode"


@pytest.mark.parametrize(
    "told",
    [
        {"mode": "dense"},
        {"decode": "never"},
        {"budget": 0.0},
        {"tau": float("nan")},
        {"estimator": "tea leaves"},
    ],
)
def test_a_server_does_not_start_with_defaults_that_cannot_be(told: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(told))):
        AttentionConfig(**told)
