"""Kernels in C for what lies between matrix products with weights on a CPU, and for these where it has wide vectors.

torch's own operators do the same, and remain the reference; but each of them reads and writes its whole tensor, and
costs a call. They are used on other devices, in other types than float32 and bfloat16, and where no C compiler is
found. They run on torch's own threads, each item by one thread in a fixed order; only the gradient of a norm's gain is
a sum over items, of which each thread makes a part.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrlm_cli.kernels.build import CannotBuild, NoCompiler, built

# What each function takes, letter by letter: p a pointer, i int64, f float32; the flag of the type and the number of
# threads follow.
_TAKES = {
    "rms_norm": "pppfppii",
    "rms_norm_backward": "ppppppppii",
    "swiglu": "ppii",
    "swiglu_backward": "pppppii",
    "score": "ppfpppii",
    "score_backward": "ppfpppppii",
    "draw": "ppppppiii",
    "attend": "pppppppiiiiif",
    "attend_backward": "pppppppppppiiiiiif",
    "lay_out": "ppii",
    "multiply": "pppppiii",
    "product": "pppppiiiiiiii",
    "attend_slots": "ppppppppiiiiif",
}
_KINDS = {"p": c_void_p, "i": c_int64, "f": c_float}


class Library(ctypes.CDLL):
    """The compiled kernels, and the sizes that their callers must know (`c/deal.c`, `c/products.c`)."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.stem = path.stem
        self.widest_head, self.lanes, self.together, self.columns, self.pair = (
            c_int64.in_dll(self, name).value for name in ("widest_head", "lanes", "together", "columns", "pair")
        )


_wanted = False
_library: Library | None = None
_reason: str | None = None
_refused = False  # there is a compiler, and still there are no kernels


def use(wanted: bool) -> None:
    """Whether the kernels are to be used from now on, where they can be."""
    global _wanted
    _wanted = wanted


def missing() -> str | None:
    """Why the kernels cannot be used on this machine; None if they can. Compiles them if need be."""
    global _library, _reason, _refused
    if _library is None and _reason is None:
        try:
            _library = _load()
        except (CannotBuild, OSError, AttributeError, ValueError) as error:
            _reason, _refused = str(error), not isinstance(error, NoCompiler)
    return _reason


def refused() -> str | None:
    """Why there are no kernels although there is a C compiler, if that was found."""
    return _reason if _refused else None


def state() -> str:
    """For a run's record: the library's name, which tells sources, compiler and processor apart; compiles nothing."""
    if _library is not None:
        return _library.stem
    return "not asked for" if _reason is None else f"cannot be compiled: {_reason}"


def on(*tensors: Tensor | None) -> Library | None:
    """The library if the kernels are wanted, can be had and take these: on a CPU, float32 or bfloat16."""
    if not _wanted:
        return None
    for tensor in tensors:
        if tensor is not None and (tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16)):
            return None
    if _library is None:
        missing()
    return _library


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether torch has fast products of bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def crawls(x: Tensor) -> bool:
    """Whether torch's products of such a tensor are loops, many times slower than float32's."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bfloat16()


def run(function: Any, *given: Tensor | float | None, like: Tensor, threads: int) -> None:
    """Call a kernel in the type of `like`. Tensors must be contiguous; they live until it returns."""
    function(*(_place(each) if isinstance(each, Tensor) else each for each in given), narrow(like), threads)


def _place(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def narrow(tensor: Tensor) -> int:
    """The flag of a type: 1 for bfloat16, 0 for float32."""
    return int(tensor.dtype == torch.bfloat16)


def threads(numbers: int) -> int:
    """How many threads work on so many numbers: where there are few, waking another costs more than it saves."""
    return torch.get_num_threads() if numbers >= 2**13 else 1


def _load() -> Library:
    try:
        library = Library(built())
    except OSError:  # a file that was cut off or changed
        library = Library(built(again=True))
    for name, takes in _TAKES.items():
        function = getattr(library, name)
        function.argtypes = [*(_KINDS[letter] for letter in takes), c_int, c_int]
        function.restype = None
    library.can_multiply.argtypes, library.can_multiply.restype = [c_int], c_int
    library.product_scratch.argtypes, library.product_scratch.restype = [*[c_int64] * 3, c_int, c_int], c_int64
    library.multiply_scratch.argtypes, library.multiply_scratch.restype = [c_int64, c_int64, c_int], c_int64
    library.attention_scratch.argtypes, library.attention_scratch.restype = [c_int64, c_int64, c_int], c_int64
    runtime = ctypes.CDLL(torch._C.__file__)  # looks through all that torch was linked with
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if not all(hasattr(runtime, name) for name in names):
        raise CannotBuild("this build of torch has no OpenMP runtime whose threads they could share")
    library.use_threads.argtypes = [c_void_p] * 3
    library.use_threads.restype = None
    library.use_threads(*(ctypes.cast(getattr(runtime, name), c_void_p) for name in names))
    return library
