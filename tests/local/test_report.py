"""Stage 8's settings: the published numbers of the corpora that have some."""

from local import report
from mvqkd import cli
from mvqkd.decoding.decode import DecodingSettings
from mvqkd.report.table import Origin, StudentResult, with_paper
from tests.recipe_copy import ROOT

ARGS = ["--exp_dir", "exp", "--data_dir", "data", "--labels", "mvq", "--command", "./run.sh"]


def parse(*confs):
    words = [word for conf in confs for word in ("--config", str(ROOT / conf))]
    return cli.parse(report.Settings, [*words, *ARGS, "--students", "[none]"])[0]


def row(distillation, epoch, streaming=False, **decoding):
    name = DecodingSettings(**decoding).name(epoch, streaming)
    origin = Origin("./run.sh", "0123abcd", "cpu", 42)
    return StudentResult("conformer", distillation, streaming, {}, origin, decoding=name)


def test_published_numbers_are_beside_students_decoded_alike():
    general = "conf/report.yaml"
    assert parse(general).paper == []
    settings = parse(general, "egs/librispeech-100/conf/report.yaml")
    assert settings.page.utterances == 1000
    rows = [
        row("none", 30),
        row("mvq", 50),
        row("mvq-l2", 30),
        row("mvq", 30, streaming=True),
        row("mvq", 3),
        row("mvq", 30, method="greedy_search"),
        row("mvq", 30, avg=1),
    ]
    found = [list(one.paper.values()) for one in with_paper(rows, settings.paper)]
    assert found == [[6.83, 18.19], [5.50, 14.77], [], [], [], [], []]

    settings = parse(general, "egs/librispeech-960/conf/report.yaml")
    rows = [
        row("none", 30),
        row("mvq", 30),
        row("mvq", 31),
        row("none", 30, True, right_context=9),
        row("mvq", 20, True, right_context=9),
        row("mvq", 30, True),
    ]
    beside = with_paper(rows, settings.paper)
    found = [list(one.paper.values()) for one in beside]
    assert found == [[2.63, 6.19], [2.30, 5.57], [], [3.13, 8.06], [2.93, 7.43], []]
    assert beside[0].paper_source.startswith("k2-fsa's article on MVQ, 2022-07")
