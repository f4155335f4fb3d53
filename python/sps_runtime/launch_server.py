"""``python -m sps_runtime.launch_server``: SGLang's way to start a server."""

from __future__ import annotations

import sys

from sps_runtime.launch.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python -m sps_runtime.launch_server"))
