"""The transducer against the published recipe's: outputs, warm-up, gradients, 30 training steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvqkd.errors import RecipeError
from mvqkd.losses.codebook import JointCodebookLoss
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.scaling import ActivationBalancer
from mvqkd.students.transducer import TransducerSettings, build_transducer
from mvqkd.training.optim import Eden, Eve

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "conformer_transducer.npz")
META = json.loads(str(GOLDEN["meta"]))
CONFIG = META["config"]


def golden(key):
    return torch.from_numpy(np.asarray(GOLDEN[key]))


def assert_near(actual, expected, tolerance, name=""):
    """The largest difference, relative to the tensor's largest value."""
    expected = expected.to(actual.dtype)
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item(), (name, difference)


def make_model(balance_prob):
    sizes = ("num_features", "d_model", "nhead", "dim_feedforward", "num_encoder_layers")
    settings = TransducerSettings(
        encoder=ConformerSettings(
            **{key: CONFIG[key] for key in sizes},
            cnn_module_kernel=CONFIG["cnn_module_kernel"],
            # The reference counts layers from 0.
            middle_output_layers=[CONFIG["middle_output_layer"] + 1],
            dropout=0.0,
            layer_dropout=0.0,
        ),
        decoder_dim=CONFIG["decoder_dim"],
        joiner_dim=CONFIG["joiner_dim"],
        vocab_size=CONFIG["vocab_size"],
        context_size=CONFIG["context_size"],
    )
    model = build_transducer(settings)
    model.codebook_loss_net = JointCodebookLoss(
        CONFIG["d_model"],
        CONFIG["num_codebooks_teacher"] * CONFIG["teacher_frames_per_student_frame"],
        is_joint=False,
    )
    weights = {k.removeprefix("init/"): golden(k) for k in GOLDEN.files if k.startswith("init/")}
    model.load_state_dict(weights)
    for module in model.modules():
        if isinstance(module, ActivationBalancer):
            module.balance_prob = balance_prob
    return model


def compute_losses(model, warmup=1.0):
    out = model(
        golden("x"),
        golden("x_lens"),
        META["tokens"],
        prune_range=4,
        am_scale=0.0,
        lm_scale=0.25,
        warmup=warmup,
    )
    (middle,) = out.middle_outputs
    num_frames = middle.size(1)
    indexes = golden("codebook_indexes")[:, : 2 * num_frames].reshape(3, num_frames, -1)
    codebook = model.codebook_loss_net(middle, indexes)
    return torch.stack([out.simple_loss_B.sum(), out.pruned_loss_B.sum(), codebook]), out


def check_outputs(model, prefix, tolerance):
    model.eval()
    with torch.no_grad():
        encoder_out, lengths, (middle,) = model.encoder(golden("x"), golden("x_lens"))
        decoder_out = model.decoder(torch.tensor([[0, *META["tokens"][0]]]))
        joiner_out = model.joiner(encoder_out[:1, :3].unsqueeze(2), decoder_out[:, None, :1])
    assert lengths.tolist() == golden(f"{prefix}/lengths").tolist()
    assert_near(encoder_out, golden(f"{prefix}/encoder_out"), tolerance)
    assert_near(middle, golden(f"{prefix}/middle"), tolerance)
    assert_near(decoder_out, golden(f"{prefix}/decoder_out"), tolerance)
    assert_near(joiner_out, golden(f"{prefix}/joiner_out"), tolerance)


def test_outputs_in_evaluation(attention):
    check_outputs(make_model(0.0), "eval", 1e-4)


@pytest.mark.parametrize("warmup", [0.3, 0.95])
def test_warmup(warmup, attention):
    losses, out = compute_losses(make_model(0.0).train(), warmup)
    assert_near(losses, golden(f"warmup{warmup}/losses"), 1e-4)
    assert_near(out.encoder_out_BTC, golden(f"warmup{warmup}/encoder_out"), 1e-4)


def well_conditioned(name, value):
    """Parts of a weight whose gradient is more than rounding (see ``ill_conditioned`` in meta)."""
    if name.endswith("self_attn.linear_pos.weight"):
        return None
    if name.endswith("self_attn.in_proj.bias"):
        d_model = CONFIG["d_model"]
        return torch.cat([value[:d_model], value[2 * d_model :]])
    return value


