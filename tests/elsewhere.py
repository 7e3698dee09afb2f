"""A device that is not the host, on any machine: its tensors lie in the host's memory, but say that they do not.

What a GPU would refuse is an error here too: operators over tensors of both devices, and, while a step is captured,
whatever makes the host wait, carries a number between host and device, or works on the host. Everything else computes
what the host computes, so that whole training steps can be held against the host's own.

Covered are device and order of operators. Not covered: kernels, streams, memory of a GPU, and what a library does
inside an operator.
"""

import functools
import threading
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
# Operators whose result, or its shape, the host has to know.
READING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # which take indices of the host's
_capturing = threading.local()


class Refused(AssertionError):
    """A captured step did what a CUDA graph cannot hold."""


class Elsewhere(torch.Tensor):
    """A tensor of the device, over `here`, the host's tensor that holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # What torch has outside of its operators.

    def __repr__(self):
        return f"{NAME} {self.here!r}"

    def data_ptr(self):
        return self.here.data_ptr()

    def untyped_storage(self):
        return self.here.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = Elsewhere(self.here.detach().clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    @property
    def data(self):
        return Elsewhere(self.here.detach())

    @data.setter
    def data(self, new):
        assert isinstance(new, Elsewhere)
        assert (new.shape, new.dtype) == (self.shape, self.dtype)
        self.here = new.here


class _Factories(TorchDispatchMode):
    """Sees operators without a tensor of the device among their arguments, which may still make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name = func._schema.name.partition("::")[2]
    tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    theirs = {id(each.here): each for each in tensors if isinstance(each, Elsewhere)}
    ours = [each for each in tensors if not isinstance(each, Elsewhere)]
    device = kwargs.get("device")
    goes_to = None if device is None else torch.device(device).type
    if getattr(_capturing, "now", False):
        _check_captured(name, args, ours, goes_to)
    if theirs and name not in ("copy_", "_to_copy"):
        _check_together(func, name, args, ours)

    def bare(each):
        return each.here if isinstance(each, Elsewhere) else each

    given, named = pytree.tree_map(bare, (args, kwargs))
    if goes_to == NAME:
        named["device"] = torch.device("cpu")
    out = func(*given, **named)
    if name == "_local_scalar_dense" or (goes_to is None and not theirs) or goes_to == "cpu":
        return out
    if name == "copy_" and not isinstance(args[0], Elsewhere):
        return out

    def dressed(each):
        if not isinstance(each, torch.Tensor):
            return each
        known = theirs.get(id(each))
        if known is not None:
            assert (known.shape, known.stride()) == (each.shape, each.stride()), f"{name} changed the shape of its own"
            return known
        return Elsewhere(each)

    return pytree.tree_map(dressed, out)


def _check_together(func, name, args, ours):
    """Both devices in one operator: only what torch allows on a GPU."""
    for each in ours:
        scalar = each.ndim == 0 and (torch.Tag.pointwise in func.tags or name in ("where", "index_put_", "fill_"))
        index = name in INDEXED and any(each is index for index in args[1])
        if not scalar and not index:
            raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and cpu {list(each.shape)}")


def _check_captured(name, args, ours, goes_to):
    if name in READING or (name == "repeat_interleave" and len(args) == 1):
        raise Refused(f"{name} waits for the device")
    if name in INDEXED and any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]):
        raise Refused(f"{name} by a mask has a shape that depends on the data")
    if ours:
        raise Refused(f"{name} takes a tensor of the host {list(ours[0].shape)}")
    if goes_to not in (None, NAME):
        raise Refused(f"{name} makes a tensor of the host")
    if goes_to is None and not any(isinstance(each, Elsewhere) for each in pytree.tree_leaves(args)):
        raise Refused(f"{name} makes a tensor of the host")


class Watched:
    """In the place of CudaCapture: `work` is looked at while it runs, and done anew by every replay."""

    def __init__(self):
        self.captures = 0

    def __call__(self, work):
        work()  # as warm-up
        self.captures += 1
        _capturing.now = True
        try:
            work()
        finally:
            _capturing.now = False
        return work


@functools.cache
def registered():
    """Makes the device known to torch, which can be done once in a process and not undone."""

    class Module:
        """What torch looks for as torch.elsewhere."""

        is_initialized = is_available = staticmethod(lambda: True)
        _is_in_bad_fork = staticmethod(lambda: False)
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        manual_seed_all = staticmethod(lambda seed: None)
        get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])

    _setup_privateuseone_for_python_backend(NAME, Module())
    # Autocast is a state that can be asked for, and casts nothing.
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return library


@contextmanager
def working(monkeypatch):
    """Inside, device "elsewhere" can be used."""
    registered()
    moves = nn.Module.to

    def to(module, device, *args, **kwargs):
        if torch.device(device).type != NAME:
            return moves(module, device, *args, **kwargs)
        moved = {}

        def made(tensor):
            if tensor is None or isinstance(tensor, Elsewhere):
                return tensor
            if id(tensor) not in moved:
                new = Elsewhere(tensor.detach().clone())
                moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            return moved[id(tensor)]

        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in list(table.items()):
                    table[name] = made(tensor)
        return module

    monkeypatch.setattr(nn.Module, "to", to)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its tensor here, and then moves it by an operator
    try:
        with _Factories():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
