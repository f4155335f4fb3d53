"""Other engines measured beside ours: `benchmark/peers.py` is the command."""
