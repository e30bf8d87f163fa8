"""What run.sh would run for LibriSpeech is what was published: settings, sizes, parts.

Settings: icefall, ``egs/librispeech/ASR/pruned_transducer_stateless6`` and RESULTS-100hours.md, and
k2-fsa's article on distillation with MVQ, 2022-07.
"""

import importlib
import itertools
import shlex
from dataclasses import replace

import pytest
import torch

from mvqkd import cli
from mvqkd.losses.distillation import Codebooks, Pairing, Term
from mvqkd.students.task import SIMPLE_LOSS_SCALE, pruned_loss_scale
from mvqkd.students.transducer import build_transducer
from tests.recipe_copy import copy_checkout, run_sh


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("published") / "recipe")


def planned(recipe, *options):
    """What ``--dry-run true`` prints: by step, the settings that its command would get."""
    done = run_sh(recipe, *options, "--dry-run", "true")
    assert done.returncode == 0, done.stderr
    settings, lines = {}, done.stdout.splitlines()
    for about, command in itertools.pairwise(lines):
        if about.startswith("# ") and command.startswith("python3 "):
            _, script, *words = shlex.split(command)
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            step = about.removeprefix("# ").partition(":")[0]
            settings[step], _ = cli.parse(module.Settings, words)
    assert not (recipe / "data").exists() and not (recipe / "exp").exists()
    return settings


@pytest.fixture(scope="module", params=["librispeech-100", "librispeech-960"])
def corpus(request):
    return request.param


@pytest.fixture(scope="module")
def plan(recipe, corpus):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(recipe)  # confs are named from there
        return planned(recipe, "--corpus", corpus, "--decoding", "left64-chunk16-right9")


def values(settings, *names):
    return tuple(getattr(settings, name) for name in names)


def test_parts_of_the_corpus(plan, corpus):
    train = ["train-clean-100", "train-clean-360", "train-other-500"]
    train = train if corpus == "librispeech-960" else train[:1]
    dev, test = ["dev-clean", "dev-other"], ["test-clean", "test-other"]
    assert plan["corpus"].parts == plan["manifests"].parts == [*train, *dev, *test]
    assert values(plan["features"], "train_parts", "test_parts") == (train, [*dev, *test])
    named = [path.name.split(".")[0] for path in plan["decode-mvq"].test_manifests]
    assert named == [path.name.split(".")[0] for path in plan["verify-teacher"].test_manifests]
    assert named == test
    assert [path.name.split(".")[0] for path in plan["student-mvq"].dev_manifests] == dev


def test_features_and_tokens(plan):
    features = values(plan["features"].features, "num_mel_bins", "speed_factors")
    assert features == (80, [0.9, 1.1])
    assert plan["noise"].features == plan["features"].features
    assert plan["noise"].dl_dir is None  # MUSAN is downloaded
    # icefall's "BPE 500" is a unigram model too.
    assert values(plan["tokens"].tokens, "vocab_size", "model_type") == (500, "unigram")


def test_teacher_and_codebooks(plan):
    assert plan["teacher"].teacher == "facebook/hubert-xlarge-ls960-ft"
    sample = plan["embeddings-mvq"]
    assert (sample.layer, sample.sample.num_utterances) == (36, 1000)
    assert values(plan["quantizer-mvq"].quantizer, "num_codebooks", "codebook_size") == (8, 256)
    names = ("trainer", "phase_one_iters", "phase_two_iters", "batch_size")
    assert values(plan["quantizer-mvq"].quantizer, *names) == ("paper", 10000, 10000, 512)
    assert plan["labels-mvq"].labels.refine_iters == 5


