"""The page of a grid: what its cells found, and nothing from elsewhere."""

import pytest

from mvqkd.report.grid_page import render_grid_page, write_grid_page
from tests.report.conftest import of_grid
from tests.report.test_page import HOSTILE, Page


@pytest.fixture
def document(grid):
    document = of_grid(grid)
    document["grid"] |= {"run": "toy-small"}
    return document


def test_cells_have_bars_comparisons_and_origins(grid, document, tmp_path):
    write_grid_page(tmp_path / "index.html", grid, document)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.sections() == ["wer", "against", "storage", "origin"]
    wanted = ["How many?", "4 of 6 students are done.", "12.50 [20.00, 30.00]", "\u221250.0%"]
    wanted += ["mvq-n4", "not measured", "-12.25 [-15.00, -9.00]", "aaaa, bbbb"]
    wanted += ["local/experiment.py; conf of the grid"]
    for text in wanted:
        assert text in page.text, text
    # Of two cells two seeds each, the bars as wide as their means.
    assert len(page.all("circle", r="3")) == 4
    none, mvq = (float(bar["width"][:-1]) for bar in page.all("rect", **{"class": "bar"}))
    assert mvq == pytest.approx(none / 2, abs=0.01)


def test_nothing_is_fetched_and_text_is_escaped(grid, document):
    grid.question = HOSTILE
    text = render_grid_page(grid, document)
    page = Page(text)
    assert HOSTILE not in text and HOSTILE in page.text
    assert not page.all("script") and not page.all("link")
    assert all(attrs["href"][0] == "#" for attrs in page.all("a"))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_grid_of_which_nothing_is_done(grid, document):
    document["grid"]["cells"] = []
    page = Page(render_grid_page(grid, document))
    assert page.sections() == ["wer", "against", "origin"]
    assert "0 of 6 students are done." in page.text
