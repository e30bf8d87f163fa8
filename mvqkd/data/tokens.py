"""Word pieces of the transcripts, by sentencepiece."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece
from lhotse import CutSet

from mvqkd.errors import RecipeError
from mvqkd.files import require, written_aside


@dataclass
class TokenSettings:
    """The vocabulary; blank, sos/eos and unk are its first three, as in icefall."""

    vocab_size: int = 500
    model_type: Literal["unigram", "bpe"] = "unigram"


def train_tokens(cuts: CutSet, folder: Path, settings: TokenSettings) -> None:
    """Write ``folder/bpe.model`` and ``folder/tokens.txt``.

    A corpus of few words may yield fewer pieces than asked for.
    """
    texts = [s.text for cut in cuts for s in cut.supervisions]
    with written_aside(folder) as aside:
        aside.mkdir()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_prefix=str(aside / "bpe"),
                vocab_size=settings.vocab_size,
                model_type=settings.model_type,
                hard_vocab_limit=False,
                character_coverage=1.0,
                user_defined_symbols=["<blk>", "<sos/eos>"],
                unk_id=2,
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2]  # before it: a place in C++
            raise RecipeError(
                f"tokens.vocab_size: {settings.vocab_size} does not suit these transcripts "
                f"({reason}); change it"
            ) from error
        model = load_tokens(aside)
        table = "".join(f"{model.id_to_piece(i)} {i}\n" for i in range(len(model)))
        (aside / "tokens.txt").write_text(table)


def load_tokens(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """
    Raises:
      RecipeError: there is no model, or it cannot be read.
    """
    # run.sh looks at no more than whether the folder is there.
    remedy = f"remove {folder}, then run stage 0" if folder.exists() else "run stage 0"
    path = require(folder / "bpe.model", remedy)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"{path}: is no sentencepiece model; {remedy}") from error
