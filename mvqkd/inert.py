"""Checkpoints that hold objects, read as plain data: nothing in them is run.

    checkpoint = read_inert(Path("hubert_base_ls960.pt"))
    checkpoint["cfg"]["model"]["encoder_layers"], checkpoint["model"]["mask_emb"]

torch saves a zip of a pickle and of one file a storage. A pickle is a program, so it is not run
as one: each name in it that is on the list below becomes inert data, and any other ends the
reading. Files of plain tensors need none of this: ``torch.load(path, weights_only=True)``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from mvqkd.errors import RecipeError, reason_of

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {str(dtype).removeprefix("torch.") for dtype in STORAGES.values()}
# Objects with attributes. omegaconf's containers are resolved afterwards, the others not used.
OBJECTS = {
    ("fairseq.data.dictionary", "Dictionary"),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "ContainerMetadata"),
    ("omegaconf.base", "Metadata"),
    *(("omegaconf.nodes", f"{kind}Node") for kind in ("Any", "Boolean", "Float", "Integer")),
    ("omegaconf.nodes", "StringNode"),
}
# Types that stand for themselves in omegaconf's metadata.
TYPES = {
    ("typing", "Any"),
    *(("__builtin__", kind) for kind in ("bool", "dict", "float", "int", "list", "long", "str")),
    *(("builtins", kind) for kind in ("bool", "dict", "float", "int", "list", "str")),
}
TABLES = {
    *(("collections", kind) for kind in ("Counter", "OrderedDict", "defaultdict")),
    ("icefall.utils", "AttributeDict"),
}
PATHS = {
    (module, kind)
    for module in ("pathlib", "pathlib._local")  # the second since Python 3.13
    for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "Path")
}


class _RefusedError(Exception):
    """Something in the pickle that is not on the list."""


class _Object:
    """What stands for an object of a class that is not here."""

    def __new__(cls, *args: Any) -> _Object:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


class _Text(str):
    """What stands for a kind of string."""


class _Table(dict):
    """What stands for an OrderedDict or a defaultdict; it may carry attributes."""

    def __init__(self, *args: Any) -> None:
        # A defaultdict is given what makes its values first.
        super().__init__(*(a for a in args if isinstance(a, (dict, list, tuple))))


@dataclass
class _Storage:
    dtype: torch.dtype
    key: str


@dataclass
class _Tensor:
    """A view of a storage that is not read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Builds plain data. Its stand-ins are made anew for each file, so that none can leave
    anything behind in them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._found: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._found:
            self._found[key] = self._stand_in(*key)
        return self._found[key]

    def _stand_in(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in OBJECTS or key in TYPES:
            return type(name, (_Object,), {})
        if key in TABLES:
            return type(name, (_Table,), {})
        if key in PATHS:
            return lambda *parts: str(PurePosixPath(*map(str, parts)))
        if key == ("torch.torch_version", "TorchVersion"):
            return type(name, (_Text,), {})
        if key == ("torch", "device"):
            return lambda *parts: ":".join(map(str, parts))
        if key == ("torch", "Size"):
            return lambda sizes=(): list(sizes)
        if module == "torch" and name in STORAGES:
            return type(name, (_Object,), {"dtype": STORAGES[name]})
        if module == "torch" and name in DTYPES:
            return type(name, (_Object,), {})
        if key == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, size, stride)
        if key == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        # ("storage", its class, key, device, number of elements)
        _, storage_class, key, *_ = pid
        return _Storage(storage_class.dtype, key)


def read_inert(path: Path) -> dict[str, Any]:
    """Tables, lists, strings and numbers, and the tensors of the table ``model`` and, where there
    is one, of ``model_avg``; of others, as of an optimizer, only the shape is kept.

    Raises:
      RecipeError: damaged, not in torch's zip format, without a ``model``, or it holds what is not
        on the list.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            prefix = pickled[: -len("data.pkl")]
            order = prefix + "byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its bytes are not in little-endian order")
            found = _plain(_Reader(io.BytesIO(archive.read(pickled))).load())
            for table in ("model", "model_avg"):
                if table == "model" or isinstance(found.get(table), dict):
                    weights = found[table].items()
                    found[table] = {name: _read_tensor(archive, prefix, t) for name, t in weights}
            return found
    except _RefusedError as error:
        raise RecipeError(
            f"{path}: holds {error}, which is not on the list of what is read, and is refused; "
            "take the file from its authors, or another form of it"
        ) from error
    except zipfile.BadZipFile as error:
        raise RecipeError(
            f"{path}: is no whole file in torch's zip format ({error}); fetch it again, or if it "
            "was saved before torch 1.6, load and save it with a newer one where you trust it"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise RecipeError(
            f"{path}: cannot be read as a checkpoint ({reason_of(error)}); fetch it again"
        ) from error


def _read_tensor(archive: zipfile.ZipFile, prefix: str, tensor: _Tensor) -> torch.Tensor:
    storage, size, stride = tensor.storage, tuple(tensor.size), tuple(tensor.stride)
    data = bytearray(archive.read(f"{prefix}data/{storage.key}"))
    if not data:  # which frombuffer does not take
        if 0 not in size:
            raise ValueError(f"the storage of a tensor of {list(size)} is empty")
        return torch.empty(size, dtype=storage.dtype)
    flat = torch.frombuffer(data, dtype=storage.dtype)
    return flat.as_strided(size, stride, tensor.offset)


def _plain(value: Any) -> Any:
    """``value`` with omegaconf's containers, and everything else that stands for an object, as
    tables, lists and values."""
    if isinstance(value, _Object):
        attributes = vars(value)
        for content in ("_content", "_val"):
            if content in attributes:
                return _plain(attributes[content])
        return {name: _plain(v) for name, v in attributes.items()}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, type):
        return value.__name__
    return str(value) if isinstance(value, _Text) else value
