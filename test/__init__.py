"""Tests. A package, so that `test.kit` is ours and not the standard library's."""
