"""Print the words of audio files with their times, by a trained student.

    python3 local/transcribe.py --exp_dir exp/NAME/STUDENT --tokens_dir data/NAME/tokens FILE...
    python3 local/transcribe.py --checkpoint pretrained.pt --tokens_dir data/lang_bpe_500 FILE...

What is wrong with a file is said in a line on stderr, and the others are still transcribed; the
exit status is then 1.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Literal, get_type_hints

from mvqkd import cli
from mvqkd.data.features import FeatureSettings, make_extractor
from mvqkd.data.tokens import load_tokens
from mvqkd.decoding.decode import DecodingSettings, check_vocabulary, load_student
from mvqkd.decoding.transcribe import FORMATS, SegmentSettings, transcribe
from mvqkd.device import pick_device
from mvqkd.errors import RecipeError
from mvqkd.files import read_json
from mvqkd.students.icefall import load_icefall

# Every key of decoding; None: as stage 7 decoded the student.
DecodingChanges = make_dataclass(
    "DecodingChanges",
    [(name, hint | None, None) for name, hint in get_type_hints(DecodingSettings).items()],
)


@dataclass
class Settings:
    """The student, and how to decode."""

    # Audio files that soundfile reads, of any sampling rate and length.
    files: list[Path] = field(metadata={"positional": True})
    tokens_dir: Path = field(kw_only=True)
    # Either a student of this recipe, or icefall's pretrained.pt or epoch-N.pt.
    exp_dir: Path | None = None
    checkpoint: Path | None = None
    # Whether that one is a streaming student, where the file does not say.
    causal: bool | None = None
    # Words under the file's text, CTM, or a JSON document a line.
    format: Literal["text", "ctm", "json"] = "text"
    device: str = "auto"
    decoding: DecodingChanges = field(default_factory=DecodingChanges)
    segment: SegmentSettings = field(default_factory=SegmentSettings)


def decoding_of(exp_dir: Path) -> DecodingSettings:
    """As the student was decoded last, or the defaults."""
    path = exp_dir / "decoded.json"
    if not path.exists():
        return DecodingSettings()
    try:
        return DecodingSettings(**json.loads(path.read_text())["decoding"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path}: cannot be read as decoding settings; remove it, then run stage 7"
        ) from error


def main(settings: Settings) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    device = pick_device(settings.device)
    tokens = load_tokens(settings.tokens_dir)
    changes = {key: value for key, value in vars(settings.decoding).items() if value is not None}
    student: dict = {}
    if settings.checkpoint is not None:
        decoding = DecodingSettings(**changes)
        model, _ = load_icefall(settings.checkpoint, decoding.avg, settings.causal)
    elif settings.exp_dir is not None:
        decoding = replace(decoding_of(settings.exp_dir), **changes)
        model, _ = load_student(settings.exp_dir, decoding)
        student = read_json(settings.exp_dir / "settings.json", "run stage 6")
    else:
        raise RecipeError("--exp_dir: not given; name a student's folder, or a --checkpoint")
    check_vocabulary(model, tokens, settings.tokens_dir)
    model.to(device)
    num_bins = model.encoder.settings.num_features
    # As its features were computed.
    extractor = make_extractor(FeatureSettings(student.get("extractor", "fbank"), num_bins))
    length = settings.segment.length or student.get("longest_utterances") or 20
    failed = False
    for path in settings.files:
        try:
            transcript = transcribe(path, model, tokens, extractor, decoding, length, device)
        except RecipeError as error:
            print(f"{sys.argv[0]}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        lines = FORMATS[settings.format](path, transcript)
        if lines:
            print(lines, flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Settings)
