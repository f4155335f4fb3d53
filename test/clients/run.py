"""Run real clients against one server: ``python -m test.clients.run [NAME...]``.

`make test-clients` does. Every client of `clients.toml` has an environment of its own, made on
first use and again when its requirements change; the server runs in this one. A client that cannot
be installed or fails makes the run fail, after the others have had their turn.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from test.kit.echo_http import EchoHttp

HERE = Path(__file__).parent
STAMP = "requirements.txt"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


@dataclass(frozen=True)
class Client:
    """One table of `clients.toml`."""

    name: str
    requires: tuple[str, ...]
    scripts: tuple[str, ...]
    without: tuple[str, ...] = ()
    torch: bool = False
    server: str = "default"
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Outcome:
    """What came of one script: its last line, or the step that failed."""

    client: str
    script: str
    passed: bool
    seconds: float
    checked: int
    skipped: int


def read_clients() -> tuple[dict[str, Client], dict[str, list[str]]]:
    """Return the clients by name, and each server's command line."""
    told = tomllib.loads((HERE / "clients.toml").read_text())
    clients = {}
    for name, table in told["clients"].items():
        lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
        clients[name] = Client(name=name, **{**table, **lists})
    return clients, {name: table["arguments"] for name, table in told["servers"].items()}


def prepare(client: Client, environments: Path, torch: str) -> Path:
    """Make the client's environment unless it is there; its Python.

    Raises:
        CalledProcessError: pip could not install it.
    """
    directory = environments / client.name
    python = directory / "bin" / "python"
    first = [torch] if client.torch else []
    wanted = "\n".join([*first, *client.requires, *client.without]) + "\n"
    stamp = directory / STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    steps = [shlex.split(line) for line in first] + [list(client.requires)]
    steps += [["--no-deps", *client.without]] if client.without else []
    for step in steps:
        subprocess.run([*pip, *step], check=True)
    stamp.write_text(wanted)
    return python


def run_script(client: Client, script: str, python: Path, url: str) -> Outcome:
    """Run one script to its end and print what it says."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = os.pathsep.join([str(python.parent), kept.get("PATH", "")])
    began = time.monotonic()
    try:
        run = subprocess.run(
            [str(python), str(HERE / script), url],
            env={**kept, **OFFLINE, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=client.timeout_s,
            check=False,
        )
        output, passed = run.stdout, run.returncode == 0
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else str(late.stdout)
        output, passed = f"{output}\nno end after {client.timeout_s:.0f} s", False
    lines = output.splitlines()
    shown = [line for line in lines if line.startswith(("ok ", "skip "))] if passed else lines
    print("\n".join(f"  {line}" for line in shown), flush=True)
    counts = [sum(line.startswith(word) for line in lines) for word in ("ok ", "skip ")]
    return Outcome(client.name, script, passed, time.monotonic() - began, counts[0], counts[1])


def run_client(client: Client, python: Path, url: str) -> list[Outcome]:
    """Run all scripts of a client."""
    outcomes = []
    for script in client.scripts:
        print(f"{client.name}: {script}", flush=True)
        outcomes.append(run_script(client, script, python, url))
    return outcomes


def main() -> int:
    clients, servers = read_clients()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(clients))
    parser.add_argument("--torch", default="torch", help="what pip installs as torch")
    parser.add_argument("--environments", type=Path, default=Path(".venv-clients"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(clients):
        parser.error(f"no client called {', '.join(sorted(unknown))}")
    outcomes = []
    with ExitStack() as stack:
        running: dict[str, EchoHttp] = {}
        for client in (clients[name] for name in options.names or clients):
            try:
                python = prepare(client, options.environments.absolute(), options.torch)
            except subprocess.CalledProcessError:
                outcomes.append(Outcome(client.name, "(installation)", False, 0.0, 0, 0))
                continue
            if client.server not in running:
                arguments = servers[client.server]
                server = EchoHttp(Path("embedded"), *arguments, device="cpu")
                running[client.server] = stack.enter_context(server)
                server.wait_ready(180.0)
            outcomes += run_client(client, python, running[client.server].url)
    print(f"\n{'client':24} {'script':24} {'checked':>8} {'skipped':>8} {'seconds':>8}")
    for o in outcomes:
        row = f"{o.client:24} {o.script:24} {o.checked:8} {o.skipped:8} {o.seconds:8.1f}"
        print(row if o.passed else f"{row}  FAILED")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
