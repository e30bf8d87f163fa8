"""Scoring against cases counted by hand, and against kaldialign's own bootstrap."""

import ast
import random

import kaldialign
import pytest

from mvqkd.decoding import scoring
from mvqkd.errors import RecipeError

# By hand: 1 substitution (B -> X), 1 deletion (D), 2 insertions (F, F), 9 words, 7 of them right.
RESULTS = [
    ("utt-2", ["E", "A"], ["E", "F", "F", "A"]),
    ("utt-1", ["A", "B", "C", "D"], ["A", "X", "C"]),
    ("utt-3", ["A", "B", "C"], ["A", "B", "C"]),
]


def random_results(seed, num_utterances=60, error_rate=0.2):
    rng = random.Random(seed)
    results = []
    for u in range(num_utterances):
        ref = [rng.choice("ABCDEFGH") for _ in range(rng.randint(1, 12))]
        hyp = [rng.choice("ABCDEFGH") if rng.random() < error_rate else w for w in ref]
        results.append((f"utt-{u:03d}", ref, hyp))
    return results


def test_recogs(tmp_path):
    scoring.write_recogs(tmp_path / "new" / "recogs-test-clean-greedy.txt", RESULTS)
    assert (tmp_path / "new" / "recogs-test-clean-greedy.txt").read_text() == (
        "utt-1:\tref=['A', 'B', 'C', 'D']\n"
        "utt-1:\thyp=['A', 'X', 'C']\n"
        "utt-2:\tref=['E', 'A']\n"
        "utt-2:\thyp=['E', 'F', 'F', 'A']\n"
        "utt-3:\tref=['A', 'B', 'C']\n"
        "utt-3:\thyp=['A', 'B', 'C']\n"
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["recogs-test-clean-greedy.txt"]


def test_recogs_can_be_read_back(tmp_path):
    results = [("a", ["IT'S", '"', "\u00e9t\u00e9"], [])]
    scoring.write_recogs(tmp_path / "r.txt", results)
    ref, hyp = (tmp_path / "r.txt").read_text(encoding="utf-8").splitlines()
    assert ast.literal_eval(ref.split("ref=")[1]) == results[0][1]
    assert ast.literal_eval(hyp.split("hyp=")[1]) == []


def test_errs(tmp_path):
    counts = scoring.write_errs(tmp_path / "errs.txt", RESULTS)
    assert counts == scoring.ErrorCounts(
        insertions=2, deletions=1, substitutions=1, correct=7, words=9
    )
    assert counts.errors == 4
    assert counts.wer == pytest.approx(400 / 9)
    assert counts.line("test-clean-greedy") == (
        "[test-clean-greedy] %WER 44.44% [4 / 9, 2 ins, 1 del, 1 sub ]"
    )
    assert (
        (tmp_path / "errs.txt").read_text()
        == """\
%WER = 44.44
Errors: 2 insertions, 1 deletions, 1 substitutions, over 9 reference words (7 correct)
Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, \
PER-WORD STATS:

PER-UTT DETAILS: corr or (ref->hyp)\x20\x20
utt-1:\tA (B->X) C (D->*)
utt-2:\tE (*->F F) A
utt-3:\tA B C

SUBSTITUTIONS: count ref -> hyp
1   B -> X

DELETIONS: count ref
1   D

INSERTIONS: count hyp
2   F

PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp
F   0 2 0 2
X   0 1 0 1
D   0 1 1 0
B   1 1 2 1
E   1 0 1 1
C   2 0 2 2
A   3 0 3 3
"""
    )


def test_errs_with_odd_words(tmp_path):
    """A word that is the mark for no word, an empty reference, an empty hypothesis."""
    results = [("a", ["*", "B"], ["*"]), ("b", [], ["X"]), ("c", ["Y", "Z"], [])]
    counts = scoring.write_errs(tmp_path / "errs.txt", results)
    assert (counts.insertions, counts.deletions, counts.substitutions) == (1, 3, 0)
    assert (counts.correct, counts.words) == (1, 4)
    text = (tmp_path / "errs.txt").read_text()
    assert "a:\t* (B->*)\nb:\t(*->X)\nc:\t(Y Z->*)\n" in text


def test_errs_counts_equal_kaldialigns(tmp_path):
    results = random_results(3, error_rate=0.4)
    results = [(c, r, h[1:]) for c, r, h in results]
    counts = scoring.write_errs(tmp_path / "errs.txt", results)
    expected = kaldialign.batch_error_rate([r for _, r, _ in results], [h for _, _, h in results])
    assert (counts.insertions, counts.deletions) == (expected["ins"], expected["del"])
    assert (counts.substitutions, counts.words) == (expected["sub"], expected["ref_len"])
    assert counts.wer == pytest.approx(100 * expected["err_rate"])


def test_no_reference_words_are_an_error_and_leave_no_file(tmp_path):
    with pytest.raises(RecipeError, match=r"errs\.txt: the references hold no word"):
        scoring.write_errs(tmp_path / "errs.txt", [("a", [], ["X"])])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="the references hold no word"):
        scoring.wer_interval([("a", [], ["X"])])


