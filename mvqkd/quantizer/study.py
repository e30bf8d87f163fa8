"""What a teacher's layers and the number of codebooks do to what codebooks keep."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer.diagnostics import check_diagnostics, diagnose
from mvqkd.quantizer.frames import frame_statistics
from mvqkd.quantizer.trainer import QuantizerSettings, train_quantizer
from mvqkd.teachers.embeddings import open_sample


@dataclass
class StudySettings:
    """What is compared.

    Attributes:
      num_codebooks: N, of quantizers of the recipe's layer.
      layers: of the teacher, from 1, quantized with the recipe's N; none: all of them.
    """

    num_codebooks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    layers: list[int] = field(default_factory=list)


def study(
    sample: Callable[[int, Path], None],
    layer: int,
    num_layers: int,
    out_dir: Path,
    wanted: StudySettings,
    settings: QuantizerSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Train a quantizer for each layer and each N, and measure them on unseen frames.

    Args:
      sample: writes embeddings of a layer to a file, as `sample_embeddings` does.
      layer: the recipe's layer, where N is varied.
      num_layers: of the teacher.
      out_dir: ``study.json`` is kept there as it grows; a run that is started again goes on.
      wanted: what is compared.
      settings: of every quantizer; N is the recipe's where layers are compared.
      device: where to train.
    Returns:
      plain JSON values: ``layer``, ``num_codebooks``, ``settings``, and a list ``quantizers`` of
      ``layer``, ``num_codebooks``, ``rrl`` by rounds of refinement, ``variance_kept``, 1 less
      the RRL after the most rounds, and ``problem``: why stage 4 would refuse it, or None.
    Raises:
      RecipeError: no such layer or number of codebooks, or a ``study.json`` of other settings.
    """
    layers = wanted.layers or list(range(1, num_layers + 1))
    if wrong := [number for number in (layer, *layers) if not 1 <= number <= num_layers]:
        raise RecipeError(f"study.layers: {wrong[0]} is not in 1..{num_layers}")
    path = out_dir / "study.json"
    found: dict[str, Any] = {
        "layer": layer,
        "num_codebooks": settings.num_codebooks,
        "settings": dataclasses.asdict(settings),
        "quantizers": [],
    }
    if path.exists():
        found = _go_on(path, found)
    jobs: dict[int, list[int]] = {number: [settings.num_codebooks] for number in layers}
    jobs[layer] = sorted({*jobs.get(layer, []), *wanted.num_codebooks})
    quantizers = {
        size: dataclasses.replace(settings, num_codebooks=size)
        for sizes in jobs.values()
        for size in sizes
    }
    done = {(q["layer"], q["num_codebooks"]) for q in found["quantizers"]}
    for number, sizes in sorted(jobs.items()):
        sizes = [size for size in sizes if (number, size) not in done]
        if not sizes:
            continue
        embeddings = out_dir / f"layer-{number}.h5"
        sample(number, embeddings)
        for size in sizes:
            rrl, problem = unseen_rrl(embeddings, quantizers[size], device)
            kept = 1.0 - rrl[max(rrl, key=int)]
            logging.info(f"layer {number}, N = {size}: {100 * kept:.1f}% of the variance kept")
            if problem:
                logging.warning(f"layer {number}, N = {size}: {problem}")
            entry = {"layer": number, "num_codebooks": size, "rrl": rrl, "variance_kept": kept}
            found["quantizers"].append({**entry, "problem": problem})
            with written_aside(path) as aside:
                aside.write_text(json.dumps(found, indent=1) + "\n")
        # Of a large teacher some GB for each layer.
        embeddings.unlink()
    return found


def _go_on(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        same = all(found[key] == fresh[key] for key in fresh if key != "quantizers")
        found["quantizers"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: damaged; delete it to begin anew") from error
    if not same:
        raise RecipeError(f"{path}: made with other settings; delete it to begin anew")
    return found


def unseen_rrl(
    path: Path, settings: QuantizerSettings, device: torch.device
) -> tuple[dict[str, float], str | None]:
    """By rounds of refinement, that of a quantizer trained on what `sample_embeddings` wrote; and
    what `check_diagnostics` has against it, or None."""
    with open_sample(path) as (train, unseen, _):
        statistics = frame_statistics(train.frames, train.name, train.describe)
        quantizer = train_quantizer(
            train.frames, settings, device, progress=None, name=train.name, statistics=statistics
        )
        found = diagnose(
            quantizer.to(device),
            unseen.frames,
            statistics[0],
            name=unseen.name,
            describe=unseen.describe,
        )
    try:
        check_diagnostics(found)
    except RecipeError as error:
        return found["rrl"], str(error)
    return found["rrl"], None


def plot_study(found: dict[str, Any], png_path: Path | str) -> None:
    """RRL against N at the recipe's layer, and variance kept by layer at its N, as a PNG file.

    Args:
      found: what `study` gave.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    by_size = sorted(
        (q for q in found["quantizers"] if q["layer"] == found["layer"]),
        key=lambda q: q["num_codebooks"],
    )
    for rounds in by_size[0]["rrl"] if by_size else ():
        sizes, values = zip(*((q["num_codebooks"], q["rrl"][rounds]) for q in by_size))
        axes.plot(sizes, values, marker="o", markersize=4, label=f"{rounds} rounds")
    axes.set_xscale("log", base=2)
    axes.set(title=f"Layer {found['layer']}", xlabel="codebooks N (bytes per frame)", ylabel="RRL")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

    axes = figure.add_subplot(1, 2, 2)
    by_layer = sorted(
        (q["layer"], 100 * q["variance_kept"])
        for q in found["quantizers"]
        if q["num_codebooks"] == found["num_codebooks"]
    )
    if by_layer:
        axes.bar(*zip(*by_layer))
    axes.set(title=f"N = {found['num_codebooks']}", xlabel="layer", ylabel="variance kept (%)")
    axes.grid(alpha=0.3, axis="y")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with written_aside(png_path) as aside:
        aside.write_bytes(buffer.getvalue())
