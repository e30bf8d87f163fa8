"""What to look at after codebooks were trained, and errors for those that cannot work.

Shapes: F frames, D dimension, N codebooks, K entries per codebook.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer.frames import check_frames, read_blocks, require_frames
from mvqkd.quantizer.quantizer import Quantizer

# A codebook of which fewer bits than this are used is taken as unused.
_LEAST_ENTROPY_BITS = 0.5


@torch.no_grad()
def diagnose(
    quantizer: Quantizer,
    frames_unseen: Any,
    mean: Tensor,
    rounds: Sequence[int] = (0, 1, 2, 3, 4, 5),
    name: str = "frames unseen in training",
    describe: Callable[[int], str] = str,
) -> dict[str, Any]:
    """Measure a quantizer on frames that it was not trained on.

    Args:
      quantizer: as trained.
      frames_unseen: (F, D), as `mvqkd.quantizer.frames` has them; at least as many as a codebook
        has entries.
      mean: (D,), of the frames that the quantizer was trained on.
      rounds: rounds of refinement to measure; indexes are looked at after the last.
      name, describe: of the frames, for messages, as in `check_frames`.
    Returns:
      plain JSON values: ``num_frames``; ``rrl`` by rounds (keys are strings): sum of (x - x̂)²
      over sum of (x - mean)²; ``index_counts``, (N, K), how often each entry was chosen; per
      codebook ``entropy_bits`` of its indexes and ``dead_entries``, never chosen;
      ``entropy_bits_max``; ``correlation``, (N, N), how much two codebooks share a subspace;
      ``index_mutual_information_bits``, (N, N), what one codebook's index tells of another's
      (biased upwards by about (K-1)²/(2F ln 2) bits).
    Raises:
      RecipeError: as ``check_frames``.
    """
    K = quantizer.codebook_size
    require_frames(frames_unseen, K, name)
    device = quantizer.centers.device
    mean = mean.to(device, torch.float32)
    total, errors = 0.0, [0.0] * len(rounds)
    last = []
    for start, x_BD in read_blocks(frames_unseen, name):
        check_frames(x_BD, 1, name, start, describe)
        x_BD = x_BD.to(device)
        total += float(((x_BD - mean) ** 2).sum(dtype=torch.float64))
        # Each from its beginning: restarts follow the rounds, and are not gone on from.
        for number, wanted in sorted(enumerate(rounds), key=lambda pair: pair[1]):
            indexes_BN = quantizer.compute_indexes(x_BD, wanted)
            error = ((quantizer.decode(indexes_BN) - x_BD) ** 2).sum(dtype=torch.float64)
            errors[number] += float(error)
        last.append(indexes_BN.cpu())
    indexes_FN = torch.cat(last)
    counts_NK = quantizer.count_indexes(indexes_FN.to(device)).cpu()
    information_NN = _mutual_information_bits(indexes_FN, K)
    return {
        "quantizer_id": quantizer.get_id(),
        "num_frames": len(indexes_FN),
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": K,
        "rrl": {str(r): error / max(total, 1e-30) for r, error in zip(rounds, errors)},
        "index_counts": counts_NK.tolist(),
        "entropy_bits": _entropy_bits(counts_NK).tolist(),
        "entropy_bits_max": math.log2(K),
        "dead_entries": (counts_NK == 0).sum(dim=1).tolist(),
        "correlation": quantizer.compute_codebook_correlations().cpu().tolist(),
        "index_mutual_information_bits": information_NN.tolist(),
    }


def check_diagnostics(diagnostics: dict[str, Any]) -> None:
    """Refuse a quantizer that keeps nothing of its frames or has codebooks it does not use.

    Args:
      diagnostics: what ``diagnose`` gave.
    Raises:
      RecipeError: with the likely cause.
    """
    name = f"quantizer {diagnostics['quantizer_id']}"
    rounds, rrl = max(diagnostics["rrl"].items(), key=lambda item: int(item[0]))
    if not rrl <= 1.0:
        raise RecipeError(
            f"{name}: RRL {rrl:.2f} after {rounds} rounds, worse than the mean alone; likely too "
            "few frames to train on (take more utterances), a layer of very large or small values "
            "that is not normalized (set standardize: true), or too few training steps"
        )
    least = min(_LEAST_ENTROPY_BITS, 0.5 * diagnostics["entropy_bits_max"])
    unused = [n for n, bits in enumerate(diagnostics["entropy_bits"]) if bits < least]
    if unused:
        raise RecipeError(
            f"{name}: codebooks {', '.join(map(str, unused))} are not used; likely too few or too "
            "similar frames, or a layer of very large or small values (take more utterances, or "
            "set standardize: true)"
        )


def plot_diagnostics(diagnostics: dict[str, Any], png_path: Path | str) -> None:
    """RRL by rounds, entropy and dead entries by codebook, and both correlations, as a PNG file.

    Args:
      diagnostics: what ``diagnose`` gave.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    codebooks = range(diagnostics["num_codebooks"])
    figure = Figure(figsize=(11, 8), dpi=100, layout="constrained")
    figure.suptitle(
        f"quantizer {diagnostics['quantizer_id']}, {diagnostics['num_frames']} unseen frames"
    )
    axes = figure.add_subplot(2, 2, 1)
    rounds = sorted(diagnostics["rrl"], key=int)
    axes.plot([int(r) for r in rounds], [diagnostics["rrl"][r] for r in rounds], marker="o")
    axes.set(title="Relative reconstruction loss", xlabel="rounds of refinement", ylabel="RRL")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)

    axes = figure.add_subplot(2, 2, 2)
    axes.bar(codebooks, diagnostics["entropy_bits"], color="C0")
    axes.axhline(diagnostics["entropy_bits_max"], color="gray", linestyle="--", linewidth=1)
    axes.set(title="Use of entries", xlabel="codebook", ylabel="entropy (bits; dashed: most)")
    dead = axes.twinx()
    dead.plot(codebooks, diagnostics["dead_entries"], color="C3", marker="x", linestyle="")
    dead.set_ylabel("dead entries (x)", color="C3")
    dead.set_ylim(bottom=-0.5)

    matrices = (
        ("correlation", "Shared subspace of centers", 1.0),
        ("index_mutual_information_bits", "Mutual information of indexes (bits)", None),
    )
    for place, (key, title, top) in enumerate(matrices, start=3):
        axes = figure.add_subplot(2, 2, place)
        # The diagonal (1, or the codebook's own entropy) would hide the rest of the scale.
        values = [
            [float("nan") if i == j else v for j, v in enumerate(row)]
            for i, row in enumerate(diagnostics[key])
        ]
        if len(values) > 1:
            figure.colorbar(axes.imshow(values, vmin=0.0, vmax=top, cmap="viridis"), ax=axes)
        axes.set(title=title, xlabel="codebook", ylabel="codebook")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with written_aside(png_path) as aside:
        aside.write_bytes(buffer.getvalue())


def _entropy_bits(counts: Tensor) -> Tensor:
    """Entropy over the last dimension of counts, in bits."""
    probs = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(probs, probs).sum(dim=-1) / math.log(2.0)


def _mutual_information_bits(indexes_FN: Tensor, codebook_size: int) -> Tensor:
    N, K = indexes_FN.shape[1], codebook_size
    own_N = torch.stack(
        [_entropy_bits(torch.bincount(indexes_FN[:, n], minlength=K)) for n in range(N)]
    )
    information_NN = torch.diag(own_N)
    for n in range(N):
        for m in range(n):
            both = torch.bincount(indexes_FN[:, n] * K + indexes_FN[:, m], minlength=K * K)
            information_NN[n, m] = own_N[n] + own_N[m] - _entropy_bits(both)
            information_NN[m, n] = information_NN[n, m]
    return information_NN
