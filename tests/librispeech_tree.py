"""A small tree of LibriSpeech's shape, and a rehearsal of its recipe with models of full size.

    python3 -m tests.librispeech_tree FOLDER [CHAPTER]

makes in FOLDER a minute and a half of speech for train-clean-100 and some seconds for every other
part (CHAPTER, a folder of real speech as LibriSpeech has it, goes into dev-clean), noise as musan
has it, a HuBERT X-Large with random weights, and confs that shorten the run. It prints the call of
run.sh that goes through all stages with them: models, layers, codebooks, losses, decoding and their
sizes are the published ones, but for the word pieces, of which so little text gives 100.
"""

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from transformers import HubertConfig, HubertForCTC

from benchmarks.dumping import SIZES
from egs.mini.make_corpus import PartSettings, Settings, main
from mvqkd.data.synthesis import GrammarSettings
from mvqkd.teachers.ctc import SYMBOLS
from mvqkd.teachers.hubert import HubertTeacher

ROOT = Path(__file__).parents[1]
# What shortens a run with models of the published size.
SHORT = {
    "tokens": {"tokens": {"vocab_size": 100}},
    "sample": {"sample": {"num_utterances": 12, "num_unseen": 3}},
    "quantizer": {"quantizer": {"trainer": "lsq", "lsq_frames": 2000, "lsq_iters": 2}},
    "training": {
        "data": {"max_duration": 60},
        "training": {"num_epochs": 2, "warmup_steps": 2, "average_period": 1},
    },
    "decoding": {"decoding": {"avg": 1}, "more": [{"epoch": 1, "avg": 1}]},
}


def make_tree(folder: Path, minutes: float, full_grammar: bool) -> None:
    """``folder/copy/LibriSpeech`` with all parts, that many minutes of train-clean-100; and
    ``folder/musan``."""
    parts = {
        "train-clean-100": PartSettings("train", ["f1", "m1"], 2, minutes),
        "train-clean-360": PartSettings("train", ["m6"], 1, 0.08),
        "train-other-500": PartSettings("train", ["klatt"], 1, 0.08, adverse=True),
        "dev-clean": PartSettings("dev", ["f4"], 1, 0.08),
        "dev-other": PartSettings("dev", ["klatt5"], 1, 0.08, adverse=True),
        "test-clean": PartSettings("test", ["f2"], 1, 0.08),
        "test-other": PartSettings("test", ["klatt3"], 1, 0.08, adverse=True),
    }
    names = ["corpus.yaml"] if full_grammar else ["corpus.yaml", "smoke/corpus.yaml"]
    confs = [yaml.safe_load((ROOT / "egs/mini/conf" / name).read_text()) for name in names]
    grammar = GrammarSettings(**{k: v for conf in confs for k, v in conf["grammar"].items()})
    tree = folder / "copy/LibriSpeech"
    main(Settings(tree, grammar, confs[0]["accents"], parts, num_workers=1))
    rng = np.random.default_rng(1)
    for name in ("music/fma/music-0000", "noise/free-sound/noise-0000"):
        path = folder / f"musan/{name}.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, 0.1 * rng.standard_normal(12 * 16000), 16000)


def write_confs(folder: Path, confs: dict[str, dict]) -> None:
    folder.mkdir()
    for name, values in confs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


def rehearsal(folder: Path, chapter: Path | None) -> list[str]:
    """All that is needed in ``folder``; the call."""
    make_tree(folder, minutes=1.5, full_grammar=True)
    if chapter is not None:
        part = folder / "copy/LibriSpeech/dev-clean"
        shutil.copytree(chapter, part / chapter.parent.name / chapter.name)
    write_confs(folder / "short", SHORT)
    torch.manual_seed(1)
    config = HubertConfig(**SIZES["xlarge"], num_hidden_layers=48, vocab_size=len(SYMBOLS))
    HubertTeacher(HubertForCTC(config), True, list(SYMBOLS), "random").save(folder / "teacher")
    options = {
        "corpus": "librispeech-100",
        "dl-dir": folder / "copy",
        "teacher-dir": folder / "teacher",
        "noise-dir": folder / "musan",
        "overlay": folder / "short",
        "decoding": "left64-chunk16-right9",
        "decode-dev": "true",
        "device": "cpu",
    }
    return ["./run.sh", *(word for name, value in options.items() for word in (f"--{name}", value))]


if __name__ == "__main__":
    chapters = [Path(argument).resolve() for argument in sys.argv[2:]]
    call = rehearsal(Path(sys.argv[1]).resolve(), chapters[0] if chapters else None)
    print(shlex.join(map(str, call)))
