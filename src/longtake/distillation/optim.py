"""Optimisers for matrices and for everything else.

torch has a Muon of its own, which takes one matrix at a time and no kernels; at our sizes its many small products cost
more than the step it follows. This one turns all matrices of one shape together.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by its nearest orthogonal one (Jordan et al., 2024), scaled as Adam's updates.

    The scale 0.2 sqrt(longer side) is that of Moonlight (arXiv 2502.16982), so AdamW's rates carry over. Kernels of
    convolutions count as matrices with one row per output channel.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(_matrix_shape(parameter), []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_alike(parameters, shape, group)

    def _step_alike(self, parameters: list[Tensor], shape: tuple[int, int], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
        turned = orthogonalized(torch.stack([u.reshape(shape) for u in updates]))
        scale = 0.2 * max(shape) ** 0.5 * group["lr"]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            parameters, [t.reshape_as(p).to(p.dtype) for t, p in zip(turned, parameters, strict=True)], alpha=-scale
        )


def orthogonalized(matrices: Tensor) -> Tensor:
    """Push the singular values of [K, R, C] matrices towards 1 by five Newton-Schulz steps in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315  # coefficients of Jordan et al., chosen for a steep slope at 0
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter.numel() // parameter.shape[0]


def muon_and_adam(
    module: nn.Module, lr: float, *, adamw_only: tuple[str, ...] = (), apart: Sequence[dict[str, Any]] = ()
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and kernels, AdamW for vectors and for the parts whose names start with `adamw_only`.

    apart: groups of parameters with settings of their own, AdamW's too.
    """
    own = {parameter for group in apart for parameter in group["params"]}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter in own:
            continue
        hidden = parameter.ndim >= 2 and min(_matrix_shape(parameter)) > 1 and not name.startswith(adamw_only)
        (matrices if hidden else others).append(parameter)
    groups = [{"params": others}, *apart]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=others[0].is_cuda)
    return [Muon(matrices, lr=lr), adam]
