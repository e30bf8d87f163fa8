"""The native losses and k2's, function by function, on fresh random problems.

Run by tests/k2/run.sh. A failure names the seed: ``SEED=N tests/k2/run.sh`` repeats it.
"""

import inspect
import os
import random
import secrets

import pytest
import torch

from mvqkd.losses import rnnt

SEED = int(os.environ.get("SEED", secrets.randbelow(2**31)))
NUM_PROBLEMS = int(os.environ.get("NUM_PROBLEMS", 60))
FUNCTIONS = [
    "mutual_information_recursion",
    "get_rnnt_logprobs_smoothed",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "get_rnnt_prune_ranges",
    "do_rnnt_pruning",
    "get_rnnt_logprobs_pruned",
    "rnnt_loss_pruned",
]


def random_problem(number):
    """Inputs of the recipe's calls that k2 takes: as many frames as tokens, and at least one."""
    rng = random.Random(f"{SEED}/{number}")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    B, S, V, D = rng.randint(1, 5), rng.randint(1, 20), rng.randint(3, 60), rng.randint(2, 16)
    T = rng.randint(S, S + 60)
    tokens_B = [S] + [rng.randint(1, S) for _ in range(B - 1)]
    frames_B = [T] + [rng.randint(min(s + 1, T), T) for s in tokens_B[1:]]

    def normal(*shape):
        return rng.choice([0.5, 1, 3]) * torch.randn(*shape, generator=generator)

    return {
        "lm": normal(B, S + 1, V),
        "am": normal(B, T, V),
        "encoder_out": normal(B, T, D),
        "decoder_out": normal(B, S + 1, D),
        "joiner_DV": normal(D, V),
        "symbols": torch.randint(1, V, (B, S), generator=generator),
        "boundary": torch.tensor([[0, 0, s, t] for s, t in zip(tokens_B, frames_B)]),
        "rnnt_type": rnnt.RNNT_TYPES[number % 3],
        "s_range": min(rng.randint(2, 7), S + 1),
        "scales": {
            "lm_only_scale": rng.choice([0.0, 0.1, 0.25]),
            "am_only_scale": rng.choice([0.0, 0.1]),
        },
        "delay_penalty": rng.choice([0.0, 0.0, 0.01]),
    }


def ranges_of(problem, occupations, backend):
    return rnnt.get_rnnt_prune_ranges(
        *occupations, problem["boundary"], problem["s_range"], backend=backend
    )


def results(problem, ranges, backend):
    """Everything else that a training step makes, by one backend."""
    leaves = {
        name: problem[name].clone().requires_grad_()
        for name in ("lm", "am", "encoder_out", "decoder_out")
    }
    symbols, boundary = problem["symbols"], problem["boundary"]
    shared = {
        "boundary": boundary,
        "rnnt_type": problem["rnnt_type"],
        "delay_penalty": problem["delay_penalty"],
        "reduction": "none",
        "backend": backend,
    }
    unsmoothed = rnnt.rnnt_loss_simple(leaves["lm"], leaves["am"], symbols, 0, **shared)
    simple, (px_grad, py_grad) = rnnt.rnnt_loss_smoothed(
        leaves["lm"], leaves["am"], symbols, 0, return_grad=True, **problem["scales"], **shared
    )
    am_pruned, lm_pruned = rnnt.do_rnnt_pruning(
        leaves["encoder_out"], leaves["decoder_out"], ranges, backend=backend
    )
    logits = (am_pruned + lm_pruned).tanh() @ problem["joiner_DV"]
    pruned = rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, **shared)
    # Utterances without a path have no gradient worth comparing.
    total = torch.cat((unsmoothed, 0.5 * simple, pruned))
    total[total.isfinite()].sum().backward()
    found = {
        "simple loss": unsmoothed,
        "smoothed loss": simple,
        "px_grad": px_grad,
        "py_grad": py_grad,
        "pruned loss": pruned,
        **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()},
    }
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("number", range(NUM_PROBLEMS))
def test_equals_k2(number):
    problem = random_problem(number)
    place = f"SEED={SEED}, problem {number}"
    shared = {name: problem[name] for name in ("boundary", "rnnt_type", "delay_penalty")}
    _, occupations = rnnt.rnnt_loss_smoothed(
        *(problem[name] for name in ("lm", "am", "symbols")),
        0,
        return_grad=True,
        backend="k2",
        **problem["scales"],
        **shared,
    )
    # Of the same occupations: where a path is all but certain, windows tie up to rounding.
    ranges = ranges_of(problem, occupations, "k2")
    assert torch.equal(ranges_of(problem, occupations, "native"), ranges), place
    native, of_k2 = (results(problem, ranges, backend) for backend in ("native", "k2"))
    for name, value in native.items():
        expected = of_k2[name]
        assert torch.equal(value.isfinite(), expected.isfinite()), (place, name)
        finite = expected.isfinite()
        difference = (value - expected)[finite].abs().max()
        assert difference <= 1e-4 * expected[finite].abs().max().clamp(min=1e-3), (place, name)


