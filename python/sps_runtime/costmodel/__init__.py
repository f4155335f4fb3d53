"""What a step costs: read by the scheduler's policies and by the simulator. No torch."""
