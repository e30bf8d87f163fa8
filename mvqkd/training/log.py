"""The log of a training run: one JSON line an entry, TensorBoard beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from mvqkd.files import written_aside
from mvqkd.training.progress import Progress


def _whole_entries(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed run may be cut short
            yield json.loads(line)


def _comes_after(entry: dict, progress: Progress) -> bool:
    # A checkpoint may be from the last step of an epoch that is not validated yet.
    not_validated = entry["kind"] == "dev" and entry["epoch"] >= progress.epoch
    return entry["step"] > progress.step or not_validated


class Log:
    """``log.jsonl`` and ``tensorboard/`` in a folder, both cut back to ``progress``."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.jsonl"
        if self.path.exists():  # entries past the checkpoint will be written again
            kept = [e for e in _whole_entries(self.path) if not _comes_after(e, progress)]
            with written_aside(self.path) as aside:
                aside.write_text("".join(json.dumps(e) + "\n" for e in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=progress.step + 1)

    def write(
        self,
        kind: str,
        progress: Progress,
        figures: dict[str, float],
        took: float | None = None,
    ) -> None:
        """
        Args:
          took: the part of the run's seconds in which no step was made.
        """
        where = {"step": progress.step, "epoch": progress.epoch}
        where["seconds"] = round(progress.train_seconds, 2)
        if took is not None:
            where["took"] = round(took, 2)
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **where, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{kind}/{name}", value, progress.step)
