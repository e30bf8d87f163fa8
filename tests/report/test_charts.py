import math

import pytest

from mvqkd.report.charts import Look, Point, Scale, line_panel, spread_points, use_map

LOOKS = {"a": Look(0, False, "a"), "b": Look(1, True, "b")}


def test_linear_scale():
    scale = Scale(0, 40)
    assert [scale(v) for v in (0, 10, 40)] == [0, 25, 100]
    assert scale.ticks(4) == [(0, "0"), (25, "10"), (50, "20"), (75, "30"), (100, "40")]
    assert [label for _, label in Scale(0, 0.07).ticks(4)] == ["0", "0.02", "0.04", "0.06"]


def test_logarithmic_scale():
    scale = Scale(1, 10_000, log=True)
    assert scale(100) == pytest.approx(50)
    assert [label for _, label in scale.ticks()] == ["1", "10", "100", "1000", "10000"]
    assert [label for _, label in Scale(0.3, 4, log=True).ticks()] == ["0.3", "1", "3"]


def test_lines_have_gaps_where_values_are_not_finite():
    curves = {
        "a": [{"step": s, "losses": {"x": v}} for s, v in ((0, 2.0), (10, math.nan), (20, 1.0))],
        "b": [{"step": 20, "losses": {"y": 1.0}}],
    }
    panel = line_panel("x", "X", curves, LOOKS)
    (line,) = panel.lines
    assert len(line.pieces) == 2 and line.pieces[1].startswith("100,")
    assert [text for _, _, text in line.dots] == ["a, step 0: 2", "a, step 20: 1"]
    assert line.last == 1.0 and panel.cut_off is None and not panel.log
    assert line_panel("absent", "X", curves, LOOKS) is None


def test_values_above_the_top_are_cut_off():
    curves = {"a": [{"step": s, "losses": {"wer": v}} for s, v in ((1, 420.0), (2, 50.0))]}
    panel = line_panel("wer", "WER", curves, LOOKS, top=100)
    assert panel.cut_off == 100 and len(panel.lines[0].dots) == 1
    assert line_panel("wer", "WER", curves, LOOKS, top=500).cut_off is None


def test_losses_of_several_magnitudes_are_logarithmic():
    curves = {"a": [{"step": s, "losses": {"x": v}} for s, v in ((1, 5.0), (2, 0.05))]}
    assert line_panel("x", "X", curves, LOOKS).log
    curves["a"][0]["losses"]["x"] = -5.0
    assert not line_panel("x", "X", curves, LOOKS).log


def test_use_map_sorts_and_shades():
    assert use_map([[0, 8, 0, 0], [2, 2, 2, 2]]) == [
        (0, "M1 0h3v1h-3z"),
        (4, "M0 1h4v1h-4z"),
        (7, "M0 0h1v1h-1z"),
    ]


def test_points_of_the_same_size_lie_side_by_side():
    points = [Point(LOOKS["a"], x, 0, 0, 0, "") for x in (10.0, 50.0, 10.0)]
    spread_points(points)
    assert [point.shift for point in points] == [-7, 0, 7]
