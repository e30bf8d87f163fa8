"""Functions compiled by Numba for the CPU, whose machine code is kept.

It lies beside the function's file (in ``__pycache__``; ``NUMBA_CACHE_DIR`` names another folder),
so that it is compiled once per machine type.
"""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numba

_OPTIONS = {"nogil": True, "error_model": "numpy"}
# For what the functions below call: compiled into them.
inlined = numba.njit(**_OPTIONS)
# A product and a sum become one instruction, rounded once.
_FUSED = {"error_model": "numpy", "fastmath": {"contract"}}
inlined_fused = numba.njit(nogil=True, **_FUSED)


def compiled(signature: str) -> Callable[[Callable], Any]:
    """Compile at import, or read what an earlier process compiled."""

    def compile_it(function: Callable, kept: bool) -> Any:
        dispatcher = numba.njit(**_OPTIONS)(function)
        if kept:
            dispatcher.enable_caching()
        dispatcher.compile(signature)
        return dispatcher

    return _kept(compile_it)


def compiled_for_c(signature: str) -> Callable[[Callable], Any]:
    """As `compiled`, to a function of C's: its ``address``, and it in ``ctypes``."""

    def compile_it(function: Callable, kept: bool) -> Any:
        return numba.cfunc(signature, cache=kept, **_FUSED)(function)

    return _kept(compile_it)


def _kept(compile_it: Callable[[Callable, bool], Any]) -> Callable[[Callable], Any]:
    def decorate(function: Callable) -> Any:
        try:
            return compile_it(function, True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            # No folder can be written, the disk is full, or a file in it is damaged.
            warnings.warn(
                f"what is compiled for the CPU cannot be kept ({error}): each process compiles it "
                "anew, some 10 s; set NUMBA_CACHE_DIR to a folder that can be written",
                stacklevel=2,
            )
            return compile_it(function, False)

    return decorate
