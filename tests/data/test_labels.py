"""Codebook indexes in manifests: dumped, verified, sliced, padded."""

import errno
import gzip
import json
import math
import shutil
import threading

import h5py
import lhotse
import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording
from lhotse.utils import fastcopy
from scipy.signal import firwin, resample_poly

from benchmarks import label_storage
from mvqkd.data.audio import collate_audio
from mvqkd.data.labels import (
    FIELD,
    IGNORED,
    ORIGIN_FIELD,
    CodebookIndexes,
    Dumper,
    Embeddings,
    LabelSettings,
    Origin,
    check_origin,
    collate_labels,
    common_facts,
    dump_labels,
    join_labels,
    load_labels,
    verify_labels,
)
from mvqkd.data.manifests import read_cuts
from mvqkd.data.shards import ArrayFile, Shards
from mvqkd.errors import RecipeError
from mvqkd.quantizer import Quantizer, load_quantizer, save_quantizer
from mvqkd.teachers import load_teacher
from tests.conftest import CPU, ROOT


def dump(cuts, folder, teacher, quantizer, origin, **settings):
    kinds = [CodebookIndexes(teacher, quantizer, origin, refine_iters=1)]
    dumper = Dumper(kinds, LabelSettings(**settings), CPU)
    return dump_labels(cuts, folder / "train.jsonl.gz", dumper, shard_size=4)


@pytest.fixture
def own_labels(labelled_cuts, tmp_path):
    """The first three cuts, with labels that may be damaged."""
    path = tmp_path / "labels.h5"
    cuts = []
    with h5py.File(path, "w") as file:
        for cut in list(labelled_cuts)[:3]:
            file[cut.id] = getattr(cut, f"load_{FIELD}")()
    for cut in list(labelled_cuts)[:3]:
        document = cut.to_dict()
        document["custom"][FIELD]["array"]["storage_path"] = str(path)
        cuts.append(document)
    return CutSet.from_dicts(cuts), path


def test_dumped_labels_are_verified_and_read_by_lhotse_alone(
    corpus, labelled_cuts, teacher, quantizer, origin
):
    verify_labels(labelled_cuts, [CodebookIndexes(teacher, quantizer, origin)])
    written = CutSet.from_file(corpus.parent / "labels/train.jsonl.gz")
    assert [c.id for c in written] == [c.id for c in labelled_cuts]
    for cut in written:
        indexes_TN = cut.load_codebook_indexes()
        assert indexes_TN.dtype == np.uint8
        assert indexes_TN.shape == (teacher.num_frames(cut.num_samples), 4)
        np.testing.assert_array_equal(load_labels(cut), indexes_TN)
        assert cut.custom[FIELD].frame_shift == 0.02 and cut.custom[FIELD].temporal_dim == 0
        assert Origin(**cut.custom[ORIGIN_FIELD]) == origin
        wave_1L = torch.from_numpy(cut.load_audio())
        embeddings, _ = teacher.embed(wave_1L, torch.tensor([wave_1L.shape[1]]), 2)
        expected = quantizer.encode(embeddings[0], refine_indexes_iters=1)
        # The 16-bit copy of perturbed audio may tip a near tie.
        assert (expected.numpy() == indexes_TN).mean() > 0.98
    # What icefall's recipe reads: the array's description, and its file.
    with gzip.open(corpus.parent / "labels/train.jsonl.gz", "rt") as file:
        array = json.loads(file.readline())["custom"][FIELD]
    assert array["array"]["storage_type"] == "numpy_hdf5"
    assert set(array) == {"array", "temporal_dim", "frame_shift", "start"}


def test_labels_do_not_depend_on_the_batch(
    feature_cuts, labelled_cuts, teacher, quantizer, origin, tmp_path
):
    alone = dump(feature_cuts, tmp_path, teacher, quantizer, origin, max_duration=0.1)
    pairs = [(load_labels(a), load_labels(b)) for a, b in zip(alone, labelled_cuts)]
    same = np.concatenate([(a == b).ravel() for a, b in pairs])
    # Sums in another order may tip a near tie.
    assert same.mean() > 0.995


