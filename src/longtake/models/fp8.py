"""Linear layers in eight bits: weights and inputs as e4m3 numbers, each row under a scale of its own.

Of a network those that most of the work is in: queries, keys, values and outputs of attention, and both products of
the feed-forward part. What is sensitive or small stays as it is: embeddings, levels and modulation, norms, the prompt's
keys and values, projections of far states, and the head.

Shapes: M rows, I and O features that go in and come out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.wan import WanTransformer

E4M3 = torch.float8_e4m3fn
MOST = torch.finfo(E4M3).max  # 448
LEAST_SCALE = 1e-12  # of a row of zeros
CAPABILITY = (8, 9)  # of GPUs that multiply such numbers


class EightBitLinear(nn.Module):
    """A linear layer whose product is of eight-bit numbers; its bias, and what it gives, have the type of its input.

    Bytes are kept as whole numbers, so that no change of type reaches them.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        rows_OI, scale_O1 = eight_bit(plain.weight.detach())
        self.register_buffer("bytes_OI", rows_OI.view(torch.uint8))
        self.register_buffer("scale_O1", scale_O1)
        self.bias = plain.bias
        self.bytes_OI: Tensor
        self.scale_O1: Tensor

    @property
    def weight(self) -> Tensor:
        """As it is multiplied by, in float32."""
        return self.bytes_OI.view(E4M3).float() * self.scale_O1

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, *rows_of(x))

    def after_gelu(self, x: Tensor) -> Tensor:
        """The layer's answer to GELU (by tanh) of x, which is never written out in more than eight bits."""
        return self._product(x, *rows_of(x, gelu=True))

    def _product(self, x: Tensor, rows_MI: Tensor, scale_M1: Tensor) -> Tensor:
        made = product(rows_MI, scale_M1, self.bytes_OI.view(E4M3), self.scale_O1, self.bias, x.dtype)
        return made.unflatten(0, x.shape[:-1])


def eight_bit(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 numbers, and the scale of each [M, 1] in float32, by which its largest number is 448."""
    x = x_MI.float()
    scale = (x.abs().amax(1, keepdim=True) / MOST).clamp_min(LEAST_SCALE)
    return (x / scale).clamp(-MOST, MOST).to(E4M3), scale


def rows_of(x: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Of what goes into a layer, as `eight_bit`, by one kernel on a GPU. gelu: of its GELU, by tanh."""
    rows = x.flatten(0, -2)
    if x.is_cuda:
        from longtake.attention.fused_triton import eight_bit_rows

        return eight_bit_rows(rows, gelu=gelu)
    return eight_bit(functional.gelu(rows.float(), approximate="tanh") if gelu else rows)


def product(
    x_MI: Tensor, scale_M1: Tensor, weight_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x times the transposed weight, and the bias, [M, O]: on a GPU in eight bits, elsewhere as `dequantised`."""
    if not x_MI.is_cuda:
        return dequantised(x_MI, scale_M1, weight_OI, scale_O1, bias_O, dtype)
    return torch._scaled_mm(
        x_MI, weight_OI.t(), scale_a=scale_M1, scale_b=scale_O1.t(), bias=bias_O, out_dtype=dtype, use_fast_accum=True
    )


def dequantised(
    x_MI: Tensor, scale_M1: Tensor, weight_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same product in float32: the truth."""
    bias = None if bias_O is None else bias_O.float()
    return functional.linear(x_MI.float() * scale_M1, weight_OI.float() * scale_O1, bias).to(dtype)


def into_eight_bits(network: WanTransformer) -> None:
    """Replace a network's large linear layers by those in eight bits. ValueError for a GPU that cannot multiply so."""
    weight = network.patch_embedding.weight
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        raise ValueError(f"{torch.cuda.get_device_name(weight.device)} has no products of eight bits: leave out fp8")
    for owner, name in large_layers(network):
        plain = owner.get_submodule(name)
        if isinstance(plain, nn.Linear):
            owner.register_module(name, EightBitLinear(plain))


def large_layers(network: WanTransformer) -> Iterator[tuple[nn.Module, str]]:
    """Of a network the linear layers that most of the work is in: whose they are, and their names there."""
    for block in network.layers:
        for owner, names in ((block.self_attn, "qkvo"), (block.cross_attn, "qo"), (block.ffn, "02")):
            for name in names:
                yield owner, name


def is_eight_bit(network: WanTransformer) -> bool:
    """Whether `into_eight_bits` was done to it."""
    return isinstance(network.layers[0].ffn[0], EightBitLinear)
