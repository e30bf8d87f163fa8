"""The page of results: what is there, what is missing, and where numbers came from."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import RunOptions
from mvqkd.report.grids import conf_hash
from mvqkd.report.results_page import results_page
from mvqkd.report.table import PaperResult
from tests.recipe_copy import ROOT, copy_checkout
from tests.report.conftest import ORIGIN, ROW, of_grid

RUN = {
    "students": [ROW],
    "teacher": {"wer": {"test": 9.0}, "origin": {**ORIGIN, "seed": None, "date": "2024-05-30"}},
    "quantizer": {"rrl": {"0": 0.3, "5": 0.25}, "num_codebooks": 8, "origin": ORIGIN},
}


def page_of(tmp_path, grids, notes="", **documents) -> str:
    paths = []
    for name, document in documents.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(document))
    return results_page("toy", paths, grids, notes, "COMMAND")


def cells_of(page, name) -> list[str]:
    """Of the first row that begins with ``name``."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_run_has_its_table_and_origin(tmp_path):
    page = page_of(tmp_path, [], "## Notes\n\nMine.\n", small=RUN)
    assert page.startswith("<!-- Made by `COMMAND` from ")
    assert "## small" in page and "25.00 [20.00, 30.00]" in page
    assert (
        "Teacher, WER by greedy CTC: test 9.00." in page
        and "Codebooks: 8, RRL 0.250 after 5 rounds" in page
    )
    assert "`./run.sh --toy`" in page
    assert cells_of(page[page.index("./run.sh --toy") :], "none") == [
        "none", "3", "0123456789ab", "1", "cpu", "2024-05-31"
    ]  # fmt: skip
    assert cells_of(page, "teacher") == ["teacher", "-", "0123456789ab", "-", "cpu", "2024-05-30"]
    assert cells_of(page, "quantizer")[-1] == "-"
    assert page.endswith("## Notes\n\nMine.\n")


def test_streaming_students_have_their_delay_below_the_error_rates(tmp_path):
    assert "Streaming students." not in page_of(tmp_path, [], small=RUN)
    result = {**ROW["test_sets"]["test"], "emission_delay": {"mean": 0.1, "p90": 0.2, "shown": 0.3}}
    row = {**ROW, "streaming": True, "rtf": 0.01, "test_sets": {"test": result}}
    page = page_of(tmp_path, [], small={**RUN, "students": [ROW, row]})
    page = page[page.index("Streaming students. RTF: ") :]
    found = cells_of(page, "conformer")
    assert found == ["conformer", "none", "3", "0.0100", "0.10 s", "0.20 s", "0.30 s"]
    assert page.index("0.30 s") < page.index("Teacher, WER by greedy CTC")


def test_students_whose_confs_have_changed_are_named(tmp_path, monkeypatch):
    calls = []

    def digests(command):
        calls.append(command)
        return {"none": "as it was", "mvq": "another"}

    monkeypatch.setattr("mvqkd.report.results_page.conf_digests", digests)
    kept = {"none": {"confs": "as it was"}, "mvq": {"confs": "as it was not"}, "l2": {}}
    rows = [
        {**ROW, "distillation": kind, "epochs": 4, "origin": {**ROW["origin"], **confs}}
        for kind, confs in kept.items()
    ]
    page = page_of(tmp_path, [], small={**RUN, "students": rows})
    assert "Confs have changed since, those of: mvq (4 epochs).\n" in page
    # Of the third that was not kept.
    assert calls == ["./run.sh --toy"]
    assert "Confs have changed" not in page_of(tmp_path, [], small=RUN)


STUDENTS = {
    "none": "distillation/none",
    "mvq": "distillation/mvq",
    "ours": "distillation/mvq-l2",
    "streaming-mvq": "streaming distillation/mvq",
}


