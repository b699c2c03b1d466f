"""RedDino in one file: self-supervised pretraining of a vision transformer on medical images.

    python reddino.py                                # no data: draws blood smears, trains on them
    python reddino.py --data SMEARS --arch nano      # your images, a model for a laptop's CPU
    torchrun --nproc_per_node=8 reddino.py --data SMEARS --arch vitb14 --init dinov2_vitb14
    python reddino.py --help                         # every option, and where its default is from

RedDino (Zedda et al., MICCAI 2025, arXiv:2508.08180) is DINOv2 (Oquab et al. 2023,
arXiv:2304.07193) on red blood cells. DINOv2 is DINO (Caron et al. 2021) plus iBOT (Zhou et al.
2022). `grep -n "RedDino:" *.py` prints what RedDino changed; all else is DINOv2. How it works:

  - A *student* network sees crops of an image, some with patches masked. It says which of K
    *prototypes* each crop (class token) and each masked patch (patch token) belongs to.
  - A *teacher*, the running average (EMA) of the student, sees whole crops. It gives the answers.
  - Both could agree on "prototype 1, always". Sinkhorn-Knopp prevents it: it balances the
    teacher's answers, so that over a batch all prototypes are used alike.

The file follows an image: configuration, patches, transformer, weights from elsewhere, heads,
the teacher's targets, losses, one training step, optimiser and schedules, checkpoints, the loop.
Shapes: B images, G = 2 global and L local views of each, N patches a view, D dimensions,
K prototypes, M masked patches in all.
"""

import argparse
import atexit
import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from augment import RECIPES, BadImage, Tiles, UserError, batches, check_window, normalise

# --------------------------------------------------------------------------------------------------
# Configuration. Every option, its default, what it does and where the number comes from; the
# command line is made from this class. Defaults are those of RedDino's released ViT-S; PRESETS
# says what differs elsewhere. Durations are shares of the run: a longer run keeps their shape.

def opt(default, text, choices=None, low=0, high=10**9):
    """A field of Config: default, one line of help, and what may be given."""
    allowed = dict(help=text, choices=choices, low=low, high=high)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=allowed)
    return dataclasses.field(default=default, metadata=allowed)

