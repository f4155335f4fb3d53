"""Say as one line of JSON which GPUs torch can use; run as a process of its own."""

from __future__ import annotations

import json


def look() -> dict[str, object]:
    """What `launch.devices.Probe` is made from."""
    try:
        import torch
    except ImportError as error:
        return {"gpus": [], "why": f"torch cannot be imported: {error}"}
    if torch.version.cuda is None:
        return {"gpus": [], "why": f"torch {torch.__version__} is a build without CUDA"}
    if not torch.cuda.is_available():
        return {"gpus": [], "why": "torch finds no usable GPU"}
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": torch.cuda.get_device_name(index),
                "free": free,
                "total": total,
                "capability": list(torch.cuda.get_device_capability(index)),
            }
        )
    return {"gpus": gpus, "why": ""}


if __name__ == "__main__":
    print(json.dumps(look()))
