"""Word error rates: icefall's result files, confidence intervals, and paired comparisons.

``results`` is everywhere a list of ``(cut_id, ref_words, hyp_words)``, one entry an utterance.
Error rates are in percent. Letters: R bootstrap replications, U utterances, M models.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import kaldialign
import numpy as np

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside

Result = tuple[str, Sequence[str], Sequence[str]]

# What stands for "no word" in the files. Alignments use a symbol that no transcript can hold.
_NOTHING = "*"
_EPSILON = "\0"

# Replications drawn at a time, so that memory stays at some tens of MB for any test set.
_BLOCK_ELEMENTS = 2_000_000
# Of a test set that are kept, a byte each: more than LibriSpeech's largest has.
_KEPT_ELEMENTS = 50_000_000


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of a test set: counts of words."""

    insertions: int
    deletions: int
    substitutions: int
    correct: int
    words: int  # of the reference

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float:
        """Word error rate in percent."""
        return 100.0 * self.errors / self.words

    def line(self, name: str) -> str:
        """The line that icefall logs for a test set, e.g. ``[test-clean-greedy_search] %WER
        7.09% [3727 / 52576, 339 ins, 331 del, 3057 sub ]``."""
        return (
            f"[{name}] %WER {self.wer:.2f}% [{self.errors} / {self.words}, "
            f"{self.insertions} ins, {self.deletions} del, {self.substitutions} sub ]"
        )