def results_in_bf16(problem, backend):
    """Both losses and their gradients, of inputs in half precision."""
    lm, am = (problem[name].bfloat16().requires_grad_() for name in ("lm", "am"))
    symbols, boundary = problem["symbols"], problem["boundary"]
    shared = {
        "boundary": boundary,
        "rnnt_type": problem["rnnt_type"],
        "delay_penalty": problem["delay_penalty"],
        "reduction": "none",
        "backend": backend,
    }
    simple = rnnt.rnnt_loss_smoothed(lm, am, symbols, 0, **problem["scales"], **shared)
    # Of all tokens: no window to choose.
    (B, S1, _), T = lm.shape, am.shape[1]
    ranges = torch.arange(S1).expand(B, T, S1)
    logits = (am[:, :, None] + lm[:, None]).detach().requires_grad_()
    pruned = rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, **shared)
    total = torch.cat((simple, pruned))
    total[total.isfinite()].sum().backward()
    leaves = {"lm": lm, "am": am, "logits": logits}
    return {
        "simple loss": simple.detach(),
        "pruned loss": pruned.detach(),
        **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()},
    }


@pytest.mark.parametrize("number", range(6))
def test_half_precision_equals_k2_on_the_same_values(number):
    problem = random_problem(number)
    native, of_k2 = (results_in_bf16(problem, backend) for backend in ("native", "k2"))
    for name, value in native.items():
        place, expected = (f"SEED={SEED}, problem {number}", name), of_k2[name]
        # Only the gradients that go back to the inputs are rounded to their type.
        tolerance = 1e-2 if name.startswith("gradient") else 1e-4
        rounded = torch.bfloat16 if name.startswith("gradient") else torch.float32
        assert value.dtype == expected.dtype == rounded, place
        finite = expected.isfinite()
        assert torch.equal(value.isfinite(), finite), place
        difference = (value - expected)[finite].abs().max()
        assert difference <= tolerance * expected[finite].abs().max().clamp(min=1e-3), place


@pytest.mark.parametrize("rnnt_type", rnnt.RNNT_TYPES)
@pytest.mark.parametrize(("T", "S", "s_range"), [(5, 0, 5), (1, 0, 1), (4, 5, 5), (2, 9, 2)])
@pytest.mark.filterwarnings("ignore:s_range")
def test_what_k2_asserts_against_is_computed(T, S, s_range, rnnt_type):
    import k2

    generator = torch.Generator().manual_seed(SEED)
    lm, am = (torch.randn(2, length, 6, generator=generator) for length in (S + 1, T))
    symbols = torch.randint(1, 6, (2, S), generator=generator)
    boundary = torch.tensor([[0, 0, S, T]] * 2)
    shared = {"boundary": boundary, "rnnt_type": rnnt_type, "reduction": "none"}
    with pytest.raises(AssertionError):
        k2.rnnt_loss_smoothed(lm, am, symbols, 0, **shared)
    for backend in ("auto", "k2"):
        simple, occupations = rnnt.rnnt_loss_smoothed(
            lm, am, symbols, 0, return_grad=True, backend=backend, **shared
        )
        ranges = rnnt.get_rnnt_prune_ranges(*occupations, boundary, s_range, backend=backend)
        am_pruned, lm_pruned = rnnt.do_rnnt_pruning(am, lm, ranges, backend=backend)
        pruned = rnnt.rnnt_loss_pruned(
            am_pruned + lm_pruned, symbols, ranges, 0, backend=backend, **shared
        )
        exists = rnnt_type == "regular" or S <= T
        assert simple.isfinite().tolist() == pruned.isfinite().tolist() == [exists] * 2


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize(("T", "S"), [(3, 8), (1, 2)])
def test_recursion_over_more_tokens_than_frames_equals_k2(T, S, regular):
    generator = torch.Generator().manual_seed(SEED)
    px = torch.randn(3, S, T + regular, generator=generator)
    px[:, :, T:] = -torch.inf
    py = torch.randn(3, S + 1, T, generator=generator)
    native, of_k2 = (
        rnnt.mutual_information_recursion(px, py, return_grad=True, backend=backend)
        for backend in ("native", "k2")
    )
    assert torch.allclose(native[0], of_k2[0], atol=1e-4), f"SEED={SEED}"
    if regular:  # k2's occupations of a lattice without a path are no probabilities
        for ours, theirs in zip(native[1], of_k2[1]):
            assert torch.allclose(ours, theirs, atol=1e-4), f"SEED={SEED}"


@pytest.mark.parametrize(("s_range", "frames", "R"), [(1, 12, 2), (3, 3, 4), (30, 12, 10)])
def test_ranges_that_k2_does_not_adjust_are(s_range, frames, R):
    lm, am, symbols = torch.zeros(2, 10, 6), torch.zeros(2, 12, 6), torch.ones(2, 9, dtype=int)
    boundary = torch.tensor([[0, 0, 9, 12], [0, 0, 9, frames]])
    _, occupations = rnnt.rnnt_loss_smoothed(
        lm, am, symbols, 0, boundary=boundary, return_grad=True
    )
    with pytest.warns(UserWarning, match=f"s_range: {s_range} "):
        ranges = rnnt.get_rnnt_prune_ranges(*occupations, boundary, s_range)
    assert ranges.shape == (2, 12, R)
    loss = rnnt.rnnt_loss_pruned(
        torch.zeros(*ranges.shape, 6), symbols, ranges, 0, boundary, reduction="none"
    )
    assert loss.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_those_of_k2(name):
    import k2

    own = list(inspect.signature(getattr(rnnt, name)).parameters)
    theirs = list(inspect.signature(getattr(k2, name)).parameters)
    assert [argument for argument in own if argument != "backend"] == theirs
