"""reddino.py, the method: network, heads, targets, losses, optimiser and weights against closed forms and timm."""

import dataclasses
import io
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import augment
import reddino
from eval import load_weights, read_backbone, vit_from_state
from reddino import DINO, UserError, VisionTransformer, build_vit, configure

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def a_network_of_its_own(monkeypatch):
    """What is tested here does not depend on which network and recipe nano happens to have."""
    monkeypatch.setitem(reddino.ARCHS, "nano", dict(embed_dim=192, depth=6, heads=3, patch_size=8))
    monkeypatch.setitem(reddino.PRESETS, "nano", dict(local_crops=0, global_size=64))


def tiny(**options):
    """A Config whose networks take milliseconds: 40 prototypes, 4 images of 32 pixels, i.e. 4 x 4 patches of 8."""
    small = dict(arch="nano", prototypes=40, head_hidden=24, head_bottleneck=16, batch_size=4, patch_size=80,
                 global_size=32, local_size=16, local_crops=0, layerscale=1.0)  # fmt: skip
    return configure(**{**small, **options})


def step(model, *batch):
    """The losses of a whole step by name: all lessons of a batch (global views, local views, masks, temperature). Their
    gradients are then in the student's parameters."""
    losses = {}
    for lesson in model.teach(*batch):
        terms, roots = model(*lesson)
        torch.autograd.backward(*zip(*roots))
        for name, value in terms.items():
            losses[name] = losses.get(name, 0) + value
    return losses


def shaken(module, seed=0):
    """The module with every parameter random and LayerScale near 1: at 1e-5 all blocks would be the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            gain = "gamma" in name or (p.dim() == 1 and name.endswith("weight"))
            p.copy_(1 + 0.3 * noise if gain else noise * (0.5 if p.dim() < 2 else p[0].numel() ** -0.5))
    return module


def close(a, b, tolerance=1e-4):
    """Largest difference relative to the largest value."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# ------------------------------------------------------------------------------------------- products by oneDNN

@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch comes without oneDNN")
@pytest.mark.parametrize("shape", [(1, 24), (37, 24), (4, 17, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_by_onednn_is_the_one_in_float64(shape, bias, monkeypatch):
    monkeypatch.setattr(reddino, "MKL_IS_SLOW", True)
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    wanted, given = [], [wide[..., ::2], torch.randn(40, 24)] + [torch.randn(40)] * bias  # x is not contiguous
    for dtype, product in ((torch.float32, reddino.product), (torch.float64, F.linear)):
        args = [t.to(dtype).requires_grad_() for t in given]
        y = product(*args)
        assert (type(y.grad_fn).__name__ == "ProductBackward") == (dtype == torch.float32 and y.numel() > 0)
        d = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
        wanted.append([y, *torch.autograd.grad(y, args, d)])
    for a, b in zip(*wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch comes without oneDNN")
@pytest.mark.parametrize("options", [{}, dict(separate_heads=True), dict(checkpoint_activations=True)])
def test_a_step_by_onednn_is_the_plain_one(options, monkeypatch):
    cfg, results = tiny(local_crops=1, **options), []
    for by_onednn in (True, False):
        monkeypatch.setattr(reddino, "MKL_IS_SLOW", by_onednn)
        torch.manual_seed(0)
        model = DINO(cfg)
        shaken(model.student)
        views = [v.float() for v in inputs(cfg)[:2]]
        losses = step(model, *views, *inputs(cfg)[2:], 0.1)
        results.append([*losses.values(), *(p.grad for p in model.student.parameters())])
    for a, b in zip(*results):
        close(a, b)


# ------------------------------------------------------------------------------------------- the network, against timm


@pytest.mark.parametrize("name,depth,registers", [
    ("vit_small_patch14_dinov2", 3, 0), ("vit_giant_patch14_dinov2", 1, 0), ("vit_small_patch14_reg4_dinov2", 3, 4),
])  # fmt: skip
def test_timms_weights_give_timms_outputs(name, depth, registers, tmp_path):
    other = shaken(timm.create_model(name, pretrained=False, img_size=112, depth=depth).eval())
    torch.save(other.state_dict(), tmp_path / "timm.pth")
    ours = vit_from_state(read_backbone(str(tmp_path / "timm.pth")))
    assert not ours.training and ours.img_size == 112
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = other.forward_features(x)
        cls, patches = ours.forward_features(x)
        close(cls, tokens[:, 0])
        close(patches, tokens[:, 1 + registers :])
        close(ours(x), tokens[:, 0])


def test_our_backbone_loads_into_timm():
    ours = shaken(build_vit("vits14", 56, depth=2)).eval()
    other = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=56, depth=2).eval()
    missing, unexpected = other.load_state_dict(ours.state_dict(), strict=False)
    assert missing == [] and unexpected == ["mask_token"]
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        close(ours.forward_features(x)[1], other.forward_features(x)[:, 1:])


@pytest.mark.parametrize("arch,millions", [("vits14", 22), ("vitb14", 86), ("vitl14", 304), ("vitg14", 1136)])
def test_parameter_counts(arch, millions):
    with torch.device("meta"):
        ours = build_vit(arch, 518)
        name = {"s": "small", "b": "base", "l": "large", "g": "giant"}[arch[3]]
        other = timm.create_model(f"vit_{name}_patch14_dinov2", pretrained=False)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in other.parameters()) + ours.embed_dim  # the mask token, which timm has not
    assert count / 1e6 == pytest.approx(millions, rel=0.015)


def test_a_fresh_network_is_initialised_as_dinov2s():
    torch.manual_seed(0)
    vit = build_vit("vits14", depth=2, registers=4).requires_grad_(False)
    assert all(torch.all(b.ls1.gamma == 1e-5) and torch.all(b.ls2.gamma == 1e-5) for b in vit.blocks)
    assert vit.blocks[0].mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.03) and not vit.blocks[0].attn.qkv.bias.any()
    assert vit.pos_embed.std() == pytest.approx(0.02, rel=0.03) and vit.cls_token.std() < 1e-5
    assert not vit.mask_token.any() and vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6


def test_masked_patches_lose_their_content_and_keep_their_place():
    vit = shaken(build_vit("nano", 32)).eval()
    x, other = torch.randn(2, 1, 3, 32, 32)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, [3, 4, 9]] = True
    hidden = other.clone()
    keep = ~masks.view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hidden = torch.where(keep, x, other)  # the same where it is seen, something else below the mask
    with torch.no_grad():
        assert torch.equal(vit.forward_features(x, masks)[1], vit.forward_features(hidden, masks)[1])
        inputs = vit.tokens(x, masks)[0, 1:]
        assert torch.allclose(inputs[[3, 4, 9]], vit.mask_token + vit.pos_embed[0, [4, 5, 10]])
        assert not torch.equal(vit(x), vit(hidden))


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for flag in (False, True):
        vit = shaken(build_vit("nano", 32, depth=2, drop_path=0.4)).train()
        vit.checkpoint_activations = flag
        torch.manual_seed(5)  # the recomputed blocks must drop what they dropped
        vit(torch.ones(6, 3, 32, 32)).pow(2).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in vit.parameters() if p.grad is not None]))
    assert torch.equal(*grads) and grads[0].any()