@pytest.mark.parametrize("mode, balance_prob", [("off", 0.0), ("on", 1.0)])
def test_thirty_steps(mode, balance_prob, attention):
    prefix = f"balancers_{mode}"
    model = make_model(balance_prob).train()
    schedule = META["optimizer"]
    optimizer = Eve(model.parameters(), lr=schedule["lr"])
    scheduler = Eden(optimizer, schedule["lr_batches"], schedule["lr_epochs"])
    history = []
    for step in range(30):
        scheduler.step_epoch(step // 10)
        scheduler.step_batch(step + 1)
        losses, _ = compute_losses(model)
        total = losses @ torch.tensor([0.5, 1.0, 0.1])
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            for name, p in model.named_parameters():
                assert_near(p.grad, golden(f"{prefix}/grad0/{name}"), 1e-4, name)
        optimizer.step()
        history.append([*losses.tolist(), total.item(), optimizer.param_groups[0]["lr"]])

    expected = golden(f"{prefix}/history")
    for column, name in enumerate(META["history_columns"]):
        actual = torch.tensor(history, dtype=torch.float64)[:, column]
        assert_near(actual, expected[:, column], 1e-3, name)
    for name, p in model.named_parameters():
        value = well_conditioned(name, p.detach())
        if value is not None:
            assert_near(value, well_conditioned(name, golden(f"{prefix}/final/{name}")), 1e-3, name)
    check_outputs(model, f"{prefix}/final_eval", 1e-3)


def test_every_parameter_gets_a_gradient_and_losses_are_per_utterance():
    model = make_model(0.0).train()
    losses, out = compute_losses(model)
    losses.sum().backward()
    assert out.simple_loss_B.shape == out.pruned_loss_B.shape == (3,)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_utterances_without_transcript_have_no_losses_and_zero_gradients():
    model = make_model(0.0).eval()
    model.codebook_loss_net = None
    generator = torch.Generator().manual_seed(4)
    x_BTF = torch.randn(3, 60, CONFIG["num_features"], generator=generator)
    lens_B, tokens = torch.tensor([60, 50, 55]), [[1, 2, 3], [4], [2, 2]]
    whole = model(x_BTF, lens_B, tokens)
    some = model(x_BTF, lens_B, [tokens[0], None, tokens[2]])
    for losses_B, wanted_B in zip(some[:2], whole[:2]):
        torch.testing.assert_close(losses_B, wanted_B * torch.tensor([1.0, 0.0, 1.0]))
    none = model(x_BTF, lens_B, [None] * 3)
    assert torch.equal(torch.stack(none[:2]), torch.zeros(2, 3))
    (none.simple_loss_B.sum() + none.pruned_loss_B.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() == 0, name


def test_more_tokens_than_the_prune_range_reaches_have_a_loss():
    model = make_model(0.0).eval()
    x_BTF = torch.randn(2, 60, CONFIG["num_features"], generator=torch.Generator().manual_seed(5))
    # 14 and 3 frames; a range of 5 comes to 12 tokens on 3 frames, one of 6 to 15.
    tokens, lens_B = [[1, 2, 3], [4, 5] * 7], torch.tensor([60, 16])
    with pytest.warns(UserWarning, match="s_range: 5 leaves an utterance .* raised to 6"):
        out = model(x_BTF, lens_B, tokens)
    assert out.encoder_lens_B.tolist() == [14, 3]
    assert out.simple_loss_B.isfinite().all() and out.pruned_loss_B.isfinite().all()


def test_bf16_is_close_to_float32():
    gradients = []
    for enabled in (False, True):
        model = make_model(0.0).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses, _ = compute_losses(model)
        losses.sum().backward()
        gradient = torch.cat([p.grad.flatten() for _, p in model.named_parameters()])
        gradients.append((losses.detach(), gradient))
    (losses, gradient), (losses_half, gradient_half) = gradients
    torch.testing.assert_close(losses_half, losses, rtol=2e-2, atol=0)
    assert torch.nn.functional.cosine_similarity(gradient, gradient_half, dim=0) > 0.99


def test_decoder_with_context_equals_padded():
    decoder = make_model(0.0).decoder
    tokens = torch.tensor([[0, 3, 5, 1]])
    assert torch.equal(decoder(tokens, need_pad=False), decoder(tokens)[:, 1:])


def test_bad_settings_are_refused():
    with pytest.raises(RecipeError, match="vocab_size"):
        TransducerSettings(vocab_size=1)
    with pytest.raises(RecipeError, match="prune_range"):
        TransducerSettings(prune_range=1)
