"""What several test files use: a tiny corpus, its cuts, a tiny teacher and quantizer."""

from pathlib import Path

import pytest
import torch
import yaml
from lhotse import CutSet
from transformers import HubertForCTC

from egs.mini.make_corpus import PartSettings, Settings, main
from mvqkd.data.features import FeatureSettings, compute_features
from mvqkd.data.labels import CodebookIndexes, Dumper, LabelSettings, Origin, dump_labels
from mvqkd.data.manifests import CheckSettings, prepare_part
from mvqkd.data.synthesis import GrammarSettings
from mvqkd.quantizer import Quantizer
from mvqkd.teachers.ctc import SYMBOLS
from mvqkd.teachers.hubert import HubertTeacher

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def mini_settings(out_dir, seed=1, num_workers=1, seconds=8):
    """The embedded corpus with four voices."""
    conf = yaml.safe_load((ROOT / "egs/mini/conf/corpus.yaml").read_text())
    parts = {
        "train-clean-100": PartSettings("train", ["f1", "m1"], 2, 2 * seconds / 60),
        "dev-clean": PartSettings("dev", ["f4"], 1, seconds / 120),
        "test-other": PartSettings("test", ["m3"], 1, seconds / 60, adverse=True),
    }
    grammar = GrammarSettings(**conf["grammar"])
    return Settings(out_dir, grammar, conf["accents"], parts, seed, num_workers)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A tree in LibriSpeech's layout; not to be changed."""
    folder = tmp_path_factory.mktemp("mini") / "corpus"
    main(mini_settings(folder))
    return folder


@pytest.fixture(scope="session")
def plain_cuts(corpus):
    """Cuts of the training part."""
    return prepare_part(
        corpus, "train-clean-100", corpus.parent / "manifests/train.jsonl.gz", CheckSettings()
    )


@pytest.fixture(scope="session")
def feature_cuts(corpus, plain_cuts):
    """With features, at three speeds."""
    out = corpus.parent / "features/train.jsonl.gz"
    cuts = CutSet.from_cuts(list(plain_cuts)[:4])
    return compute_features(cuts, out, True, FeatureSettings(shard_size=5), num_workers=1)


def tiny_hubert(seed=1, model_class=HubertForCTC, **config):
    """A HuBERT, or one of its kin, of two layers with random weights and HuBERT's frames."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(SYMBOLS),
        "pad_token_id": 0,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": [24, 24, 24],
        "conv_kernel": [240, 1, 2],
        "conv_stride": [160, 1, 2],
        "conv_bias": True,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "mask_time_prob": 0.0,
        **config,
    }
    return model_class(model_class.config_class(**settings)).eval()


@pytest.fixture(scope="session")
def teacher():
    return HubertTeacher(tiny_hubert(), True, list(SYMBOLS), "tiny").eval()


@pytest.fixture(scope="session")
def quantizer():
    quantizer = Quantizer(32, 256, 4, generator=torch.Generator().manual_seed(1))
    quantizer.set_id_from_weights()
    return quantizer.eval()


@pytest.fixture(scope="session")
def origin(quantizer):
    return Origin("tiny", 2, quantizer.get_id(), quantizer.weights_sha256())


@pytest.fixture(scope="session")
def labelled_cuts(corpus, feature_cuts, teacher, quantizer, origin):
    """With features and codebook indexes; not to be changed."""
    kinds = [CodebookIndexes(teacher, quantizer, origin, refine_iters=1)]
    dumper = Dumper(kinds, LabelSettings(), CPU)
    return dump_labels(feature_cuts, corpus.parent / "labels/train.jsonl.gz", dumper, 5)
