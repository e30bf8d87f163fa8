"""Train MVQ codebooks on teacher embeddings, and diagnose them on unseen ones."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import torch

from mvqkd import cli
from mvqkd.device import describe_device, pick_device
from mvqkd.errors import RecipeError
from mvqkd.files import require, written_aside
from mvqkd.quantizer import QuantizerSettings, save_quantizer, train_quantizer
from mvqkd.quantizer.diagnostics import check_diagnostics, diagnose, plot_diagnostics


@dataclass
class Settings:
    """The quantizer conf, and where things are."""

    # HDF5 with data sets train and unseen, float32 (frames, D).
    embeddings: Path
    out_dir: Path
    device: str = "auto"
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    path = require(settings.embeddings, "run stage 3")
    try:
        file = h5py.File(path)
    except OSError as error:
        raise RecipeError(f"{path}: damaged or cut short ({error}); run stage 3 again") from error
    with file:
        frames = torch.from_numpy(file["train"][:])
        unseen = torch.from_numpy(file["unseen"][:])
        meta = {
            "teacher": str(file.attrs["teacher"]),
            "layer": int(file.attrs["layer"]),
            "frame_shift": float(file.attrs["frame_shift"]),
            "frame_offset": float(file.attrs["frame_offset"]),
        }
        mean_D, std_D = frames.mean(0), frames.std(0)
        quantizer = train_quantizer(
            frames,
            settings.quantizer,
            device,
            settings.out_dir / "checkpoint.pt",
            progress=logging.info,
            name=str(path),
        )
    diagnostics = diagnose(quantizer, unseen.to(device), mean_D.to(device))
    check_diagnostics(diagnostics)
    logging.info(f"RRL on unseen frames by rounds of refinement: {diagnostics['rrl']}")
    plot_diagnostics(diagnostics, settings.out_dir / "diagnostics.png")
    diagnostics |= {"seed": settings.quantizer.seed, "device": describe_device(device)}
    with written_aside(settings.out_dir / "diagnostics.json") as aside:
        aside.write_text(json.dumps(diagnostics, indent=1) + "\n")
    meta |= {"mean": mean_D, "std": std_D}
    save_quantizer(settings.out_dir / "quantizer.pt", quantizer, meta)


if __name__ == "__main__":
    cli.run(main, Settings)
