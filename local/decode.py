"""Decode the test sets with one student, and write icefall's result files.

    python3 local/decode.py --checkpoint epoch-30.pt --tokens_dir data/lang_bpe_500 \
        --exp_dir FOLDER --test_manifests '[FILE]'

is for a student that icefall has trained; FOLDER is for the results.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from mvqkd import cli
from mvqkd.data.datamodule import DataSettings, StudentData
from mvqkd.data.manifests import read_cuts
from mvqkd.data.tokens import load_tokens
from mvqkd.decoding.decode import (
    Decoded,
    DecodingSettings,
    check_vocabulary,
    decode,
    load_student,
)
from mvqkd.decoding.scoring import save_results
from mvqkd.device import pick_device
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.students.icefall import load_icefall


@dataclass
class Weights:
    """The mean over the last ``avg`` epochs up to ``epoch``."""

    epoch: int
    avg: int


@dataclass
class Settings:
    """The decoding conf, and where things are."""

    # The student's, where the results go too.
    exp_dir: Path
    test_manifests: list[Path]
    tokens_dir: Path
    # Another student: icefall's pretrained.pt or epoch-N.pt. tokens_dir is its lang_bpe_500.
    checkpoint: Path | None = None
    # Whether that one is a streaming student, where the file does not say.
    causal: bool | None = None
    device: str = "auto"
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    # Other weights of the student, that are decoded as well.
    more: list[Weights] = field(default_factory=list)


def tokens_of(decoded: Decoded) -> dict[str, dict[str, Any]]:
    """By cut id the tokens of the hypothesis, with a space between two, the seconds at which each
    was emitted and, of a streaming student, its delay."""
    entries: dict[str, dict[str, Any]] = {}
    for name, tokens in decoded.tokens.items():
        text = " ".join(token.text for token in tokens)
        entries[name] = {"text": text, "times": [token.time for token in tokens]}
        if name in decoded.delays:
            entries[name]["delays"] = decoded.delays[name]
    return entries


def decode_weights(
    settings: Settings, decoding: DecodingSettings, tokens: SentencePieceProcessor, device
) -> dict[str, Any]:
    """What the report is made from, of the weights that ``decoding`` names."""
    epoch: int | str
    if settings.checkpoint is None:
        model, epoch = load_student(settings.exp_dir, decoding)
    else:
        model, epoch = load_icefall(settings.checkpoint, decoding.avg, settings.causal)
    check_vocabulary(model, tokens, settings.tokens_dir)
    streaming = model.encoder.settings.causal
    name = decoding.name(epoch, streaming)
    out_dir = settings.exp_dir / decoding.method
    data_settings = DataSettings(max_duration=decoding.max_duration)
    document: dict[str, Any] = {
        "setting": name,
        "decoding": asdict(decoding),
        "streaming": streaming,
        "epoch": epoch,
        "num_params": sum(p.numel() for p in model.parameters()),
        "test_sets": {},
    }
    for path in settings.test_manifests:
        part = path.name.split(".")[0]
        data = StudentData(read_cuts(path), tokens, data_settings, seed=0)
        decoded = decode(model, data, tokens, decoding, device)
        counts = save_results(out_dir, part, name, decoded.results)
        logging.info(counts.line(f"{part}-{name}"))
        entry = document["test_sets"][part] = {
            "rtf": decoded.rtf,
            "results": decoded.results,
            "times": decoded.times,
            "tokens": tokens_of(decoded),
        }
        if decoded.emission_delay is not None:
            delay = decoded.emission_delay
            entry["emission_delay"] = delay.as_dict()
            logging.info(
                f"{part}-{name}: tokens come {delay.mean:.3f} s later than with the whole "
                f"utterance in view (nine of ten less than {delay.p90:.3f} s), {delay.shown:.3f} s "
                f"with the wait for the chunk"
            )
    return document


def main(settings: Settings) -> None:
    if settings.more and settings.checkpoint is not None:
        raise RecipeError("more: is of epochs of this recipe's students; leave out --checkpoint")
    device = pick_device(settings.device)
    tokens = load_tokens(settings.tokens_dir)
    document = decode_weights(settings, settings.decoding, tokens, device)
    for weights in settings.more:
        decoding = replace(settings.decoding, epoch=weights.epoch, avg=weights.avg)
        more = decode_weights(settings, decoding, tokens, device)
        document.setdefault("more", []).append(more)
    with written_aside(settings.exp_dir / "decoded.json") as aside:
        aside.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    cli.run(main, Settings)
