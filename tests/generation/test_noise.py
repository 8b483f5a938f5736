import torch

from longtake.generation.noise import DrawnAhead, SeededNoise, generator_for


def noise(*seeds: int) -> SeededNoise:
    return SeededNoise(seeds, (2, 3, 4, 5), "cpu", torch.float32)


def test_noise_depends_on_seed_block_and_step_and_on_nothing_else() -> None:
    drawn = [noise(seed)(block, step) for seed in (0, 1) for block in (0, 1) for step in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    torch.randn(100)
    assert torch.equal(noise(1)(1, 0), drawn[6])


def test_a_batch_of_seeds_is_their_noise_side_by_side() -> None:
    both = noise(5, 9)(3, 2)
    assert torch.equal(both[:1], noise(5)(3, 2)) and torch.equal(both[1:], noise(9)(3, 2))


def test_noise_that_was_drawn_ahead_is_the_same() -> None:
    drawn: list[tuple[int, int]] = []

    def noted(block: int, step: int) -> torch.Tensor:
        drawn.append((block, step))
        return noise(5)(block, step)

    ahead = DrawnAhead(noted)
    ahead.draw(3, 0)
    assert drawn == [(3, 0)]
    asked = [(3, 0), (3, 1), (3, 0)]
    assert all(torch.equal(ahead(*key), noise(5)(*key)) for key in asked) and drawn == asked
    ahead.draw(4, 0)
    assert torch.equal(ahead(6, 0), noise(5)(6, 0))


def test_noise_is_standard_normal_at_any_block() -> None:
    drawn = SeededNoise([2**62], (64, 64), "cpu", torch.float32)(10**9, 3)  # type: ignore[arg-type]
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05


def test_a_batch_of_noise_has_the_type_that_was_asked_for() -> None:
    drawn = SeededNoise([5], (2, 3, 4, 5), "cpu", torch.bfloat16)(3, 2)
    assert drawn.dtype == torch.bfloat16 and torch.equal(drawn, noise(5)(3, 2).bfloat16())


def test_keys_are_mixed_as_published_so_that_a_seed_stays_the_same_video() -> None:
    """Known answer: what SplitMix64 gives first from 1234567 on, less its lowest bit."""
    assert generator_for(1234567).initial_seed() == 6457827717110365317 >> 1


def test_keys_are_mixed_in_order() -> None:
    assert generator_for(1, 2).initial_seed() != generator_for(2, 1).initial_seed()
    assert generator_for(0).initial_seed() != generator_for(0, 0).initial_seed()
    assert generator_for(-1).initial_seed() >= 0
