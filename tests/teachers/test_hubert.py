"""HuBERT: embeddings, their independence of the batch, files."""

import json
import os
import re
import resource
import subprocess
import sys

import h5py
import pytest
import torch
from lhotse import CutSet
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import HubertForCTC, Wav2Vec2ForCTC, WavLMForCTC

from mvqkd.data.audio import collate_audio
from mvqkd.data.manifests import write_cuts
from mvqkd.errors import RecipeError
from mvqkd.teachers import load_teacher
from mvqkd.teachers.base import Teacher
from mvqkd.teachers.ctc import SYMBOLS
from mvqkd.teachers.embeddings import SampleSettings, open_sample, sample_embeddings
from mvqkd.teachers.hubert import HubertTeacher
from tests.conftest import CPU, ROOT, tiny_hubert
from tests.teachers.batches import check_independence, waveforms

# HuBERT's own front end; the base model has group norm, the large ones layer norm.
HUBERT_FRONT_END = {
    "conv_dim": [16] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
}
GROUP = {**HUBERT_FRONT_END, "feat_extract_norm": "group", "do_stable_layer_norm": False}
LAYER = {**HUBERT_FRONT_END, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
KINDS = {
    "hubert-base": (HubertForCTC, GROUP),
    "hubert-large": (HubertForCTC, LAYER),
    "hubert-layer-post": (HubertForCTC, {**LAYER, "do_stable_layer_norm": False}),
    "hubert-group-stable": (HubertForCTC, {**GROUP, "do_stable_layer_norm": True}),
    "wav2vec2-base": (Wav2Vec2ForCTC, GROUP),
    "wav2vec2-large": (Wav2Vec2ForCTC, LAYER),
    "wavlm-base": (WavLMForCTC, GROUP),
    "wavlm-large": (WavLMForCTC, LAYER),
}


def new_model(kind):
    model_class, config = KINDS[kind]
    return tiny_hubert(model_class=model_class, **config)


@pytest.fixture(params=KINDS)
def any_teacher(request):
    return HubertTeacher(new_model(request.param), True).eval()


def test_embedding_does_not_depend_on_the_batch(any_teacher):
    check_independence(any_teacher, 9000, 400, 16000, 5123)


def test_layers_are_those_of_transformers(any_teacher):
    waveforms_1L, lengths_1 = waveforms(8000)
    normalized_1L = waveforms_1L - waveforms_1L.mean()
    normalized_1L = normalized_1L / (normalized_1L.var(unbiased=False) + 1e-7).sqrt()
    model = any_teacher.model.base_model
    encoder = model.encoder
    with torch.no_grad():
        expected = model(normalized_1L, output_hidden_states=True)
        first_1TD, _ = any_teacher.embed(waveforms_1L, lengths_1, 1)
        last_1TD, _ = any_teacher.embed(waveforms_1L, lengths_1, 2)
        torch.testing.assert_close(first_1TD, expected.hidden_states[1], atol=1e-5, rtol=0)
        if any_teacher.model.config.do_stable_layer_norm:
            # Taken before the final layer norm.
            assert not torch.allclose(last_1TD, expected.last_hidden_state, atol=1e-2)
            last_1TD = encoder.layer_norm(last_1TD)
        torch.testing.assert_close(last_1TD, expected.last_hidden_state, atol=1e-5, rtol=0)
    assert len(encoder.layers) == any_teacher.num_layers == 2


def test_layers_above_are_not_run(any_teacher):
    run = []
    for number, layer in enumerate(any_teacher.model.base_model.encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    for wanted in (1, 2):
        any_teacher.embed(*waveforms(8000, 5000), wanted)
        assert run == list(range(1, wanted + 1))
        run.clear()


def test_half_precision_gives_float32_close_to_it(any_teacher):
    waveforms_BL, lengths_B = waveforms(9000, 16000)
    for layer in (1, 2):
        whole_BTD, _ = any_teacher.embed(waveforms_BL, lengths_B, layer)
        half_BTD, _ = any_teacher.embed(waveforms_BL, lengths_B, layer, torch.bfloat16)
        assert half_BTD.dtype == torch.float32
        whole_TD, half_TD = whole_BTD[1], half_BTD[1]
        error = (half_TD - whole_TD).square().sum()
        assert 0 < error < 1e-3 * (whole_TD - whole_TD.mean(0)).square().sum()


def test_number_and_place_of_frames(any_teacher):
    assert (any_teacher.frame_shift, any_teacher.receptive_field) == (0.02, 400)
    assert any_teacher.frame_offset == 0.0125
    assert any_teacher.num_frames(399) == 0
    for num_samples in (400, 719, 720, 7999, 8080):
        embeddings_BTD, frames_B = any_teacher.embed(*waveforms(num_samples), 1)
        frames = (num_samples - 400) // 320 + 1
        assert embeddings_BTD.shape == (1, frames, any_teacher.dim)
        assert frames_B.tolist() == [frames] == [any_teacher.num_frames(num_samples)]


def test_long_utterance_goes_through_in_windows(any_teacher, monkeypatch):
    """The same as whole where attention looks no further than the margin."""
    waveforms_BL, lengths_B = waveforms(4000, 20000, 9700)
    waveforms_BL[1] *= torch.linspace(0.2, 3, 20000)  # the statistics of a window are others
    for layer in any_teacher.model.base_model.encoder.layers:
        monkeypatch.setattr(layer, "attention", NoAttention())
    whole, _ = any_teacher.embed(waveforms_BL, lengths_B, 2)
    monkeypatch.setattr(any_teacher, "window_frames", 30)
    monkeypatch.setattr(any_teacher, "margin_frames", 10)
    norm = any_teacher.model.base_model.feature_extractor.conv_layers[0].layer_norm
    embeddings_BTD, frames_B = any_teacher.embed(waveforms_BL, lengths_B, 2)
    assert frames_B.tolist() == [any_teacher.num_frames(n) for n in lengths_B.tolist()]
    assert frames_B.tolist() == [12, 62, 30] and embeddings_BTD.shape == (3, 62, 32)
    for row, count in enumerate(frames_B.tolist()):
        torch.testing.assert_close(
            embeddings_BTD[row, :count], whole[row, :count], atol=1e-4, rtol=0
        )
    alone, _ = any_teacher.embed(waveforms_BL[1:2], lengths_B[1:2], 2)
    torch.testing.assert_close(alone[0], embeddings_BTD[1], atol=1e-4, rtol=0)
    assert any_teacher.model.base_model.feature_extractor.conv_layers[0].layer_norm is norm


@pytest.mark.parametrize("kind", ["hubert-base", "wavlm-base"])
def test_windows_of_a_group_norm_change_little(kind):
    """Of speech that gets louder, with attention over all of it."""
    teacher = HubertTeacher(new_model(kind), True).eval()
    waveforms_1L, lengths_1 = waveforms(200_000)
    waveforms_1L *= torch.linspace(0.2, 3, 200_000)
    whole_TD = teacher.embed(waveforms_1L, lengths_1, 2)[0][0]
    teacher.window_frames, teacher.margin_frames = 300, 50

    def apart():
        error = (teacher.embed(waveforms_1L, lengths_1, 2)[0][0] - whole_TD).square().sum()
        return error / (whole_TD - whole_TD.mean(0)).square().sum()

    assert 0 < apart() < 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubertTeacher, "_in_windows_of", Teacher._in_windows_of)
        assert apart() > 0.1


def test_windows_change_little(plain_cuts):
    teacher = load_teacher(ROOT / "egs/mini/teacher")
    speech_L = torch.cat([collate_audio([cut]).waveforms_BL[0] for cut in plain_cuts])
    speech_1L = speech_L.repeat(7)[None, : 80 * 16000]
    length_1 = torch.tensor([80 * 16000])
    in_windows_TD = teacher.embed(speech_1L, length_1, 5)[0][0]
    teacher.window_frames = 4000
    whole_TD = teacher.embed(speech_1L, length_1, 5)[0][0]
    assert len(in_windows_TD) == len(whole_TD) == 3999
    error = (in_windows_TD - whole_TD).square().sum()
    assert 0 < error < 0.01 * (whole_TD - whole_TD.mean(0)).square().sum()


def test_long_utterance_is_transcribed_in_windows(monkeypatch):
    """No window is longer than what is allowed, and their logits make up the whole."""
    teacher, heard = HubertTeacher(tiny_hubert(), True, list(SYMBOLS)).eval(), []
    for layer in teacher.model.base_model.encoder.layers:
        monkeypatch.setattr(layer, "attention", NoAttention())
    layer.register_forward_pre_hook(lambda _, args: heard.append(args[0].shape[1]))
    batch = waveforms(4000, 20000)
    whole = teacher.transcribe(*batch)
    monkeypatch.setattr(teacher, "window_frames", 30)
    monkeypatch.setattr(teacher, "margin_frames", 10)
    assert teacher.transcribe(*batch) == whole and all(whole)
    assert heard == [62, 12, 30, 30, 30, 30, 22]


class NoAttention(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        if "position_bias" in kwargs:  # WavLM hands it on
            return hidden_states, None, None
        return hidden_states, None


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
    with pytest.raises(RecipeError, match="an utterance: 399 samples are shorter than one frame"):
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


def test_what_tells_a_teacher_from_another_of_its_name(teacher, tmp_path):
    assert teacher.sha256() is None
    teacher.save(tmp_path)
    first = load_teacher(tmp_path).sha256()
    (tmp_path / "origin.json").write_text('{"command": "another"}')
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    assert len(first) == 64 and load_teacher(tmp_path).sha256() == first
    seen = [first]
    for change in (
        lambda: HubertTeacher(tiny_hubert(2), True, list(SYMBOLS)).save(tmp_path),
        lambda: HubertTeacher(tiny_hubert(2), False, list(SYMBOLS)).save(tmp_path),
        lambda: _set_config(layer_norm_eps=1e-3)(tmp_path),
    ):
        change()
        seen.append(load_teacher(tmp_path).sha256())
    assert len(set(seen)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_model_without_a_ctc_head(kind, tmp_path):
    model = new_model(kind)
    model.base_model.save_pretrained(tmp_path / "a")
    (tmp_path / "a/preprocessor_config.json").write_text('{"do_normalize": false}')
    teacher = HubertTeacher(model, False).eval()
    teacher.save(tmp_path / "b")
    expected, _ = teacher.embed(*waveforms(8000), 2)
    for folder in (tmp_path / "a", tmp_path / "b"):
        loaded = load_teacher(folder)
        assert loaded.vocabulary is None and not loaded.do_normalize
        torch.testing.assert_close(loaded.embed(*waveforms(8000), 2)[0], expected)
        with pytest.raises(RecipeError, match="has no CTC head"):
            loaded.transcribe(*waveforms(8000))


@pytest.mark.parametrize("kind", KINDS)
def test_folder_as_the_hub_has_it(kind, tmp_path):
    """Pickled weights with the old names of weight norm, and heads that are not used."""
    model = new_model(kind)
    conv = "encoder.pos_conv_embed.conv."
    old = {"parametrizations.weight.original0": "weight_g"}
    old["parametrizations.weight.original1"] = "weight_v"
    weights = {"quantizer.codevectors": torch.zeros(2)}
    for key, value in model.state_dict().items():
        for new_name, old_name in old.items():
            key = key.replace(conv + new_name, conv + old_name)
        weights[key] = value
    assert sum(key.endswith(("weight_g", "weight_v")) for key in weights) == 2
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model.config.pad_token_id = 28
    model.config.save_pretrained(tmp_path)
    symbols = [*SYMBOLS[1:], SYMBOLS[0]]  # the blank is where the config says
    table = {symbol: index for index, symbol in enumerate(symbols)}
    added = {"</s>": table.pop("Z"), "<pad>": table.pop("<pad>")}
    (tmp_path / "vocab.json").write_text(json.dumps(table))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    loaded = load_teacher(tmp_path)
    assert loaded.do_normalize and loaded.vocabulary == [*symbols[:27], "</s>", "<pad>"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[key], value)
    batch = waveforms(8000, 5000)
    with torch.no_grad():
        logits_BTV, lengths_B = loaded.ctc_logits(*batch)
        alone_1TV, _ = loaded.ctc_logits(batch[0][1:, :5000], batch[1][1:])
    torch.testing.assert_close(logits_BTV[1:, : lengths_B[1]], alone_1TV, atol=1e-4, rtol=0)
    for text, logits_TV in zip(loaded.transcribe(*batch), logits_BTV):
        best = logits_TV.argmax(-1).unique_consecutive().tolist()
        assert not {"<", "Z", ">"} & set(text) and len(text) <= len(best)


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


def _set_preprocessor(**values):
    def change(folder):
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _more_weights(*names):
    def change(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        save_file({**weights, **{name: torch.zeros(2) for name in names}}, path, {"format": "pt"})

    return change


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "no weights": (_no_weights, "cannot be loaded"),
    "truncated": (_truncated, "cannot be loaded"),
    "other sizes": (_set_config(intermediate_size=40), "cannot be loaded"),
    "more layers": (_set_config(num_hidden_layers=3), "weights lack"),
    "fewer layers": (_set_config(num_hidden_layers=1), "config.json has no place"),
    "no bias in the front end": (_set_config(conv_bias=False), "config.json has no place"),
    "other norm in the front end": (
        _set_config(feat_extract_norm="group"),
        "config.json has no place",
    ),
    "more in the projection": (
        _more_weights("hubert.feature_projection.more.bias"),
        "config.json has no place",
    ),
    "more at the positions": (
        _more_weights("encoder.pos_conv_embed.batch_norm.weight"),
        "config.json has no place",
    ),
    "another kind": (_set_config(model_type="bert"), "model_type bert is no teacher"),
    "no kind": (_set_config(model_type=None), "model_type None is no teacher"),
    "many languages": (
        lambda f: (f / "vocab.json").write_text('{"eng": {"a": 0}}'),
        "vocab.json: its 1 indexes",
    ),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), "vocab.json: no such file"),
    "broken vocabulary": (lambda f: (f / "vocab.json").write_text("["), "vocab.json: "),
    "other vocabulary": (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "vocab.json: "),
    "broken preprocessor": (
        lambda f: (f / "preprocessor_config.json").write_text(""),
        "preprocessor_config.json: ",
    ),
    "other sampling rate": (
        _set_preprocessor(sampling_rate=8000),
        "the teacher hears a sampling_rate of 8000, and audio has 16000 here; give another",
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


def test_folder_without_a_preprocessor_is_told_of(teacher, tmp_path, caplog):
    teacher.save(tmp_path)
    load_teacher(tmp_path)
    assert not caplog.records
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_teacher(tmp_path).do_normalize
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: has no preprocessor_config.json; each utterance is normalized to zero mean "
        'and unit variance, unless you put that file there with {"do_normalize": false}'
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_embeddings_do_not_need(kind, tmp_path):
    """Of heads, adapters and decoders, and of the mask, for which config.json has no place."""
    model = new_model(kind)
    teacher = HubertTeacher(model, False, list(SYMBOLS)).eval()
    teacher.save(tmp_path)
    prefix = model.base_model_prefix
    _more_weights(
        *("quantizer.codevectors", "project_hid.weight", "project_q.bias", "final_proj.weight"),
        *("projector.weight", "classifier.bias", "layer_weights", "objective.weight"),
        *("feature_extractor.weight", "feature_extractor.bias", "tdnn.0.kernel.weight"),
        *(f"{prefix}.adapter.layers.0.conv.weight", f"{prefix}.masked_spec_embed"),
        "decoder.layers.0.encoder_attn.k_proj.bias",
    )(tmp_path)
    loaded, batch = load_teacher(tmp_path), waveforms(8000)
    torch.testing.assert_close(loaded.embed(*batch, 2)[0], teacher.embed(*batch, 2)[0])


def test_empty_folder(tmp_path):
    with pytest.raises(RecipeError, match=r"config\.json: no such file"):
        load_teacher(tmp_path)


def test_transcribe_takes_out_repeats_and_blanks(teacher, monkeypatch):
    frames = ["|A_AB_B||CC|_", "__O_OH'", "_"]
    best_BT = torch.zeros(3, 13, dtype=torch.long)
    for row, text in zip(best_BT, frames):
        row[: len(text)] = torch.tensor([0 if s == "_" else SYMBOLS.index(s) for s in text])
    best_BT[1, 7:] = SYMBOLS.index("Z")  # past the end
    logits_BTV = F.one_hot(best_BT, len(SYMBOLS)).float()
    monkeypatch.setattr(teacher, "_logits", lambda *args: (logits_BTV, None))
    batch = waveforms(*(400 + 320 * (len(text) - 1) for text in frames))
    assert teacher.transcribe(*batch) == ["AABB C", "OOH'", ""]


def test_bad_utterances_of_a_sample_are_left_out_and_listed(plain_cuts, teacher, tmp_path):
    out, cuts = tmp_path / "embeddings.h5", list(plain_cuts)
    cuts[1] = cuts[1].truncate(duration=0.01, preserve_id=True)
    cuts = CutSet.from_cuts(cuts)
    with pytest.raises(RecipeError, match=r"\(1 of 7 utterances are bad, more than .* sample.yaml"):
        sample_embeddings(cuts, teacher, 2, out, SampleSettings(), CPU)
    assert list(tmp_path.iterdir()) == []
    sample_embeddings(cuts, teacher, 2, out, SampleSettings(max_bad_share=0.2), CPU)
    listed = (tmp_path / "bad-utterances.txt").read_text()
    assert listed.startswith(f"cut {cuts[1].id}: 160 samples are shorter than one frame of teacher")
    with open_sample(out) as (train, unseen, _):
        taken = [*train.utterances, *unseen.utterances]
    assert sorted(taken) == sorted(cut.id for cut in cuts if cut.id != cuts[1].id)


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
    with open_sample(out) as (train, unseen, facts):
        assert facts["teacher"] == "tiny" and unseen.frames.shape[0] in counts
        # A frame is told by its utterance and its place there, whichever batch it came in.
        texts = [train.describe(number) for number in range(len(train.frames))]
        utterance, place = texts[-1].removeprefix("utterance ").split(" frame ")
        (cut,) = (cut for cut in plain_cuts if cut.id == utterance)
        assert int(place) == teacher.num_frames(cut.num_samples) - 1
        embeddings_BTD, _ = teacher.embed(
            torch.from_numpy(cut.load_audio()), torch.tensor([cut.num_samples]), 2
        )
        torch.testing.assert_close(
            torch.from_numpy(train.frames[-1]), embeddings_BTD[0, -1], rtol=1e-3, atol=1e-4
        )
        assert len(set(texts)) == len(texts)
    out.write_bytes(out.read_bytes()[:3000])
    cut_short = pytest.raises(RecipeError, match=r"embeddings\.h5: damaged or cut short")
    with cut_short, open_sample(out):
        pass
    with h5py.File(out, "w") as file:
        file["train"] = [1.0]
    with pytest.raises(RecipeError, match="no teacher embeddings"), open_sample(out):
        pass
    with pytest.raises(RecipeError, match=r"sample\.num_utterances: .* fewer than 2"):
        sample_embeddings(plain_cuts, teacher, 2, out, SampleSettings(num_utterances=1), CPU)


def test_full_disk_within_a_sample_is_one_line(plain_cuts, teacher, tmp_path):
    teacher.save(tmp_path / "teacher")
    write_cuts(plain_cuts, tmp_path / "train.jsonl.gz")
    command = [sys.executable, str(ROOT / "local/sample_embeddings.py"), "--layer", "2"]
    command += ["--teacher", "teacher", "--train_manifest", "train.jsonl.gz"]
    command += ["--out", "sample/a.h5", "--device", "cpu", "--sample.max_duration", "10"]
    for limit in (3000, 100_000):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2),
        )
        lines = done.stderr.splitlines()
        assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d ", line)] == [
            f"{command[1]}: sample/a.h5: cannot be written (File too large); make room on that "
            "disk and start again: what is done is kept"
        ]
        assert done.returncode == 1 and list((tmp_path / "sample").iterdir()) == []


def test_a_frame_of_the_sample_that_is_not_finite_is_named(
    plain_cuts, teacher, tmp_path, monkeypatch
):
    layers, bad = type(teacher)._layers, list(plain_cuts)[2]

    def spoiled(self, waveforms_BL, lengths_B, *rest):
        found = [x_BTD.clone() for x_BTD in layers(self, waveforms_BL, lengths_B, *rest)]
        found[0][lengths_B == bad.num_samples, 4, 0] = float("nan")
        return found

    monkeypatch.setattr(type(teacher), "_layers", spoiled)
    with pytest.raises(RecipeError) as caught:
        sample_embeddings(plain_cuts, teacher, 1, tmp_path / "a.h5", SampleSettings(), CPU)
    assert f"layer 1 of tiny: 1 frames with NaN or infinity (cut {bad.id} frame 4)" in str(
        caught.value
    )
    assert not list(tmp_path.iterdir())
