"""Data that ships with the package: the embedded model and a sample document with questions."""

from importlib.resources import files
from pathlib import Path


def embedded_model_path() -> Path:
    """The directory of the embedded model, a Hugging Face checkpoint."""
    return Path(str(files(__package__))) / "embedded"
