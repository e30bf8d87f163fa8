"""Labels of a teacher in manifests: dump, join, verify, load.

A label is a custom field of the cut, a lhotse `TemporalArray` (T_teacher, columns). The field
``codebook_indexes`` holds what the quantizer leaves of each frame, uint8 (T_teacher, N), in the
form that icefall's recipe reads; other fields may hold the indexes or the embeddings of other
layers and teachers. Beside each field, that of its name and ``_origin`` says what made it.

N: codebooks, T: teacher frames, D: dimension, F: frames of a batch, B: cuts.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
import math
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
import torch
from lhotse import CutSet
from lhotse.array import Array, TemporalArray
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.features.io import close_cached_file_handles
from lhotse.utils import fastcopy

from mvqkd.data.audio import AudioBatch, collate_good, num_samples
from mvqkd.data.bad_utterances import check_bad, list_bad
from mvqkd.data.manifests import read_cuts, write_cuts
from mvqkd.data.shards import ArrayFile, Shards
from mvqkd.device import Precision, full_float32, matrix_dtype
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer import Quantizer
from mvqkd.quantizer.frames import require_finite

if TYPE_CHECKING:  # transformers takes seconds to import, and students do not need it
    from mvqkd.teachers.base import Teacher

FIELD = "codebook_indexes"
# The folder of the arrays, beside the manifest.
SHARDS = "shards"
# The key of what is wrong with the cuts of a shard that have no labels: JSON, by cut id, as bytes.
_BAD = "bad-utterances"
ORIGIN_FIELD = "codebook_indexes_origin"
# What padding of indexes is filled with: cross-entropy leaves it out. 0 would be a valid index.
# Padding of embeddings is NaN: any number may be valid.
IGNORED = -100
# How far the times of two cuts may lie apart that are the same (s): versions of lhotse round
# differently.
SAME_TIME = 0.005


_UNKNOWN_ORIGIN = (
    "cut {}: its labels do not say what made them; set accept_unknown_origin: true if you know"
)


def origin_field(field: str) -> str:
    """The field that says what made ``field``."""
    return f"{field}_origin"


@dataclass
class Origin:
    """What made a label."""

    teacher: str
    layer: int
    # The quantizer's id, or the type of embeddings that no quantizer has seen.
    quantizer: str
    # sha256 of the quantizer's weights; empty without one.
    sha256: str

    @staticmethod
    def of(meta: dict) -> Origin:
        """From the facts that `save_quantizer` keeps beside a quantizer."""
        return Origin(meta["teacher"], meta["layer"], meta["quantizer_id"], meta["sha256"])


@dataclass
class LabelSettings:
    """How labels are dumped."""

    # Seconds of speech in a batch of the teacher.
    max_duration: float = 100
    shard_size: int = 500
    refine_iters: int = 5
    # Of the teacher's matrices; see `matrix_dtype`.
    precision: Precision = "auto"
    # Of the CPU's arithmetic, whatever the environment says: sums that are shared out among more
    # threads round differently. Start a process for as many cores.
    num_threads: int = 2
    # Threads that read audio ahead of the teacher.
    num_loaders: int = 4
    # Share of the utterances that may be broken; they are left out and listed.
    max_bad_share: float = 0.01


class CodebookIndexes:
    """Labels of N bytes a frame: uint8 (T, N).

    Raises:
      RecipeError: an index does not fit a byte.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        teacher: Teacher,
        quantizer: Quantizer,
        origin: Origin,
        refine_iters: int = 5,
        field: str = FIELD,
    ) -> None:
        if quantizer.codebook_size > 256:
            raise RecipeError(
                f"quantizer {origin.quantizer}: an index of {quantizer.codebook_size} entries does "
                "not fit a byte; use 256 or fewer"
            )
        self.teacher, self.origin, self.field = teacher, origin, field
        self.columns = quantizer.num_codebooks
        self._quantizer, self._refine_iters = quantizer, refine_iters

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)
        self._quantizer.to(device)

    def made_from(self) -> dict:
        return {**asdict(self.origin), "refine_iters": self._refine_iters}

    def encode(self, embeddings_FD: torch.Tensor) -> torch.Tensor:
        """uint8 (F, N)."""
        indexes_FN = self._quantizer.encode(
            embeddings_FD,
            refine_indexes_iters=self._refine_iters,
            as_bytes=False,  # N columns whatever K is
        )
        return indexes_FN.to(torch.uint8)

    def what_is_wrong(self, indexes_TN: np.ndarray) -> str | None:
        return out_of_range(indexes_TN, self._quantizer.codebook_size)


