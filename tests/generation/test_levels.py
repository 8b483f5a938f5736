import torch

from longtake.generation.levels import level_tensor


def test_every_frame_of_every_clip_has_the_level_in_its_place() -> None:
    levels, latents = [0.5, 0.5, 1.0, 0.25, 0.5], torch.zeros(2, 5, 1, 1, 1, dtype=torch.bfloat16)
    made = level_tensor(levels, latents)
    assert made.dtype == torch.float32 and made.tolist() == [levels] * 2
    assert level_tensor(levels, latents) is made, "what is made of it may be kept"


def test_what_was_made_for_a_stream_serves_where_gradients_pass() -> None:
    latents = torch.ones(1, 2, 1, 1, 1, requires_grad=True)
    with torch.inference_mode():
        level_tensor([0.125, 0.375], latents)
    (level_tensor([0.125, 0.375], latents)[..., None, None, None] * latents).sum().backward()
    assert latents.grad is not None and latents.grad.flatten().tolist() == [0.125, 0.375]