@pytest.mark.parametrize("rate", [8000, 44100])
def test_audio_at_another_rate_is_resampled(rate, teacher, quantizer, origin, tmp_path):
    generator = np.random.default_rng(1)
    cuts = {}
    for number in range(2):
        # Of an odd length: no whole number of samples at the other rate.
        noise_L = 0.1 * generator.standard_normal(20001 + 2500 * number)
        speech_L = np.convolve(noise_L, firwin(201, 3000, fs=16000), "same")
        for name, hertz in (("copy", 16000), ("other", rate)):
            common = math.gcd(hertz, 16000)
            samples_L = resample_poly(speech_L, hertz // common, 16000 // common)
            soundfile.write(tmp_path / f"{name}{number}.wav", samples_L, hertz, subtype="FLOAT")
            cut = Recording.from_file(tmp_path / f"{name}{number}.wav").to_cut()
            cuts.setdefault(name, []).append(cut)
    kinds = [
        CodebookIndexes(teacher, quantizer, origin, refine_iters=1),
        Embeddings(teacher, 2, "float32", "layer2"),
    ]
    labelled = {}
    for name, some in cuts.items():
        dumper, out = Dumper(kinds, LabelSettings(), CPU), tmp_path / name / "train.jsonl.gz"
        labelled[name] = dump_labels(CutSet.from_cuts(some), out, dumper, shard_size=4)
    for copy, other in zip(labelled["copy"], labelled["other"]):
        assert (copy.sampling_rate, other.sampling_rate) == (16000, rate)
        indexes_TN, expected_TN = load_labels(other), load_labels(copy)
        assert indexes_TN.shape == expected_TN.shape
        assert (indexes_TN == expected_TN).mean() > 0.9
        x_TD, expected_TD = other.load_layer2(), copy.load_layer2()
        error = ((x_TD - expected_TD) ** 2).sum()
        assert error < 0.01 * ((expected_TD - expected_TD.mean(0)) ** 2).sum()


def test_codebooks_of_fewer_entries_keep_a_column_each(feature_cuts, teacher, tmp_path):
    small = Quantizer(32, 16, 4, generator=torch.Generator().manual_seed(1))
    origin = Origin("tiny", 1, small.get_id(), small.weights_sha256())
    cuts = CutSet.from_cuts(list(feature_cuts)[:2])
    labelled = dump(cuts, tmp_path, teacher, small, origin)
    verify_labels(labelled, [CodebookIndexes(teacher, small, origin)])
    with pytest.raises(RecipeError, match="codebooks have 4 entries"):
        verify_labels(labelled, [CodebookIndexes(teacher, Quantizer(32, 4, 4), origin)])
    with pytest.raises(RecipeError, match="512 entries does not fit a byte"):
        dump(cuts, tmp_path, teacher, Quantizer(32, 512, 1), origin)


def test_codebooks_that_are_searched_by_beam(feature_cuts, teacher, tmp_path):
    residual = Quantizer(32, 16, 4, generator=torch.Generator().manual_seed(1)).eval()
    residual.beam = 8
    residual.set_id_from_weights()
    cuts, arrays = CutSet.from_cuts(list(feature_cuts)[:2]), []
    save_quantizer(tmp_path / "quantizer.pt", residual, {})
    # The file without what lies beside it.
    shutil.copy(tmp_path / "quantizer.pt", tmp_path / "copied.pt")
    for name in ("quantizer", "copied"):
        loaded, meta = load_quantizer(tmp_path / f"{name}.pt")
        origin = Origin("tiny", 2, meta["quantizer_id"], meta["sha256"])
        labelled = dump(cuts, tmp_path / name, teacher, loaded, origin)
        arrays.append([load_labels(cut) for cut in labelled])
    for cut, *found in zip(cuts, *arrays):
        np.testing.assert_array_equal(*found)
        wave_1L = torch.from_numpy(cut.load_audio())
        embeddings, _ = teacher.embed(wave_1L, torch.tensor([wave_1L.shape[1]]), 2)
        expected = residual.encode(embeddings[0], refine_indexes_iters=1, as_bytes=False)
        # The 16-bit copy of perturbed audio may tip a near tie.
        assert (expected.numpy() == found[0]).mean() > 0.98
    residual.beam = 0
    other = Origin("tiny", 2, origin.quantizer, residual.weights_sha256())
    with pytest.raises(RecipeError, match="its labels were made by quantizer"):
        check_origin(labelled[0], other, accept_unknown=False)


def test_labels_of_another_quantizer_are_refused(corpus, labelled_cuts, teacher, quantizer, origin):
    other = Origin("tiny", 2, "0badcafe", "f" * 64)
    with pytest.raises(RecipeError) as caught:
        verify_labels(labelled_cuts, [CodebookIndexes(teacher, quantizer, other)])
    message = str(caught.value)
    for name in (labelled_cuts[0].id, quantizer.get_id(), origin.sha256[:12], "0badcafe", "f" * 12):
        assert name in message
    assert f"; remove {corpus.parent}/labels and run stage 5, or" in message
    assert "\n" not in message
    with pytest.raises(RecipeError):
        check_origin(labelled_cuts[0], other, accept_unknown=True)


def test_labels_of_unknown_origin_must_be_accepted(own_labels, teacher, quantizer, origin):
    cut = own_labels[0][0]
    del cut.custom[ORIGIN_FIELD]
    kind = CodebookIndexes(teacher, quantizer, origin)
    verify_labels(own_labels[0], [kind], accept_unknown_origin=True)
    with pytest.raises(RecipeError, match="do not say what made them; set accept_unknown_origin"):
        check_origin(cut, origin, accept_unknown=False)
    check_origin(cut, origin, accept_unknown=True)
    del cut.custom[FIELD]
    for check in (lambda: check_origin(cut, origin, True), lambda: load_labels(cut)):
        with pytest.raises(RecipeError, match=f"cut {cut.id}: has no codebook_indexes; run stage"):
            check()


def test_what_labels_have_in_common(labelled_cuts, own_labels):
    assert common_facts(labelled_cuts, accept_unknown_origin=False) == (4, 0.02)
    cuts = list(own_labels[0])
    del cuts[1].custom[ORIGIN_FIELD]
    with pytest.raises(RecipeError, match=f"cut {cuts[1].id}: its labels do not say what made"):
        common_facts(cuts, accept_unknown_origin=False)
    with pytest.raises(
        RecipeError, match=f"cut {cuts[1].id}: its labels .*of unknown origin.* of "
    ):
        common_facts(cuts, accept_unknown_origin=True)
    for cut in cuts:
        cut.custom.pop(ORIGIN_FIELD, None)
    assert common_facts(cuts, accept_unknown_origin=True) == (4, 0.02)
    with pytest.raises(RecipeError, match="has no codebook_indexes; run stage 5"):
        common_facts([fastcopy(cuts[0], custom=None)], accept_unknown_origin=True)


@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda a: a[:-1], "its codebook_indexes have shape"),
        (lambda a: np.concatenate([a, a[:2]]), "its codebook_indexes have shape"),
        (lambda a: a[:, :2], "its codebook_indexes have shape"),
        (lambda a: a.astype(np.int16), "its codebook_indexes are int16, not uint8"),
        (None, "cannot be read (KeyError); remove it and the labels' stamp in"),
    ],
    ids=["short", "long", "columns", "dtype", "missing"],
)
def test_labels_that_do_not_fit_are_refused(own_labels, teacher, quantizer, origin, change, cause):
    cuts, path = own_labels
    cut = cuts[1]
    with h5py.File(path, "r+") as file:
        changed = None if change is None else change(file[cut.id][:])
        del file[cut.id]
        if changed is not None:
            file[cut.id] = changed
            # Found by what is stored, whatever the manifest says.
            cut.custom[FIELD].array.shape = list(changed.shape)
            cut.custom[FIELD].array.storage_key = cut.id
    with pytest.raises(RecipeError) as caught:
        verify_labels(cuts, [CodebookIndexes(teacher, quantizer, origin)])
    assert f"cut {cut.id}" in str(caught.value) and cause in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_frame_more_is_what_icefall_stores(own_labels, teacher, quantizer, origin):
    cuts, path = own_labels
    with h5py.File(path, "r+") as file:
        for cut in cuts:
            indexes_TN = file[cut.id][:]
            del file[cut.id]
            file[cut.id] = np.concatenate([indexes_TN, indexes_TN[-1:]])
    verify_labels(cuts, [CodebookIndexes(teacher, quantizer, origin)])