def test_wer_summary(tmp_path):
    text = scoring.write_wer_summary(
        tmp_path / "wer.txt", {"greedy_search": 7.5, "beam_4": 7.0933}, "test-clean"
    )
    assert (tmp_path / "wer.txt").read_text() == (
        "settings\tWER\nbeam_4\t7.09\ngreedy_search\t7.5\n"
    )
    assert text == (
        "For test-clean, WER of different settings are:\n"
        "beam_4\t7.09\tbest for test-clean\n"
        "greedy_search\t7.5"
    )


def test_save_results_names_the_files(tmp_path):
    counts = scoring.save_results(tmp_path, "test-other", "beam_4", RESULTS)
    assert counts.errors == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "errs-test-other-beam_4.txt",
        "recogs-test-other-beam_4.txt",
        "wer-summary-test-other-beam_4.txt",
    ]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    scoring.write_recogs(tmp_path / "r.txt", RESULTS)
    before = (tmp_path / "r.txt").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        scoring.write_recogs(tmp_path / "r.txt", RESULTS[:1])
    assert [p.name for p in tmp_path.iterdir()] == ["r.txt"]
    assert (tmp_path / "r.txt").read_bytes() == before


def test_interval_agrees_with_kaldialigns_bootstrap():
    """Theirs is the mean +- 1.96 deviations of the same distribution, ours its percentiles."""
    results = random_results(0)
    wer, low, high = scoring.wer_interval(results, seed=1)
    theirs = kaldialign.bootstrap_wer_ci([r for _, r, _ in results], [h for _, _, h in results])
    assert wer == pytest.approx(
        100
        * kaldialign.batch_error_rate([r for _, r, _ in results], [h for _, _, h in results])[
            "err_rate"
        ]
    )
    assert low < wer < high
    assert low == pytest.approx(100 * theirs["ci95min"], abs=0.3)
    assert high == pytest.approx(100 * theirs["ci95max"], abs=0.3)


def test_interval_depends_on_the_seed_alone():
    results = random_results(0)
    assert scoring.wer_interval(results, seed=1) == scoring.wer_interval(results[::-1], seed=1)
    assert scoring.wer_interval(results, seed=1) != scoring.wer_interval(results, seed=2)


def test_interval_of_a_perfect_system():
    results = [(c, r, r) for c, r, _ in random_results(0)]
    assert scoring.wer_interval(results) == (0.0, 0.0, 0.0)


def test_interval_does_not_depend_on_the_block_size(monkeypatch):
    """Blocks only bound the memory: the draws are the same ones."""
    results = random_results(0)
    whole = scoring.wer_interval(results, replications=1000)
    monkeypatch.setattr(scoring, "_BLOCK_ELEMENTS", 60 * 7)
    monkeypatch.setattr(scoring, "_KEPT_ELEMENTS", 0)
    assert scoring.wer_interval(results, replications=1000) == whole


