"""The transducer losses against k2's values, against enumeration of paths, and at extremes."""

import itertools
import json
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mvqkd.losses import rnnt

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "k2_rnnt_loss.npz")
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["meta"]))["cases"]}

mutual_information_recursion = partial(rnnt.mutual_information_recursion, backend="native")
get_rnnt_logprobs_smoothed = partial(rnnt.get_rnnt_logprobs_smoothed, backend="native")
rnnt_loss_smoothed = partial(rnnt.rnnt_loss_smoothed, backend="native")
rnnt_loss_simple = partial(rnnt.rnnt_loss_simple, backend="native")
get_rnnt_prune_ranges = partial(rnnt.get_rnnt_prune_ranges, backend="native")
do_rnnt_pruning = partial(rnnt.do_rnnt_pruning, backend="native")
rnnt_loss_pruned = partial(rnnt.rnnt_loss_pruned, backend="native")


def problem(B, T, S, V=5, dtype=torch.float64, seed=0):
    """lm (B, S+1, V), am (B, T, V), symbols (B, S), boundary (B, 4) of the full lengths."""
    generator = torch.Generator().manual_seed(seed)
    lm = 2 * torch.randn(B, S + 1, V, generator=generator, dtype=dtype)
    am = 2 * torch.randn(B, T, V, generator=generator, dtype=dtype)
    symbols = torch.randint(1, V, (B, S), generator=generator)
    return lm, am, symbols, torch.tensor([0, 0, S, T]).repeat(B, 1)


def full_ranges(B, T, S):
    return torch.arange(S + 1).expand(B, T, S + 1)


def enumerate_loss(logp_TSV, symbols, rnnt_type, delay_penalty=0.0):
    """Loss of one utterance as the sum over all placements of its tokens on frames.

    logp_TSV (T, S+1, V) are the scores of what follows s tokens on frame t.
    """
    T, S = logp_TSV.shape[0], len(symbols)
    choose = (
        itertools.combinations_with_replacement
        if rnnt_type == "regular"
        else itertools.combinations
    )
    scores = []
    for frames in choose(range(T), S):
        score = torch.zeros((), dtype=logp_TSV.dtype)
        for s, t in enumerate(frames):
            score = score + logp_TSV[t, s, symbols[s]] + delay_penalty * ((T - 1) / 2 - t)
        for t in range(T):
            if rnnt_type != "modified" or t not in frames:
                score = score + logp_TSV[t, sum(frame <= t for frame in frames), 0]
        scores.append(score)
    return -torch.stack(scores).logsumexp(0) if scores else torch.tensor(torch.inf)


def smoothed_logp(lm, am, lm_only_scale, am_only_scale):
    """The definition of the smoothed scores, (B, T, S+1, V)."""
    unigram = lm.softmax(-1).mean((0, 1)).log()
    joint = (am[:, :, None] + lm[:, None]).log_softmax(-1)
    lm_only = lm.log_softmax(-1)[:, None]
    am_only = (am + unigram).log_softmax(-1)[:, :, None]
    joint_scale = 1 - lm_only_scale - am_only_scale
    return joint_scale * joint + lm_only_scale * lm_only + am_only_scale * am_only


