"""Whisper's encoder: embeddings, their independence of the batch, files."""

import json

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from mvqkd.errors import RecipeError
from mvqkd.teachers import load_teacher
from tests.teachers.batches import check_independence, waveforms


@pytest.fixture(scope="module")
def model():
    """Random weights; it hears one second."""
    torch.manual_seed(1)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        num_mel_bins=20,
        max_source_positions=50,
        vocab_size=60,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
        decoder_start_token_id=2,
    )
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def extractor():
    return WhisperFeatureExtractor(feature_size=20, chunk_length=1)


@pytest.fixture
def folder(model, extractor, tmp_path):
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def teacher(folder):
    return load_teacher(folder)


def test_layers_are_those_of_transformers(teacher, model, extractor):
    waveforms_1L, lengths_1 = waveforms(9000)
    mels = extractor(waveforms_1L[0].numpy(), sampling_rate=16000, return_tensors="pt")
    encoder = model.get_encoder()
    with torch.no_grad():
        expected = encoder(mels["input_features"], output_hidden_states=True)
    first_1TD, _ = teacher.embed(waveforms_1L, lengths_1, 1)
    torch.testing.assert_close(first_1TD, expected.hidden_states[1][:, :28], atol=1e-5, rtol=0)
    last_1TD, frames_1 = teacher.embed(waveforms_1L, lengths_1, 2)
    # Taken before the final layer norm.
    with torch.no_grad():
        last_1TD = encoder.layer_norm(last_1TD)
    torch.testing.assert_close(last_1TD, expected.last_hidden_state[:, :28], atol=1e-5, rtol=0)
    assert frames_1.tolist() == [28] and (teacher.dim, teacher.num_layers) == (16, 2)
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert [path.name for path in teacher.files] == names


def test_layers_above_are_not_run_and_half_precision_is_close(teacher):
    run, heard = [], []
    for number, layer in enumerate(teacher.encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    teacher.encoder.conv1.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    whole_1TD, _ = teacher.embed(*waveforms(9000), 1)
    half_1TD, _ = teacher.embed(*waveforms(9000), 1, torch.bfloat16)
    assert run == [1, 1] and half_1TD.dtype == torch.float32
    assert torch.equal(heard[0], heard[1])  # the spectrum is of float32
    error = (half_1TD - whole_1TD).square().sum()
    assert 0 < error < 1e-3 * (whole_1TD - whole_1TD.mean(1)).square().sum()


def test_embedding_does_not_depend_on_the_batch(teacher):
    check_independence(teacher, 9000, 400, 16000, 5123)


def test_more_than_it_hears_goes_through_in_windows(teacher):
    check_independence(teacher, 9000, 400, 16001, 51234)
    check_independence(teacher, 9000, 400, 16320, 16000)
    waveforms_1L, lengths_1 = waveforms(51234)
    embeddings_1TD, frames_1 = teacher.embed(waveforms_1L, lengths_1, 2)
    assert embeddings_1TD.shape == (1, 160, 16) and frames_1.tolist() == [160]
    # The second window begins 34 frames after the first; of each, 8 at an end are the other's.
    second_1TD, _ = teacher.embed(waveforms_1L[:, 34 * 320 :][:, :16000], torch.tensor([16000]), 2)
    torch.testing.assert_close(embeddings_1TD[0, 42:76], second_1TD[0, 8:42], atol=1e-4, rtol=0)


def test_number_and_place_of_frames(teacher):
    assert (teacher.frame_shift, teacher.frame_offset) == (0.02, 0.0)
    for num_samples, frames in ((319, 0), (320, 1), (639, 1), (640, 2), (16000, 50)):
        assert teacher.num_frames(num_samples) == frames
    with pytest.raises(RecipeError, match="an utterance: 319 samples are shorter than one frame"):
        teacher.embed(*waveforms(8000, 319), 1)
    # What happens at a sample changes the frames around the one that is centred there.
    waveforms_1L, lengths_1 = waveforms(16000)
    frames = []
    handle = teacher.encoder.conv2.register_forward_hook(lambda *a: frames.append(a[2][0].T))
    for place in (None, 8000, 12800):
        changed_1L = waveforms_1L.clone()
        if place is not None:
            changed_1L[0, place] += 0.05
        teacher.embed(changed_1L, lengths_1, 1)
    handle.remove()
    for place, changed_TD in zip((8000, 12800), frames[1:]):
        heard_T = ((changed_TD - frames[0]).abs() > 1e-5).any(-1).nonzero().float()
        centre = heard_T.mean() * teacher.frame_shift + teacher.frame_offset
        assert centre == pytest.approx(place / 16000)


def test_no_transcripts(teacher):
    with pytest.raises(RecipeError, match="has no CTC head"):
        teacher.transcribe(*waveforms(8000))


def test_encoder_alone(model, extractor, teacher, tmp_path):
    folder = tmp_path / "encoder"
    model.get_encoder().save_pretrained(folder)
    extractor.save_pretrained(folder)
    alone = load_teacher(folder)
    for key, value in teacher.state_dict().items():
        assert torch.equal(alone.state_dict()[key], value)


def _set(file, **values):
    def change(folder):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


DAMAGES = {
    "more layers": (_set("config.json", encoder_layers=3), "weights lack layers.2."),
    "fewer layers": (_set("config.json", encoder_layers=1), "config.json has no place"),
    "other sizes": (_set("config.json", encoder_ffn_dim=32), "cannot be loaded"),
    "other bins": (_set("preprocessor_config.json", feature_size=80), "80 mel bins"),
    "other length": (_set("preprocessor_config.json", chunk_length=30), "480000 samples"),
    "no bins": (lambda f: (f / "preprocessor_config.json").unlink(), "no such file"),
    "broken bins": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json: cannot be read",
    ),
}


@pytest.mark.parametrize("damage, cause", DAMAGES.values(), ids=DAMAGES.keys())
def test_folder_that_cannot_be_loaded(folder, damage, cause):
    damage(folder)
    with pytest.raises(RecipeError) as caught:
        load_teacher(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and cause in message and "\n" not in message
