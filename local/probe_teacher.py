"""Which layer of a teacher to take for some speech, if any: RRL and linear CTC probe by layer."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.device import pick_device
from mvqkd.files import written_aside
from mvqkd.quantizer import QuantizerSettings
from mvqkd.teachers import load_teacher
from mvqkd.teachers.probe import (
    ProbeSettings,
    pick_speech,
    plot_probe,
    probe_table,
    probe_teacher,
    verdict,
)


@dataclass
class Settings:
    """The teacher, the speech, and how it is looked at."""

    teacher: str
    # Transcribed cuts of the language.
    manifest: Path
    out_dir: Path
    # Of a teacher by name: a commit. None: the newest.
    revision: str | None = None
    # The layer of the teacher's conf, which is compared with the one to take.
    layer: int | None = None
    device: str = "auto"
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    cuts = pick_speech(read_cuts(settings.manifest), settings.probe)
    teacher = load_teacher(settings.teacher, settings.revision).to(device)
    found = probe_teacher(
        cuts, teacher, settings.out_dir, settings.probe, settings.quantizer, device
    )
    table = probe_table(found)
    for name, text in (("json", json.dumps(found, indent=1)), ("txt", table)):
        with written_aside(settings.out_dir / f"probe.{name}") as aside:
            aside.write_text(text + "\n")
    plot_probe(found, settings.out_dir / "probe.png")
    print(table)
    if not found["carries_language"]:
        logging.warning(verdict(found))
    elif settings.layer not in (None, found["layer"]):
        logging.info(f"the conf's layer is {settings.layer}")


if __name__ == "__main__":
    cli.run(main, Settings)