def test_published_numbers_that_were_not_measured(tmp_path):
    published = [
        PaperResult("none", {"test": 7.09}, "The paper"),
        PaperResult("mvq", {"test": 5.82, "other": 15.98}, "The paper", decoding="-epoch-20-"),
        PaperResult("mvq", {"test": 5.5}, "The paper", decoding="-epoch-30-"),
        PaperResult("mvq", {"test": 3.0}, "An article", streaming=True, options="--decoding far"),
    ]

    def section(*rows):
        return results_page("toy", list(rows), [], "Mine.\n", "COMMAND", STUDENTS, published)

    page = section()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    about = ["student", "distillation", "streaming", "decoding"]
    assert found[0] == [*about, "test WER %, published", "other WER %, published", "here"]
    assert found[2:] == [
        ["none", "none", "no", "-", "7.09", "-", "not measured"],
        ["mvq", "mvq", "no", "epoch-20", "5.82", "15.98", "not measured"],
        ["mvq", "mvq", "no", "epoch-30", "5.50", "-", "not measured"],
        ["ours", "mvq-l2", "no", "-", "-", "-", "not measured"],
        ["streaming-mvq", "mvq", "yes", "-", "3.00", "-", "not measured"],
    ]
    command = "./run.sh --corpus toy --device cuda --decoding far"
    assert f"Published: The paper; An article.\n\n`{command}`\n" in page
    assert page.index("## Published, not measured here") < page.index("Mine.")

    # What has been measured stands beside the published in its run's own table.
    mvq = {**ROW, "distillation": "mvq", "decoding": "greedy-epoch-20-avg-1"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"students": [ROW, mvq, {**ROW, "distillation": "mvq-l2"}]}))
    page = section(path)
    page = page[page.index("## Published") :]
    names = [line.split()[1] for line in page.splitlines() if line.startswith("| ")][2:]
    assert names == ["mvq", "streaming-mvq"] and "15.98" not in page
    path.write_text(json.dumps({"students": [{**ROW, "decoding": "-epoch-30-"}]}))
    measured = results_page("toy", [path], [], "", "COMMAND", {"none": STUDENTS["none"]}, published)
    assert "## Published" not in measured
    assert "## Published" not in results_page("toy", [], [], "", "COMMAND", STUDENTS)


def test_grid_says_what_was_found_and_what_was_not_measured(tmp_path, grid):
    page = page_of(tmp_path, [grid], found=of_grid(grid))
    assert "## Grid bytes, toy\n\nHow many?\n" in page
    assert cells_of(page, "mvq") == [
        "mvq", "conformer", "mvq", "no", "mvq", "2 of 2", "12.50 [20.00, 30.00]", "24.00 to 26.00",
        "-12.50 [-15.00, -9.00]", "0.0002", "1.9 MB", "0.250", "1m40s",
    ]  # fmt: skip
    assert cells_of(page, "none")[6:10] == ["25.00 [20.00, 30.00]", "24.00 to 26.00", "-", "-"]
    assert cells_of(page, "mvq-n4")[5:7] == ["0 of 2", "not measured"]
    assert cells_of(page, "cell")[7] == "test of a seed"
    assert "Over few seeds the intervals are too narrow: three drawn again have" in page
    assert "A step's time, as that of training, is with decoding of the dev sets.\n" in page
    assert f"`local/experiment.py`; conf of the grid {conf_hash(grid)}; cpu." in page
    assert "aaaa, bbbb" in page and "2024-05-31, 2024-06-01" in page
    assert "has changed since" not in page
    compared = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page[page.index("One cell against another") :].splitlines()
        if line.startswith("| mvq ")
    ]
    assert compared[:2] == [
        ["mvq", "none", "1.9 MB", "-", "1 of 2", "-12.25 [-15.00, -9.00]", "0.0002"],
        ["mvq", "mvq-n4", "1.9 MB", "-", "0 of 2", "not measured", "-"],
    ]


def test_cells_whose_confs_have_changed_are_named(tmp_path, grid, monkeypatch):
    asked = []

    def digests(grid, options):
        asked.append(options)
        return {"none-seed1": "a", "none-seed2": "b", "mvq-seed1": "c", "mvq-seed2": "d"}

    monkeypatch.setattr("mvqkd.report.results_page.grid_digests", digests)
    document = of_grid(grid)
    document["grid"]["options"] = {"teacher": "large"}
    none, mvq, _ = document["grid"]["cells"]
    none["conf_digests"], mvq["conf_digests"] = ["a", "b"], ["c", "as it was not"]
    page = page_of(tmp_path, [grid], found=document)
    assert "Confs have changed since, those of: mvq.\n" in page
    assert asked == [RunOptions(teacher="large")]
    none["conf_digests"] = mvq["conf_digests"] = ["", ""]
    assert "Confs have changed" not in page_of(tmp_path, [grid], found=document)
    assert len(asked) == 1


