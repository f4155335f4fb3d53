"""From options to a running server and its exit status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from sps_runtime.config.environment import dist_key
from sps_runtime.config.flags import parse
from sps_runtime.config.options import EngineOptions
from sps_runtime.config.process import LogConfig
from sps_runtime.config.server import ServerConfig
from sps_runtime.launch.checks import bind_http, check_model
from sps_runtime.launch.processes import EngineProcesses
from sps_runtime.launch.sizing import settle
from sps_runtime.launch.supervisor import STOP_SIGNALS, Supervisor
from sps_runtime.launch.watch import Watch
from sps_runtime.launch.worker import Worker
from sps_runtime.telemetry.logs import setup_logging
from sps_runtime.types.errors import ConfigError

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str], program: str) -> int:
    """Parse a command line and serve; the exit status, 2 for what cannot be."""
    try:
        command = parse(arguments, program)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setup_logging(command.engine.log_level, command.engine.log_format, "supervisor")
    if command.ignored:
        logger.warning("without effect here: %s", ", ".join(command.ignored))
    return serve(
        command.engine, command.server, allow_unauthenticated=command.allow_unauthenticated
    )


def serve(
    options: EngineOptions, server: ServerConfig, *, allow_unauthenticated: bool = False
) -> int:
    """Start a server in this process's main thread and run it to its end.

    What is wrong with the configuration is one line on stderr and status 2, before anything heavy
    starts.
    """
    log = LogConfig(options.log_level, options.log_format, options.trace_file)
    parallel = options.parallel
    watch = Watch()
    with watch.signals(*STOP_SIGNALS):
        try:
            listener = None
            if parallel.node_rank == 0:
                listener = bind_http(server, allow_unauthenticated=allow_unauthenticated)
            directory, model = check_model(options)
            secret = dist_key(options.dist_key_file) if parallel.nnodes > 1 else b""
            server = replace(
                server, served_model_name=server.served_model_name or options.model_path
            )
            engine = EngineProcesses(settle(options, model, directory), model, log, secret)
        except (ConfigError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if listener is None:
            return Worker(engine, watch).run()
        return Supervisor(engine, server, listener, watch).run()
