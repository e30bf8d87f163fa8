"""The quantizer against the authors' package, and its files."""

import copy
import json
import pickle

import pytest
import torch
from multi_quantization import Quantizer as PeerQuantizer

from mvqkd.errors import RecipeError
from mvqkd.quantizer.quantizer import (
    Quantizer,
    SearchTables,
    load_quantizer,
    num_candidates,
    save_quantizer,
)


def _pair(num_codebooks, codebook_size=16, dim=12, seed=0):
    """Ours and the peer's with the same weights, far from zero mean, and frames for them."""
    torch.manual_seed(seed)
    peer = PeerQuantizer(dim, codebook_size, num_codebooks)
    with torch.no_grad():
        peer.centers.copy_(
            0.4 * torch.randn(num_codebooks, codebook_size, dim)
            + torch.randn(num_codebooks, 1, dim)
        )
        peer.to_logits.weight.copy_(peer.centers.view(-1, dim))
        peer.centers_scale.fill_(0.03)
        peer.logits_scale.fill_(-0.02)
    ours = Quantizer(dim, codebook_size, num_codebooks)
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def _frames(quantizer, num_frames, seed=5):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_frames, quantizer.dim, generator=generator)
    return 1.5 * noise + quantizer.get_data_mean()


def _squared_error(quantizer, x, indexes):
    return ((quantizer.decode(indexes) - x).double() ** 2).sum(dim=1)


@pytest.mark.parametrize("num_codebooks", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("codebook_size", [16, 256])
def test_indexes_are_the_peers(num_codebooks, codebook_size):
    # The peer holds a vector per candidate: few frames where it would take long.
    ours, peer = _pair(num_codebooks, codebook_size, dim=24)
    x = _frames(ours, 2400 // num_codebooks if codebook_size == 16 else 192 // num_codebooks)
    expected = peer._compute_indexes(x, 0)
    for rounds in range(6):
        if rounds:
            expected = peer._refine_indexes(x, expected)
        found = ours.encode(x, refine_indexes_iters=rounds, as_bytes=False)
        # A frame may differ where two choices tie within rounding.
        different = (expected != found).any(dim=1)
        assert different.float().mean() <= 0.001
        torch.testing.assert_close(
            _squared_error(ours, x, found)[different],
            _squared_error(ours, x, expected)[different],
            rtol=1e-4,
            atol=1e-4,
        )


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


def test_one_codebook_finds_the_nearest_center():
    ours = Quantizer(6, 16, 1, torch.Generator().manual_seed(0))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(x, ours.get_centers()[0]).argmin(dim=1)
    assert torch.equal(ours.encode(x, 1, as_bytes=False)[:, 0], nearest)
    assert torch.equal(ours.encode(x, 1)[:, 0], nearest.to(torch.uint8))


def test_chunks_do_not_change_the_result(monkeypatch):
    ours, _ = _pair(8)
    x = _frames(ours, 101)
    whole = ours.encode(x)
    monkeypatch.setattr(
        "mvqkd.quantizer.quantizer._SEARCH_BYTES", {"cpu": 200_000, "cuda": 200_000}
    )
    assert SearchTables(ours.get_centers().detach()).chunk_frames() < 50
    assert torch.equal(ours.encode(x), whole)
    assert torch.equal(ours.encode(x[:0]), whole[:0])


@pytest.mark.parametrize("codebook_size", [16, 256])
def test_bytes_and_decoding_are_the_peers(codebook_size):
    ours, peer = _pair(4, codebook_size)
    x = _frames(ours, 24).view(2, 3, 4, -1)
    codes = ours.encode(x)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, peer.encode(x))
    torch.testing.assert_close(ours.decode(codes), peer.decode(codes))
    plain = ours.encode(x, as_bytes=False)
    torch.testing.assert_close(ours.decode(plain), ours.decode(codes))


@pytest.mark.parametrize("codebook_size", [16, 256])
def test_losses_and_gradients_are_the_peers(codebook_size):
    ours, peer = _pair(4, codebook_size)
    x = _frames(ours, 60)
    gradients = []
    losses = [ours.compute_loss(x, 2), peer.compute_loss(x, 2)]
    for a, b in zip(*losses):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for module, parts in zip((ours, peer), losses):
        (parts[0] + parts[1] + 0.01 * parts[2]).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters()})
    for name, expected in gradients[1].items():
        limit = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradients[0][name], expected, rtol=0.0, atol=limit)


def test_product_and_correlations_are_the_peers():
    ours, peer = _pair(8)
    product, expected = ours.get_product_quantizer(), peer.get_product_quantizer()
    for name, tensor in expected.state_dict().items():
        if name != "id_buf":
            torch.testing.assert_close(product.state_dict()[name], tensor)
    torch.testing.assert_close(
        ours.compute_codebook_correlations(), peer.compute_codebook_correlations()
    )
    torch.testing.assert_close(ours.get_data_mean(), peer.get_data_mean())


