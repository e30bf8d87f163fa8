"""Whisper's encoder as a teacher, by transformers.

It hears 30 seconds, no more and no less, and attends to all of them: whatever is shorter is
followed by silence up to there, as in its training. So each utterance is padded by itself,
whatever batch it comes in.

Of more than 30 seconds it has no output as a whole that windows could be compared with. They go
through it in windows of 30 seconds, one every 20, and a frame is that of the window in which it
lies at least 5 seconds from a neighbour: the same, to rounding, as the frame of these 30 seconds
given as an utterance of their own.

B: utterances, L: samples, T: frames (`T_teacher`), D: dimension, M: mel bins, F: mel frames.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022 (arXiv
2212.04356).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mvqkd.data import SAMPLE_RATE
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import require
from mvqkd.teachers.base import Teacher, kept_layers
from mvqkd.teachers.hubert import check_weights, load_pretrained


class WhisperTeacher(Teacher):
    """The encoder of a Whisper; utterances of more than 30 seconds go through it in windows, see
    above."""

    # A mel frame is centred on the first sample of its hop, and an output of the second
    # convolution on the first of its two mel frames.
    frame_offset = 0.0

    def __init__(
        self, encoder: WhisperEncoder, extractor: WhisperFeatureExtractor, name: str = "whisper"
    ) -> None:
        super().__init__()
        self.encoder, self.extractor, self.name = encoder, extractor, name

    @property
    def dim(self) -> int:
        return self.encoder.config.d_model

    @property
    def num_layers(self) -> int:
        return self.encoder.config.encoder_layers

    @property
    def stride(self) -> int:
        return self.extractor.hop_length * self.encoder.conv2.stride[0]

    @property
    def receptive_field(self) -> int:
        """A frame counts if the samples up to the next one are inside the audio."""
        return self.stride

    @property
    def window_frames(self) -> int:
        return self.encoder.config.max_source_positions

    @property
    def margin_frames(self) -> int:
        """5 of 30 seconds."""
        return self.window_frames // 6

    def _layers(
        self, prepared_BL: torch.Tensor, lengths_B: torch.Tensor, layers: Sequence[int]
    ) -> list[torch.Tensor]:
        waves = [w_L[:n].cpu().numpy() for w_L, n in zip(prepared_BL, lengths_B)]
        device = prepared_BL.device
        with torch.autocast(device.type, enabled=False):  # a spectrum, not a matter of layers
            mels_BMF = self.extractor(
                waves, sampling_rate=SAMPLE_RATE, return_tensors="pt", device=str(device)
            )["input_features"]
        with kept_layers(self.encoder, layers) as outputs:
            self.encoder(mels_BMF.to(self.encoder.conv1.weight))
        num_frames = max(self.num_frames(n) for n in lengths_B.tolist())
        return [outputs[layer][:, :num_frames] for layer in layers]


def load_whisper(folder: Path, name: str) -> WhisperTeacher:
    """A teacher from a Whisper, or its encoder alone, in transformers' layout.

    Raises:
      RecipeError: files are missing, damaged or do not fit each other.
    """
    preprocessor = require(folder / "preprocessor_config.json", "fetch the folder again")
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # transformers raises several kinds
        raise RecipeError(
            f"{preprocessor}: cannot be read ({reason_of(error)}); fetch it again"
        ) from error
    # The decoder's weights are left where they are.
    encoder, report = load_pretrained(
        WhisperEncoder, folder, key_mapping={r"^(model\.)?encoder\.": ""}
    )
    check_weights(folder, report)
    config = encoder.config
    teacher = WhisperTeacher(encoder, extractor, name)
    expected = (config.num_mel_bins, config.max_source_positions * teacher.stride)
    if (extractor.feature_size, extractor.n_samples) != expected:
        raise RecipeError(
            f"{preprocessor}: {extractor.feature_size} mel bins over {extractor.n_samples} samples "
            f"are not the {expected[0]} over {expected[1]} of config.json; fetch the folder again"
        )
    return teacher.eval()
