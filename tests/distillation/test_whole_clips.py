"""What stages that teach whole clips are told to make of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from torch import Tensor

from longtake.distillation import pretrain
from longtake.distillation.stages import FinetuneStage, TeacherStage, strips, train_finetune, train_teacher, whole_clips
from longtake.distillation.trainer import Run
from longtake.models.features import Conversion
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import converted

FRAMES = 9
WORDS = torch.tensor([[[1, 2, 3], [4, 5, 6]]]).expand(4, -1, -1)


class Clips:
    """A supply of four clips that stay as they are."""

    latents_BFCHW = torch.randn(4, FRAMES, *tiny.LATENTS[1:], generator=torch.Generator().manual_seed(5))
    tokens_BPL = WORDS
    prompt_BF = torch.zeros(4, FRAMES, dtype=torch.long)
    focus_BFHW = torch.zeros(4, FRAMES, *tiny.LATENTS[2:])

    def renew(self) -> None: ...

    def draw(self, count: int, frames: int) -> "Clips":
        assert (count, frames) == (4, FRAMES)
        return self

    def state_dict(self) -> dict[str, int]:
        return {}


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Teaches a network a few steps; gives its weights, and the text, the guidance and the anchor of each lesson."""
    monkeypatch.setattr(strips, "LOOKED_AT", 1)

    def teach(anchored: bool = False, **settings) -> SimpleNamespace:
        torch.manual_seed(1)
        text = WordEncoder(WordEncoderConfig(words=9, length=3, dim=8)).requires_grad_(False)
        torch.nn.init.normal_(text.words.weight)
        seen = SimpleNamespace(lessons=[], said=text(WORDS[0]), nothing=text(0 * WORDS[0, :1])[None])

        def flow_loss(network, clips, shift, focus_weight, anchor=None, nothing=None, guidance=None) -> Tensor:
            seen.lessons.append((clips.text_BPLE.detach(), nothing, guidance, anchor))
            return pretrain.flow_loss(network, clips, shift, focus_weight, anchor, nothing, guidance)

        monkeypatch.setattr(whole_clips, "flow_loss", flow_loss)
        world = SimpleNamespace(
            latent_size=tiny.LATENTS[1:], clips=lambda size, seed, frames: Clips(), show=lambda name, latents: None,
            held_out=lambda count: torch.ones(count, 3, dtype=torch.long),
        )  # fmt: skip
        plain = tiny.network(extent=FRAMES).float().requires_grad_(False)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        run, settings = Run(out, torch.device("cpu")), {"steps": 2, "batch": 4, "sampling_steps": 2} | settings
        if anchored:
            network = converted(plain, Conversion(layers=(0, 2), current=3))
            train_finetune(text, network, world, 3.0, FinetuneStage(anchored=True, **settings), run, plain)
        else:
            network = plain
            train_teacher(text, network, world, TeacherStage(**settings), run)
        seen.weights, seen.teacher = network.state_dict(), plain
        return seen

    return teach


@pytest.mark.parametrize("anchored", [False, True])
def test_a_share_of_clips_is_shown_without_its_prompt(anchored: bool, taught) -> None:
    for share in (0.0, 1.0, 0.5):
        seen = taught(anchored, no_prompt_share=share, steps=1 if share < 0.5 else 6, lr=1e-9)
        silent = [torch.allclose(clip, seen.nothing[0], atol=1e-4) for text, *_ in seen.lessons for clip in text]
        spoken = [torch.allclose(clip, seen.said, atol=1e-4) for text, *_ in seen.lessons for clip in text]
        assert [not one for one in spoken] == silent, "all its prompts or none"
        assert set(silent) == ({False, True} if share == 0.5 else {share == 1})
        assert share != 0.5 or any(any(silent[i : i + 4]) and any(spoken[i : i + 4]) for i in range(0, len(silent), 4))
        held_to = seen.teacher if anchored else None
        assert all(nothing is None and anchor is held_to for _, nothing, _, anchor in seen.lessons)


def test_guided_lessons_are_asked_with_and_without_their_prompt(taught) -> None:
    seen = taught(True, guided=True, no_prompt_share=1.0, guidance=2.0)
    for text, nothing, guidance, anchor in seen.lessons:
        torch.testing.assert_close(text, seen.said.expand_as(text))
        torch.testing.assert_close(nothing, seen.nothing.expand(4, -1, -1, -1))
        assert guidance == 2 and anchor is seen.teacher


@pytest.mark.parametrize("anchored", [False, True])
def test_what_comes_out_is_the_average_of_the_way(anchored: bool, taught) -> None:
    last, mean = (taught(anchored, average=average, steps=3).weights for average in (1e-9, 0.9))
    assert all(not torch.equal(last[name], mean[name]) for name in last if name != "patch_embedding.bias")
