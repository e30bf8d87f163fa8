"""run.sh --use-extracted-codebook: from published indexes to a student, without any teacher."""

import json

import pytest
from lhotse import CutSet

from local.take_labels import Settings, main
from mvqkd.data.features import FeatureSettings, compute_features
from mvqkd.data.labels import load_labels
from mvqkd.data.published import PublishedSettings
from mvqkd.data.tokens import TokenSettings, train_tokens
from mvqkd.errors import RecipeError
from tests.published import MANIFESTS, write_published
from tests.recipe_copy import begun_steps, copy_checkout, error_line, run_sh

ARGS = ("--size", "smoke", "--device", "cpu", "--use-extracted-codebook", "true")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, plain_cuts):
    """A copy of the checkout after stage 0, and published indexes of its training set beside it."""
    folder = copy_checkout(tmp_path_factory.mktemp("published") / "recipe")
    data = folder / "data/mini-smoke"
    plain = CutSet.from_cuts(list(plain_cuts)[:4])
    settings = FeatureSettings(num_mel_bins=40)
    train = compute_features(plain, data / "fbank/train.jsonl.gz", True, settings, num_workers=0)
    for part in ("dev-clean", "dev-other"):
        compute_features(plain, data / f"fbank/{part}.jsonl.gz", False, settings, num_workers=0)
    train_tokens(train, data / "tokens", TokenSettings(vocab_size=30))
    return folder, write_published(train, folder.parent / "copy")


def test_student_learns_from_published_indexes(prepared):
    folder, made = prepared
    # A relative path is meant from where the user stands.
    args = (*ARGS, "--codebook-dir", "copy", "--stage", "1", "--stop-stage", "6")
    done = run_sh(folder, *args, "--students", "mvq", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert begun_steps(done) == ["labels-published", "student-mvq-published"]
    assert "stages 1 to 4: published indexes need none of them" in done.stderr
    data, exp = folder / "data/mini-smoke", folder / "exp/mini-smoke"
    assert sorted(path.name for path in exp.iterdir()) == ["mvq-published", "stamps"]
    for cut in CutSet.from_file(data / "labels/published/train.jsonl.gz"):
        label = cut.custom["codebook_indexes"]
        label.array.storage_path = str(folder / label.array.storage_path)
        assert (load_labels(cut) == made[cut.recording.id][: len(load_labels(cut))]).all()
    lines = (exp / "mvq-published/log.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in lines if json.loads(line)["kind"] == "train"]
    assert all(f"accuracy-{n}" in trained[-1] for n in range(8)) and trained[-1]["distillation"] > 0
    settings = json.loads((exp / "mvq-published/settings.json").read_text())
    assert settings["distillation"]["quantizer"] is None

    again = run_sh(folder, *args, "--students", "mvq", cwd=folder.parent)
    assert begun_steps(again) == []


def test_students_that_need_no_quantizer_are_the_default(prepared):
    done = run_sh(prepared[0], *ARGS, "--stage", "9")
    assert done.returncode == 0
    assert "students none mvq streaming-none of none mvq mvq-l2 streaming-none" in done.stderr


def test_copy_that_is_not_there(prepared, tmp_path):
    manifest = prepared[0] / "data/mini-smoke/fbank/train.jsonl.gz"
    published = PublishedSettings("lab/indexes", "xlarge", 36, MANIFESTS)
    settings = Settings(published, ["train-clean-100"], manifest, tmp_path / "out", tmp_path / "no")
    with pytest.raises(RecipeError, match="no: no such file or folder; give the folder that the"):
        main(settings)


@pytest.mark.parametrize(
    "args, cause",
    [
        (("--teacher", "mini"), "--use-extracted-codebook runs no teacher; leave out --teacher"),
        (("--train-teacher", "true"), "--use-extracted-codebook runs no teacher"),
        (
            ("--use-extracted-codebook", "false", "--codebook-dir", "copy"),
            "--codebook-dir copy: is of --use-extracted-codebook true",
        ),
    ],
)
def test_what_does_not_go_together(prepared, args, cause):
    done = run_sh(prepared[0], *ARGS, *args)
    assert cause in error_line(done)
