"""The codec protocol: pictures to latent frames and back, a whole clip or piece by piece.

Every codec here is causal: a latent frame depends on its own pictures and earlier ones only. The first
latent frame of a video stands for one picture, every later one for `temporal_factor` pictures. Whatever
the next piece of a video needs from the earlier ones travels in a `CodecState`, a value like any other:
keep an old one to fork a stream, save it, or start again with `None`.

Shape letters: B batch, F frames, C channels, H W height and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

PICTURE_CHANNELS = 3  # red, green, blue


class CodecState(NamedTuple):
    """All that encoding or decoding carries from one piece of a video to the next.

    The tensors are in the order in which the layers run, batch first. They are never written to and share
    no storage with any output, so a state may be kept, continued twice or saved.
    """

    tensors: Sequence[Tensor]

    def given_up(self) -> "CodecState":
        """The same, that nobody continues a second time: layers let go of each tensor once they took it.

        That frees memory only where this state itself is held no longer.
        """
        return CodecState(list(self.tensors))

    @classmethod
    def joined(cls, states: "Sequence[CodecState]") -> "CodecState | None":
        """The state of a batch whose rows are those of the given ones; None of none."""
        return cls(tuple(map(torch.cat, zip(*(state.tensors for state in states), strict=True)))) if states else None

    def rows(self) -> "list[CodecState]":
        """The states whose `joined` this is, in their own storage."""
        return [
            CodecState(rows) for rows in zip(*(map(torch.clone, one.split(1)) for one in self.tensors), strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; does not grow with the length of the video."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Carry:
    """Hands each layer its own past while one piece goes through a network, and collects the next state.

    It lives for one pass. Layers take their turns in the order in which they run, which is the same in
    every pass, so no layer needs a name or an index. What a layer took is let go of at once.
    """

    def __init__(self, state: CodecState | None) -> None:
        self.fresh = state is None  # this piece is the start of a video
        tensors = () if state is None else state.tensors
        self._past = tensors if isinstance(tensors, list) else list(tensors)  # a list was given up
        self._count = len(self._past)
        self._kept: list[Tensor] = []

    def extend(self, x: Tensor, frames: int, dim: int) -> Tensor:
        """`x` with the `frames` frames before it put in front along `dim`; zeros where the video starts."""
        shape = list(x.shape)
        shape[dim] = frames
        past = x.new_zeros(shape) if self.fresh else self.past(shape)
        joined = torch.cat([past, x], dim)
        self.keep(joined, frames, dim)
        return joined

    def past(self, shape: list[int]) -> Tensor:
        """Of a video that is under way: what the layer whose turn it is kept. ValueError unless it has that shape."""
        if not self._past:
            raise ValueError(f"the state has {self._count} tensors but this codec carries more")
        past = self._past.pop(0)
        if list(past.shape) != shape:
            turn, found = len(self._kept), list(past.shape)
            raise ValueError(f"the state does not continue here: tensor {turn} is {found}, these frames need {shape}")
        return past

    def keep(self, joined: Tensor, frames: int, dim: int) -> None:
        """Keep the last frames for the layer's next turn, as they lie in memory."""
        # A copy: a view would keep the whole piece alive for as long as the state is kept.
        self.hand_on(joined.narrow(dim, joined.shape[dim] - frames, frames).clone())

    def hand_on(self, past: Tensor) -> None:
        """Keep these frames for the layer's next turn, which nobody writes to any more."""
        self._kept.append(past)

    def state(self) -> CodecState:
        """What the next piece needs; call it when every layer has run."""
        if not self.fresh and self._past:
            raise ValueError(f"the state has {self._count} tensors but this codec carries {len(self._kept)}")
        return CodecState(tuple(self._kept))


