"""What a step costs: read by the scheduler's policies. No torch."""
