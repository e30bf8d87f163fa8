"""Recordings of noise to cuts with features, for mixing into training speech."""

from __future__ import annotations

from pathlib import Path

from lhotse import CutSet, Recording

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.features import FeatureSettings, compute_features
from mvqkd.data.manifests import write_cuts
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import require, written_aside


def _recording(folder: Path, path: Path) -> Recording:
    try:
        name = path.relative_to(folder).with_suffix("")
        recording = Recording.from_file(path, recording_id="-".join(name.parts))
    except Exception as error:  # lhotse's backends raise their own kinds
        raise RecipeError(
            f"{path}: cannot be read ({reason_of(error)}); restore or remove it"
        ) from error
    if recording.sampling_rate == SAMPLE_RATE:
        return recording
    return recording.resample(SAMPLE_RATE)


def prepare_noise(
    folder: Path, out: Path, seconds: float, settings: FeatureSettings, num_workers: int
) -> CutSet:
    """Write ``out``: pieces of ``seconds`` of all WAV files under ``folder``, with features.

    Raises:
      RecipeError: there is no such file, or one cannot be read.
    """
    paths = sorted(require(folder, "name a folder with WAV files").rglob("*.wav"))
    if not paths:
        raise RecipeError(f"{folder}: holds no WAV file; name a folder with WAV files")
    # Names alone would not do: folders may hold files of one name.
    whole = CutSet.from_cuts(_recording(folder, path).to_cut() for path in paths)
    done = compute_features(
        whole, out.with_name("recordings.jsonl.gz"), False, settings, num_workers
    )
    pieces = done.cut_into_windows(seconds).to_eager()
    with written_aside(out) as aside:
        write_cuts(pieces, aside)
    return pieces