def test_label_file_that_is_missing_or_damaged(own_labels):
    cuts, path = own_labels
    for content in (b"no HDF5", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RecipeError, match=rf"^{path}: {FIELD} of cut {cuts[0].id} cannot be"):
            load_labels(cuts[0])


def test_truncated_cut_gets_its_slice(labelled_cuts):
    cut = labelled_cuts[0]
    whole_TN = load_labels(cut)
    part = cut.truncate(offset=0.5, duration=1.0, preserve_id=True)
    np.testing.assert_array_equal(load_labels(part), whole_TN[25:75])
    again = part.truncate(offset=0.2, duration=0.4)
    np.testing.assert_array_equal(load_labels(again), whole_TN[35:55])


def test_padding_is_ignored_not_a_valid_index(labelled_cuts):
    cut = labelled_cuts[0]
    labels_TN = load_labels(cut)
    right_TN = load_labels(cut.pad(duration=cut.duration + 1))
    left_TN = load_labels(cut.pad(duration=cut.duration + 1, direction="left"))
    for padded_TN in (right_TN, left_TN):
        assert len(padded_TN) == round((cut.duration + 1) / 0.02)
        assert (padded_TN != IGNORED).sum() == labels_TN.size
    np.testing.assert_array_equal(right_TN[: len(labels_TN)], labels_TN)
    np.testing.assert_array_equal(left_TN[50 : 50 + len(labels_TN)], labels_TN)


