"""The bytes of tensors that are alive at the same time, counted one storage at a time."""

import weakref
from collections import Counter
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators return while it is on: how many bytes live `now`, and at most (`peak`).

    Both are by place, "device", and "host" for what was moved there by `move`. Tensors that were made before
    are counted as soon as a view of them is taken; make them inside, and subtract what is there.
    """

    def __init__(self, fake: bool = False):  # whether to count fake tensors, or real ones
        super().__init__()
        self.fake = fake
        self.now, self.peak = Counter(), Counter()
        self.storages: dict[int, list] = {}  # address -> [place, bytes]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls us again with the local tensors
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            # DTensor asks about shapes by fake tensors, in real runs too.
            if isinstance(tensor, Tensor) and isinstance(tensor, FakeTensor) == self.fake:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, stored: torch.UntypedStorage) -> None:
        key = stored._cdata
        if key not in self.storages:
            self.storages[key] = ["device", 0]
            weakref.finalize(stored, self._forget, key)
            self._set(key, stored.nbytes())

    def _set(self, key: int, size: int) -> None:
        if key in self.storages:
            place, before = self.storages[key]
            self.storages[key][1] = size
            self.now[place] += size - before
            self.peak[place] = max(self.peak[place], self.now[place])

    def _forget(self, key: int) -> None:
        self._set(key, 0)
        del self.storages[key]

    def move(self, tensor: Tensor) -> None:
        """From now on count it as in host memory."""
        key = tensor.untyped_storage()._cdata
        size = self.storages[key][1]
        self._set(key, 0)
        self.storages[key][0] = "host"
        self._set(key, size)

    def start_again(self) -> None:
        """Forget the peak so far."""
        self.peak = Counter(self.now)

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_and_count(stored, size):  # FSDP frees gathered parameters so, which is no operator
            resize(stored, size)
            self._set(stored._cdata, size)

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patch.stop()