@dataclass
class Config:
    # where
    data: list[str] = opt([], "folders of images, searched recursively; each is a source")
    out: str = opt("out", "folder of checkpoints, metrics.jsonl, backbone.pth; a run goes on there")
    # what is trained
    arch: str = opt("vits14", "the backbone", ["nano", "vits14", "vitb14", "vitl14", "vitg14"])
    init: str = opt("", "start from this backbone: a file, or dinov2_vits14 and its sisters")
    registers: int = opt(0, "register tokens (Darcet et al. 2024: 4; RedDino: none)", high=1024)
    drop_path: float = opt(0.0, "stochastic depth (DINOv2: 0.3; RedDino, in effect: 0)", high=0.99)
    prototypes: int = opt(131072, "K (RedDino, DINOv2 long; short: 65536)", low=1, high=2**23)
    separate_heads: bool = opt(False, "a head for patches of their own (DINOv2 long)")
    # what it sees
    unit: str = opt("tiles", "windows of images, or single cells found in them", ["tiles", "cells"])
    tile_size: list[int] = opt([224], "their pixels (RedDino); 0: whole; several: all", high=10**5)
    window: list[float] = opt([], "LEVEL WIDTH: what is seen of deep grey", low=-math.inf)
    global_size: int = opt(224, "pixels of the global views (DINOv2)", low=1, high=10**4)
    local_size: int = opt(98, "pixels of the local views (DINOv2 with patch 14)", low=1, high=10**4)
    local_crops: int = opt(1, "local views of an image (RedDino: 1; DINOv2: 8)", high=100)
    global_scale: float = opt(0.32, "least area share of a global view (DINOv2)", low=0.06, high=1)
    augment: str = opt("reddino", "pixel transforms: RedDino's, an organ's, none", list(RECIPES))
    balance: bool = opt(False, "draw from the folders evenly, whatever their sizes")
    mix: int = opt(0, "images a batch is drawn from, 0: many; of one, stain tells nothing apart")
    # the objective
    centering: str = opt("sinkhorn-knopp", "how targets are balanced (RedDino, DINOv2 long)",
                         ["sinkhorn-knopp", "moving-average"])
    koleo: float = opt(0.0, "weight of KoLeo (DINOv2: 0.1; RedDino takes it out)")
    ibot: float = opt(1.0, "weight of the patch-token loss (DINOv2)")
    teacher_temp: float = opt(0.07, "the teacher's, at first at most 0.04 (DINO)", low=1e-6)
    teacher_temp_warmup: float = opt(3.0, "share of the run (RedDino: 30 epochs of 10; DINOv2: "
                                          "0.3, 0.06)")
    # the optimiser
    iters: int = opt(19500, "optimiser steps (RedDino S: 10 x 1,950)", low=1)
    batch_size: int = opt(560, "images a step, over all processes (RedDino S: 2 GPUs x 280)", low=1)
    accumulate: int = opt(1, "micro-batches a step: less memory, same result (but KoLeo's, nano's)",
                          low=1)
    lr: float = opt(2e-4, "peak, at batch 1024; scaled by a square root (RedDino, DINOv2 long)")
    warmup: float = opt(0.01, "share in which lr rises (RedDino; DINOv2: 0.1, 0.16)", high=1)
    weight_decay_end: float = opt(0.2, "after 0.04 at first (RedDino, DINOv2 long; short: 0.4)")
    momentum: float = opt(0.994, "of the EMA, 1 at the end (RedDino, DINOv2 long)", high=1)
    freeze_backbone_steps: int = opt(0, "steps for heads alone; in as many again lr rises")
    # a look at the features meanwhile
    eval_data: list[str] = opt([], "labelled cells as in eval.py: 20-NN at each checkpoint")
    # the machine
    seed: int = opt(0, "of everything random", high=2**63 - 1)
    workers: int = opt(-1, "loading processes of each process; -1: by cores", low=-1, high=1024)
    device: str = opt("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])
    dtype: str = opt("auto", "of products; auto: bfloat16 where the hardware has it",
                     ["auto", "float32", "bfloat16", "float16", "float64"])
    compile: bool | None = opt(None, "torch.compile each block; by default on CUDA")
    checkpoint_activations: bool = opt(False, "recompute blocks backward: half the memory")
    save_every: int = opt(500, "steps between checkpoints", low=1)
    log_every: int = opt(10, "steps between lines of the log", low=1)

PRESETS = {
    # From scratch, on little data, in minutes (a search on drawn smears: tests/RESULTS.md). Squares
    # of 56 pixels hold a cell and little else: by its neighbours a view would be found too easily.
    "nano": dict(prototypes=256, tile_size=[56], global_size=40, local_size=16, local_crops=0,
                 global_scale=0.7, augment="cells", koleo=0.1, ibot=0.1, momentum=0.95,
                 teacher_temp=0.03, iters=1000, batch_size=48, lr=4e-3, warmup=0.1,
                 weight_decay_end=0.04),
    "vitb14": dict(iters=36500, batch_size=392),  # RedDino B: 2 GPUs x 196, 10 x 3,650 steps
    "vitl14": dict(iters=109000, batch_size=128),  # RedDino L: 2 GPUs x 64, 10 x 10,900 steps
    "vitg14": dict(iters=109000, batch_size=128),  # RedDino has no giant: as L
    **{organ: dict(global_scale=0.5) for organ in ("ct", "mri", "xray")},  # a view holds anatomy
}
DEMO = dict(arch="nano", unit="cells", mix=1)  # what it draws tells its classes by shape alone

def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")

def configure(**given) -> Config:
    """Config: what is given, else the architecture's preset, else the default. Raises UserError."""
    preset = PRESETS.get(given.get("augment"), {}) | PRESETS.get(given.get("arch"), {})
    cfg = Config(**(preset | given))
    for name in ("data", "eval_data", "tile_size"):  # one will do, in Python too
        if isinstance(getattr(cfg, name), int | str):
            setattr(cfg, name, [getattr(cfg, name)])
    for field in dataclasses.fields(Config):
        value, allowed, flag = getattr(cfg, field.name), field.metadata, flag_of(field.name)
        if allowed["choices"] and value not in allowed["choices"]:
            raise UserError(f"{flag} {value}: choose from {', '.join(allowed['choices'])}")
        for number in value if isinstance(value, list) else [value]:
            low, high = allowed["low"], allowed["high"]
            if isinstance(number, int | float) and not low <= number <= high:
                raise UserError(f"{flag} {number}: must lie between {low} and {high}")
    for name in ["global_size", "local_size"] if cfg.local_crops else ["global_size"]:
        if getattr(cfg, name) % ARCHS[cfg.arch]["patch_size"]:
            raise UserError(f"{flag_of(name)} {getattr(cfg, name)}: {cfg.arch} needs a multiple of "
                            f"its {ARCHS[cfg.arch]['patch_size']}-pixel patches")
    if cfg.local_crops and cfg.local_size > cfg.global_size:
        raise UserError("--local-size must not exceed --global-size")
    if cfg.batch_size % cfg.accumulate:
        raise UserError(f"--accumulate {cfg.accumulate} must divide --batch-size {cfg.batch_size}")
    check_window(cfg.window)
    return cfg

def parse_args(argv: list[str]) -> Config:
    """The command line, made from Config. Without --data it is that of the demo."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("reddino.py", description=about, allow_abbrev=False)
    parser.error = lambda message: stop_with(f"{message} (see --help)")  # one line, no usage
    for field in dataclasses.fields(Config):
        default = field.default
        kind = dict(choices=field.metadata["choices"], type=type(default))
        if default is dataclasses.MISSING:  # a list
            default = " ".join(map(str, field.default_factory()))
            kind = dict(nargs="+", type=field.type.__args__[0])
        elif isinstance(default, bool) or default is None:
            kind = dict(action=argparse.BooleanOptionalAction)
        presets = [f"; {name} {p[field.name]}" for name, p in PRESETS.items() if field.name in p]
        text = f"{field.metadata['help']} [{default}{''.join(presets)}]".replace("%", "%%")
        parser.add_argument(flag_of(field.name), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    return configure(**(given if "data" in given else DEMO | given))

# --------------------------------------------------------------------------------------------------
# Patches. A ViT reads an image as a sequence of N square patches of p x p pixels, each projected
# linearly to D dimensions. To each it adds a learned embedding of its position. At another image
# size the grid of positions is stretched bicubically. (Dosovitskiy et al. 2021, section 3.1.)

def widen(x: Tensor) -> Tensor:
    """At least float32: exponentials and long sums need it, whatever autocast gave."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def resize_pos_embed(pos: Tensor, height: int, width: int, registers: int = 0) -> Tensor:
    """Positions [1, 1 + n*n, D], class token first, stretched to [1, 1 + height*width, D].

    As DINOv2's weights expect it: bicubic, not antialiased, with a scale of (size + 0.1) / n, which
    once guarded against rounding. With registers: exact size, antialiased (its hub/backbones.py).
    """
    n = math.isqrt(pos.shape[1] - 1)
    if (height, width) == (n, n):
        return pos
    size = dict(scale_factor=((height + 0.1) / n, (width + 0.1) / n))
    if registers:
        size = dict(size=(height, width), antialias=True)
    grid = widen(pos[:, 1:]).reshape(1, n, n, -1).permute(0, 3, 1, 2)  # [1, D, n, n]
    grid = F.interpolate(grid, mode="bicubic", **size).flatten(2).transpose(1, 2)
    return torch.cat([pos[:, :1], grid.to(pos.dtype)], dim=1)

STEM_WIDTHS = (24, 24, 48, 48, 96, 96)

def conv_stem() -> nn.Sequential:
    """Images [B, 3, H, W] to [B, 96, H/8, W/8] by six 3x3 convolutions, three of stride 2. For nano
    alone: one 8x8 matrix takes very long to learn what an edge is (Xiao et al. 2021, "Early
    Convolutions Help Transformers See Better")."""
    layers, before = [], 3
    for number, width in enumerate(STEM_WIDTHS):
        convolution = nn.Conv2d(before, width, 3, stride=2 - number % 2, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(width // 8, width), nn.GELU()]
        before = width
    return nn.Sequential(*layers)

# --------------------------------------------------------------------------------------------------
# The transformer: x + attention(norm(x)), then x + mlp(norm(x)), `depth` times. Parameter names
# are those of DINOv2's checkpoints, so that its published weights load as they are.

class Attention(nn.Module):
    """Multi-head self-attention. PyTorch's fused kernel does what DINOv2 needs xFormers for."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        if x.device.type == "cpu" and q.shape[2] < 64:
            # nano's few tokens: with its backward pass the fused kernel takes twice as long there
            # (185 for 99 images a second, bfloat16, one core)
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
            x = weights.to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

def Mlp(dim: int) -> nn.Module:
    """The usual feed-forward: 4x wider inside, GELU."""
    fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
    return nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

class SwiGLU(nn.Module):
    """The giant's gated feed-forward (Shazeer 2020), with about as many parameters as Mlp."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

class LayerScale(nn.Module):
    """A learned gain for each channel of a branch, near 0 at first: a deep network starts as the
    identity (Touvron et al. 2021)."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

class Block(nn.Module):
    """One layer, [B, N, D] to [B, N, D], with stochastic depth (Huang et al. 2016).

    In training, drop_path of the images skip a branch. As in DINOv2 it isn't computed for them at
    all, and the others' is scaled up to keep the mean. `place` (0..1, of the block) rounds their
    number up in some blocks and down in others: the share is right whatever the batch.
    """

    def __init__(self, dim, heads, ffn, layerscale: float, drop_path: float, place: float = 0.5):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn(dim)
        self.ls2 = LayerScale(dim, layerscale)
        self.drop_path, self.place = drop_path, place

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, lambda x: self.ls1(self.attn(self.norm1(x))))
        return self.add(x, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def add(self, x: Tensor, branch) -> Tensor:
        """x + branch(x), in training for some of the images only."""
        kept = max(int(len(x) * (1 - self.drop_path) + self.place), 1)
        if not self.training or self.drop_path == 0 or kept >= len(x):
            return x + branch(x)
        chosen = torch.randperm(len(x), device=x.device)[:kept]
        return x.index_add(0, chosen, branch(x[chosen]).to(x.dtype), alpha=len(x) / kept)

class VisionTransformer(nn.Module):
    """ViT as in DINOv2: class token, register tokens, patch tokens, blocks, a final LayerNorm.

    Any image size that `patch_size` divides will do, else UserError; `img_size` is that of the
    stored positions. stem: "linear", DINOv2's projection of a patch, or "convs", see conv_stem.
    """

    def __init__(self, img_size=224, patch_size=14, embed_dim=384, depth=12, heads=6, swiglu=False,
                 registers=0, layerscale=1e-5, drop_path=0.0, stem="linear"):
        super().__init__()
        self.img_size, self.patch_size, self.embed_dim = img_size, patch_size, embed_dim
        self.registers, self.checkpoint_activations = registers, False
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        if stem == "convs":
            proj = nn.Conv2d(STEM_WIDTHS[-1], embed_dim, 1)
            self.patch_embed = nn.ModuleDict({"stem": conv_stem(), "proj": proj})
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, embed_dim))
        std = 0.02 if embed_dim >= 384 else 0.2  # narrow: see init_linear
        n = img_size // patch_size
        self.pos_embed = nn.Parameter(std * torch.randn(1, 1 + n * n, embed_dim))
        self.register_tokens = None
        if registers:
            self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        ffn = SwiGLU if swiglu else Mlp
        blocks = [Block(embed_dim, heads, ffn, layerscale, drop_path, place=(i + 0.5) / depth)
                  for i in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear)

    def tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to the transformer's input [B, 1 + registers + N, D]. Masked patches,
        bool [B, N], lose their content and keep their position: what belongs *there*?"""
        height, width = (side // self.patch_size for side in x.shape[-2:])
        if (height * self.patch_size, width * self.patch_size) != tuple(x.shape[-2:]):
            raise UserError(f"{x.shape[-1]}x{x.shape[-2]} pixels are no whole {self.patch_size}-"
                            "pixel patches")
        for part in self.patch_embed.values():
            x = part(x)
        x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [B, 1 + N, D]
        x = x + resize_pos_embed(self.pos_embed, height, width, self.registers)
        if self.registers:  # they have no position
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class token [B, D], patch tokens [B, N, D], after the final norm; masks: bool [B, N]."""
        x = self.tokens(x, masks)
        for block in self.blocks:
            if self.checkpoint_activations:
                x = recompute(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.registers:]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised by MEAN and STD, to class tokens [B, D]: the features."""
        return self.forward_features(x)[0]

def init_linear(module: nn.Module):
    """Linear layers as in DINOv2: truncated normal, std 0.02, no bias. That suits widths from 384
    on. A narrower layer (nano's) would hardly pass anything on, so it gets Xavier's (Glorot and
    Bengio 2010), and its positions a std of 0.2 (measured: a few points of k-NN score)."""
    if isinstance(module, nn.Linear):
        if module.in_features < 384:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

ARCHS = {
    # ours, 1M parameters
    "nano": dict(embed_dim=128, depth=4, heads=2, patch_size=8, layerscale=1.0, stem="convs"),
    "vits14": dict(embed_dim=384, depth=12, heads=6, patch_size=14),  # 22M parameters
    "vitb14": dict(embed_dim=768, depth=12, heads=12, patch_size=14),  # 86M
    "vitl14": dict(embed_dim=1024, depth=24, heads=16, patch_size=14),  # 304M
    "vitg14": dict(embed_dim=1536, depth=40, heads=24, patch_size=14, swiglu=True),  # 1.1B
}
HEAD_SIZES = {"nano": dict(hidden=256, bottleneck=64, standardise=True)}

def build_vit(arch: str, img_size: int = 224, **overrides) -> VisionTransformer:
    """A VisionTransformer with random weights, of an architecture in ARCHS (DINOv2, table 16)."""
    if arch not in ARCHS:
        raise UserError(f"no architecture {arch!r}: one of {', '.join(ARCHS)}")
    return VisionTransformer(img_size, **(ARCHS[arch] | overrides))

# --------------------------------------------------------------------------------------------------
# Weights from elsewhere. Whatever layout a ViT was published in, it ends as a state dict under
# DINOv2's names. Files are read with weights_only=True: a .pth is a pickle, and a hostile one
# would otherwise run its code here.

HUB = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth"
DINOV2 = {f"dinov2_vit{size}14{registers.rstrip('4')}": HUB.format(f"vit{size}14", registers)
          for size in "sblg" for registers in ("", "_reg4")}
HEADS = {128: 2, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}  # of a width; weights don't
# show how many there were, and with others the features are wrong
PLAIN = [argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Int64DType,
         np._core.multiarray.scalar]  # beside the weights in DINO's and others' files

def load_file(path: str | Path) -> dict:
    """The dict in a .pth or .safetensors file; UserError in one line if there is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    damaged = None
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file as load_safetensors

            return load_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch checks no CRC: a flipped bit would be a weight
        with torch.serialization.safe_globals(PLAIN):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"{path}: pip install safetensors to read it") from None
    except Exception:  # a different type for each way in which a file can be wrong
        raise UserError(f"{path}: no whole PyTorch file, or it holds more than tensors and plain "
                        "values; download it again, or save its state dict alone") from None
    if damaged:
        raise UserError(f"{path}: damaged at {damaged}; copy or download it again")
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return loaded

def flatten(nested: dict, prefix: str = "") -> dict[str, Tensor]:
    """{"teacher": {"norm.bias": t}} to {"teacher.norm.bias": t}; all but tensors is left out."""
    flat = {}
    for key, value in nested.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            flat[prefix + key] = value
        elif isinstance(key, str) and isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
    return flat

def read_backbone(path_or_name: str) -> dict[str, Tensor]:
    """A backbone's state dict in DINOv2's names. Raises UserError for anything else.

    From our checkpoints and backbone.pth; DINOv2's, DINO's, RedDino's and DinoBloom's files, with
    prefixes of Lightning, DDP, FSDP or torch.compile; timm's layout; or a name (dinov2_vits14,
    dinov2_vitb14_reg, ...), which is downloaded. Of student and teacher, the teacher's.
    """
    url = DINOV2.get(str(path_or_name))
    if url and not Path(path_or_name).exists():
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except Exception as error:  # offline, or cut short in the cache: torch raises many types
            raise UserError(f"{path_or_name}: no whole {url} ({type(error).__name__}); fetch it "
                            f"and give its path, or remove it from {torch.hub.get_dir()}") from None
    else:
        state = load_file(path_or_name)
    wrappers = r"(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    state = {re.sub(wrappers, "", key): value for key, value in flatten(state).items()}
    prefixes = [key.removesuffix("cls_token") for key in state if re.search(r"\bcls_token$", key)]
    prefix = max(prefixes, key=lambda name: "teacher" in name, default="")
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not re.match(r"(\w*head|classifier)\.", k)}
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    if not needed <= set(state):
        raise UserError(f"{path_or_name}: holds no vision transformer in DINOv2's or timm's layout")

    renames, mlp = {"reg_token": "register_tokens"}, "blocks.0.mlp.fc{}.weight".format  # timm's
    if mlp(1) in state and mlp(2) in state and len(state[mlp(1)]) == 2 * state[mlp(2)].shape[1]:
        renames |= {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}  # packed SwiGLU: gate and value
    for old, new in renames.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    pos = state["pos_embed"]
    if math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:  # the class token's is part of that token
        state["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    if "blocks.0.ls1.gamma" not in state:  # DINO's ViTs have no LayerScale, which is one of 1
        for norm in [k for k in state if re.fullmatch(r"blocks\.\d+\.norm[12]\.weight", k)]:
            name = norm.replace("norm", "ls").replace("weight", "gamma")
            state[name] = torch.ones_like(state[norm])
    return state

def vit_from_state(state: dict[str, Tensor], img_size: int | None = None,
                   heads: int | None = None) -> VisionTransformer:
    """A VisionTransformer in eval mode that holds a state dict of read_backbone. Raises UserError.

    img_size: of the positions to store; None: that of the weights. heads: None: see HEADS.
    """
    dim, stem = state["cls_token"].shape[-1], "patch_embed.stem.0.weight" in state
    heads = heads or HEADS.get(dim)
    if not heads or dim % heads:
        raise UserError(f"weights of {dim} dimensions don't say how many attention heads they "
                        "have: give --heads (heads= in Python), a divisor")
    patch = 8 if stem else state["patch_embed.proj.weight"].shape[-1]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    img_size = img_size or patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    vit = VisionTransformer(img_size, patch, dim, depth, heads, "blocks.0.mlp.w12.weight" in state,
                            registers, stem="convs" if stem else "linear")
    load_weights(vit, state)
    return vit.eval()

def load_weights(vit: VisionTransformer, state: dict[str, Tensor], source="the weights") -> str:
    """Load a state dict of read_backbone, positions stretched to vit's size; says what is new.
    UserError if it is another architecture's, or holds what this network has not."""
    grid, own = vit.img_size // vit.patch_size, vit.state_dict()
    pos = resize_pos_embed(state["pos_embed"], grid, grid, "register_tokens" in state)
    state = state | {"pos_embed": pos}
    unknown = [k for k in state if k not in own]
    if unknown:
        raise UserError(f"{source}: another architecture: {unknown[0]!r} ({len(unknown)} such) has "
                        "no place here, and without it the features would be others")
    new = [k for k in own if k not in state]
    wrong = [k for k in state if own[k].shape != state[k].shape]
    wrong += [k for k in new if k not in ("mask_token", "register_tokens")]
    if wrong:
        raise UserError(f"{source}: another architecture ({wrong[0]!r} does not fit); choose "
                        "another --arch")
    vit.load_state_dict(state, strict=False)
    return f"{source}: {len(state)} tensors loaded" + (f"; new: {', '.join(new)}" if new else "")

# --------------------------------------------------------------------------------------------------
# Heads. A head says how alike a token is to each of K prototypes: an MLP, the result on the unit
# sphere, then its product with K vectors of trained length: gain x cosine. (DINO, section 3.1.)

class Prototypes(nn.Module):
    """K vectors g * v / |v|: weight_g [K, 1] and weight_v [K, D], as in DINOv2's checkpoints."""

    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # nn.Linear's, as DINOv2 leaves it

    def vectors(self) -> Tensor:
        return torch._weight_norm(self.weight_v, self.weight_g)  # [K, D]; keeps no v / |v|

class Standardise(nn.Module):
    """Each channel of [R, D] to mean 0 and variance 1 over the rows: a batch norm without a memory.
    For nano alone, as in DINO's heads of convolutional networks: at first class tokens differ by 5%
    of their length, and what they share would drown it (20-NN after 1,000 steps: 64 for 60)."""

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        return (x - x.mean(0)) * (x.var(0, correction=0) + 1e-5).rsqrt()

class DINOHead(nn.Module):
    """Tokens [R, D] to logits over prototypes [R, K]: 3-layer MLP, unit sphere, prototypes."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256,
                 standardise: bool = False):
        super().__init__()
        norm = [Standardise()] if standardise else []
        layers = [nn.Linear(dim, hidden), *norm, nn.GELU(), nn.Linear(hidden, hidden), *norm,
                  nn.GELU(), nn.Linear(hidden, bottleneck)]
        self.mlp = nn.Sequential(*layers)
        self.apply(init_linear)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def bottleneck(self, x: Tensor) -> Tensor:
        return F.normalize(widen(self.mlp(x)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.bottleneck(x), self.last_layer.vectors())

# --------------------------------------------------------------------------------------------------
# The teacher's targets. Its softmax alone would let everything fall onto one prototype. Two ways to
# prevent it: Sinkhorn-Knopp finds, for this batch, the assignment nearest to the teacher's in which
# all prototypes are used equally (Cuturi 2013; SwAV, Caron et al. 2020). Moving-average centering
# (DINO) subtracts from the logits their running mean: cheaper, and balanced on average only.

def all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """x summed (or op) over all processes, in place; x itself when there is one."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x

@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, n_iters: int = 3) -> Tensor:
    """Teacher logits [R, K] to targets [R, K]: rows sum to 1, each prototype gets about R/K.

    RedDino: this instead of the moving average that is DINOv2's default (3 iterations, as there).
    Divide the columns of exp(logits / temp) by their sums, then the rows by theirs, in turn. Papers
    scale columns to 1/K and rows to 1/R: constants that the next division undoes, so R isn't needed
    and each process may hold another number of rows. Columns are summed over all processes.
    """
    logits = widen(logits)
    top = logits.amax() if len(logits) else logits.new_tensor(-math.inf)
    top = all_reduce(top, dist.ReduceOp.MAX)
    q = (logits - top).div_(temp).clamp_(min=-80).exp_()  # e^-80: nothing, but no column sums to 0
    for _ in range(n_iters):
        q /= all_reduce(q.sum(0, keepdim=True))
        q /= q.sum(1, keepdim=True)
    return q

class MovingAverage(nn.Module):
    """DINO's centering: softmax((logits - center) / temp), the center a running mean of logits. A
    batch is centred with what was known before it: `update` comes after the step, if it counts."""

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, logits: Tensor, temp: float) -> tuple[Tensor, Tensor]:
        """Teacher logits [R, K] to targets [R, K]; and the logits' mean over all rows, [1, K]."""
        logits = widen(logits)
        rows = all_reduce(logits.new_tensor(float(len(logits))))
        mean = all_reduce(logits.sum(0, keepdim=True)) / rows.clamp_min(1)
        return F.softmax((logits - self.center) / temp, dim=-1), mean

    @torch.no_grad()
    def update(self, mean: Tensor):
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.momentum)