def out_of_range(indexes_TN: np.ndarray, codebook_size: int) -> str | None:
    """What is wrong with indexes of codebooks of that size; None: nothing."""
    if indexes_TN.max(initial=0) >= codebook_size:
        return f"holds index {indexes_TN.max()}, but codebooks have {codebook_size} entries"
    return None


class Embeddings:
    """The teacher's embeddings as they are, for l1 and l2: float16 or float32 (T, D).

    Raises:
      RecipeError: the teacher has no such layer.
    """

    columns: int

    def __init__(
        self, teacher: Teacher, layer: int, dtype: Literal["float16", "float32"], field: str
    ) -> None:
        teacher.check_layer(layer)
        self.teacher, self.field = teacher, field
        self.origin = Origin(teacher.name, layer, dtype, "")
        self.dtype, self.columns = np.dtype(dtype), teacher.dim

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)

    def made_from(self) -> dict:
        return asdict(self.origin)

    def encode(self, embeddings_FD: torch.Tensor) -> torch.Tensor:
        """(F, D)."""
        return embeddings_FD.to(getattr(torch, self.dtype.name))

    def what_is_wrong(self, embeddings_TD: np.ndarray) -> str | None:
        if not np.isfinite(embeddings_TD).all():
            return f"holds values that are not finite as {self.dtype} (float32 holds more)"
        return None


LabelKind = CodebookIndexes | Embeddings


class Clock(Protocol):
    """Of a teacher, how many frames there are."""

    def num_frames(self, num_samples: int) -> int: ...


class Expected(Protocol):
    """What labels should be: every `LabelKind`, and labels that were made elsewhere."""

    field: str
    dtype: np.dtype
    columns: int
    origin: Origin
    teacher: Clock

    def what_is_wrong(self, array: np.ndarray) -> str | None:
        """Of the values of a label; None: nothing."""


@torch.inference_mode()
@full_float32()
def compute_labels(
    kinds: Sequence[LabelKind],
    waveforms_BL: torch.Tensor,
    lengths_B: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    cut_ids: Sequence[str] = (),
) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """By field, the labels (F, columns) of a batch's utterances one after the other, and how many
    frames each of them has. All layers of a teacher come from one pass.

    Args:
      waveforms_BL, lengths_B, dtype: see `Teacher.embed`; the waveforms where the kinds have been
        moved to.
      cut_ids: of the utterances, to have embeddings that are not finite refused. On a GPU that
        waits for them.

    Raises:
      RecipeError: a frame is not finite; its cut is named.
    """
    embedded, frames = {}, {}
    for teacher in dict.fromkeys(kind.teacher for kind in kinds):
        layers = sorted({kind.origin.layer for kind in kinds if kind.teacher is teacher})
        embeddings, frames_B = teacher.embed_layers(waveforms_BL, lengths_B, layers, dtype)
        frames[teacher] = frames_B.tolist()
        for layer, embeddings_BTD in zip(layers, embeddings):
            inside = (x_TD[:count] for x_TD, count in zip(embeddings_BTD, frames[teacher]))
            embedded[teacher, layer] = torch.cat(list(inside))
            if cut_ids:
                name = f"layer {layer} of {teacher.name}"
                require_finite(embedded[teacher, layer], name, cut_ids, frames[teacher])
    return {
        kind.field: (kind.encode(embedded[kind.teacher, kind.origin.layer]), frames[kind.teacher])
        for kind in kinds
    }


