"""WER of the teacher's CTC head, by greedy search."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.decoding.scoring import save_results
from mvqkd.device import describe_device, pick_device
from mvqkd.files import written_aside
from mvqkd.teachers import load_teacher
from mvqkd.teachers.ctc import Spelling, transcribe_cuts


@dataclass
class Settings:
    """The teacher, and what to test it on."""

    teacher: str
    test_manifests: list[Path]
    out_dir: Path
    device: str = "auto"
    # Seconds of speech in a batch.
    max_duration: float = 100


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    teacher = load_teacher(settings.teacher).to(device)
    wers = {}
    if teacher.vocabulary is None:
        logging.info(f"{settings.teacher}: has no CTC head, so there is no WER to verify")
    else:
        for path in settings.test_manifests:
            part = path.name.split(".")[0]
            cuts = read_cuts(path)
            Spelling(teacher.vocabulary).warn_of_lacking(part, cuts)
            results = transcribe_cuts(teacher, cuts, device, settings.max_duration)
            counts = save_results(settings.out_dir, part, "ctc_greedy_search", results)
            logging.info(counts.line(f"{part}-ctc_greedy_search"))
            wers[part] = counts.wer
    with written_aside(settings.out_dir / "wer.json") as aside:
        aside.write_text(json.dumps({"wer": wers, "device": describe_device(device)}) + "\n")


if __name__ == "__main__":
    cli.run(main, Settings)