@pytest.mark.parametrize("student", ["none", "mvq", "streaming-none", "streaming-mvq"])
def test_training_of_a_student(plan, student):
    settings = plan[f"student-{student}"]
    names = ("prune_range", "lm_scale", "am_scale", "context_size", "decoder_dim", "joiner_dim")
    assert values(settings.model, *names) == (5, 0.25, 0.0, 2, 512, 512)
    names = ("num_encoder_layers", "d_model", "nhead", "dim_feedforward", "cnn_module_kernel")
    assert values(settings.model.encoder, *names) == (12, 512, 8, 2048, 31)
    assert values(settings.model.encoder, "dropout", "layer_dropout") == (0.1, 0.075)
    streams = student.startswith("streaming")
    names = ("causal", "dynamic_chunk_training", "short_chunk_threshold", "short_chunk_size")
    assert values(settings.model.encoder, *names) == (streams, streams, 0.75, 25)
    assert settings.model.encoder.num_left_chunks == (4 if streams else -1)
    names = ("optimizer", "lr", "lr_batches", "lr_epochs", "warmup_steps", "seed")
    assert values(settings.training, *names) == ("eve", 0.003, 5000, 6, 3000, 42)
    assert values(settings.training, "average_period", "accumulate") == (100, 1)
    # The one difference: published in float32, which a GPU multiplies at a fraction of bf16's rate.
    assert settings.training.precision == "auto"
    assert values(settings.data, "max_duration", "min_seconds", "max_seconds") == (300, 1, 20)
    assert settings.data.noise.manifest.name == "noise.jsonl.gz"
    assert values(settings.data.noise, "p", "snr") == (0.5, (10, 20))
    assert settings.data.spec_augment.time_warp_factor == 0
    names = ("num_frame_masks", "frames_mask_size", "num_feature_masks", "features_mask_size")
    assert values(settings.data.spec_augment, *names) == (10, 100, 2, 27)
    kind = "mvq" if student.endswith("mvq") else "none"
    assert settings.distillation.kind == kind
    if kind == "mvq":
        assert values(settings.distillation, "scale", "layer", "pairing_shift") == (0.1, 6, 0)
        assert not settings.distillation.more


def test_epochs_of_the_published_rows(plan, corpus):
    """Each is decoded, and what it averages over is kept."""
    training, decoding = plan["student-mvq"].training, plan["decode-mvq"]
    rows = [(row.epoch, row.avg) for row in decoding.more]
    rows.append((training.num_epochs, decoding.decoding.avg))
    wanted = [20, 30, 40, 50] if corpus == "librispeech-100" else [30]
    assert rows == [(epoch, 10) for epoch in wanted]
    last, every = training.num_epochs, training.keep_every_epochs
    kept = {*range(last - training.keep_epochs + 1, last + 1)}
    kept |= {*range(every, last, every)} if every else set()
    assert {end for epoch in wanted for end in (epoch, epoch - 10)} <= kept
    assert len(kept) == (14 if corpus == "librispeech-100" else 11)


def test_decoding(plan):
    names = ("method", "beam", "avg", "epoch", "left_context", "chunk_size", "right_context")
    for student in ("none", "mvq", "streaming-none", "streaming-mvq"):
        found = values(plan[f"decode-{student}"].decoding, *names)
        assert found == ("modified_beam_search", 4, 10, 0, 64, 16, 9)


def test_error_rates_in_the_report(plan, corpus):
    rows = [
        (row.distillation, row.streaming, row.decoding, *row.wer.values())
        for row in plan["report"].paper
    ]
    assert all(list(row.wer) == ["test-clean", "test-other"] for row in plan["report"].paper)
    if corpus == "librispeech-100":
        decoding = "modified_beam_search-beam_size_4-epoch-30-avg-10"
        assert ("none", False, decoding, 6.83, 18.19) in rows
        assert ("mvq", False, decoding, 5.52, 15.15) in rows
        assert len(rows) == 8
    else:
        assert rows == [
            ("none", False, "-epoch-30-", 2.63, 6.19),
            ("mvq", False, "-epoch-30-", 2.30, 5.57),
            ("none", True, "chunk-16-left-64-right-9", 3.13, 8.06),
            ("mvq", True, "chunk-16-left-64-right-9", 2.93, 7.43),
        ]


