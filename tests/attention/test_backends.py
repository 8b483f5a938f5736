"""Every backend is right before it is used, the fastest is taken, and a machine with a CPU alone notices nothing."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longtake.attention import backends, reference
from longtake.attention.backends import (
    BACKENDS,
    FORCED,
    Backend,
    by_products,
    by_torch,
    choose,
    fastest,
    preferred,
    verdict,
)
from longtake.attention.dense import dense

CPU = torch.device("cpu")
KIND = (CPU, torch.float32, 16)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch):
    """As in a new process, which was told nothing."""
    monkeypatch.delenv(FORCED, raising=False)
    monkeypatch.setattr(backends, "_choices", {})
    verdict.cache_clear()
    yield
    verdict.cache_clear()


def tensors(queries: int = 20, keys: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 16, generator=draw) for n in (queries, keys, keys))  # type: ignore[return-value]


def noted(name: str, monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor] = by_torch) -> list[int]:
    """Put a backend that runs here in the place of one of a GPU; holds the number of keys of each of its calls."""
    calls: list[int] = []

    def attending(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(k.shape[1])
        return attend(q, k, v)

    monkeypatch.setitem(BACKENDS, name, Backend(attending, on_cpu=True))
    return calls


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.missing(CPU) is None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_here_is_right(name: str, dtype: torch.dtype) -> None:
    assert verdict(name, CPU, dtype, 16) is None
    q, k, v = (x.to(dtype) for x in tensors())
    off = backends.distance(BACKENDS[name].attend(q, k, v), reference.dense(q.double(), k.double(), v.double()))
    assert off <= backends.tolerance(dtype)


def test_the_triton_kernel_answers_as_all_of_its_blocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plain form in its place, as it is compiled on a GPU alone."""
    triton = pytest.importorskip("longtake.attention.block_sparse_triton")
    monkeypatch.setattr(triton, "attend_blocks", reference.attend_blocks)
    q, k, v = tensors(90, 130)
    torch.testing.assert_close(BACKENDS["triton"].attend(q, k, v), reference.dense(q, k, v))


