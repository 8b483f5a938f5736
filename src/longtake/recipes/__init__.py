"""The published methods by name, and engines that run them.

Here are the names for users. A method is defined in `methods`, its weights are found, read and written by
`weight_files`, and `engines` and `wan_engines` put both together; other names are imported from these modules.
"""

from longtake.recipes.devices import fused
from longtake.recipes.engines import load
from longtake.recipes.methods import (
    RECIPES,
    causal_forcing,
    causvid,
    hybrid_forcing,
    infinity_rope,
    longlive,
    memflow,
    recipe_named,
    rehyat,
    reward_forcing,
    rolling_forcing,
    rolling_sink,
    self_forcing,
    self_forcing_sink,
)
from longtake.recipes.processes import split
from longtake.recipes.wan_engines import load_random, load_wan
from longtake.recipes.weight_files import MODELS

__all__ = [
    "MODELS",
    "RECIPES",
    "causal_forcing",
    "causvid",
    "fused",
    "hybrid_forcing",
    "infinity_rope",
    "load",
    "load_random",
    "load_wan",
    "longlive",
    "memflow",
    "recipe_named",
    "rehyat",
    "reward_forcing",
    "rolling_forcing",
    "rolling_sink",
    "self_forcing",
    "self_forcing_sink",
    "split",
]
