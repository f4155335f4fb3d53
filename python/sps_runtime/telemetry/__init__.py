"""Logs, metrics and traces. No prompt text, no generated text and no key ever enters them."""