def test_mixed_cut_keeps_the_labels_of_its_speech(labelled_cuts, plain_cuts):
    cut, noise = labelled_cuts[0], list(plain_cuts)[4]
    labels_TN = load_labels(cut)
    mixed = cut.mix(noise.truncate(duration=1.0), offset_other_by=0.3, snr=10)
    np.testing.assert_array_equal(load_labels(mixed)[: len(labels_TN)], labels_TN)
    under = noise.truncate(duration=1.0).mix(cut, offset_other_by=0.6, snr=0)
    labels_under_TN = load_labels(under)
    assert (labels_under_TN[:30] == IGNORED).all()
    np.testing.assert_array_equal(labels_under_TN[30 : 30 + len(labels_TN)], labels_TN)
    assert (labels_under_TN[30 + len(labels_TN) :] == IGNORED).all()
    with pytest.raises(RecipeError, match="2 of its tracks have codebook_indexes; exactly one"):
        load_labels(cut.append(labelled_cuts[1]))
    with pytest.raises(RecipeError, match="0 of its tracks"):
        load_labels(noise.pad(duration=noise.duration + 1))


def test_collated_padding():
    one, two = np.zeros((3, 2), np.int64), np.ones((5, 2), np.int64)
    labels_BTN = collate_labels([one, two])
    assert labels_BTN.dtype == torch.int64 and labels_BTN.shape == (2, 5, 2)
    assert (labels_BTN[0, 3:] == IGNORED).all() and (labels_BTN != IGNORED).sum() == 16


def test_dump_goes_on_where_it_was_killed(
    feature_cuts, teacher, quantizer, origin, tmp_path, monkeypatch
):
    whole = dump(feature_cuts, tmp_path / "whole", teacher, quantizer, origin)
    store, calls = Dumper._store, []

    def dies(self, computed):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(computed)
        store(self, computed)

    monkeypatch.setattr(Dumper, "_store", dies)
    with pytest.raises(KeyboardInterrupt):
        dump(feature_cuts, tmp_path / "killed", teacher, quantizer, origin)
    monkeypatch.undo()
    assert not (tmp_path / "killed/train.jsonl.gz").exists()
    done = dump(feature_cuts, tmp_path / "killed", teacher, quantizer, origin)
    for a, b in zip(done, whole):
        np.testing.assert_array_equal(load_labels(a), load_labels(b))
    assert len(read_cuts(tmp_path / "killed/train.jsonl.gz")) == len(feature_cuts)
    shutil.rmtree(tmp_path / "killed")


def renamed(cut, cut_id, recording_id=None, **changes):
    recording = fastcopy(cut.recording, id=recording_id or cut.recording.id)
    return fastcopy(cut, id=cut_id, recording=recording, **changes)


def test_labels_are_joined_by_id(labelled_cuts, feature_cuts):
    backwards = CutSet.from_cuts(reversed(list(labelled_cuts)))
    joined = join_labels(feature_cuts, backwards)
    for cut, plain, labelled in zip(joined, feature_cuts, labelled_cuts):
        assert cut.id == plain.id
        # Samplers, which other tests have run, leave notes of their own there.
        for key in ("codebook_indexes", "codebook_indexes_origin"):
            assert cut.custom[key] == labelled.custom[key]
        assert "codebook_indexes" not in (plain.custom or {})


def test_labels_under_ids_of_another_scheme(labelled_cuts, feature_cuts):
    others = []
    for number, cut in enumerate(labelled_cuts):
        recording = cut.recording.id
        if "_sp" in recording:  # as Kaldi names them
            name, _, speed = recording.partition("_sp")
            recording = f"sp{speed}-{name}"
        others.append(renamed(cut, f"{recording}-{number}", recording, start=cut.start + 2e-3))
    joined = join_labels(feature_cuts, CutSet.from_cuts(others))
    for cut, labelled in zip(joined, labelled_cuts):
        np.testing.assert_array_equal(load_labels(cut), load_labels(labelled))


