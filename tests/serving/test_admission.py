"""Whether another stream is taken: by number, speed and memory."""

import pytest
import torch

from longtake.generation.take import bytes_of
from longtake.plan import bytes_of_stream, umt5_parameters
from longtake.recipes import recipe_named
from longtake.serving.admission import Busy, Limits, Memory, has_room
from longtake.serving.worker import Worker
from tests import tiny
from tests.serving.fake import FakeEngine
from tests.serving.watching import asked, opened

MANY = Limits(sessions=100)


def test_streams_are_taken_as_far_as_memory_goes():
    engine = FakeEngine(block_seconds=0.001)
    memory = Memory(stream=10, block=30, prompt=20, free=100)  # a tenth is left: 90 hold six and a block of one
    worker = Worker(engine, MANY, memory=lambda: memory, exact=True, clock=engine.clock)
    asked(worker, worker.warm_up("a ball"))
    sessions = [opened(worker) for _ in range(6)]
    with pytest.raises(Busy, match=r"busy, try in 10 s"):
        worker.admit("a ball")
    worker.close(sessions[0])
    opened(worker)


def test_a_pass_over_several_takes_more():
    """Their blocks, and copies of what they keep."""
    memory = Memory(stream=10, block=20, prompt=0, free=100)
    assert memory.holds(7, together=1) and not memory.holds(8, together=1)
    assert memory.holds(3, together=2) and not memory.holds(4, together=2)
    assert has_room(2, MANY, 0.0, memory, together=2) and not has_room(2, MANY, 0.0, memory, together=4)


def test_one_prompt_is_read_at_a_time():
    memory = Memory(stream=10, block=0, prompt=60, free=100)
    assert memory.holds(3, together=3) and not memory.holds(4, together=1)


def test_a_first_stream_is_taken_whatever_it_takes():
    assert has_room(0, MANY, 5.0, Memory(stream=10, block=30, prompt=0, free=1), together=4)
    assert not has_room(1, MANY, 0.0, Memory(stream=10, block=30, prompt=0, free=1), together=1)


@pytest.mark.parametrize("recipe", ["self_forcing_sink", "hybrid_forcing", "rolling_forcing"])
def test_what_a_stream_takes_is_predicted(recipe):
    """As much as one that really runs keeps: its prompt, memory and codec state."""
    engine = tiny.engine(tiny.rolling_recipe() if recipe == "rolling_forcing" else recipe_named(recipe))
    kept, block, prompt = bytes_of_stream(engine)
    with engine.stream("a ball") as stream:
        for _ in range(9):
            next(stream)
        sizes = bytes_of(stream.state())
    real = sum(size for part, size in sizes.items() if part not in ("in_flight", "prompt_keys"))
    assert real <= kept <= 1.5 * real + 1_500_000  # the prompt is as long as UMT5's here
    assert 0 < block < umt5_parameters() < prompt  # its encoder comes to the device for a prompt alone
    assert all(parameter.device == torch.device("cpu") for parameter in engine.network.parameters())
