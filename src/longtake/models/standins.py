"""Stand-ins for parts of an engine, where only time and memory matter: random weights, random text, no decoder, and
fused attention on torch's meta device, whose tensors have shapes but no numbers.

Shapes: B batch, F latent frames, C channels, H W height and width, T pictures, L text length, E width of text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from longtake.models.codec import PICTURE_CHANNELS, Carry, Codec
from longtake.models.wan import WanTransformer

M = TypeVar("M", bound=nn.Module)


def drawn(make: Callable[[], M], device: torch.device, dtype: torch.dtype, seed: int = 0) -> M:
    """A module whose weights are random numbers, frozen, made where and in the type in which it is to be.

    What begins at zero, so that training leaves a network as it was, is drawn too: a product with zeros takes less
    power than others, and so less time.
    """
    with _by_default(device, dtype), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module = make().to(device)
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.requires_grad_(False).eval()


@contextmanager
def _by_default(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def without_numbers(module: M) -> M:
    """The same module on the meta device."""
    tensors = [*module.parameters(), *module.buffers()]
    empty = {id(one): torch.empty_like(one, device="meta", requires_grad=False) for one in tensors}
    kinds = {id(one): nn.Parameter(empty[id(one)], False) for one in tensors if isinstance(one, nn.Parameter)}
    return deepcopy(module, empty | kinds)


def network_without_numbers(network: WanTransformer) -> WanTransformer:
    """A network of its sizes on the meta device: made anew, so that its passes are those of plain torch, whichever
    kernels and recorded graphs were put around this one.
    """
    with torch.device("meta"):
        made = WanTransformer(network.config)
    return made.to(network.patch_embedding.weight.dtype).requires_grad_(False)


@dataclass(frozen=True)
class RandomText:
    """An encoder that takes any words: normal numbers [B, L, E], drawn from the words alone."""

    rows: int
    width: int
    device: torch.device

    def encode(self, prompts: Sequence[str]) -> Tensor:
        draws = [torch.Generator().manual_seed(crc32(prompt.encode())) for prompt in prompts]
        drawn_BLE = torch.stack([torch.randn(self.rows, self.width, generator=draw) for draw in draws])
        return drawn_BLE.to(self.device)

    def prepare(self, prompts: Sequence[str]) -> None: ...


class NoDecoder(Codec):
    """Counts the pictures that latents stand for, and makes them without a single pixel, [B, T, 3, 0, 0]."""

    def __init__(self, latent_channels: int, spatial_factor: int, temporal_factor: int) -> None:
        super().__init__(latent_channels, spatial_factor, temporal_factor, span=None)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def encode_piece(self, frames_BFCHW: Tensor, carry: Carry) -> Tensor:
        raise RuntimeError("there is no codec here: name a decoder")

    def decode_piece(self, raw_BFCHW: Tensor, carry: Carry) -> Tensor:
        batch, frames = raw_BFCHW.shape[:2]
        pictures = frames * self.temporal_factor - (self.temporal_factor - 1 if carry.fresh else 0)
        return raw_BFCHW.new_zeros(batch, pictures, PICTURE_CHANNELS, 0, 0)


class Fused(TorchFunctionMode):
    """Stands in, on the meta device, for what needs a real one: fused attention, and choices by numbers.

    attended: told queries, keys, values and the answer of every attention.
    """

    def __init__(self, attended: Callable[[Tensor, Tensor, Tensor, Tensor], None] = lambda *tensors: None) -> None:
        super().__init__()
        self._attended = attended

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is scaled_dot_product_attention:
            q, k, v = args[:3]
            q.new_empty(q.shape[:-1], dtype=torch.float32)  # a log-sum-exp beside the answer
            answer = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
            self._attended(q, k, v, answer)
            return answer
        if function is Tensor.tolist:  # a bank's choice: any frames are as large as any others
            return list(range(len(args[0])))
        return function(*args, **(kwargs or {}))
