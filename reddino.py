"""RedDino in one file: self-supervised pretraining of a vision transformer on medical images, from images to features.

    python reddino.py                                          # no data: draws blood smears and trains `nano` on them
    python reddino.py --data SMEARS --arch nano                # your images, a model that a laptop's CPU can train
    torchrun --nproc_per_node=8 reddino.py --data SMEARS --arch vitb14 --init dinov2_vitb14        # 8 GPUs
    python reddino.py --help                                   # every option, its default and where the number is from

RedDino (Zedda et al., MICCAI 2025, arXiv:2508.08180) is DINOv2 (Oquab et al. 2023, arXiv:2304.07193), trained on red
blood cells with three changes. DINOv2 itself is DINO (Caron et al. 2021) plus iBOT (Zhou et al. 2022) plus much
engineering. `grep -n "RedDino:" *.py` prints what RedDino changed; everything else here is DINOv2. How it works:

  - a *student* network sees crops of an image, some with patches masked out, and says which of K *prototypes* each
    crop (class token) and each masked patch (patch token) belongs to: a softmax over K;
  - a *teacher*, the running average (EMA) of the student, sees whole crops and gives the answers to match;
  - nothing so far stops both from answering "prototype 1" always. Sinkhorn-Knopp does: it balances the teacher's
    answers so that, over a batch, all prototypes are used alike.

The file follows an image: configuration, patches to tokens, transformer, heads, the teacher's targets, losses, one
training step, optimiser and schedules, checkpoints, the loop. Shapes: B images a step (in this process),
G = 2 global views each, L local views each, N patch tokens a view, D dimensions, K prototypes, M masked patches.
"""

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import timeit
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

# On a CPU: large tensors in pages of 2 MB, or Linux would stop a step of ViT-S 850,000 times to hand out another 4 KB;
# and 128 kernels kept for shapes seen, where 1,024 would come to fill 0.5 GB. Both are read by torch when it starts.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from augment import BadImage, Patches, UserError, batches, check_window, normalise

# ----------------------------------------------------------------------------------------------------------------------
# Configuration. Every option, its default, what it does and where the number comes from; the command line is made from
# this class. The defaults are RedDino's released ViT-S; PRESETS says what differs for the other sizes, and for `nano`.
# Durations are shares of the run, so that a recipe keeps its shape when the run gets longer.

def opt(default, text, choices=None, low=0, high=math.inf):
    """A field of Config: default, one line of help, and what may be given."""
    kind = dict(default_factory=default.copy) if isinstance(default, list) else dict(default=default)
    return dataclasses.field(**kind, metadata=dict(help=text, choices=choices, low=low, high=high))

@dataclass
class Config:
    # where
    data: list[str] = opt([], "folders of images, searched recursively; each is a source of its own")  # noqa: RUF009
    out: str = opt("out", "folder for checkpoints, metrics.jsonl and backbone.pth")
    # what is trained
    arch: str = opt("vits14", "size of the backbone", ["nano", "vits14", "vitb14", "vitl14", "vitg14"])
    init: str = opt("", "start from this backbone: a .pth, or dinov2_vits14 and its sisters by name (RedDino does)")
    registers: int = opt(0, "register tokens (Darcet et al. 2024: 4; RedDino: none)")
    drop_path: float = opt(0.0, "stochastic depth (DINOv2: 0.3; in effect 0 in RedDino's release)", high=1)
    layerscale: float = opt(1e-5, "initial LayerScale (DINOv2)")
    prototypes: int = opt(131072, "K, outputs of a head (RedDino, DINOv2's long setup; its short one: 65536)", low=1)
    head_hidden: int = opt(2048, "width of a head's MLP (DINOv2)", low=1)
    head_bottleneck: int = opt(256, "dimensions of the prototypes' space (RedDino, DINOv2's short setup)", low=1)
    separate_heads: bool = opt(False, "one head for class tokens, another for patches (DINOv2's long setup)")
    # what it sees
    patch_size: list[int] = opt([224],  # noqa: RUF009
                                "images are cut into patches of so many pixels (RedDino); 0: whole; several sizes: all")
    window: list[float] = opt([], "LEVEL WIDTH: what is seen of 16-bit grey, in its units", low=-math.inf)  # noqa: RUF009
    global_size: int = opt(224, "pixels of the 2 global views (DINOv2)", low=1)
    local_size: int = opt(98, "pixels of the local views (DINOv2 with patch 14)", low=1)
    local_crops: int = opt(1, "local views of an image (RedDino: 1; DINOv2: 8)")
    global_scale: float = opt(0.32, "least share of the area that a global view shows (DINOv2)", high=1)
    local_scale: float = opt(0.05, "the same for a local view (DINOv2); the most it shows is global_scale", high=1)
    transforms: int = opt(4, "how many of the 32 a view goes through (RedDino); other lists: all", high=32)
    augment: str = opt("reddino", "pixel transforms: RedDino's 32, DINOv2's, or another organ's short list",
                       ["reddino", "dinov2", "ct", "mri", "xray", "histology"])  # fmt: skip
    balance: bool = opt(False, "draw from the folders evenly, whatever their sizes")
    mix: int = opt(0, "how many images a batch is drawn from; few, and stain tells none apart; 0: as many as there are")
    # the objective
    centering: str = opt("sinkhorn-knopp", "how targets are balanced (RedDino, DINOv2's long setup: sinkhorn-knopp)",
                         ["sinkhorn-knopp", "moving-average"])  # fmt: skip
    koleo: float = opt(0.0, "weight of KoLeo (DINOv2: 0.1; RedDino takes it out)")
    ibot: float = opt(1.0, "weight of the patch-token loss (DINOv2)")
    student_temp: float = opt(0.1, "temperature of the student's softmax (DINO)", low=1e-6)
    teacher_temp_start: float = opt(0.04, "temperature of the teacher's at first (DINO)", low=1e-6)
    teacher_temp: float = opt(0.07, "and after its warm-up (DINO)", low=1e-6)
    teacher_temp_warmup: float = opt(3.0, "share of the run (RedDino: 30 epochs in a 10-epoch run; DINOv2: 0.3, 0.06)")
    # the optimiser
    iters: int = opt(19500, "optimiser steps (RedDino S: 10 x 1,950)", low=1)
    minutes: float = opt(0.0, "a time budget instead of iters: the schedules follow the clock")
    batch_size: int = opt(560, "images a step, over all processes (RedDino S: 2 GPUs x 280)", low=1)
    lr: float = opt(2e-4, "peak learning rate at batch 1024, scaled by sqrt(batch / 1024) (RedDino; DINOv2's long)")
    min_lr: float = opt(1e-6, "learning rate at the end, not scaled (DINOv2)")
    warmup: float = opt(0.01, "share in which lr rises (RedDino: 0.1 of 10 epochs; DINOv2: 0.1, 0.16)", high=1)
    weight_decay: float = opt(0.04, "at first (DINOv2)")
    weight_decay_end: float = opt(0.2, "at the end (RedDino, DINOv2's long setup; its short one: 0.4)")
    momentum: float = opt(0.994, "of the teacher's EMA at first; 1 at the end (RedDino, DINOv2's long setup)", high=1)
    clip: float = opt(3.0, "gradient norm of a module is clipped to this (DINOv2)", low=1e-6)
    layer_decay: float = opt(1.0, "each layer learns this much slower than the next (RedDino: 1; DINOv2's short: 0.9)")
    patch_embed_lr: float = opt(0.2, "learning rate of the patch embedding, relative (DINOv2)")
    freeze_backbone_steps: int = opt(0, "steps in which the heads learn alone; in as many again lr rises to its own")
    freeze_last_layer: float = opt(0.0, "share in which prototypes stay put (RedDino: 0; DINOv2: 1 epoch)", high=1)
    # a look at the features meanwhile
    eval_data: list[str] = opt([], "labelled cells as eval.py takes them: 20-NN during the run; the first one's best "  # noqa: RUF009
                                   "teacher is kept as OUT/best.pth")  # fmt: skip
    eval_every: int = opt(500, "steps between", low=1)
    eval_crop: int = opt(80, "side of the square around a cell in pixels", low=2)
    # the machine
    seed: int = opt(0, "of everything random", high=2**63 - 1)
    workers: int = opt(-1, "loading processes for each training process; -1: as its cores, at most 16", low=-1)
    device: str = opt("auto", "auto, cpu, cuda, mps", ["auto", "cpu", "cuda", "mps"])
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 where the GPU has it, else float16; float32 on a CPU",
                     ["auto", "float32", "bfloat16", "float16", "float64"])  # fmt: skip
    compile: bool | None = opt(None, "torch.compile each block; by default on CUDA (needs a C compiler there)")
    checkpoint_activations: bool = opt(False, "recompute blocks in the backward pass: less memory, more time")
    save_every: int = opt(500, "steps between checkpoints", low=1)
    log_every: int = opt(10, "steps between lines of the log (metrics.jsonl has every step)", low=1)
    resume: str = opt("auto", "auto: go on from OUT; never: start anew; PATH: go on from that checkpoint")
    overwrite: bool = opt(False, "with --resume never: replace the run in OUT")
    export: str = opt("", "write the backbone of the run in OUT to this file, and stop")