def test_noise_is_of_a_folder_or_left_out(recipe, monkeypatch):
    monkeypatch.chdir(recipe)
    call = ("--corpus", "librispeech-100", "--students", "none", "--noise-dir")
    plan = planned(recipe, *call, "mine")
    assert plan["noise"].dl_dir == recipe / "mine"
    assert plan["student-none"].data.noise.manifest == plan["noise"].out_dir / "noise.jsonl.gz"
    plan = planned(recipe, *call, "none")
    assert "noise" not in plan and plan["student-none"].data.noise.manifest is None


def test_scales_of_the_two_losses():
    assert SIMPLE_LOSS_SCALE == 0.5
    steps = (0, 2999, 3000, 3001, 5999, 6000, 9000)
    scales = [pruned_loss_scale(step / 3000) for step in steps]
    assert scales == [0, 0, 1, 0.1, 0.1, 1, 1]


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("student", ["mvq", "streaming-mvq"])
def test_sizes_of_the_students(plan, student):
    settings = plan[f"student-{student}"]
    vocab_size = plan["tokens"].tokens.vocab_size
    with torch.device("meta"):
        model = build_transducer(replace(settings.model, vocab_size=vocab_size))
    # "About 80 M" in icefall's pull request 330; its 1093 has 77.36 M of what is run every frame.
    assert size(model) == 78_648_040
    assert round((size(model.encoder) + size(model.joiner.encoder_proj)) / 1e6, 2) == 77.36
    pairing = Pairing(model.encoder.frame_shift, model.encoder.frame_offset, 0.02, 0.0125)
    assert pairing.group_size == 2
    (term,) = settings.distillation.terms()
    # 8 codebooks of 2 frames: 16 predictions of 256 entries.
    assert size(Term(term, 512, pairing, Codebooks(8, 256)).head) == 16 * 256 * (512 + 1)


@pytest.mark.parametrize(
    ("d_model", "nhead", "dim_feedforward", "published"),
    [(512, 8, 2048, 118_129_516), (256, 4, 1024, 30_896_748)],
)
def test_sizes_of_other_published_ones(plan, d_model, nhead, dim_feedforward, published):
    settings = plan["student-none"].model
    sizes = {"d_model": d_model, "nhead": nhead, "dim_feedforward": dim_feedforward}
    encoder = replace(settings.encoder, num_encoder_layers=18, **sizes)
    with torch.device("meta"):
        ours = size(build_transducer(replace(settings, encoder=encoder, vocab_size=500)))
    # icefall's pull request 330 to the last one, but for the 6 linear layers that combine what the
    # layers of those give, which the distilled one does without.
    assert ours + 6 * d_model * (d_model + 1) == published


def test_teacher_of_ones_own_is_pretrained_and_tuned_as_hubert_base(recipe, corpus, monkeypatch):
    monkeypatch.chdir(recipe)
    options = ["--corpus", corpus, "--train-teacher", "true", "--stop-stage", "2"]
    plan = planned(recipe, *options, "--pretrain-teacher", "true")
    steps = ["teacher-pretrained-first", "teacher-pretrained", "teacher", "verify-teacher"]
    assert list(plan)[-4:] == steps
    ctc = plan["teacher"]
    assert ctc.init == str(plan["teacher-pretrained"].out_dir)
    assert values(ctc, "max_duration", "cache_audio", "mask_inputs") == (200, False, True)
    assert values(ctc.training, "num_epochs", "lr", "warm_share") == (350, 3e-5, 0.1)
    assert ctc.symbols is None and ctc.speed_factors == [1.0]
    # From random weights with a larger rate.
    first, tuned = (planned(recipe, *options)[name] for name in ("teacher-first", "teacher"))
    assert tuned.init == str(first.out_dir) and first.init is None
    assert tuned.training.lr < first.training.lr and tuned.training.lr == ctc.training.lr
