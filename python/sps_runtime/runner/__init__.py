"""A rank: executes the plans it is sent, in order, and keeps nothing of a sequence."""
