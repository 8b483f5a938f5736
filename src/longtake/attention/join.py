"""One answer from what is near and what is far."""

from collections.abc import Callable

import torch
from torch import Tensor


def added(near_BTND: Tensor, far_BTND: Tensor, project: Callable[[Tensor], Tensor], present_B: Tensor) -> Tensor:
    """Near plus projected far (Hybrid Forcing, 2604.10103).

    A row of the batch with nothing far yet (`present` false) gets nothing, not even the projection's bias.
    """
    projected = project(far_BTND.to(near_BTND.dtype))
    return near_BTND + torch.where(present_B[:, None, None, None], projected, 0)