PRESETS = {
    # From scratch, on little data, in minutes; the README's "When the loss does not move" has the reasons, as measured.
    "nano": dict(prototypes=64, head_hidden=256, head_bottleneck=64, patch_size=[80], global_size=32, local_size=16,
                 local_crops=0, global_scale=0.7, augment="histology", koleo=0.1, ibot=0.3, momentum=0.98,
                 teacher_temp=0.04, iters=400, batch_size=32, lr=6e-3, warmup=0.1, weight_decay_end=0.04,
                 layerscale=1.0),
    "vitb14": dict(iters=36500, batch_size=392),  # RedDino B: 2 GPUs x 196, 10 x 3,650 steps
    "vitl14": dict(iters=109000, batch_size=128),  # RedDino L: 2 GPUs x 64, 10 x 10,900 steps
    "vitg14": dict(iters=109000, batch_size=128),  # RedDino has no giant: as L
    **{organ: dict(global_scale=0.5) for organ in ("ct", "mri", "xray")},  # --augment: a view has to hold anatomy
}  # fmt: skip

def configure(**given) -> Config:
    """Config of an architecture: what is given, else its preset, else the default. Raises UserError on nonsense."""
    presets = [PRESETS.get(given.get(of), {}) for of in ("augment", "arch")]  # the latter counts
    cfg = Config(**{**presets[0], **presets[1], **given})
    for name in ("data", "eval_data", "patch_size"):  # one will do, in Python too
        if isinstance(getattr(cfg, name), int | str):
            setattr(cfg, name, [getattr(cfg, name)])
    for field in dataclasses.fields(Config):
        value, allowed, flag = getattr(cfg, field.name), field.metadata, "--" + field.name.replace("_", "-")
        if allowed["choices"] and value not in allowed["choices"]:
            raise UserError(f"{flag} {value}: choose from {', '.join(allowed['choices'])}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not allowed["low"] <= number <= allowed["high"]:
                raise UserError(f"{flag} {number}: must lie between {allowed['low']} and {allowed['high']}")
    patch = ARCHS[cfg.arch]["patch_size"]
    for kind, size in {"global": cfg.global_size, "local": cfg.local_size if cfg.local_crops else 0}.items():
        if size % patch:
            raise UserError(f"--{kind}-size {size}: {cfg.arch} needs a multiple of its {patch}-pixel patches")
    if cfg.local_crops and cfg.local_scale >= cfg.global_scale:
        raise UserError("--local-scale must be below --global-scale: local views show less than global ones")
    if cfg.local_crops and cfg.local_size > cfg.global_size:
        raise UserError("--local-size must not exceed --global-size")
    check_window(cfg.window)
    if cfg.overwrite and cfg.resume != "never":
        raise UserError("--overwrite replaces a run: say --resume never as well, or leave it out to go on")
    return cfg

def parse_args(argv: list[str]) -> Config:
    """The command line, made from Config. Without --data the default architecture is `nano`, for the demo."""
    parser = argparse.ArgumentParser("reddino.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"reddino.py: error: {message} (see --help)\n")  # without the usage
    for field in dataclasses.fields(Config):
        default, kind = field.default, dict(choices=field.metadata["choices"], type=type(field.default))
        if default is dataclasses.MISSING:  # a list
            default, kind = " ".join(map(str, field.default_factory())), dict(nargs="+", type=field.type.__args__[0])
        elif isinstance(default, bool) or default is None:
            kind = dict(action=argparse.BooleanOptionalAction)
        presets = "".join(f"; {arch} {p[field.name]}" for arch, p in PRESETS.items() if field.name in p)
        text = f"{field.metadata['help']} [{default}{presets}]".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    # What the demo draws tells every class by its shape alone; in batches of one smear each, stain is no way out.
    return configure(**({} if "data" in given else {"arch": "nano", "mix": 1}) | given)

# ----------------------------------------------------------------------------------------------------------------------
# Patches. A ViT reads an image as a sequence of N square patches of p x p pixels, each projected linearly to D
# dimensions, and adds to each a learned embedding of its position. At another image size the grid of positions is
# stretched bicubically. (Dosovitskiy et al. 2021, section 3.1; Oquab et al. 2023, section 5.)

def resize_pos_embed(pos: Tensor, height: int, width: int, registers: int = 0) -> Tensor:
    """Position embeddings [1, 1 + n*n, D], class token first, stretched to [1, 1 + height*width, D].

    As DINOv2 does it, for its weights expect just that: bicubic, without antialiasing, and with the scale computed
    from (size + 0.1), which once guarded against rounding. Its models with registers came later and use the exact
    size and antialiasing (dinov2/hub/backbones.py: interpolate_offset, interpolate_antialias).
    """
    n = math.isqrt(pos.shape[1] - 1)
    if (height, width) == (n, n):
        return pos
    size = dict(scale_factor=((height + 0.1) / n, (width + 0.1) / n))  # the factors themselves are what is used
    if registers:
        size = dict(size=(height, width), antialias=True)
    grid = widen(pos[:, 1:]).reshape(1, n, n, -1).permute(0, 3, 1, 2)  # [1, D, n, n]
    grid = F.interpolate(grid, mode="bicubic", **size)
    grid = grid.flatten(2).transpose(1, 2).to(pos.dtype)  # [1, height*width, D]
    return torch.cat([pos[:, :1], grid], dim=1)

# ----------------------------------------------------------------------------------------------------------------------
# The transformer: x + attention(norm(x)), then x + mlp(norm(x)), `depth` times. Parameter names are those of DINOv2's
# checkpoints, so that its published weights load as they are.

MKL_IS_SLOW = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and (
    sys.platform == "linux" and "AuthenticAMD" in Path("/proc/cpuinfo").read_text())

class Product(torch.autograd.Function):
    """x @ weight.T + bias in float32 by oneDNN. PyTorch has it on board but asks MKL, which uses half of an AMD
    processor's AVX-512 (two cores of a Zen 5: 220 GFLOP/s, oneDNN 480): a step of ViT-S in 5 s instead of 7.7."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return Product.onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, of = grad.contiguous(), ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (Product.onednn(grad, weight.T) if of[0] else None,
                Product.onednn(rows.T, x.flatten(0, -2).T) if of[1] else None, rows.sum(0) if of[2] else None)

    @staticmethod
    def onednn(x, weight, bias=None):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, [*, I] and [O, I] (and [O]) to [*, O], by whoever is faster."""
    cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if MKL_IS_SLOW and cpu and x.numel() and not torch.compiler.is_compiling():
        return Product.apply(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)

class Linear(nn.Linear):
    """nn.Linear by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)

class Attention(nn.Module):
    """Multi-head self-attention. PyTorch's fused kernel does what DINOv2 needs xFormers for."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D/heads]
        return self.proj(x.transpose(1, 2).reshape(B, N, D))

def Mlp(dim: int) -> nn.Module:
    """The usual feed-forward: 4x wider inside, GELU."""
    return nn.Sequential(OrderedDict(fc1=Linear(dim, 4 * dim), act=nn.GELU(), fc2=Linear(4 * dim, dim)))

class SwiGLU(nn.Module):
    """The giant's gated feed-forward (Shazeer 2020): hidden 4 x D x 2/3 rounded up to 8, so about Mlp's parameters."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

class LayerScale(nn.Module):
    """A learned gain for each channel of a branch, near 0 at first, so that deep networks start as the identity."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

class Block(nn.Module):
    """One layer, [B, N, D] to [B, N, D], with stochastic depth (Huang et al. 2016) in DINOv2's efficient form."""

    def __init__(self, dim: int, heads: int, ffn: type, layerscale: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn(dim)
        self.ls2 = LayerScale(dim, layerscale)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, lambda x: self.ls1(self.attn(self.norm1(x))))
        return self.add(x, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def add(self, x: Tensor, branch) -> Tensor:
        """x + branch(x). In training, drop_path of the images skip the branch: it isn't computed for them at all
        (rather than computed and multiplied by 0), and the others' branch is scaled up to keep the expectation."""
        kept = max(int(len(x) * (1 - self.drop_path)), 1)
        if not self.training or kept == len(x):
            return x + branch(x)
        chosen = torch.randperm(len(x), device=x.device)[:kept]
        return x.index_add(0, chosen, branch(x[chosen]).to(x.dtype), alpha=len(x) / kept)

class VisionTransformer(nn.Module):
    """ViT as in DINOv2: class token, optional register tokens, patch tokens, `depth` blocks, a final LayerNorm.

    Any image size that `patch_size` divides will do; `img_size` is the size whose positions are stored.
    Raises UserError for an image that the patches do not divide.
    """

    def __init__(self, img_size=224, patch_size=14, embed_dim=384, depth=12, heads=6, swiglu=False, registers=0,
                 layerscale=1e-5, drop_path=0.0):  # fmt: skip
        super().__init__()
        self.img_size, self.patch_size, self.embed_dim, self.registers = img_size, patch_size, embed_dim, registers
        self.checkpoint_activations = False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, embed_dim))
        std = 0.02 if embed_dim >= 384 else 0.2  # narrow: see init_linear
        self.pos_embed = nn.Parameter(std * torch.randn(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, embed_dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        ffn = SwiGLU if swiglu else Mlp
        self.blocks = nn.ModuleList(Block(embed_dim, heads, ffn, layerscale, drop_path) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear)

    def tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to the transformer's input [B, 1 + registers + N, D]; masked patches lose their content
        but keep their position: the student has to say what belongs *there*. masks: bool [B, N]."""
        height, width = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        if (height * self.patch_size, width * self.patch_size) != tuple(x.shape[-2:]):
            raise UserError(f"{x.shape[-1]}x{x.shape[-2]} pixels are no whole {self.patch_size}-pixel patches")
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # [B, N, D]
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [B, 1 + N, D]
        x = x + resize_pos_embed(self.pos_embed, height, width, self.registers)
        if self.registers:  # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class token [B, D] and patch tokens [B, N, D], both after the final norm; masks: bool [B, N]."""
        x = self.tokens(x, masks)
        for block in self.blocks:
            x = recompute(block, x, use_reentrant=False) if self.checkpoint_activations else block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.registers :]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised with MEAN and STD, to their class tokens [B, D]: the features to use."""
        return self.forward_features(x)[0]

def init_linear(module: nn.Module):
    """Linear layers as in DINOv2: truncated normal, std 0.02, no bias. That is made for widths from 384 on; a narrower
    layer (nano's) would hardly pass anything on, so it gets Xavier's (Glorot and Bengio 2010), and its positions, which
    hardly show beside the patches at std 0.02, 0.2 (measured: a few points of k-NN score)."""
    if isinstance(module, nn.Linear):
        if module.in_features < 384:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

ARCHS = {
    "nano": dict(embed_dim=128, depth=4, heads=2, patch_size=8),  # 0.8M parameters: ours, for a CPU
    "vits14": dict(embed_dim=384, depth=12, heads=6, patch_size=14),  # 22M
    "vitb14": dict(embed_dim=768, depth=12, heads=12, patch_size=14),  # 86M
    "vitl14": dict(embed_dim=1024, depth=24, heads=16, patch_size=14),  # 304M
    "vitg14": dict(embed_dim=1536, depth=40, heads=24, patch_size=14, swiglu=True),  # 1.1B
}

def build_vit(arch: str, img_size: int = 224, **overrides) -> VisionTransformer:
    """A VisionTransformer with random weights; arch: nano, vits14, vitb14, vitl14, vitg14 (DINOv2, table 16)."""
    if arch not in ARCHS:
        raise UserError(f"no architecture {arch!r}: one of {', '.join(ARCHS)}")
    return VisionTransformer(img_size, **{**ARCHS[arch], **overrides})

# ----------------------------------------------------------------------------------------------------------------------
# Heads. A head says how alike a token is to each of K prototypes: an MLP, the result on the unit sphere, then its
# product with K weight-normalised vectors, i.e. gain x cosine. (DINO, section 3.1; DINOv2's gains are trained.)

class Prototypes(nn.Module):
    """[*, D] to [*, K] with weight rows g * v / |v|; named weight_g [K, 1] and weight_v [K, D] as in checkpoints."""

    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def vectors(self) -> Tensor:
        return torch._weight_norm(self.weight_v, self.weight_g)  # [K, D]; fused: no v / |v| is kept for backward

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.vectors())

class DINOHead(nn.Module):
    """Tokens [*, D] to logits over prototypes [*, K]: 3-layer MLP, l2-normalised bottleneck, prototypes."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(Linear(dim, hidden), nn.GELU(), Linear(hidden, hidden), nn.GELU(),
                                 Linear(hidden, bottleneck))  # fmt: skip
        self.apply(init_linear)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def bottleneck(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(x))

# ----------------------------------------------------------------------------------------------------------------------
# The teacher's targets. Its softmax alone would let everything fall onto one prototype. Two ways to prevent it:
# Sinkhorn-Knopp finds, for this batch, the assignment nearest to the teacher's in which all prototypes are used
# equally (Cuturi 2013; SwAV, Caron et al. 2020); moving-average centering (DINO) subtracts from the logits their
# running mean, which is cheaper and only balances on average. Both see the rows of all processes.

def all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """x summed (or op) over all processes, in place; x itself when there is one."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x

def widen(x: Tensor) -> Tensor:
    """At least float32: exponentials and sums over K need it, whatever autocast gave."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def exactly(x: Tensor) -> torch.autocast:
    """No autocast inside: in bfloat16 a row of 1 sums to 0.995, and tokens that are alike have the same neighbour."""
    return torch.autocast(x.device.type, enabled=False)

def logsumexp_over_rows(x: Tensor) -> Tensor:
    """log sum_i exp(x_ik) over the rows i of all processes, [R, K] to [1, K]; a process may have no rows at all."""
    local = torch.logsumexp(x, dim=0, keepdim=True)
    largest = all_reduce(local.clone(), dist.ReduceOp.MAX)
    return largest + all_reduce((local - largest).exp()).log()

@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, n_iters: int = 3) -> Tensor:
    """Teacher logits [R, K] to targets [R, K]: each row a distribution, each prototype with about R/K of the mass.

    RedDino: this instead of the moving average that is DINOv2's default (and, as there, 3 iterations). Alternately
    divide the columns of exp(logits / temp) by their sums, then the rows by theirs; ending with rows makes them sum to
    1 exactly, while columns are balanced as well as n_iters allows. Textbooks scale columns to 1/K and rows to 1/R:
    constants that the next normalisation undoes, so R is not needed and each process may hold a different number.
    """
    logits = widen(logits)
    top = all_reduce(logits.amax() if len(logits) else logits.new_tensor(-math.inf), dist.ReduceOp.MAX)
    # All divisions so far are one factor for each row and one for each column: two vectors, and [R, K] stays as it is.
    q, row, largest = torch.sub(logits, top).div_(temp).exp_(), logits.new_ones(len(logits), 1), logits.new_zeros(())
    with exactly(q):
        for _ in range(n_iters):
            column = 1 / all_reduce(row.T @ q)  # [1, K]
            row = 1 / (q @ column.T)  # [R, 1]
            largest = torch.maximum(largest, column.amax())  # a row that overflows shows in the next column
    if largest < 1e30:  # columns are the same in all processes, so all go the same way; the last row is one's own
        return q.mul_(row).mul_(column) if (row < 1e30).all() else F.softmax(logits / temp + column.log(), dim=1)
    log_q = logits / temp  # what leaves float32's range there stays finite in the log domain, which takes longer
    for _ in range(n_iters):
        log_q = log_q - logsumexp_over_rows(log_q)
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)
    return log_q.exp()

