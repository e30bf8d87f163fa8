import dataclasses
import json
import math

import pytest

from mvqkd.errors import RecipeError
from mvqkd.report.table import (
    Origin,
    PaperResult,
    StudentResult,
    WerResult,
    format_bytes,
    format_seconds,
    read_results,
    results_document,
    streaming_cells,
    undistilled,
    wer_table,
    with_paper,
    write_results_json,
)

ORIGIN = Origin(command="./run.sh --stage 7", conf_hash="0123abcd", device="cpu", seed=1)
CLEAN = WerResult(wer=20.0, lo=18.5, hi=21.5, errors=200, words=1000)
BASE = StudentResult(
    name="conformer",
    distillation="none",
    streaming=False,
    test_sets={"test-clean": CLEAN, "test-other": dataclasses.replace(CLEAN, wer=40.0)},
    origin=ORIGIN,
    training_seconds=190,
    epochs=8,
    paper={"test-clean": 6.83},
    paper_source="icefall RESULTS-100hours",
)
MVQ = dataclasses.replace(
    BASE,
    distillation="mvq",
    test_sets={
        "test-clean": WerResult(
            15.0, 13.5, 16.5, 150, 1000, delta=-5.0, delta_lo=-6.25, delta_hi=-3.75, p=0.0002
        )
    },
    label_bytes_per_hour=1_440_000,
    training_seconds=3725,
    paper={"test-clean": 5.52},
)
STREAMING = dataclasses.replace(BASE, streaming=True)
ROWS = [BASE, MVQ, STREAMING]


def test_rows_are_compared_with_the_undistilled_student_of_their_kind():
    assert undistilled(ROWS, MVQ) is BASE
    assert undistilled(ROWS, STREAMING) is STREAMING
    assert undistilled(ROWS, dataclasses.replace(MVQ, name="zipformer")) is None
    longer = dataclasses.replace(BASE, epochs=16)
    assert undistilled([*ROWS, longer], longer) is BASE
    earlier = dataclasses.replace(MVQ, weights="epoch-4-avg-1")
    assert undistilled(ROWS, earlier) is None
    base = dataclasses.replace(BASE, weights="epoch-4-avg-1")
    assert undistilled([*ROWS, base], earlier) is base
    other_seed = dataclasses.replace(MVQ, origin=dataclasses.replace(ORIGIN, seed=2))
    assert undistilled(ROWS, other_seed) is None


def test_reduction_is_of_the_error_rate_without_distillation():
    assert MVQ.test_sets["test-clean"].reduction == pytest.approx(25.0)
    assert CLEAN.reduction is None
    assert dataclasses.replace(CLEAN, wer=1.0, delta=1.0).reduction is None
    assert f"{dataclasses.replace(CLEAN, delta=0.0).reduction:.1f}" == "0.0"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_table():
    lines = wer_table(ROWS).splitlines()
    header = cells(lines[0])
    assert header == [
        "student",
        "distillation",
        "streaming",
        "epochs",
        "test-clean WER % [95%]",
        "test-clean published",
        "test-clean reduction",
        "test-clean difference [95%]",
        "test-other WER % [95%]",
        "test-other reduction",
        "test-other difference [95%]",
        "labels / hour",
        "training",
    ]
    assert all(set(cell) == {"-"} for cell in cells(lines[1]))
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert len({len(line) for line in lines[:5]}) == 1
    table = [dict(zip(header, cells(line))) for line in lines[2:5]]
    assert table[0]["test-clean WER % [95%]"] == "20.00 [18.50, 21.50]"
    assert table[0]["test-clean reduction"] == "-"
    assert table[0]["labels / hour"] == "-"
    assert table[0]["training"] == "3m10s"
    assert table[1]["distillation"] == "mvq"
    assert table[1]["test-clean published"] == "5.52"
    assert table[1]["test-clean reduction"] == "25.0%"
    assert table[1]["test-clean difference [95%]"] == "-5.00 [-6.25, -3.75]"
    assert table[1]["test-other WER % [95%]"] == "-"
    assert table[1]["labels / hour"] == "1.4 MB"
    assert table[1]["training"] == "1h02m"
    assert table[2]["streaming"] == "yes" and table[2]["epochs"] == "8"
    assert lines[5:] == ["", "Published: icefall RESULTS-100hours"]


