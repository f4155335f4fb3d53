"""Start, watch and stop the processes of an engine."""