class Codec(nn.Module, ABC):
    """Encodes pictures in -1..1 to normalised latents (each channel about mean 0, deviation 1) and back.

    `encode` and `decode` take a whole clip with `state=None`, or one piece after another, each with the
    state the last one returned. Any cutting into pieces gives the same numbers.

    Subclasses register the buffers `latent_mean` and `latent_std` and define `encode_piece` and
    `decode_piece`, which see raw latents (before normalisation).

    Args:
        latent_channels: channels of a latent frame.
        spatial_factor: pictures are this many times higher and wider than latent frames.
        temporal_factor: pictures per latent frame, from the second latent frame on.
        span: latent frames that go through the network at once inside one call. It bounds the memory of a
            long clip and changes no number; None takes all at once, which suits training and compiling.
    """

    latent_mean: Tensor  # C
    latent_std: Tensor  # C

    def __init__(self, latent_channels: int, spatial_factor: int, temporal_factor: int, span: int | None) -> None:
        super().__init__()
        if span is not None and span < 1:
            raise ValueError(f"span must be at least 1 latent frame, got {span}")
        self.latent_channels = latent_channels
        self.spatial_factor = spatial_factor
        self.temporal_factor = temporal_factor
        self.span = span

    def encode(self, frames_BFCHW: Tensor, state: CodecState | None = None) -> tuple[Tensor, CodecState]:
        """Latents of the next pictures: 1 + k * temporal_factor of them at the start, k * temporal_factor later."""
        self._check_frames(frames_BFCHW, fresh=state is None)
        raw_BFCHW, state = self._through(self.encode_piece, self._cut_frames(frames_BFCHW, state is None), state)
        return self.normalise(raw_BFCHW), state

    def decode(self, latents_BFCHW: Tensor, state: CodecState | None = None) -> tuple[Tensor, CodecState]:
        """Pictures of the next latent frames, about -1..1; clamping them is left to the caller."""
        self._check_latents(latents_BFCHW)
        raw_BFCHW = self.denormalise(latents_BFCHW)
        pieces = raw_BFCHW.split(self.span or raw_BFCHW.shape[1], dim=1)
        return self._through(self.decode_piece, pieces, state)

    @abstractmethod
    def encode_piece(self, frames_BFCHW: Tensor, carry: Carry) -> Tensor:
        """Raw latents of one piece of video."""

    @abstractmethod
    def decode_piece(self, raw_BFCHW: Tensor, carry: Carry) -> Tensor:
        """Pictures of one piece of raw latents."""

    def pictures(self, frames: int) -> int:
        """How many pictures the first latent frames of a video are."""
        return 1 + self.temporal_factor * (frames - 1) if frames else 0

    def normalise(self, raw_BFCHW: Tensor) -> Tensor:
        """Raw latents on the scale the video network works on."""
        return (raw_BFCHW - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def denormalise(self, latents_BFCHW: Tensor) -> Tensor:
        """Undoes `normalise`."""
        return latents_BFCHW * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)

    def _through(
        self, step: Callable[[Tensor, Carry], Tensor], pieces: Iterable[Tensor], state: CodecState | None
    ) -> tuple[Tensor, CodecState]:
        outputs = []
        for piece in pieces:
            carry, state = Carry(state), None  # of a state in between, layers let go as they take their part
            outputs.append(step(piece, carry))
            state = carry.state()
        assert state is not None  # there is at least one piece: the checks refuse empty input
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state

    def _cut_frames(self, frames_BFCHW: Tensor, fresh: bool) -> tuple[Tensor, ...]:
        """Pictures in pieces of `span` latent frames; a video's first latent frame takes one picture only."""
        if self.span is None:
            return (frames_BFCHW,)
        step = self.span * self.temporal_factor
        first = step - (self.temporal_factor - 1 if fresh else 0)
        return frames_BFCHW.tensor_split(list(range(first, frames_BFCHW.shape[1], step)), dim=1)

    def _check_frames(self, frames_BFCHW: Tensor, fresh: bool) -> None:
        shape = list(frames_BFCHW.shape)
        if len(shape) != 5 or shape[2] != PICTURE_CHANNELS:
            raise ValueError(f"pictures must be [batch, frames, {PICTURE_CHANNELS}, height, width], got {shape}")
        count, height, width, side, step = shape[1], shape[3], shape[4], self.spatial_factor, self.temporal_factor
        if height % side or width % side or not height or not width:
            raise ValueError(f"height and width must be positive multiples of {side}, got {height} x {width}")
        if fresh and (count < 1 or (count - 1) % step):
            raise ValueError(f"a video starts with 1 + a multiple of {step} pictures, got {count}")
        if not fresh and (count < 1 or count % step):
            raise ValueError(f"a video continues with a positive multiple of {step} pictures, got {count}")

    def _check_latents(self, latents_BFCHW: Tensor) -> None:
        shape = list(latents_BFCHW.shape)
        if len(shape) != 5 or shape[2] != self.latent_channels or 0 in shape:
            raise ValueError(f"latents must be [batch, frames, {self.latent_channels}, height, width], got {shape}")
