"""RedDino in one file: self-supervised pretraining of a vision transformer on medical images.

    python reddino.py                              # draws blood smears, trains on them
    python reddino.py --data SMEARS --arch nano    # your images, a model for a laptop
    torchrun --nproc_per_node=8 reddino.py --data SMEARS --arch vitb14 --init dinov2_vitb14

RedDino (Zedda et al., MICCAI 2025, arXiv:2508.08180) is DINOv2 (Oquab et al. 2023,
arXiv:2304.07193) on red blood cells. DINOv2 is DINO (Caron et al. 2021) plus iBOT (Zhou et al.
2022). `grep -n "RedDino:" *.py` prints what RedDino changed; nearly all else is DINOv2. Ours are
`nano`, the recipes for other organs, and how images are cut and mixed. How it works:

  - A *student* network sees crops of an image, some with patches masked. It says which of K
    *prototypes* each crop (class token) and each masked patch (patch token) belongs to.
  - A *teacher*, the student's running average (EMA), sees the large crops unmasked and answers.
  - Both could agree on "prototype 1, always". Sinkhorn-Knopp prevents it: it balances the
    teacher's answers, so that over a batch all prototypes are used alike.

The first half is the method, in the order in which an image passes (augment.py makes its views), up
to the loop, `train_steps`. The second is what a run needs besides: checkpoints, weights, processes,
the command line. Shapes: B images, G = 2 global and L local views of each, N patches a view, T = 1
+ registers + N tokens, D dimensions, C of the bottleneck, K prototypes, M masked patches, R rows.
"""
import argparse
import copy
import dataclasses
import gc
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections import OrderedDict, deque
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout  # torch brings it
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from augment import RECIPES, BadImage, Tiles, UserError, batches, check_window, normalise

# ----------------------------------------
# Configuration: the command line is made from this class. Defaults are those of RedDino's released
# ViT-S, but for `init`; PRESETS says what differs elsewhere.

ARCHS = {
    "nano": dict(embed_dim=128, depth=4, heads=2, patch_size=8, layerscale=1.0, stem="convs"),  # 1M
    "vits14": dict(embed_dim=384, depth=12, heads=6, patch_size=14),  # 22M parameters
    "vitb14": dict(embed_dim=768, depth=12, heads=12, patch_size=14),  # 86M
    "vitl14": dict(embed_dim=1024, depth=24, heads=16, patch_size=14),  # 304M
    "vitg14": dict(embed_dim=1536, depth=40, heads=24, patch_size=14, swiglu=True),  # 1.1B
}

def opt(default, text, choices=None, low=0, high=10**9):
    """An option: its default, help, and what it may be (a number: low to high)."""
    allowed = dict(default=default, help=text, choices=choices, low=low, high=high)
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=allowed)

