"""The weights of one rank under the names that models use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sps_runtime.config.model import ModelConfig
from sps_runtime.layers.linear import ColumnLinear, Embedding, LanguageModelHead, RowLinear
from sps_runtime.layers.mlp import GatedMLP
from sps_runtime.layers.norm import RMSNorm
from sps_runtime.layers.rope import RotaryEmbedding
from sps_runtime.ops.operators import TORCH, Operators
from sps_runtime.ops.weight import PlainWeight, Weight


@dataclass(frozen=True)
class Weights:
    """One TP rank's slices (`models.layout` tells the names and shapes), as layers.

    Attributes:
        config: the model's.
        tp_size: TP ranks that the weights are cut for.
        tensors: name -> table, norm or bias; what a model lacks (biases) is absent.
        matrices: name -> what a linear layer multiplies by.
        unit: columns of the MLP's inner activation, and of the logits, that SP ranks do not part.
        ops: what the layers compute with.
    """

    config: ModelConfig
    tp_size: int
    tensors: Mapping[str, Tensor]
    matrices: Mapping[str, Weight]
    unit: int
    ops: Operators = TORCH

    def embedding(self) -> Embedding:
        """Over a table of its own, or over the packed head of a model that ties the two."""
        table = self.tensors.get("embed")
        weight = self.matrices["head"] if table is None else PlainWeight(table)
        return Embedding(weight, self.ops.moves)

    def rope(self) -> RotaryEmbedding:
        device = self.tensors["norm"].device
        return RotaryEmbedding(self.config.rope, self.config.head_dim, device, self.ops)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.tensors[name], self.config.rms_norm_eps, self.ops)

    def qkv(self, layer: int) -> ColumnLinear:
        config, name = self.config, f"layers.{layer}.qkv"
        q = config.heads_per_rank(self.tp_size) * config.head_dim
        kv = config.kv_heads_per_rank(self.tp_size) * config.head_dim
        bias = self.tensors.get(f"{name}_bias")
        return ColumnLinear(self.matrices[name], bias, (q, kv, kv), unit=config.head_dim)

    def output(self, layer: int) -> RowLinear:
        name = f"layers.{layer}.output"
        bias = self.tensors.get(f"{name}_bias")
        return RowLinear(self.matrices[name], bias, unit=self.config.head_dim)

    def head(self) -> LanguageModelHead:
        return LanguageModelHead(self.matrices["head"], self.config.vocab_size, self.unit)

    def mlp(self, layer: int) -> GatedMLP:
        return GatedMLP(self._gate_up(layer), self._down(layer), self.ops)

    def _gate_up(self, layer: int) -> ColumnLinear:
        name, size = f"layers.{layer}.gate_up", self.config.intermediate_size // self.tp_size
        bias = self.tensors.get(f"{name}_bias")
        return ColumnLinear(self.matrices[name], bias, (size, size), self.unit)

    def _down(self, layer: int) -> RowLinear:
        name = f"layers.{layer}.down"
        return RowLinear(self.matrices[name], self.tensors.get(f"{name}_bias"), self.unit)
