"""Compiled functions, where their code cannot be kept."""

import pytest

from mvqkd.compiled import compiled, compiled_for_c


def test_what_cannot_be_kept_is_compiled_anew():
    # A function without a file has no folder beside it, as in one that cannot be written.
    names = {}
    exec(compile("def successor(n): return n + 1", "<string>", "exec"), names)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        successor = compiled("int64(int64)")(names["successor"])
    assert successor(2) == 3
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        successor = compiled_for_c("int64(int64)")(names["successor"])
    assert successor.ctypes(2) == 3
