"""Work in shards: order, resume, failures."""

import errno
import fcntl
import multiprocessing
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
from lhotse import CutSet

from mvqkd.data.shards import Shards, map_shards, place_in_job
from mvqkd.errors import RecipeError


class Store:
    """Stores a row that names the cut; fails at ``fail_at``."""

    def __init__(self, fail_at=None):
        self.fail_at, self.seen = fail_at, []

    def __call__(self, cuts, arrays):
        for cut in cuts:
            if cut.id == self.fail_at:
                raise RecipeError(f"cut {cut.id}: broken; mend it")
            self.seen.append(cut.id)
            arrays.store(cut.id, np.frombuffer(cut.id.encode(), np.uint8))
            cut.custom = {"stored_in": arrays.path}
        return cuts


@pytest.fixture
def cuts(plain_cuts):
    one = next(iter(plain_cuts))
    return CutSet.from_cuts(one.with_id(f"cut{i}") for i in (3, 1, 4, 0, 5, 9, 2))


def test_failure_in_a_worker_is_raised(cuts, tmp_path):
    with pytest.raises(RecipeError, match="cut cut0: broken; mend it"):
        map_shards(cuts, tmp_path, Store(fail_at="cut0"), 2, num_workers=1)
    assert not (tmp_path / "00001.jsonl.gz").exists()


def facts(cuts, folder):
    found = []
    for cut in cuts:
        path = cut.stored_in
        with h5py.File(path) as file:
            found.append((cut.id, path.replace(str(folder), ""), bytes(file[cut.id][:]).decode()))
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_is_kept(cuts, tmp_path, num_workers):
    done = map_shards(cuts, tmp_path, Store(), 3, num_workers)
    expected = [(c.id, f"/0000{i // 3}.h5", c.id) for i, c in enumerate(cuts)]
    assert facts(done, tmp_path) == expected


def test_killed_half_way_goes_on_with_what_is_left(cuts, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with pytest.raises(RecipeError, match="cut cut0: broken"):
        map_shards(cuts, broken, Store(fail_at="cut0"), 2)
    assert sorted(p.name for p in broken.iterdir()) == ["00000.h5", "00000.jsonl.gz"]
    before = (broken / "00000.h5").stat().st_mtime_ns
    # Killed between a shard's arrays and its cuts: the shard is not done.
    (broken / "00001.h5").write_bytes(b"left behind")
    store = Store()
    done = map_shards(cuts, broken, store, 2)
    assert store.seen == ["cut4", "cut0", "cut5", "cut9", "cut2"]
    assert (broken / "00000.h5").stat().st_mtime_ns == before
    assert facts(done, broken) == facts(map_shards(cuts, whole, Store(), 2), whole)
    assert len(list(broken.iterdir())) == 8
    store = Store()
    assert facts(map_shards(cuts, broken, store, 2), broken) == facts(done, broken)
    assert store.seen == []


def in_child(function):
    """What ``function`` gives in another process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(function()))
    child.start()
    theirs.close()
    given = ours.recv()
    child.join()
    return given


class StoreArray(Store):
    def __init__(self, shape, chunked):
        super().__init__()
        self.shape, self.chunked = shape, chunked

    def __call__(self, cuts, arrays):
        for cut in cuts:
            arrays.store(cut.id, np.zeros(self.shape, np.float32), self.chunked)
        return cuts


@pytest.mark.parametrize(
    "shape, chunked",
    [((50, 8), False), ((500, 80), False), ((500, 80), True)],
    ids=["compact", "contiguous", "chunked"],
)
@pytest.mark.parametrize("limit", [900, 5_000, 300_000])
def test_full_disk_within_a_shard(cuts, tmp_path, shape, chunked, limit):
    cuts = CutSet.from_cuts(cut.with_id(f"{cut.id}-{n}") for cut in cuts for n in range(40))

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            map_shards(cuts, tmp_path, StoreArray(shape, chunked), 280)
        except RecipeError as error:
            return str(error)

    said = in_child(full)
    assert said == (
        f"{tmp_path}/00000.h5: cannot be written (File too large); make room on that disk and "
        "start again: what is done is kept"
    )
    assert list(tmp_path.iterdir()) == []
    done = map_shards(cuts, tmp_path, StoreArray(shape, chunked), 280)
    assert len(done) == 280


def test_shards_in_the_hands_of_others_are_left_to_them(cuts, tmp_path):
    shards = Shards(cuts, tmp_path, 2, "work")
    with (tmp_path / "00001.lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        store = Store()
        assert not shards.share(store)
        assert store.seen == ["cut3", "cut1", "cut5", "cut9", "cut2"]
        # While another waits to take it, it is done.
        (tmp_path / "00001.h5").touch()
        (tmp_path / "00001.jsonl.gz").touch()
    assert shards.share(store) and store.seen[5:] == []


def test_without_locks_each_keeps_to_its_own(cuts, tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    stores = [Store(), Store()]
    for rank, store in enumerate(stores):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert Shards(cuts, tmp_path, 2, "work").share(store) == (rank == 1)
    assert stores[0].seen == ["cut3", "cut1", "cut5", "cut9"]
    assert stores[1].seen == ["cut2", "cut4", "cut0"]


def test_shards_have_the_same_bytes_whoever_makes_them(cuts, tmp_path, monkeypatch):
    def bytes_of(folder, rank):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert Shards(cuts, Path("shards"), 2, "work").share(Store())
        return {path.name: path.read_bytes() for path in Path("shards").iterdir()}

    assert bytes_of("a", 0) == bytes_of("b", 2)


@pytest.mark.parametrize(
    "env, place",
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "5"}, (2, 5)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "RANK": "1",
                "WORLD_SIZE": "2",
            },
            (7, 8),
        ),
    ],
    ids=["alone", "torchrun", "array", "torchruns in an array"],
)
def test_place_in_job(env, place):
    assert place_in_job(env) == place