@dataclasses.dataclass
class Config:
    data: list[str] = opt([], "folders of images, searched recursively; each is a source")
    out: str = opt("out", "folder of checkpoints, metrics, backbone.pth; a run goes on there")
    # what is trained
    arch: str = opt("vits14", "the backbone", list(ARCHS))
    init: str = opt("", "start from a backbone: a file, dinov2_vits14, ..., hf_hub:OWNER/NAME")
    registers: int = opt(0, "register tokens (Darcet et al. 2024: 4; RedDino: none)")
    drop_path: float = opt(0.0, "stochastic depth (DINOv2: 0.3, 0.4; RedDino: 0)", high=0.99)
    prototypes: int = opt(131072, "K (RedDino, DINOv2 long; short: 65536)", low=1)
    separate_heads: bool = opt(False, "a head for patches of their own (DINOv2 long)")
    # what it sees
    unit: str = opt("tiles", "windows, or cells in them (ct: what is bright)", ["tiles", "cells"])
    tile_size: list[int] = opt([224], "side in pixels (RedDino); 0: whole; or several")
    window: list[float] = opt([], "LEVEL WIDTH: what is seen of deep grey", low=-math.inf)
    global_size: int = opt(224, "pixels of the global views (DINOv2)", low=1)
    local_size: int = opt(98, "pixels of the local views (DINOv2 with patch 14)", low=1)
    local_crops: int = opt(1, "local views of an image (RedDino: 1; DINOv2: 8)", high=100)
    global_scale: float = opt(0.32, "least area share of a global view (DINOv2)", low=0.06, high=1)
    augment: str = opt("reddino", "pixel transforms; none: flips and turns alone", list(RECIPES))
    balance: bool = opt(False, "draw from the folders evenly, whatever their sizes")
    mix: int = opt(0, "images a batch comes from; 0: any; 1: stain gives no clue")
    # the objective
    centering: str = opt("sinkhorn-knopp", "how targets are balanced (RedDino, DINOv2 long)",
                         ["sinkhorn-knopp", "moving-average"])
    koleo: float = opt(0.0, "weight of KoLeo (DINOv2: 0.1; RedDino takes it out)")
    ibot: float = opt(1.0, "weight of the patch-token loss (DINOv2)")
    teacher_temp: float = opt(0.07, "the teacher's, at first at most 0.04 (DINO)", low=1e-6)
    teacher_temp_warmup: float = opt(3.0, "of all steps (RedDino: 30/10 epochs; DINOv2: 0.3)")
    # the optimiser
    iters: int = opt(19500, "optimiser steps (RedDino S: 10 x 1,950)", low=1)
    batch_size: int = opt(560, "images a step, over all processes (RedDino S: 2 GPUs x 280)", low=1)
    accumulate: int = opt(1, "micro-batches a step: less memory, same result (but KoLeo)", low=1)
    lr: float = opt(2e-4, "peak, at batch 1024; scaled by a square root (RedDino, DINOv2 long)")
    warmup: float = opt(0.01, "share in which lr rises (RedDino; DINOv2: 0.1, 0.16)", high=1)
    weight_decay_end: float = opt(0.2, "after 0.04 at first (RedDino, DINOv2 long; short: 0.4)")
    momentum: float = opt(0.994, "of the EMA, 1 at the end (RedDino, DINOv2 long)", high=1)
    freeze_backbone_steps: int = opt(0, "steps for heads alone; in as many again lr rises")
    eval_data: list[str] = opt([], "labelled cells as in eval.py: 20-NN at each checkpoint")
    # the machine
    seed: int = opt(0, "of everything random")
    workers: int = opt(-1, "loading processes; -1: 1 beside a CPU, or by cores", low=-1, high=1024)
    device: str = opt("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])
    dtype: str = opt("auto", "of products; auto: bfloat16 where the hardware has it",
                     ["auto", "float32", "bfloat16", "float16", "float64"])
    compile: bool | None = opt(None, "torch.compile each block; by default on CUDA")
    checkpoint_activations: bool = opt(False, "recompute blocks backward: half the memory")
    save_every: int = opt(500, "steps between checkpoints", low=1)
    log_every: int = opt(10, "steps between lines of the log", low=1)

PRESETS = {
    # From scratch, on little data, in minutes (a search on drawn smears: tests/RESULTS.md). Squares
    # of 56 pixels hold one cell: its neighbours would give away which views belong together.
    "nano": dict(prototypes=256, tile_size=[56], global_size=40, local_size=16, local_crops=0,
                 global_scale=0.7, augment="cells", koleo=0.1, ibot=0.1, momentum=0.95,
                 teacher_temp=0.03, iters=1300, batch_size=48, lr=4e-3, warmup=0.1,
                 weight_decay_end=0.04),
    "vitb14": dict(iters=36500, batch_size=392),  # RedDino B: 2 GPUs x 196, 10 x 3,650 steps
    "vitl14": dict(iters=109000, batch_size=128),  # RedDino L: 2 GPUs x 64, 10 x 10,900 steps
    "vitg14": dict(iters=109000, batch_size=128),  # RedDino has none: as L
    **{organ: dict(global_scale=0.5) for organ in ("ct", "mri", "xray")},  # a view holds anatomy
}
DEMO = dict(arch="nano", unit="cells", mix=1)  # what it draws tells its classes by shape alone

# ----------------------------------------
# Patches. A ViT reads an image as a sequence of N square patches of p x p pixels, each projected
# linearly to D dimensions. To each it adds a learned embedding of its position. At another image
# size the grid of positions is stretched bicubically. (Dosovitskiy et al. 2021, section 3.1.)

def upcast(x):
    """At least float32, for exponentials and long sums, whatever autocast gave."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def resize_pos_embed(pos, height, width, registers=0):
    """Positions [1, 1 + n*n, D], class token first, to [1, 1 + height*width, D], as DINOv2's
    weights expect: stretched by (size + 0.1) / n; those with registers exactly, antialiased."""
    n = math.isqrt(pos.shape[1] - 1)
    if (height, width) == (n, n):
        return pos
    size = dict(scale_factor=((height + 0.1) / n, (width + 0.1) / n))
    if registers:
        size = dict(size=(height, width), antialias=True)
    grid = upcast(pos[:, 1:]).reshape(1, n, n, -1).permute(0, 3, 1, 2)  # [1, D, n, n]
    grid = F.interpolate(grid, mode="bicubic", **size).flatten(2).transpose(1, 2)
    return torch.cat([pos[:, :1], grid.to(pos.dtype)], dim=1)

def conv_stem():
    """Images [B, 3, H, W] to [B, 96, H/8, W/8] by 3x3 convolutions, every other of stride 2. For
    nano alone: one 8x8 matrix takes very long to learn what an edge is (Xiao et al. 2021)."""
    layers, widths = [], (3, 24, 24, 48, 48, 96, 96)
    for before, width, stride in zip(widths, widths[1:], (2, 1) * 3):
        convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(width // 8, width), nn.GELU()]
    return nn.Sequential(*layers)

# ----------------------------------------
# The transformer: x + attention(norm(x)), then x + mlp(norm(x)), `depth` times. Parameters are
# named as in DINOv2's checkpoints.

PLAIN_BELOW = 512  # tokens: plain matrices take less time on a CPU, the fused product less memory

class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] to [B, N, D]: each token gets the mean of all
    tokens' v, weighted by softmax(q k / sqrt(D / heads)) (Vaswani et al. 2017)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        if x.device.type == "cpu" and q.shape[2] < PLAIN_BELOW:
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
            x = weights.to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

def Mlp(dim):
    fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
    return nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

class SwiGLU(nn.Module):
    """The giant's gated feed-forward (Shazeer 2020), with about Mlp's parameters."""

    def __init__(self, dim):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

class Block(nn.Module):
    """One layer, [B, T, D] to [B, T, D], with stochastic depth (Huang et al. 2016): in training a
    share of the images, drop_path, skips a branch. As in DINOv2 a branch is computed only for the
    images kept, then scaled by B / kept. B x drop_path is rarely whole: `place` makes some blocks
    round up and others down, so that the mean is right."""

    def __init__(self, dim, heads, ffn, layerscale, drop_path, place):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), ffn(dim)
        # LayerScale, a gain near 0: a deep network starts as the identity (Touvron et al. 2021)
        self.ls1 = nn.ParameterDict({"gamma": torch.full((dim,), layerscale)})
        self.ls2 = nn.ParameterDict({"gamma": torch.full((dim,), layerscale)})
        self.drop_path, self.place = drop_path, place

    def forward(self, x):
        x = self.add(x, lambda x: self.ls1.gamma * self.attn(self.norm1(x)))
        return self.add(x, lambda x: self.ls2.gamma * self.mlp(self.norm2(x)))

    def add(self, x, branch):
        kept = max(int(len(x) * (1 - self.drop_path) + self.place), 1)
        if not self.training or kept >= len(x):
            return x + branch(x)
        chosen = torch.randperm(len(x), device=x.device)[:kept]
        return x.index_add(0, chosen, branch(x[chosen]).to(x.dtype), alpha=len(x) / kept)

class VisionTransformer(nn.Module):
    """ViT as in DINOv2, for images of any size that patch_size divides; img_size: of the stored
    positions; stem: "linear", DINOv2's projection of a patch, or "convs", see conv_stem."""

    def __init__(self, img_size, patch_size, embed_dim, depth, heads, swiglu=False, registers=0,
                 layerscale=1e-5, drop_path=0.0, stem="linear"):
        super().__init__()
        self.img_size, self.patch_size, self.embed_dim = img_size, patch_size, embed_dim
        self.registers, self.checkpoint_activations = registers, False
        if stem == "convs":
            parts = dict(stem=conv_stem(), proj=nn.Conv2d(96, embed_dim, 1))
        else:
            parts = dict(proj=nn.Conv2d(3, embed_dim, patch_size, stride=patch_size))
        self.patch_embed = nn.ModuleDict(parts)
        n = (img_size // patch_size) ** 2
        std = 0.02 if embed_dim >= 384 else 0.2
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(std * torch.randn(1, 1 + n, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        if registers:
            self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, embed_dim))
        options = embed_dim, heads, SwiGLU if swiglu else Mlp, layerscale, drop_path
        self.blocks = nn.ModuleList(Block(*options, (i + 0.5) / depth) for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear)

    def forward_features(self, x, masks=None):
        """Images [B, 3, H, W] to class token [B, D] and patch tokens [B, N, D]. Masked patches,
        bool [B, N], lose their content and keep their position: what belongs *there*?"""
        (height, width), p = x.shape[-2:], self.patch_size
        if height % p or width % p:
            raise UserError(f"{width} x {height} pixels are no whole {p}-pixel patches")
        for part in self.patch_embed.values():
            x = part(x)
        x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [B, 1 + N, D]
        x = x + resize_pos_embed(self.pos_embed, height // p, width // p, self.registers)
        if self.registers:  # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)

        for block in self.blocks:  # [B, T, D]
            again = self.checkpoint_activations  # computed again in the backward pass
            x = recompute(block, x, use_reentrant=False) if again else block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.registers:]

    def forward(self, x):
        """Images [B, 3, H, W], normalised by MEAN and STD, to class tokens [B, D]: the features."""
        return self.forward_features(x)[0]

def init_linear(module):
    """As in DINOv2: truncated normal, std 0.02. In nano's narrow layers that passes hardly anything
    on: Xavier's (Glorot and Bengio 2010), and std 0.2 for positions, gave points of k-NN score."""
    if isinstance(module, nn.Linear):
        if module.in_features < 384:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)

def build_vit(arch, img_size=224, **overrides):
    """A VisionTransformer of ARCHS (DINOv2, appendix), with random weights."""
    return VisionTransformer(img_size, **(ARCHS[arch] | overrides))

# ----------------------------------------
# Heads. A head says how alike a token is to each of K prototypes: an MLP, the result on the unit
# sphere, then its product with K vectors of trained length: gain x cosine. (DINO, section 3.1.)

HEAD_SIZES = {"nano": dict(hidden=256, bottleneck=64, standardise=True)}

class Standardise(nn.Module):
    """Each channel of [R, D] to mean 0 and variance 1 over the rows: a batch norm without a memory.
    For nano alone, as in DINO's heads of convolutional networks: at first class tokens are the
    same up to 5% of their length, which would be lost (20-NN, 1,000 steps: 64 with it, else 60)."""

    def forward(self, x):
        x = upcast(x)
        return (x - x.mean(0)) * (x.var(0, correction=0) + 1e-5).rsqrt()

class DINOHead(nn.Module):
    """Tokens [R, D] to logits over prototypes [R, K]: 3-layer MLP, unit sphere, prototypes."""

    def __init__(self, dim, K, hidden=2048, bottleneck=256, standardise=False):
        super().__init__()
        norm = [Standardise()] if standardise else []
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), *norm, nn.GELU(), nn.Linear(hidden, hidden), *norm, nn.GELU(),
            nn.Linear(hidden, bottleneck))
        self.apply(init_linear)
        v = nn.init.kaiming_uniform_(torch.empty(K, bottleneck), a=math.sqrt(5))  # as DINOv2
        self.last_layer = nn.ParameterDict({"weight_g": torch.ones(K, 1), "weight_v": v})

    def prototypes(self):  # [K, C]: g * v / |v|
        return torch._weight_norm(self.last_layer.weight_v, self.last_layer.weight_g)

    def on_sphere(self, x):  # [R, C], of length 1
        return F.normalize(upcast(self.mlp(x)), dim=-1)

    def forward(self, x):
        return F.linear(self.on_sphere(x), self.prototypes())

