"""HuBERT: embeddings, their independence of the batch, files."""

import json
import shutil

import h5py
import huggingface_hub
import pytest
import torch
from torch.nn import functional as F

from mvqkd.errors import RecipeError
from mvqkd.teachers import load_teacher
from mvqkd.teachers.ctc import SYMBOLS
from mvqkd.teachers.embeddings import SampleSettings, sample_embeddings
from mvqkd.teachers.hubert import HubertTeacher
from tests.conftest import CPU, tiny_hubert

# HuBERT's own front end; the base model has group norm, the large ones layer norm.
HUBERT_FRONT_END = {
    "conv_dim": [16] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
}
KINDS = {
    "base": {**HUBERT_FRONT_END, "feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {**HUBERT_FRONT_END, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "layer-post": {"feat_extract_norm": "layer", "do_stable_layer_norm": False},
    "group-stable": {"feat_extract_norm": "group", "do_stable_layer_norm": True},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def any_teacher(request):
    return HubertTeacher(tiny_hubert(**request.param), True).eval()


def waveforms(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    waves = [torch.randn(n, generator=generator) * 0.1 + 0.05 for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor(lengths)


def test_embedding_does_not_depend_on_the_batch(any_teacher):
    waveforms_BL, lengths_B = waveforms(9000, 400, 16000, 5123)
    dirty_BL = waveforms_BL.clone()
    for row, n in zip(dirty_BL, lengths_B):
        row[n:] = float("nan")  # padding may hold anything
    order = torch.tensor([2, 0, 3, 1])
    for layer in (1, 2):
        alone = [
            any_teacher.embed(w[None, :n], n[None], layer)[0][0]
            for w, n in zip(waveforms_BL, lengths_B)
        ]
        for batch_BL, chosen in (
            (waveforms_BL, torch.arange(4)),
            (dirty_BL[order], order),
            (F.pad(waveforms_BL[:2], (0, 7777)), torch.arange(2)),
        ):
            embeddings_BTD, frames_B = any_teacher.embed(batch_BL, lengths_B[chosen], layer)
            for x_TD, n, index in zip(embeddings_BTD, frames_B, chosen):
                assert len(alone[index]) == n
                torch.testing.assert_close(x_TD[:n], alone[index], atol=1e-4, rtol=0)


def test_layers_are_those_of_transformers(any_teacher):
    waveforms_1L, lengths_1 = waveforms(8000)
    normalized_1L = waveforms_1L - waveforms_1L.mean()
    normalized_1L = normalized_1L / (normalized_1L.var(unbiased=False) + 1e-7).sqrt()
    encoder = any_teacher.model.hubert.encoder
    with torch.no_grad():
        expected = any_teacher.model.hubert(normalized_1L, output_hidden_states=True)
        first_1TD, _ = any_teacher.embed(waveforms_1L, lengths_1, 1)
        last_1TD, _ = any_teacher.embed(waveforms_1L, lengths_1, 2)
        torch.testing.assert_close(first_1TD, expected.hidden_states[1], atol=1e-5, rtol=0)
        if any_teacher.model.config.do_stable_layer_norm:
            # Taken before the final layer norm.
            assert not torch.allclose(last_1TD, expected.last_hidden_state, atol=1e-2)
            last_1TD = encoder.layer_norm(last_1TD)
        torch.testing.assert_close(last_1TD, expected.last_hidden_state, atol=1e-5, rtol=0)
    assert len(encoder.layers) == any_teacher.num_layers == 2


def test_number_and_place_of_frames(any_teacher):
    assert (any_teacher.frame_shift, any_teacher.receptive_field) == (0.02, 400)
    assert any_teacher.frame_offset == 0.0125
    assert any_teacher.num_frames(399) == 0
    for num_samples in (400, 719, 720, 7999, 8080):
        embeddings_BTD, frames_B = any_teacher.embed(*waveforms(num_samples), 1)
        frames = (num_samples - 400) // 320 + 1
        assert embeddings_BTD.shape == (1, frames, any_teacher.dim)
        assert frames_B.tolist() == [frames] == [any_teacher.num_frames(num_samples)]


def test_each_utterance_is_normalized_by_itself():
    waveforms_BL, lengths_B = waveforms(6000, 4000)
    louder_BL = waveforms_BL * torch.tensor([[8.0], [0.5]]) + 0.1
    for do_normalize in (True, False):
        teacher = HubertTeacher(tiny_hubert(), do_normalize).eval()
        a, frames_B = teacher.embed(waveforms_BL, lengths_B, 2)
        b, _ = teacher.embed(louder_BL, lengths_B, 2)
        for x_TD, y_TD, n in zip(a, b, frames_B):
            assert torch.allclose(x_TD[:n], y_TD[:n], atol=1e-3) == do_normalize


def test_layer_out_of_range_and_too_short_utterance(teacher):
    for layer in (0, 3, -1):
        with pytest.raises(RecipeError, match=rf"teacher tiny: layer {layer} is not in 1\.\.2"):
            teacher.embed(*waveforms(8000), layer)
    with pytest.raises(RecipeError, match="utterance of 399 samples is shorter than one frame"):
        teacher.embed(*waveforms(8000, 399), 1)


@pytest.mark.parametrize("half", [False, True])
def test_save_and_load(teacher, tmp_path, half, capfd):
    saved = HubertTeacher(tiny_hubert(), False, list(SYMBOLS)).eval()
    (saved.half() if half else saved).save(tmp_path)
    loaded = load_teacher(str(tmp_path))
    assert loaded.name == str(tmp_path) and not loaded.training and not loaded.do_normalize
    assert loaded.vocabulary == SYMBOLS
    for key, value in saved.state_dict().items():
        found = loaded.state_dict()[key]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, value.float())
    batch = waveforms(8000, 5000)
    expected, _ = saved.float().embed(*batch, 2)
    torch.testing.assert_close(loaded.embed(*batch, 2)[0], expected, atol=1e-4, rtol=0)
    assert loaded.transcribe(*batch) == saved.transcribe(*batch)
    assert "%" not in capfd.readouterr().err  # progress bars


def test_model_without_a_ctc_head(teacher, tmp_path):
    model = tiny_hubert()
    model.hubert.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    assert loaded.vocabulary is None and loaded.do_normalize
    torch.testing.assert_close(
        loaded.embed(*waveforms(8000), 2)[0], teacher.embed(*waveforms(8000), 2)[0]
    )
    with pytest.raises(RecipeError, match="has no CTC head"):
        loaded.transcribe(*waveforms(8000))


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _set_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    "no weights": (_no_weights, "cannot be loaded"),
    "truncated": (_truncated, "cannot be loaded"),
    "other sizes": (_set_config(intermediate_size=40), "cannot be loaded"),
    "more layers": (_set_config(num_hidden_layers=3), "weights lack"),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), "vocab.json: no such file"),
    "broken vocabulary": (lambda f: (f / "vocab.json").write_text("["), "vocab.json: "),
    "other vocabulary": (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "vocab.json: "),
    "broken preprocessor": (
        lambda f: (f / "preprocessor_config.json").write_text(""),
        "preprocessor_config.json: ",
    ),
}


