"""What float32 means."""

import pytest
import torch

from mvqkd.data.labels import compute_labels
from mvqkd.device import full_float32
from mvqkd.teachers.base import Teacher
from tests.teachers.batches import waveforms


def flags():
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


FULL = ("highest", False, False)


@pytest.fixture
def tf32():
    """Allowed, as some builds of torch and callers have it."""
    before = flags()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield flags()
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[2]


def test_float32_is_float32_within_and_what_it_was_after(tf32):
    assert tf32 == ("high", True, True)
    with full_float32():
        assert flags() == FULL
    assert flags() == tf32
    with pytest.raises(ValueError), full_float32():
        raise ValueError
    assert flags() == tf32


class WatchedTeacher(Teacher):
    name, dim, num_layers, stride, receptive_field, window_frames = "watched", 4, 1, 320, 320, 20
    margin_frames, seen = 5, ()

    def _layers(self, prepared_BL, lengths_B, layers):
        self.seen += (flags(),)
        return [prepared_BL.unfold(1, 320, 320)[..., :4]]


class WatchedKind:
    """What of a label kind `compute_labels` needs."""

    field = "watched"

    def __init__(self, teacher, origin):
        self.teacher, self.origin = teacher, origin

    def encode(self, embeddings_FD):
        self.seen = flags()
        return embeddings_FD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teachers_and_quantizers_compute_in_float32(tf32, origin, dtype):
    teacher = WatchedTeacher()
    for samples in (5000, 9600):  # a window, and several
        teacher.embed(*waveforms(samples), 1, dtype)
    assert len(teacher.seen) == 3 and set(teacher.seen) == {FULL} and flags() == tf32
    origin.layer, kind = 1, WatchedKind(teacher, origin)
    compute_labels([kind], *waveforms(5000), dtype)
    assert kind.seen == FULL and flags() == tf32


def test_transcripts_are_of_float32(tf32, teacher):
    seen, layer = [], teacher.model.base_model.encoder.layers[0]
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(flags()))
    teacher.transcribe(*waveforms(5000))
    handle.remove()
    assert seen == [FULL] and flags() == tf32
