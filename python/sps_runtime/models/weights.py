"""The weights of one rank under the names that models use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sps_runtime.config.model import ModelConfig
from sps_runtime.layers.linear import ColumnLinear, RowLinear
from sps_runtime.layers.norm import RMSNorm
from sps_runtime.ops.elementwise import Elementwise, TorchElementwise


@dataclass(frozen=True)
class Weights:
    """One TP rank's slices (`models.layout` tells the names and shapes), as layers.

    Attributes:
        config: the model's.
        tp_size: TP ranks that the weights are cut for.
        tensors: name -> tensor; weights that a model lacks (biases) are absent.
        elementwise: what norms, rope and gates are computed with.
    """

    config: ModelConfig
    tp_size: int
    tensors: Mapping[str, Tensor]
    elementwise: Elementwise = field(default_factory=TorchElementwise)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.tensors[name], self.config.rms_norm_eps, self.elementwise)

    def qkv(self, layer: int) -> ColumnLinear:
        config, name = self.config, f"layers.{layer}.qkv"
        q = config.heads_per_rank(self.tp_size) * config.head_dim
        kv = config.kv_heads_per_rank(self.tp_size) * config.head_dim
        bias = self.tensors.get(f"{name}_bias")
        return ColumnLinear(self.tensors[name], bias, (q, kv, kv), unit=config.head_dim)

    def output(self, layer: int) -> RowLinear:
        name = f"layers.{layer}.output"
        bias = self.tensors.get(f"{name}_bias")
        return RowLinear(self.tensors[name], bias, unit=self.config.head_dim)

    def gate_up(self, layer: int) -> ColumnLinear:
        name, size = f"layers.{layer}.gate_up", self.config.intermediate_size // self.tp_size
        return ColumnLinear(self.tensors[name], self.tensors.get(f"{name}_bias"), (size, size))

    def down(self, layer: int) -> RowLinear:
        name = f"layers.{layer}.down"
        return RowLinear(self.tensors[name], self.tensors.get(f"{name}_bias"))