# --------------------------------------------------------------------------------------------------
# Losses. Two are cross-entropies between the teacher's targets t and the student's softmax,
# -sum_k t_k log softmax(logits / 0.1)_k. dino_loss compares class tokens of different crops of an
# image: features must not depend on the crop. ibot_loss compares a patch that the teacher sees and
# the student doesn't: a patch must follow from its surroundings. KoLeo spreads the features of a
# batch. (DINOv2, section 4.)

STUDENT_TEMP = 0.1  # DINO

class LinearCrossEntropy(torch.autograd.Function):
    """sum_r weights_r * cross_entropy(x_r @ prototypes.T / temp, targets_r), a few rows at a time.

    At K = 131,072 logits, softmax and their gradient would outweigh all else in memory. But the
    gradient of a cross-entropy is known, softmax minus target: it is written down on the way
    forward, and the logits are gone (as in language models: Hsu et al. 2024, Liger). Under autocast
    products are in half precision, sums in float32. Weights are about 1 within the products, and
    get their size after them: float16 knows nothing below 6e-8.
    """

    @staticmethod
    def forward(ctx, x, prototypes, targets, weights, temp):  # [R, D], [K, D], [R, K], [R], float
        device, dtype = x.device.type, x.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        some = max(2 ** (24 if device == "cpu" else 27) // len(prototypes), 1)  # 64, 512 MB
        loss, grad_x, grad_p = x.new_zeros(()), torch.zeros_like(x), torch.zeros_like(prototypes)
        p, half_x = prototypes.to(dtype), x.to(dtype)  # once, not for each few rows
        size = (weights.sum() / max(len(x), 1)).clamp_min(1e-30)
        weighted = (x * (weights / size)[:, None]).to(dtype)
        for first in range(0, len(x), some):
            rows = slice(first, first + some)
            t = targets[rows].to(x.dtype)
            log_q = F.log_softmax((half_x[rows] @ p.T).to(x.dtype).div_(temp), dim=1)  # [rows, K]
            loss -= (weights[rows, None] * t * log_q).sum()
            error = (log_q.exp_() * t.sum(1, keepdim=True)).sub_(t).to(dtype)  # d loss / d logits
            grad_x[rows] = error @ p
            grad_p += error.T @ weighted[rows]
        ctx.save_for_backward(grad_x * (weights / temp)[:, None], grad_p.mul_(size / temp))
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_p = ctx.saved_tensors
        return grad * grad_x, grad * grad_p, None, None, None

def cross_entropy(head: DINOHead, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of the cross-entropies of tokens [R, D] and targets [R, K], weighted by [R]."""
    x, prototypes = head.bottleneck(tokens), head.last_layer.vectors()
    return LinearCrossEntropy.apply(x, prototypes, targets, weights.to(x.dtype), STUDENT_TEMP)

def dino_loss(head: DINOHead, cls: Tensor, local_cls: Tensor, targets: Tensor) -> Tensor:
    """Class-token loss: each student view, global [B, G, D] or local [B, L, D], against each
    teacher view [B, G, K] but its own, averaged over pairs. Cross-entropy is linear in the targets,
    so they are added up first. (Without local views DINOv2, whose loader fails then, would divide
    by 3, not 2.)"""
    B, G, L = *targets.shape[:2], local_cls.shape[1]
    others = 1 - torch.eye(G, device=targets.device, dtype=targets.dtype)  # [G, G]
    answers = torch.einsum("uv,bvk->buk", others, targets)  # [B, G, K]
    if L:
        everyones = targets.sum(1, keepdim=True).expand(B, L, -1)
        answers = torch.cat([answers, everyones], dim=1)  # [B, G + L, K]
    tokens = torch.cat([cls, local_cls], dim=1).flatten(0, 1)  # [B (G + L), D]
    weights = torch.full((len(tokens),), 1 / (B * G * (G - 1 + L)), device=tokens.device)
    return cross_entropy(head, tokens, answers.flatten(0, 1), weights)

def ibot_loss(head: DINOHead, patches: Tensor, targets: Tensor, weights: Tensor, views: int):
    """Patch-token loss: masked patches [M, D] against targets [M, K], averaged within each masked
    view (weights [M]: 1 / its masked patches), divided by all views."""
    return cross_entropy(head, patches, targets, weights / views)

def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean log distance of each class token [B, D] to its nearest neighbour on the unit sphere, at
    least eps (Sablayrolles et al. 2019); within a micro-batch, as in DINOv2 within a GPU."""
    x = F.normalize(widen(x), dim=-1)
    with torch.no_grad():  # by differences: products in bfloat16 can't tell neighbours apart
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.fill_diagonal_(math.inf).argmin(dim=1)  # not itself
    return -(x - x[nearest]).norm(dim=-1).clamp_min(eps).log().mean()

# --------------------------------------------------------------------------------------------------
# One training step: the teacher looks at a batch and gives targets; the student looks at it, a
# micro-batch at a time, and gives losses. All tensors have the images first.

def micro_batches(global_views, local_views, masks, parts: int, device, dtype) -> list[tuple]:
    """A batch as `parts` micro-batches on the device: what DINO.forward takes, up to the targets.

    uint8 views [B, G, 3, H, W] and [B, L, 3, h, w], masks bool [B, G, N], on the CPU. Here masked
    patches are counted, for on a GPU to count is to wait.
    """
    result = []
    for views, small, mask in zip(*(t.chunk(parts) for t in (global_views, local_views, masks))):
        masked = mask.flatten().nonzero().squeeze(1)  # [M], indices into B * G * N
        weights = (1 / mask.sum(2, keepdim=True).clamp_min(1)).expand_as(mask)[mask]  # [M]
        moved = [t.to(device, non_blocking=True) for t in (mask, masked, weights.to(dtype))]
        result.append((normalise(views, device, dtype), normalise(small, device, dtype), *moved))
    return result

class DINO(nn.Module):
    """Student and teacher, each a backbone with a head (two with separate_heads)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.student = self.network(cfg, drop_path=cfg.drop_path)
        self.teacher = self.network(cfg, drop_path=0.0).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.student["backbone"].checkpoint_activations = cfg.checkpoint_activations
        self.centers = nn.ModuleDict()
        if cfg.centering == "moving-average":  # class and patch tokens have different means
            self.centers.update({kind: MovingAverage(cfg.prototypes) for kind in ("cls", "patch")})
        # RedDino: one head for both kinds of tokens, as is DINOv2's default
        self.patch_head = "ibot_head" if cfg.separate_heads else "dino_head"

    @staticmethod
    def network(cfg: Config, drop_path: float) -> nn.ModuleDict:
        vit = build_vit(cfg.arch, cfg.global_size, registers=cfg.registers, drop_path=drop_path)
        names = ["dino_head", "ibot_head"] if cfg.separate_heads else ["dino_head"]
        sizes = HEAD_SIZES.get(cfg.arch, {})
        heads = {name: DINOHead(vit.embed_dim, cfg.prototypes, **sizes) for name in names}
        return nn.ModuleDict({"backbone": vit} | heads)

    def targets(self, logits: Tensor, temp: float, kind: str) -> tuple[Tensor, Tensor | None]:
        """Teacher logits [R, K] of one kind of token, "cls" or "patch", to targets [R, K]; and what
        update_teacher wants to know of them."""
        if self.centers:
            return self.centers[kind](logits, temp)
        return sinkhorn_knopp(logits, temp), None

    @torch.no_grad()
    def teacher_targets(self, batch: list[tuple], temp: float) -> tuple[list[tuple], dict]:
        """For each micro-batch the targets of class tokens [B, G, K] and masked patches [M, K],
        balanced over the whole batch; and what the loop watches for signs of collapse."""
        cls, masked = [], []
        for global_views, _, _, index, _ in batch:
            tokens, patches = self.teacher["backbone"].forward_features(global_views.flatten(0, 1))
            cls.append(tokens.unflatten(0, global_views.shape[:2]))  # [B, G, D]
            masked.append(patches.flatten(0, 1)[index])  # [M, D]
        tokens = torch.cat(cls)
        logits = self.teacher["dino_head"](tokens.flatten(0, 1))  # [B G, K]
        targets, mean = self.targets(logits, temp, "cls")
        targets = targets.unflatten(0, tokens.shape[:2]).split([len(c) for c in cls])
        patch_logits = self.teacher[self.patch_head](torch.cat(masked))
        patch_targets, patch_mean = self.targets(patch_logits, temp, "patch")
        patch_targets = patch_targets.split([len(m) for m in masked])
        entropy = torch.special.entr(F.softmax(widen(logits) / temp, dim=1)).sum(1).mean()
        signs = {"cls": tokens, "nearest": logits.argmax(1), "entropy": entropy,
                 "means": (mean, patch_mean)}
        return list(zip(targets, patch_targets)), signs

    def forward(self, global_views, local_views, masks, masked, weights, targets, patch_targets):
        """The student's losses on a micro-batch, by name; their sum is what is minimised. A new
        loss is a function and a line here. Shapes: see micro_batches and teacher_targets."""
        backbone, (B, G), L = self.student["backbone"], masks.shape[:2], local_views.shape[1]
        cls, patches = backbone.forward_features(global_views.flatten(0, 1), masks.flatten(0, 1))
        cls, patches = cls.unflatten(0, (B, G)), patches.flatten(0, 1)[masked]  # [B, G, D], [M, D]
        local_cls = cls[:, :0]
        if L:  # RedDino: 1 local view for DINOv2's 8
            local_cls = backbone(local_views.flatten(0, 1)).unflatten(0, (B, L))

        losses = {"dino": dino_loss(self.student["dino_head"], cls, local_cls, targets)}
        ibot = ibot_loss(self.student[self.patch_head], patches, patch_targets, weights, B * G)
        losses["ibot"] = self.cfg.ibot * ibot
        if self.cfg.koleo:  # RedDino: left out, as it pushes apart the many cells that are alike
            losses["koleo"] = self.cfg.koleo * sum(koleo_loss(view) for view in cls.unbind(1))
        return losses

    @torch.no_grad()
    def update_teacher(self, momentum: float, means=()):
        """teacher = momentum * teacher + (1 - momentum) * student, in a few fused kernels; and the
        centers, by the means of the step's logits."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        for center, mean in zip(self.centers.values(), means):
            center.update(mean)

# --------------------------------------------------------------------------------------------------
# Optimiser and schedules: AdamW; a half cosine for the learning rate after a linear warm-up, for
# the weight decay and for the teacher's momentum (DINO, section 3.2). All depend on the step alone.

def cosine(start: float, end: float, x: float) -> float:
    """From start (x = 0) to end (x = 1) along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(x, 1)))

def schedules(cfg: Config, step: int) -> dict[str, float]:
    """Learning rates, weight_decay, momentum and teacher_temp of a step."""
    done, lr = step / cfg.iters, cfg.lr * math.sqrt(cfg.batch_size / 1024)
    if done < cfg.warmup:
        lr *= done / cfg.warmup
    else:
        lr = cosine(lr, 1e-6, (done - cfg.warmup) / max(1 - cfg.warmup, 1e-9))  # 1e-6: DINOv2
    first = min(0.04, cfg.teacher_temp)  # DINO
    warm = min(done / cfg.teacher_temp_warmup, 1) if cfg.teacher_temp_warmup else 1
    thawed = 1.0
    if cfg.freeze_backbone_steps:
        thawed = min(max(step / cfg.freeze_backbone_steps - 1, 0), 1)
    return {"lr": lr, "backbone_lr": lr * thawed,
            "weight_decay": cosine(0.04, cfg.weight_decay_end, done),
            "momentum": cosine(cfg.momentum, 1.0, done),
            "teacher_temp": first + (cfg.teacher_temp - first) * warm}

def make_optimizer(student: nn.ModuleDict) -> torch.optim.AdamW:
    """AdamW with DINOv2's parameter groups: no weight decay on biases, norms and LayerScale; the
    projection of patches learns at 0.2 of the rate. (Its short recipe has more: the prototypes stay
    put for an epoch, and each layer learns at 0.9 of the rate of the next.)"""
    groups, linear = {}, "stem" not in student["backbone"].patch_embed
    for name, parameter in student.named_parameters():
        rate = 0.2 if name.startswith("backbone.patch_embed") and linear else 1.0
        decay = parameter.dim() > 1  # biases, norms and gains are vectors
        follows = "backbone_lr" if name.startswith("backbone") else "lr"
        group = dict(params=[], rate=rate, decay=decay, follows=follows)
        groups.setdefault((rate, decay, follows), group)["params"].append(parameter)
    fused = parameter.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.999), fused=fused)

def apply_schedules(optimizer: torch.optim.AdamW, now: dict[str, float]):
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * now[group["follows"]]
        group["weight_decay"] = now["weight_decay"] if group["decay"] else 0.0

# --------------------------------------------------------------------------------------------------
# Checkpoints. A run's future depends on the networks, the optimiser, the scaler and the step, and
# on nothing else: all randomness is a function of (seed, sample, epoch) or (seed, step), see
# augment.py. So a resumed run is the uninterrupted one, on a CPU bit for bit.

MAY_CHANGE = {"data", "out", "init", "workers", "device", "dtype", "compile", "eval_data",
              "checkpoint_activations", "accumulate", "iters", "save_every", "log_every"}

def write_aside(path: Path, state: dict, keep: Path | None = None):
    """torch.save into a new file, flushed to the disk, then renamed over path (which becomes keep):
    whatever happens, an old file or the new one is there, whole. Raises OSError."""
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
        path.replace(keep)
    aside.replace(path)

def check_fit(saved: dict, cfg: Config, parts: dict):
    """UserError unless it is a checkpoint of this run, whole, whose state has the shapes of parts:
    a fused AdamW would write past the end of an average that is too short."""
    was, now = dataclasses.asdict(Config()) | saved["config"], dataclasses.asdict(cfg)
    changed = [f"{flag_of(name)} was {was[name]}" for name in now
               if name not in MAY_CHANGE and now[name] != was[name]]
    if changed:
        raise UserError(f"another run ({', '.join(changed)}); choose another --out")
    for name in ("student", "teacher", "centers"):
        want, have = ({k: v.shape for k, v in state.items()}
                      for state in (parts[name].state_dict(), saved[name]))
        if want != have:
            raise UserError(f"{name} of another shape")
    groups, theirs = parts["optimizer"].param_groups, saved["optimizer"]["param_groups"]
    parameters = [p for group in groups for p in group["params"]]
    averages = [state[key].shape == parameters[number].shape for key in ("exp_avg", "exp_avg_sq")
                for number, state in saved["optimizer"]["state"].items()]
    if list(map(len, groups)) != list(map(len, theirs)) or not all(averages):
        raise UserError("optimizer of another shape")

def newest_checkpoint(cfg: Config, parts: dict) -> tuple[dict | None, str]:
    """The state to go on from and a line about it; (None, "") where no run is. Raises UserError."""
    said = ""
    for path in (Path(cfg.out, "checkpoint.pth"), Path(cfg.out, "previous.pth")):
        if path.exists():
            try:
                saved = load_file(path)
                check_fit(saved, cfg, parts)
            except (UserError, KeyError, TypeError, AttributeError, IndexError) as error:
                said += f"{path}: can't go on from it ({error}); "
                continue
            if said:  # or the next save would put the broken one in the place of the good one
                Path(cfg.out, "checkpoint.pth").replace(Path(cfg.out, "broken.pth"))
            return saved, f"{said}{path}: going on at step {saved['step']}"
    if said:
        raise UserError(said + "choose another --out; --init starts from its weights")
    return None, ""

def lock(out: str):
    """Makes OUT, and keeps it for this process as long as the returned file is open."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out, "lock"), "w")
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise UserError(f"--out {out}: another run writes there; choose another --out") from None
    except OSError as error:
        raise UserError(f"--out {out}: can't write there ({error.strerror})") from None

# --------------------------------------------------------------------------------------------------
# Devices and processes.

def cores() -> int:
    """CPU cores for each process on this machine."""
    everyone = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        everyone = len(os.sched_getaffinity(0))
    return max(everyone // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)

def choose_device(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of matrix products. Raises UserError for a device that isn't there."""
    mps = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    name, local = cfg.device, int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch finds none; --device auto takes what there is")
    if name == "mps" and cfg.dtype == "float64":
        raise UserError("--dtype float64: not on Apple's GPUs; --device cpu has it")
    if name == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node={torch.cuda.device_count()} is the most: a GPU each")
    device = torch.device(name, local if name == "cuda" else None)
    if cfg.dtype != "auto":
        return device, getattr(torch, cfg.dtype)
    if name == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return device, torch.bfloat16 if fast else torch.float16
    # a ViT-S step on 2 cores of a Zen 4: 7.3 s for 10.9; on a CPU without units for it, minutes
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, torch.bfloat16 if name == "cpu" and fast else torch.float32

def start_processes(device: torch.device) -> tuple[int, int]:
    """Join torchrun's processes, if there are several: rank and number."""
    world, told = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("OMP_NUM_THREADS")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not told or (told == "1" and world > 1):  # which is torchrun's choice, not the user's
        torch.set_num_threads(cores())
    if world > 1 and not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401  (later it would hold the group)

        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(minutes=10))
        PATIENT.append(dist.new_group(backend="gloo", timeout=timedelta(hours=12)))
        atexit.register(leave_processes)
    return int(os.environ.get("RANK", 0)), world

PATIENT = []  # the group in which processes wait for hours while rank 0 reads

def leave_processes():
    """Ends gloo's threads: one at work when Python goes would abort its process, for which torchrun
    kills rank 0 over its last files."""
    PATIENT.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # DistributedDataParallel refers to itself

def who_is_missing() -> str:
    """After an exchange that failed: all processes are to answer within a minute."""
    try:
        minute = timedelta(minutes=1)
        dist.monitored_barrier(PATIENT[0], timeout=minute, wait_all_ranks=True)
    except (RuntimeError, IndexError) as missing:
        return "a process does not answer: " + " ".join(str(missing).split())[:200]
    return "an exchange between processes failed; start again, it goes on from the last checkpoint"

def from_rank_0(make):
    """make() on rank 0, its result on all. Where it raises, rank 0 says why, the others stop."""
    if not dist.is_initialized():
        return make()
    box = [None]
    try:
        if dist.get_rank() == 0:
            box = [[make()]]
    finally:
        dist.broadcast_object_list(box, group=PATIENT[0])
    if box[0] is None:
        raise SystemExit(2)
    return box[0][0]

def gather(x) -> list:
    """x of every process."""
    everyones = [x]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, x)
    return everyones

# --------------------------------------------------------------------------------------------------
# What the loop listens to, watches and writes down.

@contextlib.contextmanager
def interrupts():
    """A list of the signals that came: they ask for a stop after the step in hand. Another, 2 s
    later or more, exits at once (before that it's an echo: torchrun passes on what all got)."""
    caught, times = [], []

    def note(which, _):
        caught.append(which)
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            os._exit(128 + which)

    wanted = [which for which in signal.Signals if which.name in ("SIGTERM", "SIGINT", "SIGHUP")]
    before = [(which, signal.signal(which, note)) for which in wanted]
    try:
        yield caught
    finally:
        for which, handler in before:
            signal.signal(which, handler)

class Logger:
    """What rank 0 writes down: the log, OUT/metrics.jsonl with each step once, OUT/skipped.txt."""

    def __init__(self, out: Path, start: int, writes: bool):
        self.writes, self.skipped, self.list, self.listed = writes, set(), out / "skipped.txt", ""
        path = out / "metrics.jsonl" if writes else Path(os.devnull)
        if writes and path.exists():
            aside = path.with_name(path.name + ".new")
            aside.write_bytes(b"".join(steps_before(start, path)))
            aside.replace(path)
        if writes and start and self.list.exists():
            self.listed = self.list.read_text("utf-8", errors="replace")
        self.metrics = open(path, "a")

    def say(self, *lines: str):
        try:
            if self.writes and any(lines):
                print(*filter(None, lines), sep="\n", flush=True)
        except OSError:  # nobody reads any more (| head, a closed terminal): stop as if told to
            sys.stdout = open(os.devnull, "w")
            signal.raise_signal(signal.SIGTERM)

    def step(self, values: dict):
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        print(json.dumps(plain), file=self.metrics, flush=True)

    def skip(self, faults: dict[str, str], tiles: Tiles):
        """Name each unreadable file once; UserError when they are more than half of all files."""
        new = [str(BadImage(path, faults[path])) for path in faults if path not in self.skipped]
        new = [line for line in new if line not in self.listed]
        self.skipped |= set(faults)
        if new and self.writes:
            self.listed += "".join(line + "\n" for line in new)
            self.list.write_text(self.listed, "utf-8", errors="backslashreplace")
            self.say(*(f"skipped {line}" for line in new[:3]),
                     f"{len(self.skipped)} unreadable files so far: {self.list} lists them")
        if len(self.skipped) > 0.5 * (len(tiles.files) + len(tiles.skipped)):
            raise UserError(f"{len(self.skipped)} files can't be read, more than half: {self.list}")

def steps_before(start: int, path: Path):
    """Lines of metrics.jsonl below a step; what came later is done again, what is no step goes."""
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # cut short, or not ours
            if json.loads(line)["step"] < start:
                yield line + b"\n"

def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1-2): exp of the entropy of the normalised singular values
    of [R, D] features. Between 1 (all on one line: collapsed) and D."""
    values = torch.linalg.svdvals(features.float().cpu())  # Apple's GPUs have none
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))

class Watch:
    """Signs of learning and of collapse, from the teacher's last 1,024 images."""

    def __init__(self):
        self.cls, self.nearest = [], []

    def note(self, signs: dict[str, Tensor]):
        keep = -(-1024 // len(signs["cls"]))  # batches
        self.cls = [*self.cls, signs["cls"].float()][-keep:]
        self.nearest = [*self.nearest, signs["nearest"]][-keep:]

    def signs(self) -> dict[str, float]:
        """rank: effective dimensions. std: spread on the unit sphere. in_use: prototypes that some
        view is nearest to. match: how often a view's nearest among second views of 64 images is
        that of its own image; by chance 1/64; it rises before any score. Nothing while images are
        few: their rank is low for no fault of the network."""
        if sum(map(len, self.cls)) < 1024:
            return {}
        cls = torch.cat(self.cls)[-1024:]  # [1024, G, D]
        x = F.normalize(cls, dim=2)
        first, second = x[:, 0].unflatten(0, (16, 64)), x[:, 1].unflatten(0, (16, 64))
        found = (first @ second.transpose(1, 2)).argmax(2)  # [16, 64]
        match = (found == torch.arange(64, device=x.device)).float().mean()
        return {"rank": effective_rank(cls.flatten(0, 1)),
                "std": float(x.flatten(0, 1).std(0).norm()),
                "in_use": len(torch.cat(self.nearest).unique()), "match": float(match)}

def collapse(signs: dict[str, float], entropy: float, prototypes: int) -> str:
    """A warning: class tokens all but one and the same, or a teacher without an opinion."""
    most = math.log(prototypes)
    if not signs or (signs["rank"] >= 2 and signs["std"] >= 0.01 and entropy <= 0.999 * most):
        return ""
    return (f"WARNING: the teacher has collapsed (effective rank {signs['rank']:.1f}, spread "
            f"{signs['std']:.3f}, entropy {entropy:.3f} of ln K = {most:.3f}): features hardly "
            "depend on the image; see the README, 'Signs of collapse'")

# --------------------------------------------------------------------------------------------------
# The loop.

def find_tiles(cfg: Config) -> tuple[Tiles, str]:
    """The tiles of --data, and a digest of their images' names and sizes, wherever they lie."""
    if not cfg.data:
        raise UserError("--data: name at least one folder of images")
    tiles = Tiles(cfg.data, cfg.tile_size, cfg.window, raw=cfg.augment == "ct", unit=cfg.unit)
    for _, first, last in tiles.sources:
        try:
            if first < last:
                tiles[first]
        except BadImage as bad:  # what else is wrong with a file concerns that file
            if "--window" in bad.reason:
                raise UserError(str(bad)) from None
    if len(tiles) < cfg.batch_size:
        raise UserError(f"{len(tiles)} {cfg.unit} are fewer than --batch-size {cfg.batch_size}: "
                        "lower it, or add images")
    names = [(os.path.basename(path), list(size)) for path, size in zip(tiles.files, tiles.sizes)]
    return tiles, hashlib.sha256(repr((len(tiles), names)).encode("utf-8", "replace")).hexdigest()

def train(cfg: Config, monitor=None) -> Path:
    """Train as cfg says; returns OUT/backbone.pth, the teacher's backbone in DINOv2's layout.

    monitor(backbone, device) gives numbers by name at each checkpoint, on rank 0.
    Raises UserError for what the user can mend, SystemExit(128 + signal) after a signal.
    """
    device, dtype = choose_device(cfg)
    rank, world = start_processes(device)
    if cfg.batch_size % (world * cfg.accumulate):
        raise UserError(f"--batch-size {cfg.batch_size} can't be shared by {world} processes in "
                        f"{cfg.accumulate} micro-batches: choose a multiple")
    locks = []
    try:
        from_rank_0(lambda: locks.append(lock(cfg.out)))
        return train_in(Path(cfg.out), cfg, monitor, device, dtype, rank, world)
    finally:
        for file in locks:
            file.close()

def train_in(out: Path, cfg: Config, monitor, device, dtype, rank: int, world: int) -> Path:
    """The run itself, in a folder that is its own."""
    # --- data, networks, optimiser: the same in all processes
    tiles, files = from_rank_0(lambda: find_tiles(cfg))
    floats = torch.float64 if dtype == torch.float64 else torch.float32  # of the parameters
    torch.manual_seed(cfg.seed)
    model = DINO(cfg).to(device, floats)
    vit, optimizer = model.student["backbone"], make_optimizer(model.student)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"student": model.student, "teacher": model.teacher, "centers": model.centers,
             "optimizer": optimizer, "scaler": scaler}
    saved, note = from_rank_0(lambda: newest_checkpoint(cfg, parts))
    step, earlier = 0, 0.0  # seconds
    if saved:
        step, earlier = saved["step"], saved["seconds"]
        if (saved["files"], saved["processes"]) != (files, world):
            note += ("; images (by name or size) or processes are others than before: no longer "
                     "bit for bit the uninterrupted run")
        for name, part in parts.items():
            if saved[name]:  # a scaler that is off leaves nothing to load
                part.load_state_dict(saved[name])
        del saved  # 5 GB for a ViT-L
    elif cfg.init:  # RedDino: from DINOv2's weights, student and teacher alike; the heads are new
        state = from_rank_0(lambda: read_backbone(cfg.init))
        for network in (model.student, model.teacher):
            note = load_weights(network["backbone"], state, cfg.init)
    if cfg.compile or (cfg.compile is None and device.type == "cuda"):  # by block: seconds
        for block in [*vit.blocks, *model.teacher["backbone"].blocks]:
            block.compile()
    parallel = model
    if world > 1:  # gradients: means over processes
        ids = [device.index] if device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(model, ids, gradient_as_bucket_view=True)

    def save():
        if rank == 0:
            os.fsync(logger.metrics.fileno())
            config = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in MAY_CHANGE}
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(step=step, config=config, files=files, processes=world,
                          seconds=earlier + time.monotonic() - began)
            write_aside(out / "checkpoint.pth", state, keep=out / "previous.pth")

    # --- say what is going to happen
    logger, watch, began = Logger(out, step, rank == 0), Watch(), time.monotonic()
    size = sum(p.numel() for p in vit.parameters()) / 1e6
    logger.say(f"{cfg.arch}, {size:.1f}M parameters, on {len(tiles)} {cfg.unit} of "
               f"{len(tiles.files)} images; {world} x {device.type}, {str(dtype)[6:]}",
               *tiles.notes, note)
    logger.skip(tiles.skipped, tiles)
    faults, bad_in_a_row, waited, since, since_step, stop = {}, 0, 0.0, began, step, False
    workers = cfg.workers
    if workers < 0:
        workers = min(cores(), 16) if device.type == "cuda" else 1
    loader = batches(cfg, tiles, step, vit.patch_size, rank, world, workers, device.type == "cuda")
    with interrupts() as caught, contextlib.closing(loader):
        while step < cfg.iters and not stop:
            # --- a batch; None as long as there is none
            waiting, batch = time.monotonic(), None
            try:
                while batch is None and not caught:
                    batch = next(loader)
            except UserError:  # no loading process, no readable file: the steps so far count
                save()
                raise
            if batch is None:
                stop = True
                save()
                break
            *views_and_masks, indices, new_faults = batch
            faults |= new_faults
            waited += time.monotonic() - waiting

            # --- forward and backward, a micro-batch at a time
            now = schedules(cfg, step)
            apply_schedules(optimizer, now)
            torch.manual_seed(int(np.random.default_rng((cfg.seed, step, rank, 3)).integers(2**62)))
            batch = micro_batches(*views_and_masks, cfg.accumulate, device, floats)
            autocast = torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2)
            with autocast:
                targets, signs = model.teacher_targets(batch, now["teacher_temp"])
            optimizer.zero_grad(set_to_none=True)
            total = {}
            for number, (micro_batch, answers) in enumerate(zip(batch, targets), 1):
                alone = world > 1 and number < len(batch)  # gradients are exchanged with the last
                with parallel.no_sync() if alone else contextlib.nullcontext():
                    with autocast:
                        losses = parallel(*micro_batch, *answers)
                    scaler.scale(sum(losses.values()) / len(batch)).backward()
                for name, value in losses.items():
                    total[name] = total.get(name, 0) + value.detach() / len(batch)
            scaler.unscale_(optimizer)
            norms = {f"grad_{name[:4]}": nn.utils.clip_grad_norm_(part.parameters(), 3.0)  # DINOv2
                     for name, part in model.student.items()}

            # --- the one exchange of numbers: means over processes, and whether any is to stop
            numbers = {"loss": sum(total.values()), **total, **norms,
                       "teacher_entropy": signs["entropy"],
                       "stop": torch.tensor(float(len(caught)), device=device)}
            means = torch.stack([value.detach().to(floats) for value in numbers.values()])
            numbers = dict(zip(numbers, all_reduce(means).div(world).tolist()))
            stop = numbers.pop("stop") > 0

            # --- update, unless a number is not finite: then nothing of this step is kept
            finite = all(map(math.isfinite, numbers.values()))
            if finite:
                scaler.step(optimizer)
                model.update_teacher(now["momentum"], signs["means"])
                watch.note(signs)
                bad_in_a_row = 0
            else:
                bad = {tiles.file_of(i) for share in gather(indices) for i in share}
                logger.say(f"step {step} skipped, not finite: loss {numbers['loss']:.4g} or "
                           f"gradient; files: {', '.join(map(repr, sorted(bad)))}")
                searching = scaler.is_enabled() and scaler.get_scale() > 1  # for its scale
                if not (searching and math.isfinite(numbers["loss"])):
                    bad_in_a_row += 1
            scaler.update()

            # --- write down
            step += 1
            last = stop or bad_in_a_row == 3 or step == cfg.iters
            log, keep = step % cfg.log_every == 0 or last, step % cfg.save_every == 0 or last
            found = watch.signs() if log else {}
            scores = {}
            if monitor and keep and finite and not stop:
                scores = from_rank_0(lambda: monitor(model.teacher["backbone"], device))
            logger.step({"step": step - 1, **numbers, **now, **found, **scores,
                         "seconds": earlier + time.monotonic() - began, "skipped": not finite})
            if log:
                logger.skip({k: v for share in gather(faults) for k, v in share.items()}, tiles)
                seconds, steps = time.monotonic() - since, step - since_step
                terms = " ".join(f"{name} {numbers[name]:.3f}" for name in total)
                effective = ""
                if found:
                    effective = (f"rank {found['rank']:.0f}/{vit.embed_dim}  "
                                 f"match {found['match']:.0%}  ")
                left = timedelta(seconds=round(seconds / steps * (cfg.iters - step)))
                logger.say(f"step {step}/{cfg.iters}  loss {numbers['loss']:.3f} ({terms})  "
                           f"lr {now['lr']:.1e}  entropy {numbers['teacher_entropy']:.2f}/"
                           f"{math.log(cfg.prototypes):.2f}  {effective}"
                           + "".join(f"{name} {100 * f:.1f}  " for name, f in scores.items())
                           + f"{steps * cfg.batch_size / seconds:.1f} img/s  "
                           f"wait {waited / seconds:.0%}  ETA {left}",
                           collapse(found, numbers["teacher_entropy"], cfg.prototypes))
                faults, waited, since, since_step = {}, 0.0, time.monotonic(), step
            if bad_in_a_row == 3:
                raise UserError("three steps in a row were not finite; the last checkpoint is from "
                                "before them; look at the files named above, lower --lr, or try "
                                "--dtype float32")
            if keep:
                save()
    if stop:
        logger.say(f"interrupted: saved at step {step}; the same command goes on from there")
        raise SystemExit(128 + (caught or [signal.SIGTERM])[0])
    if rank == 0:
        write_aside(out / "backbone.pth", model.teacher["backbone"].state_dict())
        logger.say(f"done: {out / 'backbone.pth'} holds the teacher's backbone")
    return out / "backbone.pth"