def test_labels_that_cannot_be_matched_are_refused_with_both_ids(labelled_cuts, feature_cuts):
    cuts, labels = list(feature_cuts), list(labelled_cuts)
    slow = next(i for i, cut in enumerate(cuts) if cut.id.endswith("_sp0.9"))
    wanted, label = CutSet.from_cuts([cuts[slow]]), labels[slow]
    plain = next(other for other in labels if other.id == cuts[slow].id[: -len("_sp0.9")])
    for others, ids in (
        # Another speed; another start; no recording to tell by; two of the same.
        ([plain], [plain.id]),
        ([renamed(label, f"{label.id}-7", start=label.start + 1)], [f"{label.id}-7"]),
        ([fastcopy(label, id=f"{label.id}-7", recording=None)], [f"{label.id}-7"]),
        ([renamed(label, "a"), renamed(label, "b")], ["both a and b"]),
        # The right id of the wrong speech.
        ([renamed(plain, label.id)], [f"{label.id}: the label of this id", "speed 1)", "speed 0."]),
        ([fastcopy(label, custom=None)], [f"{label.id}: has no codebook_indexes"]),
        ([fastcopy(label, duration=9.5, recording=None)], ["of recording unknown name, 9.500 s"]),
    ):
        with pytest.raises(RecipeError) as caught:
            join_labels(wanted, CutSet.from_cuts(others))
        for part in (cuts[slow].id, *ids):
            assert part in str(caught.value), part
        assert "\n" not in str(caught.value)


def test_published_labels_without_recordings_are_joined_by_id(labelled_cuts, feature_cuts):
    published = CutSet.from_cuts(
        MonoCut(cut.id, cut.start, cut.duration, cut.channel, custom={FIELD: cut.custom[FIELD]})
        for cut in labelled_cuts
    )
    for cut, labelled in zip(join_labels(feature_cuts, published), labelled_cuts):
        np.testing.assert_array_equal(load_labels(cut), load_labels(labelled))
        assert ORIGIN_FIELD not in cut.custom


def dump_floats(cuts, folder, teacher, quantizer, origin, dtype="float16"):
    kinds = [
        CodebookIndexes(teacher, quantizer, origin, refine_iters=1),
        Embeddings(teacher, 1, dtype, "layer1"),
    ]
    dumper = Dumper(kinds, LabelSettings(), CPU)
    return dump_labels(cuts, folder / "train.jsonl.gz", dumper, shard_size=4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_beside_indexes(feature_cuts, teacher, quantizer, origin, tmp_path, dtype):
    cuts = CutSet.from_cuts(list(feature_cuts)[:3])
    labelled = dump_floats(cuts, tmp_path, teacher, quantizer, origin, dtype)
    for cut in labelled:
        batch = collate_audio([cut])
        embeddings, _ = teacher.embed(batch.waveforms_BL, batch.lengths_B, 1)
        assert cut.load_layer1().dtype == dtype
        np.testing.assert_allclose(cut.load_layer1(), embeddings[0], atol=2e-3, rtol=1e-3)
        assert cut.load_codebook_indexes().shape == (cut.custom["layer1"].num_frames, 4)
        check_origin(cut, Origin("tiny", 1, dtype, ""), False, "layer1")
    with pytest.raises(RecipeError, match=r"layer1 are float.. of layer 1 of tiny, not .* layer 2"):
        check_origin(labelled[0], Origin("tiny", 2, dtype, ""), False, "layer1")


def test_layers_of_one_teacher_in_one_pass(feature_cuts, teacher, quantizer, origin, tmp_path):
    cuts = CutSet.from_cuts(list(feature_cuts)[:2])
    asked, layers = [], type(teacher)._layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            teacher, "_layers", lambda *args: asked.append(args[2]) or layers(teacher, *args)
        )
        together = dump_floats(cuts, tmp_path / "both", teacher, quantizer, origin)
    assert asked == [[1, 2]]
    alone = dump(cuts, tmp_path / "one", teacher, quantizer, origin)
    for both, one in zip(together, alone):
        np.testing.assert_array_equal(both.load_codebook_indexes(), one.load_codebook_indexes())


def test_threads_change_no_byte(feature_cuts, teacher, quantizer, origin, tmp_path):
    """As one step after the other, in this thread."""
    kinds = [
        CodebookIndexes(teacher, quantizer, origin, refine_iters=1),
        Embeddings(teacher, 1, "float32", "layer1"),
    ]
    settings = LabelSettings(max_duration=4, num_loaders=3, num_threads=torch.get_num_threads())
    dumper = Dumper(kinds, settings, CPU)
    batches = dumper._batches(feature_cuts)
    assert sorted(len(batch) for batch in batches)[0] == 1 and len(batches) > 5
    assert sorted(cut.id for batch in batches for cut in batch) == sorted(feature_cuts.ids)
    for path in (tmp_path / "one", tmp_path / "many"):
        arrays = ArrayFile(path, tmp_path / "arrays.h5")
        if path.name == "many":
            done = dumper(feature_cuts, arrays)
        else:
            for batch in dumper._batches(CutSet.from_cuts(map(fastcopy, feature_cuts))):
                _, audio, _ = dumper._load(batch)
                dumper._store((batch, dumper._compute(audio), arrays))
        arrays.close()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    assert [cut.id for cut in done] == list(feature_cuts.ids)
    assert all("layer1" in cut.custom and FIELD in cut.custom for cut in done)


