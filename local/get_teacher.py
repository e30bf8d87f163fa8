"""Get a teacher by name from the hub, or copy the one in a folder, and load it once."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.files import written_aside
from mvqkd.teachers import find_teacher, load_teacher


@dataclass
class Settings:
    """Which teacher, and where to put it."""

    teacher: str
    out_dir: Path


def main(settings: Settings) -> None:
    with written_aside(settings.out_dir) as aside:
        shutil.copytree(find_teacher(settings.teacher), aside)
        teacher = load_teacher(str(aside))
    logging.info(
        f"{settings.teacher}: {teacher.num_layers} layers of {teacher.dim}, "
        f"{1000 * teacher.frame_shift:g} ms a frame"
    )


if __name__ == "__main__":
    cli.run(main, Settings)
