"""What a CUDA graph does, on a CPU: operators recorded with their tensors, then done again on the same memory.

Stricter than a GPU where it can be: whatever would make the host wait for the device, or carry a number of the host's
into the graph, is an error, recording leaves no result behind, and what was computed meanwhile is overwritten.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "lift_fresh",
}  # fmt: skip
FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.frombuffer}
TO_HOST = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class Refused(AssertionError):
    """A captured step did what a CUDA graph cannot hold."""


class _Hosts(TorchFunctionMode):
    """Refuses what passes numbers between Python and tensors, which the operators alone do not show."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if func in FROM_HOST or name in TO_HOST or (name == "to" and "cpu" in args):
            raise Refused(f"{name} passes numbers between host and device")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []
        self.made = {}  # address of a storage -> the storage, of what was made meanwhile
        self.before = {}  # address -> (storage, its bytes before the first write), of what was there already

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in WAITING or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            raise Refused(f"{name} waits for the device")
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise Refused(f"{name} by a mask has a shape that depends on the data")
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(given[argument.name])
        out = func(*args, **kwargs)
        aliases = any(returned.alias_info is not None for returned in func._schema.returns)
        if not aliases:
            for tensor in tree_leaves(out):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = storage
        self.done.append((func, args, kwargs, out, aliases))
        return out

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
            self.before[storage.data_ptr()] = (storage, storage.clone())

    def leave_nothing(self):
        for storage, bytes_before in self.before.values():
            storage.copy_(bytes_before)
        for storage in self.made.values():
            storage.copy_(torch.full((storage.nbytes(),), 0x7F, dtype=torch.uint8).untyped_storage())

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out, aliases in self.done:
                name = func._schema.name
                writes = any(
                    each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments
                )
                if aliases and not writes:
                    continue  # a view of memory that is here already
                again = func(*args, **kwargs)
                if not writes and "empty" not in name:
                    for there, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        there.copy_(new)


class Emulated:
    """In the place of CudaCapture: a family of captures, which counts them and their replays."""

    def __init__(self):
        self.captures = 0
        self.replays = 0

    def __call__(self, work):
        self.captures += 1
        work()  # as warm-up: it may run before it is captured
        recorder = _Recorder()
        with _Hosts(), recorder:
            work()
        recorder.leave_nothing()

        def replay():
            self.replays += 1
            recorder.replay()

        return replay
