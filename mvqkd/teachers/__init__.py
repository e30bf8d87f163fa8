"""Teachers: models that turn speech into one embedding a frame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvqkd.errors import RecipeError
from mvqkd.files import read_json, require

if TYPE_CHECKING:  # transformers takes seconds to import
    from mvqkd.teachers.base import Teacher

# Beside a teacher's weights: how it was made.
ORIGIN = "origin.json"


def load_teacher(name_or_path: str | Path, revision: str | None = None) -> Teacher:
    """The teacher in a local folder (transformers' layout) or file (fairseq's checkpoint of a
    HuBERT), or by its name on the hub, there at ``revision``.

    Returns an object with ``dim``, ``num_layers``, ``frame_shift``, ``frame_offset``,
    ``num_frames(num_samples)``, ``embed(waveforms_BL, lengths_B, layer) -> (embeddings_BTD,
    lengths_B)``, and ``vocabulary`` and ``transcribe`` where it has a CTC head. Layers are counted
    from 1.

    Raises:
      RecipeError: there is no such folder or name, or it cannot be loaded.
    """
    from mvqkd.teachers.fairseq import load_fairseq
    from mvqkd.teachers.hubert import FAMILIES, load_hubert
    from mvqkd.teachers.whisper import load_whisper

    path, name = find_teacher(name_or_path, revision), str(name_or_path)
    if path.is_file():
        teacher = load_fairseq(path, name)
        teacher.files = [path]
        return teacher
    # A copy is called as what it is of.
    origin = read_origin(path)
    name = "@".join(str(origin[k]) for k in ("teacher", "revision") if k in origin) or name
    config_path = require(path / "config.json", "give a folder in transformers' layout")
    family = read_json(config_path, "fetch it again").get("model_type")
    if family not in (*FAMILIES, "whisper"):
        known = ", ".join([*FAMILIES, "whisper"])
        raise RecipeError(
            f"{config_path}: model_type {family} is no teacher that is known here; give one of "
            f"{known}"
        )
    whisper = family == "whisper"
    teacher = load_whisper(path, name) if whisper else load_hubert(path, family, name)
    teacher.files = files_of(path)
    return teacher


def files_of(folder: Path) -> list[Path]:
    """What embeddings follow from of a teacher's folder in transformers' layout: settings and
    weights, by name; of weights in several formats those that are read."""
    settings = [folder / name for name in ("config.json", "preprocessor_config.json")]
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return [*filter(Path.exists, settings), *weights]


def read_origin(folder: str | Path) -> dict[str, Any]:
    """What is noted of how the teacher in ``folder`` was made; empty where nothing is.

    Raises:
      RecipeError: the note is damaged.
    """
    path = Path(folder) / ORIGIN
    return read_json(path, "fetch it again") if path.exists() else {}


def find_teacher(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder or file of that path, or the folder that the hub's model is downloaded to.

    Raises:
      RecipeError: there is neither.
    """
    if Path(name_or_path).exists():
        return Path(name_or_path)
    from mvqkd.teachers.hub import fetch

    return fetch(str(name_or_path), revision)