class Dumper:
    """Gives cuts their labels, a shard at a time.

    Args:
      conf: where ``settings`` are set, for messages.

    Raises:
      RecipeError: there is nothing to dump, or two labels have one field.
    """

    def __init__(
        self,
        kinds: Sequence[LabelKind],
        settings: LabelSettings,
        device: torch.device,
        conf: str = "labels.yaml",
    ) -> None:
        fields = [kind.field for kind in kinds]
        if not kinds:
            raise RecipeError("labels: nothing to dump; name a quantizer, or other labels")
        for field in fields:
            if fields.count(field) > 1:
                raise RecipeError(f"labels: two are called {field}; give each a field of its own")
            if not field.isidentifier():
                raise RecipeError(f"labels: field {field!r} is no name; use letters, digits and _")
        for kind in kinds:
            kind.to(device)
        self.kinds = list(kinds)
        self._settings, self._device = settings, device
        self._dtype = matrix_dtype(settings.precision, device)
        self._conf = conf

    def check_bad(self, bad: Mapping[str, str], num_cuts: int) -> None:
        """
        Raises:
          RecipeError: ``bad``, by id what is wrong with cuts, are too many of ``num_cuts``.
        """
        check_bad(bad, num_cuts, self._settings.max_bad_share, self._conf)

    def made_from(self) -> dict:
        """What the bytes of a shard follow from, beside its cuts."""
        # Sums in another order, as in batches of another size or on a device of another kind, may
        # tip a near tie.
        labels = {kind.field: kind.made_from() for kind in self.kinds}
        return {
            "max_duration": self._settings.max_duration,
            "precision": str(self._dtype).removeprefix("torch."),
            "num_threads": self._settings.num_threads,
            "device": self._device.type,
            # A teacher that was trained anew has its old name.
            "teacher_weights": {kind.field: kind.teacher.sha256() for kind in self.kinds},
            **labels,
        }

    def __call__(self, cuts: CutSet, arrays: ArrayFile, num_cuts: int | None = None) -> CutSet:
        """The good ones of ``cuts`` with labels; what is wrong with the others goes to ``arrays``.

        Args:
          num_cuts: of which at most ``max_bad_share`` may be bad; None: of these.

        Raises:
          RecipeError: more of them are.
        """
        cuts = CutSet.from_cuts([fastcopy(cut) for cut in cuts])  # the caller's stay as they are
        bad: dict[str, str] = {}
        # The teacher waits neither for audio nor for the disk. An error of another thread is
        # raised here, and who stops here waits until no thread has the file in hand.
        with (
            _threads(self._settings.num_threads),
            ThreadPoolExecutor(self._settings.num_loaders) as loaders,
            ThreadPoolExecutor(1) as writer,
        ):
            ahead = self._settings.num_loaders + 1
            loaded = _ahead(loaders, self._load, self._batches(cuts), ahead)

            def computed():
                for batch, audio, wrong in loaded:
                    bad.update(wrong)
                    self.check_bad(bad, num_cuts or len(cuts))
                    if batch:
                        yield batch, self._compute(audio), arrays

            for _ in _ahead(writer, self._store, computed(), 2):
                pass
        if bad:
            arrays.store(_BAD, np.frombuffer(json.dumps(bad).encode(), np.uint8))
        return CutSet.from_cuts(cut for cut in cuts if cut.id not in bad)

    def _batches(self, cuts: CutSet) -> list[list[Cut]]:
        """Of like durations, the longest first."""
        batches: list[list[Cut]] = [[]]
        for cut in sorted(cuts, key=lambda cut: -cut.duration):
            longest = batches[-1][0].duration if batches[-1] else cut.duration
            if batches[-1] and longest * (len(batches[-1]) + 1) > self._settings.max_duration:
                batches.append([])
            batches[-1].append(cut)
        return batches

    def _load(self, cuts: list[Cut]) -> tuple[list[Cut], AudioBatch | None, dict[str, str]]:
        """(good cuts, their audio, what is wrong with the others); by a thread of its own, as
        `_store`."""
        audio, bad = collate_good(cuts, self._check_length)
        if audio is not None and self._device.type == "cuda":  # whence it is copied without waiting
            audio.waveforms_BL = audio.waveforms_BL.pin_memory()
        return [cut for cut in cuts if cut.id not in bad], audio, bad

    def _check_length(self, name: str, num_samples: int) -> None:
        for teacher in dict.fromkeys(kind.teacher for kind in self.kinds):
            teacher.check_length(name, num_samples)

    def _compute(self, audio: AudioBatch) -> dict[str, tuple[torch.Tensor, list[int]]]:
        """See `compute_labels`."""
        waveforms_BL = audio.waveforms_BL.to(self._device, non_blocking=True)
        return compute_labels(self.kinds, waveforms_BL, audio.lengths_B, self._dtype, audio.ids)

    def _store(
        self,
        computed: tuple[list[Cut], dict[str, tuple[torch.Tensor, list[int]]], ArrayFile],
    ) -> None:
        cuts, labels, arrays = computed
        for kind in self.kinds:
            encoded_FX, frames = labels[kind.field]
            for cut, label_TX in zip(cuts, encoded_FX.cpu().split(frames)):
                array = label_TX.numpy()
                wrong = kind.what_is_wrong(array)
                if wrong:
                    raise RecipeError(f"cut {cut.id}: {kind.field} {wrong}; see to the teacher")
                key = cut.id if kind.field == FIELD else f"{kind.field}/{cut.id}"
                arrays.store(key, array, chunked=True)
                stored = Array(
                    storage_type=arrays.STORAGE_TYPE,
                    storage_path=arrays.path,
                    storage_key=key,
                    shape=list(array.shape),
                )
                cut.custom = {
                    **(cut.custom or {}),
                    kind.field: TemporalArray(
                        array=stored,
                        temporal_dim=0,
                        frame_shift=kind.teacher.frame_shift,
                        start=cut.start,
                    ),
                    origin_field(kind.field): asdict(kind.origin),
                }