# ----------------------------------------
# The teacher's targets. Softmax alone would let all fall onto one prototype. Sinkhorn-Knopp finds
# the nearest assignment in which a batch uses all equally (Cuturi 2013; SwAV, Caron et al. 2020).
# Moving-average centering (DINO) subtracts the running mean: cheaper, balanced on average only.

def all_reduce(x, op=dist.ReduceOp.SUM):
    """x summed (or op) over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x

@torch.no_grad()
def sinkhorn_knopp(logits, temp, n_iters=3):
    """Teacher logits [R, K] to targets [R, K]: rows sum to 1, each prototype gets about R/K.

    RedDino: takes it, as DINOv2's long recipe does. DINOv2's default is moving_average, below.
    Divide the columns of exp(logits / temp) by their sums, over all processes, then the rows by
    theirs, in turn.
    """
    logits = upcast(logits)
    top = logits.amax() if len(logits) else logits.new_tensor(-math.inf)
    top = all_reduce(top, dist.ReduceOp.MAX)
    q = (logits - top).div_(temp).clamp_(min=-80).exp_()  # e^-80: nothing, but no column sums to 0
    for _ in range(n_iters):
        q /= all_reduce(q.sum(0, keepdim=True))
        q /= q.sum(1, keepdim=True)
    return q

def moving_average(logits, temp, center):
    """Teacher logits [R, K] to targets [R, K], DINO's: softmax((logits - center) / temp). And the
    mean of the rows of all processes, [1, K], towards which the center moves after the step."""
    logits = upcast(logits)
    rows = all_reduce(logits.new_tensor(float(len(logits))))
    mean = all_reduce(logits.sum(0, keepdim=True)) / rows.clamp_min(1)
    return F.softmax((logits - center) / temp, dim=-1), mean

# ----------------------------------------
# Losses. Two are cross-entropies between the teacher's targets t and the student's softmax,
# -sum_k t_k log softmax(logits / 0.1)_k. dino_loss compares class tokens of different crops of an
# image: features must not depend on the crop. ibot_loss compares a patch that the teacher sees and
# the student doesn't: a patch must follow from its surroundings. KoLeo spreads the features of a
# batch. (DINOv2, section 4.)

def dino_loss(head, cls, local_cls, targets):
    """Class-token loss, averaged over pairs of views: the student's global views, [B, G, D], meet
    the teacher's targets, [B, G, K], of all other views; its local ones, [B, L, D], those of all.
    As -sum t log q is linear in t, targets are added first. Temperature 0.1: DINO."""
    B, G, L = *targets.shape[:2], local_cls.shape[1]
    everyones = targets.sum(1, keepdim=True)  # [B, 1, K]
    answers = torch.cat([everyones - targets, everyones.expand(B, L, -1)], dim=1)  # [B, G + L, K]
    x = head.on_sphere(torch.cat([cls, local_cls], dim=1).flatten(0, 1))  # [B (G + L), C]
    weights = x.new_full((len(x),), 1 / (B * G * (G - 1 + L)))
    return LinearCrossEntropy.apply(x, head.prototypes(), answers.flatten(0, 1), weights, 0.1)

def ibot_loss(head, patches, targets, patch_weights, views):
    """Patch-token loss: masked patches [M, D] against targets [M, K], averaged within each masked
    view (patch_weights [M]: 1 / its masked patches), divided by all views."""
    x, weights = head.on_sphere(patches), patch_weights / views  # [M, C], [M]
    return LinearCrossEntropy.apply(x, head.prototypes(), targets, weights, 0.1)

class LinearCrossEntropy(torch.autograd.Function):
    """sum_r weights_r * cross_entropy(x_r @ prototypes.T / temp, targets_r), a few rows at a time.

    With K = 131,072, logits, softmax and their gradient would outweigh all else in memory. But the
    gradient is known, softmax minus target: it is written down on the way forward, and the logits
    are gone (as in language models: Hsu et al. 2024, Liger). Under autocast only products are in
    half precision. float16 would make small weights 0: for grad_p they are divided by their mean
    before the product, which is then multiplied by it; for grad_x they come after.
    """

    @staticmethod
    def forward(ctx, x, prototypes, targets, weights, temp):  # [R, C], [K, C], [R, K], [R], float
        dtype = (x[:0] @ prototypes[:0].T).dtype  # autocast's, where it is on
        p, half_x = prototypes.to(dtype), x.to(dtype)  # once, not for each few rows
        mean = weights.sum() / max(len(x), 1)
        weighted = (x * (weights / mean)[:, None]).to(dtype)
        loss, grad_x, grad_p = x.new_zeros(()), torch.zeros_like(x), torch.zeros_like(prototypes)
        some = max(2**24 // len(prototypes), 1)  # rows, whose logits take 64 MB
        for first in range(0, len(x), some):
            rows = slice(first, first + some)
            t = targets[rows]
            log_q = F.log_softmax((half_x[rows] @ p.T).to(x.dtype).div_(temp), dim=1)  # [rows, K]
            loss -= ((t * log_q).sum(1) * weights[rows]).sum()
            # d loss / d logits, without weights and 1/temp; t sums to over 1 with several answers
            error = log_q.exp_().mul_(t.sum(1, keepdim=True)).sub_(t).to(dtype)
            grad_x[rows] = error @ p
            grad_p += error.T @ weighted[rows]
        ctx.save_for_backward(grad_x * (weights / temp)[:, None], grad_p.mul_(mean / temp))
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_p = ctx.saved_tensors
        return grad * grad_x, grad * grad_p, None, None, None

def koleo_loss(x, eps=1e-8):
    """-mean log distance of each class token [B, D] to its nearest neighbour on the unit sphere
    (Sablayrolles et al. 2019); within a micro-batch, as in DINOv2 within a GPU."""
    x = F.normalize(upcast(x), dim=-1)
    with torch.no_grad():  # by differences: products in bfloat16 can't tell neighbours apart
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.fill_diagonal_(math.inf).argmin(dim=1)  # not itself
    return -(x - x[nearest]).norm(dim=-1).clamp_min(eps).log().mean()

# ----------------------------------------
# One training step: the teacher gives targets of a batch, the student losses of a micro-batch.

def split_batch(global_views, local_views, masks, parts, device, dtype):
    """uint8 views [B, G, 3, S, S] and [B, L, 3, s, s], masks bool [B, G, N], to micro-batches on
    the device: views as floats; masks; index [M], places of masked patches among B*G*N;
    patch_weights [M], 1 / those of their view. The CPU counts, as it would wait for a GPU."""
    micro_batches = []
    for views, small, mask in zip(*(t.chunk(parts) for t in (global_views, local_views, masks))):
        index = mask.flatten().nonzero().squeeze(1)
        share = 1 / mask.sum(2, keepdim=True)  # inf in views without masks, which [mask] leaves out
        patch_weights = share.expand_as(mask)[mask]
        moved = [t.to(device, non_blocking=True) for t in (mask, index, patch_weights.to(dtype))]
        views, small = (normalise(t, device, dtype) for t in (views, small))
        micro_batches.append((views, small, *moved))
    return micro_batches

class DINO(nn.Module):
    """Student and teacher, each a backbone with a head (two with separate_heads)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        # RedDino: one head for both kinds of tokens, as is DINOv2's default
        self.patch_head = "ibot_head" if cfg.separate_heads else "dino_head"
        self.student = self.network(cfg.drop_path)
        self.student["backbone"].checkpoint_activations = cfg.checkpoint_activations
        self.teacher = self.network(drop_path=0.0).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        kinds = ("cls", "patch") if cfg.centering == "moving-average" else ()  # their means differ
        centers = {kind: torch.zeros(1, cfg.prototypes) for kind in kinds}
        self.centers = nn.ParameterDict(centers).requires_grad_(False)

    def network(self, drop_path):
        cfg, sizes = self.cfg, HEAD_SIZES.get(self.cfg.arch, {})
        vit = build_vit(cfg.arch, cfg.global_size, registers=cfg.registers, drop_path=drop_path)
        heads = {name: DINOHead(vit.embed_dim, cfg.prototypes, **sizes)
                 for name in sorted({"dino_head", self.patch_head})}
        return nn.ModuleDict({"backbone": vit} | heads)

    @torch.no_grad()
    def teacher_targets(self, micro_batches, temp):
        """For each micro-batch, for forward below, the targets of class tokens [B, G, K] and masked
        patches [M, K], balanced over the whole batch; and what the loop watches, centers' means."""
        cls, patches = [], []  # of each micro-batch
        for views, _, _, index, _ in micro_batches:
            one_cls, all_patches = self.teacher["backbone"].forward_features(views.flatten(0, 1))
            cls.append(one_cls.unflatten(0, views.shape[:2]))  # [B, G, D]
            patches.append(all_patches.flatten(0, 1)[index])  # [M, D]
        all_cls = torch.cat(cls)
        logits = self.teacher["dino_head"](all_cls.flatten(0, 1))  # [B G, K]
        patch_logits = self.teacher[self.patch_head](torch.cat(patches))  # [M, K]
        if self.centers:
            targets, mean = moving_average(logits, temp, self.centers["cls"])
            patch_targets, patch_mean = moving_average(patch_logits, temp, self.centers["patch"])
        else:
            targets, mean = sinkhorn_knopp(logits, temp), None
            patch_targets, patch_mean = sinkhorn_knopp(patch_logits, temp), None
        entropy = torch.special.entr(F.softmax(upcast(logits) / temp, dim=1)).sum(1).mean()
        seen = {"cls": all_cls, "entropy": entropy, "means": (mean, patch_mean)}
        targets = targets.unflatten(0, all_cls.shape[:2]).chunk(len(cls))
        return list(zip(targets, patch_targets.split([len(one) for one in patches]))), seen

    def forward(self, global_views, local_views, masks, index, patch_weights, targets,
                patch_targets):
        """The student's losses on a micro-batch, by name; their sum is minimised. A new loss is a
        function and a line here. Shapes: see split_batch and teacher_targets."""
        backbone = self.student["backbone"]
        (B, G), L = masks.shape[:2], local_views.shape[1]
        cls, patches = backbone.forward_features(global_views.flatten(0, 1), masks.flatten(0, 1))
        cls, patches = cls.unflatten(0, (B, G)), patches.flatten(0, 1)[index]  # [B, G, D], [M, D]
        local_cls = cls[:, :0]
        if L:  # RedDino: 1 local view instead of DINOv2's 8
            local_cls = backbone(local_views.flatten(0, 1)).unflatten(0, (B, L))

        losses = {"dino": dino_loss(self.student["dino_head"], cls, local_cls, targets)}
        patch_head = self.student[self.patch_head]
        ibot = ibot_loss(patch_head, patches, patch_targets, patch_weights, B * G)
        losses["ibot"] = self.cfg.ibot * ibot
        if self.cfg.koleo:  # RedDino: left out, as it pushes apart the many cells that are alike
            losses["koleo"] = self.cfg.koleo * sum(koleo_loss(view) for view in cls.unbind(1))
        return losses

    @torch.no_grad()
    def update_teacher(self, momentum, means=()):
        """teacher = momentum * teacher + (1 - momentum) * student; centers move by 0.1 (DINO)."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        for center, mean in zip(self.centers.values(), means):
            center.lerp_(mean, 0.1)

def train_step(run, views_and_masks, temp):
    """Leaves clipped gradients in the student; returns numbers by name, what the teacher saw.
    run: see set_up; views_and_masks: of the whole batch, see split_batch."""
    count, losses = run.cfg.accumulate, {}
    micro_batches = split_batch(*views_and_masks, count, run.device, run.floats)
    run.optimizer.zero_grad(set_to_none=True)
    with run.autocast:
        targets, seen = run.model.teacher_targets(micro_batches, temp)
    for micro_batch, its_targets in zip(micro_batches, targets):
        # DistributedDataParallel exchanges gradients in the last backward pass only
        run.parallel.require_backward_grad_sync = micro_batch is micro_batches[-1]
        with run.autocast:
            its_losses = run.parallel(*micro_batch, *its_targets)  # DINO.forward
        run.scaler.scale(sum(its_losses.values()) / count).backward()
        for name, value in its_losses.items():
            losses[name] = losses.get(name, 0) + value.detach() / count
    run.scaler.unscale_(run.optimizer)
    norms = {f"grad_{name[:4]}": nn.utils.clip_grad_norm_(part.parameters(), 3.0)  # DINOv2
             for name, part in run.model.student.items()}
    entropy = seen["entropy"]
    return {"loss": sum(losses.values()), **losses, "teacher_entropy": entropy, **norms}, seen

# ----------------------------------------
# Optimiser and schedules: AdamW; a half cosine for the learning rate after a linear warm-up, for
# the weight decay and for the teacher's momentum (DINO, section 3.2).

def cosine(start, end, x):
    """From start, at x = 0, to end, at 1 and after it."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(x, 1)))

