"""Operators: a reference in plain torch, faster ones beside it, and one object that chose."""
