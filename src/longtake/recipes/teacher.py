"""A model's many-step teacher as one function, from prompts and seeds to whole clips."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtake.flow import even_levels
from longtake.generation.clip import sample_clip
from longtake.generation.noise import SeededNoise
from longtake.generation.stream import to_uint8
from longtake.models.text import WordText
from longtake.recipes.devices import CPU, fuse_clips, usual_dtype
from longtake.recipes.engines import latent_size
from longtake.recipes.weight_files import CODEC_FILE, TEACHER_FILE, file_of, load_codec, load_network
from longtake.toy import captions

TEACHER_STEPS = 32  # of a teacher's sampler
GUIDANCE = 3.0


def toy_teacher(
    device: torch.device = CPU,
    *,
    model: str | Path = "toy",
    dtype: torch.dtype | None = None,
    steps: int = TEACHER_STEPS,
    guidance: float = GUIDANCE,
    file: str = TEACHER_FILE,
) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    """A model's teacher as a function of B prompts and B seeds: whole clips, uint8 [B, F, H, W, 3] on its device.

    model: a name, or a folder that holds teacher.safetensors and codec_decoder.safetensors; ValueError for others.
    file: the teacher's, or that of another network that makes whole clips: `CONVERTED_FILE` (ReHyAt's published way).
    dtype: by default bfloat16 on a GPU, float32 on a CPU.
    """
    text, network, description = load_network(file_of(model, file), device)
    codec = load_codec([file_of(model, CODEC_FILE)], device)
    dtype = dtype or usual_dtype(device)
    network.to(dtype)
    codec.to(dtype)
    fuse_clips(network)
    levels = even_levels(steps, description["shift"])
    words = WordText(text, captions.encode)

    @torch.no_grad()
    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        shape = (network.config.extent, *latent_size(codec))
        noise = SeededNoise(seeds, shape, device, torch.float32)(0, 0)
        said = network.prompt_keys(words.encode(prompts)[:, None].to(dtype))
        nothing = network.prompt_keys(text(text.no_prompt(len(prompts)))[:, None].to(dtype))
        latents = sample_clip(network, noise, said, nothing, levels, guidance).to(dtype)
        few = latents.split(8)  # pictures need far more memory than latents
        return torch.cat([to_uint8(codec.decode(latents_BFCHW)[0]) for latents_BFCHW in few])

    return sample