@pytest.mark.parametrize("made", [lambda x: x, lambda x: (x, None)], ids=["answer", "answer and log-sum-exp"])
def test_flash_attention_hands_over_its_answer(made: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        flash_attn_func = staticmethod(lambda q, k, v: made(by_torch(q, k, v)))

    monkeypatch.setattr(backends, "import_module", lambda name: Package)
    q, k, v = tensors()
    assert torch.equal(BACKENDS["fa3"].attend(q, k, v), by_torch(q, k, v))


def test_a_wrong_kernel_is_refused_with_a_message_and_said_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    noted("efficient", monkeypatch, lambda q, k, v: 1.01 * by_torch(q, k, v))
    with pytest.warns(UserWarning, match=r"attention backend efficient is not used on cpu.*answers wrong: 0\.01"):
        choice = choose(*tensors())
    assert "answers wrong" in choice.refused["efficient"] and "efficient" not in choice.seconds
    assert "answers wrong" in choose(*tensors()).refused["efficient"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_is_wrong(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    noted("efficient", monkeypatch, lambda q, k, v: by_torch(q, k, v) * number)
    with pytest.warns(UserWarning, match="answers wrong"):
        assert verdict("efficient", *KIND)


def test_a_kernel_that_breaks_off_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise TypeError("no such architecture\nand more")

    noted("fa4", monkeypatch, broken)
    assert choose(*tensors()).refused["fa4"] == "no such architecture"
    assert choose(*tensors()).refused["cudnn"] == "runs on a GPU alone"


def test_the_fastest_is_taken_and_the_earlier_of_two_that_are_close() -> None:
    assert preferred({"flash": 1.0, "efficient": 0.5}, gain=1.1) == "efficient"
    assert preferred({"efficient": 0.95, "flash": 1.0}, gain=1.1) == "flash"
    assert preferred({"efficient": 0.95, "flash": 1.0}, gain=1.03) == "efficient"
    assert preferred({"triton": 1.0}, gain=1.1) == "triton"


def test_a_shape_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"flash": 2.0, "efficient": 1.0}
    calls = noted("efficient", monkeypatch)
    tried: list[int] = []

    def timed(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> float:
        tried.append(k.shape[1])
        return seconds["efficient" if attend is BACKENDS["efficient"].attend else "flash"]

    monkeypatch.setattr(backends, "_seconds", timed)
    for keys in (50, 50, 60, 50):
        q, k, v = tensors(keys=keys)
        fastest(q, k, v)(q, k, v)
    assert tried == [50] * 3 * backends.ROUNDS + [60] * 3 * backends.ROUNDS, (
        "three backends for each shape; the one that holds all scores is not among them"
    )
    assert calls == [backends.KEYS, 50, 50, 60, 50], "after one comparison with the definition"
    assert {shape.keys: choice.name for shape, choice in backends.choices().items()} == {
        50: "efficient",
        60: "efficient",
    }


def read(readings: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have trials of these backends alone, right ones that read so in each round; holds the order of their calls."""
    order: list[str] = []

    def timed(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> float:
        (name,) = (name for name, backend in backends.BACKENDS.items() if backend.attend is attend)
        order.append(name)
        reading = readings[name][order.count(name) - 1]
        if math.isnan(reading):
            raise RuntimeError("no room")
        return reading

    def right() -> Callable[..., Tensor]:
        return lambda q, k, v: by_torch(q, k, v)

    monkeypatch.setattr(backends, "BACKENDS", {name: Backend(right(), on_cpu=True) for name in readings})
    monkeypatch.setattr(backends, "_seconds", timed)
    return order


@given(
    st.tuples(*(st.floats(1e-6, 1.0) for _ in range(3))),
    st.lists(st.floats(0.0, 1.0), min_size=3 * backends.ROUNDS, max_size=3 * backends.ROUNDS),
    st.tuples(*(st.integers(0, backends.ROUNDS - 1) for _ in range(3))),
)
def test_what_disturbs_all_readings_but_one_decides_nothing(
    true: tuple[float, ...], added: list[float], undisturbed: tuple[int, ...]
) -> None:
    names = ["cudnn", "flash", "efficient"]
    readings = {}
    for number, (name, own) in enumerate(zip(names, true, strict=True)):
        readings[name] = [own + more for more in added[number :: len(names)]]
        readings[name][undisturbed[number]] = own
    verdict.cache_clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        order = read(readings, monkeypatch)
        choice = choose(*tensors())
        assert order == names * backends.ROUNDS, "in turn"
        assert choice.seconds == dict(zip(names, true, strict=True)) and choice.name == preferred(
            choice.seconds, backends.GAIN
        )


def test_one_that_breaks_off_in_a_later_round_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = backends.ROUNDS - 1
    order = read({"cudnn": [0.1, math.nan], "flash": [1.0] * (rounds + 1)}, monkeypatch)
    choice = choose(*tensors())
    assert choice == ("flash", {"flash": 1.0}, {"cudnn": "no room"})
    assert order == ["cudnn", "flash"] * 2 + ["flash"] * (rounds - 1), "and is not tried again"


def test_the_one_that_holds_all_scores_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"math": BACKENDS["math"]})
    assert choose(*tensors()).name == "math"
    monkeypatch.setattr(backends, "BACKENDS", {"cudnn": BACKENDS["cudnn"]})
    with pytest.raises(ValueError, match="no attention backend runs on cpu"):
        choose(*tensors())


def test_dense_attention_takes_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = noted("fa4", monkeypatch)
    q, k, v = tensors()
    dense(q, k, v)
    assert calls == [] and not backends.choices(), "a CPU tries nothing"
    monkeypatch.setenv(FORCED, "fa4")
    dense(q, k, v)
    assert calls == [backends.KEYS, 50]
    dense(q.requires_grad_(), k, v).sum().backward()
    dense(q.detach(), k, v, torch.ones(20, 50, dtype=torch.bool))
    assert calls == [backends.KEYS, 50], "neither where gradients pass, nor under a mask"


@pytest.mark.parametrize("dtype, keys, taken", [
    (torch.bfloat16, backends.AT_ONCE + 1, True), (torch.bfloat16, 50, False), (torch.float32, 300, False),
])  # fmt: skip
def test_a_cpu_goes_by_a_rule(dtype: torch.dtype, keys: int, taken: bool) -> None:
    """In bfloat16 long windows are plain products, each time; in float32 torch's kernel is as fast."""
    q, k, v = (x.to(dtype) for x in tensors(600, keys))
    assert torch.equal(dense(q, k, v), (by_products if taken else by_torch)(q, k, v))
    assert not torch.equal(by_products(q, k, v), by_torch(q, k, v))


@pytest.mark.parametrize(
    "name, said",
    [
        ("quick", "no attention backend 'quick': there are cudnn, fa4"),
        ("cudnn", "on cpu in torch.float32: runs on a GPU"),
    ],
)
def test_one_that_cannot_be_taken_is_refused(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, name)
    with pytest.raises(ValueError, match=said):
        dense(*tensors())


def test_what_is_only_counted_is_not_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "triton")  # runs on a GPU alone
    assert dense(*(x.to("meta") for x in tensors())).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_chooses_one_that_is_right() -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(200, 900))
    off = backends.distance(dense(q, k, v), reference.dense(q.double(), k.double(), v.double()))
    assert off <= backends.tolerance(torch.bfloat16)
    (choice,) = backends.choices().values()
    assert {"flash", "efficient"} <= set(choice.seconds) and "math" not in choice.seconds
    assert not [reason for reason in choice.refused.values() if "wrong" in reason]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_chooses_the_same_each_time() -> None:
    """For the keys of a prompt, over which kernels take some tens of microseconds: no more than their launch."""
    q, k, v = (torch.randn(1, n, 12, 128, device="cuda", dtype=torch.bfloat16) for n in (4680, 512, 512))
    assert len({choose(q, k, v).name for _ in range(5)}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_reading_is_the_kernel_s_and_not_the_host_s() -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors())
    slept = 2e-4

    def launched_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        time.sleep(slept)
        return by_torch(q, k, v)

    assert min(backends._seconds(launched_late, q, k, v) for _ in range(backends.ROUNDS)) < slept / 2
