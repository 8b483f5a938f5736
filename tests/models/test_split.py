"""Processes that share out tokens and heads make together what one makes alone."""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.processes import Started, free_port, run_ranks
from tests.test_fused import TextOnGPU, latents
from torch import Tensor

from longtake import parallel
from longtake.cli import main
from longtake.generation.recipe import Recipe
from longtake.generation.stream import Engine
from longtake.models.features import Conversion
from longtake.models.split import split_tokens
from longtake.models.wan import WanConfig, WanTransformer, converted
from longtake.recipes import fused, hybrid_forcing, longlive, memflow, self_forcing_sink, split

RECIPES: dict[str, Callable[[], Recipe]] = {
    "self_forcing_sink": self_forcing_sink,
    "hybrid_forcing": partial(hybrid_forcing, share=0.3, tokens=4),
    "delta": partial(hybrid_forcing, share=0.3, tokens=4, far="delta"),
    "rolling_forcing": tiny.rolling_recipe,
    "longlive": longlive,
}
ON_THE_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, processes take one each")
BLOCKS = 7  # so many that something leaves every window


@pytest.fixture
def place(tmp_path: Path) -> str:
    """A folder where processes find the port they meet at, and leave what they made."""
    (tmp_path / "port").write_text(free_port())
    return str(tmp_path)


def environment(rank: int, folder: str, count: int) -> dict[str, str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}


def join(rank: int, folder: str, count: int) -> None:
    os.environ |= environment(rank, folder, count)
    torch.set_num_threads(1)
    parallel.join()


# One pass

CONFIG = WanConfig(dim=36, heads=6, ffn_dim=32, layers=3, text_dim=8, channels=4, level_dim=16, extent=15)