def schedules(cfg, step):
    """What changes from step to step, by name."""
    done, lr = step / cfg.iters, cfg.lr * math.sqrt(cfg.batch_size / 1024)
    if done < cfg.warmup:
        lr *= done / cfg.warmup
    else:
        lr = cosine(lr, 1e-6, (done - cfg.warmup) / max(1 - cfg.warmup, 1e-9))  # 1e-6: DINOv2
    cold, freeze = min(0.04, cfg.teacher_temp), cfg.freeze_backbone_steps  # 0.04: DINO
    thawed = min(max(step / freeze - 1, 0), 1) if freeze else 1
    warm = min(done / cfg.teacher_temp_warmup, 1) if cfg.teacher_temp_warmup else 1
    return {"lr": lr, "backbone_lr": lr * thawed, "momentum": cosine(cfg.momentum, 1.0, done),
            "weight_decay": cosine(0.04, cfg.weight_decay_end, done),
            "teacher_temp": cold + (cfg.teacher_temp - cold) * warm}

def make_optimizer(student):
    """AdamW, groups as in DINOv2's long recipe: patches' projection learns at 0.2 of the rate."""
    groups = {}
    linear = "stem" not in student["backbone"].patch_embed
    for name, parameter in student.named_parameters():
        rate = 0.2 if name.startswith("backbone.patch_embed") and linear else 1.0
        decay = parameter.dim() > 1  # none of biases, norms and LayerScale's gains
        follows = "backbone_lr" if name.startswith("backbone") else "lr"
        group = dict(params=[], rate=rate, decay=decay, follows=follows)
        groups.setdefault((rate, decay, follows), group)["params"].append(parameter)
    fused = parameter.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.999), fused=fused)

