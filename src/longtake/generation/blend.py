"""Words that go over into others block by block: prompt embeddings between two prompts.

Live systems change a prompt so, by interpolation of its text embeddings over a few blocks, with cross-attention keys
computed anew for each: linear in Krea's realtime-video, linear or slerp in Scope.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

Interpolation = Literal["lerp", "slerp"]

_ALIGNED = 0.01  # the sine of angles so near to 0 or 180 degrees that float32 tells them badly; a line does there


@dataclass(frozen=True)
class Blend:
    """From one embedding to another, [B, L, E] each: block number `begin` + k - 1 stands at k / over, k from 0 on.

    So the first block takes a first step, and the last of them, the one before `end`, is wholly under the other prompt.
    """

    before_BLE: Tensor
    after_BLE: Tensor
    begin: int
    over: int
    by: Interpolation

    @property
    def end(self) -> int:
        return self.begin + self.over

    def at(self, block: int) -> Tensor:
        """The embedding that a block of that number is under."""
        steps = min(max(block - self.begin + 1, 0), self.over)
        return between(self.before_BLE, self.after_BLE, steps / self.over, self.by)


def require_blend(over: int, by: str) -> None:
    """ValueError unless prompts can go over so."""
    if type(over) is not int or over < 1:  # yes and no are whole numbers, too
        raise ValueError(f"words change over 1 block or more, got {over!r}")
    if by not in get_args(Interpolation):
        raise ValueError(f"words are blended by {' or '.join(get_args(Interpolation))}, got {by!r}")


def between(before_BLE: Tensor, after_BLE: Tensor, share: float, by: Interpolation) -> Tensor:
    """Embeddings [B, L, E] that share, 0 to 1, of the way; at either end exactly those given.

    Each of the L rows goes to the row of the same number: a token meets the one in its place in the other prompt, and
    where one prompt is longer, what the encoder gives for padding, zeros for UMT5, rows like others for the embedded
    encoder. slerp turns a row's direction at an even pace along the great circle (Shoemake 1985), while its length goes
    linearly: halfway a row is as long as the two on average, where lerp's is shorter. Where no great circle is singled
    out, by a row of zeros or by the same or opposite directions, a row goes linearly. Computed in float32.
    """
    if share in (0, 1):
        return after_BLE if share else before_BLE
    before, after = before_BLE.float(), after_BLE.float()
    blended = before.lerp(after, share)
    if by == "slerp":
        one, other = normalize(before, dim=-1), normalize(after, dim=-1)
        angle = (one * other).sum(-1, keepdim=True).clamp(-1, 1).acos()
        turned = (one * torch.sin((1 - share) * angle) + other * torch.sin(share * angle)) / torch.sin(angle)
        length, other_length = before.norm(dim=-1, keepdim=True), after.norm(dim=-1, keepdim=True)
        has_circle = (torch.sin(angle) > _ALIGNED) & (length > 0) & (other_length > 0)
        blended = torch.where(has_circle, turned * length.lerp(other_length, share), blended)
    return blended.to(before_BLE.dtype)
