"""Networks in training: which optimiser moves which weights, at which rate; and how they run on the way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longtake import parallel
from longtake.distillation.low_rank import factor
from longtake.distillation.optim import muon_and_adam
from longtake.distillation.trainer import Learner, Run
from longtake.models.wan import WanTransformer

NETWORK_ENDS = ("patch_embedding", "text_embedding", "time_", "head")  # matrices that are not hidden: AdamW's


def at_rank(network: WanTransformer, rank: int) -> None:
    """Let only factors of that rank learn, alike in all processes; 0: whole matrices."""
    if rank:
        factor(network, rank)
        parallel.share_parameters(network)


def learner_of(
    network: WanTransformer, lr: float, far_lr: float, average: float, *, far_only: bool = False
) -> Learner:  # fmt: skip
    """A whole network that learns: hidden matrices by Muon, all else by AdamW. far_only: nothing but what reads what is
    far does, ValueError where nothing reads it.
    """
    apart = _far_group(network, far_lr)
    if far_only and not apart:
        raise ValueError("far_only is for recipes with a far state: nothing else would learn")
    network.requires_grad_(not far_only).train()
    if far_only:
        for parameter in apart[0]["params"]:
            parameter.requires_grad_(True)
        return Learner(network, [torch.optim.AdamW(apart)], average=average)
    return Learner(network, muon_and_adam(network, lr, adamw_only=NETWORK_ENDS, apart=apart), average=average)


def dmd_adam(network: WanTransformer, lr: float, far_lr: float) -> torch.optim.Optimizer:
    """AdamW without momentum, for student and critic of distribution matching."""
    apart = _far_group(network, far_lr)
    own = {parameter for group in apart for parameter in group["params"]}
    groups = [{"params": [p for p in network.parameters() if p not in own]}, *apart]
    on_gpu = next(network.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=(0.0, 0.99), weight_decay=0.01, fused=on_gpu)


def _far_group(network: WanTransformer, far_lr: float) -> list[dict[str, Any]]:
    """Projections, maps and features of what is far, where there are any: with a rate of their own, and no decay."""
    readers = [*network.projections, *network.far_maps.values(), *network.features.values()]
    far = [parameter for reader in readers for parameter in reader.parameters()]
    return [{"params": far, "lr": far_lr, "weight_decay": 0.0}] if far else []


@torch.no_grad()
def far_weights(network: WanTransformer) -> dict[str, Tensor]:
    """The metric of the projections of what is far: the norm of their weights."""
    weights = [projection.weight for projection in network.projections]
    return {"far_weights": torch.cat(weights).norm()} if weights else {}


def compile_for(run: Run, *networks: WanTransformer) -> None:
    """Compile the layers on a GPU; elsewhere leave them."""
    if run.device.type == "cuda":
        for network in networks:
            parallel.compile_layers(network.blocks, ("before_attention", "after_attention"))


@contextmanager
def resting(learner: Learner) -> Iterator[None]:
    """The averaged parameters in place, no graphs, and nothing compiled anew for shapes that come up once."""
    learner.swap_average()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    learner.swap_average()