def apply_schedules(optimizer, now):
    """Sets rates and weight decay of all groups to those of `schedules`."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * now[group["follows"]]
        group["weight_decay"] = now["weight_decay"] * group["decay"]

# ----------------------------------------
# The loop. `run` holds what it works with, see set_up: networks, optimiser, tiles, log.

def train(cfg, monitor=None):
    """Returns OUT/backbone.pth, the teacher's. monitor(backbone, device): numbers by name, asked at
    each checkpoint in every process. Raises UserError, OSError, SystemExit(128 + signal)."""
    with ExitStack() as at_end:
        run = set_up(cfg, at_end)
        try:
            train_steps(cfg, run, monitor)
        except (UserError, BrokenPipeError, SystemExit):  # data end, nobody reads the log, a signal
            save(run)
            raise
        except OSError:  # a full disk: the last checkpoint stands
            raise
        except Exception:  # a bug in a monitor or a transform, no memory, a process that is gone
            with suppress(Exception):  # the first error is the one to be told
                save(run)
            if run.caught:  # others may have gone before this one looked
                raise SystemExit(128 + run.caught[0]) from None
            raise
        weights = run.out / "backbone.pth"
        if run.rank == 0:
            write_aside(weights, run.model.teacher["backbone"].state_dict())
        say(run, f"done: {weights} holds the teacher's backbone")
        return weights

def train_steps(cfg, run, monitor):
    """Until cfg.iters steps are done. Raises as train."""
    model, optimizer, scaler = run.model, run.optimizer, run.scaler
    while run.step < cfg.iters:
        # of augment.Batches: uint8 [B, G, 3, S, S] and [B, L, 3, s, s], bool [B, G, N]
        *views_and_masks, tile_numbers = next_batch(run)
        now = schedules(cfg, run.step)
        apply_schedules(optimizer, now)
        seeds = np.random.default_rng((cfg.seed, run.step, run.rank, 3))
        torch.manual_seed(int(seeds.integers(2**62)))  # so that a resumed run goes on as it would
        numbers, seen = train_step(run, views_and_masks, now["teacher_temp"])

        # --- the one exchange of numbers: means over processes, and whether any is to stop
        numbers["stop"] = len(run.caught)
        means = [torch.as_tensor(v, dtype=run.floats, device=run.device) for v in numbers.values()]
        numbers = dict(zip(numbers, all_reduce(torch.stack(means)).div(run.world).tolist()))
        stop = numbers.pop("stop") > 0

        # --- update, unless a number is not finite: then nothing of this step is kept
        finite = all(map(math.isfinite, numbers.values()))
        if finite:
            scaler.step(optimizer)
            model.update_teacher(now["momentum"], seen["means"])
            run.last.extend(seen["cls"])
            run.bad_in_a_row = 0
        else:
            files = sorted({repr(run.tiles.file_of(i)) for i in tile_numbers})
            print(f"process {run.rank}: step {run.step} skipped, a loss or gradient is not finite; "
                  f"files: {', '.join(files)}", flush=True)
            if scaler.get_scale() <= 1 or not math.isfinite(numbers["loss"]):
                run.bad_in_a_row += 1  # else float16 looks for its scale
        scaler.update()

        # --- write down
        run.step += 1
        end = stop or run.bad_in_a_row == 3 or run.step == cfg.iters
        keep = run.step % cfg.save_every == 0 or end
        try:
            if monitor and keep and finite and not stop:
                found = monitor(model.teacher["backbone"], run.device)
                numbers |= {name: float(value) for name, value in found.items()}
        finally:
            write_down(run, now, numbers, finite, tell=run.step % cfg.log_every == 0 or end)
        if run.bad_in_a_row == 3:
            raise UserError("three steps in a row were not finite, and count for nothing: look at "
                            "these files, lower --lr, try --dtype float32")
        if stop:
            say(run, f"interrupted after step {run.step}; the same command goes on from there")
            raise SystemExit(128 + (run.caught or [signal.SIGTERM])[0])
        if keep:
            save(run)

# ----------------------------------------
# A run, its log and its checkpoints. All randomness is a function of (seed, sample, epoch), see
# augment.py, or (seed, step): a resumed run is the uninterrupted one, on a CPU bit for bit.

MAY_CHANGE = {"data", "out", "init", "workers", "device", "dtype", "compile", "eval_data",
              "checkpoint_activations", "accumulate", "iters", "save_every", "log_every"}

def set_up(cfg, at_end):
    """What a run works with. at_end: an ExitStack, for what is to be done however the run ends."""
    run = SimpleNamespace(cfg=cfg, out=Path(cfg.out), step=0)  # step: how many are done
    run.device, dtype = choose_device(cfg)
    run.rank, run.world = start_processes(run.device)
    if cfg.batch_size % (run.world * cfg.accumulate):
        raise UserError(f"--batch-size {cfg.batch_size}: choose a multiple of {run.world} "
                        f"processes x --accumulate {cfg.accumulate}")
    run.out.mkdir(parents=True, exist_ok=True)  # on each machine
    if run.rank == 0:  # filelock.Timeout: another run writes there
        at_end.enter_context(FileLock(run.out / "lock", timeout=0))
    run.tiles, checksum = find_tiles(cfg)
    if cfg.koleo and cfg.batch_size == run.world * cfg.accumulate:
        run.tiles.notes.append("--koleo does nothing: micro-batches are of one image")
    say(run, f"{cfg.arch} on {len(run.tiles)} {cfg.unit} of {len(run.tiles.files)} images; "
             f"{run.world} x {run.device.type}, {dtype}", *run.tiles.notes)
    run.floats = torch.promote_types(dtype, torch.float32)  # of parameters
    torch.manual_seed(cfg.seed)
    run.model = model = DINO(cfg).to(run.device, run.floats)
    run.optimizer = make_optimizer(model.student)
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)
    run.autocast = torch.autocast(run.device.type, dtype, enabled=dtype.itemsize == 2)
    run.parts = dict(model.named_children(), optimizer=run.optimizer, scaler=run.scaler)
    run.about = dict(images=checksum, processes=run.world)  # as parts: of a checkpoint
    go_on(cfg, run)
    mine = torch.tensor([run.step, checksum], device=run.device)
    if not torch.equal(all_reduce(mine.clone(), dist.ReduceOp.MAX), mine):
        raise UserError("--data, --out: processes see different images or checkpoints")
    gpu, patch = run.device.type == "cuda", ARCHS[cfg.arch]["patch_size"]
    if cfg.compile or (cfg.compile is None and gpu):
        for network in (model.student, model.teacher):
            for block in network["backbone"].blocks:  # by block: seconds
                block.compile()
    run.parallel = nn.parallel.DistributedDataParallel(model) if run.world > 1 else model
    workers = min(cores(), 16 if gpu else 1) if cfg.workers < 0 else cfg.workers
    run.loader = batches(cfg, run.tiles, run.step, patch, run.rank, run.world, workers, pin=gpu)
    at_end.callback(run.loader.close)
    run.log = open_metrics(run) if run.rank == 0 else open(os.devnull, "w")
    run.last = deque(maxlen=1024)  # class tokens [G, D] of as many images
    run.caught = catch_signals(at_end)
    run.first, run.since, run.waited, run.bad_in_a_row = run.step, time.monotonic(), 0.0, 0
    return run

def next_batch(run):
    """Views, masks and tiles' numbers of a step."""
    began = time.monotonic()
    while (batch := next(run.loader)) is None:  # none yet
        if run.caught:
            raise SystemExit(128 + run.caught[0])
    run.waited += time.monotonic() - began
    run.tiles.skipped |= batch[-1]
    return batch[:-1]

