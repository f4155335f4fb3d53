"""Settings as frozen dataclasses; the only package that reads the environment."""
