"""A pytest plugin: tensors are made on the GPU unless a test says otherwise."""

from __future__ import annotations

import torch

torch.set_default_device("cuda")
