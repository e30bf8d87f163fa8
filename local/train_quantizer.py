"""Train MVQ codebooks on teacher embeddings, and diagnose them on unseen ones."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.device import describe_device, pick_device
from mvqkd.files import require, written_aside
from mvqkd.quantizer import (
    QuantizerSettings,
    frame_statistics,
    save_quantizer,
    train_quantizer,
)
from mvqkd.quantizer.diagnostics import check_diagnostics, diagnose, plot_diagnostics
from mvqkd.teachers.embeddings import open_sample


@dataclass
class Settings:
    """The quantizer conf, and where things are."""

    # What stage 3 left; it may be larger than memory.
    embeddings: Path
    out_dir: Path
    device: str = "auto"
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    path = require(settings.embeddings, "run stage 3")
    with open_sample(path) as (train, unseen, meta):
        mean_D, std_D = frame_statistics(train.frames, train.name, train.describe)
        quantizer = train_quantizer(
            train.frames,
            settings.quantizer,
            device,
            settings.out_dir / "checkpoint.pt",
            progress=logging.info,
            name=train.name,
            statistics=(mean_D, std_D),
        ).to(device)
        diagnostics = diagnose(
            quantizer, unseen.frames, mean_D, name=unseen.name, describe=unseen.describe
        )
    logging.info(f"RRL on unseen frames by rounds of refinement: {diagnostics['rrl']}")
    plot_diagnostics(diagnostics, settings.out_dir / "diagnostics.png")
    diagnostics |= {"seed": settings.quantizer.seed, "device": describe_device(device)}
    with written_aside(settings.out_dir / "diagnostics.json") as aside:
        aside.write_text(json.dumps(diagnostics, indent=1) + "\n")
    check_diagnostics(diagnostics)  # what is wrong can be seen in the files by now
    meta |= {"mean": mean_D, "std": std_D}
    save_quantizer(settings.out_dir / "quantizer.pt", quantizer, meta)


if __name__ == "__main__":
    cli.run(main, Settings)
