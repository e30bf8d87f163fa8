"""K-means units and their place in time."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lhotse import CutSet
from lhotse.utils import fastcopy

from mvqkd.data.labels import Dumper, LabelSettings, load_labels
from mvqkd.errors import RecipeError
from mvqkd.teachers import units
from mvqkd.teachers.mfcc import Mfcc
from mvqkd.teachers.units import (
    FIELD,
    KMeansSettings,
    UnitSettings,
    fit_kmeans,
    label_units,
    mean_distance,
    nearest,
    unit_figures,
    units_at_frames,
)
from tests.conftest import CPU

SETTINGS = UnitSettings(
    kmeans=KMeansSettings(num_units=6, sample_hours=1, batch_size=200, num_epochs=3, num_starts=2),
    labels=LabelSettings(max_duration=8, shard_size=2, num_threads=1),
)


def blobs(num_blobs=5, each=80, deviation=0.05):
    generator = torch.Generator().manual_seed(4)
    centres_KD = 3 * torch.randn(num_blobs, 7, generator=generator)
    noise_FD = deviation * torch.randn(num_blobs * each, 7, generator=generator)
    return centres_KD, centres_KD.repeat_interleave(each, 0) + noise_FD


def test_nearest_is_the_nearest():
    generator = torch.Generator().manual_seed(5)
    x_FD, c_KD = (torch.randn(n, 4, generator=generator) for n in (50, 8))
    squares_FK = torch.cdist(x_FD.double(), c_KD.double()) ** 2
    indexes_F, distance_F = nearest(x_FD, c_KD)
    assert torch.equal(indexes_F, squares_FK.argmin(1))
    torch.testing.assert_close(distance_F.double(), squares_FK.min(1).values, atol=1e-5, rtol=1e-5)


def test_kmeans_finds_what_is_there():
    centres_KD, x_FD = blobs()
    found_KD = fit_kmeans(x_FD, KMeansSettings(5, batch_size=64, num_epochs=4), CPU)
    distance_K = torch.cdist(centres_KD, found_KD).min(1).values
    assert distance_K.max() < 0.05
    figures = unit_figures(x_FD, found_KD)
    assert figures["perplexity"] == pytest.approx(5, rel=1e-6) and figures["used"] == 1
    assert figures["error"] < 0.01
    one_KD = torch.cat([found_KD[:1], found_KD[1:] + 100])
    assert unit_figures(x_FD, one_KD)["used"] == pytest.approx(0.2)
    assert unit_figures(x_FD, one_KD)["perplexity"] == pytest.approx(1)


def test_objective_falls_with_epochs_and_is_the_same_again():
    x_FD = torch.randn(3000, 5, generator=torch.Generator().manual_seed(6))

    def fitted(num_epochs):
        return fit_kmeans(x_FD, KMeansSettings(20, 1, 100, num_epochs, 1), CPU)

    objectives = [mean_distance(x_FD, fitted(n)) for n in (0, 1, 4)]
    assert objectives[0] > 1.1 * objectives[1] and objectives[1] > objectives[2]
    assert torch.equal(fitted(2), fitted(2))


def test_few_frames_and_equal_ones():
    x_FD = torch.ones(6, 3)
    found_KD = fit_kmeans(x_FD, KMeansSettings(4, num_starts=1), CPU)
    assert torch.equal(found_KD, torch.ones(4, 3))
    with pytest.raises(RecipeError, match=r"num_units: 7 of 6 frames"):
        fit_kmeans(x_FD, KMeansSettings(7), CPU)


@pytest.mark.parametrize(
    ("unit", "model", "expected"),
    [
        ((160, 400), (320, 400), [0, 2, 4, 6]),  # MFCC every 10 ms, HuBERT every 20
        ((320, 400), (320, 400), [0, 1, 2, 3]),
        ((320, 400), (160, 400), [0, 1, 1, 2]),  # a tie goes to the later
        ((160, 400), (320, 1040), [2, 4, 6, 8]),  # whose first centre is at 32.5 ms
        ((160, 1040), (160, 400), [0, 0, 0, 1]),
    ],
)
def test_a_frame_has_the_unit_of_its_time(unit, model, expected):
    unit, model = (SimpleNamespace(stride=s, receptive_field=r) for s, r in (unit, model))
    taken_T = units_at_frames(np.arange(100), unit, model, 4)
    assert taken_T.tolist() == expected
    for frame, index in enumerate(taken_T):
        centre = model.receptive_field / 2 + frame * model.stride
        centres = unit.receptive_field / 2 + np.arange(100) * unit.stride
        assert abs(centres[index] - centre) == abs(centres - centre).min()


def test_past_the_last_unit_it_is_taken_again():
    clock = SimpleNamespace(stride=160, receptive_field=400)
    assert units_at_frames(np.array([5, 6]), clock, clock, 4).tolist() == [5, 6, 6, 6]


def test_labels_are_the_nearest_centroids_and_resume(tmp_path, plain_cuts, monkeypatch):
    cuts = list(plain_cuts)[:5]
    train, dev = CutSet.from_cuts(cuts[:3]), CutSet.from_cuts(cuts[3:])
    whole, figures = label_units(train, dev, Mfcc(), SETTINGS, tmp_path / "whole", CPU)
    assert [cut.id for cut in whole] == [cut.id for cut in cuts]
    assert 1 < figures["perplexity"] <= 6 and 0 < figures["error"] < 1
    saved = torch.load(tmp_path / "whole/centroids.pt", weights_only=True)
    centroids_KD = saved["model"]["centroids_KD"]
    for cut in whole:
        wave_1L = torch.from_numpy(cut.load_audio())
        x_1TD, _ = Mfcc().embed(wave_1L, torch.tensor([wave_1L.shape[1]]), 1)
        expected_T = torch.cdist(x_1TD[0].double(), centroids_KD.double()).argmin(1)
        units_T1 = load_labels(cut, FIELD)
        assert units_T1.shape == (len(expected_T), 1)
        assert (units_T1[:, 0] == expected_T.numpy()).mean() > 0.99  # but for near ties

    shards, label = [], Dumper.__call__

    def killed(self, cuts, arrays, **options):
        shards.append(len(cuts))
        if len(shards) == 2:
            raise KeyboardInterrupt
        return label(self, cuts, arrays, **options)

    monkeypatch.setattr(Dumper, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        label_units(train, dev, Mfcc(), SETTINGS, tmp_path / "killed", CPU)
    fits = []
    monkeypatch.setattr(units, "fit_kmeans", lambda *args: fits.append(args))
    resumed, again = label_units(train, dev, Mfcc(), SETTINGS, tmp_path / "killed", CPU)
    assert not fits and shards == [2, 2, 2, 1] and again == figures
    for ours, theirs in zip(resumed, whole):
        assert np.array_equal(load_labels(ours, FIELD), load_labels(theirs, FIELD))


def test_units_of_something_else_are_refused(tmp_path, plain_cuts, teacher):
    train, dev = (CutSet.from_cuts([c]) for c in list(plain_cuts)[:2])
    label_units(train, dev, Mfcc(), SETTINGS, tmp_path, CPU)
    other = UnitSettings(2, SETTINGS.kmeans, SETTINGS.labels)
    with pytest.raises(RecipeError, match=r"of teacher mfcc, and this run's of tiny; "):
        label_units(train, dev, teacher, other, tmp_path, CPU)
    with pytest.raises(RecipeError, match=r"is there twice"):
        label_units(train, train, Mfcc(), SETTINGS, tmp_path / "other", CPU)
    with pytest.raises(RecipeError, match=r"layer 2 is not in 1\.\.1"):
        label_units(train, dev, Mfcc(), other, tmp_path / "other", CPU)


def spoilt(cuts, folder):
    """The first with a file that is no audio, the second too short for a frame."""
    first, second, *others = cuts
    (folder / "broken.flac").write_bytes(b"no FLAC")
    source = fastcopy(first.recording.sources[0], source=str(folder / "broken.flac"))
    first = fastcopy(first, recording=fastcopy(first.recording, sources=[source]))
    return [first, second.truncate(duration=0.01, preserve_id=True), *others]


def test_bad_cuts_are_left_out_and_listed_up_to_a_share(tmp_path, plain_cuts, caplog):
    cuts = spoilt(plain_cuts, tmp_path)
    train, dev = CutSet.from_cuts(cuts[:4]), CutSet.from_cuts(cuts[4:])

    def label(max_bad_share, folder, **changes):
        kmeans = replace(SETTINGS.kmeans, **changes)
        labels = replace(SETTINGS.labels, max_bad_share=max_bad_share)
        settings = UnitSettings(kmeans=kmeans, labels=labels)
        return label_units(train, dev, Mfcc(), settings, tmp_path / folder, CPU)[0]

    found = label(0.3, "units")
    assert [cut.id for cut in found] == [cut.id for cut in cuts[2:]]
    broken, short = (tmp_path / "units/bad-utterances.txt").read_text().splitlines()
    assert broken.startswith(f"{tmp_path}/broken.flac: cut {cuts[0].id} cannot be read")
    assert short.startswith(f"cut {cuts[1].id}: 160 samples are shorter than one frame of")
    assert "2 bad utterances left out, listed in" in caplog.text
    # Both are of the sample, of which they are half.
    with pytest.raises(RecipeError) as caught:
        label(0.2, "refused")
    message = str(caught.value)
    assert "(2 of 7 utterances are bad, more than max_bad_share = 0.2 of unit_labels." in message
    assert "\n" not in message and not (tmp_path / "refused").exists()
    with pytest.raises(RecipeError, match=r"\(nothing else was drawn for k-means\); raise unit_"):
        label(1, "alone", sample_hours=0)
