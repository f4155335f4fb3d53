"""How do we compare with OpenVINO, vLLM, llama.cpp and others, side by side on this machine?

Each peer is installed in an environment of its own (`--install openvino,llama.cpp`) and takes turns
with our HTTP server, A B B A, on the same model, tokens and threads. Metrics, and what runs for
whom, are defined in benchmark/README.md; the code is in benchmark/peers/.
"""

from peers.command import main

if __name__ == "__main__":
    main()
