"""Who runs next, and on which ranks: each published system is one policy over the same planner."""

from __future__ import annotations

from typing import Protocol

from sps_runtime.registry import resolve
from sps_runtime.scheduler.policies.view import Step, View

POLICIES = {
    "sps": "sps_runtime.scheduler.policies.sps:Sps",
    "sarathi": "sps_runtime.scheduler.policies.sarathi:Sarathi",
}


class Policy(Protocol):
    """Proposes steps. A policy has no state: what it may know is in the view."""

    def steps(self, view: View) -> list[Step]:
        """Every step that could be sent now, were its ranks free.

        The scheduler sends one of them, fair to phases and groups, and asks again. A run may
        appear in several proposals. Nothing may be changed here.
        """
        ...


def make_policy(name: str) -> Policy:
    """The policy called `name`. Raises ConfigError for a name nobody knows."""
    policy: Policy = resolve("policy", POLICIES, name)()
    return policy
