"""Where an engine computes, in which precision, and by which kernels."""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from longtake import parallel
from longtake.generation.stream import Engine
from longtake.memory.fixed_view import FixedView, FixedViews
from longtake.models.codec import Codec
from longtake.models.known_levels import KnownLevels
from longtake.models.wan import WanTransformer
from longtake.models.wan_vae import WanVAE

CPU = torch.device("cpu")
BFLOAT16_GAIN = 1.2  # how many times faster it must be to be chosen


def device_named(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default the GPU if there is one. ValueError if there is no such device here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot compute on device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def require_dtype(dtype: torch.dtype | None) -> None:
    """ValueError for what no engine computes in, such as the name of a type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is a type of torch's floating-point numbers, such as torch.bfloat16, got {dtype!r}")


def usual_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def faster_dtype(engine: Engine) -> torch.dtype:
    """bfloat16 if it passes one block through the network in clearly less time on this machine, else float32.

    Where the two are close float32 wins, so that one machine answers the same each time.
    """
    latents = torch.zeros(1, engine.recipe.block, *engine.latent_size)
    level_BF = torch.ones(latents.shape[:2])
    passes: dict[torch.dtype, Callable[[], Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = deepcopy(engine.network).to(dtype)  # a copy: weights that were bfloat16 once stay rounded
        text = torch.zeros(1, 1, 1, network.config.text_dim, dtype=dtype)
        passes[dtype] = partial(network, latents, level_BF, network.prompt_keys(text), network.clip_view(latents))
    seconds = _least_seconds(passes)
    clearly = seconds[torch.float32] > BFLOAT16_GAIN * seconds[torch.bfloat16]
    return torch.bfloat16 if clearly else torch.float32


def _least_seconds(passes: dict[torch.dtype, Callable[[], Tensor]]) -> dict[torch.dtype, float]:
    """Of each pass the time of the fastest of a few runs, by one thread."""
    seconds = dict.fromkeys(passes, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of one thread its own time is known, whatever else the machine does meanwhile
    try:
        for _ in range(4):
            for dtype, run in passes.items():
                started = time.thread_time()
                run()
                seconds[dtype] = min(seconds[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds


def fused(engine: Engine) -> Engine:
    """The same engine, on a GPU its network's passes by fused kernels and, once a memory is full, by recorded graphs.

    Wan's decoder goes by fused kernels too.

    It is for streams alone, and stays in its precision. Without a GPU, or without Triton there, it is as it was, as is
    one that goes so already.
    ValueError for a GPU that is not the process's current one, on which kernels run.
    """
    if engine.fused or engine.device.type != "cuda" or find_spec("triton") is None:
        return engine
    if engine.device.index != torch.cuda.current_device():
        raise ValueError(
            f"fused kernels run on the current GPU, which is not {engine.device}: choose it by CUDA_VISIBLE_DEVICES, "
            "or leave out --compile"
        )
    from longtake.attention.fused_triton import rotate
    from longtake.models import wan_triton

    fused_codec(engine.codec)
    network = engine.network
    wan_triton.fuse_layers(network)
    view_of = partial(network.memory_view, rotate=rotate)
    setattr(network, "memory_view", FixedViews(view_of, wan_triton.add_far))  # noqa: B010  # as in `parallel`
    setattr(network, "embed_levels", KnownLevels(network))  # noqa: B010
    parallel.record_calls([network], ("velocity_at", "keys_at"), chosen=_reads_fixed_view, lends=True)
    far = engine.recipe.far and wan_triton.FusedFar.of(engine.recipe.far)
    return replace(engine, recipe=replace(engine.recipe, far=far), fused=True)


def fuse_clips(network: WanTransformer) -> None:
    """Let passes over whole clips go by fused kernels from now on, on the process's current GPU where Triton is."""
    own = network.patch_embedding.weight.device
    if own.type == "cuda" and own.index == torch.cuda.current_device() and find_spec("triton"):
        from longtake.models import wan_triton

        wan_triton.fuse_clips(network)


def fused_codec(codec: Codec) -> bool:
    """Let Wan's decoder on a GPU go by fused kernels from now on, where Triton is; whether it does."""
    if not isinstance(codec, WanVAE) or codec.latent_mean.device.type != "cuda" or find_spec("triton") is None:
        return False
    from longtake.models.wan_vae_triton import fuse_decoder

    fuse_decoder(codec)
    return True


def _reads_fixed_view(*arguments: Any) -> bool:
    """Of a network's pass. While a memory fills, every block is of another kind, and none comes again."""
    return any(isinstance(one, FixedView) for one in arguments)