X, Y = TypeVar("X"), TypeVar("Y")


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[X], Y], items: Iterable[X], number: int
) -> Iterator[Y]:
    """``function`` of each of ``items``, in their order; the pool has up to ``number`` in hand
    beside the one that is waited for."""
    futures: deque[Future[Y]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > number:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Within, torch computes with ``number`` threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dump_labels(cuts: CutSet, out: Path, dumper: Dumper, shard_size: int) -> CutSet | None:
    """Write ``out``: ``cuts`` with labels, verified; arrays go to shards in its folder.

    Any number of processes may call this with the same arguments, at once or one after the
    other, and take shards as they come: ``out`` and the shards have the same bytes in the end.
    Cuts whose audio cannot be read, or is too short for a frame, are left out, and listed in
    ``bad-utterances.txt`` beside ``out``.

    Returns:
      the cuts; None where other processes still have shards in hand, of which the last to
      end writes ``out``.

    Raises:
      RecipeError: a cut is given twice, the folder holds labels made from something else, labels
        are not what they should be, too many cuts are bad, or the disk is full.
    """
    ids = [cut.id for cut in cuts]
    for twice in (name for name, number in Counter(ids).items() if number > 1):
        raise RecipeError(
            f"cut {twice}: is there twice; give each cut of the manifest an id of its own"
        )
    folder = out.parent / SHARDS
    shards = Shards(cuts, folder, shard_size, "labels", joined=out)
    _claim(
        folder / "made-from.json",
        {"cuts": _fingerprint(cuts), "shard_size": shard_size, **dumper.made_from()},
    )
    if not shards.share(partial(dumper, num_cuts=len(cuts))):
        return None
    bad: dict[str, str] = {}
    for array in shards.stored(_BAD):
        bad.update(json.loads(array.tobytes()))
    dumper.check_bad(bad, len(cuts))
    try:
        labelled = read_cuts(out) if out.exists() else shards.cuts()
    except FileNotFoundError:
        if not out.exists():
            raise
        labelled = read_cuts(out)  # written by another process since
    if [cut.id for cut in labelled] != [name for name in ids if name not in bad]:
        raise RecipeError(f"{out}: has not the cuts that were to be labelled; remove it")
    close_cached_file_handles()  # what is read is what is there now
    verify_labels(labelled, dumper.kinds)
    list_bad(bad, out.with_name("bad-utterances.txt"))
    if not out.exists():
        with written_aside(out) as aside:
            write_cuts(labelled, aside)
    shards.leave_arrays()
    return labelled


def _fingerprint(cuts: CutSet) -> str:
    """What tells these cuts from others."""
    digest = hashlib.sha256()
    for cut in cuts:
        digest.update(f"{cut.id} {cut.start} {cut.duration}\n".encode())
    return f"{len(cuts)} of sha256 {digest.hexdigest()[:12]}"


# What `Dumper.made_from` did not always tell: a folder without them is taken all the same.
_TOLD_SINCE = ("device", "teacher_weights")


def _claim(path: Path, made_from: dict) -> None:
    """Leave in ``path`` what a folder's labels are made from.

    Raises:
      RecipeError: it is something else.
    """
    with written_aside(path, first_stays=True) as aside:
        aside.write_text(json.dumps(made_from, indent=1) + "\n")
    found = json.loads(path.read_text())
    for key in [*made_from, *found]:
        if key in _TOLD_SINCE and key not in found:
            continue
        if found.get(key) != made_from.get(key):
            raise RecipeError(
                f"{path}: labels in this folder are made from {key} {found.get(key)}, and this "
                f"job's from {made_from.get(key)}; give it another folder, or remove this one"
            )


def join_labels(cuts: CutSet, labelled: CutSet, fields: Sequence[str] = (FIELD,)) -> CutSet:
    """``cuts`` with the labels of ``labelled``, found by cut id.

    Where the ids are of another scheme (versions of lhotse name cuts of perturbed speed
    differently), a label is found by recording, channel, start and speed. Labels whose cuts name
    no recording, as the published ones, have these of their id, as lhotse makes ids.

    Raises:
      RecipeError: a cut has no label, or two, or one of another recording, start or speed; both
        ids are named.
    """
    cuts = list(cuts)  # a manifest may be read anew at each turn
    recordings = {_source(cut)[0] for cut in cuts if cut.recording is not None}
    by_id, by_source = {}, defaultdict(list)
    for other in labelled:
        by_id[other.id] = other
        named = other.recording is not None
        by_source[_source(other) if named else _source_by_id(other, recordings)].append(other)
    ids = sorted(by_id)
    joined = []
    for cut in cuts:
        other = by_id.get(cut.id)
        if other is None:
            other = _same_speech(cut, by_source, ids)
        elif not _agree(cut, other):
            raise RecipeError(
                f"cut {cut.id}: the label of this id is of recording {_told(other)}, the cut of "
                f"{_told(cut)}; name the manifest that the labels were made for"
            )
        custom = dict(cut.custom or {})
        for field in fields:
            if field not in (other.custom or {}):
                raise RecipeError(f"cut {other.id}: has no {field}; dump the labels again")
            # The cut's own start, should they differ in rounding.
            custom[field] = fastcopy(other.custom[field], start=cut.start)
            if origin_field(field) in other.custom:
                custom[origin_field(field)] = other.custom[origin_field(field)]
        joined.append(fastcopy(cut, custom=custom))
    return CutSet.from_cuts(joined)


def speed_of(cut) -> float:
    """1 unless lhotse has perturbed it."""
    speed = 1.0
    for transform in cut.recording.transforms or []:
        document = transform if isinstance(transform, dict) else transform.to_dict()
        if document["name"] == "Speed":
            speed *= document["kwargs"]["factor"]
    return round(speed, 4)


def _source(cut) -> tuple[str, int, float]:
    """(recording without its speed's affix, channel, speed)."""
    speed = speed_of(cut)
    recording = cut.recording.id
    if speed != 1:
        recording = re.sub(r"^sp[\d.]+-|[_-]sp[\d.]+$", "", recording)
    return recording, cut.channel, speed


def _source_by_id(cut, recordings: set[str]) -> tuple[str, int, float] | None:
    """As `_source`, of a cut that has no recording: lhotse makes ids of that of the recording,
    numbers, and the speed. None where it is none of ``recordings``."""
    name, speed = re.fullmatch(r"(.*?)(?:_sp(\d+(?:\.\d+)?))?", cut.id, re.DOTALL).groups()
    while name not in recordings:
        name, _, number = name.rpartition("-")
        if not (name and number.isdecimal()):
            return None
    return name, cut.channel, round(float(speed or 1), 4)


def _told(cut) -> str:
    if cut.recording is None:
        return f"unknown name, {cut.duration:.3f} s"
    recording, channel, speed = _source(cut)
    return f"{recording} (channel {channel}, speed {speed:g}) at {cut.start:.3f} s"


def _agree(cut, other) -> bool:
    """Whether two cuts are of the same speech, as far as is known."""
    same_length = abs(cut.duration - other.duration) < SAME_TIME
    if cut.recording is None or other.recording is None:
        return same_length
    same_start = abs(cut.start - other.start) < SAME_TIME
    return same_length and same_start and _source(cut) == _source(other)


def _same_speech(cut, by_source: dict, ids: list[str]):
    found = []
    if cut.recording is not None:
        found = [
            other
            for other in by_source.get(_source(cut), [])
            if _agree(cut, other) and abs(cut.start - other.start) < SAME_TIME
        ]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(
            f"cut {cut.id}: no label has this id, and both {found[0].id} and {found[1].id} are of "
            "the same recording, start and speed; remove one of them"
        )
    place = bisect.bisect(ids, cut.id)
    near = max(ids[max(0, place - 1) : place + 1], key=lambda i: _common_prefix(i, cut.id))
    raise RecipeError(
        f"cut {cut.id}: no label has this id, and none is known to be of the same recording, start "
        f"and speed; the nearest id is {near}; dump the labels for this manifest"
    )


def _common_prefix(one: str, two: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two)))