class MovingAverage(nn.Module):
    """DINO's centering: targets are softmax((logits - center) / temp), the center a running mean of past logits.

    A batch is centred with what was known before it; `update` comes after the step, and only for a step that counts.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.pending = None

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        logits = widen(logits)
        rows = all_reduce(logits.new_tensor([float(len(logits))]))
        self.pending = all_reduce(logits.sum(0, keepdim=True)) / rows.clamp_min(1)  # the mean over rows, not over ranks
        return F.softmax((logits - self.center) / temp, dim=-1)

    @torch.no_grad()
    def update(self):
        self.center.lerp_(self.pending.to(self.center), 1 - self.momentum)

# ----------------------------------------------------------------------------------------------------------------------
# Losses. Both are cross-entropies between the teacher's targets and the student's softmax; they differ in whose tokens
# are compared. dino_loss: class tokens of two different crops of an image, so features must not depend on the crop.
# ibot_loss: the same patch, which the teacher sees and the student doesn't, so patches must be predictable from their
# surroundings. KoLeo spreads the features of a batch. (DINOv2, section 4.)

def cross_entropy(student_logits: Tensor, targets: Tensor, temp: float) -> Tensor:
    """-sum_k targets * log softmax(student_logits / temp) for each row: [*, K], [*, K] to [*]."""
    return -(targets * F.log_softmax(widen(student_logits) / temp, dim=-1)).sum(-1)

def dino_loss(student_logits: Tensor, targets: Tensor, temp: float = 0.1) -> Tensor:
    """Class-token loss: mean cross-entropy over rows, student [B, K] against the teacher's targets for the same images
    in another view, [B, K]. Targets that are a sum over views give the sum of the losses against each."""
    return cross_entropy(student_logits, targets, temp).mean()

def ibot_loss(student_logits: Tensor, targets: Tensor, weights: Tensor, views: int, temp: float = 0.1) -> Tensor:
    """Patch-token loss: cross-entropy of the masked patches [M, K], averaged within each masked image and divided by
    all global views, masked or not. weights [M] are 1 / (masked patches of the image); `views` is that number."""
    return (cross_entropy(student_logits, targets, temp) * weights).sum() / views

def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean log distance from each class token [B, D] to its nearest neighbour on the unit sphere, over all processes'
    images (Sablayrolles et al. 2019). Distances below eps count as eps: a duplicate gives no direction to flee."""
    x = F.normalize(widen(x), dim=-1)
    parts, rank = [x], 0
    if dist.is_initialized():
        parts, rank = [torch.empty_like(x) for _ in range(dist.get_world_size())], dist.get_rank()
        dist.all_gather(parts, x.detach())
        parts[rank] = x
    everyone = torch.cat(parts)
    with torch.no_grad(), exactly(x):
        nearest = (everyone @ everyone.T).fill_diagonal_(-2).argmax(dim=1)  # not itself
    rows = -(everyone - everyone[nearest]).norm(dim=-1).clamp_min(eps).log()  # [B of all processes]
    slope = rows.sum() / len(x)  # all that depends on the own tokens; the value is that of the own rows alone
    return slope + (rows.chunk(len(parts))[rank].mean() - slope).detach()