# ------------------------------------------------------------------------------------------- positions at other sizes


def cubic_weights(n, size):
    """[size, n] of bicubic interpolation (a = -0.75, edges repeated), scale (size + 0.1) / n as DINOv2, float64."""

    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    weights = np.zeros((size, n))
    for i in range(size):
        source = (i + 0.5) * n / (size + 0.1) - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            weights[i, min(max(tap, 0), n - 1)] += kernel(source - tap)
    return weights


@pytest.mark.parametrize("height,width", [(16, 16), (7, 7), (20, 45), (37, 16)])
def test_positions_are_resized_by_dinov2s_formula(height, width):
    pos = torch.randn(1, 1370, 5, generator=torch.Generator().manual_seed(0))
    grid = pos[0, 1:].double().numpy().reshape(37, 37, 5)
    expected = np.einsum("iy,jx,yxd->ijd", cubic_weights(37, height), cubic_weights(37, width), grid)
    resized = reddino.resize_pos_embed(pos, height, width)
    assert resized.shape == (1, 1 + height * width, 5) and torch.equal(resized[:, 0], pos[:, 0])
    np.testing.assert_allclose(resized[0, 1:].numpy().reshape(height, width, 5), expected, atol=2e-5)
    exact = F.interpolate(pos[:, 1:].reshape(1, 37, 37, 5).permute(0, 3, 1, 2), (height, width), mode="bicubic")
    assert (exact.permute(0, 2, 3, 1)[0].numpy() - expected).std() > 1e-3  # so that the 0.1 shows


def test_positions_of_models_with_registers_are_antialiased_as_pillow_does():
    pos = torch.randn(1, 1370, 1, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pos[0, 1:, 0].numpy().reshape(37, 37))
    expected = np.asarray(picture.resize((12, 16), Image.Resampling.BICUBIC))
    resized = reddino.resize_pos_embed(pos, 16, 12, registers=4)[0, 1:, 0].numpy().reshape(16, 12)
    np.testing.assert_allclose(resized, expected, atol=1e-5)


def test_any_size_that_the_patches_divide():
    vit = shaken(build_vit("nano", 64, depth=2)).eval()
    cls, patches = vit.forward_features(torch.randn(2, 3, 40, 72))
    assert cls.shape == (2, 192) and patches.shape == (2, 5 * 9, 192)
    with pytest.raises(UserError, match="40"):
        vit(torch.zeros(1, 3, 40, 70))


def test_positions_stretched_at_loading_or_on_the_way_are_the_same():
    state = shaken(build_vit("nano", 96, depth=2)).state_dict()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        close(vit_from_state(state, img_size=48)(x), vit_from_state(state)(x), 1e-6)
    assert vit_from_state(state, img_size=48).pos_embed.shape == (1, 37, 192)


# ------------------------------------------------------------------------------------------- stochastic depth


@pytest.mark.parametrize("drop", [0.25, 0.5, 0.9])
def test_stochastic_depth_keeps_the_expectation_and_computes_only_what_is_kept(drop, monkeypatch):
    block = shaken(reddino.Block(8, 2, reddino.Mlp, 1.0, drop)).double().train()
    x, rows, outputs = torch.randn(4, 3, 8, dtype=torch.float64), [], []

    def branch(x):
        rows.append(len(x))
        return torch.tanh(x) + 2

    for order in itertools.permutations(range(4)):  # the mean over all draws, not an estimate of it
        monkeypatch.setattr(torch, "randperm", lambda n, order=order, **_: torch.tensor(order))
        outputs.append(block.add(x, branch))
    kept = {0.25: 3, 0.5: 2, 0.9: 1}[drop]
    assert rows == [kept] * 24
    torch.testing.assert_close(torch.stack(outputs).mean(0), x + torch.tanh(x) + 2)
    assert all(((o - x).flatten(1).any(1)).sum() == kept for o in outputs)
    rows.clear()
    torch.testing.assert_close(block.eval().add(x, branch), x + torch.tanh(x) + 2)
    assert rows == [4]


# ------------------------------------------------------------------------------------------- heads


def test_logits_are_gain_times_cosine():
    torch.manual_seed(0)
    head = reddino.DINOHead(12, 30, hidden=20, bottleneck=8).double()
    assert torch.all(head.last_layer.weight_g == 1)
    x, bottleneck = torch.randn(7, 12, dtype=torch.float64), []
    head.last_layer.register_forward_pre_hook(lambda _, args: bottleneck.append(args[0]))
    with torch.no_grad():
        assert head(x).abs().max() <= 1 + 1e-12
        head.last_layer.weight_g.copy_(torch.rand(30, 1) + 0.5)
        head.last_layer.weight_v.mul_(17)  # only its direction counts
    logits = head(x)
    torch.testing.assert_close(bottleneck[0].norm(dim=1), torch.ones(7, dtype=torch.float64))
    z, v = head.mlp(x).detach().numpy(), head.last_layer.weight_v.detach().numpy()
    cosine = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T
    np.testing.assert_allclose(
        logits.detach().numpy(), head.last_layer.weight_g.detach().numpy().T * cosine, atol=1e-12
    )
    logits.pow(2).sum().backward()
    expected = 2 * head.last_layer.weight_g.detach().numpy()[:, 0] * (cosine**2).sum(0)  # d/dg sum (g c)^2
    np.testing.assert_allclose(head.last_layer.weight_g.grad.numpy()[:, 0], expected)


