"""Codebook indexes as icefall's recipe publishes them."""

from pathlib import Path

import numpy as np
from lhotse import CutSet, MonoCut, NumpyHdf5Writer
from lhotse.utils import fastcopy

ELSEWHERE = "/star-home/someone/icefall/egs/librispeech/ASR/exp/vq/splits2"
MANIFESTS = "librispeech_cuts_{part}-vq.jsonl.gz"
MANIFEST = MANIFESTS.format(part="train-clean-100")


def write_published(cuts, folder: Path, num_codebooks=8) -> dict[str, np.ndarray]:
    """Random indexes of ``cuts``, by recording (of perturbed speed with its suffix).

    Two jobs have written an HDF5 file each, under paths of another machine; ids are those of
    another lhotse; there is a frame more than lies inside the audio, as icefall counts them.
    """
    folder.mkdir(parents=True)
    rng, made, published = np.random.default_rng(1), {}, []
    everything = list(cuts)
    for job in (1, 2):
        with NumpyHdf5Writer(folder / f"clean-100-{job}") as writer:
            for number, cut in enumerate(everything[job - 1 :: 2]):
                recording, _, speed = cut.recording.id.partition("_sp")
                own_id = f"{recording}-{number}" + (f"_sp{speed}" if speed else "")
                num_frames = (cut.num_samples - 400) // 320 + 1 + number % 2
                indexes_TN = rng.integers(0, 256, (num_frames, num_codebooks), np.uint8)
                label = writer.store_array(
                    own_id, indexes_TN, frame_shift=0.02, temporal_dim=0, start=0
                )
                array = fastcopy(label.array, storage_path=f"{ELSEWHERE}/clean-100-{job}.h5")
                bare = MonoCut(own_id, cut.start, cut.duration, cut.channel)
                bare.codebook_indexes = fastcopy(label, array=array)
                published.append(bare)
                made[cut.recording.id] = indexes_TN
    CutSet.from_cuts(published).to_file(folder / MANIFEST)
    return made