def say(run, *lines):
    if run.rank == 0:
        print(*filter(None, lines), sep="\n", flush=True)

def write_down(run, now, numbers, finite, tell):
    """A line of metrics.jsonl, steps counted from 0; if tell, one to read, with the steps done."""
    if tell:
        numbers |= watch(run.last)
    line = {"step": run.step - 1, **now, "skipped": not finite, **numbers}
    line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
    print(json.dumps(line), file=run.log, flush=True)
    if tell:
        cfg, seconds = run.cfg, time.monotonic() - run.since
        rate = (run.step - run.first) / seconds
        told = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        list_skipped(run)
        say(run, f"step {run.step}/{cfg.iters}  {told}  {rate * cfg.batch_size:.1f} images/s, "
            f"{run.waited / seconds:.0%} waiting for them  "
            f"{(cfg.iters - run.step) / rate:.0f} s left", collapse(numbers, cfg.prototypes))

def save(run):
    """OUT/checkpoint.pth; the one before becomes previous.pth."""
    if run.rank > 0 or run.step - run.first == run.bad_in_a_row:  # no step of it counts
        return
    os.fsync(run.log.fileno())
    config = {name: v for name, v in vars(run.cfg).items() if name not in MAY_CHANGE}
    state = {name: part.state_dict() for name, part in run.parts.items()}
    state |= run.about | dict(config=config, step=run.step)
    write_aside(run.out / "checkpoint.pth", state, keep=run.out / "previous.pth")

def load(path, cfg, parts):
    """Fills parts from a checkpoint; raises whatever is wrong with it."""
    saved = load_file(path)
    changed = [f"{flag_of(name)} was {value}" for name, value in saved["config"].items()
               if getattr(cfg, name) != value]
    if changed:
        raise UserError("another run: " + ", ".join(changed))
    for name, part in parts.items():
        if saved[name] or name != "scaler":  # one that is off has nothing to load
            part.load_state_dict(saved[name])
    for p, state in parts["optimizer"].state.items():
        if not p.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
            raise UserError("optimiser of another shape")  # AdamW would write past its end
    return saved

def go_on(cfg, run):
    """Fills the run's parts from its newest good checkpoint, else backbones from --init."""
    newest, said = run.out / "checkpoint.pth", ""
    for path in filter(Path.exists, (newest, newest.with_name("previous.pth"))):
        try:
            saved = load(path, cfg, run.parts)
        except Exception as error:
            said += f"{path}: can't go on from it ({error}); "
            continue
        if path != newest and newest.exists():  # or it would take the good one's place
            newest.replace(newest.with_name("broken.pth"))
        if saved | run.about != saved:
            said += "other images or processes: not bit for bit the uninterrupted run; "
        run.step = saved["step"]
        say(run, f"{said}{path}: going on at step {run.step}")
        return
    if said:
        raise UserError(said + "choose another --out; --init starts from its weights")
    if cfg.init:  # RedDino: from DINOv2's weights; the heads are new
        say(run, load_weights(run.model.student["backbone"], read_backbone(cfg.init), cfg.init))
        run.model.update_teacher(0)  # a copy

def find_tiles(cfg):
    """The tiles of --data, and a checksum: the same names and sizes, the same run."""
    tiles = Tiles(cfg.data, cfg.tile_size, cfg.window, raw=cfg.augment == "ct", unit=cfg.unit)
    if len(tiles) < cfg.batch_size:
        raise UserError(f"--data: {len(tiles)} {cfg.unit} are fewer than --batch-size "
                        f"{cfg.batch_size}")
    if tiles.at_once < len(tiles.files) and not cfg.mix:
        tiles.notes.append(f"batches come from {tiles.at_once} images at a time, as no more are "
                           "kept decoded; cut large images into several, or see augment.KEEP")
    names = [os.path.basename(path) for path in tiles.files], tiles.sizes.tolist(), len(tiles)
    return tiles, zlib.crc32(repr(names).encode())

def write_aside(path, state, keep=None):
    """torch.save, renamed over path (which becomes keep) once it is whole. Raises OSError."""
    aside = path.with_name(path.name + ".new")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch wraps the system's error in its own
        aside.unlink(missing_ok=True)
        raise OSError(f"can't write {path}, is the disk full? ({error})") from None
    if keep and path.exists():
        path.replace(keep)
    aside.replace(path)

