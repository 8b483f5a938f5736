"""Layers that recompute in backward learn the very same, through a roll-out's memory too."""

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tests import tiny

from longtake import parallel
from longtake.distillation.pretrain import Clips, flow_loss
from longtake.distillation.rollout import rollout, windows
from longtake.generation.blockwise import blockwise
from longtake.generation.recipe import Schedule
from longtake.memory.stream_memory import MemoryShape
from longtake.memory.window import WindowShape
from longtake.models.features import Conversion
from longtake.models.wan import WanTransformer, converted

SINK_AND_PAST = MemoryShape(window=WindowShape(sink=3, past=3), extent=15)
METHODS = ("before_attention", "after_attention")


def rolled(made: WanTransformer, schedule: Schedule = blockwise, shape: MemoryShape = SINK_AND_PAST) -> torch.Tensor:
    """Six blocks, so that the sink and the window's end both pass; the last three learn."""
    keys, noise = made.prompt_keys(tiny.text()), tiny.noise(7)
    return rollout(schedule, made, shape, lambda block: keys, noise, tiny.LEVELS, blocks=6, learning=3).square().mean()


def windowed(made: WanTransformer) -> torch.Tensor:
    return rolled(made, functools.partial(windows, offset=1), tiny.rolling_recipe().memory(made))


def flowed(made: WanTransformer) -> torch.Tensor:
    torch.manual_seed(1)
    size = (2, 6, *tiny.LATENTS[1:])
    prompt_BF = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, 6)
    clips = Clips(torch.randn(size).double(), tiny.text(2, prompts=2), prompt_BF, torch.zeros(2, 6, *size[3:]).double())
    return flow_loss(made, clips, 3.0, 5.0)


def gradients(made: WanTransformer, loss_of: Callable[[WanTransformer], torch.Tensor]) -> dict[str, torch.Tensor]:
    loss_of(made).backward()
    return {name: p.grad for name, p in made.named_parameters()}


@pytest.mark.parametrize("loss_of", [rolled, windowed, flowed])
def test_checkpointed_layers_have_the_same_gradients(loss_of: Callable) -> None:
    plain, made = gradients(tiny.network(), loss_of), tiny.network()
    calls = counted(made)
    parallel.checkpoint_layers(made.blocks, METHODS)
    loss = loss_of(made)
    forward = calls.total()
    torch.testing.assert_close(gradients(made, lambda _: loss), plain, rtol=0, atol=0)
    assert calls.total() > forward, "nothing was computed again"


def test_layers_computed_again_whole_have_the_same_gradients() -> None:
    """Exact and converted ones, their attention included."""

    def half_converted() -> WanTransformer:
        return converted(tiny.network(), Conversion(layers=(0, 2), current=2), far_tokens=18)

    plain, made = gradients(half_converted(), flowed), half_converted()
    calls = counted(made)
    parallel.checkpoint_layers([made], ("through_layer",))
    loss = flowed(made)
    assert calls.total() == 2 * 3
    torch.testing.assert_close(gradients(made, lambda _: loss), plain, rtol=0, atol=0)
    assert calls.total() == 2 * 2 * 3, "not every layer was computed again, once"


def test_without_gradients_nothing_changes() -> None:
    plain, made = tiny.network(), tiny.network()
    calls, plain_calls = counted(made), counted(plain)
    parallel.checkpoint_layers(made.blocks, METHODS)
    with torch.no_grad():
        loss, expected = flowed(made), flowed(plain)
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert calls == plain_calls


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch meets its own warning
@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_goes_around_compiled_layers(monkeypatch: pytest.MonkeyPatch, *, whole: bool) -> None:
    plain, made = gradients(tiny.network(), flowed), tiny.network()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    parallel.compile_layers(made.blocks, METHODS)
    parallel.checkpoint_layers(*([made], ("through_layer",)) if whole else (made.blocks, METHODS))
    torch.testing.assert_close(gradients(made, flowed), plain)


def counted(made: WanTransformer) -> Counter[str]:
    """How often each method of the layers runs, by name."""
    calls: Counter[str] = Counter()

    def counting(name: str, method: Callable) -> Callable:
        def call(*arguments: object) -> object:
            calls[name] += 1
            return method(*arguments)

        return call

    for block in made.blocks:
        for name in METHODS:
            setattr(block, name, counting(name, getattr(block, name)))
    return calls
