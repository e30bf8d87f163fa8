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
    load_quantizer,
    save_quantizer,
)
from tests.quantizer.peer import frames_for, pair


@pytest.mark.parametrize("codebook_size", [16, 256])
def test_bytes_and_decoding_are_the_peers(codebook_size):
    ours, peer = pair(4, codebook_size)
    x = frames_for(ours, 24).view(2, 3, 4, -1)
    codes = ours.encode(x)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, peer.encode(x))
    torch.testing.assert_close(ours.decode(codes), peer.decode(codes))
    plain = ours.encode(x, as_bytes=False)
    torch.testing.assert_close(ours.decode(plain), ours.decode(codes))


@pytest.mark.parametrize(
    "num_codebooks,codebook_size,rounds",
    [
        (4, 16, 2),
        (4, 256, 2),
        (1, 16, 0),
        (1, 256, 0),
        (2, 256, 0),
        (2, 256, 3),
        (8, 16, 1),
        (16, 16, 5),
    ],
)
def test_losses_and_gradients_are_the_peers(num_codebooks, codebook_size, rounds):
    ours, peer = pair(num_codebooks, codebook_size)
    x = frames_for(ours, 60)
    gradients = []
    losses = [ours.compute_loss(x, rounds), peer.compute_loss(x, rounds)]
    for a, b in zip(*losses):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for module, parts in zip((ours, peer), losses):
        (parts[0] + parts[1] + 0.01 * parts[2]).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters()})
    for name, expected in gradients[1].items():
        limit = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradients[0][name], expected, rtol=0.0, atol=limit)


def test_product_and_correlations_are_the_peers():
    ours, peer = pair(8)
    product, expected = ours.get_product_quantizer(), peer.get_product_quantizer()
    for name, tensor in expected.state_dict().items():
        if name != "id_buf":
            torch.testing.assert_close(product.state_dict()[name], tensor)
    torch.testing.assert_close(
        ours.compute_codebook_correlations(), peer.compute_codebook_correlations()
    )
    torch.testing.assert_close(ours.get_data_mean(), peer.get_data_mean())


def test_state_dicts_load_both_ways():
    ours, peer = pair(2)
    fresh = PeerQuantizer(12, 16, 2)
    fresh.load_state_dict(ours.state_dict())
    assert fresh.get_id() == ours.get_id() == peer.get_id()
    assert set(ours.state_dict()) == set(peer.state_dict())


def test_tables_follow_the_centers():
    ours, _ = pair(2)
    x = frames_for(ours, 30)
    ours.encode(x)
    other, _ = pair(2, seed=9)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours.encode(x), other.encode(x))
    assert torch.equal(copy.deepcopy(ours).encode(x), ours.encode(x))
    assert pickle.loads(pickle.dumps(ours))._tables is None


@pytest.mark.parametrize("through", ["compute_loss with rounds", "compute_loss", "decode"])
def test_tables_follow_a_fused_optimizer(through):
    # It changes the weights without telling that it did.
    ours, _ = pair(2)
    x = frames_for(ours, 30)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.5, fused=True)
    codes = ours.encode(x)
    if through == "decode":
        loss = (ours.decode(codes) - x).square().sum()
    else:
        loss = ours.compute_loss(x, 1 if "rounds" in through else 0)[0]
    loss.backward()
    optimizer.step()
    assert not torch.equal(ours.encode(x), codes)
    assert torch.equal(ours.encode(x), copy.deepcopy(ours).encode(x))


def test_tables_of_frozen_centers_are_kept():
    ours, _ = pair(2)
    ours.requires_grad_(False)
    x = frames_for(ours, 30)
    tables = ours.search_tables()
    ours.compute_loss(x, 1)
    ours.decode(ours.encode(x))
    assert ours.search_tables() is tables


def test_decode_passes_gradient_and_refuses_padding():
    ours, _ = pair(2)
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
    ours, _ = pair(4)
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
    x = frames_for(ours, 10)
    assert torch.equal(peer.encode(x), loaded.encode(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantizer.pt", "quantizer.pt.json"]

    torch.save(peer.state_dict(), tmp_path / "peer.pt")
    from_peer, facts = load_quantizer(tmp_path / "peer.pt")
    assert torch.equal(from_peer.encode(x), loaded.encode(x))
    assert facts["sha256"] == meta["sha256"] and "mean" not in facts


def test_the_hash_sees_every_weight_and_not_the_name():
    ours, _ = pair(2)
    before = ours.weights_sha256()
    ours.set_id_from_weights()
    assert ours.weights_sha256() == before and ours.get_id() == before[:8]
    with torch.no_grad():
        ours.to_logits.bias[3] += 1e-3
    assert ours.weights_sha256() != before


def test_the_search_is_part_of_hash_and_name():
    ours, _ = pair(2)
    hashes, ids = set(), set()
    for search in ((0, 0), (4, 0), (5, 0), (0, 4), (4, 4)):
        ours.beam, ours.restarts = search
        ours.set_id_from_weights()
        hashes.add(ours.weights_sha256())
        ids.add(ours.get_id())
    assert len(hashes) == len(ids) == 5


@pytest.mark.parametrize("beam,restarts", [(0, 0), (1, 0), (16, 0), (0, 64), (256, 2)])
def test_a_file_copied_alone_encodes_with_its_search(tmp_path, beam, restarts):
    ours, _ = pair(4)
    ours.beam, ours.restarts = beam, restarts
    ours.set_id_from_weights()
    path, copied = tmp_path / "quantizer.pt", tmp_path / "copied.pt"
    save_quantizer(path, ours, {})
    copied.write_bytes(path.read_bytes())
    x = frames_for(ours, 60)
    for file in (path, copied):
        loaded, meta = load_quantizer(file)
        assert loaded.beam == meta["beam"] == beam
        assert loaded.restarts == meta["restarts"] == restarts
        assert meta["sha256"] == ours.weights_sha256()
        assert torch.equal(loaded.encode(x, 1), ours.encode(x, 1))
    # The authors' package does not know of it, and keeps the name.
    peer = PeerQuantizer(12, 16, 4)
    peer.load_state_dict(torch.load(path, weights_only=True))
    torch.save(peer.state_dict(), copied)
    found = load_quantizer(copied)[0]
    assert (found.beam, found.restarts) == (beam, restarts)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "shapes", "nan", "missing"])
def test_damaged_files_get_one_line(tmp_path, damage):
    ours, _ = pair(2)
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
    save_quantizer(path, pair(2)[0], {})
    sidecar = tmp_path / "quantizer.pt.json"
    facts = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**facts, "sha256": "0" * 64}))
    with pytest.raises(RecipeError, match="written for 000000000000"):
        load_quantizer(path)
    sidecar.write_text(json.dumps({**facts, "beam": 8}))
    with pytest.raises(RecipeError, match="weights and search hash to"):
        load_quantizer(path)
    for text in ("{", "[]", json.dumps({**facts, "beam": None})):
        sidecar.write_text(text)
        with pytest.raises(RecipeError, match="json: damaged"):
            load_quantizer(path)
