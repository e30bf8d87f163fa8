"""Sound and pictures small enough to be carried inside a page."""

from __future__ import annotations

import base64
import io

import numpy as np
import soundfile
from lhotse import Fbank, FbankConfig
from PIL import Image

# Of the picture, below the loudest: what lies deeper is background.
_RANGE_DB = 60.0
_MEL_BINS = 80


def data_uri(mime_type: str, content: bytes) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode('ascii')}"


def mp3(samples_L: np.ndarray, sampling_rate: int) -> bytes:
    """What every browser plays; a second of speech takes about 4 kB at 16 kHz.

    Args:
      samples_L: (L,), within [-1, 1].
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, samples_L, sampling_rate, format="MP3", subtype="MPEG_LAYER_III")
    return buffer.getvalue()


def spectrogram_webp(samples_L: np.ndarray, sampling_rate: int) -> bytes:
    """The log-mel filterbank as a picture, dark where it is loud.

    One pixel a frame of 10 ms from left to right, one a mel bin from the highest down.

    Args:
      samples_L: (L,), within [-1, 1]; at least one window of 25 ms.
    """
    extractor = Fbank(FbankConfig(sampling_rate=sampling_rate, num_mel_bins=_MEL_BINS))
    log_mel_TM = np.asarray(extractor.extract(samples_L.astype(np.float32), sampling_rate))
    depth_db_TM = 10 / np.log(10) * (log_mel_TM - log_mel_TM.max())
    grey_TM = 255 * np.clip(-depth_db_TM / _RANGE_DB, 0, 1)
    picture = Image.fromarray(np.flipud(grey_TM.T).round().astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=50, method=4)
    return buffer.getvalue()
