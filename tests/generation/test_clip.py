import pytest
import torch
from tests import tiny
from torch import Tensor

from longtake.attention import near_span
from longtake.flow import guided
from longtake.generation.clip import sample_clip
from longtake.models.features import Conversion
from longtake.models.wan import converted


def test_a_clip_follows_the_guided_velocity_down_to_level_zero() -> None:
    made = tiny.network()
    said, nothing = tiny.prompt(made, seed=1), tiny.prompt(made, seed=2)
    noise = torch.randn(1, 6, *tiny.LATENTS[1:], dtype=torch.float64)
    steps: list[int] = []
    got = sample_clip(made, noise, said, nothing, (1.0, 0.4), 3.0, on_step=lambda step, x: steps.append(step))
    with torch.no_grad():
        x = noise
        for level, lower in ((1.0, 0.4), (0.4, 0.0)):
            level_BF = torch.full((1, 6), level)
            view = made.clip_view(x)
            v = guided(made(x, level_BF, said, view), made(x, level_BF, nothing, view), 3.0)
            x = x + (lower - level) * v
    torch.testing.assert_close(got, x)
    assert steps == [0, 1]


def test_a_clip_may_hold_two_prompts() -> None:
    made = tiny.network()
    both = made.prompt_keys(tiny.text(prompts=2))
    noise = torch.randn(1, 4, *tiny.LATENTS[1:], dtype=torch.float64)
    first = torch.zeros(1, 4, dtype=torch.long)
    one = sample_clip(made, noise, both, tiny.prompt(made), (1.0, 0.5), 2.0, first)
    same = sample_clip(made, noise, both.select(torch.tensor([0])), tiny.prompt(made), (1.0, 0.5), 2.0)
    torch.testing.assert_close(one, same)
    changed = sample_clip(made, noise, both, tiny.prompt(made), (1.0, 0.5), 2.0, torch.tensor([[0, 0, 1, 1]]))
    assert not torch.allclose(changed, one)


def clip_of(frames: int, conversion: Conversion | None) -> Tensor:
    """A clip by a network some of whose layers are converted."""
    made = converted(tiny.network(), conversion)
    noise = torch.randn(1, frames, *tiny.LATENTS[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return sample_clip(made, noise, tiny.prompt(made), tiny.prompt(made, seed=2), (1.0, 0.5), 2.0)


def test_converted_layers_whose_near_span_is_the_clip_change_nothing_and_others_do() -> None:
    none = clip_of(7, None)
    wide, narrow = (clip_of(7, Conversion(layers=(0, 2), current=current)) for current in (7, 2))
    torch.testing.assert_close(wide, none, atol=1e-12, rtol=1e-12)
    assert narrow.isfinite().all() and not torch.allclose(narrow, none, atol=1e-3)


def test_converted_layers_see_no_more_keys_at_once_in_longer_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, dense = list[int](), near_span.dense

    def counting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(k.shape[1])
        return dense(q, k, v)

    monkeypatch.setattr(near_span, "dense", counting)
    most = []
    for frames in (6, 9, 15):
        seen.clear()
        clip_of(frames, Conversion(layers=(0, 1, 2)))
        most.append(max(seen))
    assert most == [4 * 2 * 3] * 3  # frames, rows, columns
