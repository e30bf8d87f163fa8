"""What several tests of the students share."""

import pytest

from mvqkd.students.conformer import RelPositionMultiheadAttention, _AttentionFunction


@pytest.fixture(params=["cpu", "gpu"])
def attention(request, monkeypatch):
    """The attention that a student takes on either device, computed on this one."""
    called = []

    def attend(*args):
        called.append(True)
        return RelPositionMultiheadAttention._attend(*args)

    if request.param == "gpu":
        monkeypatch.setattr(_AttentionFunction, "apply", attend)
    yield
    assert bool(called) == (request.param == "gpu")
