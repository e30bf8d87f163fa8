"""Teachers and labels from the Hugging Face hub: at a pinned revision, resumed, and checked.

    fetch("facebook/hubert-large-ls960-ft", "ece5fabbf034c1073acae96d5401b25be96709d8")
    fetch_files("lab/labels", None, ["train.jsonl.gz"])

The files go to the hub's own cache (``HF_HOME``), in its layout, for all that use it on this
machine; what is there already is taken without the network. huggingface_hub says what the model
consists of, and `download` fetches it, since that goes on where a killed process has stopped. Both
show the hub, and no other host, the user's token, which gated models ask for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from mvqkd.data.download import download
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import written_aside

SETTINGS = ("config.json", "preprocessor_config.json", "vocab.json", "added_tokens.json")
# A file, or an index and the files that it names. The first that a model has is taken.
WEIGHTS = (
    ("model.safetensors", None),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", None),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
# Seconds that the hub may take to say what a model consists of.
TIMEOUT = 10.0
LOG_IN = "accept its terms there and set HF_TOKEN to a token of yours (or call hf auth login)"
REMEDY = "or download it where there is a network, and give the folder"


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of the model ``name`` in the hub's cache, downloaded if it is not there.

    Args:
      revision: a commit, branch or tag; none is the newest.

    Raises:
      RecipeError: no such name or revision, the hub cannot be reached, or what it gives is not
        what it says that it has.
    """
    return _fetch("teacher", name, revision, partial(_of_teacher, name), _is_whole)


def fetch_files(name: str, revision: str | None, files: Collection[str]) -> Path:
    """A folder, called as the commit is, that holds ``files`` of ``name`` somewhere, downloaded if
    they are not there.

    Args:
      revision: a commit, branch or tag; none is the newest.
      files: without the folders that they may lie in on the hub.

    Raises:
      RecipeError: as `fetch`, or one of the files is not there.
    """

    def choose(siblings: list[RepoSibling]) -> list[RepoSibling]:
        by_name = {PurePosixPath(file.rfilename).name: file for file in siblings}
        for file in files:
            if file not in by_name:
                known = ", ".join(sorted(by_name))
                raise RecipeError(
                    f"labels {name}: the hub has no {file} there, but {known}; name another"
                )
        return [by_name[file] for file in files]

    def has_all(folder: Path) -> bool:
        return set(files) <= {path.name for path in folder.rglob("*")}

    return _fetch("labels", name, revision, choose, has_all)


def _fetch(
    what: str,
    name: str,
    revision: str | None,
    choose: Callable[[list[RepoSibling]], list[RepoSibling]],
    has_all: Callable[[Path], bool],
) -> Path:
    """The folder with what ``choose`` takes of what the hub has of ``name``."""
    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if re.fullmatch("[0-9a-f]{40}", revision or "") and has_all(cache / "snapshots" / revision):
        return cache / "snapshots" / revision
    try:
        model = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except GatedRepoError as error:
        raise RecipeError(f"{what} {name}: is gated on the hub; {LOG_IN}, {REMEDY}") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise RecipeError(
            f"{what} {name}: no such folder or file, and no model of that name on the hub; check "
            f"the name, {REMEDY}"
        ) from error
    except RevisionNotFoundError as error:
        raise RecipeError(
            f"{what} {name}: the hub has no revision {revision} of it; check the revision"
        ) from error
    except Exception as error:  # the HTTP client's, the system's, and the hub's own
        raise RecipeError(
            f"{what} {name}: no such folder or file, and the hub {constants.ENDPOINT} cannot be "
            f"reached ({reason_of(error)}); check the network, {REMEDY}"
        ) from error
    folder = cache / "snapshots" / model.sha
    for file in choose(model.siblings):
        try:
            _download(name, model.sha, file, folder / file.rfilename)
        except RecipeError as error:
            if getattr(error.__cause__, "code", None) not in (401, 403):
                raise
            raise RecipeError(
                f"{what} {name}: the hub refuses to give {file.rfilename}, as of a gated model; "
                f"{LOG_IN}, {REMEDY}"
            ) from error
    if revision != model.sha:
        # So that the hub's own tools find it under the branch's name.
        with written_aside(cache / "refs" / (revision or constants.DEFAULT_REVISION)) as aside:
            aside.write_text(model.sha)
    return folder


def _of_teacher(name: str, files: list[RepoSibling]) -> list[RepoSibling]:
    """What a teacher needs, weights last: where they are, all is."""
    by_name = {file.rfilename: file for file in files}
    settings = [by_name[file] for file in SETTINGS if file in by_name]
    for first, parts in WEIGHTS:
        if first in by_name:
            shards = [f for f in sorted(by_name) if parts and fnmatchcase(f, parts)]
            return [*settings, *(by_name[file] for file in (*shards, first))]
    raise RecipeError(
        f"teacher {name}: the hub's model has no {WEIGHTS[0][0]} or {WEIGHTS[2][0]}; name another"
    )


def _download(name: str, commit: str, file: RepoSibling, path: Path) -> None:
    url = hf_hub_url(name, file.rfilename, revision=commit)
    download(
        url,
        path,
        # Large files are known by the hash of their bytes, small ones by that of git.
        sha256=file.lfs.sha256 if file.lfs else None,
        remedy=REMEDY[3:],
        authorization=build_hf_headers().get("authorization"),
    )
    if file.lfs is None:
        data = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if found != file.blob_id:
            path.unlink(missing_ok=True)  # by another process
            raise RecipeError(
                f"{url}: its git hash is {found}, not {file.blob_id}; run again, {REMEDY}"
            )


def _is_whole(folder: Path) -> bool:
    """Whether ``folder`` has weights, and the settings without which they would be misunderstood:
    other tools fetch of a model what they need themselves."""
    config = folder / "config.json"
    if not config.exists() or not (folder / "preprocessor_config.json").exists():
        return False
    try:
        kinds = json.loads(config.read_text()).get("architectures") or []
    except ValueError:  # damaged, as its hash will tell
        return False
    if any(kind.endswith("ForCTC") for kind in kinds) and not (folder / "vocab.json").exists():
        return False
    for first, parts in WEIGHTS:
        if (folder / first).exists():
            shards = json.loads((folder / first).read_text())["weight_map"] if parts else {}
            return all((folder / shard).exists() for shard in set(shards.values()))
    return False