def test_number_of_threads_in_the_environment_changes_no_byte(feature_cuts, tmp_path):
    teacher = load_teacher(ROOT / "egs/mini/teacher")  # large enough for sums to be shared out
    cuts, before = CutSet.from_cuts(list(feature_cuts)[:2]), torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            dumper = Dumper([Embeddings(teacher, 5, "float32", "a")], LabelSettings(), CPU)
            dump_labels(cuts, tmp_path / f"{number}/train.jsonl.gz", dumper, shard_size=4)
            assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(before)
        shards = tmp_path / f"{number}/shards"
        found.append((shards / "00000.h5").read_bytes())
        assert json.loads((shards / "made-from.json").read_text())["num_threads"] == 2
    assert found[0] == found[1]


def test_errors_of_other_threads_leave_one_line_and_nothing_else(
    feature_cuts, teacher, quantizer, origin, tmp_path, monkeypatch
):
    threads, cuts = threading.active_count(), list(feature_cuts)
    source = fastcopy(cuts[2].recording.sources[0], source=str(tmp_path / "gone.flac"))
    gone = fastcopy(cuts[2], recording=fastcopy(cuts[2].recording, sources=[source]))
    short = cuts[2].truncate(duration=0.01, preserve_id=True)

    def said(cut):
        some = CutSet.from_cuts([*cuts[:2], cut, *cuts[3:]])
        with pytest.raises(RecipeError) as caught:
            dump(some, tmp_path / "labels", teacher, quantizer, origin, max_duration=4)
        left = [path.name for path in (tmp_path / "labels").rglob("*") if path.is_file()]
        assert sorted(left) == ["00000.lock", "made-from.json"]
        assert threading.active_count() == threads and "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "labels")
        return str(caught.value)

    assert said(gone).startswith(f"{tmp_path}/gone.flac: cut {gone.id} cannot be read")
    assert said(short).startswith(f"cut {short.id}: 160 samples are shorter than one frame of")
    store, stored = ArrayFile.store, []

    def full(self, key, *args, **options):
        if len(stored) == 2:
            raise OSError(errno.ENOSPC, "full")
        stored.append(key)
        store(self, key, *args, **options)

    monkeypatch.setattr(ArrayFile, "store", full)
    assert "00000.h5: cannot be written (No space left on device)" in said(cuts[2])


def test_bad_cuts_are_left_out_and_listed_up_to_a_share(
    feature_cuts, teacher, quantizer, origin, tmp_path, caplog
):
    cuts = list(feature_cuts)
    good = dump(CutSet.from_cuts(cuts), tmp_path / "good", teacher, quantizer, origin)
    source = fastcopy(cuts[2].recording.sources[0], source=str(tmp_path / "broken.flac"))
    (tmp_path / "broken.flac").write_bytes(b"no FLAC")
    cuts[2] = fastcopy(cuts[2], recording=fastcopy(cuts[2].recording, sources=[source]))
    cuts[9] = cuts[9].truncate(duration=0.01, preserve_id=True)
    some, out = CutSet.from_cuts(cuts), tmp_path / "labels"
    with pytest.raises(
        RecipeError, match=r"\(1 of 12 utterances are bad, more than max_bad_share = "
    ):
        dump(some, out, teacher, quantizer, origin)
    # One in either shard, but both are too many.
    with pytest.raises(RecipeError, match=r"cut .*\(2 of 12 utterances are bad.* of labels.yaml"):
        dump(some, out, teacher, quantizer, origin, max_bad_share=0.1)
    assert not (out / "train.jsonl.gz").exists()
    for _ in range(2):  # the second call finds all done
        labelled = dump(some, out, teacher, quantizer, origin, max_bad_share=0.2)
        left = [cut for number, cut in enumerate(good) if number not in (2, 9)]
        assert [cut.id for cut in labelled] == [cut.id for cut in left]
        for cut, expected in zip(read_cuts(out / "train.jsonl.gz"), left):
            assert (load_labels(cut) == load_labels(expected)).mean() > 0.98  # near ties
        broken, short = (out / "bad-utterances.txt").read_text().splitlines()
        assert broken.startswith(f"{tmp_path}/broken.flac: cut {cuts[2].id} cannot be read")
        assert short.startswith(f"cut {cuts[9].id}: 160 samples are shorter than one frame of")
    assert "2 bad utterances left out, listed in" in caplog.text
    assert not (tmp_path / "good/bad-utterances.txt").exists()


