import os

# Before torch is imported: threads that spin for work make a machine with other work many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.guarded import guard

if not torch.cuda.is_available():  # read when Triton is first imported, so before any test is
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes is the machine's affair; some tests ask for other numbers of them.
settings.register_profile("longtake", deadline=None, max_examples=50)
settings.load_profile("longtake")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run of tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True)
def poison() -> None:
    """Fresh memory is filled with NaN, so that what was never written cannot pass for a number."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel that is interpreted reads or writes beside its tensors."""
    guard(monkeypatch)
