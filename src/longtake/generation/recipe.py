"""What a method is at serving time: memory, schedule, levels."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self

from torch import Tensor

from longtake.flow import TIMESTEPS, warped_levels
from longtake.generation.noise import Noise
from longtake.generation.rolling import InFlight, rolling
from longtake.memory.far import FarShape, Keep
from longtake.memory.policies import PLAIN, Policy
from longtake.memory.rows import Memory
from longtake.memory.stream_memory import MemoryShape
from longtake.memory.view import Attend
from longtake.memory.window import WindowShape
from longtake.models.wan import PromptKeys, WanTransformer


class Schedule(Protocol):
    """A generator of finished latent blocks; serving and training unroll the same one.

    prompts: the prompt of a block by its number, asked for once, when the block begins. learns: whether a block's last
    estimate keeps its graph. end: the number of the block to end before; None is a stream, which never ends. commits:
    told when a finished block is about to be written to memory.
    """

    def __call__(
        self,
        network: WanTransformer,
        memory: Memory,
        prompts: Callable[[int], PromptKeys],
        noise: Noise,
        levels: Sequence[float],
        learns: Callable[[int], bool] = ...,
        end: int | None = ...,
        *,
        commits: Callable[[], None] = ...,
    ) -> Iterator[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One named method. Frames are latent frames; `steps` is a published step list (in thousandths, unshifted).

    far: what is made of frames that left the window; None forgets them. near: how the window is attended.
    policy: what else makes it the memory of a paper: where frames stand, what a change of prompt does, and the like.

    joint: of methods whose network has converted layers (ReHyAt): these see a near span in the place of the window, and
    sums of all before it. Told how many latent frames were far in training at most, it gives the rule of the sums, or
    None, which forgets.
    """

    name: str
    schedule: Schedule
    sink: int
    past: int
    far: FarShape | None = None
    near: Attend = MemoryShape.near
    policy: Policy = PLAIN
    block: int = 3
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    joint: Callable[[int], Keep | None] | None = None

    @property
    def rolls(self) -> bool:
        """Whether the schedule is `rolling`, which denoises as many blocks together as there are steps.

        They come on top of sink and past; where fewer are in flight, what that leaves of the extent is for more of the
        past.
        """
        return self.schedule is rolling

    @property
    def in_flight(self) -> int:
        """How many blocks are denoised together."""
        return len(self.steps) if self.rolls else 1

    @property
    def file_name(self) -> str:
        """The name in letters that every file system takes."""
        return re.sub(r"[^\w.-]+", "_", self.name)

    def schedule_with(self, in_flight: list[InFlight]) -> Schedule:
        """The schedule of a stream whose blocks in flight are kept in this list, see `rolling`: all that goes on from
        one call to the next beside the memory. It stays empty where a block is finished before the next begins.
        """
        return partial(rolling, in_flight=in_flight) if self.rolls else self.schedule

    def memory(self, network: WanTransformer) -> MemoryShape:
        """The memory of this recipe for a network, what is seen at once within the extent it was trained on.

        ValueError for a network that cannot read what the recipe remembers.
        """
        if self.far and not network.config.reads_far:
            raise ValueError(f"recipe {self.name} has a far state, which this network was not trained to read")
        converted, overlap = self._near_spans(network)
        shape = MemoryShape(
            window=WindowShape(sink=self.sink, past=self.past),
            extent=self.policy.reads.extent(network.config.extent),
            far=self.far,
            near=self.near,
            policy=self.policy,
            maps=network.far_maps,
            converted=converted,
            overlap=overlap,
        )
        shape.require_fit(self.block, network.config.extent, self.in_flight)
        return self._rolling(shape, network.config.extent) if self.rolls else shape

    def _near_spans(self, network: WanTransformer) -> tuple[Mapping[int, FarShape | None], int]:
        """What is made of frames that left the near span of each converted layer, and how many frames it overlaps."""
        if self.joint is None:
            return {}, 0
        conversion = network.config.conversion
        if conversion is None:
            raise ValueError(
                f"recipe {self.name} reads through converted layers, and these weights have none: "
                "longtake train attention_matching converts some"
            )
        conversion.span.require_exact(f"recipe {self.name}")
        if conversion.current != self.block:
            raise ValueError(
                f"recipe {self.name} streams blocks of {self.block} latent frames, "
                f"but layers were converted to near spans of {conversion.current}"
            )
        if conversion.turns_with_frames:
            raise ValueError(f"recipe {self.name} cannot stream features that turn with frames")
        rule = self.joint(max(1, conversion.far_frames(network.config.extent)))
        return network.far_shapes(rule) if rule else dict.fromkeys(conversion.layers), conversion.overlap

    def _rolling(self, shape: MemoryShape, extent: int) -> MemoryShape:
        """As much past as the smallest pass, a commit, can read; for commits the latest frames come before the sink."""
        if self.far:
            raise ValueError(f"recipe {self.name} has a far state, which blocks in flight cannot read")
        return replace(shape, window=WindowShape(sink=self.sink, past=extent - self.block), commits_keep_sink=False)

    def levels(self, shift: float) -> tuple[float, ...]:
        """The levels of the steps under a model's shift."""
        return warped_levels(list(self.steps), shift)

    def with_levels(self, count: int) -> Self:
        """The same method with so many denoising steps, 1 to 1000: its own if it has as many, which may be uneven
        (CausVid's are), or else evenly spaced ones: 2 are 1000 and 500.

        ValueError for any other number.
        """
        if not isinstance(count, int) or not 1 <= count <= TIMESTEPS:
            raise ValueError(f"the number of levels is a whole number from 1 to {TIMESTEPS}, got {count}")
        if count == len(self.steps):
            return self
        return replace(self, steps=tuple(TIMESTEPS * (count - i) / count for i in range(count)))