@torch.no_grad()
def passes(shared: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Two clips with levels and prompts of each frame, before a memory that holds something: velocity and keys."""
    torch.manual_seed(5)
    made = WanTransformer(CONFIG).double()
    old, noisy = torch.randn(2, 2, *tiny.LATENTS, dtype=torch.float64)
    level, memory = torch.rand(2, tiny.BLOCK), tiny.memory(made)
    said, prompt_BF = made.prompt_keys(tiny.text(batch=2, prompts=2)), torch.tensor([[0, 0, 1], [1, 0, 1]])
    if shared:
        split_tokens(made)
    memory.commit(made.keys_to_commit(old, level, said, made.memory_view(memory, old), prompt_BF), tiny.BLOCK)
    rest = level, said, made.memory_view(memory, noisy), prompt_BF
    return made(noisy, *rest), made.keys_to_commit(noisy, *rest)


def pass_of(rank: int, folder: str, count: int) -> None:
    join(rank, folder, count)
    torch.save(passes(shared=True), f"{folder}/{rank}.pt")
    parallel.leave()


@ON_THE_CPU
@pytest.mark.parametrize("count", [2, 3])
def test_a_pass_is_that_of_one_process_and_keys_are_those_of_the_own_heads(place: str, count: int) -> None:
    assert run_ranks(pass_of, place, count, count=count) == [0] * count
    velocity, keys = passes(shared=False)
    own = CONFIG.heads // count
    for rank in range(count):
        theirs, their_keys = torch.load(f"{place}/{rank}.pt")
        torch.testing.assert_close(theirs, velocity, atol=1e-10, rtol=0)
        assert len(their_keys) == len(keys)
        for pair, whole in zip(their_keys, keys, strict=True):
            for got, want in zip(pair, whole, strict=True):
                torch.testing.assert_close(got, want[:, :, rank * own : (rank + 1) * own], atol=1e-10, rtol=0)


# Streams


def engine(recipe: Recipe, dtype: torch.dtype = torch.float64) -> Engine:
    made = tiny.engine(recipe)
    torch.manual_seed(4)
    for projection in made.network.projections:
        torch.nn.init.normal_(projection.weight, std=0.3)
    made.to(dtype)
    return made


def stream(made: Engine) -> tuple[list[Tensor], int]:
    """The latents of a stream that is redirected and cut, and how many bytes its memory holds before."""
    latents: list[Tensor] = []
    decode = made.codec.decode
    made.codec.decode = lambda x, state: latents.append(x.clone()) or decode(x, state)
    with made.stream_batch(["a ball", "a hat"], seeds=[3, 4]) as streams:
        for _ in range(BLOCKS):
            next(streams)
        memory = streams._memory
        assert memory is not None
        held = memory.nbytes()
        streams.redirect(["a cube", "a cat"], over=2)
        for _ in range(3):
            next(streams)
        streams.cut(["a cone", "a cow"], far=0.5)
        for _ in range(2):
            next(streams)
    return latents, held


def streams_of(rank: int, folder: str) -> None:
    join(rank, folder, 2)
    made = {}
    for name, recipe in RECIPES.items():
        own = engine(recipe())
        split(own)
        made[name] = stream(own)
    torch.save(made, f"{folder}/{rank}.pt")
    parallel.leave()


@ON_THE_CPU
def test_streams_are_those_of_one_process_and_each_remembers_half(place: str) -> None:
    assert run_ranks(streams_of, place) == [0, 0]
    theirs = [torch.load(f"{place}/{rank}.pt") for rank in range(2)]
    for name, recipe in RECIPES.items():
        latents, held = stream(engine(recipe()))
        assert all(torch.equal(*pair) for pair in zip(theirs[0][name][0], theirs[1][name][0], strict=True)), name
        for block, (got, want) in enumerate(zip(theirs[0][name][0], latents, strict=True)):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10, msg=f"{name}: block {block}")
        counts = 8 * 2 * 3 if recipe().far else 0  # how many tokens a far state holds, of each clip and layer
        if name != "longlive":  # which keeps latents too
            assert [2 * one[name][1] for one in theirs] == [held + counts] * 2, name


def on_a_gpu(recipe: Recipe) -> None:
    """Streams by fused kernels and recorded graphs, shared out, beside one that is not."""
    made = engine(recipe, torch.float32)
    made.network.cuda()
    made.codec.cuda()
    plain = replace(made, text=TextOnGPU())
    quick = fused(replace(plain, network=copy.deepcopy(plain.network)))
    split(quick)
    for _ in range(2):  # the second time from the records of the first
        for one, other in zip(latents(plain, 14), latents(quick, 14), strict=True):
            torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)


def gpu_streams_of(rank: int, folder: str) -> None:
    join(rank, folder, 2)
    for recipe in (self_forcing_sink(), hybrid_forcing(), tiny.rolling_recipe()):
        on_a_gpu(recipe)
    parallel.leave()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_streams_of_two_gpus_agree_with_the_plain_network(place: str) -> None:
    assert run_ranks(gpu_streams_of, place) == [0, 0]


def test_one_process_alone_goes_on_as_it_was() -> None:
    made = tiny.engine()
    split(made)
    assert "embed" not in vars(made.network)


# What cannot be shared out


def refusals(rank: int, folder: str) -> None:
    join(rank, folder, 2)

    def refusal(call: Callable[..., object], *arguments: object) -> str:
        with pytest.raises(ValueError) as refused:
            call(*arguments)
        return str(refused.value)

    def narrow_pass() -> None:
        made = tiny.network()
        split_tokens(made)
        noisy = torch.zeros(1, 3, 4, 2, 6)
        made(noisy, torch.zeros(1, 3), tiny.prompt(made), made.clip_view(noisy))

    centred = self_forcing_sink()
    centred = replace(centred, near=partial(hybrid_forcing().near.func, share=0.2, centre_heads=True))
    other = tiny.engine()
    if rank:
        other.to(torch.bfloat16)
    said = [
        refusal(split_tokens, WanTransformer(replace(CONFIG, dim=42, heads=7))),
        refusal(narrow_pass),
        refusal(split_tokens, converted(tiny.network(), Conversion(layers=(0,), current=3))),
        refusal(split_tokens, tiny.with_drawn_maps(tiny.network())),
        refusal(split, tiny.engine(memflow())),
        refusal(split, tiny.engine(centred)),
        refusal(split, other),
    ]
    torch.save(said, f"{folder}/{rank}.pt")
    parallel.leave()


@ON_THE_CPU
def test_what_cannot_be_shared_out_is_refused(place: str) -> None:
    assert run_ranks(refusals, place) == [0, 0]
    heads, tokens, layers, maps, bank, centred, differs = torch.load(f"{place}/1.pt")
    assert heads == "7 heads cannot be shared out evenly over 2 processes"
    assert tokens == "3 tokens of a frame cannot be shared out evenly over 2 processes"
    assert layers == maps and "cannot be shared out over processes" in maps
    assert bank.endswith("chooses by all heads at once, which processes cannot share out")
    assert centred.endswith("chooses by all heads at once, which processes cannot share out")
    assert "differ in weights, precision" in differs


# The command line


@ON_THE_CPU
def test_bench_times_one_stream_of_all_processes_and_prints_once(place: str) -> None:
    arguments = ["bench", "stream", "--seconds", "1.5", "--repeats", "1", "--dtype", "float32", "--json"]
    arguments += ["--recipe", "self_forcing_sink"]
    ranks = [Started(main, arguments, **environment(rank, place, 2)) for rank in range(2)]
    first, second = (one.finished() for one in ranks)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert '"processes": 2' in first.stdout and second.stdout == ""
