import dataclasses

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.legend import Legend

from mvqkd.errors import RecipeError
from mvqkd.report import plots
from mvqkd.report.table import Origin, StudentResult, WerResult

CURVES = {
    "none": [
        {"step": 10, "seconds": 1.0, "losses": {"train/pruned": 5.0}},
        {"step": 20, "seconds": 2.0, "losses": {"train/pruned": 3.0, "dev/pruned": 4.0}},
    ],
    "mvq": [
        {
            "step": 20,
            "seconds": 3.0,
            "losses": {"train/pruned": 2.0, "dev/pruned": float("nan"), "train/codebook": 7.0},
        },
        {"step": 10, "seconds": 1.5, "losses": {"train/pruned": 4.0, "train/codebook": 9.0}},
    ],
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, so that what is on them can be looked at."""
    saved = []
    save = plots._save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def is_an_image_with_something_on_it(path):
    pixels = imread(path)
    assert pixels.ndim == 3 and min(pixels.shape[:2]) > 100
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10


def test_training_curves(tmp_path, figures):
    path = tmp_path / "report" / "curves.png"
    plots.plot_training_curves(CURVES, path)
    is_an_image_with_something_on_it(path)
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]

    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert list(panels) == ["train/pruned", "dev/pruned", "train/codebook"]
    none, mvq = panels["train/pruned"].get_lines()
    assert list(none.get_xdata()) == [10, 20] and list(none.get_ydata()) == [5.0, 3.0]
    assert list(mvq.get_xdata()) == [10, 20] and list(mvq.get_ydata()) == [4.0, 2.0]
    (codebook,) = panels["train/codebook"].get_lines()
    assert codebook.get_color() == mvq.get_color() != none.get_color()
    assert isinstance(panels["train/pruned"].get_legend(), Legend)


def test_no_records(tmp_path):
    with pytest.raises(RecipeError, match=r"c\.png: no loss was recorded"):
        plots.plot_training_curves({"none": []}, tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_wer_bars(tmp_path, figures):
    origin = Origin(command="./run.sh", conf_hash="0", device="cpu", seed=0)
    result = WerResult(wer=20.0, lo=18.0, hi=23.0, errors=20, words=100)
    none = StudentResult("conformer", "none", False, {"clean": result, "other": result}, origin)
    mvq = dataclasses.replace(none, distillation="mvq", streaming=True, test_sets={"clean": result})
    plots.plot_wer_bars([none, mvq], tmp_path / "bars.png")
    is_an_image_with_something_on_it(tmp_path / "bars.png")
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == [20.0] * 3
    assert [t.get_text() for t in axes.get_xticklabels()] == [
        "conformer\nnone",
        "conformer\nmvq\nstreaming",
    ]


def test_no_test_sets(tmp_path):
    with pytest.raises(RecipeError, match=r"bars\.png: no student has been decoded"):
        plots.plot_wer_bars([], tmp_path / "bars.png")