def verify_labels(
    cuts: CutSet, kinds: Sequence[Expected], accept_unknown_origin: bool = False
) -> None:
    """Every cut has the labels ``kinds``: as many frames as its duration asks for, values in
    range, of their origin.

    For cuts as they were dumped, not truncated since.

    Raises:
      RecipeError: the first cut that has not.
    """
    for kind in kinds:
        num_frames = sum(_verify_label(cut, kind, accept_unknown_origin) for cut in cuts)
        logging.info(
            f"verified: {len(cuts)} cuts have {kind.field}, {num_frames} frames of "
            f"{kind.columns * kind.dtype.itemsize} bytes"
        )


def _verify_label(cut, kind: Expected, accept_unknown: bool) -> int:
    check_origin(cut, kind.origin, accept_unknown, kind.field)
    # All of the array: lhotse cuts off what is too long for the cut.
    array = _stored(cut, kind.field, whole=True)
    if array.dtype != kind.dtype:
        raise RecipeError(
            f"cut {cut.id}: its {kind.field} are {array.dtype}, not {kind.dtype}; dump them again"
        )
    expected = kind.teacher.num_frames(num_samples(cut))
    # One more is what icefall stores.
    shapes = [(expected, kind.columns), (expected + 1, kind.columns)]
    if array.shape not in shapes:
        raise RecipeError(
            f"cut {cut.id}: its {kind.field} have shape {array.shape}, but "
            f"{cut.duration:.2f} s ask for {shapes[0]}; dump them again"
        )
    wrong = kind.what_is_wrong(array)
    if wrong:
        raise RecipeError(f"cut {cut.id}: {kind.field} {wrong}; dump them again")
    return len(array)


