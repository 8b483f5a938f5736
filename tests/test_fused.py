"""Streams by fused kernels and recorded graphs are those of the plain network, within rounding."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtake.generation.stream import Engine
from longtake.recipes import RECIPES, fused
from tests import tiny

METHODS = ["self_forcing", "hybrid_forcing", "rolling_forcing", "longlive", "memflow", "rehyat"]


def test_without_a_gpu_an_engine_stays_as_it_is() -> None:
    engine = tiny.engine()
    assert fused(engine) is engine
    assert engine.circumstances["passes"] == "eager"


class TextOnGPU(tiny.AnyText):
    def encode(self, prompts: Sequence[str]) -> Tensor:
        return super().encode(prompts).cuda()


def latents(engine: Engine, blocks: int) -> list[Tensor]:
    made: list[Tensor] = []
    decode = engine.codec.decode

    class Noting:
        """The codec, that tells what it was given."""

        def __getattr__(self, name: str) -> object:
            return getattr(engine.codec, name)

        def decode(self, latents_BFCHW: Tensor, state: object = None) -> object:
            made.append(latents_BFCHW.clone())
            return decode(latents_BFCHW, state)

    with replace(engine, codec=Noting()).stream("a ball") as stream:
        for block in range(blocks):
            if block == blocks - 3:
                stream.redirect("a cube")
            next(stream)
    return made


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU alone")
@pytest.mark.parametrize("name, maps", [*((name, False) for name in METHODS), ("hybrid_forcing", True)])
def test_streams_on_a_gpu_agree_with_the_plain_network(name: str, maps: bool) -> None:
    recipe = tiny.rolling_recipe() if name == "rolling_forcing" else RECIPES[name]()
    plain = tiny.engine(recipe)
    plain = replace(plain, network=tiny.with_drawn_maps(plain.network)) if maps else plain
    for projection in plain.network.projections:
        torch.nn.init.normal_(projection.weight, std=0.1)
    plain.network.cuda()
    plain.codec.cuda()
    plain = replace(plain, text=TextOnGPU())
    quick = fused(replace(plain, network=copy.deepcopy(plain.network)))
    assert quick.circumstances["passes"] == "fused"
    embedded: list[object] = []
    quick.network.time_projection.register_forward_hook(lambda *given: embedded.append(given))
    for _ in range(2):  # the second time from the records of the first
        for one, other in zip(latents(plain, 14), latents(quick, 14), strict=True):
            torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
    assert 0 < len(embedded) < 10, "levels are embedded once for all blocks and both streams"


def test_another_gpu_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(Engine, "device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"not cuda:1.*leave out --compile"):
        fused(tiny.engine())
