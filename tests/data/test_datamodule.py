"""Batches of the student."""

import random

import numpy as np
import pytest
import torch
from lhotse import CutSet
from lhotse.utils import fastcopy

from mvqkd.data.datamodule import (
    LOG_EPSILON,
    Augment,
    DataSettings,
    SpecAugmentSettings,
    StudentData,
    make_spec_augment,
)
from mvqkd.data.labels import FIELD, IGNORED, load_labels
from mvqkd.data.tokens import TokenSettings, load_tokens, train_tokens
from mvqkd.errors import RecipeError


@pytest.fixture(scope="module")
def tokens(feature_cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "lang"
    train_tokens(feature_cuts, folder, TokenSettings(40))
    return load_tokens(folder)


@pytest.fixture
def make_data(labelled_cuts, tokens):
    def make(seed=1, cache=False, fields=(FIELD,), prefetch=None, noise=None):
        settings = DataSettings(max_duration=9, num_buckets=2, cache=cache, prefetch=prefetch)
        return StudentData(labelled_cuts, tokens, settings, seed, fields, noise=noise)

    return make


def flat(batches):
    return [(b.ids, b.features_BTF, b.lengths_B, b.labels[FIELD], b.tokens, s) for b, s in batches]


def assert_equal(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a[0] == b[0] and a[4:] == b[4:]
        for x, y in zip(a[1:4], b[1:4]):
            assert torch.equal(x, y)


def test_a_batch_holds_what_its_cuts_hold(make_data, labelled_cuts, tokens):
    by_id = {cut.id: cut for cut in labelled_cuts}
    data = make_data()
    assert data.seconds == pytest.approx(sum(c.duration for c in labelled_cuts))
    ids = []
    for batch, seconds in data.batches(epoch=0):
        cuts = [by_id[i] for i in batch.ids]
        ids += batch.ids
        assert seconds == pytest.approx(sum(c.duration for c in cuts))
        for i, cut in enumerate(cuts):
            T = int(batch.lengths_B[i])
            np.testing.assert_array_equal(batch.features_BTF[i, :T], cut.load_features())
            assert (batch.features_BTF[i, T:] == LOG_EPSILON).all()
            assert batch.texts[i] == cut.supervisions[0].text
            assert batch.tokens[i] == tokens.encode(batch.texts[i])
            labels_TN = load_labels(cut)
            found_UN = batch.labels[FIELD][i]
            np.testing.assert_array_equal(found_UN[: len(labels_TN)], labels_TN)
            assert (found_UN[len(labels_TN) :] == IGNORED).all()
    assert sorted(ids) == sorted(by_id)


def test_order_depends_on_seed_and_epoch_alone(make_data):
    assert_equal(flat(make_data().batches(2)), flat(make_data().batches(2)))
    data = make_data()
    list(data.batches(0))
    assert_equal(flat(data.batches(2)), flat(make_data().batches(2)))
    orders = {
        str([b.ids for b, _ in make_data(seed).batches(epoch)])
        for seed in (1, 5)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_start_skips_exactly(make_data):
    whole = flat(make_data().batches(1))
    assert len(whole) > 3
    for start in (1, 3):
        assert_equal(flat(make_data().batches(1, start)), whole[start:])
    assert flat(make_data().batches(1, len(whole))) == []


def test_cache_changes_nothing(make_data):
    cached = make_data(cache=True)
    list(cached.batches(0))
    assert_equal(flat(cached.batches(1)), flat(make_data().batches(1)))


def test_prefetching_changes_nothing(make_data, feature_cuts):
    def generators():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    noise = list(feature_cuts)[:3]
    expected = flat(make_data(noise=noise).batches(1))
    before = generators()
    for prefetch in (1, 3, 50):
        data = make_data(prefetch=prefetch, noise=noise)
        assert_equal(flat(data.batches(1)), expected)
        assert_equal(flat(data.batches(1, start=2)), expected[2:])
    assert generators() == before  # which the training draws from meanwhile
    assert not torch.equal(expected[0][1], flat(make_data().batches(1))[0][1])


def test_an_error_passes_the_prefetching(feature_cuts, tokens):
    settings = DataSettings(prefetch=2)
    data = StudentData(CutSet.from_cuts(feature_cuts), tokens, settings, 1, [FIELD])
    with pytest.raises(RecipeError, match="has no codebook_indexes; run stage 5"):
        next(data.batches(0))
    with pytest.raises(RecipeError, match=r"data\.prefetch: -1; give 0"):
        DataSettings(prefetch=-1)


def test_same_batches_with_and_without_labels(make_data):
    without = [(b.ids, b.labels) for b, _ in make_data(fields=()).batches(0)]
    assert [ids for ids, _ in without] == [b.ids for b, _ in make_data().batches(0)]
    assert all(labels == {} for _, labels in without)


def test_cut_without_labels_gets_its_line(feature_cuts, tokens):
    data = StudentData(CutSet.from_cuts(feature_cuts), tokens, DataSettings(), 1, [FIELD])
    with pytest.raises(RecipeError, match="has no codebook_indexes; run stage 5"):
        next(data.batches(0))


def test_time_is_warped_only_where_asked_for(make_data):
    batch, _ = next(make_data().batches(0))
    found = []
    for factor in (0, 20):
        random.seed(3)
        torch.manual_seed(3)
        settings = SpecAugmentSettings(factor, p=1.0)
        found.append(Augment(settings)(batch.features_BTF, batch.lengths_B))
    random.seed(3)
    torch.manual_seed(3)
    masked_BTF = make_spec_augment(SpecAugmentSettings(p=1.0))(batch.features_BTF)
    assert torch.equal(found[0][0], masked_BTF) and found[0][1] is None
    warps = [warp for warp in found[1][1] if warp is not None]
    assert warps and not torch.equal(found[1][0], masked_BTF)
    lengths = set(batch.lengths_B.tolist())
    assert all(warp.num_frames in lengths for warp in warps)


def test_transcripts_are_optional_where_there_are_labels(labelled_cuts, tokens):
    cuts = list(labelled_cuts)
    two = cuts[0].append(fastcopy(cuts[1], custom=None))
    cuts = CutSet.from_cuts([two, cuts[2].drop_supervisions()])
    data = StudentData(cuts, tokens, DataSettings(60), 1, [FIELD])
    found = {}
    for batch, _ in data.batches(0):
        found |= zip(batch.ids, zip(batch.texts, batch.tokens))
    text = f"{labelled_cuts[0].supervisions[0].text} {labelled_cuts[1].supervisions[0].text}"
    assert found == {cuts[0].id: (text, tokens.encode(text)), cuts[1].id: ("", None)}
    with pytest.raises(RecipeError, match="has no transcript, and no teacher to learn from"):
        list(StudentData(cuts, tokens, DataSettings(60), 1).batches(0))


@pytest.fixture
def partly(labelled_cuts, tokens):
    """(all of the cuts, of which a third have transcripts; these alone; data of them)"""
    cuts = [c if n % 3 == 0 else c.drop_supervisions() for n, c in enumerate(labelled_cuts)]
    read = CutSet.from_cuts(cuts[::3])

    def make(cuts, max_untranscribed):
        settings = DataSettings(6, max_untranscribed, num_buckets=2)
        return StudentData(cuts, tokens, settings, 1, [FIELD])

    return CutSet.from_cuts(cuts), read, make


def test_speech_without_transcripts_comes_on_top_of_the_batches(partly):
    cuts, read, make = partly
    data, alone = make(cuts, 4.0), make(read, 0.0)
    unread = []
    for epoch in (0, 1):
        batches, without = list(data.batches(epoch)), list(alone.batches(epoch))
        # One pass over the transcripts, in the same batches; nothing else has tokens.
        assert len(batches) == len(without) > 1
        for (batch, seconds), (same, same_seconds) in zip(batches, without):
            number = len(same.ids)
            assert batch.ids[:number] == same.ids and batch.tokens[:number] == same.tokens
            rest = batch.ids[number:]
            assert rest and batch.tokens[number:] == [None] * len(rest)
            assert 0 < seconds - same_seconds <= max(4.0, max(c.duration for c in cuts))
            unread.append(tuple(rest))
    assert len(set(unread)) > 1
    assert data.seconds == pytest.approx(alone.seconds * (1 + 4 / 6))
    assert_equal(flat(data.batches(1, 1)), flat(make(cuts, 4.0).batches(1))[1:])


def test_speech_without_transcripts_is_gone_through_again(partly):
    cuts, read, make = partly
    few = CutSet.from_cuts([*read, next(c for c in cuts if not c.supervisions)])
    batches = [batch for batch, _ in make(few, 4.0).batches(0)]
    assert len(batches) > 1 and len({batch.ids[-1] for batch in batches}) == 1


def test_parts_of_batches_need_speech_of_both_kinds(partly):
    cuts, read, make = partly
    assert_equal(flat(make(read, 4.0).batches(0)), flat(make(read, 0.0).batches(0)))
    # Off, both kinds are one set.
    ids = [i for batch, _ in make(cuts, 0.0).batches(0) for i in batch.ids]
    assert sorted(ids) == sorted(cut.id for cut in cuts)


def test_spec_augment_masks_and_keeps_time(make_data):
    batch, _ = next(make_data().batches(0))
    augmented = make_spec_augment(SpecAugmentSettings(p=1.0))(batch.features_BTF)
    assert augmented.shape == batch.features_BTF.shape
    changed = augmented != batch.features_BTF
    assert changed.any() and not changed.all()
    # Where it is not masked, it is what it was: labels stay in step.
    masks = augmented[changed]
    assert len(masks.unique()) <= len(batch.ids) + 1
    none = make_spec_augment(SpecAugmentSettings(p=0.0))(batch.features_BTF)
    assert torch.equal(none, batch.features_BTF)
