import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from lhotse import Recording
from lhotse.cut import MonoCut
from lhotse.supervision import SupervisionSegment

from mvqkd.errors import RecipeError
from mvqkd.report.page import PageSettings, Report, align, compared_pair, render_page, write_page
from mvqkd.report.table import Origin, StudentResult, WerResult

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "link", "img", "br", "hr", "input", "source", "col"}
ORIGIN = Origin("./run.sh --corpus 'a<b'", "0123abcd", "cpu", 1)
REFS = {"u1": ["THE", "OLD", "LAMP"], "u2": ["A", HOSTILE], "u3": ["ONE"]}
HEARD = {
    "none": {"u1": ["THE", "COLD"], "u2": ["A", "B"], "u3": ["ONE"]},
    "mvq": {"u1": ["THE", "OLD", "LAMP"], "u2": ["A", HOSTILE, "C"], "u3": ["ONE"]},
}


class Page(HTMLParser):
    """The tags, checked to be balanced, and the text of the page outside style and script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [a["id"] for _, a in self.tags if "id" in a]
        assert len(ids) == len(set(ids))
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]

    def sections(self):
        return [a["id"] for a in self.all("section")]


def row(distillation, wer, streaming=False, difference=(), **more):
    result = WerResult(wer, max(0.0, wer - 2), wer + 2, round(wer), 100, *difference)
    return StudentResult("conformer", distillation, streaming, {"test": result}, ORIGIN, **more)


def records(value):
    losses = [{"train/pruned": value}, {"dev/wer-dev": 400.0, "dev/pruned-dev": value}]
    losses += [{"train/pruned": float("nan")}, {"dev/wer-dev": 40.0, "train/simple": 1.0}]
    return [{"step": 10 * i, "seconds": i, "losses": loss} for i, loss in enumerate(losses)]


@pytest.fixture
def report():
    return Report(
        title=f"tiny {HOSTILE}",
        names=["none", "mvq"],
        rows=[
            row("none", 40.0),
            row("mvq", 10.0, difference=(-30.0, -34.0, -26.0), label_bytes_per_hour=1.4e6),
        ],
        decoded=[
            {"test_sets": {"test": {"results": [[u, REFS[u], h] for u, h in heard.items()]}}}
            for heard in HEARD.values()
        ],
        curves={"none": records(5.0), "mvq": records(3.0)},
        teacher_wer={"test": 22.8},
        diagnostics={
            "quantizer_id": "abcd",
            "num_frames": 8,
            "num_codebooks": 2,
            "codebook_size": 4,
            "rrl": {"0": 0.5, "5": 0.25},
            "index_counts": [[2, 2, 2, 2], [8, 0, 0, 0]],
            "entropy_bits": [2.0, 0.0],
            "entropy_bits_max": 2.0,
            "dead_entries": [0, 3],
            "correlation": [[1.0, 0.125], [0.125, 1.0]],
        },
        embedding_bytes_per_hour=1.4e8,
    )


@pytest.fixture
def cuts(tmp_path):
    rng = np.random.default_rng(0)
    cuts = {}
    for name in REFS:
        path = tmp_path / f"{name}.flac"
        soundfile.write(path, 0.1 * rng.standard_normal(8000), 16000)
        supervision = SupervisionSegment(name, name, 0.0, 0.5, text=" ".join(REFS[name]))
        cuts[name] = MonoCut(
            name, 0.0, 0.5, 0, [supervision], recording=Recording.from_file(path, name)
        )
    return cuts


def test_everything_is_there(report, cuts, tmp_path):
    report.cuts = {"test": cuts}
    report.decoded[1]["test_sets"]["test"]["times"] = {"u1": [[0.0, 0.1], [0.1, 0.3], [0.4, 0.5]]}
    # Of several terms of distillation.
    report.curves["mvq"][2]["losses"]["train/2-mvq-l2-distillation"] = 2.0
    write_page(tmp_path / "report" / "index.html", report, PageSettings(spectrograms=2, audio=1))
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.sections() == [
        *("wer", "storage", "training", "codebooks", "errors", "utterances", "origin")
    ]
    for text in (
        "10.00% WER by mvq, 40.00% by none",
        "(75% fewer errors)",
        "[38.00, 42.00]",
        "\u221275.0%",
        "teacher, greedy CTC 22.80",
        "float32 140.0 MB",
        "WER % on dev (cut off at 110)",
        "transducer loss in training",
        "2-mvq-l2-distillation in training",
        "Other losses",
        "after 5 rounds",
        "Where none and mvq differ most",
        "All 3 utterances",
        "0123abcd",
    ):
        assert text in page.text, text
    assert "published" not in page.text.lower()
    # The codebook of which one entry is used: its first cell, and three that never are.
    (use,) = (a for a in page.all("svg") if "Use of codebook" in a.get("aria-label", ""))
    assert use["viewbox"] == "0 0 4 2"
    assert page.all("path", d="M1 1h3v1h-3z", **{"class": "shade h0"})
    # Those on which the students differ most come first, with picture and sound.
    articles = page.all("article")
    assert [a["id"] for a in articles] == ["u/test/u1", "u/test/u2", "u/test/u3"]
    pictures, sounds = page.all("img"), page.all("audio")
    assert len(pictures) == 2 and len(sounds) == 1
    assert all(p["src"].startswith("data:image/webp;base64,UklGR") for p in pictures)
    assert sounds[0]["src"].startswith("data:audio/mpeg;base64,")
    # The second word would lie on the first.
    words = [a["style"] for a in page.all("li") if "style" in a]
    assert words == ["--t:0.0", "--t:0.1;--line:1", "--t:0.4"]
    assert [a["style"] for a in page.all("ol", **{"class": "track"})] == ["--lines:2"]


def test_nothing_is_fetched_and_links_lead_somewhere(report, cuts):
    report.cuts = {"test": cuts}
    text = render_page(report, PageSettings())
    page = Page(text)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("href", "xlink:href"):
            if name in attrs:
                assert attrs[name][0] == "#" and attrs[name][1:] in ids, (tag, attrs)
        if "src" in attrs:
            assert attrs["src"].startswith("data:")
        assert not any(name.startswith("on") for name in attrs)
        assert "url(" not in attrs.get("style", "")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"https?:", text)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:")
    assert "script-src 'sha256-" in policy


def test_text_from_data_is_escaped(report):
    text = render_page(report, PageSettings())
    assert HOSTILE not in text
    page = Page(text)
    assert len(page.all("script")) == 1
    assert page.text.count(HOSTILE) > 3
    assert "./run.sh --corpus 'a<b'" in page.text


def test_ids_of_any_form_can_be_linked_to(report):
    for decoded in report.decoded:
        results = decoded["test_sets"]["test"]["results"]
        decoded["test_sets"]["test"]["results"] = [['a "b"/é#1', *r[1:]] for r in results[:1]]
    page = Page(render_page(report, PageSettings()))
    assert page.all("article", id="u/test/a%20%22b%22/%C3%A9%231")


def test_words_are_marked_by_kind(report):
    pieces = align(["A", "B", "C"], ["A", "X", "C", "D"])
    assert [(p.kind, p.ref, p.hyp) for p in pieces] == [
        ("correct", "A", "A"),
        ("substitution", "B", "X"),
        ("correct", "C", "C"),
        ("insertion", None, "D"),
    ]
    text = render_page(report, PageSettings())
    assert '<ins class="insertion">C</ins>' in text
    article = text[text.index('<article class="utterance" id="u/test/u1"') :]
    article = article[: article.index("</article>")]
    assert article.count("<del>") + article.count('<del class="deletion">') == 2
    assert "2 errors" in article and "0 errors" in article


def test_without_teacher_labels_codebooks_and_curves(report):
    report = dataclasses.replace(
        report, names=["none"], rows=report.rows[:1], decoded=report.decoded[:1], curves={},
        teacher_wer={}, diagnostics=None, embedding_bytes_per_hour=None,
    )  # fmt: skip
    page = Page(render_page(report, PageSettings()))
    assert page.sections() == ["wer", "errors", "utterances", "origin"]
    assert "teacher" not in page.text and "whole utterance" not in page.text
    assert "differ most" not in page.text and "Where most is wrong" in page.text
    assert not page.all("img") and not page.all("audio")


def test_streaming_students_are_apart(report):
    report.rows = [report.rows[0], row("mvq", 10.0, streaming=True)]
    page = Page(render_page(report, PageSettings()))
    assert "whole utterance" in page.text and "streaming" in page.text
    assert compared_pair(report.names, report.rows) is None
    assert "streaming" not in page.sections()


def test_streaming_students_have_their_speed_and_delay(report):
    streaming = row("mvq", 10.0, streaming=True, rtf=0.0125)
    delay = {"tokens": 9, "mean": 0.12, "p90": 0.36, "shown": 0.5}
    result = dataclasses.replace(streaming.test_sets["test"], emission_delay=delay)
    report.rows[1] = dataclasses.replace(streaming, test_sets={"test": result})
    page = Page(render_page(report, PageSettings()))
    assert page.sections()[:2] == ["wer", "streaming"] and page.all("a", href="#streaming")
    header, line = "RTFtest delaytest 90%test shown", "mvqmvq-0.01250.12 s0.36 s0.50 s"
    assert f"{header} {line}" in page.text


def test_published_numbers_lie_beside_ours(report):
    report.rows[1] = dataclasses.replace(
        report.rows[1], paper={"test": 5.52}, paper_source="icefall"
    )
    page = Page(render_page(report, PageSettings()))
    assert "published 5.52" in page.text and "Published: icefall" in page.text
    assert any(a.get("class") == "paper" for a in page.all("path"))


def test_audio_that_is_gone_is_left_out(report, cuts, tmp_path):
    report.cuts = {"test": cuts}
    for path in tmp_path.glob("*.flac"):
        path.unlink()
    page = Page(render_page(report, PageSettings()))
    assert not page.all("img") and not page.all("audio")
    assert "audio could not be read" in page.text and len(page.all("article")) == 3


def test_limits(report):
    page = Page(render_page(report, PageSettings(utterances=1, examples=0)))
    assert len(page.all("article")) == 1 and "The 1 of 3 utterances" in page.text
    assert "differ most" in page.text and "Where none" not in page.text


def test_codebook_use_from_before_it_was_kept(report):
    del report.diagnostics["index_counts"]
    page = Page(render_page(report, PageSettings()))
    assert "Use of entries" not in page.text and "codebooks" in page.sections()


def test_the_pair_that_is_compared():
    rows = [row("mvq", 9.0), row("none", 40.0), row("mvq-l2", 8.0), row("none", 30.0, True)]
    assert compared_pair(["a", "b", "c", "d"], rows) == ("b", "c")
    assert compared_pair(["b"], rows[1:2]) is None


def test_nothing_decoded(report):
    report.rows = []
    with pytest.raises(RecipeError, match="no student has been decoded"):
        render_page(report, PageSettings())
