"""How much memory a computation holds on the way, counted and not measured: the same on every machine."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts the bytes that are held of all that is made within, after each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[int] = []
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not any(out.alias_info for out in func._schema.returns):
            storages = [x.untyped_storage() for x in tree_leaves(made) if isinstance(x, Tensor)]
            self._made |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self._made = {storage: size for storage, size in self._made.items() if not storage.expired()}
        self.after.append(sum(self._made.values()))
        return made