# ------------------------------------------------------------------------------------------- the teacher's targets


def textbook_sinkhorn(logits, temp, n_iters=3):
    """SwAV's and DINOv2's loop as their papers print it, in float64: columns to 1/K, rows to 1/R, then rows to 1."""
    q = np.exp(np.asarray(logits, np.float64) / temp)
    R, K = q.shape
    q /= q.sum()
    for _ in range(n_iters):
        q = q / q.sum(0, keepdims=True) / K
        q = q / q.sum(1, keepdims=True) / R
    return q * R


@pytest.mark.parametrize("rows,prototypes,n_iters", [(6, 10, 3), (50, 7, 3), (8, 8, 1), (1, 5, 3), (20, 64, 10)])
def test_sinkhorn_knopp_is_the_textbooks(rows, prototypes, n_iters):
    logits = np.random.default_rng(rows).uniform(-1, 1, (rows, prototypes))
    expected = textbook_sinkhorn(logits, 0.05, n_iters)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        ours = reddino.sinkhorn_knopp(torch.tensor(logits, dtype=dtype), 0.05, n_iters)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.numpy(), expected, rtol=tolerance, atol=tolerance * 1e-3)
    default = reddino.sinkhorn_knopp(torch.tensor(logits), 0.05)
    np.testing.assert_allclose(default.numpy(), textbook_sinkhorn(logits, 0.05, 3), rtol=1e-10)


@pytest.mark.parametrize("n_iters", [1, 2, 3])
@pytest.mark.parametrize("gap", [60, 75, 85, 95, 120])
def test_sinkhorn_knopp_where_one_row_nearly_leaves_float32(gap, n_iters):
    logits = np.random.default_rng(0).uniform(-1, 1, (6, 10))
    logits[2] -= gap * 0.1
    ours = reddino.sinkhorn_knopp(torch.tensor(logits, dtype=torch.float32), 0.1, n_iters)
    np.testing.assert_allclose(ours.numpy(), textbook_sinkhorn(logits, 0.1, n_iters), rtol=1e-4, atol=1e-7)


