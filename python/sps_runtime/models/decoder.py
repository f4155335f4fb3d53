"""What the dense decoder-only models share: pre-norm blocks on a residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sps_runtime.config.model import ModelConfig
from sps_runtime.layers.attention import Attention
from sps_runtime.layers.mlp import GatedMLP
from sps_runtime.layers.norm import RMSNorm
from sps_runtime.layers.step import LinearPlacement, StepContext
from sps_runtime.models.weights import Weights
from sps_runtime.ops.elementwise import Rotate


@dataclass(frozen=True)
class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The residual stream x is changed in place. What a block computes is added where the next norm
    reads the stream, in one pass over it; the last block's update is left to the caller.
    """

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self, x_TD: Tensor, update_TD: Tensor | None, rotate: Rotate, step: StepContext
    ) -> Tensor:
        """The update that x lacks, of the layer before -> that of this layer."""
        update_TD = self.attention(self.attention_norm.add(x_TD, update_TD), rotate, step)
        return self.mlp(step.linear, self.mlp_norm.add(x_TD, update_TD))


class Decoder:
    """A decoder-only transformer; a model says what its attention is.

    Args:
        weights: one TP rank's.

    Attributes:
        dtype, device: of activations.
    """

    def __init__(self, weights: Weights) -> None:
        config = weights.config
        self.config: ModelConfig = config
        self.embedding = weights.embedding()
        self.rope = weights.rope()
        self._moves = weights.ops.moves
        self.layers = [self._layer(weights, layer) for layer in range(config.num_layers)]
        self.norm = weights.norm("norm")
        self.dtype, self.device = self.norm.weight_D.dtype, self.norm.weight_D.device
        self.head = weights.head()

    def attention(self, weights: Weights, layer: int) -> Attention:
        """The attention of one layer."""
        return Attention(
            layer, weights.qkv(layer), weights.output(layer), head_dim=weights.config.head_dim
        )

    def forward(self, input_ids_T: Tensor, step: StepContext) -> Tensor:
        """Token ids ``[my tokens]`` -> the residual stream ``[my tokens, hidden]`` after the last
        layer, before the last norm: `logits` norms the few rows that it is asked for."""
        x_TD = self.embedding(input_ids_T)
        rotate = self.rope(step.positions_T, x_TD.dtype)
        update_TD = None
        for layer in self.layers:
            update_TD = layer(x_TD, update_TD, rotate, step)
        return x_TD if update_TD is None else self._moves.add_(x_TD, update_TD)

    def logits(self, hidden_RD: Tensor, head: LinearPlacement) -> Tensor:
        """Rows of `forward`'s result ``[my rows, hidden]`` -> ``[my rows, vocab]``.

        Args:
            head: the placement over the sampled rows.
        """
        return self.head(head, self.norm(hidden_RD))

    def _layer(self, weights: Weights, layer: int) -> DecoderLayer:
        return DecoderLayer(
            attention_norm=weights.norm(f"layers.{layer}.attention_norm"),
            attention=self.attention(weights, layer),
            mlp_norm=weights.norm(f"layers.{layer}.mlp_norm"),
            mlp=weights.mlp(layer),
        )