def open_metrics(run):
    """metrics.jsonl, without broken lines and those of steps that are done again."""
    path, new = run.out / "metrics.jsonl", run.out / "metrics.new"
    if run.step == 0:
        (run.out / "skipped.txt").unlink(missing_ok=True)
    path.touch()
    lines = re.findall(rb'^({"step": (\d+),.*})', path.read_bytes(), re.MULTILINE)
    new.write_bytes(b"".join(line + b"\n" for line, step in lines if int(step) < run.step))
    return open(new.replace(path), "a")

def list_skipped(run):
    """Lists unreadable files, each once."""
    path = run.out / "skipped.txt"
    listed = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    new = sorted({str(BadImage(*fault)) for fault in run.tiles.skipped.items()} - set(listed))
    if new:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(line + "\n" for line in new)
        say(run, f"{len(listed + new)} files can't be read, {path} lists them; e.g. {new[0]}")

# ----------------------------------------
# Signs of learning and of collapse.

def effective_rank(features):
    """RankMe (Garrido et al. 2023): exp of the entropy of the normalised singular values of [R, D]
    features. Between 1 (all on one line: collapsed) and D."""
    values = torch.linalg.svdvals(features.float().cpu())  # Apple's GPUs have none
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))

def watch(last):
    """From the teacher's class tokens [G, D] of 1,024 images. std: spread on the unit sphere.
    match: how often the nearest to a view, among 64 images' second views, is its own."""
    if len(last) < 1024:
        return {}
    cls = torch.stack(list(last)).float()  # [1024, G, D]
    x = F.normalize(cls, dim=2)
    first, second = x.unflatten(0, (16, 64))[:, :, :2].unbind(2)  # [16, 64, D]
    found = (first @ second.transpose(1, 2)).argmax(2)  # [16, 64]
    match = (found == torch.arange(64, device=x.device)).float().mean()
    return {"rank": effective_rank(cls.flatten(0, 1)), "match": float(match),
            "std": float(x.flatten(0, 1).std(0).norm())}

def collapse(numbers, K):
    """A warning: class tokens all but one and the same, or a teacher without an opinion."""
    no_opinion = numbers["teacher_entropy"] > 0.999 * math.log(K)
    if "rank" in numbers and (numbers["rank"] < 2 or numbers["std"] < 0.01 or no_opinion):
        return "WARNING: the teacher has collapsed; see the README, 'Signs of collapse'"
    return ""

# ----------------------------------------
# Weights from elsewhere. Whatever layout a ViT was published in, it ends as a state dict under
# DINOv2's names. A .pth is a pickle: without weights_only=True a hostile one would run its code.

HUB = "https://dl.fbaipublicfiles.com/dinov2"
DINOV2 = [f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]
# Attention heads by width: weights don't show their number.
HEADS = {192: 3, 1280: 16} | {arch["embed_dim"]: arch["heads"] for arch in ARCHS.values()}
PLAIN = [argparse.Namespace, np.dtype, np._core.multiarray.scalar,  # others' files hold them, too
         *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]

def load_file(name):
    """The dict in a .pth or .safetensors file; name: its path, one of DINOV2, hf_hub:OWNER/NAME.
    UserError for all that can be wrong with it."""
    path = str(name)
    try:
        if path in DINOV2 and not os.path.exists(path):
            url = f"{HUB}/{path.removesuffix('_reg')}/{path.replace('reg', 'reg4')}_pretrain.pth"
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        if path.startswith("hf_hub:"):
            import huggingface_hub as hub
            files = hub.list_repo_files(path[7:])
            best = max(files, key=lambda f: (f.endswith("safetensors"), f.endswith(("pth", "bin"))))
            path = hub.hf_hub_download(path[7:], best)
        if path.endswith(".safetensors"):
            import safetensors.torch
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a wrong checksum, which torch does not check")
        with torch.serialization.safe_globals(PLAIN):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError as error:
        raise UserError(f"{name}: pip install {error.name} to read it") from None
    except Exception as error:  # a different type for each way in which it can be wrong
        why = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise UserError(f"{name}: {why}, can't be fetched or read; it has to be a state dict, "
                        "whole: try a new download") from None

def flatten(nested, prefix=""):
    """Of {"teacher": {"norm.bias": t}} yields "teacher.norm.bias", t; tensors only."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif torch.is_tensor(value):
            yield f"{prefix}{key}", value

def read_backbone(name):
    """The state dict of a backbone, DINOv2's, DINO's, RedDino's, DinoBloom's or timm's, under any
    prefix, in DINOv2's names; of student and teacher, the teacher's. Raises UserError."""
    state = {}
    for key, value in flatten(load_file(name)):
        key = re.sub(r"(_orig_mod|module|_\w+_wrapped_module)\.", "", key)
        key = re.sub(r"\bblocks\.\d+\.(\d+\.)", r"blocks.\1", key)  # DINOv2's, in chunks
        state[key.replace("reg_token", "register_tokens")] = value  # timm's
    prefixes = [key[:-9] for key in state if re.search(r"\bcls_token$", key)]
    average = re.compile("teacher|ema|momentum|target|averag")  # as others name the teacher
    prefix = max(prefixes, key=lambda prefix: bool(average.search(prefix)), default="")
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not re.match(r"(\w*head|classifier)\.", k)}
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.bias"}
    if not needed <= set(state):
        raise UserError(f"{name}: no vision transformer in DINOv2's or timm's layout")
    fc1, fc2 = (state.get(f"blocks.0.mlp.fc{n}.weight", torch.ones(1, 1)) for n in (1, 2))
    if len(fc1) == 2 * fc2.shape[1]:  # SwiGLU, timm's names
        state = {k.replace("fc1", "w12").replace("fc2", "w3"): v for k, v in state.items()}
    pos = state["pos_embed"]
    if math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:  # timm: the class token's is part of it
        state["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    return state

def vit_from_state(state, img_size=None, heads=None):
    """A VisionTransformer in eval mode with the weights of read_backbone; img_size: of its stored
    positions, if not theirs; heads: of attention, if not by HEADS. Raises UserError."""
    dim = state["cls_token"].shape[-1]
    patch, stem = state["patch_embed.proj.weight"].shape[-1], "linear"
    if "patch_embed.stem.0.weight" in state:
        patch, stem = 8, "convs"
    heads = heads or HEADS.get(dim)
    if not heads or dim % heads:
        raise UserError(f"{dim} dimensions: how many attention heads? Give --heads, a divisor")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    img_size = img_size or patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    swiglu = "blocks.0.mlp.w12.weight" in state
    vit = VisionTransformer(img_size, patch, dim, depth, heads, swiglu, registers, stem=stem).eval()
    load_weights(vit, state)
    return vit

def load_weights(vit, state, source="weights"):
    """Loads what read_backbone gave; says what is new. UserError if it does not fit."""
    grid, own = vit.img_size // vit.patch_size, vit.state_dict()
    pos = resize_pos_embed(state["pos_embed"], grid, grid, "register_tokens" in state)
    state = state | {"pos_embed": pos}
    if "blocks.0.ls1.gamma" not in state:  # DINO's ViTs have no LayerScale, which is one of 1
        state |= {k: torch.ones_like(v) for k, v in own.items() if k.endswith("gamma")}
    new = own.keys() - state.keys()
    wrong = [k for k in state if k not in own or own[k].shape != state[k].shape]
    wrong += new - {"mask_token", "register_tokens"}
    if wrong:  # without it the features would be others
        raise UserError(f"{source}: another architecture, {wrong[0]!r} does not fit; see --arch")
    vit.load_state_dict(state, strict=False)
    return f"{source}: {len(state)} tensors loaded; new: {', '.join(sorted(new)) or 'none'}"

# ----------------------------------------
# Devices and processes. torchrun starts one for each GPU, which trains on its share of a batch;
# DistributedDataParallel averages their gradients.

def cores():
    """Of the CPU, for each process."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)

