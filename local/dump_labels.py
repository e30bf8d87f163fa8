"""Dump the labels of the training set into its manifest, and verify them.

Alone, or in any number of processes at once, which share the work (they need no process group):

    python3 local/dump_labels.py ...
    python3 -m mvqkd.launch --nproc-per-node 8 [--nnodes 2 ...] local/dump_labels.py ...
    local/slurm_array.sh 16 -- python3 local/dump_labels.py ...
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mvqkd import cli
from mvqkd.data.labels import (
    CodebookIndexes,
    Dumper,
    Embeddings,
    LabelKind,
    LabelSettings,
    Origin,
    dump_labels,
)
from mvqkd.data.manifests import read_cuts
from mvqkd.device import pick_device
from mvqkd.errors import RecipeError
from mvqkd.quantizer import load_quantizer
from mvqkd.teachers import load_teacher


@dataclass
class MoreLabels:
    """Labels beside the codebook indexes: of another layer, teacher, quantizer or kind."""

    # The cut's custom field.
    field: str
    kind: Literal["codebook_indexes", "embeddings"] = "embeddings"
    # None: as for the codebook indexes.
    teacher: str | None = None
    # Of a teacher by name: a commit. None: the newest.
    revision: str | None = None
    # Of codebook indexes; knows its layer.
    quantizer: Path | None = None
    # Of embeddings. None: as for the codebook indexes, of the same teacher.
    layer: int | None = None
    dtype: Literal["float16", "float32"] = "float16"


@dataclass
class Settings:
    """The teacher and quantizer, and what to label."""

    teacher: str
    # Cuts with features, speed-perturbed already.
    train_manifest: Path
    out: Path
    # None: no codebook indexes, only what ``more`` names.
    quantizer: Path | None = None
    revision: str | None = None
    more: list[MoreLabels] = field(default_factory=list)
    device: str = "auto"
    labels: LabelSettings = field(default_factory=LabelSettings)


def make_kinds(settings: Settings) -> list[LabelKind]:
    """
    Raises:
      RecipeError: a label lacks its quantizer or its layer.
    """
    wanted = list(settings.more)
    if settings.quantizer is not None:
        wanted.insert(0, MoreLabels("codebook_indexes", "codebook_indexes", None, None))
        wanted[0].quantizer = settings.quantizer
    teachers, kinds, own_layer = {}, [], None
    if settings.quantizer is not None:
        own_layer = load_quantizer(settings.quantizer)[1].get("layer")
    for label in wanted:
        name, revision = label.teacher, label.revision
        if name is None:
            name, revision = settings.teacher, settings.revision
        if (name, revision) not in teachers:
            teachers[name, revision] = load_teacher(name, revision)
        teacher = teachers[name, revision]
        if label.kind == "embeddings":
            layer = label.layer
            if layer is None and label.teacher is None:
                layer = own_layer
            if layer is None:
                raise RecipeError(f"more: {label.field} are embeddings; name their layer")
            kinds.append(Embeddings(teacher, layer, label.dtype, label.field))
        else:
            if label.quantizer is None:
                raise RecipeError(f"more: {label.field} are indexes; name their quantizer")
            quantizer, meta = load_quantizer(label.quantizer)
            kinds.append(
                CodebookIndexes(
                    teacher, quantizer, Origin.of(meta), settings.labels.refine_iters, label.field
                )
            )
    return kinds


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    dumper = Dumper(make_kinds(settings), settings.labels, device)
    cuts = read_cuts(settings.train_manifest)
    if dump_labels(cuts, settings.out, dumper, settings.labels.shard_size) is None:
        logging.info(f"others have the last shards in hand, and write {settings.out} when done")


if __name__ == "__main__":
    cli.run(main, Settings)
