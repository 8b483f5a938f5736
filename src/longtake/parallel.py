"""Many processes, compiled layers: applied to a model from outside, so that no model or loss knows of it."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn


def join() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this process; joins the others when started by torchrun."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size(), device


def leave() -> None:
    """Part from the other processes; nothing to do when there are none."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange."""
    if not distributed.is_initialized():
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:  # a part that this process did not use counts as 0
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def from_first(value: float, device: torch.device) -> float:
    """The first process's value, for decisions that all must take alike."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    distributed.broadcast(shared, 0)
    return shared.item()


def share_parameters(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if distributed.is_initialized():
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)


def compile_layers(layers: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Compile the named methods of each layer; layers of one class share the compiled code.

    A student, its teacher and its critic together meet more shapes than torch allows one function by default.
    """
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        for method in methods:
            setattr(layer, method, torch.compile(getattr(layer, method), dynamic=False))


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over the processes."""
    if distributed.is_initialized():
        value = value.detach().clone()
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value