def number_of(name):
    """RANK or LOCAL_RANK, as torchrun sets them; of a single process 0, whatever is left there."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ):
        raise UserError(f"WORLD_SIZE is set, {min(missing)} is not: start processes by torchrun")
    return int(os.environ[name])

def choose_device(cfg):
    """Device and dtype of products."""
    local = number_of("LOCAL_RANK")
    there = dict(cuda=torch.cuda.device_count() > 0, mps=torch.mps.device_count() > 0, cpu=True)
    name = max(there, key=there.get) if cfg.device == "auto" else cfg.device  # the first there
    if not there[name] or (name == "cuda" and local >= torch.cuda.device_count()):
        raise UserError(f"--device {name}: PyTorch finds none (for each process)")
    fast, other = torch.cpu._is_avx512_bf16_supported(), "float32"
    fast = fast or torch.cpu._is_amx_tile_supported()
    if name == "cuda":
        fast, other = torch.cuda.is_bf16_supported(including_emulation=False), "float16"
    best = "bfloat16" if fast else other  # a ViT-S step on 2 cores of a Zen 4: 7.3 s for 10.9
    dtype = getattr(torch, best if cfg.dtype == "auto" else cfg.dtype)
    return torch.device(name, local if name == "cuda" else None), dtype

def start_processes(device):
    """Join torchrun's processes, if there are several: rank and number."""
    world, told = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("OMP_NUM_THREADS")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not told or (told == "1" and world > 1):  # which is torchrun's choice, not the user's
        torch.set_num_threads(cores())
    if world > 1 and not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401  (later it would hold the group)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return number_of("RANK"), world

def leave_processes():
    """Ends gloo's threads: one at work when Python goes would abort its process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # DistributedDataParallel refers to itself

def catch_signals(at_end):
    """A list of the signals that came: none of them ends the process at once any more."""
    caught = []
    if threading.current_thread() is not threading.main_thread():  # which alone can catch them
        return caught
    for which in signal.Signals:
        ignored = which.name == "SIGHUP" and signal.getsignal(which) == signal.SIG_IGN  # by nohup
        if which.name in ("SIGTERM", "SIGINT", "SIGHUP") and not ignored:
            before = signal.signal(which, lambda which, _: caught.append(which))
            at_end.callback(signal.signal, which, before)
    return caught

# ----------------------------------------
# The command line.

def flag_of(name):
    return "--" + name.replace("_", "-")

def configure(**given):
    """A Config: what is given, else a preset, else the default."""
    preset = PRESETS.get(given.get("augment"), {}) | PRESETS.get(given.get("arch"), {})
    cfg = Config(**(preset | given))
    for field in dataclasses.fields(Config):
        values, allowed, flag = getattr(cfg, field.name), field.metadata, flag_of(field.name)
        values = list(values) if isinstance(values, list | tuple) else [values]
        if isinstance(allowed["default"], list):
            setattr(cfg, field.name, values)  # one will do, in Python too
        for value in values:
            if allowed["choices"] and value not in allowed["choices"]:
                raise UserError(f"{flag} {value}: choose from {', '.join(allowed['choices'])}")
            low, high = allowed["low"], allowed["high"]
            if isinstance(value, int | float) and not low <= value <= high:
                raise UserError(f"{flag} {value}: must lie between {low} and {high}")
    patch = ARCHS[cfg.arch]["patch_size"]
    for size in (cfg.global_size, cfg.local_size * (cfg.local_crops > 0)):
        if size % patch or size > cfg.global_size:
            raise UserError(f"--global-size, --local-size {size}: choose multiples of {patch}, "
                            "local ones not above global ones")
    check_window(cfg.window)
    return cfg

def parse_args(argv):
    """A Config, without --data that of the demo."""
    parser = argparse.ArgumentParser("reddino.py", allow_abbrev=False)
    parser.print_usage = lambda *_: None  # an error is one line
    for field in dataclasses.fields(Config):
        default = field.metadata["default"]
        kind = dict(type=field.type, choices=field.metadata["choices"])
        if isinstance(default, list):
            kind = dict(nargs="+", type=field.type.__args__[0])
        elif isinstance(default, bool | None):
            kind = dict(action=argparse.BooleanOptionalAction)
        presets = [f"; {name} {p[field.name]}" for name, p in PRESETS.items() if field.name in p]
        text = f"{field.metadata['help']} [{default}{''.join(presets)}]"
        parser.add_argument(flag_of(field.name), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    return configure(**(given if "data" in given else DEMO | given))

def main(argv=None):
    """One line and exit code 2 for what the user can mend; 128 + signal after a signal."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    try:
        cfg = parse_args(argv)
        if not cfg.data:
            from smears import demo
            demo(cfg)
        elif cfg.eval_data:
            from eval import knn_monitor
            train(cfg, knn_monitor(cfg))
        else:
            train(cfg)
    except KeyboardInterrupt:
        print("reddino.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, RuntimeError) as error:
        print("reddino.py: error:", in_words(error), file=sys.stderr)
        if isinstance(error, BrokenPipeError):  # or Python would complain, too, when it ends
            sys.stdout = open(os.devnull, "w")
        sys.exit(2)
    finally:
        leave_processes()

def in_words(error):
    """A line that says what to do about an error; raises one that is the program's own."""
    text = " ".join(str(error).split())[:1000]
    if isinstance(error, Timeout):
        return f"--out: another run writes there, see {error.lock_file}; choose another"
    if re.search("out of memory|allocate", text) and not isinstance(error, UserError):
        return "not enough memory: more --accumulate, or --checkpoint-activations"
    if isinstance(error, UserError | OSError):
        return text
    if "compiler" in text.lower():
        return "torch.compile finds no compiler here: install one, as gcc, or --no-compile"
    if dist.is_initialized() and re.search(r"(?i)\btime|connect|peer", text):
        return f"an exchange between processes failed{who_is_missing()}; start again"
    if isinstance(error, dist.DistError):  # a port in use
        return text
    raise error

def who_is_missing():
    """Which processes don't tell torchrun's store, within 15 seconds, that they are there."""
    with suppress(RuntimeError):  # of a store that is gone
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, timeout=timedelta(seconds=2))
        store.set(f"alive {dist.get_rank()}", "")
        missing = list(range(dist.get_world_size()))
        for _ in range(15):
            missing = [rank for rank in missing if not store.check([f"alive {rank}"])]
            if not missing:
                return ""
            time.sleep(1)
        return f": process {', '.join(map(str, missing))} does not answer"
    return ""

if __name__ == "__main__":
    sys.modules["reddino"] = sys.modules["__main__"]  # eval.py shall see these classes, not copies
    main()