@pytest.mark.parametrize("damage, cause", DAMAGES.values(), ids=DAMAGES.keys())
def test_folder_that_cannot_be_loaded(teacher, tmp_path, damage, cause):
    teacher.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_teacher(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and cause in message and "\n" not in message


def test_empty_folder(tmp_path):
    with pytest.raises(RecipeError, match=r"config\.json: no such file"):
        load_teacher(tmp_path)


def test_hub_name(teacher, tmp_path, monkeypatch):
    def refuse(name, **kwargs):
        raise ConnectionError("offline\nand so on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RecipeError, match="teacher no/such: no such folder, and the hub") as caught:
        load_teacher("no/such")
    assert "\n" not in str(caught.value)

    def give(name, **kwargs):
        teacher.save(tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert load_teacher("some/hubert").name == "some/hubert"
    shutil.rmtree(tmp_path / "snapshot")


def test_transcribe_takes_out_repeats_and_blanks(teacher, monkeypatch):
    frames = ["|A_AB_B||CC|_", "__O_OH'", "_"]
    best_BT = torch.zeros(3, 13, dtype=torch.long)
    for row, text in zip(best_BT, frames):
        row[: len(text)] = torch.tensor([0 if s == "_" else SYMBOLS.index(s) for s in text])
    best_BT[1, 7:] = SYMBOLS.index("Z")  # past the end
    logits_BTV = F.one_hot(best_BT, len(SYMBOLS)).float()
    lengths_B = torch.tensor([len(text) for text in frames])
    monkeypatch.setattr(teacher, "ctc_logits", lambda *args: (logits_BTV, lengths_B))
    assert teacher.transcribe(*waveforms(800, 700, 600)) == ["AABB C", "OOH'", ""]


def test_sample_of_embeddings(plain_cuts, teacher, tmp_path):
    out = tmp_path / "embeddings.h5"
    settings = SampleSettings(num_utterances=5, num_unseen=2, max_duration=5)
    sample_embeddings(plain_cuts, teacher, 2, out, settings, CPU)
    with h5py.File(out) as file:
        assert dict(file.attrs) == {
            "teacher": "tiny",
            "layer": 2,
            "frame_shift": 0.02,
            "frame_offset": 0.0125,
        }
        frames = {name: file[name][:] for name in ("train", "unseen")}
    assert all(x.dtype == "float32" and x.shape[1] == 32 for x in frames.values())
    # One of five is unseen, and whole.
    counts = [teacher.num_frames(cut.num_samples) for cut in plain_cuts]
    assert len(frames["unseen"]) in counts
    assert len(frames["train"]) > len(frames["unseen"])
    with pytest.raises(RecipeError, match=r"sample\.num_utterances: .* fewer than 2"):
        sample_embeddings(plain_cuts, teacher, 2, out, SampleSettings(num_utterances=1), CPU)
