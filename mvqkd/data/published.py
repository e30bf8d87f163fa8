"""Codebook indexes that others have published, in the place of a teacher's and quantizer's own.

icefall's recipe publishes them as a manifest for each training part, of cuts that hold no more
than id, start, duration, channel and ``codebook_indexes``, and HDF5 files, whose paths in the
manifests are those of the machine that wrote them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from lhotse import CutSet
from lhotse.array import TemporalArray
from lhotse.utils import fastcopy

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.labels import FIELD, ORIGIN_FIELD, Origin, join_labels, out_of_range, verify_labels
from mvqkd.data.manifests import read_cuts, write_cuts
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside


@dataclass
class PublishedSettings:
    """Where the indexes are, and what their authors say of them."""

    # On the hub.
    repository: str
    # What made them.
    teacher: str
    layer: int
    # The manifest of a training part: a name with ``{part}`` in it.
    manifest: str
    # A commit. None: the newest.
    revision: str | None = None
    num_codebooks: int = 8
    codebook_size: int = 256
    # Of the teacher, seconds: from a frame to the next, and to the centre of frame 0.
    frame_shift: float = 0.02
    frame_offset: float = 0.0125


class PublishedIndexes:
    """What `verify_labels` looks for."""

    field, dtype = FIELD, np.dtype(np.uint8)

    def __init__(self, settings: PublishedSettings) -> None:
        self.columns, self._size = settings.num_codebooks, settings.codebook_size
        # The weights of the quantizer are not published: the place stands for them.
        place = settings.repository + (f"@{settings.revision}" if settings.revision else "")
        self.origin = Origin(settings.teacher, settings.layer, place, "")
        self._stride = round(settings.frame_shift * SAMPLE_RATE)
        self._receptive_field = round(2 * settings.frame_offset * SAMPLE_RATE)

    @property
    def teacher(self) -> PublishedIndexes:
        """The clock of the teacher, of which nothing else is here."""
        return self

    def num_frames(self, num_samples: int) -> int:
        return max(0, (num_samples - self._receptive_field) // self._stride + 1)

    def what_is_wrong(self, indexes_TN: np.ndarray) -> str | None:
        return out_of_range(indexes_TN, self._size)


def take_labels(
    cuts: CutSet,
    parts: Sequence[str],
    out: Path,
    settings: PublishedSettings,
    folder: Path | None = None,
) -> CutSet:
    """Write ``out``: ``cuts`` with the published indexes, verified; the arrays go to a folder
    beside it.

    Args:
      parts: the training parts that ``cuts`` are of.
      folder: a copy of what would be downloaded.

    Raises:
      RecipeError: the hub cannot be reached, files are missing, a cut has no index or the index
        of another cut, or indexes are not what the settings say.
    """
    names = [settings.manifest.format(part=part) for part in parts]
    source = folder or _fetched(settings, names)
    if folder is None:  # of one commit, also where the conf names none, which origins tell
        settings = replace(settings, revision=source.name)
    published = CutSet.from_cuts(
        cut for path in _files(settings, names, source).values() for cut in _published(path)
    )
    joined = join_labels(cuts, published)  # before anything large is fetched
    logging.info(f"{len(joined)} cuts matched, of {len(published)} that are published")
    names = sorted({_array_name(cut) for cut in joined})
    arrays = _files(settings, names, folder or _fetched(settings, names))
    kept = {name: out.parent / "arrays" / name for name in arrays}
    for name, path in arrays.items():
        with written_aside(kept[name]) as aside:
            _link_or_copy(path.resolve(), aside)
    expected = PublishedIndexes(settings)
    labelled = CutSet.from_cuts(_rooted(cut, kept, expected.origin) for cut in joined)
    verify_labels(labelled, [expected])
    with written_aside(out) as aside:
        write_cuts(labelled, aside)
    return labelled


def _fetched(settings: PublishedSettings, names: Collection[str]) -> Path:
    """A folder with what the hub has of these names, which is called as the commit."""
    from mvqkd.teachers.hub import fetch_files

    return fetch_files(settings.repository, settings.revision, names)


def _files(settings: PublishedSettings, names: Collection[str], folder: Path) -> dict[str, Path]:
    """By name, wherever in ``folder`` they lie."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.name in names and path.is_file():
            if path.name in found:
                raise RecipeError(f"{path}: {found[path.name]} has its name too; remove one")
            found[path.name] = path
    for name in names:
        if name not in found:
            raise RecipeError(
                f"{folder}: holds no {name}; give a folder with what {settings.repository} holds"
            )
    return {name: found[name] for name in names}


def _published(path: Path) -> CutSet:
    cuts = read_cuts(path)
    for cut in cuts:
        if not isinstance((cut.custom or {}).get(FIELD), TemporalArray):
            raise RecipeError(f"{path}: cut {cut.id} has no {FIELD}; name another manifest")
    return cuts


def _array_name(cut) -> str:
    """Of the file, without the path that it had where it was written."""
    return PurePosixPath(cut.custom[FIELD].array.storage_path).name


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or somebody else's file
        shutil.copyfile(source, target)


def _rooted(cut, kept: dict[str, Path], origin: Origin):
    """``cut`` with the path that its array has here, and with ``origin`` unless it has its own."""
    label = cut.custom[FIELD]
    array = fastcopy(label.array, storage_path=str(kept[_array_name(cut)]))
    custom = {ORIGIN_FIELD: asdict(origin), **cut.custom, FIELD: fastcopy(label, array=array)}
    return fastcopy(cut, custom=custom)
