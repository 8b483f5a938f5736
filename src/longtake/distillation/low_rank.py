"""Training at a low rank (LoRA, arXiv 2106.09685): a matrix stays, and of what is added to it two factors learn.

What comes of it is stored without loss as a delta of that rank (`models.delta`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.delta import pays
from longtake.models.wan import WanTransformer


class LowRankLinear(nn.Module):
    """A linear layer whose matrix is W + B A; A [rank, in] and B [out, rank] learn, and so does the bias.

    B begins at zero, so that the layer begins as the one it was. A begins such that first steps, in which an optimiser
    moves numbers by about their rate, move those of W + B A so too: rates are those of training it whole.
    """

    def __init__(self, whole: nn.Linear, rank: int):
        super().__init__()
        rows, columns = whole.weight.shape
        self.bias = whole.bias
        self.lora_A = nn.Parameter(whole.weight.new_empty(rank, columns).normal_(std=rank**-0.5))
        self.lora_B = nn.Parameter(whole.weight.new_zeros(rows, rank))
        self.register_buffer("whole", whole.weight.detach())  # no parameter: whatever turns gradients on leaves it
        self.whole: Tensor

    @property
    def weight(self) -> Tensor:
        return self.whole + self.lora_B @ self.lora_A

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def factor(network: WanTransformer, rank: int) -> None:
    """Let only factors of each matrix learn where they are smaller than it, but for the projections of what is far,
    which begin at zero. All else learns as before. ValueError if no matrix is larger than its factors.
    """
    whole = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and layer not in network.projections and pays(layer.weight.shape, rank)
    }
    if not whole:
        raise ValueError(f"at rank {rank} factors would be larger than every matrix of this network")
    for name, layer in whole.items():
        network.set_submodule(name, LowRankLinear(layer, rank))


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Undo `factor`: add the factors to their matrices, and make plain layers of these."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, LowRankLinear):
            rows, columns = layer.whole.shape
            plain = nn.Linear(columns, rows, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.weight), layer.bias
            network.set_submodule(name, plain)