def test_run_of_more_seeds_than_the_conf_has(tmp_path, grid, monkeypatch):
    asked = []

    def digests(grid, options):
        asked.append(grid.seeds)
        return {f"{cell}-seed{seed}": "same" for cell in grid.cells for seed in grid.seeds}

    monkeypatch.setattr("mvqkd.report.results_page.grid_digests", digests)
    document = of_grid(grid)
    section = document["grid"]
    section["seeds"], section["options"] = [1, 2, 3], {}
    section["origin"]["conf_hash"] = conf_hash(replace(grid, seeds=[1, 2, 3]))
    found = {"seeds_done": [1, 2, 3], "conf_digests": ["same"] * 3, "devices": ["cpu", "cuda"]}
    section["cells"][1].update(found)
    page = page_of(tmp_path, [grid], found=document)
    assert asked == [[1, 2, 3]]
    assert cells_of(page, "mvq")[5] == "3 of 3" and "of the seeds 1, 2, 3 that" in page
    assert "changed since" not in page
    assert "| cpu; cuda " in page


def test_dev_sets_have_their_error_rate(tmp_path, grid):
    document = of_grid(grid)
    document["grid"]["dev_parts"] = ["dev"]
    cell = document["grid"]["cells"][1]
    cell["test_sets"]["dev"] = {**cell["test_sets"]["test"], "wer": 13.25}
    page = page_of(tmp_path, [grid], found=document)
    header = cells_of(page, "cell")
    assert [name for name in header if name.startswith("dev")] == ["dev WER %"]
    assert cells_of(page, "mvq")[header.index("dev WER %")] == "13.25"
    assert cells_of(page, "none")[header.index("dev WER %")] == "-"
    assert len(cells_of(page, "mvq-n4")) == len(header)
    assert (
        "dev sets, that of training with it, by whose error rates a cell is to be chosen." in page
    )


def test_seeds_that_are_out_of_date_are_named(tmp_path, grid):
    document = of_grid(grid)
    document["grid"]["cells"][1]["seeds_out_of_date"] = [2, 3]
    page = page_of(tmp_path, [grid], found=document)
    assert (
        "Left out of mvq, since its confs have changed after it was trained: seed 2, 3.\n" in page
    )


def test_grid_that_never_ran(tmp_path, grid):
    page = page_of(tmp_path, [grid], "Mine.\n", small=RUN)
    assert page.count("not measured") == 3
    rows = page[page.index("## Grid bytes") :]
    assert [cells_of(rows, name)[4] for name in ("none", "mvq", "mvq-n4")] == ["-", "mvq", "n4"]
    assert "One cell against another" not in page
    assert page.index("## small") < page.index("Mine.") < page.index("## Grid bytes")
    assert "`python3 local/experiment.py --config egs/toy/conf/grids/bytes.yaml`" in page


def test_cell_that_meant_something_else_is_not_measured(tmp_path, grid):
    document = of_grid(grid)
    grid.cells["mvq"].values = {"distillation": {"layer": 2}}
    page = page_of(tmp_path, [grid], found=document)
    assert cells_of(page, "mvq")[5:7] == ["0 of 2", "not measured"]
    assert f"The conf of the grid has changed since, and is now {conf_hash(grid)}." in page


def test_run_of_fewer_seeds_is_of_the_same_conf(tmp_path, grid):
    ran = replace(grid, seeds=[1])
    document = of_grid(ran)
    document["grid"]["seeds"] = [1]
    document["grid"]["cells"][1]["seeds_done"] = [1]
    page = page_of(tmp_path, [grid], found=document)
    assert cells_of(page, "mvq")[5] == "1 of 2"
    assert f"conf of the grid {conf_hash(ran)}; cpu." in page and "has changed since" not in page