class ByRows:
    """A head and its loss a few rows at a time, gradient included.

    At K = 131,072 the logits of a lesson, their softmax and their gradient would outweigh all else in memory. Here they
    exist for a few rows: backward begins at once. What stays is the gradient of the bottleneck, from where it goes on,
    and that of the prototypes, normalised once a step, which adds up in place until the step's last lesson.
    """

    def __init__(self, head: DINOHead, numbers: int | None = None):
        self.head, self.prototypes = head, head.last_layer.vectors()  # [K, D]
        self.gradient = torch.zeros_like(self.prototypes)
        numbers = numbers or 2 ** (22 if self.gradient.device.type == "cpu" else 26)  # a GPU needs more to be busy
        self.rows = max(numbers // len(self.prototypes), 1)  # on a CPU their logits take 16 MB

    def __call__(self, loss, tokens: Tensor, *others: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, tuple]:
        """loss(head(tokens), *others), a sum over rows, of which others have as many as tokens: its value, and for
        torch.autograd.backward the tensor to go on from and its gradient, times scale (float16's, lest it become 0)."""
        x, prototypes, values, gradients = self.head.bottleneck(tokens), self.prototypes.detach(), [], []
        for z, *rows in zip(*(t.split(self.rows) for t in (x.detach(), *others))):
            logits = product(z, prototypes).requires_grad_()
            value = loss(logits, *rows)
            (gradient,) = torch.autograd.grad(scale * value, logits)
            if gradient.dtype == self.gradient.dtype:
                self.gradient.addmm_(gradient.T, z)
            else:  # autocast
                self.gradient += gradient.T @ z
            values.append(value.detach()), gradients.append(product(gradient, prototypes.T))
        return torch.stack(values).sum(), (x, torch.cat(gradients).to(x))

# ----------------------------------------------------------------------------------------------------------------------
# One training step: student and teacher look at a batch, and out come the losses by name.

class DINO(nn.Module):
    """Student and teacher, each a backbone with a head (two with separate_heads); the teacher gets no gradients."""

    SMALL = 2**20  # numbers in the global views, see teach
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.student, self.teacher = self.network(cfg, drop_path=cfg.drop_path), self.network(cfg, drop_path=0.0)
        self.student["backbone"].checkpoint_activations = cfg.checkpoint_activations
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.centers = nn.ModuleDict()
        if cfg.centering == "moving-average":  # class and patch tokens have different means
            self.centers.update({name: MovingAverage(cfg.prototypes) for name in ("cls", "patch")})
        self.patch_head = "ibot_head" if cfg.separate_heads else "dino_head"  # RedDino: one for both, DINOv2's default
        self.signs, self.heads = {}, {}  # what the loop watches for collapse; ByRows of the student's, made each step

    @staticmethod
    def network(cfg: Config, **options) -> nn.ModuleDict:
        vit = build_vit(cfg.arch, cfg.global_size, registers=cfg.registers, layerscale=cfg.layerscale, **options)
        heads = ["dino_head"] + ["ibot_head"] * cfg.separate_heads
        sizes = vit.embed_dim, cfg.prototypes, cfg.head_hidden, cfg.head_bottleneck
        return nn.ModuleDict({"backbone": vit} | {name: DINOHead(*sizes) for name in heads})

    def targets(self, logits: Tensor, temp: float, kind: str) -> Tensor:
        """Teacher logits [R, K] of one kind of token ("cls" or "patch") to targets [R, K]."""
        return self.centers[kind](logits, temp) if self.centers else sinkhorn_knopp(logits, temp)

    @torch.no_grad()
    def teach(self, global_views: Tensor, local_views: Tensor, masks: Tensor, teacher_temp: float) -> list[tuple]:
        """The teacher looks at a batch: out come lessons for the student, each the arguments of `forward`.

        global_views [G*B, 3, H, W] and local_views [L*B, 3, h, w], normalised, view after view; masks bool [G*B, N].
        A lesson is a global view of half the images (of all where KoLeo compares them; both views, if small: then it's
        the number of operations that takes time) or as many local ones as have no more pixels. The loop takes the
        gradient of each before the next begins, so that memory holds the activations of one, not of all.
        """
        cfg, teacher, B, self.heads = self.cfg, self.teacher, len(global_views) // 2, {}
        cls, patches = teacher["backbone"].forward_features(global_views)  # [2B, D], [2B, N, D]
        logits = teacher["dino_head"](cls)  # [2B, K]
        first, second = self.targets(logits, teacher_temp, "cls").chunk(2)  # [B, K] of each view
        entropy = cross_entropy(logits, F.softmax(widen(logits) / teacher_temp, dim=-1), teacher_temp).mean()
        self.signs = {"cls": cls, "nearest": logits.argmax(-1), "entropy": entropy}
        hidden = masks.to(cls.device)
        patch_targets = self.targets(teacher[self.patch_head](patches[hidden]), teacher_temp, "patch")  # [M, K]

        # Class tokens: every student view against both teacher views, but a global one not against itself. RedDino:
        # 1 local view for DINOv2's 8. The loss is linear in the targets, so those of both views are added up. Global
        # views come last: they use every parameter, which is what DistributedDataParallel waits for.
        parts = 1 if global_views.numel() < self.SMALL else 2 if cfg.koleo else 4
        n = min(math.ceil(cfg.local_crops * (cfg.local_size / cfg.global_size) ** 2 * parts / 2), cfg.local_crops)
        local = [torch.cat(local_views.split(B)[k::n]) for k in range(n)]
        lessons = [(views, None, (first + second).repeat(len(views) // B, 1), None) for views in local]
        masked = [int(m.sum()) for m in masks.chunk(parts)]
        lessons += zip(global_views.chunk(parts), hidden.chunk(parts), torch.cat([second, first]).chunk(parts),
                       patch_targets.split(masked))  # fmt: skip
        with torch.enable_grad():
            self.heads = {name: ByRows(head) for name, head in self.student.items() if name != "backbone"}
        return [(*lesson, n == len(lessons)) for n, lesson in enumerate(lessons, 1)]

    def forward(self, views: Tensor, masks: Tensor | None, targets: Tensor, patch_targets: Tensor | None, last: bool,
                scale: float | Tensor = 1.0) -> tuple[dict[str, Tensor], list[tuple]]:  # fmt: skip
        """One lesson: the student's losses by name, weighted and without graph (their sum over a step's lessons is what
        is minimised), and where backward begins: pairs of a tensor and its gradient, times scale, for
        torch.autograd.backward. views [R, 3, h, w], targets [R, K]; of global views masks [R, N], patch_targets [M, K].
        """
        cfg, B = self.cfg, len(self.signs["cls"]) // 2
        cls, patches = self.student["backbone"].forward_features(views, masks)

        def dino(logits: Tensor, targets: Tensor) -> Tensor:  # a sum over rows; the number of views leaves its scale
            return dino_loss(logits, targets, cfg.student_temp) * (len(logits) / (B * (2 + 2 * cfg.local_crops)))

        def ibot(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return cfg.ibot * ibot_loss(logits, targets, weights, 2 * B, cfg.student_temp)

        losses, roots = {}, {}
        losses["dino"], roots["dino"] = self.heads["dino_head"](dino, cls, targets, scale=scale)
        if masks is not None:
            weights = (1 / masks.sum(1, keepdim=True).clamp_min(1).to(views)).expand_as(masks)[masks]  # [M]
            patch_head, rows = self.heads[self.patch_head], (patches[masks], patch_targets, weights)
            losses["ibot"], roots["ibot"] = patch_head(ibot, *rows, scale=scale)
            if cfg.koleo:  # RedDino: left out, as it pushes apart the many cells that are rightly alike
                koleo = cfg.koleo * sum(koleo_loss(view) for view in cls.split(B))
                losses["koleo"], roots["koleo"] = koleo.detach(), (scale * koleo, None)
        return losses, [*roots.values(), *((head.prototypes, head.gradient) for head in self.heads.values() if last)]

    @torch.no_grad()
    def update_teacher(self, momentum: float):
        """teacher = momentum * teacher + (1 - momentum) * student, all parameters in a few fused kernels."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)
        for center in self.centers.values():
            center.update()

def first_networks(cfg: Config) -> tuple[DINO, str]:
    """Student and teacher at step 0, the same in all processes, and a line that says what --init has loaded."""
    from eval import load_weights, read_backbone  # which imports this file
    torch.manual_seed(cfg.seed)
    model, loaded = DINO(cfg), ""
    if cfg.init:  # RedDino: from DINOv2's weights, student and teacher alike; only the heads are new
        loaded = load_weights(model.student["backbone"], read_backbone(cfg.init), cfg.init)
        model.teacher["backbone"].load_state_dict(model.student["backbone"].state_dict())
    return model, loaded

def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1-2): exp of the entropy of the normalised singular values of [R, D] features.
    Between 1 (all on one line: collapsed) and D."""
    values = torch.linalg.svdvals(features.float().cpu())  # Apple's GPUs have none
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))

# ----------------------------------------------------------------------------------------------------------------------
# Optimiser and schedules: AdamW; a half cosine for the learning rate after a linear warm-up, for the weight decay and
# for the teacher's momentum (DINO, section 3.2 and its appendix). All are functions of the share of the run done.

def cosine(start: float, end: float, x: float) -> float:
    """From start (x = 0) to end (x = 1) along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(x, 1)))

def schedules(cfg: Config, done: float, step: int = 0) -> dict[str, float]:
    """Learning rates, weight_decay, momentum and teacher_temp after `done` (0 to 1) of the run, at `step`."""
    peak, warmup = cfg.lr * math.sqrt(cfg.batch_size / 1024), cfg.warmup
    lr = peak * done / warmup if done < warmup else cosine(peak, cfg.min_lr, (done - warmup) / max(1 - warmup, 1e-9))
    warm = min(done / cfg.teacher_temp_warmup, 1) if cfg.teacher_temp_warmup else 1
    thawed = min(max(step / cfg.freeze_backbone_steps - 1, 0), 1) if cfg.freeze_backbone_steps else 1
    return {
        "lr": lr, "last_layer_lr": 0.0 if done < cfg.freeze_last_layer else lr,
        "backbone_lr": lr * thawed,
        "weight_decay": cosine(cfg.weight_decay, cfg.weight_decay_end, done),
        "momentum": cosine(cfg.momentum, 1.0, done),
        "teacher_temp": cfg.teacher_temp_start + (cfg.teacher_temp - cfg.teacher_temp_start) * warm,
    }

def make_optimizer(cfg: Config, student: nn.ModuleDict) -> torch.optim.AdamW:
    """AdamW with DINOv2's parameter groups: no weight decay on biases, norms and LayerScale; the patch embedding
    learns at 0.2 of the rate; with layer_decay < 1, layer i of n at layer_decay^(n + 1 - i), the tokens' embeddings
    being layer 0."""
    depth, groups = len(student["backbone"].blocks), {}
    for name, parameter in student.named_parameters():
        layer = depth + 1
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif re.match(r"backbone\.(cls_token|pos_embed|register_tokens|mask_token|patch_embed)", name):
            layer = 0
        rate = cfg.layer_decay ** (depth + 1 - layer) * (cfg.patch_embed_lr if "patch_embed" in name else 1.0)
        decay = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
        follows = "backbone_lr" if name.startswith("backbone") else "last_layer_lr" if "last_layer" in name else "lr"
        groups.setdefault((rate, decay, follows), []).append(parameter)
    groups = [dict(params=p, rate=rate, decay=decay, follows=follows) for (rate, decay, follows), p in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=groups[0]["params"][0].device.type != "mps")

def apply_schedules(optimizer: torch.optim.AdamW, now: dict[str, float]):
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * now[group["follows"]]
        group["weight_decay"] = now["weight_decay"] if group["decay"] else 0.0

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints out. A run's future depends on the networks, the optimiser, the centers, the scaler and the step, and on
# nothing else: all randomness is a function of (seed, sample, epoch) or (seed, step), see augment.py. So a resumed
# run is the uninterrupted one, on a CPU bit for bit.

def write_aside(path: Path, state: dict | list, keep: Path | None = None):
    """torch.save into a new file, flushed to the disk, then renamed over path (which becomes keep): whatever happens
    meanwhile (kill -9, a full disk, a power cut), the old file or the new one is there, whole. Raises OSError."""
    aside = path.with_name(path.name + ".new")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer wraps the system's error in its own
        aside.unlink(missing_ok=True)
        raise OSError(f"can't write {path} ({error})") from None
    if keep and path.exists():
        keep.unlink(missing_ok=True)
        try:
            os.link(path, keep)  # the same file under two names, so that at no moment path is missing
        except OSError:  # FAT and some network drives have no such links
            os.replace(path, keep)
    os.replace(aside, path)
    if os.name == "posix":  # the names are in the folder, which is a file of its own
        os.fsync(folder := os.open(path.parent, os.O_RDONLY))
        os.close(folder)

CHECKPOINT = {"student", "teacher", "centers", "optimizer", "scaler", "step", "elapsed", "patches", "processes",
              "skipped", "best", "config"}  # fmt: skip

def read_checkpoint(paths: list[Path]) -> tuple[dict | None, str]:
    """The first of these that can be read, and a line that says so (None without any). Raises UserError if none can."""
    from eval import load_file
    said = []
    for path in paths:
        try:
            saved = load_file(path)
            if missing := CHECKPOINT - set(saved):
                raise UserError(f"{path}: no run to go on with (it lacks {', '.join(sorted(missing))}); --init starts "
                                "from its weights")  # fmt: skip
            return saved, "; ".join([*said, f"going on from {path} at step {saved['step']}"])
        except UserError as error:
            said.append(str(error))
    if said:
        raise UserError("; ".join(said))
    return None, ""

MAY_CHANGE = {"out", "init", "workers", "device", "dtype", "compile", "checkpoint_activations", "iters", "minutes",
              "save_every", "log_every", "resume", "overwrite", "export",
              "eval_data", "eval_every", "eval_crop"}  # it's the same run with others # fmt: skip

RUN = ("checkpoint.pth", "previous.pth", "best.pth", "metrics.jsonl", "skipped.txt")  # what --overwrite removes

def prepare(cfg: Config, world: int) -> tuple[Patches, dict | None, str]:
    """Before any work: the patches, and the checkpoint to go on from, if any. Raises UserError."""
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out).close()
    except OSError as error:
        raise UserError(f"--out {cfg.out}: can't write there ({error.strerror})") from None
    there = [path for name in RUN if (path := Path(cfg.out, name)).exists()]
    if cfg.resume == "never" and there and not cfg.overwrite:
        raise UserError(f"{cfg.out} holds a run: --resume auto goes on with it, --overwrite replaces it")
    if cfg.resume not in ("auto", "never") and there and Path(cfg.resume).resolve().parent != Path(cfg.out).resolve():
        raise UserError(f"{cfg.out} holds a run, over which that of --resume {cfg.resume} would be written: choose "
                        "another --out")  # fmt: skip
    checkpoints = {"auto": [path for path in there if path.name in RUN[:2]], "never": []}
    saved, note = read_checkpoint(checkpoints.get(cfg.resume, [Path(cfg.resume)]))
    if not cfg.data:
        raise UserError("--data: name at least one folder of images")
    patches = Patches(cfg.data, cfg.patch_size, cfg.window, raw=cfg.augment == "ct")
    for first in [first for _, first, last in patches.sources if first < last]:
        try:
            patches[first]
        except BadImage as bad:  # what else is wrong with a file concerns that file
            if "--window" in bad.reason:
                raise UserError(str(bad)) from None
    if len(patches) < cfg.batch_size:
        raise UserError(f"{len(patches)} patches are fewer than --batch-size {cfg.batch_size}: lower it, or add images")
    if saved:
        was, now = dataclasses.asdict(Config()) | saved["config"], dataclasses.asdict(cfg)
        changed = [f"--{k.replace('_', '-')} was {was[k]}" for k in now if k not in MAY_CHANGE and now[k] != was[k]]
        if changed:
            where = cfg.out if cfg.resume == "auto" else cfg.resume
            raise UserError(f"{where} holds another run: {', '.join(changed)}; choose another --out, or "
                            "--resume never --overwrite")  # fmt: skip
        for what, n in {"patches": len(patches), "processes": world}.items():
            if saved[what] != n:
                note += f"; {saved[what]} {what} then, {n} now: no longer bit for bit the uninterrupted run"
    return patches, saved, note

# ----------------------------------------------------------------------------------------------------------------------
# Machine: devices, processes, and what a step costs.

def cores() -> int:
    """CPU cores for each process on this machine."""
    everyone = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(everyone // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)

def choose_device(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of matrix products. Raises UserError for a device that isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in there if there[d]) if cfg.device == "auto" else cfg.device
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch finds none here; --device auto takes what there is")
    if name == "mps" and cfg.dtype == "float64":
        raise UserError("--dtype float64: not on Apple's GPUs; --device cpu has it")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and local >= (gpus := torch.cuda.device_count()):
        raise UserError(f"more processes than GPUs: torchrun --nproc_per_node={gpus} is the most here")
    device = torch.device(name, local if name == "cuda" else None)
    if cfg.dtype != "auto":
        return device, getattr(torch, cfg.dtype)
    if name == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return device, torch.float32  # measured on a CPU without bfloat16 units: 130 GFLOP/s in float32, 1 in bfloat16

def start_processes(device: torch.device) -> tuple[int, int]:
    """Join torchrun's processes, if there are several: rank and number."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        torch.set_num_threads(cores())
    if world > 1 and not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401  (later, its defaults would hold the group for ever)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1))  # the others wait while rank 0 reads or looks
        if device.type != "cuda":
            atexit.register(leave_gloo)
    return int(os.environ.get("RANK", 0)), world

def leave_gloo():
    """Ends gloo's threads, which end with the group, which ends with the last reference to it. One still at work when
    Python goes, however that comes, would abort its process, for which torchrun kills rank 0 over its last files."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # DistributedDataParallel refers to itself

def from_rank_0(make):
    """make() on rank 0, its result on all. Where it raises, rank 0 says why and the others stop without a word."""
    if not dist.is_initialized():
        return make()
    box = [None]
    try:
        box = [make()] if dist.get_rank() == 0 else box
    finally:
        dist.broadcast_object_list(box)
    if box[0] is None:
        raise SystemExit(2)
    return box[0]

def gather(x) -> list:
    """x of every process."""
    if not dist.is_initialized():
        return [x]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, x)
    return everyones

def step_flops(cfg: Config, model: DINO) -> float:
    """Floating-point operations of a step's matrix products, over all processes: 2 for each weight and token forward,
    4 more backward, and attention's 4 N^2 D a layer."""
    vit, head = model.student["backbone"], model.student["dino_head"]
    blocks, head = (2 * sum(p.numel() for p in part.parameters() if p.dim() == 2) for part in (vit.blocks, head))

    def forward(size):
        n = (size // vit.patch_size) ** 2
        tokens = n + 1 + cfg.registers
        return tokens * blocks + (4 * tokens**2 * len(vit.blocks) + 6 * n * vit.patch_size**2) * vit.embed_dim

    masked = 0.15 * (cfg.global_size // vit.patch_size) ** 2  # patches of a view, on average
    by_both = 2 * (forward(cfg.global_size) + head * (1 + masked))  # teacher: forward; student: forward and backward
    return cfg.batch_size * (4 * by_both + 3 * cfg.local_crops * (forward(cfg.local_size) + head))

def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a large matrix product here: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(timeit.repeat(lambda: product(a, a)[0, 0].item(), number=1, repeat=8))  # item() waits for it

# ----------------------------------------------------------------------------------------------------------------------
# The loop, and what it writes down.

@contextlib.contextmanager
def interrupts():
    """A list that SIGTERM and SIGINT are put into: they ask for a stop after the step in hand. Another, 2 s after the
    first or more, exits at once (before that it's an echo: torchrun passes on what the terminal has sent to all)."""
    caught, times = [], []

    def note(which, _):
        caught.append(which), times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            os._exit(128 + which)

    before = {which: signal.signal(which, note) for which in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)

class Journal:
    """What rank 0 writes down: the log, OUT/metrics.jsonl with each step once, OUT/skipped.txt with each file once."""

    def __init__(self, out: Path, start: int, writes: bool):
        self.writes, self.skipped, self.skipped_file = writes, {}, out / "skipped.txt"
        self.metrics = open(out / "metrics.jsonl" if writes else os.devnull, "a+")  # noqa: SIM115  (as long as the run)
        if writes:  # what came after the checkpoint is done again; the last line may be cut short, or zeros
            self.metrics.seek(0)
            kept = [*itertools.takewhile(lambda line: (found := re.fullmatch(r'{"step": (\d+).*}\n', line))
                                         and int(found[1]) < start, self.metrics)]
            self.metrics.truncate(len("".join(kept)))

    def say(self, *lines: str):
        if self.writes and any(lines):
            print(*filter(None, lines), sep="\n", flush=True)

    def step(self, values: dict):
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        print(json.dumps(plain), file=self.metrics, flush=True)

    def skip(self, faults: dict[str, str], patches: Patches):
        """Name each unreadable file once; UserError when they are more than half of all files."""
        new = [f"skipped {path!r}: {reason}" for path, reason in faults.items() if path not in self.skipped]
        self.skipped |= faults
        if new and self.writes:
            self.skipped_file.write_text("".join(f"{path!r}: {reason}\n" for path, reason in self.skipped.items()))
            self.say(*new[:3], f"{len(self.skipped)} unreadable files so far: {self.skipped_file} lists them")
        if len(self.skipped) > 0.5 * (len(patches.files) + len(patches.skipped)):
            raise UserError(f"{len(self.skipped)} files can't be read, more than half: see {self.skipped_file}")

class Watch:
    """Signs of collapse, the failure that DINO's users report most, for next to nothing: from the teacher's last 2,048
    class tokens, how many prototypes they are nearest to, their spread on the unit sphere, their effective rank."""

    tokens, nearest, warned = torch.empty(0), torch.empty(0, dtype=torch.long), False

    def note(self, signs: dict[str, Tensor]):
        self.tokens = torch.cat([self.tokens.to(signs["cls"].device), signs["cls"].float()])[-2048:]
        self.nearest = torch.cat([self.nearest.to(signs["cls"].device), signs["nearest"]])[-2048:]

    def signs(self) -> dict[str, float]:
        """Nothing until there are enough tokens: the rank of few is low for no fault of the network."""
        if len(self.tokens) < 2048:
            return {}
        spread = float(F.normalize(self.tokens, dim=1).std(0).norm())
        return {"rank": effective_rank(self.tokens), "std": spread, "in_use": len(self.nearest.unique())}

    def warning(self, signs: dict[str, float], entropy: float, prototypes: int) -> str:
        """In words, once: the class tokens all but one and the same, or a teacher without an opinion on any image."""
        most = math.log(prototypes)
        if self.warned or not signs or not (signs["rank"] < 2 or signs["std"] < 0.01 or entropy > 0.999 * most):
            return ""
        self.warned = True
        return (f"WARNING: the teacher has collapsed (effective rank {signs['rank']:.1f}, spread {signs['std']:.3f}, "
                f"entropy {entropy:.3f} of ln K = {most:.3f}): features hardly depend on the image; see the README, "
                "'Signs of collapse'")  # fmt: skip

def train(cfg: Config) -> Path:
    """Train as cfg says; returns OUT/backbone.pth, the teacher's backbone in DINOv2's layout.

    Raises UserError for what the user can mend, SystemExit(128 + signal) after a SIGTERM or SIGINT.
    """
    # --- machine, data, networks, optimiser; all processes start from the same
    device, dtype = choose_device(cfg)
    rank, world = start_processes(device)
    if cfg.batch_size % world:
        raise UserError(f"--batch-size {cfg.batch_size} can't be shared by {world} processes: choose a multiple")
    cfg = dataclasses.replace(cfg, data=[os.path.abspath(folder) for folder in cfg.data])
    judges = []  # rank 0 has one, if --eval-data says of what
    if cfg.eval_data:
        from eval import knn_monitor
        window = cfg.window or ([40, 400] if cfg.augment == "ct" else None)
        from_rank_0(lambda: judges.append(knn_monitor(cfg.eval_data, cfg.eval_crop, cfg.global_size, window)) or True)
    patches, saved, note = from_rank_0(lambda: prepare(cfg, world))
    floats = torch.float64 if dtype == torch.float64 else torch.float32  # of parameters; autocast lowers products only
    model, loaded = first_networks(dataclasses.replace(cfg, init="") if saved else cfg)
    for name in RUN if cfg.resume == "never" and rank == 0 else ():  # only now that nothing else is wrong
        Path(cfg.out, name).unlink(missing_ok=True)
    vit = model.student["backbone"]
    model.to(device, floats)
    optimizer = make_optimizer(cfg, model.student)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"student": model.student, "teacher": model.teacher, "centers": model.centers,
             "optimizer": optimizer, "scaler": scaler}  # fmt: skip
    step, elapsed, best, skipped = 0, 0.0, -1.0, {}
    if saved:
        step, elapsed, skipped, was = (saved[k] for k in ("step", "elapsed", "skipped", "config"))
        best = saved["best"] if (was["eval_data"], was["eval_crop"]) == (cfg.eval_data, cfg.eval_crop) else best
        for name in parts:
            if saved[name]:  # a scaler that is off leaves nothing to load
                parts[name].load_state_dict(saved[name])
        saved = None  # 5 GB for a ViT-L
    if cfg.compile or (cfg.compile is None and device.type == "cuda"):  # by block: compiles in seconds, not minutes
        for block in [*vit.blocks, *model.teacher["backbone"].blocks]:
            block.compile()
    parallel = model if world == 1 else nn.parallel.DistributedDataParallel(  # gradients: means over processes
        model, device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True)  # fmt: skip

    def save():
        if rank == 0:
            os.fsync(journal.metrics.fileno())
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(step=step, elapsed=elapsed, patches=len(patches), processes=world, skipped=journal.skipped)
            state |= dict(best=best, config=dataclasses.asdict(cfg))
            write_aside(out / "checkpoint.pth", state, keep=out / "previous.pth")

    def look(step: int) -> dict[str, float]:
        nonlocal best, began, since
        started, found = time.monotonic(), judges[0](model.teacher["backbone"], device)
        if found[0] > best:
            best = found[0]
            write_aside(out / "best.pth", model.teacher["backbone"].state_dict())
        journal.say(f"step {step}  20-NN weighted F1 {' '.join(f'{100 * f:.1f}' for f in found)}")
        took = time.monotonic() - started
        began, since = began + took, since + took  # the clock stands still meanwhile
        return {f"knn{i or ''}": f for i, f in enumerate(found)}

    # --- say what is going to happen
    out, watch, journal = Path(cfg.out), Watch(), Journal(Path(cfg.out), step, rank == 0)
    size = sum(p.numel() for p in vit.parameters()) / 1e6
    journal.say(f"{cfg.arch}, {size:.1f}M parameters, on {len(patches)} patches of {len(patches.files)} images; "
                f"{world} x {device.type}, {str(dtype)[6:]}", loaded or note)  # fmt: skip
    journal.skip(skipped | patches.skipped, patches)
    ideal = step_flops(cfg, model) / world / matmul_rate(device, dtype)  # seconds a step, were it all matrix products
    faults, bad_in_a_row, waited, began = {}, 0, 0.0, time.monotonic() - elapsed
    since, since_step = time.monotonic(), step

    workers = cfg.workers if cfg.workers >= 0 else min(cores(), 16) if device.type == "cuda" else 1
    loader = batches(cfg, patches, step, vit.patch_size, rank, world, workers, pin=device.type == "cuda")
    with interrupts() as caught, contextlib.closing(loader):
        while (done := elapsed / 60 / cfg.minutes if cfg.minutes else step / cfg.iters) < 1:
            found = look(step) if judges and step % cfg.eval_every == 0 else {}
            # --- a batch
            waiting = time.monotonic()
            *views, masks, indices, new_faults = next(loader)
            waited += time.monotonic() - waiting
            faults |= new_faults

            # --- forward, backward
            now = schedules(cfg, done, step)
            apply_schedules(optimizer, now)
            torch.manual_seed(int(np.random.default_rng((cfg.seed, step, rank, 3)).integers(2**62)))  # stochastic depth
            with autocast():
                lessons = model.teach(*(normalise(v, device, floats) for v in views), masks, now["teacher_temp"])
            optimizer.zero_grad(set_to_none=True)
            losses = dict.fromkeys(["dino", "ibot"] + ["koleo"] * bool(cfg.koleo), 0.0)
            while lessons:  # gradients add up; processes exchange the sum, with the last lesson
                with parallel.no_sync() if world > 1 and len(lessons) > 1 else contextlib.nullcontext():
                    with autocast():
                        terms, roots = parallel(*lessons.pop(0), scaler.scale(torch.ones((), device=device)))
                    torch.autograd.backward(*zip(*roots))
                losses |= {name: losses[name] + value for name, value in terms.items()}
            loss = sum(losses.values())
            scaler.unscale_(optimizer)
            norms = [nn.utils.clip_grad_norm_(part.parameters(), cfg.clip) for part in model.student.values()]

            # --- one exchange a step: numbers as means over processes, whether any was told to stop, rank 0's clock
            numbers = {"loss": loss, **losses, **{f"grad_{k[:4]}": v for k, v in zip(model.student, norms)},
                       "teacher_entropy": model.signs["entropy"], "stop": loss.new_tensor(float(len(caught))),
                       "seconds": loss.new_tensor(world * (time.monotonic() - began) * (rank == 0))}  # fmt: skip
            means = all_reduce(torch.stack([v.detach().to(floats) for v in numbers.values()])).div(world).tolist()
            numbers = dict(zip(numbers, means))
            elapsed, stop = numbers["seconds"], numbers.pop("stop") > 0

            # --- update, unless a number is not finite: then nothing of this step reaches the networks
            finite = all(map(math.isfinite, means))
            if finite:
                scaler.step(optimizer)
                model.update_teacher(now["momentum"])
                watch.note(model.signs)
            searching = scaler.is_enabled() and math.isfinite(numbers["loss"]) and scaler.get_scale() > 1  # for a scale
            scaler.update()
            if not finite:
                files = ", ".join(sorted({repr(patches.file_of(i)) for share in gather(indices) for i in share}))
                journal.say(f"step {step} skipped, not finite: loss {numbers['loss']:.4g} or gradient; files: {files}")
            bad_in_a_row = 0 if finite or searching else bad_in_a_row + 1

            # --- write down
            last = stop or bad_in_a_row == 3 or (elapsed / 60 >= cfg.minutes if cfg.minutes else step + 1 >= cfg.iters)
            signs = watch.signs() if (step + 1) % cfg.log_every == 0 or last else {}
            journal.step({"step": step, **numbers, **now, **signs, **found, "skipped": not finite})
            step += 1
            if step % cfg.log_every == 0 or last:
                journal.skip({k: v for share in gather(faults) for k, v in share.items()}, patches)
                seconds, steps = time.monotonic() - since, step - since_step
                eta = max(60 * cfg.minutes - elapsed, 0) if cfg.minutes else seconds / steps * (cfg.iters - step)
                terms = " ".join(f"{name} {numbers[name]:.3f}" for name in losses)
                entropy, of = numbers["teacher_entropy"], "" if cfg.minutes else f"/{cfg.iters}"
                effective = f"rank {signs['rank']:.0f}/{vit.embed_dim}  " if signs else ""
                journal.say(f"step {step}{of}  loss {numbers['loss']:.3f} ({terms})  lr {now['lr']:.1e}  "
                            f"entropy {entropy:.2f}/{math.log(cfg.prototypes):.2f}  {effective}"
                            f"{steps * cfg.batch_size / seconds:.1f} img/s  wait {waited / seconds:.0%}  "
                            f"MFU {steps * ideal / seconds:.0%}  ETA {datetime.timedelta(seconds=round(eta))}",
                            watch.warning(signs, entropy, cfg.prototypes))  # fmt: skip
                faults, waited, since, since_step = {}, 0.0, time.monotonic(), step
            if bad_in_a_row == 3:
                raise UserError("three steps in a row were not finite; the last checkpoint is from before them; look "
                                "at the files named above, lower --lr, or try --dtype float32")  # fmt: skip
            if step % cfg.save_every == 0 or last:
                save()
            if stop:
                journal.say(f"interrupted: saved at step {step}; the same command goes on from there")
                raise SystemExit(128 + (caught or [signal.SIGTERM])[0])
    if rank == 0:
        write_aside(out / "backbone.pth", model.teacher["backbone"].state_dict())
        journal.say(f"done: {out / 'backbone.pth'} holds the teacher's backbone")
        if judges:
            journal.step({"step": step, **look(step)})
            save()  # a run that goes on from here has to know the best
    return out / "backbone.pth"

def demo(cfg: Config):
    """Without --data: draw smears, train on some, score the features on others before and after."""
    import smears
    from eval import evaluate
    rank, _ = start_processes(choose_device(cfg)[0])
    out, untrained = Path(cfg.out), Path(cfg.out, "untrained.pth")

    def draw():
        print(f"no --data: drawing blood smears in {out} to train on, and others to score the features on", flush=True)
        return [smears.draw(out / "seen", 160, 2 * cfg.seed), smears.draw(out / "unseen", 60, 2 * cfg.seed + 1)]

    seen, unseen = from_rank_0(draw)
    backbone = train(dataclasses.replace(cfg, data=[str(Path(seen).parent)]))
    if rank == 0:
        write_aside(untrained, first_networks(cfg)[0].teacher["backbone"].state_dict())
        weights = {"pixels": "pixels", "colour": "colour", "before training": untrained, "after training": backbone}
        evaluate(unseen, weights, protocols=["knn"], out=out / "scores", device=cfg.device)

def main(argv: list[str] | None = None):
    try:
        cfg = parse_args(sys.argv[1:] if argv is None else argv)
        if cfg.export:
            from eval import read_backbone
            write_aside(Path(cfg.export), read_backbone(str(Path(cfg.out) / "checkpoint.pth")))
        elif cfg.data:
            train(cfg)
        else:
            demo(cfg)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "the GPU's memory is too small: lower --batch-size, or try --checkpoint-activations"
        who = f"process {rank}: " if (rank := int(os.environ.get("RANK", 0))) else ""
        print(f"reddino.py: error: {who}{error}", file=sys.stderr, flush=True)
        sys.exit(2)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:  # a worker ignores the SIGTERM with which Python ends it, and Python would wait for it
        for worker in multiprocessing.active_children():
            worker.kill()

if __name__ == "__main__":
    main()
