"""One file of numerical test vectors: its description, weights, inputs, and outputs to compare with."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longtake.models.wan import WanConfig, WanTransformer


@dataclass(frozen=True)
class Fixture:
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    compared: set[str] = field(default_factory=set)

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def compare(self, name: str, got: Tensor) -> None:
        """Assert that an output agrees within the file's tolerance; whole numbers must be equal."""
        expected = self.outputs[name]
        self.compared.add(name)
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        if not expected.is_floating_point():
            assert torch.equal(got.to(expected.dtype), expected), f"{name} differs"
            return
        tolerance = self.meta["tolerance"]
        atol = tolerance["atol_per_output"].get(name, tolerance["atol"])
        torch.testing.assert_close(
            got.to(expected.dtype), expected, atol=atol, rtol=tolerance["rtol"], msg=lambda text: f"{name}: {text}"
        )


def read_fixture(path: Path) -> Fixture:
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["fixture"])
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "input": {}, "output": {}}
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
            group, name = key.split(".", 1)
            groups[group][name] = file.get_tensor(key)
    return Fixture(meta, groups["weights"], groups["input"], groups["output"])


def kind_of(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fixture"])["kind"]


def network_of(fixture: Fixture) -> WanTransformer:
    """The transformer that a file describes, with its weights."""
    config = fixture.config
    network = WanTransformer(
        WanConfig(
            dim=config["dim"],
            heads=config["num_heads"],
            ffn_dim=config["ffn_dim"],
            layers=config["num_layers"],
            text_dim=config["text_dim"],
            channels=config["in_dim"],
            patch=config["patch_size"][1],
            level_dim=config["freq_dim"],
            rotary_split=tuple(config["rope_split_dims"]),
            reads_far=any(".linear_proj." in name for name in fixture.weights),
        )
    )
    network.load_state_dict(fixture.weights, strict=True)
    return network.eval()


def swap_frames_channels(x: Tensor) -> Tensor:
    """[B, C, F, H, W] to [B, F, C, H, W] and back."""
    return x.transpose(1, 2)
