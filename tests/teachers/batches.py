"""Batches of noise, and what a teacher owes to each utterance in them."""

import torch
from torch.nn import functional as F


def waveforms(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    waves = [torch.randn(n, generator=generator) * 0.1 + 0.05 for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor(lengths)


def check_independence(teacher, *lengths):
    """Each of four utterances has the same embedding alone, in any order, with any padding."""
    waveforms_BL, lengths_B = waveforms(*lengths)
    dirty_BL = waveforms_BL.clone()
    for row, n in zip(dirty_BL, lengths_B):
        row[n:] = float("nan")  # padding may hold anything
    order = torch.tensor([2, 0, 3, 1])
    for layer in (1, 2):
        alone = [
            teacher.embed(w[None, :n], n[None], layer)[0][0]
            for w, n in zip(waveforms_BL, lengths_B)
        ]
        for batch_BL, chosen in (
            (waveforms_BL, torch.arange(4)),
            (dirty_BL[order], order),
            (F.pad(waveforms_BL[:2], (0, 7777)), torch.arange(2)),
        ):
            embeddings_BTD, frames_B = teacher.embed(batch_BL, lengths_B[chosen], layer)
            for x_TD, n, index in zip(embeddings_BTD, frames_B, chosen):
                assert len(alone[index]) == n == teacher.num_frames(int(lengths_B[index]))
                torch.testing.assert_close(x_TD[:n], alone[index], atol=1e-4, rtol=0)
    (second_BTD, first_BTD), frames_B = teacher.embed_layers(waveforms_BL, lengths_B, [2, 1])
    for layer, several_BTD in ((1, first_BTD), (2, second_BTD)):  # one pass, the same to the bit
        for x_TD, y_TD, n in zip(
            several_BTD, teacher.embed(waveforms_BL, lengths_B, layer)[0], frames_B
        ):
            assert torch.equal(x_TD[:n], y_TD[:n])