def test_text_gives_each_test_set_a_table():
    clean, other, sources = wer_table(ROWS, style="text").split("\n\n")
    lines = clean.splitlines()
    assert lines[0] == "test-clean"
    columns = {name: lines[1].index(name) for name in ("WER", "reduction", "difference", "labels")}
    assert [line[columns["WER"] :][:20] for line in lines[3:]] == [
        "20.00 [18.50, 21.50]",
        "15.00 [13.50, 16.50]",
        "20.00 [18.50, 21.50]",
    ]
    assert lines[4][columns["reduction"] :].startswith("25.0%  ")
    assert lines[4][columns["difference"] :].startswith("-5.00 [-6.25, -3.75]  ")
    assert lines[4][columns["labels"] :].split() == ["1.4", "MB", "1h02m"]
    assert [line.split()[:4] for line in other.splitlines()[3:]] == [
        ["conformer", "none", "no", "8"],
        ["conformer", "none", "yes", "8"],
    ]
    assert sources == "Published: icefall RESULTS-100hours\n"


def test_no_rows():
    assert cells(wer_table([]).splitlines()[0])[0] == "student"
    assert wer_table([], style="text") == "\n"


def test_streaming_students_have_their_speed_and_delay():
    delay = {"tokens": 9, "mean": 0.121, "p90": 0.36, "shown": 0.5}
    clean = dataclasses.replace(CLEAN, emission_delay=delay)
    streaming = dataclasses.replace(
        STREAMING, test_sets={**STREAMING.test_sets, "test-clean": clean}, rtf=0.0123
    )
    mvq = dataclasses.replace(MVQ, streaming=True, epochs=None)
    assert streaming_cells([BASE, streaming, mvq]) == [
        ["student", "distillation", "epochs", "RTF"]
        + [f"{part} {what}" for part in ("test-clean", "test-other")
           for what in ("delay", "90%", "shown")],
        ["conformer", "none", "8", "0.0123", "0.12 s", "0.36 s", "0.50 s", "-", "-", "-"],
        ["conformer", "mvq", "-", "-", "-", "-", "-", "-", "-", "-"],
    ]  # fmt: skip
    # None is streaming, or nothing is known of those that are.
    assert streaming_cells([BASE, MVQ]) == streaming_cells(ROWS) == []


def test_nothing_published_gives_no_column():
    assert "published" not in wer_table([dataclasses.replace(BASE, paper={})]).lower()


def test_formats():
    assert [format_bytes(n) for n in (None, 0, 999, 1000, 999_949, 999_950, 6.4e9)] == [
        "-",
        "0 B",
        "999 B",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "6.4 GB",
    ]
    assert [format_seconds(s) for s in (None, 0.2, 59.6, 3599.6, 86_400)] == [
        "-",
        "0s",
        "1m00s",
        "1h00m",
        "24h00m",
    ]


def test_results_json_round_trip(tmp_path):
    path = tmp_path / "exp" / "results.json"
    teacher = {"wer": 3.1, "origin": dataclasses.asdict(ORIGIN)}
    write_results_json(path, results_document(ROWS, {"teacher": teacher}))
    assert read_results(path) == ROWS
    assert json.loads(path.read_text())["teacher"]["origin"]["conf_hash"] == "0123abcd"
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_numbers_without_origin_are_refused(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(RecipeError, match=r"results\.json: teacher has no origin\.command"):
        write_results_json(path, results_document(ROWS, {"teacher": {"wer": 3.1}}))
    document = results_document(ROWS)
    del document["students"][1]["origin"]["seed"]
    with pytest.raises(RecipeError, match=r"students\[1\] has no origin\.seed"):
        write_results_json(path, document)
    assert not path.exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    broken = dataclasses.replace(BASE, rtf=math.nan)
    with pytest.raises(RecipeError, match="not finite"):
        write_results_json(tmp_path / "results.json", results_document([broken]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"students": [{"name": "a"}]}', '{"students": [3]}']
)
def test_unreadable_results(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=r"results\.json: cannot be read as results"):
        read_results(path)


def test_published_results_stand_beside_rows_that_are_like_them():
    settings = {"epochs": 30, "paper": {}, "paper_source": ""}
    none = dataclasses.replace(BASE, **settings, decoding="greedy_search-epoch-30-avg-10")
    rows = [
        none,
        dataclasses.replace(none, distillation="mvq"),
        dataclasses.replace(none, streaming=True),
        dataclasses.replace(none, decoding="greedy_search-epoch-3-avg-1"),
    ]
    published = [
        PaperResult("none", {"test-clean": 1.0}, "A", decoding="-epoch-20-"),
        PaperResult("none", {"test-clean": 2.0}, "B", decoding="-epoch-30-"),
        PaperResult("none", {"test-clean": 3.0}, "C", decoding="-epoch-30-"),
        PaperResult("none", {"test-clean": 4.0, "test-other": 5.0}, "D", streaming=True),
    ]
    beside = with_paper(rows, published)
    assert [(row.paper.get("test-clean"), row.paper_source) for row in beside] == [
        (2.0, "B"),
        (None, ""),
        (4.0, "D"),
        (None, ""),
    ]
    assert with_paper(rows, []) == rows
    assert "Published: B; D" in wer_table(beside)
