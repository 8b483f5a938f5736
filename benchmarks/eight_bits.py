"""How far products of eight bits are from float32, on the activations of the embedded model at work.

python benchmarks/eight_bits.py [--blocks N] [--device NAME]   # prints JSON

Distances as shares of what float32 gives: of each kind of layer, the mean over its calls in a stream of float32 and the
largest; and of whole passes, on the same noisy latents before the same memory. bfloat16 stands beside them.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import longtake
from longtake.evaluation.steady import machine
from longtake.models.fp8 import EightBitLinear, into_eight_bits
from longtake.models.wan import WanTransformer
from longtake.parallel import mapped_tensors

RECIPE = "self_forcing_sink"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--blocks", type=int, default=6)
    asked.add_argument("--device", default="cpu")
    options = asked.parse_args()
    engine = longtake.load("toy", recipe=RECIPE, device=options.device, dtype=torch.float32)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"fp8": [], "bfloat16": []})
    others = {"fp8": deepcopy(engine.network), "bfloat16": deepcopy(engine.network).bfloat16()}
    into_eight_bits(others["fp8"])
    plain = engine.network
    for name, layer in plain.named_modules():
        twin = others["fp8"].get_submodule(name)
        if isinstance(twin, EightBitLinear):
            kind = name.split(".", 2)[2]
            layer.register_forward_hook(compared(found[kind], twin, others["bfloat16"].get_submodule(name)))
    passes = found["whole pass"]
    watch_passes(plain, others, passes)
    with engine.stream("a red ball bounces over green hills") as stream:
        for _ in islice(stream, options.blocks):
            pass
    rows = {
        kind: {f"{name}_{told.__name__}": told(off) for name, off in errors.items() for told in (mean, max)}
        for kind, errors in sorted(found.items())
    }
    print(json.dumps(vars(options) | {"recipe": RECIPE} | {"rows": rows} | machine(engine.device), indent=1))


def compared(errors: dict[str, list[float]], eight: nn.Module, half: nn.Module) -> Callable[..., None]:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        errors["fp8"].append(share(eight(*given), made))
        errors["bfloat16"].append(share(half(given[0].bfloat16()), made))

    return hook


def watch_passes(plain: WanTransformer, others: dict[str, WanTransformer], errors: dict[str, list[float]]) -> None:
    """Each pass is made by the other networks, too, of a view of their own type."""
    own = plain.forward

    def watched(noisy: Tensor, level: Tensor, prompts: Any, view: Any, *more: Any) -> Tensor:
        made = own(noisy, level, prompts, view, *more)
        for name, other in others.items():
            dtype = other.patch_embedding.weight.dtype
            seen = mapped_tensors((prompts, view), lambda x, to=dtype: x.to(to) if x.ndim > 3 else x)
            errors[name].append(share(other(noisy, level, *seen, *more), made))
        return made

    plain.forward = watched  # type: ignore[method-assign]


def share(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


if __name__ == "__main__":
    main()
