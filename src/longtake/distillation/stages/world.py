"""What stages learn from, clips and prompts, and how they draw from it."""

from typing import Protocol

from torch import Tensor

from longtake.distillation.trainer import Stateful
from longtake.models.text import WordEncoder

RENEW_EVERY = 6  # steps between new clips, which cost time to paint and encode


class LatentClips(Protocol):
    """Clips [B, F, C, H, W] with the tokens [B, P, L] of P prompts; see `pretrain.Clips` for the rest."""

    @property
    def latents_BFCHW(self) -> Tensor: ...

    @property
    def tokens_BPL(self) -> Tensor: ...

    @property
    def prompt_BF(self) -> Tensor: ...

    @property
    def focus_BFHW(self) -> Tensor: ...


class ClipSupply(Stateful, Protocol):
    """Clips to draw from, replaced a few at a time."""

    @property
    def frames(self) -> int:
        """Latent frames of a whole clip."""
        ...

    def renew(self) -> None: ...

    def draw(self, count: int, frames: int) -> LatentClips: ...


class Prompts(Protocol):
    """Tokens [B, P, L] of P prompts a clip, and the prompt [B, F] of each of its frames."""

    @property
    def tokens_BPL(self) -> Tensor: ...

    @property
    def prompt_BF(self) -> Tensor: ...


class World(Protocol):
    """What stages learn from. Seeds of one process's draws must not be those of another's: the world sees to it."""

    latent_size: tuple[int, int, int]
    """Channels, height and width of a latent frame."""

    def clips(
        self, size: int, seed: int, frames: int, memory_share: float = 0.0, looks_soon: bool = False
    ) -> ClipSupply:
        """A supply that holds so many clips, each of so many latent frames or more.

        memory_share: of clips in which what was seen goes out of sight and comes back; looks_soon: whether the clips
        teach to look away at any time. See `TeacherForcingStage`.
        """
        ...

    def prompts(self, count: int, seed: int, frames: int, looks_away: bool = True) -> Prompts:
        """Prompts of clips that nobody rendered, of so many latent frames or more. The same seed gives the same.

        looks_away: whether in some of these what was seen goes out of sight.
        """
        ...

    def held_out(self, count: int) -> Tensor:
        """Tokens [B, L] of prompts that training never shows."""
        ...

    def show(self, name: str, latents_BFCHW: Tensor) -> None:
        """Write a strip of pictures of these clips."""
        ...


def renew(supply: ClipSupply, step: int) -> None:
    """Have new clips take the place of some, where it is time for that."""
    if step % RENEW_EVERY == 0:
        supply.renew()


def drawn(supply: ClipSupply, step: int, count: int, frames: int) -> LatentClips:
    """The clips of a step, new ones among them every few steps."""
    renew(supply, step)
    return supply.draw(count, frames)


def parts_of(clips: LatentClips) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, tokens, prompt numbers and focus: what lessons are given, which take tensors alone."""
    return clips.latents_BFCHW, clips.tokens_BPL, clips.prompt_BF, clips.focus_BFHW


def embed(text: WordEncoder, tokens_BPL: Tensor) -> Tensor:
    """Text embeddings [B, P, L, E] of P prompts a clip."""
    return text(tokens_BPL.flatten(0, 1)).unflatten(0, tokens_BPL.shape[:2])
