"""The Conformer as a stream: the published values, and chunk by chunk against masked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvqkd.errors import RecipeError
from mvqkd.students.conformer import (
    Conformer,
    ConformerSettings,
    ConvolutionModule,
    RelPositionMultiheadAttention,
    StreamingEncoder,
    _AttentionFunction,
    _AttentionMask,
    chunk_mask,
    padding_mask,
    subsampled_lengths,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "conformer_streaming.npz")
META = json.loads(str(GOLDEN["meta"]))
MASKED = [case for case in META["cases"] if case["key"].startswith("masked")]
CHUNKED = [case for case in META["cases"] if case["key"].startswith("chunked")]


def golden(key):
    return torch.from_numpy(GOLDEN[key])


def assert_near(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def encoder():
    encoder = Conformer(ConformerSettings(**META["config"], causal=True)).eval()
    weights = {k.removeprefix("init/"): golden(k) for k in GOLDEN.files if k.startswith("init/")}
    encoder.load_state_dict(weights)
    return encoder


def small(**settings):
    torch.manual_seed(0)
    defaults = {
        "num_features": 20,
        "d_model": 16,
        "nhead": 2,
        "dim_feedforward": 32,
        "num_encoder_layers": 2,
        "cnn_module_kernel": 5,
        "subsampling_channels": (2, 3, 4),
    }
    return Conformer(ConformerSettings(**{**defaults, **settings}))


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case["key"])
@torch.no_grad()
def test_masked_equals_published(encoder, case, attention):
    out, lengths, _ = encoder(
        golden("x"), golden("x_lens"), chunk_size=case["chunk"], left_context=case["left"]
    )
    assert lengths.tolist() == golden(f"{case['key']}/lengths").tolist()
    assert_near(out, golden(case["key"]))


@pytest.mark.parametrize("case", CHUNKED, ids=lambda case: case["key"])
def test_chunked_equals_published_call_for_call(encoder, case, attention):
    states = encoder.get_init_state(2, case["left"])
    processed, outputs = torch.zeros(2, dtype=torch.int64), []
    need = case["feature_frames_per_call"]
    for start in GOLDEN[f"{case['key']}/first_feature_frame_of_each_call"]:
        out, lengths, states = encoder.streaming_forward(
            golden("x")[:, start : start + need],
            torch.tensor([need, need]),
            states,
            processed,
            left_context=case["left"],
            right_context=case["right"],
            chunk_size=case["chunk"],
        )
        processed = processed + lengths
        outputs.append(out)
    assert_near(torch.cat(outputs, dim=1), golden(case["key"]))


def encode_as_stream(stream, x, lens):
    """Outputs of each stream of a batch, fed chunk by chunk."""
    state, start, outputs = stream.init_state(len(lens)), 0, [[] for _ in lens]

    def collect(out, out_lens):
        for pieces, frames, n in zip(outputs, out, out_lens):
            pieces.append(frames[:n])

    while x.size(1) - start >= (size := stream.num_frames(state)):
        out, out_lens, state = stream.step(
            x[:, start : start + size], state, (lens - start).clamp(0, size)
        )
        collect(out, out_lens)
        start += size
    out, out_lens, state = stream.flush(x[:, start:], (lens - start).clamp(min=0), state)
    collect(out, out_lens)
    return [torch.cat(pieces) for pieces in outputs]


@pytest.mark.parametrize("chunk, left", [(1, 3), (4, 8), (8, 16), (16, 64), (5, -1)])
@torch.no_grad()
def test_stream_equals_masked_for_streams_of_different_lengths(encoder, chunk, left):
    lens = torch.tensor([163, 121, 38, 100, 9])
    x = golden("x")[[0, 1, 0, 1, 0]]
    streamed = encode_as_stream(StreamingEncoder(encoder, chunk, left), x, lens)
    for i, n in enumerate(lens.tolist()):
        alone, _, _ = encoder(
            x[i : i + 1, :n], lens[i : i + 1], chunk_size=chunk, left_context=left
        )
        assert_near(streamed[i], alone[0])


@torch.no_grad()
def test_every_length_of_stream_gives_its_frames(encoder):
    stream = StreamingEncoder(encoder, 2, 4)
    for n in range(7, 36):
        x = golden("x")[:1, :n]
        (out,) = encode_as_stream(stream, x, torch.tensor([n]))
        assert_near(out, encoder(x, torch.tensor([n]), chunk_size=2, left_context=4)[0][0])


@torch.no_grad()
def test_stream_with_look_ahead(encoder):
    # Look-ahead beyond the end equals no chunks at all.
    x, lens = golden("x")[:1, :60], torch.tensor([60])
    whole, _, _ = encoder(x, lens)
    (out,) = encode_as_stream(StreamingEncoder(encoder, 4, -1, right_context=14), x, lens)
    assert_near(out[:4], whole[0, :4])
    (out,) = encode_as_stream(StreamingEncoder(encoder, 3, 6, right_context=5), x, lens)
    assert out.size(0) == whole.size(1)
    assert torch.isfinite(out).all()


def test_chunk_mask():
    visible = ~chunk_mask(5, 2, 1)
    assert visible.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_dynamic_chunk_training_is_finite_and_repeats():
    encoder = small(
        causal=True, dynamic_chunk_training=True, num_left_chunks=1, short_chunk_size=3
    ).train()
    x, lens = torch.randn(3, 303, 20), torch.tensor([303, 60, 9])
    for seed in range(5):
        torch.manual_seed(seed)
        out, lengths, _ = encoder(x, lens)
        torch.manual_seed(seed)
        assert torch.equal(out, encoder(x, lens)[0])
        out.square().sum().backward()
    assert lengths.tolist() == subsampled_lengths(lens).tolist()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_depthwise_convolution_and_gradients(causal):
    torch.manual_seed(0)
    module = ConvolutionModule(6, 5, causal).double()
    conv = module.depthwise_conv
    x = torch.randn(3, 11, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 7, 6, dtype=torch.float64)
    wanted = [x, conv.weight, conv.bias, conv.weight_scale, conv.bias_scale]
    with torch.no_grad():
        conv.bias.normal_()
    actual, expected = module._depthwise(x), conv(x.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual, wanted, grad), torch.autograd.grad(expected, wanted, grad)
    ):
        assert torch.allclose(a, e)


def test_position_scores_by_definition(attention):
    # More frames than one block of queries.
    module = small().encoder.layers[0].self_attn
    encoder = small()
    x = torch.randn(2, 70, 16)
    out = module(x, encoder.encoder_pos.eval()(70, 70, x), _AttentionMask(None, torch.float32))
    q, k, v = (y.unflatten(-1, (2, 8)) for y in module.in_proj(x).chunk(3, dim=-1))
    q = q / 8**0.5
    distance = torch.arange(70).unsqueeze(1) - torch.arange(70)
    angle = distance.unsqueeze(-1) * 10000 ** (-torch.arange(0, 16, 2) / 16)
    table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)
    p = module.linear_pos(table).unflatten(-1, (2, 8))
    u = module.pos_bias_u * module.pos_bias_u_scale.exp()
    w = module.pos_bias_v * module.pos_bias_v_scale.exp()
    scores = torch.einsum("bihd,bjhd->bhij", q + u, k) + torch.einsum("bihd,ijhd->bhij", q + w, p)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    assert_near(out, module.out_proj(expected), 1e-5)


@pytest.mark.parametrize("cached", [0, 9])
def test_the_attentions_of_both_devices_have_the_same_gradients(cached):
    B, T, S, H, D = 2, 70, 70 + cached, 2, 4
    shapes = (B, T, H * D), (B, S, H * D), (B, S, H * D), (H, S + T - 1, D), (H, D), (H, D)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    # Padded queries that see padding alone among them.
    masked = padding_mask(torch.tensor([S, S - 40]), S).unsqueeze(1)
    masked = masked | chunk_mask(S, 8, 1)[cached:]
    mask = _AttentionMask(masked, torch.float64)
    assert mask.empty_rows.any()
    grad = torch.randn(B, T, H * D, generator=generator, dtype=torch.float64)
    outs = [
        attend(*inputs, mask)
        for attend in (_AttentionFunction.apply, RelPositionMultiheadAttention._attend)
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, grad) for out in outs))


def test_padding_does_not_change_an_utterance():
    encoder = small().eval()
    x = torch.randn(2, 90, 20)
    # The frame after the end is context of the last output frame, so it must be the same: 0.
    x[1, 50:] = 0
    together, lens, _ = encoder(x, torch.tensor([90, 50]))
    alone, _, _ = encoder(x[1:, :50], torch.tensor([50]))
    assert_near(together[1, : lens[1]], alone[0])


def test_position_table_grows():
    encoder = small().eval()
    x = torch.randn(1, 300, 20)
    first = encoder(x[:, :40], torch.tensor([40]))[0]
    encoder(x, torch.tensor([300]))
    assert_near(encoder(x[:, :40], torch.tensor([40]))[0], first, 1e-6)


def test_middle_outputs_and_geometry():
    encoder = small(middle_output_layers=[1, 2]).eval()
    out, _, middle = encoder(torch.randn(1, 50, 20), torch.tensor([50]))
    assert len(middle) == 2
    assert torch.equal(middle[1], out)
    assert encoder.frame_shift == pytest.approx(0.04)
    assert encoder.frame_offset == pytest.approx(0.035)
    assert encoder.receptive_field == 9


def test_frame_offset_is_the_centre_of_what_a_frame_sees():
    encoder = small(cnn_module_kernel=1)
    x = torch.randn(1, 90, 20, requires_grad=True)
    encoder.encoder_embed(x)[0, 10].sum().backward()
    seen = x.grad[0].abs().sum(dim=1).nonzero().flatten() * 0.01 + 0.005
    assert seen.numel() == encoder.receptive_field
    assert seen.mean().item() == pytest.approx(encoder.frame_offset + 10 * encoder.frame_shift)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"subsampling_factor": 2}, "subsampling_factor"),
        ({"d_model": 15}, "d_model"),
        ({"cnn_module_kernel": 4}, "cnn_module_kernel"),
        ({"dynamic_chunk_training": True}, "causal"),
        ({"middle_output_layers": [3]}, "middle_output_layers"),
        ({"num_features": 5}, "num_features"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        small(**settings)


def test_bad_input_is_refused(encoder):
    with pytest.raises(RecipeError, match="too short"):
        encoder(torch.zeros(2, 20, 20), torch.tensor([20, 6]))
    with pytest.raises(RecipeError, match="left_context"):
        encoder(torch.zeros(1, 60, 20), torch.tensor([60]), chunk_size=4, left_context=6)
    with pytest.raises(RecipeError, match="causal"):
        StreamingEncoder(small(), 4, 8)