def test_sinkhorn_knopp_balances():
    logits = torch.randn(48, 12, dtype=torch.float64) + 3 * torch.arange(12)  # all prefer the last
    targets = reddino.sinkhorn_knopp(logits, 1.0, 500)
    torch.testing.assert_close(targets.sum(1), torch.ones(48, dtype=torch.float64))
    torch.testing.assert_close(targets.sum(0), torch.full((12,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert F.softmax(logits, 1).sum(0)[-1] > 40


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_sinkhorn_knopp_is_finite_for_logits_of_any_size(size):
    logits = size * (2 * torch.rand(32, 20, generator=torch.Generator().manual_seed(0)) - 1)
    logits[0], logits[1], logits[:, 2], logits[:, 3] = size, -size, size, -size
    targets = reddino.sinkhorn_knopp(logits, 0.04)
    assert targets.isfinite().all() and (targets >= 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(32), rtol=1e-5, atol=0)
    half = reddino.sinkhorn_knopp(torch.randn(5, 6).bfloat16(), 0.04)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_sinkhorn_knopp_of_equal_logits_is_uniform_and_of_nothing_is_nothing():
    torch.testing.assert_close(reddino.sinkhorn_knopp(torch.full((6, 9), 1e6), 0.04), torch.full((6, 9), 1 / 9))
    assert reddino.sinkhorn_knopp(torch.zeros(0, 9), 0.04).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_no_target_and_no_neighbour_coarser(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(20, 64, generator=generator), torch.randn(32, 16, generator=generator)
    alike = 1 + 0.01 * noise
    plain = reddino.sinkhorn_knopp(logits, 0.1), reddino.koleo_loss(alike)
    with torch.autocast("cpu", dtype):
        assert (logits @ logits.T).dtype == dtype
        torch.testing.assert_close((reddino.sinkhorn_knopp(logits, 0.1), reddino.koleo_loss(alike)), plain)


def test_moving_average_centering_over_several_steps():
    center, batches = reddino.MovingAverage(5).double(), torch.randn(4, 6, 5, dtype=torch.float64) + 2
    for t, batch in enumerate(batches):
        expected = sum(0.1 * 0.9 ** (t - 1 - i) * batches[i].mean(0) for i in range(t))  # what was known before
        for _ in range(2):  # to look twice is not to update twice
            torch.testing.assert_close(center(batch, 0.05), torch.softmax((batch - expected) / 0.05, -1))
        center.update()
    expected = sum(0.1 * 0.9 ** (3 - i) * batches[i].mean(0) for i in range(4))
    torch.testing.assert_close(center.center[0], expected)
    assert "center" in center.state_dict()


# ------------------------------------------------------------------------------------------- losses


def np_cross_entropy(logits, targets, temp):
    z = np.asarray(logits, np.float64) / temp
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -(np.asarray(targets) * log_p).sum(-1)


def np_koleo(x):
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    return -np.log(distance.min(1)).mean()


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_losses_are_their_formulas():
    logits, targets = draw(6, 9), torch.softmax(draw(6, 9, seed=1), -1)
    entropies = np_cross_entropy(logits, targets, 0.1)
    assert float(reddino.dino_loss(logits, targets)) == pytest.approx(entropies.mean(), rel=1e-12)
    assert float(reddino.dino_loss(logits, targets, 0.3)) == pytest.approx(
        np_cross_entropy(logits, targets, 0.3).mean()
    )
    # six masked patches: four of one image, two of another, of eight global views
    weights = torch.tensor([1 / 4] * 4 + [1 / 2] * 2, dtype=torch.float64)
    expected = (entropies[:4].mean() + entropies[4:].mean()) / 8
    assert float(reddino.ibot_loss(logits, targets, weights, 8)) == pytest.approx(expected, rel=1e-12)
    assert float(reddino.ibot_loss(logits[:0], targets[:0], weights[:0], 8)) == 0  # a batch without masks
    assert float(reddino.koleo_loss(logits)) == pytest.approx(np_koleo(logits), rel=1e-10)
    assert float(reddino.koleo_loss(17 * logits)) == pytest.approx(np_koleo(logits), rel=1e-10)


def test_gradients_of_the_losses():
    targets, weights = torch.softmax(draw(5, 7, seed=1), -1), torch.rand(5, dtype=torch.float64)
    x = draw(5, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reddino.dino_loss(x, targets), x)
    assert torch.autograd.gradcheck(lambda x: reddino.ibot_loss(x, targets, weights, 4), x)
    assert torch.autograd.gradcheck(reddino.koleo_loss, x)
    assert torch.autograd.gradcheck(
        lambda x: reddino.resize_pos_embed(x, 2, 5),
        draw(1, 10, 2).float().double().requires_grad_(),
        eps=1e-2,
        atol=1e-4,
    )  # fmt: skip  (it is linear, and computed in float32)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [0, 1, 60])
def test_a_loss_by_rows_is_the_plain_one(dtype, tolerance, rows):
    """60 rows are two and a bit of the chunks in which logits exist. Two calls, as for class and patch tokens."""
    head = shaken(reddino.DINOHead(12, 40, 24, 16)).to(dtype)
    tokens = torch.randn(2, rows, 12, dtype=dtype, requires_grad=True)
    targets, weights = torch.rand(2, rows, 40, dtype=dtype).softmax(-1), torch.rand(2, rows, dtype=dtype)

    def loss(logits, targets, weights):
        return reddino.ibot_loss(logits, targets, weights, 7)

    wanted, by_rows = [tokens, *head.parameters()], reddino.ByRows(head, numbers=25 * 40)
    values, roots = zip(*(by_rows(loss, *parts, scale=3.0) for parts in zip(tokens, targets, weights)))
    plain = sum(loss(head(t), *parts) for t, *parts in zip(tokens, targets, weights))
    torch.testing.assert_close(sum(values), plain, rtol=tolerance, atol=tolerance)
    outputs, gradients = zip(*roots, (by_rows.prototypes, by_rows.gradient))
    found = torch.autograd.grad(outputs, wanted, gradients)
    for a, b in zip(found, torch.autograd.grad(3 * plain, wanted)):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()) if b.numel() else a.shape == b.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_koleo_is_finite_on_duplicates(dtype):
    for x in (torch.ones(4, 6), torch.cat([torch.randn(3, 6)] * 2), torch.zeros(4, 6)):
        x = x.to(dtype).requires_grad_()
        loss = reddino.koleo_loss(x)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()


# ------------------------------------------------------------------------------------------- one training step


def inputs(cfg, seed=0):
    """Random views and masks of a batch, float64: half of the views masked, one by its every patch."""
    B, n = cfg.batch_size, (cfg.global_size // 8) ** 2
    masks = torch.zeros(2 * B, n, dtype=torch.bool)
    rng = np.random.default_rng(seed)
    for view, count in zip(rng.permutation(2 * B)[:B], (n, 1, 5, 3)):
        masks[view, rng.permutation(n)[:count]] = True
    size = cfg.local_size
    return (
        draw(2 * B, 3, cfg.global_size, cfg.global_size, seed=seed),
        draw(cfg.local_crops * B, 3, size, size, seed=9),
        masks,
    )


def plain_losses(cfg, model, global_views, local_views, masks, temp, centers=(0.0, 0.0)):
    """The losses in the words of the papers: one image, one pair of views at a time, numpy."""
    B, L = cfg.batch_size, cfg.local_crops

    def out(net, view, mask=None):
        with torch.no_grad():
            cls, patches = net["backbone"].forward_features(view[None], None if mask is None else mask[None])
            head = net["ibot_head"] if cfg.separate_heads else net["dino_head"]
            return net["dino_head"](cls)[0].numpy(), head(patches)[0].numpy(), cls[0].numpy()

    def balanced(logits, center):
        if cfg.centering == "sinkhorn-knopp":
            return textbook_sinkhorn(logits, temp)
        e = np.exp((np.stack(logits) - center) / temp)
        return e / e.sum(1, keepdims=True)

    teacher = [out(model.teacher, v) for v in global_views]
    student = [out(model.student, v, m) for v, m in zip(global_views, masks)] + [
        out(model.student, v) for v in local_views
    ]
    targets = balanced([t[0] for t in teacher], centers[0])
    places = [(v, p) for v in range(2 * B) for p in range(masks.shape[1]) if masks[v, p]]
    patch_targets = dict(zip(places, balanced([teacher[v][1][p] for v, p in places], centers[1])))
    dino = ibot = koleo = 0.0
    for s in range(2 + L):
        for t in range(2):
            if s != t:
                pairs = [
                    np_cross_entropy(student[s * B + b][0], targets[t * B + b], cfg.student_temp) for b in range(B)
                ]
                dino += np.mean(pairs) / (2 + 2 * L)
    for v in range(2 * B):
        patches = [
            np_cross_entropy(student[v][1][p], patch_targets[v, p], cfg.student_temp) for w, p in places if w == v
        ]
        ibot += np.mean(patches) / (2 * B) if patches else 0.0
    for view in range(2):
        koleo += np_koleo([s[2] for s in student[view * B : (view + 1) * B]])
    losses = {"dino": dino, "ibot": cfg.ibot * ibot}
    return losses | ({"koleo": cfg.koleo * koleo} if cfg.koleo else {})


@pytest.mark.parametrize("options", [
    dict(local_crops=0), dict(local_crops=1, koleo=0.1), dict(local_crops=3, separate_heads=True, ibot=0.7),
    dict(local_crops=1, centering="moving-average", koleo=0.3, student_temp=0.2, registers=2),
    dict(local_crops=2, centering="moving-average", separate_heads=True),
    dict(local_crops=7), dict(local_crops=1, local_size=32),
])  # fmt: skip
@pytest.mark.parametrize("small", [10**9, 0])
def test_the_total_is_the_plain_double_loop(options, small, monkeypatch):
    monkeypatch.setattr(DINO, "SMALL", small)
    cfg = tiny(**options)
    lessons = 1 if small else 2 if cfg.koleo else 4  # of the global views; 7 local ones take as many
    torch.manual_seed(0)
    model = DINO(cfg).double()
    shaken(model.student), shaken(model.teacher, seed=1)
    global_views, local_views, masks = inputs(cfg)
    centers = (0.0, 0.0)
    for count in range(2):  # the second step has a center
        losses = step(model, global_views, local_views, masks, 0.3)
        taught = model.teach(global_views, local_views, masks, 0.3)
        share = (cfg.local_size / cfg.global_size) ** 2
        assert len(taught) == lessons + min(math.ceil(cfg.local_crops * share * lessons / 2), cfg.local_crops)
        expected = plain_losses(cfg, model, global_views, local_views, masks, 0.3, centers)
        assert list(losses) == list(expected)
        for name in losses:
            assert losses[name].item() == pytest.approx(expected[name], rel=1e-6), (name, count)
        if cfg.centering == "moving-average":
            model.update_teacher(1.0)
            with torch.no_grad():
                cls, patches = model.teacher["backbone"].forward_features(global_views)
                head = model.teacher["ibot_head" if cfg.separate_heads else "dino_head"]
                now = (model.teacher["dino_head"](cls).mean(0).numpy(), head(patches[masks]).mean(0).numpy())
            centers = tuple(0.9 * c + 0.1 * m for c, m in zip(centers, now))


@pytest.mark.parametrize("options", [dict(koleo=0.1), dict(separate_heads=True), dict(centering="moving-average")])
@pytest.mark.parametrize("small", [10**9, 0])
def test_a_steps_gradient_is_the_slope_of_its_loss(options, small, monkeypatch):
    """The lessons' gradients, added up, along a random direction, against the difference of losses to both sides."""
    monkeypatch.setattr(DINO, "SMALL", small)
    cfg = tiny(local_crops=3, **options)
    model, batch = DINO(cfg).double(), inputs(cfg)
    shaken(model.student), shaken(model.teacher, seed=1)
    step(model, *batch, 0.3)
    gradients = {p: p.grad.clone() for p in model.student.parameters()}
    for part in model.student.values():  # one by one, or the backbone's would drown the heads'
        parameters = list(part.parameters())
        direction = [torch.randn_like(p) * p.abs().mean() for p in parameters]
        slope = sum((gradients[p] * d).sum().item() for p, d in zip(parameters, direction))
        ends = []
        for shift in (-1e-6, 2e-6):
            torch._foreach_add_([p.data for p in parameters], direction, alpha=shift)
            ends.append(sum(v.item() for v in step(model, *batch, 0.3).values()))
        torch._foreach_add_([p.data for p in parameters], direction, alpha=-1e-6)
        assert (ends[1] - ends[0]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_only_the_student_learns_and_all_of_it_does():
    cfg = tiny(local_crops=1)
    model = DINO(cfg).double()
    shaken(model.student)
    step(model, *inputs(cfg), 0.04)
    assert all(p.grad is None for p in model.teacher.parameters())
    idle = [n for n, p in model.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    fresh = DINO(cfg)
    assert all(torch.equal(a, b) for a, b in zip(fresh.student.parameters(), fresh.teacher.parameters()))


def test_drop_path_is_the_students_alone():
    model = DINO(tiny(drop_path=0.4))
    assert {b.drop_path for b in model.student["backbone"].blocks} == {0.4}  # every block the same, as in DINOv2
    assert {b.drop_path for b in model.teacher["backbone"].blocks} == {0.0}


@pytest.mark.parametrize("name,replacement", [
    ("sinkhorn_knopp", lambda logits, temp, n_iters=3: torch.softmax(logits / temp, -1)),
    ("dino_loss", lambda logits, targets, temp=0.1: 3 * (logits - targets).pow(2).mean()),
    ("ibot_loss", lambda logits, targets, *_, **__: (logits - targets).pow(2).mean()),
    ("koleo_loss", lambda x: x.pow(2).mean()),
])  # fmt: skip
def test_the_lessons_functions_are_those_that_run(name, replacement, monkeypatch):
    cfg = tiny(local_crops=1, koleo=0.1)
    model = DINO(cfg).double()
    shaken(model.student), shaken(model.teacher, seed=1)

    def run():
        model.zero_grad()
        losses = step(model, *inputs(cfg), 0.1)
        grad = model.student["backbone"].patch_embed.proj.weight.grad
        return torch.stack(list(losses.values())), grad.clone()

    before = run()
    monkeypatch.setattr(reddino, name, replacement)
    after = run()
    assert not torch.allclose(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_the_teacher_is_the_students_running_average():
    model = DINO(tiny()).double()
    shaken(model.student), shaken(model.teacher, seed=1)
    expected = [0.9 * t + 0.1 * s for t, s in zip(model.teacher.parameters(), model.student.parameters())]
    students = [p.clone() for p in model.student.parameters()]
    model.update_teacher(0.9)
    for got, want in zip(model.teacher.parameters(), expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, model.student.parameters(), students))
    model.update_teacher(1.0)  # at the end of the run it stands still
    for got, want in zip(model.teacher.parameters(), expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_masks_are_blocks_of_about_the_ratio(ratio):
    rng, counts, sides = np.random.default_rng(0), [], []
    for _ in range(400):
        mask = augment.block_mask(rng, 16, 16, ratio)
        assert mask.shape == (16, 16) and mask.dtype == bool
        counts.append(mask.sum())
        # patches with a masked neighbour both across and along: those of blocks, not specks
        inner = mask & (np.roll(mask, 1, 0) | np.roll(mask, -1, 0)) & (np.roll(mask, 1, 1) | np.roll(mask, -1, 1))
        sides.append(inner.sum() / max(mask.sum(), 1))
    counts = np.array(counts)
    assert counts.max() <= int(256 * ratio)
    assert counts.mean() > 0.9 * 256 * ratio
    assert np.mean(sides) > 0.8  # single patches at random: 0.04 at ratio 0.1, 0.28 at 0.5 (both neighbours by chance)
    assert np.array_equal(augment.block_mask(np.random.default_rng(7), 16, 16, ratio),
                          augment.block_mask(np.random.default_rng(7), 16, 16, ratio))  # fmt: skip
    assert not np.array_equal(augment.block_mask(np.random.default_rng(7), 16, 16, ratio),
                              augment.block_mask(np.random.default_rng(8), 16, 16, ratio))  # fmt: skip


def test_masks_lie_anywhere_and_none_at_ratio_0():
    rng = np.random.default_rng(0)
    assert not augment.block_mask(rng, 16, 16, 0.0).any()
    total = sum(augment.block_mask(rng, 16, 10, 0.3).astype(float) for _ in range(2000)) / 2000
    np.testing.assert_allclose(total, total[::-1], atol=0.06)  # upside down and mirrored it is the same
    np.testing.assert_allclose(total, total[:, ::-1], atol=0.06)
    assert total.min() > 0.02


def test_first_blocks_have_the_sizes_and_shapes_of_beit():
    rng, areas, aspects = np.random.default_rng(0), [], []
    while len(areas) < 1500:
        mask = augment.block_mask(rng, 24, 24, 5 / 576)  # 5 patches: one block and perhaps one more patch or none
        ys, xs = np.nonzero(mask)
        if len(ys):
            h, w = np.ptp(ys) + 1, np.ptp(xs) + 1
            if h * w == len(ys):  # one rectangle
                areas.append(h * w), aspects.append(h / w)
    assert min(areas) >= 3 and max(areas) <= 5  # at least 4, give or take the rounding of the sides
    assert abs(np.log(aspects).mean()) < 0.05 and max(aspects) <= 5 and min(aspects) >= 1 / 5


@pytest.mark.parametrize("views", [2, 8, 128, 7])
def test_half_of_the_views_are_masked_their_ratios_spread_evenly(views):
    drawn = np.stack([augment.mask_ratios(3, step, views) for step in range(50)])
    n = views // 2
    assert ((drawn > 0).sum(1) == n).all()
    for ratios in drawn:
        bins = (np.sort(ratios[ratios > 0]) - 0.1) / 0.4 * n
        assert (np.floor(bins) == np.arange(n)).all()  # one in each of n equal bins of 0.1 to 0.5
    assert ((drawn > 0).mean(0) > 0.15).all()  # each view has its turn
    assert np.array_equal(drawn[4], augment.mask_ratios(3, 4, views))
    assert views == 2 or not np.array_equal(drawn[4], augment.mask_ratios(4, 4, views))


# ------------------------------------------------------------------------------------------- optimiser and schedules


def test_schedules_at_their_corners():
    cfg = configure(lr=3e-4, batch_size=256, warmup=0.1, weight_decay=0.04, weight_decay_end=0.4, momentum=0.99,
                    teacher_temp_start=0.04, teacher_temp=0.07, teacher_temp_warmup=0.3,
                    freeze_last_layer=0.05, min_lr=1e-6)  # fmt: skip
    peak = 3e-4 * math.sqrt(256 / 1024)
    at = {x: reddino.schedules(cfg, x) for x in (0, 0.01, 0.05, 0.1, 0.15, 0.3, 0.55, 1)}
    assert [at[x]["lr"] for x in (0, 0.05, 0.1)] == pytest.approx([0, peak / 2, peak])
    assert [at[x]["lr"] for x in (0.55, 1)] == pytest.approx([(peak + 1e-6) / 2, 1e-6])  # halfway down, and down
    assert [at[x]["weight_decay"] for x in (0, 0.3, 1)] == pytest.approx(
        [0.04, 0.4 - 0.36 * (1 + math.cos(0.3 * math.pi)) / 2, 0.4])  # fmt: skip
    assert [at[x]["momentum"] for x in (0, 0.3, 1)] == pytest.approx(
        [0.99, 1 - 0.01 * (1 + math.cos(0.3 * math.pi)) / 2, 1])  # fmt: skip
    assert [at[x]["teacher_temp"] for x in (0, 0.15, 0.3, 1)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert at[0.01]["last_layer_lr"] == 0 < at[0.05]["last_layer_lr"] == at[0.05]["lr"]


def test_reddinos_temperature_never_arrives():
    cfg = configure()  # 30 epochs of warm-up in a run of 10: 0.04 to 0.05
    assert reddino.schedules(cfg, 1)["teacher_temp"] == pytest.approx(0.05)
    assert reddino.schedules(cfg, 0.01)["lr"] == pytest.approx(2e-4 * math.sqrt(560 / 1024))


def test_parameter_groups():
    model = DINO(tiny(registers=2, separate_heads=True, layer_decay=0.9))
    cfg = tiny(
        registers=2, separate_heads=True, layer_decay=0.9, freeze_last_layer=0.1, warmup=0.0, weight_decay_end=0.2
    )
    optimizer = reddino.make_optimizer(cfg, model.student)
    names = {p: n for n, p in model.student.named_parameters()}
    flat = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(flat) == len(names) == sum(len(g["params"]) for g in optimizer.param_groups)  # each once
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999) and isinstance(optimizer, torch.optim.AdamW)
    for done in (0.05, 0.5):
        now = reddino.schedules(cfg, done)
        reddino.apply_schedules(optimizer, now)
        for name, group in flat.items():
            undecayed = name.endswith("bias") or re.search(r"norm\d?\.|gamma", name)
            assert group["weight_decay"] == (0 if undecayed else now["weight_decay"]), name
            layer = 7  # nano has 6 blocks, 1 to 6; what comes after is 7, what comes before is 0
            if name.startswith("backbone."):
                block = re.match(r"backbone\.blocks\.(\d)", name)
                layer = int(block[1]) + 1 if block else 7 if name.startswith("backbone.norm") else 0
            rate = 0.9 ** (7 - layer) * (0.2 if "patch_embed" in name else 1)
            frozen = "last_layer" in name and done < 0.1
            assert group["lr"] == pytest.approx(0 if frozen else now["lr"] * rate), name


# ------------------------------------------------------------------------------------------- signs of collapse, cost


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_effective_rank_of_orthogonal_features(rank):
    basis = torch.linalg.qr(torch.randn(300, 16))[0][:, :rank]
    features = 3 * basis @ torch.linalg.qr(torch.randn(16, 16))[0][:rank]
    assert reddino.effective_rank(features) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_of_a_known_spectrum():
    values = torch.tensor([8.0, 4, 2, 1, 1])
    p = (values / 16).double().numpy()
    u, v = torch.linalg.qr(torch.randn(40, 5))[0], torch.linalg.qr(torch.randn(5, 5))[0]
    assert reddino.effective_rank(u * values @ v) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)


def watched(tokens, prototypes=64, entropy=2.0):
    watch = reddino.Watch()
    warnings = []
    for batch in tokens.split(128):
        watch.note({"cls": batch, "nearest": batch[:, :prototypes].argmax(1), "entropy": entropy})
        warnings.append(watch.warning(watch.signs(), entropy, prototypes))
    return watch.signs(), [w for w in warnings if w]


def test_collapse_is_said_once_in_words_and_health_never():
    healthy, warnings = watched(torch.randn(5000, 64))
    assert (
        warnings == []
        and healthy["rank"] > 60
        and healthy["in_use"] == 64
        and healthy["std"] == pytest.approx(1, rel=0.05)
    )
    constant = torch.randn(1, 64).repeat(5000, 1)
    signs, warnings = watched(constant + 1e-4 * torch.randn(5000, 64))
    assert len(warnings) == 1 and "collapsed" in warnings[0] and "\n" not in warnings[0]
    assert signs["in_use"] < 5 and signs["std"] < 0.01
    _, warnings = watched(torch.randn(5000, 1) @ torch.randn(1, 64))  # all on one line
    assert len(warnings) == 1
    _, warnings = watched(torch.randn(5000, 64), entropy=math.log(64))  # a teacher with no opinion
    assert len(warnings) == 1
    assert watched(constant[:2000])[0] == {}  # too few tokens to say


@pytest.mark.parametrize("arch", ["nano", "vits14"])
def test_flops_of_a_step_are_those_that_torch_counts(arch, monkeypatch):
    monkeypatch.setattr(reddino, "MKL_IS_SLOW", False)  # it doesn't count oneDNN's
    sizes = (
        dict(global_size=112, local_size=56, batch_size=2) if arch == "vits14" else dict(global_size=64, local_size=32)
    )
    cfg = tiny(**sizes, arch=arch, local_crops=2, prototypes=300, head_hidden=128, head_bottleneck=64)
    model = DINO(cfg)
    vit, B = model.student["backbone"], cfg.batch_size
    grid = cfg.global_size // vit.patch_size
    masks = torch.zeros(2 * B, grid * grid, dtype=torch.bool)
    masks[:, : round(0.15 * grid * grid)] = True  # 0.3 of half of them
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused one is not counted
        step(model, torch.randn(2 * B, 3, grid * vit.patch_size, grid * vit.patch_size),
             torch.randn(2 * B, 3, cfg.local_size, cfg.local_size), masks, 0.04)  # fmt: skip
    estimate = reddino.step_flops(cfg, model)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.03)


# ------------------------------------------------------------------------------------------- weights in


@pytest.fixture(scope="module")
def backbone():
    return shaken(VisionTransformer(56, 14, 128, depth=3, heads=2)).state_dict()


def chunked(state):
    return {re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v for k, v in state.items()}


LAYOUTS = {
    "ours": lambda s: s,
    "released": lambda s: {
        "teacher": {**{f"backbone.{k}": v for k, v in s.items()}, "dino_head.mlp.0.weight": torch.ones(2)}
    },
    "parallel": lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}},
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "chunks": lambda s: {"model": chunked(s)},
    "chunks within": lambda s: {"teacher": {f"backbone.{k}": v for k, v in chunked(s).items()}},
    "compiled": lambda s: {"state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_names(layout, backbone, tmp_path):
    torch.save(LAYOUTS[layout](backbone), tmp_path / "weights.pth")
    state = read_backbone(str(tmp_path / "weights.pth"))
    assert state.keys() == backbone.keys() and all(torch.equal(state[k], backbone[k]) for k in state)


def test_safetensors(backbone, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(backbone, tmp_path / "weights.safetensors")
    state = read_backbone(str(tmp_path / "weights.safetensors"))
    assert state.keys() == backbone.keys() and all(torch.equal(state[k], backbone[k]) for k in state)


def test_our_checkpoints_give_the_teacher(tmp_path):
    model = DINO(tiny())
    shaken(model.teacher)
    torch.save({"teacher": model.teacher.state_dict(), "networks": [], "step": 3}, tmp_path / "checkpoint.pth")
    state, own = read_backbone(str(tmp_path / "checkpoint.pth")), model.teacher["backbone"].state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in state)


def test_positions_of_another_size_are_stretched_once(backbone):
    vit = VisionTransformer(28, 14, 128, depth=3, heads=2)
    said = load_weights(vit, backbone, "that file")
    assert "that file" in said and "\n" not in said
    grid = backbone["pos_embed"][0, 1:].double().numpy().reshape(4, 4, 128)
    expected = np.einsum("iy,jx,yxd->ijd", cubic_weights(4, 2), cubic_weights(4, 2), grid)
    np.testing.assert_allclose(vit.pos_embed[0, 1:].detach().numpy().reshape(2, 2, 128), expected, atol=1e-5)
    assert torch.equal(vit.blocks[2].mlp.fc1.weight, backbone["blocks.2.mlp.fc1.weight"])


def test_what_is_new_is_named(backbone):
    state = {k: v for k, v in backbone.items() if k != "mask_token"}
    vit = VisionTransformer(56, 14, 128, depth=3, heads=2, registers=4)
    said = load_weights(vit, {**state, "extra": torch.ones(1)}, "it")
    assert "mask_token" in said and "register_tokens" in said and "extra" in said


def test_another_architecture_is_refused(backbone):
    for vit in (build_vit("nano"), VisionTransformer(56, 14, 128, depth=4, heads=2)):
        with pytest.raises(UserError, match="another architecture"):
            load_weights(vit, backbone, "it")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    touched = tmp_path / "touched"
    buffer = io.BytesIO()
    torch.save({"teacher": Hostile(touched)}, buffer)
    for data in (buffer.getvalue(), pickle.dumps({"teacher": Hostile(touched)})):
        (tmp_path / "hostile.pth").write_bytes(data)
        with pytest.raises(UserError, match=r"hostile\.pth") as error:
            read_backbone(str(tmp_path / "hostile.pth"))
        assert "\n" not in str(error.value) and not touched.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert touched.exists()  # it would have run


@pytest.mark.parametrize("content", [
    b"", b"no checkpoint", [1, 2], {"epoch": 3}, {1: torch.ones(2)}, {"teacher": {}}, "cut", "text",
])  # fmt: skip
def test_a_file_that_is_no_checkpoint(content, backbone, tmp_path):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        torch.save(backbone, path)
        path.write_bytes(path.read_bytes()[:-3000])
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"weights\.pth") as error:
        read_backbone(str(path))
    assert "\n" not in str(error.value)


def test_a_name_offline_and_a_path_that_is_not_there(monkeypatch, tmp_path, backbone):
    asked = []

    def offline(url, **options):
        asked.append((url, options.get("weights_only")))
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for name, file in (("dinov2_vits14", "dinov2_vits14/dinov2_vits14_pretrain.pth"),
                       ("dinov2_vitg14_reg", "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth")):  # fmt: skip
        with pytest.raises(UserError, match=name):
            read_backbone(name)
        assert asked[-1][0].endswith(file) and asked[-1][1] is True
    with pytest.raises(UserError, match="no such file"):
        read_backbone(str(tmp_path / "none.pth"))
    assert len(asked) == 2
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: dict(backbone))
    assert read_backbone("dinov2_vits14").keys() == backbone.keys()


# ------------------------------------------------------------------------------------------- options


def test_every_option_is_in_the_help_with_its_default():
    run = subprocess.run([sys.executable, reddino.__file__, "--help"], capture_output=True, text=True)
    text = " ".join(run.stdout.split())
    assert run.returncode == 0 and run.stderr == ""
    for field in dataclasses.fields(reddino.Config):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), flag
        assert " ".join(field.metadata["help"].split()) in text, flag
        assert len(field.metadata["help"]) > 5
        if field.default not in (dataclasses.MISSING, None, ""):
            assert f"[{field.default}" in text, flag


def test_the_command_line_makes_the_config():
    for field in dataclasses.fields(reddino.Config):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            cfg = reddino.parse_args(["--data", "x", flag] + ["--resume", "never"] * (field.name == "overwrite"))
            assert getattr(cfg, field.name) is True
    line = "--data a b --arch vitb14 --lr 1e-3 --koleo 0.1 --batch-size 64 --no-compile"
    cfg = reddino.parse_args(line.split())
    assert (cfg.data, cfg.arch, cfg.lr, cfg.koleo, cfg.batch_size, cfg.compile) == (
        ["a", "b"],
        "vitb14",
        1e-3,
        0.1,
        64,
        False,
    )
    assert cfg.iters == 36500 and reddino.parse_args(["--data", "a", "--arch", "vitb14", "--iters", "7"]).iters == 7
    assert reddino.parse_args([]).arch == "nano" and reddino.parse_args(["--data", "a"]).arch == "vits14"


@pytest.mark.parametrize("line,word", [
    ("--nonsense 3", "nonsense"),
    ("--data x --lr much", "lr"),
    ("--arch vits16", "arch"),
    ("--data x --iters 0", "iters"),
    ("--data x --centering none", "centering"),
    ("--data x --batch-size 0", "batch-size"),
    ("--data x --koleo -1", "koleo"),
    ("--data x --global-size 225", "225"),
    ("--data x --local-size 96", "96"),
    ("--data x --local-scale 0.5", "local-scale"),
    ("--data x --overwrite", "overwrite"),
    ("--data x --drop-path 2", "drop-path"),
    ("--data x --student-temp 0", "temp"),
    ("--data x --lr nan", "lr"),
    ("--data x --seed -1", "seed"),
    ("--data x --teacher-temp-warmup -1", "warmup"),
    ("--data x --weight-decay -1", "weight-decay"),
    ("--data x --local-scale -1", "local-scale"),
    ("--data", "data"),
])  # fmt: skip
def test_nonsense_gets_one_line_and_exit_2(line, word, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.mkdir("x")
    with pytest.raises(SystemExit) as stop:
        reddino.main([*line.split(), "--out", "out"])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith("reddino.py: error: ") and said.err.count("\n") == 1
    assert word in said.err and not Path("out").exists()


def test_no_traceback_on_stderr(tmp_path):
    run = subprocess.run([sys.executable, reddino.__file__, "--data", str(tmp_path / "nowhere"), "--arch", "nano",
                          "--out", str(tmp_path / "out")], capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 2 and "nowhere" in run.stderr
    assert run.stderr.startswith("reddino.py: error: ") and run.stderr.count("\n") == 1


def test_the_demo_draws_its_batches_from_one_smear_unless_told_otherwise():
    assert reddino.parse_args([]).mix == 1 and reddino.parse_args(["--mix", "0"]).mix == 0
    assert reddino.parse_args(["--data", "smears", "--arch", "nano"]).mix == 0