def _write(path: str | os.PathLike, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_recogs(path: str | os.PathLike, results: Iterable[Result]) -> None:
    """Write ``recogs-<test set>-<setting>.txt``: two lines an utterance, sorted by cut id::

    1089-134686-0000-0:\tref=['HE', 'HOPED']
    1089-134686-0000-0:\thyp=['HE', 'HOPE']
    """
    lines = []
    for cut_id, ref, hyp in sorted(results, key=lambda r: r[0]):
        lines += [f"{cut_id}:\tref={list(ref)}\n", f"{cut_id}:\thyp={list(hyp)}\n"]
    _write(path, "".join(lines))


def _marked(pairs: list[tuple[str, str]]) -> str:
    """An alignment as text; errors that follow each other share one pair of brackets."""
    pieces: list[str] = []
    ref_run: list[str] = []
    hyp_run: list[str] = []
    for ref, hyp in [*pairs, ("", "")]:
        if ref != hyp:
            ref_run += [ref] if ref != _EPSILON else []
            hyp_run += [hyp] if hyp != _EPSILON else []
            continue
        if ref_run or hyp_run:
            pieces.append(f"({' '.join(ref_run) or _NOTHING}->{' '.join(hyp_run) or _NOTHING})")
            ref_run, hyp_run = [], []
        pieces.append(ref)
    return " ".join(pieces[:-1])  # the last piece is the sentinel


def align_words(ref: Sequence[str], hyp: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Pairs of a reference word and what was recognised, by least edit distance.

    None stands for no word: ``(word, None)`` is a deletion, ``(None, word)`` an insertion.
    """
    pairs = kaldialign.align(list(ref), list(hyp), _EPSILON)
    return [(None if r == _EPSILON else r, None if h == _EPSILON else h) for r, h in pairs]


def write_errs(path: str | os.PathLike, results: Iterable[Result]) -> ErrorCounts:
    """Write ``errs-<test set>-<setting>.txt`` in icefall's format, and return the counts.

    The file holds the error rate, each utterance's alignment with errors as ``(REF->HYP)``
    (``*`` for no word), then substitutions, deletions, insertions and words, the most frequent
    errors first.

    Raises:
      RecipeError: the references hold no word at all.
    """
    substitutions: Counter[tuple[str, str]] = Counter()
    deletions: Counter[str] = Counter()
    insertions: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    utterances = []
    for cut_id, ref, hyp in sorted(results, key=lambda r: r[0]):
        pairs = kaldialign.align(list(ref), list(hyp), _EPSILON)
        for r, h in pairs:
            if r == h:
                correct[r] += 1
            elif r == _EPSILON:
                insertions[h] += 1
            elif h == _EPSILON:
                deletions[r] += 1
            else:
                substitutions[r, h] += 1
        utterances.append(f"{cut_id}:\t{_marked(pairs)}")

    counts = ErrorCounts(
        insertions=insertions.total(),
        deletions=deletions.total(),
        substitutions=substitutions.total(),
        correct=correct.total(),
        words=correct.total() + deletions.total() + substitutions.total(),
    )
    if counts.words == 0:
        raise RecipeError(f"{path}: the references hold no word; check the test set's transcripts")

    substituted: Counter[str] = Counter()  # by something else
    substitutes: Counter[str] = Counter()  # for something else
    for (r, h), count in substitutions.items():
        substituted[r] += count
        substitutes[h] += count
    per_word = []
    for word in (
        set(correct) | set(substituted) | set(substitutes) | set(deletions) | set(insertions)
    ):
        errors = substituted[word] + substitutes[word] + deletions[word] + insertions[word]
        in_ref = correct[word] + substituted[word] + deletions[word]
        in_hyp = correct[word] + substitutes[word] + insertions[word]
        per_word.append((errors, word, f"{word}   {correct[word]} {errors} {in_ref} {in_hyp}"))

    def most_frequent(counter):
        return sorted(((count, what) for what, count in counter.items()), reverse=True)

    lines = [
        f"%WER = {counts.wer:.2f}",
        f"Errors: {counts.insertions} insertions, {counts.deletions} deletions, "
        f"{counts.substitutions} substitutions, over {counts.words} reference words "
        f"({counts.correct} correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, "
        "INSERTIONS:, PER-WORD STATS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)  ",
        *utterances,
        "",
        "SUBSTITUTIONS: count ref -> hyp",
        *(f"{count}   {r} -> {h}" for count, (r, h) in most_frequent(substitutions)),
        "",
        "DELETIONS: count ref",
        *(f"{count}   {word}" for count, word in most_frequent(deletions)),
        "",
        "INSERTIONS: count hyp",
        *(f"{count}   {word}" for count, word in most_frequent(insertions)),
        "",
        "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp",
        *(line for _, _, line in sorted(per_word, reverse=True)),
    ]
    _write(path, "\n".join(lines) + "\n")
    return counts


def write_wer_summary(path: str | os.PathLike, wers: Mapping[str, float], test_set: str) -> str:
    """Write ``wer-summary-<test set>-<setting>.txt``: setting and WER, the best first.

    Args:
      wers: error rate in percent of each setting, e.g. ``{"beam_4": 7.09}``.
      test_set: named in the text that is returned.
    Returns:
      What icefall logs beside the file: the same lines, the first marked as the best.
    """
    best_first = sorted(wers.items(), key=lambda item: (item[1], item[0]))
    lines = [f"{setting}\t{round(wer, 2)}" for setting, wer in best_first]
    _write(path, "\n".join(["settings\tWER", *lines]) + "\n")
    if lines:
        lines[0] += f"\tbest for {test_set}"
    return "\n".join([f"For {test_set}, WER of different settings are:", *lines])


def save_results(
    directory: str | os.PathLike, test_set: str, setting: str, results: Sequence[Result]
) -> ErrorCounts:
    """Write the ``recogs-``, ``errs-`` and ``wer-summary-`` files of one decoding run.

    ``setting`` names how it was decoded, e.g. ``beam_size_4-epoch-30-avg-10``. Returns the counts;
    raises as `write_errs` does.
    """
    directory, name = Path(directory), f"{test_set}-{setting}.txt"
    write_recogs(directory / f"recogs-{name}", results)
    counts = write_errs(directory / f"errs-{name}", results)
    write_wer_summary(directory / f"wer-summary-{name}", {setting: counts.wer}, test_set)
    return counts


def _errors_and_words(results: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and reference words of each utterance, in the order of cut ids: (U,), (U,).

    Sorted, so that the order of decoding does not change what a seed draws.
    """
    in_order = sorted(results, key=lambda r: r[0])
    errors = [kaldialign.edit_distance(list(ref), list(hyp))["total"] for _, ref, hyp in in_order]
    words_U = np.array([len(ref) for _, ref, _ in in_order], dtype=np.int64)
    if words_U.sum() == 0:
        raise RecipeError("results: the references hold no word; check the test set's transcripts")
    return np.array(errors, dtype=np.int64), words_U


def word_error_rate(results: Sequence[Result]) -> float:
    """Percent.

    Raises:
      RecipeError: the references hold no word.
    """
    errors_U, words_U = _errors_and_words(results)
    return 100.0 * errors_U.sum() / words_U.sum()


def _bootstrap(count_MU: np.ndarray, words_U: np.ndarray, seed: int, replications: int):
    """100 * sum(count) / sum(words), the mean of M models, of test sets drawn from this one with
    replacement, and of as many models drawn from these: (R,)."""
    M, U = count_MU.shape
    # Models have their own draws, so that those of the test set do not depend on their number.
    model_rng = np.random.default_rng([seed, 1])
    sums_U = np.stack([words_U, *count_MU], axis=1).astype(np.float64)
    rates = []
    kept = U * replications <= _KEPT_ELEMENTS
    for times_RU in (_kept_draws if kept else _draws)(U, seed, replications):
        words_R, *count_MR = (times_RU.astype(np.float64) @ sums_U).T
        count_RM = np.stack(count_MR, axis=1)
        models_RM = model_rng.integers(0, M, size=count_RM.shape)
        count_R = np.take_along_axis(count_RM, models_RM, axis=1).sum(1)
        # A draw of nothing but empty references says nothing of the rate: 0 there.
        rates.append(100.0 * count_R / (M * np.maximum(words_R, 1)))
    return np.concatenate(rates)


@lru_cache(maxsize=4)
def _kept_draws(U: int, seed: int, replications: int) -> list[np.ndarray]:
    """`_draws`, which are the same for all models and pairs of a test set: a grid has hundreds."""
    return list(_draws(U, seed, replications))


def _draws(U: int, seed: int, replications: int) -> Iterator[np.ndarray]:
    """How often each of U utterances is in each draw, in blocks of draws: (R, U)."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // U)
    for start in range(0, replications, block):
        drawn_RU = rng.integers(0, U, size=(min(block, replications - start), U))
        R = len(drawn_RU)
        drawn_RU += U * np.arange(R)[:, None]
        # An utterance is drawn once, as a mean, and never 256 times.
        times_RU = np.bincount(drawn_RU.ravel(), minlength=R * U).reshape(R, U)
        yield times_RU.astype(np.uint8)


def wer_interval(
    results: Sequence[Result], seed: int = 0, replications: int = 10_000
) -> tuple[float, float, float]:
    """Word error rate with its 95% bootstrap interval over utterances: ``(wer, low, high)``.

    The percentile bootstrap of Bisani and Ney, "Bootstrap estimates for confidence intervals in
    ASR performance evaluation", ICASSP 2004. The same seed gives the same interval.

    Raises:
      RecipeError: the references hold no word at all.
    """
    errors_U, words_U = _errors_and_words(results)
    low, high = np.percentile(_bootstrap(errors_U[None], words_U, seed, replications), [2.5, 97.5])
    return 100.0 * float(errors_U.sum() / words_U.sum()), float(low), float(high)


def interval_over_seeds(
    results_of_seeds: Sequence[Sequence[Result]], seed: int = 0, replications: int = 10_000
) -> tuple[float, float, float]:
    """Mean word error rate of several models of one kind, say of different seeds, on one test set,
    with its 95% bootstrap interval.

    Utterances are drawn, each with its errors by all of the models, and as many models as there
    are: the interval is that of another test set and other seeds. Of few models it is too narrow:
    drawn again, n of them vary (n - 1) / n as much as they do. See `wer_interval`.
    """
    counted = [_errors_and_words(results) for results in results_of_seeds]
    errors_MU, words_U = np.stack([errors for errors, _ in counted]), counted[0][1]
    low, high = np.percentile(_bootstrap(errors_MU, words_U, seed, replications), [2.5, 97.5])
    rate = errors_MU.sum() / (len(errors_MU) * words_U.sum())
    return 100.0 * float(rate), float(low), float(high)


def _check_paired(results_a: Sequence[Result], results_b: Sequence[Result]) -> None:
    by_id_a, by_id_b = ({cut_id: (r, h) for cut_id, r, h in rs} for rs in (results_a, results_b))
    for name, by_id, results in (("a", by_id_a, results_a), ("b", by_id_b, results_b)):
        if len(by_id) != len(results):
            twice = Counter(cut_id for cut_id, _, _ in results).most_common(1)[0][0]
            raise RecipeError(f"results {name}: cut {twice} is there twice; decode the set again")
    unmatched = sorted(by_id_a.keys() ^ by_id_b.keys())
    if unmatched:
        raise RecipeError(
            f"results: {len(unmatched)} cuts are in only one of the two, {unmatched[0]} first; "
            "decode both systems on the same test set"
        )
    for cut_id, (ref, _) in by_id_a.items():
        if list(ref) != list(by_id_b[cut_id][0]):
            raise RecipeError(
                f"results: cut {cut_id} has two different references; "
                "decode both systems on the same test set"
            )


def paired_difference(
    results_a: Sequence[Result],
    results_b: Sequence[Result],
    seed: int = 0,
    replications: int = 10_000,
) -> dict[str, float]:
    """WER of b minus WER of a on the same utterances, with its 95% bootstrap interval.

    Both systems are scored on the same draws of utterances (Bisani and Ney 2004), so
    what is hard for both cancels. Negative: b is better.

    Returns:
      ``delta``, ``lo``, ``hi`` in percent points, and ``p``: the two-sided bootstrap p-value of
      no difference, at least 2 / (replications + 1).
    Raises:
      RecipeError: the two do not hold the same cut ids with the same references, or an id twice,
        or no reference word.
    """
    return difference_over_seeds([(results_a, results_b)], seed, replications)


def difference_over_seeds(
    pairs: Sequence[tuple[Sequence[Result], Sequence[Result]]],
    seed: int = 0,
    replications: int = 10_000,
) -> dict[str, float]:
    """`paired_difference` of several pairs of models, say of different seeds, on one test set:
    their mean.

    Utterances are drawn, each with its errors by all models, and as many pairs as there are: the
    interval and p are those of another test set and other seeds; see `interval_over_seeds`.
    """
    changes = []
    for results_a, results_b in pairs:
        _check_paired(results_a, results_b)
        errors_a_U, words_U = _errors_and_words(results_a)
        errors_b_U, _ = _errors_and_words(results_b)
        changes.append(errors_b_U - errors_a_U)
    change_MU = np.stack(changes)
    deltas_R = _bootstrap(change_MU, words_U, seed, replications)
    low, high = np.percentile(deltas_R, [2.5, 97.5])
    tail = min(int((deltas_R <= 0).sum()), int((deltas_R >= 0).sum()))
    return {
        "delta": 100.0 * float(change_MU.sum() / (len(change_MU) * words_U.sum())),
        "lo": float(low),
        "hi": float(high),
        "p": min(1.0, 2.0 * (tail + 1) / (replications + 1)),
    }
