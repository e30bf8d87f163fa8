"""A HuBERT front end that starts as a filterbank.

Trained from scratch on hours of speech, HuBERT's stack of convolutions spends
most of the run finding a spectral analysis. Here the first convolution has a
window of 15 ms and starts as windowed sinusoids at mel-spaced frequencies in four
phases, and the second, of width 1, starts by summing the phases: since the GELU
between them is a rectifier, that is the magnitude in each band. The
architecture is HuBERT's own and all of it is trained.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import HubertForCTC

from mvqkd.data import SAMPLE_RATE


def initialize_filterbank(model: HubertForCTC, seed: int) -> None:
    """Set the first two convolutions of ``model``.

    The first must have four output channels a band, the second width 1.
    """
    first, second = model.hubert.feature_extractor.conv_layers[:2]
    num_filters, _, window = first.conv.weight.shape
    num_bands = num_filters // 4

    def mel(hertz: float) -> float:
        return 1127 * np.log1p(hertz / 700)

    mels = np.linspace(mel(60), mel(7600), num_bands)
    centres = 700 * np.expm1(mels / 1127)
    widths = np.gradient(centres)
    time = (np.arange(window) - (window - 1) / 2) / SAMPLE_RATE
    filters = np.zeros((num_bands, 4, window))
    for band, (centre, width) in enumerate(zip(centres, widths)):
        # A Gaussian as wide as the band asks for, but no wider than the window.
        deviation = min(1 / (2 * np.pi * max(width, 40.0)), window / SAMPLE_RATE / 5)
        envelope = np.exp(-0.5 * (time / deviation) ** 2)
        for phase in range(4):
            wave = envelope * np.cos(2 * np.pi * centre * time + phase * np.pi / 2)
            filters[band, phase] = wave / np.linalg.norm(wave)
        # Speech falls by some 6 dB an octave; lift it so that no band drowns.
        filters[band] *= max(centre, 300.0) / 1000
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = torch.from_numpy(filters.reshape(num_filters, 1, window)).float()
        first.conv.weight.copy_(weight)
        noise = torch.randn(second.conv.weight.shape, generator=generator)
        mixing = 0.02 * noise
        for channel in range(second.conv.weight.shape[0]):
            band = channel % num_bands
            mixing[channel, 4 * band : 4 * band + 4, 0] += 0.5
        second.conv.weight.copy_(mixing)
        for layer in (first, second):
            if layer.conv.bias is not None:
                layer.conv.bias.zero_()
