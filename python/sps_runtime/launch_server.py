"""``python -m sps_runtime.launch_server``: SGLang's way to start a server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from sps_runtime.config.flags import parse
from sps_runtime.launch.serve import serve
from sps_runtime.types.errors import ConfigError


def main(arguments: Sequence[str] | None = None, program: str = "sps serve") -> int:
    """Run a server to its end; the exit status."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments, program)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if command.ignored:
        logging.getLogger(__name__).warning("without effect here: %s", ", ".join(command.ignored))
    return serve(
        command.engine, command.server, allow_unauthenticated=command.allow_unauthenticated
    )


if __name__ == "__main__":
    sys.exit(main(program="python -m sps_runtime.launch_server"))
