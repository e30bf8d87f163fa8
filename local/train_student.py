"""Train one student, with or without a teacher."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet

from mvqkd import cli
from mvqkd.data.datamodule import DataSettings, StudentData, transcript
from mvqkd.data.features import extractor_of
from mvqkd.data.manifests import of_duration, read_cuts, split_by_share
from mvqkd.data.tokens import load_tokens
from mvqkd.device import describe_device, pick_device
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.losses.distillation import DistillationSettings
from mvqkd.processes import is_main, num_processes
from mvqkd.students.distilled import build_distillation
from mvqkd.students.task import StudentTask
from mvqkd.students.transducer import TransducerSettings, build_transducer
from mvqkd.training.loop import TrainingSettings, train

# Training batches that are made ready beside a GPU, where the conf does not say.
PREFETCH_ON_GPU = 4


@dataclass
class Settings:
    """The student's conf, and where things are."""

    # Cuts with features and, where the student is distilled, labels.
    train_manifest: Path
    dev_manifests: list[Path]
    tokens_dir: Path
    exp_dir: Path
    # More cuts with features and labels, of which only the teacher is learned from.
    untranscribed_manifests: list[Path] = field(default_factory=list)
    # Share of the training utterances read with transcripts; a smaller one is part of a larger.
    transcribed_share: float = 1.0
    # Learn from the others by distillation alone, instead of leaving them out.
    distil_rest: bool = False
    device: str = "auto"
    # vocab_size is taken from tokens_dir.
    model: TransducerSettings = field(default_factory=TransducerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        """
        Raises:
          RecipeError: a term of the distillation is on a layer that the student has not.
        """
        last = self.model.encoder.num_encoder_layers
        self.model.encoder.middle_output_layers = self.distillation.layers()
        for layer in self.distillation.layers():
            if not 1 <= layer <= last:
                raise RecipeError(
                    f"distillation.layer: {layer} is no layer of the student; choose 1 to {last}"
                )


def log_beside(exp_dir: Path) -> None:
    """Name the student in each line, and keep the lines in ``train.log``: others train beside."""
    if not is_main():
        return
    exp_dir.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    root.addHandler(logging.FileHandler(exp_dir / "train.log"))
    form = logging.Formatter(f"%(asctime)s {exp_dir.name}: %(message)s", datefmt="%H:%M:%S")
    for handler in root.handlers:
        handler.setFormatter(form)


def write_settings(settings: Settings, device: str, seconds: list[float], extractor: str) -> None:
    """
    Args:
      seconds: of each utterance of the training manifest.
      extractor: of its features.
    """
    document = {
        "command": " ".join(sys.argv),
        **asdict(settings),
        "device": device,
        "num_processes": num_processes(),
        "extractor": extractor,
        # What 99 of 100 stay below: longer audio is better cut before it is decoded.
        "longest_utterances": float(np.percentile(seconds, 99)),
    }
    with written_aside(settings.exp_dir / "settings.json") as aside:
        aside.write_text(json.dumps(document, indent=1, default=str) + "\n")


def check_untranscribed(cuts: CutSet) -> None:
    """
    Raises:
      RecipeError: all of ``cuts`` have transcripts, or none.
    """
    with_text = {transcript(cut) is not None for cut in cuts}
    if len(with_text) == 1:
        every = "every" if True in with_text else "no"
        raise RecipeError(
            f"data.max_untranscribed: {every} training utterance has a transcript; set it to 0, or "
            "give speech of the other kind: untranscribed_manifests, distil_rest"
        )


def main(settings: Settings) -> None:
    log_beside(settings.exp_dir)
    device = pick_device(settings.device)
    if settings.data.prefetch is None:
        settings.data.prefetch = PREFETCH_ON_GPU if device.type == "cuda" else 0
    tokens = load_tokens(settings.tokens_dir)
    train_cuts = read_cuts(settings.train_manifest)
    if settings.transcribed_share != 1:
        train_cuts, rest = split_by_share(train_cuts, settings.transcribed_share)
        if settings.distil_rest:
            unread = (cut.drop_supervisions() for cut in rest)
            train_cuts = CutSet.from_cuts([*train_cuts, *unread])
    durations = settings.data.min_seconds, settings.data.max_seconds
    train_cuts = of_duration(train_cuts, *durations)
    seconds = [cut.duration for cut in train_cuts]
    for path in settings.untranscribed_manifests:
        unread = (cut.drop_supervisions() for cut in of_duration(read_cuts(path), *durations))
        train_cuts = CutSet.from_cuts([*train_cuts, *unread])
    settings.model.vocab_size = len(tokens)
    if settings.data.max_untranscribed > 0 and settings.distillation.kind != "none":
        check_untranscribed(train_cuts)
    torch.manual_seed(settings.training.seed)
    model = build_transducer(settings.model)
    distillation = build_distillation(settings.distillation, model.encoder, train_cuts, device)
    fields, with_audio = [], False
    if distillation is not None:
        model.codebook_loss_net = distillation.head
        fields, with_audio = distillation.fields, distillation.in_loop
    seed = settings.training.seed
    noise = settings.data.noise.manifest
    dev_data = {
        path.name.split(".")[0]: StudentData(read_cuts(path), tokens, settings.data, seed)
        for path in settings.dev_manifests
    }
    if is_main():
        extractor = extractor_of(next(iter(train_cuts)))
        write_settings(settings, describe_device(device), seconds, extractor)
    task = StudentTask(
        model,
        settings.model,
        StudentData(
            train_cuts,
            tokens,
            settings.data,
            seed,
            fields,
            with_audio,
            None if noise is None else read_cuts(noise),
        ),
        dev_data,
        distillation,
        settings.data.spec_augment,
        tokens,
        device,
    )
    if is_main():
        hours = task.epoch_seconds / 3600
        logging.info(f"{settings.exp_dir}: {hours:.2f} hours an epoch, {device}")
    train(task, settings.training, settings.exp_dir, device)


if __name__ == "__main__":
    cli.run(main, Settings)
