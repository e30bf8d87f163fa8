"""The Triton kernels of the lattice, in Triton's interpreter on the CPU, against the torch code."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvqkd.losses import rnnt

if sys.platform != "linux":  # for which there is no Triton, as requirements.lock knows
    pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mvqkd.losses import rnnt_triton

ROOT = Path(__file__).parents[2]


def lattice(regular, B=2, T=5, S=3, seed=0, scale=1.0):
    """px, py with log-probabilities, and the boundary of the full lengths."""
    generator = torch.Generator().manual_seed(seed)
    px = -scale * torch.rand(B, S, T + regular, generator=generator)
    px[:, :, T:] = -torch.inf
    py = -scale * torch.rand(B, S + 1, T, generator=generator)
    return {"px": px, "py": py, "boundary": torch.tensor([0, 0, S, T]).repeat(B, 1)}


def ragged(regular):
    """Four boundaries, and what must not matter outside of them."""
    problem = lattice(regular, B=4, T=8, S=4, seed=1, scale=4.0)
    problem["boundary"] = torch.tensor([[0, 0, 4, 8], [1, 2, 3, 7], [2, 0, 2, 5], [0, 3, 3, 8]])
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(problem["boundary"].tolist()):
        for x in (problem["px"], problem["py"]):
            outside = torch.ones_like(x[b], dtype=torch.bool)
            outside[s_begin : s_end + 1, t_begin : t_end + 1] = False
            x[b, outside] = torch.nan
    return problem


def any_frame_after_the_last(regular):
    """Tokens after the last blank, which only the losses forbid, and strides of a transpose."""
    problem = lattice(regular, T=4, S=5, seed=2)
    problem["px"] = problem["px"].clamp_min(-2).transpose(1, 2).contiguous().transpose(1, 2)
    problem["py"] = problem["py"].transpose(0, 2).contiguous().transpose(0, 2)
    return problem


def pruned(regular):
    problem = lattice(regular, B=1, T=7, S=4, seed=3)
    for t, begin in enumerate((0, 0, 1, 2, 2, 3, 3)):
        problem["px"][:, :begin, t] = problem["px"][:, begin + 2 :, t] = -torch.inf
        problem["py"][:, :begin, t] = problem["py"][:, begin + 2 :, t] = -torch.inf
    return problem


def no_path(regular):
    problem = lattice(regular, T=4, S=2, seed=4)
    problem["py"][0, 2], problem["px"][0, :, 3] = -torch.inf, -torch.inf
    problem["px"][0, :, 0] = -torch.inf
    problem["px"][1, 1] = -torch.inf
    return problem


def not_a_number(regular):
    problem = lattice(regular, T=4, S=2, seed=5)
    problem["px"][1, 0, 0] = torch.nan
    problem["py"][1, 0, 0] = -torch.inf
    return problem


KINDS = {
    "plain": lattice,
    "two warps": lambda regular: lattice(regular, B=1, T=36, S=34, seed=6, scale=9.0),
    "no token": lambda regular: lattice(regular, S=0),
    "one frame": lambda regular: lattice(regular, B=1, T=1, S=1),
    "large": lambda regular: lattice(regular, scale=1e4),
    "floor": lambda regular: lattice(regular, scale=1e30),
    "ragged": ragged,
    "any frame after the last": any_frame_after_the_last,
    "pruned": pruned,
    "no path": no_path,
    "not a number": not_a_number,
}
PROBLEMS = {
    f"{kind}, {'regular' if regular else 'modified'}": (make, regular)
    for kind, make in KINDS.items()
    for regular in (True, False)
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    problems = {name: make(regular) for name, (make, regular) in PROBLEMS.items()}
    torch.save(problems, folder / "problems.pt")
    subprocess.run(
        [sys.executable, "-m", "tests.losses.interpret_rnnt_triton"]
        + [str(folder / f"{name}.pt") for name in ("problems", "answers")],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    return torch.load(folder / "answers.pt")


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_torch_code(answers, name):
    make, regular = PROBLEMS[name]
    score, occupations = rnnt.mutual_information_recursion(
        **make(regular), return_grad=True, backend="native"
    )
    expected = (score, *occupations, *occupations, score)
    for actual, of_torch in zip(answers[name], expected, strict=True):
        torch.testing.assert_close(actual, of_torch, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("skew", [1, 0])
@pytest.mark.parametrize("kernel", ["_score_kernel", "_occupation_kernel"])
def test_compiles_without_a_gpu(kernel, skew, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(rnnt_triton, kernel)
    constants = {"SKEW": skew, "BLOCK": 128, "NEED_SHARE": True}
    types = {"end_ptr": "*i64"}
    source = ASTSource(
        fn=function,
        signature={
            name: "constexpr"
            if name in constants
            else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in function.arg_names
        },
        constexprs={name: constants[name] for name in function.arg_names if name in constants},
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    assert compiled.asm["cubin"]
    # The loads of later steps are under way while a step is computed.
    assert "cp.async" in compiled.asm["ptx"]


def test_is_chosen_where_it_runs(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float32, shape=(2, 9, 4))
    monkeypatch.setattr(rnnt, "_triton_kernels", lambda device: rnnt_triton)
    assert rnnt._choose_walk(on_gpu) is rnnt_triton.walk_lattice
    for change in (
        {"is_cuda": False},
        {"dtype": torch.float64},
        {"shape": (2, rnnt_triton.MAX_TOKENS + 1, 4)},
    ):
        assert (
            rnnt._choose_walk(SimpleNamespace(**{**vars(on_gpu), **change})) is rnnt._walk_lattice
        )
    monkeypatch.setattr(rnnt, "_triton_kernels", lambda device: None)
    assert rnnt._choose_walk(on_gpu) is rnnt._walk_lattice


def test_torch_code_where_it_cannot_be_built_or_imported(monkeypatch):
    rnnt._triton_kernels.cache_clear()
    with pytest.warns(UserWarning, match="slower transducer loss"):
        assert rnnt._triton_kernels(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "mvqkd.losses.rnnt_triton", None)
    rnnt._triton_kernels.cache_clear()
    with pytest.warns(UserWarning, match="slower transducer loss: import of mvqkd.losses.rnnt_"):
        assert rnnt._triton_kernels(torch.device("cpu")) is None
    rnnt._triton_kernels.cache_clear()


def test_old_triton_gets_a_warning(monkeypatch):
    rnnt._triton_kernels.cache_clear()
    monkeypatch.delattr(triton.language, "gather")
    monkeypatch.delitem(sys.modules, "mvqkd.losses.rnnt_triton")
    with pytest.warns(UserWarning, match=r"slower transducer loss: .* has no gather"):
        assert rnnt._triton_kernels(torch.device("cpu")) is None
    rnnt._triton_kernels.cache_clear()