def test_paired_difference_of_a_clear_improvement():
    worse = random_results(0, error_rate=0.4)
    # Every second error repaired.
    better = [
        (c, r, r if int(c[-3:]) % 2 else h)
        for c, r, h in worse[::-1]  # in another order
    ]
    difference = scoring.paired_difference(worse, better, seed=0)
    assert difference["delta"] == pytest.approx(
        scoring.wer_interval(better)[0] - scoring.wer_interval(worse)[0]
    )
    assert difference["lo"] < difference["delta"] < difference["hi"] < 0
    assert difference["p"] == pytest.approx(2 / 10_001)
    reverse = scoring.paired_difference(better, worse, seed=0)
    assert reverse["delta"] == -difference["delta"]
    assert reverse["lo"] == pytest.approx(-difference["hi"])
    theirs = kaldialign.bootstrap_wer_ci(
        [r for _, r, _ in worse],
        [h for _, _, h in worse],
        [h for _, _, h in better[::-1]],
    )
    assert theirs["p_s2_improv_over_s1"] == 1.0


def test_paired_difference_is_narrower_than_the_intervals_of_its_parts():
    a = random_results(0, error_rate=0.4)
    b = [(c, r, r if c == "utt-005" else h) for c, r, h in a]
    difference = scoring.paired_difference(a, b)
    _, low, high = scoring.wer_interval(a)
    assert difference["hi"] - difference["lo"] < 0.5 * (high - low)
    assert difference["hi"] == 0.0
    assert difference["p"] > 0.5


def test_paired_difference_of_equals():
    a = random_results(0)
    assert scoring.paired_difference(a, a) == {"delta": 0.0, "lo": 0.0, "hi": 0.0, "p": 1.0}


def test_paired_difference_refuses_other_utterances():
    a = random_results(0)
    with pytest.raises(RecipeError, match="1 cuts are in only one of the two, utt-059"):
        scoring.paired_difference(a, a[:-1])
    with pytest.raises(RecipeError, match="cut utt-000 has two different references"):
        scoring.paired_difference(a, [("utt-000", ["Z"], ["Z"]), *a[1:]])
    with pytest.raises(RecipeError, match="results b: cut utt-000 is there twice"):
        scoring.paired_difference(a, [*a, a[0]])


def test_over_one_seed_is_as_without_seeds():
    a = [("one", ["a", "b"], ["a"]), ("two", ["c"], ["c"]), ("three", ["d", "e"], ["x", "e"])]
    b = [("one", ["a", "b"], ["a", "b"]), ("two", ["c"], ["c"]), ("three", ["d", "e"], ["x"])]
    assert scoring.interval_over_seeds([a]) == scoring.wer_interval(a)
    assert scoring.difference_over_seeds([(a, b)]) == scoring.paired_difference(a, b)
    assert scoring.interval_over_seeds([a, a]) == scoring.wer_interval(a)
    wer, low, high = scoring.interval_over_seeds([a, b])
    assert low <= wer <= high and wer == 40.0
    assert scoring.difference_over_seeds([(a, b), (b, a)])["delta"] == 0.0


def test_intervals_are_also_over_seeds():
    # One model errs in half of the words of every utterance, the other in none: only which models
    # are drawn matters.
    bad, good = ([(str(n), ["a", "b"], ["a", b]) for n in range(50)] for b in ("x", "b"))
    assert scoring.interval_over_seeds([bad]) == (50.0, 50.0, 50.0)
    assert scoring.interval_over_seeds([bad, good]) == (25.0, 0.0, 50.0)
    found = scoring.difference_over_seeds([(bad, good), (good, good)])
    assert (found["delta"], found["lo"], found["hi"]) == (-25.0, -50.0, 0.0)
    # Both of the draws that are 0 in a quarter of the cases.
    assert found["p"] == pytest.approx(0.5, abs=0.03)