def test_results_of_an_unknown_grid_are_refused(tmp_path, grid):
    with pytest.raises(RecipeError, match="results of grid bytes: egs/toy/conf/grids has none"):
        page_of(tmp_path, [], found=of_grid(grid))


def test_script_keeps_what_it_takes(tmp_path, grid, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "local"))
    script = __import__("results_page")
    (tmp_path / "exp/toy-small").mkdir(parents=True)
    (tmp_path / "exp/toy-small/results.json").write_text(json.dumps(RUN))
    (tmp_path / "exp/grid.json").write_text(json.dumps(of_grid(grid)))
    (tmp_path / "egs/toy/notes.md").write_text("Mine.\n")
    (tmp_path / "egs/toy/recipe.sh").write_text('name=toy-small pool_parts=""\n')
    (tmp_path / "local").mkdir()
    for name in ("recipe.sh", "steps.sh"):
        shutil.copy(ROOT / "local" / name, tmp_path / "local")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/students.txt").write_text("# student  confs\nmvq   distillation/mvq\n")
    (tmp_path / "conf/report.yaml").write_text("page: {audio: 1}\n")
    paper = {"distillation": "mvq", "wer": {"test": 5.5}, "source": "The paper"}
    (tmp_path / "egs/toy/conf/report.yaml").write_text(json.dumps({"paper": [paper]}))
    take = "[exp/toy-small/results.json, exp/grid.json]"
    script.main(cli.parse(script.Settings, ["--corpus", "toy", "--take", take])[0])
    page = (tmp_path / "egs/toy/RESULTS.md").read_text()
    kept = {path.name for path in (tmp_path / "egs/toy/results").iterdir()}
    assert kept == {"toy-small.json", "grid-bytes-toy-small.json"}
    shutil.rmtree(tmp_path / "exp")
    script.main(cli.parse(script.Settings, ["--corpus", "toy"])[0])
    assert (tmp_path / "egs/toy/RESULTS.md").read_text() == page
    assert page.index("## toy-small") < page.index("Mine.\n") < page.index("## Grid bytes")
    assert "## Grid bytes, toy-small\n" in page
    assert cells_of(page[page.index("## Published") :], "mvq") == [
        "mvq", "mvq", "no", "-", "5.50", "not measured"
    ]  # fmt: skip
    # Another size stands beside it, the same one in its place.
    other = of_grid(replace(grid, size="full"))
    other["grid"] |= {"run": "toy-full", "size": "full", "split": ""}
    (tmp_path / "other.json").write_text(json.dumps(other))
    old = tmp_path / "egs/toy/results/grid-bytes-toy-small.json"
    old.rename(old.with_name("grid-bytes.json"))
    (tmp_path / "again.json").write_text(json.dumps(of_grid(grid)))
    take = "[other.json, again.json]"
    script.main(cli.parse(script.Settings, ["--corpus", "toy", "--take", take])[0])
    kept = sorted(path.name for path in (tmp_path / "egs/toy/results").iterdir())
    assert kept == ["grid-bytes-toy-full.json", "grid-bytes-toy-small.json", "toy-small.json"]
    page = (tmp_path / "egs/toy/RESULTS.md").read_text()
    assert "## Grid bytes, toy-full\n" in page and "## Grid bytes, toy-small\n" in page
    # What is said of all grids is said once.
    assert page.count("Means over those of the seeds") == 1
    assert page.count("One cell against another") == 1 and page.count("| against |") == 2
    assert "The conf of the grid has changed" not in page
    with pytest.raises(RecipeError, match="--corpus other: not known; give one of: toy"):
        script.recipe_of("other")
    sys.modules.pop("results_page")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.mark.parametrize(
    "corpus", sorted(path.parent.name for path in ROOT.glob("egs/*/recipe.sh"))
)
def test_page_is_what_results_confs_and_notes_give(checkout, corpus, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(str(ROOT / "local"))
    script = __import__("results_page")
    page = Path("egs") / corpus / "RESULTS.md"
    before = page.read_text()
    script.main(cli.parse(script.Settings, ["--corpus", corpus])[0])
    assert page.read_text() == before, f"{page}: python3 local/results_page.py --corpus {corpus}"
