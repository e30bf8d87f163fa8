"""What the precision of the teacher's matrices changes in its labels: bfloat16 beside float32.

    python3 -m benchmarks.label_precision --teacher exp/mini-small/teacher \\
        --quantizer exp/mini-small/quantizer/mvq/quantizer.pt \\
        --manifest data/mini-small/manifests/dev-clean.jsonl.gz [--device cuda]

Each utterance goes through the teacher twice. Printed are

  - how far the embeddings lie apart: sum of squares over that of float32's about their mean;
  - the share of indexes that differ, and of frames in which one differs;
  - the RRL of both, of float32's embeddings in either case, as these are what the indexes stand
    for; the mean is that of the quantizer's training frames.

The quantizer is in float32 throughout, and float32 is float32 also on a GPU: no TF32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lhotse import CutSet

from mvqkd import cli
from mvqkd.data.audio import AudioBatch, bucketed_batches, collate_audio
from mvqkd.data.manifests import read_cuts
from mvqkd.device import describe_device, full_float32, pick_device
from mvqkd.quantizer import Quantizer, load_quantizer
from mvqkd.teachers import load_teacher
from mvqkd.teachers.base import Teacher


@dataclass
class Settings:
    """The teacher, a quantizer of it, and speech that the quantizer was not trained on."""

    teacher: str
    # Knows its layer.
    quantizer: Path
    manifest: Path
    revision: str | None = None
    device: str = "auto"
    # The first ones of the manifest.
    num_utterances: int = 100
    max_duration: float = 100
    refine_iters: int = 5


@torch.inference_mode()
@full_float32()
def label(
    teacher: Teacher,
    quantizer: Quantizer,
    layer: int,
    batch: AudioBatch,
    dtype: torch.dtype,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings (F, D), indexes (F, N)) of a batch's frames."""
    waveforms_BL = batch.waveforms_BL.to(quantizer.centers.device)
    embeddings_BTD, frames_B = teacher.embed(waveforms_BL, batch.lengths_B, layer, dtype)
    x_FD = torch.cat([x_TD[:count] for x_TD, count in zip(embeddings_BTD, frames_B.tolist())])
    return x_FD, quantizer.encode(x_FD, rounds, as_bytes=False)


@torch.no_grad()
def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    quantizer, meta = load_quantizer(settings.quantizer)
    quantizer.to(device)
    teacher = load_teacher(settings.teacher, settings.revision).to(device)
    cuts = CutSet.from_cuts(list(read_cuts(settings.manifest))[: settings.num_utterances])
    mean_D = torch.as_tensor(meta.get("mean", quantizer.get_data_mean())).to(device)
    num_frames = differ = frames_differ = 0
    total = apart = 0.0
    errors = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for batch_cuts in bucketed_batches(cuts, settings.max_duration, seed=0, epoch=0):
        batch = collate_audio(batch_cuts)
        found = {
            dtype: label(teacher, quantizer, meta["layer"], batch, dtype, settings.refine_iters)
            for dtype in errors
        }
        (x_FD, indexes_FN), (half_FD, half_FN) = found.values()
        num_frames += len(x_FD)
        differ += int((indexes_FN != half_FN).sum())
        frames_differ += int((indexes_FN != half_FN).any(1).sum())
        total += float((x_FD - mean_D).double().square().sum())
        apart += float((half_FD - x_FD).double().square().sum())
        for dtype, (_, coded_FN) in found.items():
            errors[dtype] += float((quantizer.decode(coded_FN) - x_FD).double().square().sum())
    print(
        f"{describe_device(device)}: {len(cuts)} utterances, {num_frames} frames, layer "
        f"{meta['layer']} of {settings.teacher}, N = {quantizer.num_codebooks}, "
        f"{settings.refine_iters} rounds of refinement"
    )
    print(f"embeddings apart: {apart / total:.3g} of their variance")
    print(
        f"indexes that differ: {100 * differ / (num_frames * quantizer.num_codebooks):.3f}%, in "
        f"{100 * frames_differ / num_frames:.3f}% of frames"
    )
    for dtype, error in errors.items():
        print(f"RRL, {str(dtype).removeprefix('torch.')}: {error / total:.5f}")


if __name__ == "__main__":
    cli.run(main, Settings)
