"""Kernels under Triton's interpreter touch the tensors that they were given and nothing beside them.

A GPU faults where memory ends, or reads what lies there; the interpreter reads what lies there. Here every load, store
and atomic operation is looked at: the places that its mask allows must lie within one of the launch's tensors, all of
them in the same one.
"""

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor

TRITON_INTERPRETER = "triton.runtime.interpreter"  # imported with triton, if kernels are to be interpreted


def guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are launched from here on are watched, if any are interpreted."""
    interpreter = sys.modules.get(TRITON_INTERPRETER)
    if interpreter is None:
        return
    memory = _Memory(interpreter._interpreter)
    plain = interpreter.GridExecutor._init_args_hst

    def with_extents(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = plain(self, args, kwargs)
        given = (getattr(x, "base", x) for x in (*on_host[0], *on_host[1].values()))  # a descriptor's tensor
        memory.extents = [_extent(x) for x in given if isinstance(x, Tensor)]
        return on_host

    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", with_extents)


class _Memory:
    """The interpreter's access to memory. `extents`: addresses of the launch's tensors, from the first byte to behind
    the last. IndexError for places outside."""

    def __init__(self, plain: ModuleType):
        self._plain = plain
        self.extents: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def load(self, places: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        self._check(places, mask, np.dtype(dtype).itemsize)
        return self._plain.load(places, mask, other, dtype)

    def store(self, places: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        self._check(places, mask, values.itemsize)
        self._plain.store(places, values, mask)

    def atomic_cas(self, places: np.ndarray, expected: np.ndarray, values: np.ndarray, order: Any) -> np.ndarray:
        self._check(places, np.True_, values.itemsize)
        return self._plain.atomic_cas(places, expected, values, order)

    def atomic_rmw(self, kind: Any, places: np.ndarray, values: np.ndarray, mask: np.ndarray, order: Any) -> np.ndarray:
        self._check(places, mask, values.itemsize)
        return self._plain.atomic_rmw(kind, places, values, mask, order)

    def _check(self, places: np.ndarray, mask: np.ndarray | np.bool, size: int) -> None:
        touched = places[np.broadcast_to(mask, places.shape)]
        if not touched.size:
            return
        first, behind = int(touched.min()), int(touched.max()) + size
        if not any(start <= first and behind <= end for start, end in self.extents):
            raise IndexError(f"a kernel touches bytes {_from_nearest(first, behind, self.extents)}")


def _extent(x: Tensor) -> tuple[int, int]:
    """Nothing between the first and the last number is left out, also where a tensor has gaps."""
    numbers = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + numbers * x.element_size()


def _from_nearest(first: int, behind: int, extents: Iterable[tuple[int, int]]) -> str:
    start, end = min(extents, key=lambda extent: max(extent[0] - first, behind - extent[1]), default=(0, 0))
    return f"{first - start} to {behind - start - 1} of a tensor of {end - start}"
