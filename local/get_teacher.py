"""Get a teacher by name from the hub, or from a folder or file, and load it once."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.files import require, written_aside
from mvqkd.teachers import ORIGIN, find_teacher, load_teacher, read_origin


@dataclass
class Settings:
    """Which teacher, and where to put it, in transformers' layout."""

    # A folder in transformers' layout, a checkpoint of fairseq's HuBERT, or a name of the hub.
    teacher: str
    out_dir: Path
    # Of a name of the hub: a commit. None: the newest.
    revision: str | None = None
    # The layer whose output is distilled, from 1; used by the stages after this one.
    layer: int = 1


def main(settings: Settings) -> None:
    found = find_teacher(settings.teacher, settings.revision)
    with written_aside(settings.out_dir) as aside:
        if found.is_dir():
            # Before anything is copied, for any folder may have been named.
            require(found / "config.json", "name a folder in transformers' layout")
            aside.mkdir()
            for path in filter(Path.is_file, found.iterdir()):
                shutil.copy(path, aside)
            teacher = load_teacher(aside)
        else:
            teacher = load_teacher(found)
            teacher.save(aside)
        teacher.name = settings.teacher
        teacher.check_layer(settings.layer)
        # What labels call it, beside what its maker has said.
        origin = {**read_origin(aside), "teacher": settings.teacher}
        if not Path(settings.teacher).exists():
            origin["revision"] = found.name
        (aside / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
    logging.info(
        f"{settings.teacher}: {teacher.num_layers} layers of {teacher.dim}, "
        f"{1000 * teacher.frame_shift:g} ms a frame"
    )


if __name__ == "__main__":
    cli.run(main, Settings)
