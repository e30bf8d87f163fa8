"""The search against the authors' package, in both its forms, and what it holds and survives."""

import re
import threading
from pathlib import Path

import pytest
import torch
from multi_quantization import Quantizer as PeerQuantizer

from benchmarks.quantizer.encode_rate import frames_like_embeddings
from mvqkd.quantizer import QuantizerSettings, train_quantizer
from mvqkd.quantizer.quantizer import Quantizer
from mvqkd.quantizer.search import SearchTables, num_candidates
from tests.quantizer.peer import frames_for, pair


def _squared_error(quantizer, x, indexes):
    return ((quantizer.decode(indexes) - x).double() ** 2).sum(dim=1)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "torch"])
def form(request, monkeypatch):
    """Both forms on the CPU; a GPU has the second."""
    if request.param == "torch":
        monkeypatch.setattr(SearchTables, "_refine_compiled", SearchTables._refine_torch)
        monkeypatch.setattr(SearchTables, "_beam_compiled", SearchTables._beam_torch)


@pytest.mark.parametrize("num_codebooks", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("codebook_size", [16, 256])
def test_indexes_are_the_peers(form, num_codebooks, codebook_size):
    # The peer holds a vector per candidate: few frames where it would take long.
    ours, peer = pair(num_codebooks, codebook_size, dim=24)
    x = frames_for(ours, 2400 // num_codebooks if codebook_size == 16 else 192 // num_codebooks)
    expected = peer._compute_indexes(x, 0)
    for rounds in range(6):
        if rounds:
            expected = peer._refine_indexes(x, expected)
        found = ours.encode(x, refine_indexes_iters=rounds, as_bytes=False)
        _equal_but_for_ties(ours, x, found, expected)


def _equal_but_for_ties(quantizer, x, found, expected):
    """At most a frame in a thousand differs, and there two choices tie within rounding."""
    different = (expected != found).any(dim=1)
    assert different.float().mean() <= 0.001
    # Of float32 sums of as large numbers as these.
    size = x.square().sum(dim=1)[different].double()
    errors = (_squared_error(quantizer, x[different], i[different]) for i in (found, expected))
    one, other = errors
    assert bool(((one - other).abs() <= 1e-5 * (size + one)).all())


@pytest.mark.parametrize("codebook_size", [16, 256])
def test_indexes_of_one_codebook_are_the_peers(codebook_size):
    ours, peer = pair(1, codebook_size)
    x = frames_for(ours, 1000)
    for rounds in (0, 1, 2):
        found = ours.encode(x, rounds, as_bytes=False)
        _equal_but_for_ties(ours, x, found, peer.encode(x, rounds, as_bytes=False))
        # A byte holds the one index of 16 entries too, which the peer packs into none.
        assert torch.equal(ours.encode(x, rounds).long(), found)


@pytest.mark.parametrize("num_codebooks", [2, 8])
def test_indexes_of_a_thousand_frames_are_the_peers(num_codebooks):
    ours, peer = pair(num_codebooks, 256, dim=8, seed=1)
    tables, x = ours.search_tables(), frames_for(ours, 1024)
    expected = peer._compute_indexes(x, 0)
    _equal_but_for_ties(ours, x, ours.encode(x, 0, as_bytes=False), expected)
    for rounds in (1, 2):
        # Of 64 frames at a time, for which its vectors are not too many. Each round goes on from
        # the peer's own indexes, so that a tie does not part the two for good.
        parts = list(zip(x.split(64), expected.split(64)))
        found = tables.refine(x, expected, 1)
        expected = torch.cat([peer._refine_indexes(*part) for part in parts])
        _equal_but_for_ties(ours, x, found, expected)
        same = (ours.encode(x, rounds, as_bytes=False) == expected).all(dim=1)
        assert same.float().mean() >= 0.999


def test_indexes_at_the_papers_size_are_the_peers():
    # Of codebooks that were trained, the search has other choices than of random ones.
    frames = frames_like_embeddings(1064, torch.Generator().manual_seed(3))
    settings = QuantizerSettings(lsq_iters=0, logits_iters=5)
    ours = train_quantizer(frames[:1024], settings, progress=None)
    peer = PeerQuantizer(ours.dim, ours.codebook_size, ours.num_codebooks)
    peer.load_state_dict(ours.state_dict())
    x = frames[1024:]
    expected = peer._compute_indexes(x, 0)
    for rounds in range(6):
        if rounds:
            expected = peer._refine_indexes(x, expected)
        _equal_but_for_ties(ours, x, ours.encode(x, rounds, as_bytes=False), expected)


@pytest.mark.parametrize("num_codebooks,codebook_size", [(2, 256), (8, 16), (4, 256)])
def test_differences_from_the_peer_are_ties(form, num_codebooks, codebook_size):
    # Each center is there twice: every choice is a tie, and which is taken is up to rounding.
    ours, peer = pair(num_codebooks, codebook_size, dim=24)
    with torch.no_grad():
        peer.centers[:, codebook_size // 2 :] = peer.centers[:, : codebook_size // 2]
    ours.load_state_dict(peer.state_dict())
    x = frames_for(ours, 60)
    found, expected = ours.encode(x, 5, as_bytes=False), peer.encode(x, 5, as_bytes=False)
    assert (found != expected).any()
    half = codebook_size // 2
    assert torch.equal(found % half, expected % half)
    torch.testing.assert_close(
        _squared_error(ours, x, found), _squared_error(ours, x, expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("num_codebooks", [2, 4, 8])
@pytest.mark.parametrize("codebook_size", [2, 4, 8, 32, 128])
def test_forms_agree_where_candidates_are_few_or_all(num_codebooks, codebook_size):
    ours, _ = pair(num_codebooks, codebook_size, dim=8)
    tables, x = ours.search_tables(), frames_for(ours, 100)
    first = ours.encode(x, 0, as_bytes=False) + tables.first_N
    alone = tables.half_sumsq_M - (x - tables.offset_D) @ tables.centers_MD.t()
    for rounds in (1, 3):
        by_torch = tables._refine_torch(alone, first.clone(), rounds)
        assert torch.equal(tables._refine_compiled(alone, first.clone(), rounds), by_torch)


@pytest.mark.parametrize("codebook_size", [2, 4, 8, 16])
def test_two_small_codebooks_are_searched_exhaustively(codebook_size):
    # With no more entries than candidates, one round is an exact search over all pairs.
    ours = Quantizer(5, codebook_size, 2, torch.Generator().manual_seed(3))
    kept = num_candidates(1, codebook_size)
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(4))
    every = torch.cartesian_prod(torch.arange(codebook_size), torch.arange(codebook_size))
    least = torch.cdist(x, ours.decode(every)).square().min(dim=1).values
    found = _squared_error(ours, x, ours.encode(x, 1, as_bytes=False)).float()
    if codebook_size <= kept:
        torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-5)
    else:
        assert (found >= least - 1e-5).all()


def _beam_by_vectors(centers_NKD, x_D, width):
    """The beam search with vectors, one hypothesis at a time."""
    beam = [((), torch.zeros_like(x_D))]
    for centers_KD in centers_NKD:
        longer = [
            ((*chosen, k), sum_D + center_D)
            for chosen, sum_D in beam
            for k, center_D in enumerate(centers_KD)
        ]
        # The means of the codebooks that are still to come are part of what is aimed at.
        done = len(longer[0][0])
        aim_D = x_D - centers_NKD[done:].mean(dim=1).sum(dim=0)
        longer.sort(key=lambda hypothesis: float((hypothesis[1] - aim_D).square().sum()))
        beam = longer[:width]
    return beam[0][0]


@pytest.mark.parametrize("num_codebooks,codebook_size", [(2, 4), (4, 16), (8, 2), (4, 64)])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_beam_search_is_that_of_vectors(form, num_codebooks, codebook_size, width):
    generator = torch.Generator().manual_seed(num_codebooks + codebook_size)
    quantizer = Quantizer(6, codebook_size, num_codebooks, generator)
    centers_NKD = quantizer.get_centers().detach()
    x_BD = torch.randn(20, 6, generator=generator)
    found_BN = quantizer.search_tables().beam(x_BD, width, rounds=0)
    expected = [_beam_by_vectors(centers_NKD.double(), x_D, width) for x_D in x_BD.double()]
    assert found_BN.tolist() == [list(indexes) for indexes in expected]


def test_rounds_after_the_beam_search_go_on_from_there(form):
    generator = torch.Generator().manual_seed(2)
    quantizer = Quantizer(24, 16, 8, generator)
    x_BD = torch.randn(100, 24, generator=generator)
    tables = quantizer.search_tables()
    found_BN = tables.beam(x_BD, 4, rounds=0)
    assert torch.equal(tables.beam(x_BD, 4, rounds=2), tables.refine(x_BD, found_BN, 2))
    quantizer.beam = 4
    assert torch.equal(quantizer.encode(x_BD, 2, as_bytes=False), tables.beam(x_BD, 4, rounds=2))


def test_restarts_find_lower_errors_whatever_else_is_in_the_batch(form):
    generator = torch.Generator().manual_seed(2)
    quantizer = Quantizer(6, 16, 8, generator)
    x_BD = torch.randn(200, 6, generator=generator)
    tables = quantizer.search_tables()
    before_BN = quantizer.encode(x_BD, 3, as_bytes=False)
    quantizer.restarts = 6
    after_BN = quantizer.encode(x_BD, 3, as_bytes=False)
    before_B, after_B = (_squared_error(quantizer, x_BD, i) for i in (before_BN, after_BN))
    same_B = (after_BN == before_BN).all(dim=1)
    assert 0 < same_B.sum() < 150
    assert bool((after_B[~same_B] < before_B[~same_B]).all())
    assert torch.equal(quantizer.encode(x_BD[7:40], 3, as_bytes=False), after_BN[7:40])
    # Six, one after the other; and none after a search of no rounds.
    by_hand_BN = before_BN
    for number in range(6):
        by_hand_BN = tables.restart(x_BD, by_hand_BN, number, 2)
    assert torch.equal(by_hand_BN, after_BN)
    first_BN = quantizer.encode(x_BD, 0, as_bytes=False)
    quantizer.restarts = 0
    assert torch.equal(quantizer.encode(x_BD, 0, as_bytes=False), first_BN)


def test_restarts_replace_all_pairs_of_codebooks():
    tables = Quantizer(6, 16, 4, torch.Generator().manual_seed(2)).search_tables()
    entries_BN = tables.first_N.long()[None] + 3
    changed = [tables._replaced(entries_BN, n)[0] - tables.first_N for n in range(64)]
    assert all(bool(((c >= 0) & (c < 16)).all()) for c in changed)
    pairs = {tuple((c != 3).nonzero()[:, 0].tolist()) for c in changed}
    assert {pair for pair in pairs if len(pair) == 2} == {
        (i, j) for i in range(4) for j in range(i + 1, 4)
    }
    assert len(torch.stack(changed).unique()) == 16


def test_one_codebook_finds_the_nearest_center():
    ours = Quantizer(6, 16, 1, torch.Generator().manual_seed(0))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(x, ours.get_centers()[0]).argmin(dim=1)
    assert torch.equal(ours.encode(x, 1, as_bytes=False)[:, 0], nearest)
    assert torch.equal(ours.encode(x, 1)[:, 0], nearest.to(torch.uint8))
    ours.restarts = 2
    assert torch.equal(ours.encode(x, 1)[:, 0], nearest.to(torch.uint8))


def test_chunks_do_not_change_the_result(form, monkeypatch):
    ours, _ = pair(8)
    x = frames_for(ours, 101)
    whole = ours.encode(x)
    monkeypatch.setattr("mvqkd.quantizer.search._SEARCH_BYTES", {"cpu": 50_000, "cuda": 0})
    assert SearchTables(ours.get_centers().detach()).chunk_frames() < 50
    assert torch.equal(ours.encode(x), whole)
    assert torch.equal(ours.encode(x[:0]), whole[:0])


@pytest.mark.parametrize("num_codebooks", [1, 8, 32])
def test_chunks_fit_their_share_of_memory(num_codebooks):
    M, D, J1 = 256 * num_codebooks, 8, 17
    compiled = SearchTables(torch.zeros(num_codebooks, 256, D)).chunk_frames()
    # Logits, products with the centers; the frame as it is, in float32, and moved.
    assert compiled >= 256
    assert compiled * (2 * 4 * M + 3 * 4 * D) <= 32 * 2**20
    # Not on the CPU, the scores twice more, and the look-ups of the last level in three forms.
    by_torch = SearchTables(torch.zeros(num_codebooks, 256, D, device="meta")).chunk_frames()
    assert by_torch >= 256
    held = 4 * 4 * M + 3 * 4 * D + 3 * 4 * (num_codebooks // 2 * J1) ** 2
    assert by_torch * held <= 512 * 2**20


@pytest.mark.parametrize("leading", [(100_000,), (2, 50_000)])
def test_memory_beyond_input_and_output_is_bounded(leading):
    ours = Quantizer(1280, 16, 4, torch.Generator().manual_seed(0))
    # One frame, or two, again and again: those are not one block of frames.
    frame = torch.randn(*leading[:-1], 1, 1280, generator=torch.Generator().manual_seed(1))
    few = ours.encode(frame.expand(*leading[:-1], 9000, -1))

    def peak_bytes():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_bytes()
    codes = ours.encode(frame.expand(*leading, -1))  # 512 MB, were it ever whole
    assert codes.shape == (*leading, 2)
    assert bool((codes == few[..., :1, :]).all())
    assert peak_bytes() - before < 64 * 2**20


def test_threads_do_not_change_the_result(threads):
    ours, _ = pair(8)
    x = frames_for(ours, 300)
    threads(1)
    alone = ours.encode(x)
    threads(3)
    assert torch.equal(ours.encode(x), alone)
    found = {}

    def encode(name):
        found[name] = ours.encode(x)

    several = [threading.Thread(target=encode, args=(name,)) for name in range(3)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert len(found) == 3 and all(torch.equal(codes, alone) for codes in found.values())


def test_a_frame_that_is_no_numbers_harms_no_other():
    ours, _ = pair(8, 256)
    x = frames_for(ours, 40)
    expected = ours.encode(x)
    bad = x.clone()
    bad[3], bad[7, 2], bad[11], bad[12, 5] = float("nan"), float("inf"), 3e38, -float("inf")
    found = ours.encode(bad)
    sound = torch.ones(40, dtype=torch.bool)
    sound[[3, 7, 11, 12]] = False
    assert torch.equal(found[sound], expected[sound])
    ours.decode(found)