def test_precision_of_the_teacher(feature_cuts, teacher, quantizer, origin, tmp_path, monkeypatch):
    cuts, encode = CutSet.from_cuts(list(feature_cuts)[:3]), CodebookIndexes.encode
    outside = []

    def watched(self, embeddings_FD):
        outside.append((torch.is_autocast_enabled("cpu"), embeddings_FD.dtype))
        return encode(self, embeddings_FD)

    monkeypatch.setattr(CodebookIndexes, "encode", watched)
    files, labels = {}, {}
    for precision in ("float32", "auto", "bf16"):
        kinds = [
            CodebookIndexes(teacher, quantizer, origin, refine_iters=1),
            Embeddings(teacher, 2, "float32", "layer2"),
        ]
        dumper = Dumper(kinds, LabelSettings(precision=precision), CPU)
        folder = tmp_path / precision
        labelled = dump_labels(cuts, folder / "train.jsonl.gz", dumper, shard_size=4)
        files[precision] = (folder / "shards/00000.h5").read_bytes()
        labels[precision] = [
            np.concatenate([getattr(cut, f"load_{field}")() for cut in labelled])
            for field in (FIELD, "layer2")
        ]
    assert files["auto"] == files["float32"] != files["bf16"]
    (indexes_FN, x_FD), (half_FN, half_FD) = labels["float32"], labels["bf16"]
    error = ((half_FD - x_FD) ** 2).sum() / ((x_FD - x_FD.mean(0)) ** 2).sum()
    assert 0 < error < 1e-3
    assert 0.8 < (half_FN == indexes_FN).mean() < 1
    assert set(outside) == {(False, torch.float32)}
    with pytest.raises(RecipeError, match="made from precision float32, and this job's from bfloa"):
        dump_labels(cuts, tmp_path / "auto/train.jsonl.gz", dumper, shard_size=4)


def test_labels_of_another_device_or_teacher_are_refused(
    feature_cuts, teacher, quantizer, origin, tmp_path, monkeypatch
):
    cuts, out = CutSet.from_cuts(list(feature_cuts)[:2]), tmp_path / "train.jsonl.gz"
    made_from = tmp_path / "shards/made-from.json"

    def again(device="cpu", weights=None):
        monkeypatch.setattr(teacher, "sha256", lambda: weights)
        dumper = Dumper([CodebookIndexes(teacher, quantizer, origin)], LabelSettings(), CPU)
        dumper._device = torch.device(device)
        dump_labels(cuts, out, dumper, shard_size=4)

    again(weights="a" * 64)
    told = json.loads(made_from.read_text())
    assert told["device"] == "cpu" and told["teacher_weights"] == {FIELD: "a" * 64}
    for changed, key, value in (
        ({"device": "cuda", "weights": "a" * 64}, "device cpu", "cuda"),
        ({"weights": "b" * 64}, "teacher_weights {'codebook_indexes': 'aaa", "'bbb"),
        ({"weights": None}, "teacher_weights {'codebook_indexes': 'aaa", "None"),
    ):
        with pytest.raises(RecipeError, match="give it another folder, or remove this") as caught:
            again(**changed)
        message = str(caught.value)
        assert f"made from {key}" in message and value in message and "\n" not in message
    # As folders were that did not tell.
    del told["device"], told["teacher_weights"]
    made_from.write_text(json.dumps(told))
    again("cuda", "b" * 64)
    assert json.loads(made_from.read_text()) == told


def test_long_arrays_are_chunked(tmp_path):
    file = ArrayFile(tmp_path / "a", tmp_path / "a")
    embeddings_TD = np.random.default_rng(1).standard_normal((599, 320)).astype(np.float16)
    file.store("layer1/cut", embeddings_TD, chunked=True)
    file.close()
    with h5py.File(tmp_path / "a") as read:
        assert read["layer1/cut"].chunks == (100, 320)
        np.testing.assert_array_equal(read["layer1/cut"][130:140], embeddings_TD[130:140])


def test_embeddings_that_are_no_float16(feature_cuts, teacher, quantizer, origin, tmp_path):
    kind = Embeddings(teacher, 1, "float16", "layer1")
    with pytest.MonkeyPatch.context() as patch:
        layers = type(teacher)._layers
        patch.setattr(teacher, "_layers", lambda *args: [1e6 * x for x in layers(teacher, *args)])
        with pytest.raises(RecipeError, match="layer1 holds values that are not finite as float16"):
            dump_labels(
                feature_cuts, tmp_path / "a.jsonl.gz", Dumper([kind], LabelSettings(), CPU), 4
            )
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [
        "00000.lock",
        "made-from.json",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["indexes", "float16"])
