"""What the scheduler may do in one step, and how it orders requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerConfig:
    """Attributes:
    max_running_requests: requests holding KV at once.
    max_queued_requests: waiting requests; more are refused with 503.
    chunked_prefill_size: new tokens of one sequence in one step *per SP rank of its group*;
        -1 for whole prompts.
    max_prefill_tokens: new tokens of one packed prefill step per rank.
    policy: name in `scheduler.policies.POLICIES`.
    schedule_policy: queue order, ``fcfs`` or ``lpm`` (longest prefix match first).
    conservativeness: how much of max_new_tokens admission reserves (SGLang's factor).
    overlap: send plan n+1 before the tokens of plan n are known.
    max_steps_in_flight: plans a rank may have waiting, running one included.
    max_burst_steps: decode steps that ranks run by themselves while no request waits; 1 for none.
    csa_min_tokens: prompts below it run exact though they ask for csa; None: what the cost model
        says.
    """

    max_running_requests: int = 256
    max_queued_requests: int = 1024
    chunked_prefill_size: int = 2048
    max_prefill_tokens: int = 16384
    policy: str = "sps"
    schedule_policy: str = "fcfs"
    conservativeness: float = 1.0
    overlap: bool = True
    max_steps_in_flight: int = 2
    max_burst_steps: int = 32
    csa_min_tokens: int | None = None