def demo(cfg: Config):
    """Without --data: draw smears, train on some, score the features on others before and after."""
    import smears
    from eval import evaluate

    rank, _ = start_processes(choose_device(cfg)[0])
    out = Path(cfg.out)

    def draw():
        print(f"no --data: drawing blood smears in {out} to train on, and others to score the "
              "features on", flush=True)
        return [smears.draw(out / "seen", 160, 2 * cfg.seed),
                smears.draw(out / "unseen", 60, 2 * cfg.seed + 1)]

    seen, unseen = from_rank_0(draw)
    backbone = train(dataclasses.replace(cfg, data=[str(Path(seen).parent / "smears")]))
    if rank == 0:
        torch.manual_seed(cfg.seed)
        write_aside(out / "untrained.pth", DINO(cfg).teacher["backbone"].state_dict())
        weights = {"pixels": "pixels", "colour": "colour", "before training": out / "untrained.pth",
                   "after training": backbone}
        evaluate(unseen, weights, ["knn", "linear"], cfg.tile_size[0], out / "scores", cfg.device)
        from figures import demo_figures  # matplotlib takes a second

        pictures = demo_figures(out, unseen, out / "untrained.pth", backbone, cfg.tile_size[0],
                                cfg.device)
        print(f"pictures: {' '.join(map(str, pictures))}")

