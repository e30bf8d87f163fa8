"""Teachers: models that turn speech into one embedding a frame."""

from __future__ import annotations

from pathlib import Path

from mvqkd.errors import RecipeError


def load_teacher(name_or_path: str):
    """The teacher in a local folder (transformers' layout), or by its name on the hub.

    Returns an object with ``dim``, ``num_layers``, ``frame_shift``,
    ``embed(waveforms_BL, lengths_B, layer) -> (embeddings_BTD, lengths_B)``, and
    ``transcribe`` where it has a CTC head. Layers are counted from 1.

    Raises:
      RecipeError: there is no such folder or name, or it cannot be loaded.
    """
    from mvqkd.teachers.hubert import load_hubert

    return load_hubert(find_teacher(name_or_path), name=str(name_or_path))


def find_teacher(name: str) -> Path:
    """The folder ``name``, or the one that the hub's model of that name is downloaded to.

    Raises:
      RecipeError: there is neither.
    """
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=10))
    except Exception as error:  # the hub's own, the HTTP client's and the system's
        raise RecipeError(
            f"teacher {name}: no such folder, and the hub does not give it "
            f"({type(error).__name__}); check the name, or download it and give the folder"
        ) from error
