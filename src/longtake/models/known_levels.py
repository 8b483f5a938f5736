"""Embeddings of levels, computed once: a stream's passes see the same few."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longtake.models.wan import Levels, WanTransformer


class KnownLevels:
    """`WanTransformer.embed_levels`, whose answer to a tensor is kept for as long as that tensor lives.

    Calls with gradients are as they were, and so are those with tensors made in inference mode, of which torch does not
    note what is written. An answer is made anew once the tensor was written to, and all are once the network's weights
    were, or are others (nothing is noted that is done through `.data`).
    """

    def __init__(self, network: WanTransformer):
        self._embed, self._parts = network.embed_levels, (network.time_embedding, network.time_projection)
        self._known = WeakTensorKeyDictionary()
        self._made_by: list[tuple[int, int]] = []
        self._weights: list[Tensor] = []  # held, so that no others come to lie where they do

    def __call__(self, level_BF: Tensor) -> Levels:
        weights = [one for part in self._parts for one in part.parameters()]
        if torch.is_grad_enabled() or any(one.is_inference() for one in (level_BF, *weights)):
            return self._embed(level_BF)
        made_by = [(one.data_ptr(), one._version) for one in weights]
        if made_by != self._made_by:
            self._known = WeakTensorKeyDictionary()
            self._made_by, self._weights = made_by, [one.detach() for one in weights]
        written, levels = self._known.get(level_BF, (None, None))
        if levels is None or written != level_BF._version:
            levels = self._embed(level_BF)
            self._known[level_BF] = level_BF._version, levels
        return levels