def run(argv: list[str]):
    cfg, monitor = parse_args(argv), None
    if cfg.eval_data:
        from eval import knn_monitor

        window = cfg.window or ([40, 400] if cfg.augment == "ct" else None)
        monitor = knn_monitor  # which other processes than rank 0 never call
        if int(os.environ.get("RANK", 0)) == 0:
            monitor = knn_monitor(cfg.eval_data, cfg.global_size, window)
    if cfg.data:
        train(cfg, monitor)
    else:
        demo(cfg)

def stop_with(message: str):
    rank = int(os.environ.get("RANK", 0))
    who = f"process {rank}: " if rank else ""
    print(f"reddino.py: error: {who}{message}", file=sys.stderr, flush=True)
    sys.exit(2)

def main(argv: list[str] | None = None):
    """The command line. Exit code 2 and one line for what the user can mend, 128 + signal."""
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8 are written escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    memory = "not enough memory: more --accumulate, --checkpoint-activations, a lower --batch-size"
    try:
        run(sys.argv[1:] if argv is None else argv)
        if dist.is_initialized():
            leave_processes()
    except KeyboardInterrupt:
        print("reddino.py: interrupted before the first step", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, dist.DistError) as error:
        stop_with(" ".join(str(error).split())[:1000])
    except torch.OutOfMemoryError:
        stop_with(memory)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            stop_with(memory)
        if not (dist.is_initialized() and re.search("time|connect|peer", str(error), re.I)):
            raise
        stop_with(who_is_missing())
    finally:  # a worker ignores the SIGTERM with which Python ends it, and Python would wait for it
        for worker in multiprocessing.active_children():
            worker.kill()

if __name__ == "__main__":
    sys.modules["reddino"] = sys.modules["__main__"]  # eval.py shall see these classes, not copies
    main()
