"""Work in shards: order, resume, failures."""

import h5py
import numpy as np
import pytest
from lhotse import CutSet

from mvqkd.data.shards import map_shards
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
