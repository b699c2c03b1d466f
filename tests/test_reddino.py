"""reddino.py, the method: network, heads, targets, losses, optimiser and weights against closed
forms and timm."""

import argparse
import dataclasses
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import urllib.error
from collections import deque
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import augment
import reddino
from reddino import (
    DINO,
    UserError,
    VisionTransformer,
    build_vit,
    configure,
    load_weights,
    read_backbone,
    split_batch,
    vit_from_state,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def a_network_of_its_own(monkeypatch):
    """What is tested here does not depend on which network and recipe nano happens to have."""
    nano = dict(embed_dim=192, depth=6, heads=3, patch_size=8, layerscale=1.0)
    monkeypatch.setitem(reddino.ARCHS, "nano", nano)
    monkeypatch.setitem(reddino.HEAD_SIZES, "nano", dict(hidden=24, bottleneck=16))
    monkeypatch.setitem(reddino.PRESETS, "nano", dict(local_crops=0, global_size=64))


def tiny(**options):
    """A Config whose networks take milliseconds: 40 prototypes, 4 images of 32 pixels, i.e. 4 x 4
    patches of 8."""
    small = dict(
        arch="nano",
        prototypes=40,
        batch_size=4,
        tile_size=80,
        global_size=32,
        local_size=16,
        local_crops=0,
    )
    return configure(**{**small, **options})


def targets_of(model, batch, temp):
    targets, signs = model.teacher_targets(batch, temp)
    model.update_teacher(1.0, signs["means"])  # the teacher stands still, its centers don't
    return targets


def step(model, batch, temp):
    """The losses of a whole step by name; their gradients are then in the student's parameters."""
    total = {}
    for micro_batch, answers in zip(batch, targets_of(model, batch, temp)):
        losses = model(*micro_batch, *answers)
        (sum(losses.values()) / len(batch)).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach() / len(batch)
    return total


def shaken(module, seed=0):
    """The module with every parameter random and LayerScale near 1: at 1e-5 all blocks would be the
    identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            gain = "gamma" in name or (p.dim() == 1 and name.endswith("weight"))
            p.copy_(
                1 + 0.3 * noise if gain else noise * (0.5 if p.dim() < 2 else p[0].numel() ** -0.5)
            )
    return module


def close(a, b, tolerance=1e-4):
    """Largest difference relative to the largest value."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# ------------------------------------------------------------------------------------------- the
# network, against timm


@pytest.mark.parametrize("name,depth,registers", [
    ("vit_small_patch14_dinov2", 3, 0), ("vit_giant_patch14_dinov2", 1, 0),
    ("vit_small_patch14_reg4_dinov2", 3, 4),
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
    other = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=56, depth=2
    ).eval()
    missing, unexpected = other.load_state_dict(ours.state_dict(), strict=False)
    assert missing == [] and unexpected == ["mask_token"]
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        close(ours.forward_features(x)[1], other.forward_features(x)[:, 1:])


@pytest.mark.parametrize(
    "arch,millions", [("vits14", 22), ("vitb14", 86), ("vitl14", 304), ("vitg14", 1136)]
)
def test_parameter_counts(arch, millions):
    with torch.device("meta"):
        ours = build_vit(arch, 518)
        name = {"s": "small", "b": "base", "l": "large", "g": "giant"}[arch[3]]
        other = timm.create_model(f"vit_{name}_patch14_dinov2", pretrained=False)
    count = sum(p.numel() for p in ours.parameters())
    assert (
        count == sum(p.numel() for p in other.parameters()) + ours.embed_dim
    )  # the mask token, which timm has not
    assert count / 1e6 == pytest.approx(millions, rel=0.015)


def test_a_fresh_network_is_initialised_as_dinov2s():
    torch.manual_seed(0)
    vit = build_vit("vits14", depth=2, registers=4).requires_grad_(False)
    assert all(
        torch.all(b.ls1.gamma == 1e-5) and torch.all(b.ls2.gamma == 1e-5) for b in vit.blocks
    )
    assert (
        vit.blocks[0].mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.03)
        and not vit.blocks[0].attn.qkv.bias.any()
    )
    assert vit.pos_embed.std() == pytest.approx(0.02, rel=0.03) and vit.cls_token.std() < 1e-5
    assert not vit.mask_token.any() and vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6
    prototypes = reddino.DINOHead(384, 5000).last_layer
    assert torch.all(prototypes.weight_g == 1)
    linear = torch.nn.Linear(256, 5000)  # what DINOv2's last layer is made of
    for v in (prototypes.weight_v, linear.weight):
        assert v.std().item() == pytest.approx(0.0361, rel=0.01) and v.abs().max() <= 256**-0.5


def test_masked_patches_lose_their_content_and_keep_their_place():
    vit = shaken(build_vit("nano", 32)).eval()
    x, other = torch.randn(2, 1, 3, 32, 32)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, [3, 4, 9]] = True
    hidden = other.clone()
    keep = ~masks.view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hidden = torch.where(keep, x, other)  # the same where it is seen, something else below the mask
    with torch.no_grad():
        assert torch.equal(
            vit.forward_features(x, masks)[1], vit.forward_features(hidden, masks)[1]
        )
        seen = []  # by the first block
        hook = vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:]))
        vit.forward_features(x, masks)
        hook.remove()
        assert torch.allclose(seen[0][[3, 4, 9]], vit.mask_token + vit.pos_embed[0, [4, 5, 10]])
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


# -------------------------------------------------------------------------------------------
# positions at other sizes


def cubic_weights(n, size):
    """[size, n] of bicubic interpolation (a = -0.75, edges repeated), scale (size + 0.1) / n as
    DINOv2, float64."""

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
    expected = np.einsum(
        "iy,jx,yxd->ijd", cubic_weights(37, height), cubic_weights(37, width), grid
    )
    resized = reddino.resize_pos_embed(pos, height, width)
    assert resized.shape == (1, 1 + height * width, 5) and torch.equal(resized[:, 0], pos[:, 0])
    np.testing.assert_allclose(
        resized[0, 1:].numpy().reshape(height, width, 5), expected, atol=2e-5
    )
    exact = F.interpolate(
        pos[:, 1:].reshape(1, 37, 37, 5).permute(0, 3, 1, 2), (height, width), mode="bicubic"
    )
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