def test_a_frame_that_is_not_finite_is_named(
    feature_cuts, teacher, quantizer, origin, tmp_path, monkeypatch, kind, value
):
    layers = type(teacher)._layers
    cuts = CutSet.from_cuts(list(feature_cuts)[:3])
    bad = cuts[1]

    def spoiled(self, waveforms_BL, lengths_B, *rest):
        found = [x_BTD.clone() for x_BTD in layers(self, waveforms_BL, lengths_B, *rest)]
        for x_BTD in found:
            x_BTD[lengths_B == bad.num_samples, 7, 3] = value
        return found

    monkeypatch.setattr(type(teacher), "_layers", spoiled)
    made = CodebookIndexes(teacher, quantizer, origin)
    kinds = [made if kind == "indexes" else Embeddings(teacher, 2, "float16", "layer2")]
    with pytest.raises(RecipeError) as caught:
        dump_labels(cuts, tmp_path / "a.jsonl.gz", Dumper(kinds, LabelSettings(), CPU), 4)
    expected = f"layer 2 of tiny: 1 frames with NaN or infinity (cut {bad.id} frame 7); leave out"
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    assert not list((tmp_path / "shards").glob("*.h5")) and not (tmp_path / "a.jsonl.gz").exists()


def test_labels_stay_with_lhotse_alone(feature_cuts, teacher, quantizer, origin, tmp_path):
    """Truncated, split, combined and exported to Shar."""
    written = dump_floats(feature_cuts, tmp_path, teacher, quantizer, origin)
    cuts = CutSet.from_file(tmp_path / "train.jsonl.gz").to_eager()
    whole = {cut.id: (cut.load_codebook_indexes(), cut.load_layer1()) for cut in cuts}
    assert whole.keys() == {cut.id for cut in written}

    part = cuts[0].truncate(offset=0.4, duration=0.8)
    for found, array in zip((part.load_codebook_indexes(), part.load_layer1()), whole[cuts[0].id]):
        np.testing.assert_array_equal(found, array[20:60])
    windows = cuts.cut_into_windows(0.5)
    for cut in windows:
        assert len(cut.load_codebook_indexes()) == len(cut.load_layer1()) >= 1

    pieces = cuts.split(3)
    for number, piece in enumerate(pieces):
        piece.to_file(tmp_path / f"piece{number}.jsonl.gz")
    again = lhotse.combine(
        *(CutSet.from_file(tmp_path / f"piece{number}.jsonl.gz") for number in range(3))
    )
    shar = tmp_path / "shar"
    shar.mkdir()
    fields = {"recording": "wav", "features": "numpy", FIELD: "numpy", "layer1": "numpy"}
    cuts.to_shar(shar, fields=fields, shard_size=5)
    for found in (again, CutSet.from_shar(in_dir=shar)):
        found = list(found)
        assert [cut.id for cut in found] == [cut.id for cut in cuts]
        for cut in found:
            np.testing.assert_array_equal(cut.load_codebook_indexes(), whole[cut.id][0])
            np.testing.assert_array_equal(cut.load_layer1(), whole[cut.id][1])
            np.testing.assert_array_equal(load_labels(cut), whole[cut.id][0])
            check_origin(cut, origin, accept_unknown=False)


def test_storage_of_utterances_of_12_seconds():
    settings = label_storage.Settings(num_utterances=500)
    cuts = label_storage.simulated_cuts(settings.num_utterances, settings.seconds)
    kind = CodebookIndexes(
        label_storage.FrameClock(), Quantizer(8, 256, 8), Origin("a", 1, "b", "c" * 64)
    )
    found = label_storage.bytes_of(kind, cuts, settings)
    assert 500 * 599 * 8 < found < 1.08 * 500 * 599 * 8


def test_manifest_that_another_process_writes_first(
    feature_cuts, teacher, quantizer, origin, tmp_path, monkeypatch
):
    whole = dump(feature_cuts, tmp_path / "whole", teacher, quantizer, origin)
    shutil.copytree(tmp_path / "whole", tmp_path / "ours")
    kept = tmp_path / "ours/train.jsonl.gz"
    theirs = kept.read_bytes()
    for name in ("00000", "00001", "00002"):
        (tmp_path / f"ours/shards/{name}.jsonl.gz").touch()
    (tmp_path / "ours/shards/.part-host9-77-00001.h5").write_bytes(b"killed on another host")
    kept.unlink()

    def too_late(self):
        kept.write_bytes(theirs)
        raise FileNotFoundError

    monkeypatch.setattr(Shards, "cuts", too_late)
    done = dump(feature_cuts, tmp_path / "ours", teacher, quantizer, origin)
    assert [cut.id for cut in done] == [cut.id for cut in whole]
    assert kept.read_bytes() == theirs
    names = sorted(path.name for path in (tmp_path / "ours/shards").iterdir())
    assert names == ["00000.h5", "00001.h5", "00002.h5", "made-from.json"]
