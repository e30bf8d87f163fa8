"""Published codebook indexes: fetched, re-rooted, matched, joined, verified."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
from lhotse import CutSet
from lhotse.utils import fastcopy

from mvqkd.data.labels import ORIGIN_FIELD, Origin, load_labels
from mvqkd.data.published import PublishedSettings, take_labels
from mvqkd.errors import RecipeError
from mvqkd.teachers import hub
from tests.published import MANIFEST, MANIFESTS, write_published

PARTS = ["train-clean-100"]
SETTINGS = PublishedSettings("lab/indexes", "xlarge", 36, MANIFESTS)


@pytest.fixture(scope="module")
def published(feature_cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "copy"
    return folder, write_published(feature_cuts, folder)


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published[0], tmp_path / "copy")


def test_all_speeds_are_matched_and_belong_to_the_corpus(feature_cuts, published, tmp_path):
    folder, made = published
    out = tmp_path / "labels/train.jsonl.gz"
    take_labels(feature_cuts, PARTS, out, SETTINGS, folder)
    written = CutSet.from_file(out).to_eager()
    assert [cut.id for cut in written] == [cut.id for cut in feature_cuts]
    assert {cut.recording.id.partition("_sp")[2] for cut in written} == {"", "0.9", "1.1"}
    for cut, plain in zip(written, feature_cuts):
        # One frame more than the cut has is cut off by lhotse where it reads.
        indexes_TN = made[cut.recording.id]
        np.testing.assert_array_equal(cut.custom["codebook_indexes"].load(), indexes_TN)
        assert len(load_labels(cut)) in (len(indexes_TN), len(indexes_TN) - 1)
        assert cut.custom["codebook_indexes"].array.storage_path.startswith(str(out.parent))
        assert Origin(**cut.custom[ORIGIN_FIELD]) == Origin("xlarge", 36, "lab/indexes", "")
        assert cut.supervisions[0].text == plain.supervisions[0].text and cut.has_features


@pytest.mark.parametrize("revision", [None, "main", "a" * 40])
def test_hub_is_asked_for_what_the_manifests_name(
    feature_cuts, published, tmp_path, monkeypatch, revision
):
    """All of the commit that the manifests are of, which origins tell."""
    asked, commit = [], "a" * 40
    (tmp_path / commit).symlink_to(published[0])

    def fetch_files(*args):
        asked.append(args)
        return tmp_path / commit

    monkeypatch.setattr(hub, "fetch_files", fetch_files)
    some = CutSet.from_cuts(list(feature_cuts)[::2])  # the first job's
    settings = replace(SETTINGS, revision=revision)
    labelled = take_labels(some, PARTS, tmp_path / "train.jsonl.gz", settings)
    repository = "lab/indexes"
    assert asked == [(repository, revision, [MANIFEST]), (repository, commit, ["clean-100-1.h5"])]
    assert labelled[0].custom[ORIGIN_FIELD]["quantizer"] == f"{repository}@{commit}"


def without_a_file(folder):
    (folder / "clean-100-2.h5").unlink()


def twice(folder):
    (folder / "more").mkdir()
    shutil.copy(folder / MANIFEST, folder / "more")


def change_cuts(folder, change):
    cuts = [change(cut) for cut in CutSet.from_file(folder / MANIFEST)]
    CutSet.from_cuts(cut for cut in cuts if cut is not None).to_file(folder / MANIFEST)


def without_labels(folder):
    change_cuts(folder, lambda cut: fastcopy(cut, custom=None))


def of_another_length(folder):
    change_cuts(folder, lambda cut: fastcopy(cut, duration=cut.duration + 0.1))


def without_a_speed(folder):
    change_cuts(folder, lambda cut: None if cut.id.endswith("_sp1.1") else cut)


def other_values(folder, change):
    with h5py.File(folder / "clean-100-1.h5", "r+") as file:
        key = sorted(file)[0]
        indexes_TN = file[key][:]
        del file[key]
        file[key] = change(indexes_TN)


def too_short(folder):
    other_values(folder, lambda indexes_TN: indexes_TN[:-4])


def wide_type(folder):
    other_values(folder, lambda indexes_TN: indexes_TN.astype(np.int16))


def damaged(folder):
    (folder / "clean-100-1.h5").write_bytes(b"not HDF5")


@pytest.mark.parametrize(
    "spoil, cause",
    [
        (without_a_file, r"copy: holds no clean-100-2\.h5; give a folder with what lab/indexes"),
        (twice, f"more/{MANIFEST}: .*copy/{MANIFEST} has its name too"),
        (without_labels, r"-vq\.jsonl\.gz: cut .* has no codebook_indexes; name another"),
        (of_another_length, "no label has this id, and none is known to be of the same"),
        (without_a_speed, r"_sp1\.1: no label has this id, .* the nearest id is "),
        (too_short, "its codebook_indexes have shape"),
        (wide_type, "its codebook_indexes are int16, not uint8"),
        (damaged, r"labels/arrays/clean-100-1\.h5: codebook_indexes of cut .* cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused(feature_cuts, copy, tmp_path, spoil, cause):
    spoil(copy)
    out = tmp_path / "labels/train.jsonl.gz"
    with pytest.raises(RecipeError, match=cause) as caught:
        take_labels(feature_cuts, PARTS, out, SETTINGS, copy)
    assert "\n" not in str(caught.value) and not out.exists()


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"num_codebooks": 16}, r"have shape \(\d+, 8\), but .* ask for \(\d+, 16\)"),
        ({"codebook_size": 16}, "but codebooks have 16 entries"),
        ({"frame_shift": 0.04, "frame_offset": 0.02}, "have shape"),
        ({"manifest": "cuts_{part}.jsonl.gz"}, r"holds no cuts_train-clean-100\.jsonl\.gz"),
    ],
)
def test_indexes_that_are_not_what_the_conf_says(feature_cuts, published, tmp_path, changes, cause):
    with pytest.raises(RecipeError, match=cause):
        out = tmp_path / "train.jsonl.gz"
        take_labels(feature_cuts, PARTS, out, replace(SETTINGS, **changes), published[0])