# -------------------------------------------------------------------------------------------
# stochastic depth


@pytest.mark.parametrize("drop", [0.25, 0.5, 0.9])
def test_stochastic_depth_keeps_the_mean_and_computes_only_what_is_kept(drop, monkeypatch):
    block = shaken(reddino.Block(8, 2, reddino.Mlp, 1.0, drop, place=0.2)).double().train()
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


@pytest.mark.parametrize("images", [2, 4, 16, 560])
def test_the_share_kept_does_not_depend_on_how_a_batch_is_split(images):
    vit, rows = build_vit("nano", 32, depth=20, drop_path=0.3).train(), []
    for block in vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    vit.double()(torch.zeros(images, 3, 8, 8, dtype=torch.float64))
    assert len(rows) == 20 and np.mean(rows) / images == pytest.approx(0.7, abs=0.02)


# ------------------------------------------------------------------------------------------- heads


def test_logits_are_gain_times_cosine():
    torch.manual_seed(0)
    head = reddino.DINOHead(12, 30, hidden=20, bottleneck=8).double()
    assert torch.all(head.last_layer.weight_g == 1)
    x = torch.randn(7, 12, dtype=torch.float64)
    with torch.no_grad():
        assert head(x).abs().max() <= 1 + 1e-12
        head.last_layer.weight_g.copy_(torch.rand(30, 1) + 0.5)
        head.last_layer.weight_v.mul_(17)  # only its direction counts
    logits = head(x)
    torch.testing.assert_close(head.on_sphere(x).norm(dim=1), torch.ones(7, dtype=torch.float64))
    z, v = head.mlp(x).detach().numpy(), head.last_layer.weight_v.detach().numpy()
    cosine = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (
        v / np.linalg.norm(v, axis=1, keepdims=True)
    ).T
    np.testing.assert_allclose(
        logits.detach().numpy(), head.last_layer.weight_g.detach().numpy().T * cosine, atol=1e-12
    )
    logits.pow(2).sum().backward()
    expected = (
        2 * head.last_layer.weight_g.detach().numpy()[:, 0] * (cosine**2).sum(0)
    )  # d/dg sum (g c)^2
    np.testing.assert_allclose(head.last_layer.weight_g.grad.numpy()[:, 0], expected)


# ------------------------------------------------------------------------------------------- the
# teacher's targets


def textbook_sinkhorn(logits, temp, n_iters=3):
    """SwAV's and DINOv2's loop as their papers print it, in float64: columns to 1/K, rows to 1/R,
    then rows to 1."""
    q = np.exp(np.asarray(logits, np.float64) / temp)
    R, K = q.shape
    q /= q.sum()
    for _ in range(n_iters):
        q = q / q.sum(0, keepdims=True) / K
        q = q / q.sum(1, keepdims=True) / R
    return q * R


@pytest.mark.parametrize(
    "rows,prototypes,n_iters", [(6, 10, 3), (50, 7, 3), (8, 8, 1), (1, 5, 3), (20, 64, 10)]
)
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
@pytest.mark.parametrize("gap", [40, 60, 75])
def test_sinkhorn_knopp_where_one_row_nearly_leaves_float32(gap, n_iters):
    logits = np.random.default_rng(0).uniform(-1, 1, (6, 10)) * 0.2
    logits[2] -= gap * 0.1
    ours = reddino.sinkhorn_knopp(torch.tensor(logits, dtype=torch.float32), 0.1, n_iters)
    wanted = textbook_sinkhorn(logits, 0.1, n_iters)
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-4, atol=1e-7)


