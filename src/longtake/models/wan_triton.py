"""Layers of Wan's shape by kernels that read and write each number once. `models.wan` is their definition."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from longtake.attention import fused_triton as fused
from longtake.attention import linear, span_triton
from longtake.attention.linear import Sums
from longtake.attention.rope import Rotation
from longtake.memory.far import FarShape, Keep
from longtake.memory.span_memory import SpanView
from longtake.memory.view import ClipView, FarView, Tokens
from longtake.memory.window import Keys
from longtake.models.features import LearnedForm
from longtake.models.fp8 import EightBitLinear
from longtake.models.wan import Block, WanTransformer, read_prompt


def fuse_layers(network: WanTransformer) -> None:
    """Let calls without gradients pass through the layers by the fused kernels; those with gradients are as they were.

    Goes around what was compiled or checkpointed before. Answers differ from the definition's by rounding.
    """
    for block in network.layers:
        layer = FusedLayer(block)
        for method in ("before_attention", "plain_tokens", "after_attention"):
            setattr(block, method, getattr(layer, method))


def fuse_clips(network: WanTransformer) -> None:
    """Let passes over whole clips without gradients go through converted layers by the fused kernels.

    Those with gradients are as they were. Answers differ from the definition's by rounding.
    """
    plain = network.clip_view

    def clip_view(latents_BFCHW: Tensor, allowed_FF: Tensor | None = None) -> ClipView | SpanView:
        view = plain(latents_BFCHW, allowed_FF)
        return FusedSpanView(view.rotation, view.converted) if isinstance(view, SpanView) else view

    setattr(network, "clip_view", clip_view)  # noqa: B010  # as above


class FusedSpanView(SpanView):
    """As `SpanView`, of a network's own converted layers: many chunks at once, in memory that does not grow either."""

    def attend(self, layer: int, own: Tokens) -> Tensor:
        if layer not in self.converted or torch.is_grad_enabled() or not self.converted[layer].span.exact:
            return super().attend(layer, own)
        shape, form = self.converted[layer], cast(LearnedForm, self.converted[layer].far.form)
        frames = range(own.q.shape[1] // shape.tokens) if shape.far.turns_with_frames else [0]
        turned = shape.far.rotation(shape.grid, frames, own.q.device)
        return span_triton.attended(
            own.q, own.k, own.v, own.plain_q, own.plain_k, turned, form.queries.weights, form.keys.weights,
            span=shape.span, tokens=shape.tokens,
        )  # fmt: skip


class FusedLayer:
    """The two halves of a layer, whose parameters stay its own."""

    def __init__(self, block: Block):
        self._block = block
        self._before, self._plain, self._after = block.before_attention, block.plain_tokens, block.after_attention

    def before_attention(self, x_BFTE: Tensor, levels_BF6E: Tensor, rotation: Rotation) -> Tokens:
        """As `Block.before_attention`."""
        if torch.is_grad_enabled():
            return self._before(x_BFTE, levels_BF6E, rotation)
        own = self._block.self_attn
        x = fused.modulate(x_BFTE, levels_BF6E, self._block.modulation).flatten(1, 2)
        q, plain_q = fused.norm_rotate_(own.q(x), own.norm_q.weight, own.heads, rotation)
        k, plain_k = fused.norm_rotate_(own.k(x), own.norm_k.weight, own.heads, rotation)
        return Tokens(q, k, plain_q, plain_k, own.v(x).unflatten(-1, (own.heads, -1)))

    def plain_tokens(self, x_BFTE: Tensor, levels_BF6E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Block.plain_tokens`."""
        if torch.is_grad_enabled():
            return self._plain(x_BFTE, levels_BF6E)
        own = self._block.self_attn
        x = fused.modulate(x_BFTE, levels_BF6E, self._block.modulation).flatten(1, 2)
        q, k = fused.norm_(own.q(x), own.norm_q.weight), fused.norm_(own.k(x), own.norm_k.weight)
        q, k, v = (part.unflatten(-1, (own.heads, -1)) for part in (q, k, own.v(x)))
        return q, k, v

    def after_attention(
        self, x_BFTE: Tensor, attended_BTND: Tensor, levels_BF6E: Tensor,
        prompt: tuple[Tensor, Tensor], prompt_BF: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `Block.after_attention`."""
        if torch.is_grad_enabled():
            return self._after(x_BFTE, attended_BTND, levels_BF6E, prompt, prompt_BF)
        block, cross, layer = self._block, self._block.cross_attn, (levels_BF6E, self._block.modulation)
        attended = block.self_attn.o(attended_BTND.flatten(2))
        x, asks = fused.add_gated_norm(x_BFTE, attended, *layer, block.norm3.weight, block.norm3.bias)
        q = fused.norm_(cross.q(asks), cross.norm_q.weight).unflatten(-1, (cross.heads, -1))
        x, modulated = fused.add_modulate(x, cross.o(read_prompt(q, prompt, prompt_BF)), *layer)
        return fused.add_gated(x, _feed_forward(block.ffn, modulated), *layer)


def _feed_forward(ffn: nn.Sequential, x_BFTE: Tensor) -> Tensor:
    """On a GPU the activation is applied where the first product is written, or where its eight bits are."""
    if isinstance(ffn[0], EightBitLinear):
        return cast(EightBitLinear, ffn[2]).after_gelu(ffn[0](x_BFTE))
    if not x_BFTE.is_cuda:
        return ffn(x_BFTE)
    first, last = cast(nn.Linear, ffn[0]), cast(nn.Linear, ffn[2])
    hidden = torch._addmm_activation(first.bias, x_BFTE.flatten(0, 2), first.weight.t(), use_gelu=True)
    return last(hidden).view_as(x_BFTE)


@dataclass(frozen=True, kw_only=True)
class FusedFar(FarShape):
    """A far state of the published form, under a rule that adds, whose sums kernels make."""

    @classmethod
    def of(cls, shape: FarShape) -> FarShape:
        """The same by kernels, if it is one; others come back as they are."""
        if shape.form is not linear.PAPER or not isinstance(shape.rule, Keep):
            return shape
        return cls(**vars(shape))

    def absorb(self, sums: Sums | None, keys: Keys, rotation: Rotation) -> Sums:
        """As `FarShape.absorb`; with gradients it is that."""
        if torch.is_grad_enabled() or not isinstance(self.rule, Keep):
            return super().absorb(sums, keys, rotation)
        kept = self.rule.kept(sums, keys.k_BTND.shape[1], len(keys.frames))
        return fused.absorb_far(kept, keys.k_BTND, keys.v_BTND, rotation)


def add_far(far: FarView, near_BTND: Tensor, plain_q_BTND: Tensor) -> Tensor:
    """As `FarView.add_to`: by a kernel for a `FusedFar`, in its plain form for others."""
    sums = far.state.sums
    if not isinstance(far.state.shape, FusedFar) or not isinstance(far.project, nn.Linear):
        return far.add_to(near_BTND, plain_q_BTND)
    assert sums is not None, "nothing was absorbed yet"
    asked_BTND = far.state.shape.mapped_queries(plain_q_BTND)
    return fused.add_far(near_BTND, asked_BTND, far.rotation, sums, far.project.weight, far.project.bias)