def _labelled_custom(cut, field: str) -> dict:
    """The custom fields of what of ``cut`` carries ``field``."""
    custom = labelled_part(cut, field)[0].custom or {}
    if field not in custom:
        how = "" if field == FIELD else f" with `more: [{{field: {field}}}]` in labels.yaml"
        raise RecipeError(f"cut {cut.id}: has no {field}; run stage 5{how}")
    return custom


def check_origin(cut, origin: Origin, accept_unknown: bool, field: str = FIELD) -> None:
    """
    Raises:
      RecipeError: ``cut`` has no labels, or labels that ``origin`` did not make.
    """
    custom = _labelled_custom(cut, field)
    found = custom.get(origin_field(field))
    if found is None:
        if not accept_unknown:
            raise RecipeError(_UNKNOWN_ORIGIN.format(cut.id))
    elif not origin.sha256 or not found["sha256"]:
        if found != asdict(origin):
            raise RecipeError(
                f"cut {cut.id}: its {field} are {in_words(found)}, not {in_words(asdict(origin))}"
                f"; {_dump_again(custom[field])}, or name the other"
            )
    elif found["sha256"] != origin.sha256:
        raise RecipeError(
            f"cut {cut.id}: its labels were made by quantizer {found['quantizer']} (sha256 "
            f"{found['sha256'][:12]}), not by {origin.quantizer} (sha256 {origin.sha256[:12]}) "
            f"that the conf names; {_dump_again(custom[field])}, or name the other quantizer"
        )


def _dump_again(label: TemporalArray) -> str:
    """The remedy for labels of something else: stage 5 leaves those that are there."""
    folder = Path(label.array.storage_path).parent
    whole = folder.parent if folder.name == SHARDS else "the folder of these labels"
    return f"remove {whole} and run stage 5"