def test_sinkhorn_knopp_balances():
    logits = torch.randn(48, 12, dtype=torch.float64) + 3 * torch.arange(12)  # all prefer the last
    targets = reddino.sinkhorn_knopp(logits, 1.0, 500)
    torch.testing.assert_close(targets.sum(1), torch.ones(48, dtype=torch.float64))
    torch.testing.assert_close(
        targets.sum(0), torch.full((12,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0
    )
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
    torch.testing.assert_close(
        reddino.sinkhorn_knopp(torch.full((6, 9), 1e6), 0.04), torch.full((6, 9), 1 / 9)
    )
    assert reddino.sinkhorn_knopp(torch.zeros(0, 9), 0.04).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_no_target_and_no_neighbour_coarser(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, noise = (
        torch.randn(20, 64, generator=generator),
        torch.randn(32, 16, generator=generator),
    )
    alike = 1 + 0.01 * noise
    plain = reddino.sinkhorn_knopp(logits, 0.1), reddino.koleo_loss(alike)
    with torch.autocast("cpu", dtype):
        assert (logits @ logits.T).dtype == dtype
        torch.testing.assert_close(
            (reddino.sinkhorn_knopp(logits, 0.1), reddino.koleo_loss(alike)), plain
        )


def test_moving_average_centering_over_several_steps():
    model = DINO(tiny(prototypes=5, centering="moving-average")).double()
    batches = draw(4, 6, 5) + 2
    for t, batch in enumerate(batches):
        expected = sum(0.1 * 0.9 ** (t - 1 - i) * batches[i].mean(0) for i in range(t))
        for _ in range(2):  # to look twice is not to update twice
            targets, mean = reddino.moving_average(batch, 0.05, model.centers["patch"])
            torch.testing.assert_close(targets, torch.softmax((batch - expected) / 0.05, -1))
        model.update_teacher(1.0, (mean * 0, mean))
    expected = sum(0.1 * 0.9 ** (3 - i) * batches[i].mean(0) for i in range(4))
    torch.testing.assert_close(model.centers["patch"][0], expected)
    assert not model.centers["cls"].any() and len(model.centers.state_dict()) == 2


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


def plain_sum(x, prototypes, targets, weights, temp=0.1):
    """What LinearCrossEntropy computes, in one line of the textbook."""
    return -(weights * (targets * torch.log_softmax(x @ prototypes.T / temp, 1)).sum(1)).sum()


def test_losses_are_their_formulas():
    head = shaken(reddino.DINOHead(12, 9, 24, 16)).double()
    tokens, targets = draw(6, 12), torch.softmax(draw(6, 9, seed=1), -1)
    entropies = np_cross_entropy(head(tokens).detach(), targets, 0.1)
    # six masked patches: four of one image, two of another, of eight global views
    weights = torch.tensor([1 / 4] * 4 + [1 / 2] * 2, dtype=torch.float64)
    expected = (entropies[:4].mean() + entropies[4:].mean()) / 8
    assert float(reddino.ibot_loss(head, tokens, targets, weights, 8)) == pytest.approx(expected)
    nothing = tokens[:0], targets[:0], weights[:0]
    assert float(reddino.ibot_loss(head, *nothing, 8)) == 0  # a batch without masks
    assert float(reddino.koleo_loss(tokens)) == pytest.approx(np_koleo(tokens), rel=1e-10)
    assert float(reddino.koleo_loss(17 * tokens)) == pytest.approx(np_koleo(tokens), rel=1e-10)


def test_gradients_of_the_losses():
    x = draw(5, 7).requires_grad_()
    assert torch.autograd.gradcheck(reddino.koleo_loss, x)
    assert torch.autograd.gradcheck(
        lambda x: reddino.resize_pos_embed(x, 2, 5),
        draw(1, 10, 2).float().double().requires_grad_(),
        eps=1e-2,
        atol=1e-4,
    )  # it is linear


@pytest.mark.parametrize("rows", [0, 1, 60])
def test_the_linear_cross_entropy_is_the_plain_one(rows, monkeypatch):
    x, prototypes = draw(rows, 6).requires_grad_(), draw(2**19, 6, seed=1).requires_grad_()
    prototypes = prototypes[:40].detach().requires_grad_()
    targets, weights = draw(rows, 40, seed=2).softmax(1) * 1.7, draw(rows, seed=3).abs()
    args = x, prototypes, targets, weights, 0.1
    plain, ours = plain_sum(*args), reddino.LinearCrossEntropy.apply(*args)
    torch.testing.assert_close(ours, plain)
    wanted = torch.autograd.grad(3 * plain, (x, prototypes), allow_unused=True)
    for a, b in zip(torch.autograd.grad(3 * ours, (x, prototypes)), wanted):
        torch.testing.assert_close(a, b)
    if rows == 1:
        assert torch.autograd.gradcheck(
            lambda x, p: reddino.LinearCrossEntropy.apply(x, p, *args[2:]), (x, prototypes)
        )


def test_the_linear_cross_entropy_in_several_chunks():
    K = 2**21  # eight rows at a time
    x, prototypes = draw(9, 2).requires_grad_(), draw(K, 2, seed=1).requires_grad_()
    targets = torch.zeros(9, K, dtype=torch.float64)
    targets[torch.arange(9), torch.arange(9) * 200_000] = 1
    args = x, prototypes, targets, draw(9, seed=2).abs(), 0.5
    ours = torch.autograd.grad(reddino.LinearCrossEntropy.apply(*args), (x, prototypes))
    for a, b in zip(ours, torch.autograd.grad(plain_sum(*args), (x, prototypes))):
        close(a, b, 1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
def test_the_linear_cross_entropy_under_autocast(dtype, tolerance):
    """Weights as small as those of a large batch: times a product in float16 they would be 0."""
    x, prototypes = draw(50, 16).requires_grad_(), (0.3 * draw(300, 16, seed=1)).requires_grad_()
    targets, weights = draw(50, 300, seed=2).softmax(1), draw(50, seed=3).abs() * 1e-8
    plain = plain_sum(x, prototypes, targets, weights)
    wanted = torch.autograd.grad(plain, (x, prototypes))
    single = [t.float() for t in (x, prototypes, targets, weights)]
    with torch.autocast("cpu", dtype):
        ours = reddino.LinearCrossEntropy.apply(*single, 0.1)
    assert ours.dtype == torch.float32 and float(ours) == pytest.approx(float(plain), rel=2e-3)
    for a, b in zip(torch.autograd.grad(ours, (x, prototypes)), wanted):
        close(a, b, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_koleo_is_finite_on_duplicates(dtype):
    for x in (torch.ones(4, 6), torch.cat([torch.randn(3, 6)] * 2), torch.zeros(4, 6)):
        x = x.to(dtype).requires_grad_()
        loss = reddino.koleo_loss(x)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()


# ------------------------------------------------------------------------------------------- one
# training step


def inputs(cfg, seed=0, views=2):
    """Views and masks of a batch, half of the views masked, one by its every patch."""
    B, n = cfg.batch_size, (cfg.global_size // 8) ** 2
    masks = torch.zeros(views * B, n, dtype=torch.bool)
    rng = np.random.default_rng(seed)
    for view, count in zip(rng.permutation(views * B)[:B], (n, 1, 5, 3)):
        masks[view, rng.permutation(n)[:count]] = True
    generator = torch.Generator().manual_seed(seed)

    def images(views, size):
        shape = B, views, 3, size, size
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    return (
        images(views, cfg.global_size),
        images(cfg.local_crops, cfg.local_size),
        masks.unflatten(0, (B, views)),
    )


def batch_of(cfg, parts=1, views=2):
    return split_batch(*inputs(cfg, views=views), parts, torch.device("cpu"), torch.float64)


def plain_losses(cfg, model, global_views, local_views, masks, temp, centers=(0.0, 0.0)):
    """The losses in the words of the papers: one image, one pair of views at a time, numpy."""
    (B, G), L = masks.shape[:2], cfg.local_crops

    def out(net, view, mask=None):
        with torch.no_grad():
            mask = None if mask is None else mask[None]
            cls, patches = net["backbone"].forward_features(view[None], mask)
            head = net["ibot_head"] if cfg.separate_heads else net["dino_head"]
            return net["dino_head"](cls)[0].numpy(), head(patches)[0].numpy(), cls[0].numpy()

    def balanced(logits, center):
        if cfg.centering == "sinkhorn-knopp":
            return textbook_sinkhorn(logits, temp)
        e = np.exp((np.stack(logits) - center) / temp)
        return e / e.sum(1, keepdims=True)

    keys = list(itertools.product(range(B), range(G)))
    teacher = {(b, v): out(model.teacher, global_views[b, v]) for b, v in keys}
    student = {(b, v): out(model.student, global_views[b, v], masks[b, v]) for b, v in keys}
    student |= {
        (b, G + v): out(model.student, local_views[b, v])
        for b, v in itertools.product(range(B), range(L))
    }
    targets = dict(zip(keys, balanced([teacher[k][0] for k in keys], centers[0])))
    places = [(*k, p) for k in keys for p in range(masks.shape[2]) if masks[k][p]]
    patch_logits = [teacher[b, v][1][p] for b, v, p in places]
    patch_targets = dict(zip(places, balanced(patch_logits, centers[1])))
    pairs = [
        np_cross_entropy(student[b, s][0], targets[b, t], 0.1)
        for b in range(B)
        for s in range(G + L)
        for t in range(G)
        if s != t
    ]
    ibot = 0.0
    for b, v in keys:
        patches = [
            np_cross_entropy(student[b, v][1][p], patch_targets[b, v, p], 0.1)
            for c, w, p in places
            if (c, w) == (b, v)
        ]
        ibot += np.mean(patches) / (B * G) if patches else 0.0
    losses = {"dino": np.mean(pairs), "ibot": cfg.ibot * ibot}
    if cfg.koleo:
        koleo = sum(np_koleo([student[b, v][2] for b in range(B)]) for v in range(G))
        losses["koleo"] = cfg.koleo * koleo
    return losses


@pytest.mark.parametrize(
    "options, views",
    [
        (dict(local_crops=0), 2),
        (dict(local_crops=1, koleo=0.1), 2),
        (dict(local_crops=3, separate_heads=True, ibot=0.7), 2),
        (dict(local_crops=1, centering="moving-average", koleo=0.3, registers=2), 2),
        (dict(local_crops=2, centering="moving-average", separate_heads=True), 2),
        (dict(local_crops=1, local_size=32), 2),
        (dict(local_crops=2, koleo=0.1), 3),
    ],
)
def test_the_losses_are_those_of_the_plain_double_loop(options, views):
    cfg = tiny(**options)
    torch.manual_seed(0)
    model = DINO(cfg).double()
    shaken(model.student)
    shaken(model.teacher, seed=1)
    batch, centers = batch_of(cfg, views=views), (0.0, 0.0)
    global_views, local_views, masks = batch[0][:3]
    for count in range(2):  # the second step has a center
        losses = step(model, batch, 0.3)
        plain = plain_losses(cfg, model, global_views, local_views, masks, 0.3, centers)
        assert list(losses) == list(plain)
        for name in losses:
            assert losses[name].item() == pytest.approx(plain[name], rel=1e-6), (name, count)
        if cfg.centering == "moving-average":
            with torch.no_grad():
                teacher, views = model.teacher, global_views.flatten(0, 1)
                cls, patches = teacher["backbone"].forward_features(views)
                head = teacher["ibot_head" if cfg.separate_heads else "dino_head"]
                patches = patches[masks.flatten(0, 1)]
                now = teacher["dino_head"](cls).mean(0).numpy(), head(patches).mean(0).numpy()
            centers = tuple(0.9 * c + 0.1 * m for c, m in zip(centers, now))


@pytest.mark.parametrize(
    "options", [dict(koleo=0.1), dict(separate_heads=True), dict(centering="moving-average")]
)
def test_a_steps_gradient_is_the_slope_of_its_loss(options):
    """Along a random direction, against the difference of the losses to both sides."""
    cfg = tiny(local_crops=3, **options)
    model = DINO(cfg).double()
    shaken(model.student)
    shaken(model.teacher, seed=1)
    batch = batch_of(cfg)
    answers = targets_of(model, batch, 0.3)[0]

    def total():
        return sum(model(*batch[0], *answers).values())

    total().backward()
    for part in model.student.values():  # one by one, or the backbone's would drown the heads'
        parameters = list(part.parameters())
        direction = [torch.randn_like(p) * p.abs().mean() for p in parameters]
        slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction))
        ends = []
        for shift in (-1e-6, 2e-6):
            torch._foreach_add_([p.data for p in parameters], direction, alpha=shift)
            ends.append(total().item())
        torch._foreach_add_([p.data for p in parameters], direction, alpha=-1e-6)
        assert (ends[1] - ends[0]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(centering="moving-average", separate_heads=True)])
def test_micro_batches_change_memory_and_not_the_result(options):
    results = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        model = DINO(tiny(local_crops=2, **options)).double()
        shaken(model.student)
        losses = step(model, batch_of(model.cfg, parts), 0.1)
        results.append([*losses.values(), *(p.grad for p in model.student.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_only_the_student_learns_and_all_of_it_does():
    cfg = tiny(local_crops=1)
    model = DINO(cfg).double()
    shaken(model.student)
    step(model, batch_of(cfg), 0.04)
    assert all(p.grad is None for p in model.teacher.parameters())
    idle = [n for n, p in model.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    fresh = DINO(cfg)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.student.parameters(), fresh.teacher.parameters())
    )


def test_drop_path_is_the_students_alone():
    model = DINO(tiny(drop_path=0.4))
    assert {b.drop_path for b in model.student["backbone"].blocks} == {
        0.4
    }  # every block the same, as in DINOv2
    assert {b.drop_path for b in model.teacher["backbone"].blocks} == {0.0}


@pytest.mark.parametrize(
    "name,replacement",
    [
        ("sinkhorn_knopp", lambda logits, temp, n_iters=3: torch.softmax(logits / temp, -1)),
        ("dino_loss", lambda head, cls, local_cls, targets: head(cls).pow(2).mean()),
        ("ibot_loss", lambda head, patches, *_: head(patches).pow(2).mean()),
        ("koleo_loss", lambda x: x.pow(2).mean()),
    ],
)
def test_a_changed_function_is_the_one_that_runs(name, replacement, monkeypatch):
    cfg = tiny(local_crops=1, koleo=0.1)
    model = DINO(cfg).double()
    shaken(model.student)
    shaken(model.teacher, seed=1)

    def run():
        model.zero_grad()
        losses = step(model, batch_of(cfg), 0.1)
        grad = model.student["backbone"].patch_embed["proj"].weight.grad
        return torch.stack(list(losses.values())), grad.clone()

    before = run()
    monkeypatch.setattr(reddino, name, replacement)
    after = run()
    assert not torch.allclose(before[0], after[0]) and not torch.allclose(before[1], after[1])


# ---------------------------------------------------------------- a GPU's errors, without a GPU


@pytest.fixture
def no_gpu_but_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize("spoil", [None, "item", "boolean index", "device"])
@pytest.mark.parametrize(
    "options",
    [
        dict(local_crops=2, koleo=0.1),
        dict(local_crops=0),
        dict(local_crops=0, koleo=0.1),
        dict(local_crops=1, centering="moving-average", drop_path=0.3, separate_heads=True),
    ],
)
def test_the_forward_half_on_a_pretended_gpu(options, spoil, no_gpu_but_cuda, monkeypatch):
    """Fake tensors know device and shape: mixed devices raise, and so does whatever needs a value,
    for which a GPU would have to be waited for. Spoilt, the step has to raise: the check checks."""
    if spoil and options != dict(local_crops=0):
        return
    cfg = tiny(**options)
    model = DINO(cfg).train()
    (real,) = split_batch(*inputs(cfg), 1, torch.device("cpu"), torch.float32)

    def spoilt(logits, temp):
        if spoil == "item":
            logits.sum().item()
        if spoil == "boolean index":
            logits[logits > 0]
        return torch.softmax(logits / torch.ones(1), 1)  # "device": not a CPU's number, a tensor

    if spoil:
        monkeypatch.setattr(reddino, "sinkhorn_knopp", spoilt)
    with FakeTensorMode() as mode:
        model._apply(lambda t: mode.from_tensor(t).to("cuda"))
        batch = [tuple(mode.from_tensor(t).to("cuda") for t in real)]
        with torch.autocast("cuda", torch.bfloat16):
            if spoil:
                with pytest.raises(RuntimeError):
                    model.teacher_targets(batch, 0.04)
                return
            targets, signs = model.teacher_targets(batch, 0.04)
            losses = model(*batch[0], *targets[0])
        signs.pop("means")
        for tensor in (*losses.values(), *signs.values(), *targets[0]):
            assert tensor.device.type == "cuda"
        assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_a_whole_step_on_the_meta_device():
    cfg = configure(
        arch="vits14",
        batch_size=8,
        local_crops=8,
        koleo=0.1,
        drop_path=0.3,
        prototypes=65536,
        checkpoint_activations=True,
    )
    with torch.device("meta"):
        model = DINO(cfg)
        shapes = (8, 2, 3, 224, 224), (8, 8, 3, 98, 98), (8, 2, 256)
        views = [torch.empty(shape) for shape in shapes]
        batch = [(views[0], views[1], views[2].bool(), torch.empty(600).long(), torch.empty(600))]
    optimizer = reddino.make_optimizer(model.student)
    reddino.apply_schedules(optimizer, reddino.schedules(cfg, 5))
    step(model, batch, 0.04)
    for part in model.student.values():
        torch.nn.utils.clip_grad_norm_(part.parameters(), 3.0)
    optimizer.step()
    model.update_teacher(0.99)
    assert all(p.grad.shape == p.shape for p in model.student.parameters())


SCRIPT = """
import runpy, sys, types
import reddino
assert "eval" not in sys.modules and "smears" not in sys.modules
del sys.modules["reddino"]

def knn_monitor(*_):
    import reddino
    assert reddino.DINO is sys.modules["__main__"].DINO
    raise reddino.UserError("seen")

sys.modules["eval"] = types.SimpleNamespace(knn_monitor=knn_monitor)
sys.argv = ["reddino.py", "--eval-data", "x", "--data", "x"]
runpy.run_path("reddino.py", run_name="__main__")
"""


def test_reddino_alone_loads_no_eval_and_as_a_script_is_evals_reddino():
    folder = Path(reddino.__file__).parent
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 2 and run.stderr == "reddino.py: error: seen\n"


def test_the_teacher_is_the_students_running_average():
    model = DINO(tiny()).double()
    shaken(model.student), shaken(model.teacher, seed=1)
    expected = [
        0.9 * t + 0.1 * s for t, s in zip(model.teacher.parameters(), model.student.parameters())
    ]
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
        inner = (
            mask
            & (np.roll(mask, 1, 0) | np.roll(mask, -1, 0))
            & (np.roll(mask, 1, 1) | np.roll(mask, -1, 1))
        )
        sides.append(inner.sum() / max(mask.sum(), 1))
    counts = np.array(counts)
    assert counts.max() <= int(256 * ratio)
    assert counts.mean() > 0.9 * 256 * ratio
    assert (
        np.mean(sides) > 0.8
    )  # single patches at random: 0.04 at ratio 0.1, 0.28 at 0.5 (both neighbours by chance)
    assert np.array_equal(augment.block_mask(np.random.default_rng(7), 16, 16, ratio),
                          augment.block_mask(np.random.default_rng(7), 16, 16, ratio))  # fmt: skip
    assert not np.array_equal(
        augment.block_mask(np.random.default_rng(7), 16, 16, ratio),
        augment.block_mask(np.random.default_rng(8), 16, 16, ratio),
    )


def test_masks_lie_anywhere_and_none_at_ratio_0():
    rng = np.random.default_rng(0)
    assert not augment.block_mask(rng, 16, 16, 0.0).any()
    total = sum(augment.block_mask(rng, 16, 10, 0.3).astype(float) for _ in range(2000)) / 2000
    np.testing.assert_allclose(
        total, total[::-1], atol=0.06
    )  # upside down and mirrored it is the same
    np.testing.assert_allclose(total, total[:, ::-1], atol=0.06)
    assert total.min() > 0.02


def test_first_blocks_have_the_sizes_and_shapes_of_beit():
    rng, areas, aspects = np.random.default_rng(0), [], []
    while len(areas) < 1500:
        mask = augment.block_mask(
            rng, 24, 24, 5 / 576
        )  # 5 patches: one block and perhaps one more patch or none
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


# -------------------------------------------------------------------------------------------
# optimiser and schedules


def test_schedules_at_their_corners():
    cfg = configure(
        lr=3e-4,
        batch_size=256,
        warmup=0.1,
        weight_decay_end=0.4,
        momentum=0.99,
        teacher_temp=0.07,
        teacher_temp_warmup=0.3,
        iters=1000,
    )
    peak = 3e-4 * math.sqrt(256 / 1024)
    at = {x: reddino.schedules(cfg, round(1000 * x)) for x in (0, 0.05, 0.1, 0.15, 0.3, 0.55, 1)}
    assert [at[x]["lr"] for x in (0, 0.05, 0.1)] == pytest.approx([0, peak / 2, peak])
    assert [at[x]["lr"] for x in (0.55, 1)] == pytest.approx([(peak + 1e-6) / 2, 1e-6])  # halfway
    assert [at[x]["weight_decay"] for x in (0, 0.3, 1)] == pytest.approx(
        [0.04, 0.4 - 0.36 * (1 + math.cos(0.3 * math.pi)) / 2, 0.4]
    )
    assert [at[x]["momentum"] for x in (0, 0.3, 1)] == pytest.approx(
        [0.99, 1 - 0.01 * (1 + math.cos(0.3 * math.pi)) / 2, 1]
    )
    assert [at[x]["teacher_temp"] for x in (0, 0.15, 0.3, 1)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )


def test_reddinos_temperature_never_arrives():
    cfg = configure()  # 30 epochs of warm-up in a run of 10: 0.04 to 0.05
    assert reddino.schedules(cfg, cfg.iters)["teacher_temp"] == pytest.approx(0.05)
    peak = 2e-4 * math.sqrt(560 / 1024)
    assert reddino.schedules(cfg, cfg.iters // 100)["lr"] == pytest.approx(peak)


def test_parameter_groups():
    cfg = tiny(registers=2, separate_heads=True, warmup=0.0, iters=100)
    model = DINO(cfg)
    optimizer = reddino.make_optimizer(model.student)
    names = {p: n for n, p in model.student.named_parameters()}
    flat = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(flat) == len(names) == sum(len(g["params"]) for g in optimizer.param_groups)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert isinstance(optimizer, torch.optim.AdamW)
    now = reddino.schedules(cfg, 50)
    reddino.apply_schedules(optimizer, now)
    for name, group in flat.items():
        undecayed = name.endswith("bias") or re.search(r"norm\d?\.|gamma", name)
        assert group["weight_decay"] == (0 if undecayed else now["weight_decay"]), name
        rate = 0.2 if "patch_embed" in name else 1
        assert group["lr"] == pytest.approx(now["lr"] * rate), name


# ------------------------------------------------------------------------------------------- signs
# of collapse, cost


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_effective_rank_of_orthogonal_features(rank):
    basis = torch.linalg.qr(torch.randn(300, 16))[0][:, :rank]
    features = 3 * basis @ torch.linalg.qr(torch.randn(16, 16))[0][:rank]
    assert reddino.effective_rank(features) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_of_a_known_spectrum():
    values = torch.tensor([8.0, 4, 2, 1, 1])
    p = (values / 16).double().numpy()
    u, v = torch.linalg.qr(torch.randn(40, 5))[0], torch.linalg.qr(torch.randn(5, 5))[0]
    assert reddino.effective_rank(u * values @ v) == pytest.approx(
        math.exp(-(p * np.log(p)).sum()), rel=1e-3
    )


def watched(tokens, entropy=2.0):
    """Signs and warning, with 64 prototypes, after batches of 128 images [B, 2, D]."""
    last = deque(maxlen=1024)
    for batch in tokens.split(128):
        last.extend(batch)
    signs = reddino.watch(last)
    return signs, reddino.collapse(signs | {"teacher_entropy": entropy}, 64)


def test_collapse_is_said_in_words_and_health_never():
    signs, warning = watched(torch.randn(2500, 2, 64))
    assert warning == "" and signs["rank"] > 60
    assert signs["std"] == pytest.approx(1, rel=0.05)
    constant = torch.randn(1, 1, 64).repeat(2500, 2, 1)
    signs, warning = watched(constant + 1e-4 * torch.randn(2500, 2, 64))
    assert "collapsed" in warning and "\n" not in warning
    assert signs["std"] < 0.01
    assert watched(torch.randn(2500, 2, 1) @ torch.randn(1, 64))[1]  # all on one line
    assert watched(torch.randn(2500, 2, 64), entropy=math.log(64))[1]  # a teacher with no opinion
    assert watched(constant[:1000])[0] == {}  # too few images to say


def test_match_is_how_often_a_view_finds_its_partner_among_64():
    images = torch.randn(1024, 1, 64)
    assert watched(images + 0.1 * torch.randn(1024, 2, 64))[0]["match"] == 1
    assert watched(torch.randn(1024, 2, 64))[0]["match"] == pytest.approx(1 / 64, abs=0.02)
    half = torch.cat([images[::2].repeat(1, 2, 1), torch.randn(512, 2, 64)], dim=0)
    half = half[torch.randperm(1024)]
    assert watched(half)[0]["match"] == pytest.approx(0.5, abs=0.06)


# -------------------------------------------------------------------------------------------
# weights in


@pytest.fixture(scope="module")
def backbone():
    return shaken(VisionTransformer(56, 14, 128, depth=3, heads=2)).state_dict()


def chunked(state):
    return {
        re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v
        for k, v in state.items()
    }


LAYOUTS = {
    "ours": lambda s: s,
    "released": lambda s: {
        "teacher": {
            **{f"backbone.{k}": v for k, v in s.items()},
            "dino_head.mlp.0.weight": torch.ones(2),
        }
    },
    "parallel": lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}},
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "chunks": lambda s: {"model": chunked(s)},
    "chunks within": lambda s: {"teacher": {f"backbone.{k}": v for k, v in chunked(s).items()}},
    "of three": lambda s: {
        "model": {
            **{f"student.backbone.{k}": 0 * v for k, v in s.items()},
            **{f"teacher.backbone.{k}": v for k, v in s.items()},
        }
    },
    "timm's": lambda s: {"state_dict": {k: 0 * v for k, v in s.items()}, "state_dict_ema": s},
    "DeiT's": lambda s: {"model": {k: 0 * v for k, v in s.items()}, "model_ema": s},
    "MSN's": lambda s: {"encoder": {k: 0 * v for k, v in s.items()}, "target_encoder": s},
    "MoCo's": lambda s: {
        "state_dict": {
            **{f"base_encoder.{k}": 0 * v for k, v in s.items()},
            **{f"momentum_encoder.{k}": v for k, v in s.items()},
        }
    },
    "Lightning's average": lambda s: {
        "state_dict": {
            **{f"model.{k}": 0 * v for k, v in s.items()},
            **{f"ema_model.{k}": v for k, v in s.items()},
        }
    },
    "Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 1},
    "FSDP": lambda s: {f"_fsdp_wrapped_module.{k}": v for k, v in s.items()},
    "compiled twice": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "arguments": lambda s: {"teacher": s, "args": argparse.Namespace(arch="vit_small")},
    "compiled": lambda s: {"state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_names(layout, backbone, tmp_path):
    torch.save(LAYOUTS[layout](backbone), tmp_path / "weights.pth")
    state = read_backbone(str(tmp_path / "weights.pth"))
    assert state.keys() == backbone.keys() and all(
        torch.equal(state[k], backbone[k]) for k in state
    )


def test_safetensors(backbone, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(backbone, tmp_path / "weights.safetensors")
    state = read_backbone(str(tmp_path / "weights.safetensors"))
    assert state.keys() == backbone.keys() and all(
        torch.equal(state[k], backbone[k]) for k in state
    )


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does: lists a model's files, says a file's size, sends it. Of o/cut
    it sends a half."""

    files: ClassVar[dict] = {}

    def do_HEAD(self):
        _, owner, name, rest = self.path.split("/", 3)
        if owner == "api":  # /api/models/o/whole/tree/main
            name = rest.split("/")[1]
            listing = [{"type": "file", "path": "README.md", "size": 1, "oid": "1"}]
            listing += [{"type": "file", "path": file, "size": len(data), "oid": file}
                        for file, data in self.files.items()]
            data = json.dumps(listing).encode()
        else:
            data = self.files[rest.split("/")[-1]]
        self.send_response(200 if name in ("whole", "cut") else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        return data[: len(data) // 2] if name == "cut" and owner != "api" else data

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *_):
        pass


def test_weights_from_the_hub(backbone, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    Hub.files["model.safetensors"] = safetensors.save(backbone)
    Hub.files["pytorch_model.bin"] = b"not this one"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import reddino\n"
        "for name in ('whole', 'cut', 'none'):\n"
        "    try: print(*reddino.read_backbone(f'hf_hub:o/{name}'))\n"
        "    except reddino.UserError as error: print('error', error)"
    )
    place = f"http://127.0.0.1:{server.server_port}"
    given = dict(HF_ENDPOINT=place, HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1", NO_PROXY="*")
    folder = Path(reddino.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
                         env={**os.environ, **given})  # fmt: skip
    server.shutdown()
    whole, cut, none = run.stdout.splitlines()
    assert set(whole.split()) == set(backbone)
    assert cut.startswith("error hf_hub:o/cut: ") and none.startswith("error hf_hub:o/none: ")


def test_patches_of_16_pixels(tmp_path):
    """XRay-DINO's: ViT-L/16, here with two narrow blocks."""
    other = timm.models.VisionTransformer(
        64, 16, embed_dim=128, depth=2, num_heads=2, init_values=1.0, num_classes=0
    ).eval()
    shaken(other)
    torch.save({"teacher": other.state_dict()}, tmp_path / "it.pth")
    ours = vit_from_state(read_backbone(str(tmp_path / "it.pth")))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert ours.patch_size == 16 and ours.img_size == 64
        close(ours(x), other.forward_features(x)[:, 0])


def test_our_checkpoints_give_the_teacher(tmp_path):
    model = DINO(tiny())
    shaken(model.teacher)
    torch.save(
        {"teacher": model.teacher.state_dict(), "networks": [], "step": 3},
        tmp_path / "checkpoint.pth",
    )
    state, own = (
        read_backbone(str(tmp_path / "checkpoint.pth")),
        model.teacher["backbone"].state_dict(),
    )
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in state)


def test_a_vit_without_a_class_token_is_refused(backbone, tmp_path):
    """SigLIP's, and others that average their patches."""
    torch.save({k: v for k, v in backbone.items() if k != "cls_token"}, tmp_path / "it.pth")
    with pytest.raises(UserError, match="no vision transformer in DINOv2's or timm's layout"):
        read_backbone(str(tmp_path / "it.pth"))


def test_positions_of_another_size_are_stretched_once(backbone):
    vit = VisionTransformer(28, 14, 128, depth=3, heads=2)
    said = load_weights(vit, backbone, "that file")
    assert "that file" in said and "\n" not in said
    grid = backbone["pos_embed"][0, 1:].double().numpy().reshape(4, 4, 128)
    expected = np.einsum("iy,jx,yxd->ijd", cubic_weights(4, 2), cubic_weights(4, 2), grid)
    np.testing.assert_allclose(
        vit.pos_embed[0, 1:].detach().numpy().reshape(2, 2, 128), expected, atol=1e-5
    )
    assert torch.equal(vit.blocks[2].mlp.fc1.weight, backbone["blocks.2.mlp.fc1.weight"])


def test_what_is_new_is_named_and_what_is_unknown_refused(backbone):
    state = {k: v for k, v in backbone.items() if k != "mask_token"}
    vit = VisionTransformer(56, 14, 128, depth=3, heads=2, registers=4)
    said = load_weights(vit, state, "it")
    assert "mask_token" in said and "register_tokens" in said
    for key in ("blocks.0.attn.q_norm.weight", "extra\x1b[31m"):
        with pytest.raises(UserError) as error:
            load_weights(vit, {**state, key: torch.ones(1)}, "it")
        assert repr(key) in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("heads, wide", [(5, 64), (4, 80)])
def test_heads_that_the_width_does_not_tell_are_asked_for(heads, wide, tmp_path):
    model = timm.models.VisionTransformer(
        patch_size=14,
        depth=2,
        num_classes=0,
        init_values=1.0,
        embed_dim=heads * wide,
        num_heads=heads,
    ).eval()
    shaken(model)
    torch.save(model.state_dict(), tmp_path / "it.pth")
    state = read_backbone(str(tmp_path / "it.pth"))
    with pytest.raises(UserError, match="--heads"):
        vit_from_state(state)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        close(vit_from_state(state, heads=heads)(x), model.forward_features(x)[:, 0])


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
    for name, file in (
        ("dinov2_vits14", "dinov2_vits14/dinov2_vits14_pretrain.pth"),
        ("dinov2_vitg14_reg", "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"),
    ):
        with pytest.raises(UserError, match=name):
            read_backbone(name)
        assert asked[-1][0].endswith(file) and asked[-1][1] is True
    with pytest.raises(UserError, match="no such file"):
        read_backbone(str(tmp_path / "none.pth"))
    assert len(asked) == 2
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: dict(backbone))
    assert read_backbone("dinov2_vits14").keys() == backbone.keys()


# -------------------------------------------------------------------------------------------
# options


def test_every_option_is_in_the_help_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        reddino.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(reddino.Config):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), flag
        assert " ".join(field.metadata["help"].split()) in text, flag
        assert len(field.metadata["help"]) > 5
        assert f"[{field.metadata['default']}" in text, flag


def test_the_command_line_makes_the_config():
    for field in dataclasses.fields(reddino.Config):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.metadata["default"], bool):
            assert getattr(reddino.parse_args(["--data", "x", flag]), field.name) is True
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
    assert (
        cfg.iters == 36500
        and reddino.parse_args(["--data", "a", "--arch", "vitb14", "--iters", "7"]).iters == 7
    )
    assert (
        reddino.parse_args([]).arch == "nano"
        and reddino.parse_args(["--data", "a"]).arch == "vits14"
    )


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
    ("--data x --drop-path 2", "drop-path"),
    ("--data x --lr nan", "lr"),
    ("--data x --seed -1", "seed"),
    ("--data x --teacher-temp-warmup -1", "warmup"),
    ("--data x --weight-decay-end -1", "weight-decay"),
    ("--data x --teacher-temp 0", "temp"),
    ("--data x --accumulate 3", "accumulate"),
    ("--data x --prototypes 9223372036854775807", "prototypes"),
    ("--data x --batch-size 99999999999999999999", "batch-size"),
    ("--data", "data"),
])  # fmt: skip
def test_nonsense_gets_one_line_and_exit_2(line, word, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.mkdir("x")
    with pytest.raises(SystemExit) as stop:
        reddino.main([*line.split(), "--out", "out"])
    said = capsys.readouterr()
    assert (
        stop.value.code == 2
        and said.err.startswith("reddino.py: error: ")
        and said.err.count("\n") == 1
    )
    assert word in said.err and not Path("out").exists()


@pytest.mark.parametrize("error, word", [
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "more --accumulate"),
    (OSError(12, "Cannot allocate memory"), "more --accumulate"),
    (reddino.UserError("a loading process was killed: out of memory?"), "loading process"),
])  # fmt: skip
def test_whose_memory_ran_out_is_said(error, word, capsys, monkeypatch):
    def fail(cfg):
        raise error

    monkeypatch.setattr(reddino, "train", fail)
    with pytest.raises(SystemExit) as stop:
        reddino.main(["--data", "x", "--arch", "nano"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and word in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [
    reddino.UserError("'timelapse' is no folder"), OSError("'timelapse' is gone")])  # fmt: skip
def test_a_name_with_time_in_it_is_no_failed_exchange(error, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert reddino.in_words(error) == str(error)


def test_the_demo_draws_its_batches_from_one_smear_unless_told_otherwise():
    assert reddino.parse_args([]).mix == 1 and reddino.parse_args(["--mix", "0"]).mix == 0
    assert reddino.parse_args(["--data", "smears", "--arch", "nano"]).mix == 0


def test_nanos_head_standardises_as_a_batch_norm_does():
    x = 5 * torch.randn(50, 8, dtype=torch.float64) + 3
    close(reddino.Standardise()(x), F.batch_norm(x, None, None, training=True))
    assert torch.equal(reddino.Standardise()(x[:1]), torch.zeros(1, 8, dtype=torch.float64))
    assert reddino.Standardise()(x[:0]).shape == (0, 8)
    head = reddino.DINOHead(8, 5, hidden=16, bottleneck=8, standardise=True)
    assert [type(layer).__name__ for layer in head.mlp] == [
        "Linear", "Standardise", "GELU", "Linear", "Standardise", "GELU", "Linear"]
