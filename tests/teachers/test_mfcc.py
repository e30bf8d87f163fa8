"""MFCC as a teacher."""

import numpy as np
import pytest
import torch
from scipy.fft import dct

from mvqkd.teachers.mfcc import Mfcc, differences


def test_differences_are_slopes():
    x_TC = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    got_TC = differences(x_TC)
    for t in range(2, 7):
        slopes_C = np.polyfit(np.arange(-2, 3), x_TC[t - 2 : t + 3].numpy(), 1)[0]
        np.testing.assert_allclose(got_TC[t], slopes_C, atol=1e-6)
    line_T1 = torch.arange(8.0)[:, None]
    assert torch.allclose(differences(line_T1)[2:-2], torch.ones(4, 1))
    assert differences(line_T1)[0].item() == pytest.approx(0.5)  # 0 0 0 1 2
    assert torch.equal(differences(torch.ones(1, 2)), torch.zeros(1, 2))


def test_cepstra_are_those_of_the_log_mel_spectrum():
    """Kaldi's: the orthonormal cosine transform of the log energies, lifted by 22."""
    mfcc = Mfcc()
    wave_1L = torch.randn(1, 4000, generator=torch.Generator().manual_seed(2))
    x_1TD, frames_1 = mfcc.embed(wave_1L, torch.tensor([4000]), 1)
    assert x_1TD.shape == (1, 23, 39) and frames_1.tolist() == [23]
    frame_L = wave_1L[0, 1600:2000].double().numpy()  # of frame 10
    frame_L = frame_L - frame_L.mean()
    frame_L = frame_L - 0.97 * np.concatenate([frame_L[:1], frame_L[:-1]])
    povey_L = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.rfft(frame_L * povey_L, 512)) ** 2
    mel = 1127 * np.log1p(np.arange(257) * 16000 / 512 / 700)
    edges = np.linspace(*(1127 * np.log1p(np.array([20, 7600]) / 700)), 25)
    energies = []
    for left, centre, right in zip(edges, edges[1:], edges[2:]):
        up, down = (mel - left) / (centre - left), (right - mel) / (right - centre)
        energies.append(np.clip(np.minimum(up, down), 0, None)[:256] @ power[:256])
    cepstra = dct(np.log(energies), norm="ortho")[:13]
    lift = 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
    np.testing.assert_allclose(x_1TD[0, 10, :13].numpy(), cepstra * lift, rtol=2e-3, atol=2e-3)


def test_utterance_does_not_depend_on_its_batch():
    mfcc, generator = Mfcc(), torch.Generator().manual_seed(3)
    lengths_B = torch.tensor([400, 3333, 5000])
    waves_BL = torch.randn(3, 5000, generator=generator)
    batch_BTD, frames_B = mfcc.embed(waves_BL, lengths_B, 1)
    assert frames_B.tolist() == [1, 19, 29]
    for wave_L, length, x_TD in zip(waves_BL, lengths_B, batch_BTD):
        alone_1TD, _ = mfcc.embed(wave_L[None, :length], length[None], 1)
        torch.testing.assert_close(x_TD[: alone_1TD.shape[1]], alone_1TD[0], rtol=1e-4, atol=1e-4)
