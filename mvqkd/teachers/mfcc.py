"""MFCC as a teacher of one layer: what the first units of a HuBERT are made of.

B: utterances, L: samples, T: frames of 10 ms, C: cepstra, D: dimension (39).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from lhotse.features.kaldi.layers import Wav2MFCC
from torch.nn import functional as F

from mvqkd.data import SAMPLE_RATE
from mvqkd.teachers.base import Teacher


class Mfcc(Teacher):
    """13 MFCC, their first and second differences over time: windows of 25 ms every 10 ms, Kaldi's
    settings, none of them normalized.

    Source: Hsu et al. 2021 (arXiv 2106.07447), section IV.B.
    """

    name = "mfcc"
    dim = 39
    num_layers = 1
    stride = SAMPLE_RATE // 100
    receptive_field = SAMPLE_RATE // 40
    # Ten minutes. Windows of them have the frames of the whole, four of their edges aside.
    window_frames = 60_000

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # Windows inside the audio alone, as a teacher's, suit no manifest of features, which
            # this is not for; and its mel scale is numpy of an older version's manners.
            warnings.filterwarnings("ignore", message="Setting snip_edges")
            warnings.filterwarnings("ignore", message="__array_wrap__")
            self._mfcc = Wav2MFCC(SAMPLE_RATE, snip_edges=True)

    def _layers(
        self, prepared_BL: torch.Tensor, lengths_B: torch.Tensor, layers: Sequence[int]
    ) -> list[torch.Tensor]:
        with torch.autocast(prepared_BL.device.type, enabled=False):  # spectra need float32
            cepstra_BTC = self._mfcc(prepared_BL)
        embeddings = []
        for cepstra_TC, length in zip(cepstra_BTC, lengths_B.tolist()):
            # Differences at an utterance's end must not see the padding.
            cepstra_TC = cepstra_TC[: self.num_frames(length)]
            first_TC = differences(cepstra_TC)
            embeddings.append(torch.cat([cepstra_TC, first_TC, differences(first_TC)], 1))
        return [torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)] * len(layers)


def differences(x_TC: torch.Tensor) -> torch.Tensor:
    """(T, C): slope of the line through five frames, the first and last ones repeated."""
    padded_CT = F.pad(x_TC.T[None], (2, 2), mode="replicate")[0]
    num_frames = len(x_TC)

    def shifted(by: int) -> torch.Tensor:
        return padded_CT[:, 2 + by : 2 + by + num_frames]

    return ((shifted(1) - shifted(-1) + 2 * (shifted(2) - shifted(-2))) / 10).T