def common_facts(
    cuts: CutSet, accept_unknown_origin: bool, field: str = FIELD
) -> tuple[int, float]:
    """Codebooks and frame shift of indexes whose quantizer is not here.

    Raises:
      RecipeError: a cut has no indexes, or does not say what made them, or they are of another
        origin or form than the first cut's.
    """
    first = None
    for cut in cuts:
        custom = _labelled_custom(cut, field)
        origin = custom.get(origin_field(field))
        if origin is None and not accept_unknown_origin:
            raise RecipeError(_UNKNOWN_ORIGIN.format(cut.id))
        label = custom[field]
        found = (label.shape[1], label.frame_shift, origin)
        first = first or (cut.id, found)
        if found != first[1]:
            raise RecipeError(
                f"cut {cut.id}: its labels ({_facts_in_words(*found)}) are not of those of cut "
                f"{first[0]} ({_facts_in_words(*first[1])}); train on labels of one kind"
            )
    return first[1][:2]


def _facts_in_words(num_codebooks: int, frame_shift: float, origin: dict | None) -> str:
    made_by = "of unknown origin" if origin is None else in_words(origin)
    return f"{num_codebooks} codebooks, {1000 * frame_shift:g} ms a frame, {made_by}"


def in_words(origin: dict) -> str:
    """What an `Origin`, as a cut holds it, is called in messages."""
    return f"{origin['quantizer']} of layer {origin['layer']} of {origin['teacher']}"


def _stored(cut, field: str = FIELD, whole: bool = False) -> np.ndarray:
    """(T, columns): the part of the array that lies in ``cut``, or the ``whole`` array."""
    if field not in (cut.custom or {}):
        raise RecipeError(f"cut {cut.id}: has no {field}; run stage 5")
    try:
        return cut.custom[field].load() if whole else cut.load_custom(field)
    except (OSError, KeyError) as error:
        path = cut.custom[field].array.storage_path
        raise RecipeError(
            f"{path}: {field} of cut {cut.id} cannot be read ({type(error).__name__}); "
            "remove it and the labels' stamp in exp/<name>/stamps, then run stage 5"
        ) from error


def labelled_part(cut, field: str = FIELD) -> tuple[Cut, float]:
    """What of a padded or mixed cut carries ``field``, and at what second of the cut it begins;
    any other cut as it is.

    Raises:
      RecipeError: not exactly one of the tracks of a mixed cut carries it.
    """
    if not isinstance(cut, MixedCut):
        return cut, 0.0
    tracks = [
        track
        for track in cut.tracks
        if not isinstance(track.cut, PaddingCut) and field in (track.cut.custom or {})
    ]
    if len(tracks) != 1:
        raise RecipeError(
            f"cut {cut.id}: {len(tracks)} of its tracks have {field}; exactly one must"
        )
    return tracks[0].cut, tracks[0].offset


def load_labels(cut, field: str = FIELD) -> np.ndarray:
    """(T, columns) over the whole cut: indexes as int64, embeddings as they are stored.

    Where a padded or mixed cut has no label: `IGNORED`, and NaN in embeddings.

    Raises:
      RecipeError: there are no labels, or their file is missing or damaged.
    """
    part, offset = labelled_part(cut, field)
    labels_TN = _stored(part, field)
    is_float = labels_TN.dtype.kind == "f"
    if not is_float:
        labels_TN = labels_TN.astype(np.int64)
    if part is cut:
        return labels_TN
    frame_shift = part.custom[field].frame_shift
    shape = (round(cut.duration / frame_shift), labels_TN.shape[1])
    padded_TN = np.full(shape, np.nan if is_float else IGNORED, labels_TN.dtype)
    first = round(offset / frame_shift)
    last = min(first + len(labels_TN), len(padded_TN))
    padded_TN[first:last] = labels_TN[: last - first]
    return padded_TN


def no_label(dtype: torch.dtype) -> float:
    """What stands in labels of ``dtype`` for a frame that has none."""
    return math.nan if dtype.is_floating_point else IGNORED


def has_label(labels: torch.Tensor) -> torch.Tensor:
    """(...), true for the frames of ``labels`` (..., columns) that have one."""
    if labels.is_floating_point():
        return ~labels[..., 0].isnan()
    return (labels != IGNORED).all(-1)


def collate_labels(labels: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, T, columns), padded with `no_label`."""
    tensors = [torch.from_numpy(part) for part in labels]
    return torch.nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=no_label(tensors[0].dtype)
    )