def test_state_dicts_load_both_ways():
    ours, peer = _pair(2)
    fresh = PeerQuantizer(12, 16, 2)
    fresh.load_state_dict(ours.state_dict())
    assert fresh.get_id() == ours.get_id() == peer.get_id()
    assert set(ours.state_dict()) == set(peer.state_dict())


def test_tables_follow_the_centers():
    ours, _ = _pair(2)
    x = _frames(ours, 30)
    ours.encode(x)
    other, _ = _pair(2, seed=9)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours.encode(x), other.encode(x))
    assert torch.equal(copy.deepcopy(ours).encode(x), ours.encode(x))
    assert pickle.loads(pickle.dumps(ours))._tables is None


def test_decode_passes_gradient_and_refuses_padding():
    ours, _ = _pair(2)
    indexes = torch.tensor([[1, 2], [1, 15]])
    ours.decode(indexes).sum().backward()
    scale = (10.0 * ours.centers_scale).exp().item()
    assert ours.centers.grad[0, 1, 0].item() == pytest.approx(2 * scale)
    with pytest.raises(ValueError, match="-100"):
        ours.decode(torch.full((3, 2), -100))
    with pytest.raises(ValueError, match="codebooks"):
        ours.decode(torch.zeros(3, 5, dtype=torch.long))


def test_bad_sizes_are_refused():
    with pytest.raises(RecipeError, match="num_codebooks: 3"):
        Quantizer(8, 16, 3)
    with pytest.raises(RecipeError, match="codebook_size: 100"):
        Quantizer(8, 100, 2)
    with pytest.raises(RecipeError, match="dimension 7"):
        Quantizer(8, 16, 2).encode(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="byte"):
        Quantizer(8, 512, 2).encode(torch.zeros(4, 8))


def test_files_go_both_ways(tmp_path):
    ours, _ = _pair(4)
    path = tmp_path / "quantizer.pt"
    mean = torch.linspace(-1, 1, 12) / 3
    save_quantizer(path, ours, {"teacher": "tiny", "layer": 2, "mean": mean, "std": mean.abs()})
    loaded, meta = load_quantizer(path)
    assert torch.equal(meta["mean"], mean) and torch.equal(meta["std"], mean.abs())
    assert (meta["teacher"], meta["layer"], meta["num_codebooks"]) == ("tiny", 2, 4)
    assert meta["quantizer_id"] == ours.get_id() == loaded.get_id()
    assert meta["sha256"] == ours.weights_sha256() == loaded.weights_sha256()
    peer = PeerQuantizer(12, 16, 4)
    peer.load_state_dict(torch.load(path, weights_only=True))
    x = _frames(ours, 10)
    assert torch.equal(peer.encode(x), loaded.encode(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantizer.pt", "quantizer.pt.json"]

    torch.save(peer.state_dict(), tmp_path / "peer.pt")
    from_peer, facts = load_quantizer(tmp_path / "peer.pt")
    assert torch.equal(from_peer.encode(x), loaded.encode(x))
    assert facts["sha256"] == meta["sha256"] and "mean" not in facts


def test_the_hash_sees_every_weight_and_not_the_name():
    ours, _ = _pair(2)
    before = ours.weights_sha256()
    ours.set_id_from_weights()
    assert ours.weights_sha256() == before and ours.get_id() == before[:8]
    with torch.no_grad():
        ours.to_logits.bias[3] += 1e-3
    assert ours.weights_sha256() != before


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "shapes", "nan", "missing"])
def test_damaged_files_get_one_line(tmp_path, damage):
    ours, _ = _pair(2)
    path = tmp_path / "quantizer.pt"
    if damage == "nan":
        with torch.no_grad():
            ours.centers[0, 0, 0] = float("nan")
    save_quantizer(path, ours, {})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a torch file")
    elif damage == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage == "shapes":
        torch.save({**ours.state_dict(), "to_logits.bias": torch.zeros(3)}, path)
    elif damage == "missing":
        path.unlink()
    with pytest.raises(RecipeError, match=r"quantizer\.pt: .*; .*(again|stage 4)") as error:
        load_quantizer(path)
    assert "\n" not in str(error.value)


def test_sidecar_of_other_weights_is_refused(tmp_path):
    path = tmp_path / "quantizer.pt"
    save_quantizer(path, _pair(2)[0], {})
    sidecar = tmp_path / "quantizer.pt.json"
    facts = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**facts, "sha256": "0" * 64}))
    with pytest.raises(RecipeError, match="written for 000000000000"):
        load_quantizer(path)
    sidecar.write_text("{")
    with pytest.raises(RecipeError, match="json: damaged"):
        load_quantizer(path)
