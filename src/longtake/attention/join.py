"""One answer from what is near and what is far."""

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.attention.linear import Weighed


def added(near_BTND: Tensor, far_BTND: Tensor, project: Callable[[Tensor], Tensor], present_B: Tensor) -> Tensor:
    """Near plus projected far (Hybrid Forcing, 2604.10103).

    A row of the batch with nothing far yet (`present` false) gets nothing, not even the projection's bias.
    """
    projected = project(far_BTND.to(near_BTND.dtype).contiguous())
    return near_BTND + projected * present_B.to(projected.dtype)[:, None, None, None]


def under_one_bar(near_BTND: Tensor, far: Weighed, log_near_BTN: Tensor | None = None) -> Tensor:
    """(e^l near + far above) / (e^l + far below), the joint denominator of ReHyAt (2601.04342); the type of near.

    log_near: the l, which is log of the near part's mass in units of the far part's (log-sum-exp of near scores, less
    a shift c). None is 0: c is the log-sum-exp itself, and a far mass of 1 weighs as much as all that is near. Masses
    are not negative; where the far one is 0, near comes back as it is.

    l may be -inf, where nothing is near. Neither e^l nor its inverse is ever formed: the far part's share is a sigmoid,
    so no l overflows.
    """
    present_BTN = far.below > 0
    below_BTN = torch.where(present_BTN, far.below, 1)
    log_far_BTN = below_BTN.log()
    share_BTN = torch.sigmoid(log_far_BTN if log_near_BTN is None else log_far_BTN - log_near_BTN)
    share_BTN = torch.where(present_BTN, share_BTN, 0)
    near = near_BTND.to(far.above.dtype)
    joined = near + share_BTN.unsqueeze(-1) * (far.above / below_BTN.unsqueeze(-1) - near)
    return joined.to(near_BTND.dtype)
