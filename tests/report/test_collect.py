"""What rows of the table are called."""

import pytest

from mvqkd.report.collect import kind_of


@pytest.mark.parametrize(
    ("settings", "name", "stored"),
    [
        ({"kind": "none"}, "none", False),
        ({"kind": "mvq"}, "mvq", True),  # of a run before there were further terms
        ({"kind": "mvq", "in_loop": False, "more": []}, "mvq", True),
        ({"kind": "l2", "in_loop": True, "more": []}, "l2 in loop", False),
        (
            {"kind": "mvq", "in_loop": True, "more": [{"kind": "l2", "in_loop": None}]},
            "mvq in loop + l2 in loop",
            False,
        ),
        (
            {"kind": "mvq", "in_loop": False, "more": [{"kind": "mvq-l2", "in_loop": True}]},
            "mvq + mvq-l2 in loop",
            True,
        ),
    ],
)
def test_kinds_of_all_terms(settings, name, stored):
    assert kind_of(settings) == (name, stored)