def assert_matches(actual, expected):
    """Within 1e-4 of the largest expected value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_equals_k2(name):
    case = CASES[name]
    g = {
        key.split("/")[1]: torch.from_numpy(GOLDEN[key])
        for key in GOLDEN.files
        if key.startswith(name)
    }
    leaves = {key: g[key].requires_grad_() for key in ("am", "lm", "encoder_out", "decoder_out")}
    shared = {
        "boundary": g["boundary"],
        "rnnt_type": case["rnnt_type"],
        "delay_penalty": case["delay_penalty"],
        "reduction": "none",
    }
    simple, (px_grad, py_grad) = rnnt_loss_smoothed(
        leaves["lm"],
        leaves["am"],
        g["symbols"],
        0,
        lm_only_scale=case["lm_scale"],
        am_only_scale=case["am_scale"],
        return_grad=True,
        **shared,
    )
    ranges = get_rnnt_prune_ranges(px_grad, py_grad, g["boundary"], case["s_range"])
    am_pruned, lm_pruned = do_rnnt_pruning(leaves["encoder_out"], leaves["decoder_out"], ranges)
    logits = (am_pruned + lm_pruned).tanh() @ g["joiner_weight"].T + g["joiner_bias"]
    logits.retain_grad()
    pruned = rnnt_loss_pruned(logits, g["symbols"], ranges, 0, **shared)
    # The gradients were taken of the recipe's sum, with 0.5 as the scale of the simple loss.
    (0.5 * simple + pruned).sum().backward()

    assert torch.equal(ranges, g["ranges"])
    from_k2 = get_rnnt_prune_ranges(g["px_grad"], g["py_grad"], g["boundary"], case["s_range"])
    assert torch.equal(from_k2, g["ranges"])
    for actual, key in (
        (simple, "simple"),
        (pruned, "pruned"),
        (px_grad, "px_grad"),
        (py_grad, "py_grad"),
        (logits.grad, "logits_grad"),
        (leaves["am"].grad, "am_grad"),
        (leaves["lm"].grad, "lm_grad"),
        (leaves["encoder_out"].grad, "enc_grad"),
        (leaves["decoder_out"].grad, "dec_grad"),
    ):
        assert_matches(actual.detach(), g[key])


@pytest.mark.parametrize("rnnt_type", rnnt.RNNT_TYPES)
@pytest.mark.parametrize(("T", "S"), [(1, 0), (1, 1), (3, 0), (4, 2), (5, 3), (2, 3)])
@pytest.mark.parametrize(("lm_scale", "am_scale"), [(0.0, 0.0), (0.25, 0.1), (0.5, 0.5)])
def test_smoothed_equals_enumeration(rnnt_type, T, S, lm_scale, am_scale):
    lm, am, symbols, boundary = problem(2, T, S)
    logp = smoothed_logp(lm, am, lm_scale, am_scale)
    expected = [enumerate_loss(x, y, rnnt_type, 0.3) for x, y in zip(logp, symbols, strict=True)]
    arguments = (lm, am, symbols, 0, lm_scale, am_scale)
    for b in (boundary, None):
        loss = rnnt_loss_smoothed(*arguments, b, rnnt_type, 0.3, reduction="none")
        torch.testing.assert_close(loss, torch.stack(expected).to(loss.dtype))
    if lm_scale == 0:
        simple = rnnt_loss_simple(lm, am, symbols, 0, boundary, rnnt_type, 0.3, "none")
        torch.testing.assert_close(simple, loss)


@pytest.mark.parametrize("rnnt_type", rnnt.RNNT_TYPES)
def test_pruned_equals_enumeration_inside_ranges(rnnt_type):
    B, T, S, V, R = 2, 5, 3, 4, 2
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, S + 1, V, generator=generator, dtype=torch.float64)
    symbols = torch.randint(1, V, (B, S), generator=generator)
    ranges = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 1, 2]])[:, :, None] + torch.arange(R)
    index = ranges[..., None].expand(-1, -1, -1, V)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(2, index, True)
    logp = logits.log_softmax(-1).masked_fill(~inside, -torch.inf)
    expected = torch.stack([enumerate_loss(logp[b], symbols[b], rnnt_type) for b in range(B)])
    pruned = logits.gather(2, index)
    for reduction, value in (
        ("none", expected),
        ("mean", expected.mean()),
        ("sum", expected.sum()),
    ):
        loss = rnnt_loss_pruned(
            pruned, symbols, ranges, 0, rnnt_type=rnnt_type, reduction=reduction
        )
        torch.testing.assert_close(loss, value)


@pytest.mark.parametrize("rnnt_type", rnnt.RNNT_TYPES)
def test_boundary_equals_the_problem_cut_to_it(rnnt_type):
    lm, am, symbols, _ = problem(4, 8, 4)
    boundary = torch.tensor([[0, 0, 4, 8], [1, 2, 3, 7], [2, 0, 2, 5], [0, 3, 3, 8]])
    px, py = get_rnnt_logprobs_smoothed(lm, am, symbols, 0, 0.0, 0.0, boundary, rnnt_type)
    # What lies outside must not matter, whatever it is.
    inside = torch.zeros(4, 5, 9, dtype=torch.bool)
    for b, (s0, t0, s1, t1) in enumerate(boundary.tolist()):
        inside[b, s0 : s1 + 1, t0 : t1 + 1] = True
    px = px.masked_fill(~inside[:, :4, : px.shape[2]], torch.nan).requires_grad_()
    py = py.masked_fill(~inside[:, :, :8], torch.nan).requires_grad_()
    scores, (px_grad, py_grad) = mutual_information_recursion(px, py, boundary, return_grad=True)
    for b, (s0, t0, s1, t1) in enumerate(boundary.tolist()):
        extra = int(rnnt_type == "regular")
        cut = (px[b : b + 1, s0:s1, t0 : t1 + extra], py[b : b + 1, s0 : s1 + 1, t0:t1])
        score, (cut_px_grad, cut_py_grad) = mutual_information_recursion(*cut, return_grad=True)
        torch.testing.assert_close(scores[b], score[0])
        torch.testing.assert_close(px_grad[b, s0:s1, t0 : t1 + extra], cut_px_grad[0])
        torch.testing.assert_close(py_grad[b, s0 : s1 + 1, t0:t1], cut_py_grad[0])
        torch.testing.assert_close(px_grad[b].sum(), cut_px_grad.sum())
        torch.testing.assert_close(py_grad[b].sum(), cut_py_grad.sum())
    scores.sum().backward()
    assert torch.equal(px.grad, px_grad) and torch.equal(py.grad, py_grad)


@pytest.mark.parametrize("rnnt_type", rnnt.RNNT_TYPES)
def test_gradcheck(rnnt_type):
    B, T, S = 2, 4, 2
    lm, am, symbols, boundary = problem(B, T, S, V=4)
    boundary[1] = torch.tensor([0, 0, 1, 3])
    inputs = (lm.requires_grad_(), am.requires_grad_())

    def smoothed(lm, am):
        return rnnt_loss_smoothed(
            lm, am, symbols, 0, 0.2, 0.1, boundary, rnnt_type, 0.1, reduction="none"
        )

    def pruned(lm, am):
        ranges = torch.tensor([0, 0, 1, 1])[None, :, None] + torch.arange(2).expand(B, T, 2)
        am_pruned, lm_pruned = do_rnnt_pruning(am, lm, ranges)
        return rnnt_loss_pruned(
            am_pruned * lm_pruned, symbols, ranges, 0, boundary, rnnt_type, 0.1, reduction="none"
        )

    assert torch.autograd.gradcheck(smoothed, inputs)
    assert torch.autograd.gradcheck(pruned, inputs)


@pytest.mark.parametrize("rnnt_type", rnnt.RNNT_TYPES)
@pytest.mark.parametrize(("T", "S"), [(1, 0), (1, 1), (6, 0), (6, 3), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", ["normal", "large", "floor", "floor in one place"])
@pytest.mark.filterwarnings("ignore:s_range")
def test_extremes_have_no_nan(rnnt_type, T, S, dtype, fill):
    lm, am, symbols, boundary = problem(3, T, S, V=6, dtype=torch.float32)
    if fill == "large":
        lm, am = 1e4 * lm, 1e4 * am
    elif fill == "floor":
        lm, am = torch.full_like(lm, -1e30), torch.full_like(am, -1e30)
    elif fill == "floor in one place":
        lm[0, 0], am[0, :, 1:], am[1, 0] = -1e30, -1e30, -1e30
    lm, am = (x.to(dtype).requires_grad_() for x in (lm, am))
    simple, grads = rnnt_loss_smoothed(
        lm, am, symbols, 0, 0.25, 0.1, boundary, rnnt_type, reduction="none", return_grad=True
    )
    ranges = get_rnnt_prune_ranges(*grads, boundary, 5)
    am_pruned, lm_pruned = do_rnnt_pruning(am, lm, ranges)
    pruned = rnnt_loss_pruned(
        am_pruned + lm_pruned, symbols, ranges, 0, boundary, rnnt_type, reduction="none"
    )
    (simple.sum() + pruned.sum()).backward()
    assert simple.dtype == pruned.dtype == torch.float32
    for loss in (simple, pruned):
        assert not loss.isnan().any()
        if rnnt_type != "regular" and T < S:
            assert (loss == torch.inf).all()
        elif fill == "normal":
            assert loss.isfinite().all()
    for grad in (*grads, lm.grad, am.grad):
        assert grad.isfinite().all()
    assert ((grads[0] >= 0) & (grads[0] <= 1.001)).all()


@pytest.mark.parametrize("regular", [True, False])
def test_occupations_of_any_scale_are_probabilities(regular):
    # Every path takes T blanks (regular) or T edges (otherwise), however unlikely they are.
    B, T, S = 2, 50, 20
    generator = torch.Generator().manual_seed(3)
    for scale in (1.0, 1e4, 1e30):
        px = -scale * torch.rand(B, S, T + regular, generator=generator)
        px[:, :, T:] = -torch.inf
        py = -scale * torch.rand(B, S + 1, T, generator=generator)
        _, (px_grad, py_grad) = mutual_information_recursion(px, py, return_grad=True)
        torch.testing.assert_close(px_grad.sum(2), torch.ones(B, S))
        blanks = torch.full((B,), float(T if regular else T - S))
        torch.testing.assert_close(py_grad.sum((1, 2)), blanks)


def test_no_path_has_infinite_loss_and_no_gradient():
    lm, am, symbols, boundary = problem(2, 4, 3)
    boundary[1, 3] = 2
    am.requires_grad_()
    loss = rnnt_loss_smoothed(
        lm, am, symbols, 0, 0.1, 0.0, boundary, rnnt_type="modified", reduction="none"
    )
    loss.sum().backward()
    assert loss[0].isfinite() and loss[1] == torch.inf
    assert (am.grad[0] != 0).any() and (am.grad[1] == 0).all()


def test_half_inputs_and_autocast_compute_in_float32():
    lm, am, symbols, boundary = problem(2, 6, 3, dtype=torch.bfloat16)
    expected = rnnt_loss_smoothed(lm.float(), am.float(), symbols, 0, 0.2, 0.1, boundary)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            rnnt_loss_smoothed(lm, am, symbols, 0, 0.2, 0.1, boundary), expected
        )
    logits = am[:, :, None] + lm[:, None]
    ranges = full_ranges(2, 6, 3)
    half, single = (x.detach().requires_grad_() for x in (logits, logits.float()))
    losses = [rnnt_loss_pruned(x, symbols, ranges, 0, boundary) for x in (half, single)]
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, single.grad.bfloat16())


@pytest.mark.parametrize("rnnt_type", rnnt.RNNT_TYPES)
def test_ranges_are_valid_and_adjusted(rnnt_type):
    lm, am, symbols, boundary = problem(5, 12, 6)
    boundary[:, 2:] = torch.tensor([[6, 12], [5, 7], [1, 12], [0, 1], [2, 3]])
    _, grads = rnnt_loss_simple(lm, am, symbols, 0, boundary, rnnt_type, return_grad=True)
    smallest = 2 if rnnt_type == "regular" else 1
    for s_range in (2, 4, 7):
        ranges = get_rnnt_prune_ranges(*grads, boundary, s_range)
        begin = ranges[:, :, 0]
        step = begin.diff(dim=1)
        assert ranges.shape == (5, 12, s_range) and (ranges.diff(dim=2) == 1).all()
        assert (begin[:, 0] == 0).all() and (ranges >= 0).all() and (ranges <= 6).all()
        assert (step >= 0).all() and (step <= max(1, (smallest - 1) * (s_range - 1))).all()
        last = begin.gather(1, boundary[:, 3:] - 1)[:, 0]
        assert (last == (boundary[:, 2] - s_range + 1).clamp_min(0)).all()
    with pytest.warns(UserWarning, match=f"s_range: 0 .* raised to {smallest}"):
        assert get_rnnt_prune_ranges(*grads, boundary, 0).shape[2] == smallest
    with pytest.warns(UserWarning, match="s_range: 8 .* lowered to 7"):
        assert get_rnnt_prune_ranges(*grads, boundary, 8).shape[2] == 7


@pytest.mark.parametrize(("T", "S", "s_range", "R"), [(3, 13, 5, 6), (1, 9, 2, 10), (4, 30, 2, 9)])
def test_range_too_small_for_a_path_is_raised(T, S, s_range, R):
    def losses(frames_B, rnnt_type="regular"):
        lm, am, symbols, boundary = problem(len(frames_B), max(frames_B), S)
        boundary[:, 3] = torch.tensor(frames_B)
        _, grads = rnnt_loss_simple(lm, am, symbols, 0, boundary, rnnt_type, return_grad=True)
        ranges = get_rnnt_prune_ranges(*grads, boundary, s_range)
        am_pruned, lm_pruned = do_rnnt_pruning(am, lm, ranges)
        return ranges.shape[2], rnnt_loss_pruned(
            am_pruned + lm_pruned, symbols, ranges, 0, boundary, rnnt_type, reduction="none"
        )

    # Where all utterances are short, where one is, and where one has no frame and so no path.
    for frames_B, finite_B in (([T, T], [True] * 2), ([9 * S, T, 0], [True, True, False])):
        with pytest.warns(UserWarning, match=f"s_range: {s_range} .* raised to {R}"):
            found, loss_B = losses(frames_B)
        assert found == R and loss_B.isfinite().tolist() == finite_B
    # One frame more is enough for a smaller range, and other types need none.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, loss_B = losses([-(-S // (s_range - 1))])
        assert found == s_range and loss_B.isfinite().all()
        for rnnt_type in ("modified", "constrained"):
            found, loss_B = losses([S], rnnt_type)
            assert found == s_range and loss_B.isfinite().all()


def test_range_of_one_holds_a_modified_path_and_no_constrained_one():
    lm, am, symbols, boundary = problem(2, 4, 4)
    for rnnt_type, finite in (("modified", True), ("constrained", False)):
        _, grads = rnnt_loss_simple(lm, am, symbols, 0, boundary, rnnt_type, return_grad=True)
        ranges = get_rnnt_prune_ranges(*grads, boundary, 1)
        am_pruned, lm_pruned = do_rnnt_pruning(am, lm, ranges)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = rnnt_loss_pruned(
                am_pruned + lm_pruned, symbols, ranges, 0, boundary, rnnt_type, reduction="none"
            )
        assert loss.isfinite().tolist() == [finite] * 2 and len(caught) == 1 - finite


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("smoothed", {"lm": torch.zeros(2, 4, 6)}, "lm must be"),
        ("smoothed", {"am": torch.zeros(3, 6, 5)}, "am"),
        ("smoothed", {"symbols": torch.zeros(2, 4, dtype=torch.int64)}, "symbols must be"),
        ("smoothed", {"termination_symbol": 5}, "termination_symbol must be"),
        ("smoothed", {"boundary": torch.zeros(2, 4)}, "boundary must be"),
        ("smoothed", {"boundary": torch.tensor([[0, 0, 3, 7]] * 2)}, "boundary must satisfy"),
        ("smoothed", {"rnnt_type": "other"}, "rnnt_type must be"),
        ("smoothed", {"reduction": "other"}, "reduction must be"),
        ("smoothed", {"delay_penalty": -0.1}, "delay_penalty must not"),
        ("smoothed", {"backend": "other"}, "backend must be"),
        ("pruned", {"logits": torch.zeros(2, 6, 3, 5)}, "logits must be"),
        ("pruned", {"symbols": torch.zeros(2, 2, dtype=torch.int64)}, "positions a frame"),
        ("pruned", {"symbols": torch.zeros(1, 3, dtype=torch.int64)}, "symbols must be"),
        ("recursion", {"px": torch.zeros(2, 3, 5)}, "px must be"),
        ("pruning", {"ranges": torch.zeros(2, 5, 3, dtype=torch.int64)}, "ranges"),
        ("ranges", {"py_grad": torch.zeros(2, 3, 6)}, "py_grad"),
        ("ranges", {"boundary": None}, "boundary is needed"),
    ],
)
def test_bad_arguments(function, change, message):
    lm, am, symbols, boundary = problem(2, 6, 3)
    px, py = torch.zeros(2, 3, 7), torch.zeros(2, 4, 6)
    shared = {"symbols": symbols, "termination_symbol": 0, "boundary": boundary}
    ranges = full_ranges(2, 6, 3)
    call, arguments = {
        "smoothed": (rnnt_loss_smoothed, {"lm": lm, "am": am, **shared}),
        "pruned": (
            rnnt_loss_pruned,
            {"logits": torch.zeros(2, 6, 4, 5), "ranges": ranges, **shared},
        ),
        "recursion": (mutual_information_recursion, {"px": px, "py": py}),
        "pruning": (do_rnnt_pruning, {"am": am, "lm": lm, "ranges": ranges}),
        "ranges": (
            get_rnnt_prune_ranges,
            {"px_grad": px, "py_grad": py, "boundary": boundary, "s_range": 3},
        ),
    }[function]
    with pytest.raises(ValueError, match=message):
        call(**{**arguments, **change})


def test_the_device_is_asked_once_a_loss(monkeypatch):
    """Each time that a value is looked at, the program waits for the GPU."""
    asked = []
    for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
        ask = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, ask=ask: (asked.append(len(self.shape)), ask(self))[1]
        )
    lm, am, symbols, boundary = problem(2, 6, 3)
    shared = {"symbols": symbols, "termination_symbol": 0}
    for given, wanted in ((boundary, 1), (None, 0)):
        asked.clear()
        _, grads = rnnt_loss_smoothed(lm, am, **shared, boundary=given, return_grad=True)
        assert len(asked) == wanted
        asked.clear()
        # Whether the range has to grow.
        ranges = get_rnnt_prune_ranges(*grads, boundary, 2)
        assert len(asked) == 1
        asked.clear()
        am_pruned, lm_pruned = do_rnnt_pruning(am, lm, ranges)
        rnnt_loss_pruned(am_pruned + lm_pruned, ranges=ranges, **shared, boundary=given)
        assert len(asked) == wanted


def test_backend_k2_is_used_where_it_imports(monkeypatch):
    calls = []
    k2 = types.ModuleType("k2")
    k2.do_rnnt_pruning = lambda *args, **kwargs: calls.append((args, kwargs)) or "k2"
    am, lm, ranges = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), full_ranges(1, 2, 1)
    for module, auto in ((k2, "k2"), (None, None)):  # None in sys.modules: the import fails
        monkeypatch.setitem(sys.modules, "k2", module)
        rnnt.import_k2.cache_clear()
        if auto:
            assert rnnt.do_rnnt_pruning(am, lm, ranges=ranges) == "k2"
            assert rnnt.do_rnnt_pruning(am, lm, ranges, backend="k2") == "k2"
        else:
            assert rnnt.do_rnnt_pruning(am, lm, ranges)[0].shape == (1, 2, 2, 3)
            with pytest.raises(ValueError, match="does not import"):
                rnnt.do_rnnt_pruning(am, lm, ranges, backend="k2")
        assert rnnt.do_rnnt_pruning(am, lm, ranges, backend="native")[0].shape == (1, 2, 2, 3)
    rnnt.import_k2.cache_clear()
    assert len(calls) == 2 and calls[0][1]["ranges"] is ranges


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_k2_gets_half_precision_as_float32(monkeypatch, dtype):
    got = []

    def of_k2(*args, **kwargs):
        values = [*args, *kwargs.values()]
        tensors = [x for x in values if torch.is_tensor(x) and x.is_floating_point()]
        got.append({x.dtype for x in tensors})
        return sum(x.sum() for x in tensors)

    k2 = types.ModuleType("k2")
    monkeypatch.setitem(sys.modules, "k2", k2)
    rnnt.import_k2.cache_clear()
    for name in (
        *("mutual_information_recursion", "rnnt_loss_simple", "rnnt_loss_smoothed"),
        *("get_rnnt_prune_ranges", "rnnt_loss_pruned", "do_rnnt_pruning"),
    ):
        setattr(k2, name, of_k2)
    lm, am, symbols, boundary = problem(1, 4, 2, dtype=dtype)
    leaf = am.requires_grad_()
    _, grads = rnnt_loss_smoothed(lm, leaf.detach(), symbols, 0, return_grad=True)
    grads = [grad.to(dtype) for grad in grads]
    ranges = full_ranges(1, 4, 2)
    logits = leaf[:, :, None] + lm[:, None]
    rnnt.rnnt_loss_smoothed(lm, leaf, symbols, 0, backend="k2").backward()
    assert leaf.grad.dtype == dtype
    rnnt.rnnt_loss_simple(lm=lm, am=leaf, symbols=symbols, termination_symbol=0)
    rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, boundary)
    rnnt.mutual_information_recursion(*grads, boundary)
    rnnt.get_rnnt_prune_ranges(*grads, boundary, 2)
    assert got == [{torch.promote_types(dtype, torch.float32)}] * 5
    # A look-up, which is of the type that it is given.
    rnnt.do_rnnt_pruning(leaf, lm, ranges)
    assert got[-1] == {dtype}
    rnnt.import_k2.cache_clear()


def test_what_k2_asserts_against_is_computed_here(monkeypatch):
    k2 = types.ModuleType("k2")
    monkeypatch.setitem(sys.modules, "k2", k2)
    rnnt.import_k2.cache_clear()
    for name in ("rnnt_loss_smoothed", "rnnt_loss_pruned", "get_rnnt_prune_ranges"):
        monkeypatch.setattr(k2, name, lambda *args, **kwargs: "k2", raising=False)
    k2.mutual_information_recursion = k2.rnnt_loss_smoothed

    def backends_of(T, S, s_range, frames=None):
        """Who has solved a problem: the simple loss, ranges, the pruned loss, the recursion."""
        lm, am, symbols, boundary = problem(1, T, S, dtype=torch.float32)
        boundary[:, 3] = frames or T
        _, grads = rnnt_loss_smoothed(lm, am, symbols, 0, return_grad=True)
        logits = am[:, :, None] + lm[:, None]
        found = (
            rnnt.rnnt_loss_smoothed(lm, am, symbols, 0, backend="k2"),
            rnnt.get_rnnt_prune_ranges(*grads, boundary, s_range),
            rnnt.rnnt_loss_pruned(logits, symbols, full_ranges(1, T, S), 0, boundary),
            rnnt.mutual_information_recursion(*grads, boundary),
        )
        return ["k2" if isinstance(value, str) else "native" for value in found]

    assert backends_of(6, 6, 2) == ["k2"] * 4
    assert backends_of(6, 0, 1) == ["native"] * 4
    assert backends_of(2, 3, 4) == ["native"] * 3 + ["k2"]
    for changed in ({"s_range": 1}, {"s_range": 8}, {"s_range": 2, "frames": 5}):
        with pytest.warns(UserWarning, match="s_range"):
            assert backends_of(6, 6, **changed) == ["k2", "native", "k2", "k2"]
    with pytest.raises(ValueError, match="lm must be"):
        rnnt.rnnt_loss_smoothed(torch.zeros(3), torch.zeros(3), torch.zeros(1, 1), 0)
    rnnt.import_k2.cache_clear()
