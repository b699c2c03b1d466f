"""How good is a backbone? Freeze it, describe every labelled cell by its class token, and ask simple classifiers.

    python eval.py --data cells.csv --weights out/backbone.pth random pixels colour --crop 80 --out out/eval
    python eval.py --data CLASS_FOLDERS --weights dinov2_vits14 resnet50 --protocols knn linear
    python eval.py --data cells.csv --weights a.pth b.pth --finetune --figures out/figures    # hours without a GPU

--data     a CSV `image,label` or `image,x,y,label` (a cell's centre in pixels: the square of --crop pixels around it),
           with optional columns `group` (patient, study), `source` (hospital, stain), `split` (train, test; other rows
           are left out); or a folder that holds one folder of images per class.
--weights  any number of: our checkpoints and backbone.pth; DINOv2's, RedDino's and timm's files; dinov2_vits14 and its
           sisters; resnet50 and torchvision's other classifiers; and what their scores have to be compared with:
           random   an untrained network of the first checkpoint's shape, or of nano's;
           pixels   the crop itself, 16 x 16;
           colour   its histogram. A backbone that scores like this one is a detector of stains.

Why frozen: a small classifier can only use what is there, so the score is the backbone's own, in seconds. Why groups:
cells of one smear share stain, focus and patient, and whoever trained on some of them recognises the smear. So a group
(an image, if no column says more) is never on both sides; and as its cells err together, the 95% intervals come from
drawing groups, not cells, anew. Leaving one source out asks what a laboratory asks: does it work on our microscope?
"""
import argparse
import copy
import csv
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from augment import MEAN, STD, BadImage, UserError, check_window, find_images, normalise, read_image
from reddino import VisionTransformer, build_vit, choose_device, configure, product, resize_pos_embed, write_aside

PROTOCOLS = ("knn", "linear", "fewshot")
SCORES = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "macro_f1": "macro F1", "weighted_f1": "weighted F1",
          "auroc": "AUROC"}
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strengths that the linear probe chooses from, strongest first
SHOTS, DRAWS, FEWSHOT_L2 = (1, 5, 10, 50), 20, 0.1  # the best of 1, 0.1, 0.01 on Chula, for pixels, colour and random
REPLICATES = 1000  # of the bootstrap: the ends of an interval then move by a few percent of its length between seeds
PIXELS, COLOUR, BINS = 16, 64, 32  # input sizes of these two baselines; a channel's bins

# ----------------------------------------------------------------------------------------------------------------------
# Labels. Whatever the layout, the cells end as parallel arrays, sorted by image, so that each image is decoded once.

@dataclass
class Cells:
    files: list[str]  # the images; the arrays below have one entry per cell, [n]
    file: np.ndarray  # index into files, ascending
    centre: np.ndarray | None  # [n, 2] x, y in pixels; None: an image is a cell
    label: np.ndarray  # index into classes
    classes: list[str]
    image: np.ndarray  # cells with the same number are of one image: of files with the same pixels
    group: np.ndarray  # cells with the same number stay together: the CSV's groups, or the images
    by: str = "image"  # or "group"
    source: np.ndarray | None = None  # index into sources
    sources: list[str] = field(default_factory=list)
    split: np.ndarray | None = None  # "train" or "test"
    skipped: dict[str, str] = field(default_factory=dict)  # files that can't be read, and why
    digest: str = ""  # of all that the crops depend on
    window: tuple | None = None  # level and width, see read_image

def csv_rows(path: str) -> list[dict]:
    """The rows of a CSV, each checked, with the CSV's folder before the image. UserError names the line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{**row, "line": reader.line_num} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a CSV: {error}") from None
    columns = {"image", "x", "y", "label", "group", "source", "split"} & set(reader.fieldnames or ())
    if missing := {"image", "label", *("xy" if columns & {"x", "y"} else "")} - columns:
        raise UserError(f"{path}: no column {' and '.join(sorted(missing))}; it needs image,x,y,label[,group][,source]")
    for row in rows:
        for c in sorted(columns):
            row[c] = (row[c] or "").strip()
            if not (re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", row[c], re.I) if c in "xy" else row[c]):
                raise UserError(f"{path}, line {row['line']}: {c} is {row[c]!r}" + ", not a number" * (c in "xy"))
        row["image"] = os.path.join(os.path.dirname(path), row["image"])
        if not os.path.lexists(row["image"]):
            raise UserError(f"{path}, line {row['line']}: image is {row['image']}, which is not there")
    return rows

def look(path: str, window=None) -> dict | BadImage:
    """Size of an image and digest of its pixels, or why there are none."""
    try:
        image = read_image(path, writable=False, window=window)
    except BadImage as bad:
        return bad
    content = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
    return {"height": image.shape[0], "width": image.shape[1], "content": content}

def readable(rows: list[dict], window=None) -> tuple[list[dict], dict[str, str]]:
    """The rows whose image can be read, each with what look says, sorted by image; and the other images' reasons."""
    files = sorted({r["image"] for r in rows})
    with ThreadPoolExecutor() as pool:
        looks = dict(zip(files, pool.map(look, files, itertools.repeat(window))))
    skipped = {path: bad.reason for path, bad in looks.items() if isinstance(bad, BadImage)}
    if len(skipped) > len(files) / 2:
        raise UserError(f"{len(skipped)} of {len(files)} images can't be read; {BadImage(*min(skipped.items()))}")
    rows = [r | looks[r["image"]] for r in sorted(rows, key=lambda r: r["image"]) if r["image"] not in skipped]
    for row in rows:
        if "x" in row and not (0 <= float(row["x"]) <= row["width"] and 0 <= float(row["y"]) <= row["height"]):
            raise UserError("x={x}, y={y} is outside of {image}, which has {width}x{height} pixels".format(**row))
    return rows, skipped

def read_cells(data: str, drop_labels=(), window=None) -> Cells:
    """The labelled cells of a CSV or of class folders; UserError for all that would make their scores meaningless."""
    if os.path.isdir(data):
        folders = sorted(e.name for e in os.scandir(data) if e.is_dir() and not e.name.startswith("."))
        rows = [{"image": f, "label": c} for c in folders for f in find_images(os.path.join(data, c))]
    else:
        rows = csv_rows(data)
    labels = sorted({r["label"] for r in rows})
    if unknown := set(drop_labels) - set(labels):
        raise UserError(f"--drop-label {min(unknown)}: the labels are {', '.join(labels)}")
    rows, skipped = readable([r for r in rows if r["label"] not in drop_labels
                              and r.get("split", "test") in ("train", "test")], window)
    if len({r["label"] for r in rows}) < 2:
        raise UserError(f"{data}: {len(rows)} cells, not of two classes; give a CSV or FOLDER/CLASS/*.png")

    def column(name):  # its different values, and the index of each cell's
        values, index = np.unique([r[name] for r in rows], return_inverse=True) if name in rows[0] else ([], None)
        return [str(v) for v in values], index

    (classes, label), (files, file), (sources, source) = column("label"), column("image"), column("source")
    by, image = "group" if "group" in rows[0] else "image", column("content")[1]  # Chula has 18 under two names
    group, split = column("group")[1] if by == "group" else image, None
    if "split" in rows[0]:
        split = np.array([r["split"] for r in rows])
    if (counts := np.bincount(label)).min() < 2:
        raise UserError(f"class {classes[counts.argmin()]!r} has one cell, which can't be both learnt and tested; "
                        "label more of it or leave it out with --drop-label")
    if len(np.unique(group if split is None else split)) < 2:
        raise UserError(f"{data}: all cells are of one {by if split is None else 'split'}; that can't be split")
    centre = np.array([(r["x"], r["y"]) for r in rows], float) if "x" in rows[0] else None
    if centre is not None and centre.max() <= 1:
        raise UserError(f"{data}: x and y look like fractions of the image's size; they have to be pixels")
    digest = hashlib.sha256(repr([(r["content"], r.get("x"), r.get("y")) for r in rows]).encode()).hexdigest()
    return Cells(files, file, centre, label, classes, image, group, by, source, sources, split, skipped, digest,
                 window)

# ----------------------------------------------------------------------------------------------------------------------
# Weights: a backbone's state dict under DINOv2's names, from whatever layout it was published in. Everything is read
# with weights_only=True: a .pth is a pickle, and a hostile one would otherwise run its code here.

HUB = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth"
DINOV2 = {f"dinov2_vit{s}14{r.rstrip('4')}": HUB.format(f"vit{s}14", r) for s in "sblg" for r in ("", "_reg4")}

def load_file(path: str | Path) -> dict:
    """The dict in a .pth or .safetensors file; UserError in one line if there is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file as load_safetensors

            return load_safetensors(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"{path}: pip install safetensors to read it") from None
    except Exception:  # torch.load raises a different type for each way in which a file can be wrong
        raise UserError(f"{path}: no PyTorch file, or refused as it holds more than tensors and plain values") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return loaded

def read_backbone(path_or_name: str) -> dict[str, Tensor]:
    """A backbone's state dict in DINOv2's names, from: our checkpoints and backbone.pth; DINOv2's .pth; RedDino's and
    DinoBloom's {"teacher": {"backbone.…"}}; timm's layout; or a name (dinov2_vits14, dinov2_vitb14_reg, ...), which
    is downloaded. Raises UserError for anything else."""
    url = DINOV2.get(str(path_or_name))
    if url and not Path(path_or_name).exists():
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{path_or_name}: can't download {url} ({error}); fetch it, pass its path") from None
    else:
        state = load_file(path_or_name)
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    state = {re.sub(r"^(module\.)?(_orig_mod\.)?", "", k): v for k, v in state.items()}
    if any(k.startswith("backbone.") for k in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}  # DINOv2's block chunks
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(state):
        raise UserError(f"{path_or_name}: holds no vision transformer in DINOv2's or timm's layout")
    # What is left is timm's: names, a classifier, and no position of the class token, since that is added to the token.
    renames = {"reg_token": "register_tokens"}
    fc1, fc2 = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is not None and fc1.shape[0] == 2 * fc2.shape[1]:  # fc1 gives gate and value: timm's packed SwiGLU
        renames |= {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    for old, new in renames.items():
        state = {k.replace(old, new): v for k, v in state.items() if not k.startswith("head.")}
    pos = state["pos_embed"]
    if math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    return state

def vit_from_state(state: dict[str, Tensor], img_size: int | None = None) -> VisionTransformer:
    """A VisionTransformer in eval mode that fits a state dict of read_backbone and holds it. img_size: the size whose
    positions are stored, those of the state dict if None. All of DINOv2's networks have heads of 64 dimensions."""
    dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    img_size = img_size or patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    vit = VisionTransformer(img_size, patch, dim, depth, dim // 64, "blocks.0.mlp.w12.weight" in state, registers)
    load_weights(vit, state)
    return vit.eval()

def load_weights(vit: VisionTransformer, state: dict[str, Tensor], source: str = "the weights") -> str:
    """Load a state dict of read_backbone, positions stretched to vit's size; says in one line what was loaded.
    UserError if it is another architecture's."""
    grid = vit.img_size // vit.patch_size
    state = dict(state)
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], grid, grid, "register_tokens" in state)
    own = vit.state_dict()
    wrong = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
    missing = [k for k in own if k not in state and k not in ("mask_token", "register_tokens")]
    if wrong or missing:
        raise UserError(f"{source}: another architecture ({(wrong + missing)[0]} does not fit); choose another --arch")
    vit.load_state_dict(state, strict=False)
    new, unused = [k for k in own if k not in state], [k for k in state if k not in own]
    return (f"{source}: {len(own) - len(new)} tensors loaded" + (f"; new: {', '.join(new)}" if new else "")
            + (f"; not used: {', '.join(unused)}" if unused else ""))  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Backbones: modules that map normalised images [B, 3, S, S] to features [B, D].

class Colour(nn.Module):
    """How much of each colour, nothing of where: histograms of R, G and B. (Of their counts the square root, so that
    the cosine of two histograms is their overlap; otherwise it sees the background's bin and little else.)"""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
        bins = ((x * std + mean) * BINS).long().clamp(0, BINS - 1).flatten(2).flatten(0, 1)  # [B 3, S S]
        counts = bins + BINS * torch.arange(len(bins), device=x.device)[:, None]  # each image and channel by itself
        return counts.flatten().bincount(minlength=BINS * len(bins)).view(len(x), -1).sqrt() / x.shape[3]  # [B, 3 BINS]

def make_backbone(name: str, like: nn.Module | None) -> nn.Module:
    import torchvision.models as zoo  # takes a second, which the training's demo need not wait for

    classifiers = zoo.list_models(module=zoo)
    if os.path.isfile(name) or name in DINOV2:
        return vit_from_state(read_backbone(name))
    if name in ("pixels", "colour"):
        return nn.Flatten() if name == "pixels" else Colour()
    if name in classifiers:
        try:
            model = zoo.get_model(name, weights="DEFAULT")  # trained on ImageNet
        except OSError as error:
            raise UserError(f"--weights {name}: torchvision can't download it ({error})") from None
        *_, last = (part for part, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        model.set_submodule(last, nn.Identity())  # features are what the layer that names the classes would have seen
        return model
    if name != "random":
        near = difflib.get_close_matches(name, ["random", "pixels", "colour", *DINOV2, *classifiers], 1)
        raise UserError(f"--weights {name}: no such file or name" + (f"; is it {near[0]}?" if near else ""))
    # LayerScale 1: at DINOv2's 1e-5 class tokens of an untrained network are alike up to rounding, which is a straw man
    if like is None:
        return build_vit("nano", 64, layerscale=1.0)
    shape = like.img_size, like.patch_size, like.embed_dim, len(like.blocks), like.embed_dim // 64
    return VisionTransformer(*shape, swiglu=hasattr(like.blocks[0].mlp, "w12"), layerscale=1.0)

def load_backbone(name: str, size: int | None = None, device: str = "auto", like=None, seed: int = 0) -> nn.Module:
    """A frozen backbone by path or name (see --weights) that maps images [B, 3, size, size] to features [B, D], with
    .size, .device and .digest (of its weights). UserError if there is none. size: default what its positions were
    trained at, at most 224. like: a network whose shape `random` takes."""
    device, _ = choose_device(configure(device=device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(str(name), like).eval().requires_grad_(False)
    patch, fixed = getattr(backbone, "patch_size", 1), {"pixels": PIXELS, "colour": COLOUR}.get(str(name))
    backbone.size = fixed or size or min(getattr(backbone, "img_size", 224), 224) // patch * patch
    if backbone.size % patch:
        raise UserError(f"--size {size}: {name} cuts images into patches of {patch} pixels, which do not divide it")
    content = hashlib.sha256(type(backbone).__name__.encode())
    for key, value in backbone.state_dict().items():
        content.update(key.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    backbone.digest, backbone.device = content.hexdigest(), device
    return backbone.to(device)

# ----------------------------------------------------------------------------------------------------------------------
# Features. Threads decode the files, each once for all of its cells.

def cut(path: str, centres: np.ndarray | None, crop: int, size: int, window=None) -> Tensor:
    """The cells of one file, uint8 [k, 3, crop, crop]; or all of the file in a square of `size`, its shape kept.
    Beyond the border the edge goes on: black would be a hint."""
    image = read_image(path, window=window)
    if centres is None:
        height, width = (max(1, round(n * size / max(image.shape))) for n in image.shape[:2])
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        centres, crop = np.array([(width // 2, height // 2)]), size
    image = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="edge")
    cells = [image[y : y + crop, x : x + crop] for x, y in np.rint(centres).astype(int) + crop - crop // 2]
    return torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2)

def crops_of(cells: Cells, crop: int, size: int):
    """Yields all cells in order, uint8 [b, 3, side, side], about 256 at a time."""
    def read(f):
        here = slice(*np.searchsorted(cells.file, (f, f + 1)))
        return cut(cells.files[f], None if cells.centre is None else cells.centre[here], crop, size, cells.window)

    batch = math.ceil(256 * len(cells.files) / len(cells.file))
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(cells.files), batch):
            yield torch.cat(list(pool.map(read, range(first, min(first + batch, len(cells.files))))))

def network_input(images: Tensor, size, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, *size]: bicubic, antialiased, normalised as DINOv2's weights expect."""
    images = images.contiguous(memory_format=torch.channels_last)  # bytes in this order are resized 8 times as fast
    return normalise(F.interpolate(images, size, mode="bicubic", antialias=True), device, torch.float32)

@torch.inference_mode()
def extract_features(backbone: nn.Module, images, patch_tokens: bool = False, batch: int = 256):
    """Features float32 [B, D] of images: uint8 [B, 3, H, W], or a list of [H, W, 3] arrays of one size. patch_tokens:
    (class tokens [B, D], patch tokens [B, N, D]) instead; only vision transformers have them."""
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    parts = []
    for some in images.split(batch):
        x = network_input(some, (backbone.size, backbone.size), backbone.device)
        with torch.autocast(backbone.device.type, torch.float16, enabled=backbone.device.type == "cuda"):  # as DINOv2
            x = backbone.forward_features(x) if patch_tokens else (backbone(x),)
        parts.append([t.float().cpu() for t in x])
    tokens = tuple(torch.cat(p) for p in zip(*parts))
    return tokens if patch_tokens else tokens[0]

def embed(label: str, backbone: nn.Module, cells: Cells, crop: int, out, log) -> Tensor:
    """Features [n, D] of all cells. Kept in `out` under a name made of the content of weights, images, preprocessing:
    the next protocol costs seconds. UserError if they are not finite."""
    key = hashlib.sha256(f"{backbone.digest}{cells.digest}{crop} {backbone.size} {backbone.device.type}".encode())
    cache = out and Path(out, "features", key.hexdigest()[:32] + ".pt")
    if out and cache.exists():
        return torch.load(cache, weights_only=True)
    parts, done, began, told = [], 0, time.monotonic(), 10
    for crops in crops_of(cells, crop, backbone.size):
        parts.append(extract_features(backbone, crops))
        done, took = done + len(crops), time.monotonic() - began
        if took > told:
            told = took + 10
            log(f"{label}: {done:,} of {len(cells.file):,} cells, {took * (len(cells.file) / done - 1):.0f} s left")
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise UserError(f"--weights {label}: some features are infinite or not a number; did its training diverge?")
    log(f"{label}: {features.shape[1]} features of {done:,} cells in {time.monotonic() - began:.0f} s")
    if out:
        cache.parent.mkdir(exist_ok=True)
        write_aside(cache, features)
    return features

# ----------------------------------------------------------------------------------------------------------------------
# Classifiers on frozen features (and, to compare, on one that is not). All give probabilities [M, C].

def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, k=20, n_classes: int | None = None, temp=0.07) -> Tensor:
    """k nearest neighbours by cosine, each vote weighing exp(cosine / temp) as in DINO's evaluation: [N, D], int [N],
    [M, D] to the shares of the votes [M, C]."""
    n_classes = n_classes or int(train_y.max()) + 1
    train_x, shares = F.normalize(train_x, dim=1), []
    for some in F.normalize(test_x, dim=1).split(1024):  # so that the cosines take 4 KB per training cell, not 4 M
        cosine, nearest = product(some, train_x).topk(min(k, len(train_x)), dim=1)  # [m, k]
        votes = ((cosine - cosine[:, :1]) / temp).softmax(1)
        shares.append(votes.new_zeros(len(some), n_classes).scatter_add_(1, train_y[nearest], votes))
    return torch.cat(shares)

def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, l2=1e-2, n_classes: int | None = None) -> Tensor:
    """Multinomial logistic regression on standardised features, [N, D], int [N], [M, D] to probabilities [M, C] (0 for
    classes that training lacks): minimises mean cross-entropy + l2/2 |W|^2, the bias free; C = 1 / (l2 N).
    l2: a strength; or several, strongest first, for [len(l2), M, C]: each fit then starts from the one before, which
    takes a quarter to a third less time (five strengths, 14,838 cells, 96 and 128 features)."""
    n_classes, strengths = n_classes or int(train_y.max()) + 1, np.atleast_1d(l2).tolist()
    present, y = train_y.unique(return_inverse=True)
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)  # a constant feature stays about 0
    x, test_x = (train_x - mean) / std, (test_x - mean) / std
    # A ViT's features are so correlated that L-BFGS crawls. Along their principal axes, each scaled by the root of its
    # curvature (at most variance / 4, plus l2), it needs fewer passes for the same minimum (one core, Chula, 14,838
    # cells, l2 1e-4: 1.9 s against scikit-learn's 4.0 at 128 features, 8 against 27 at 768). Few cells, few axes.
    _, s, axes = torch.linalg.svd(x if len(x) < x.shape[1] else torch.linalg.qr(x, "r")[1], full_matrices=False)
    x, test_x, variance = x @ axes.T, test_x @ axes.T, s.square() / len(x)
    weight, bias = x.new_zeros(len(present), x.shape[1]), x.new_zeros(len(present), requires_grad=True)
    probabilities = x.new_zeros(len(strengths), len(test_x), n_classes)
    for i, strength in enumerate(strengths):
        scale = (variance / 4 + strength).rsqrt()
        scaled = (weight / scale).requires_grad_()
        optimizer = torch.optim.LBFGS([scaled, bias], max_iter=1000, history_size=50, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-6, tolerance_change=torch.finfo(x.dtype).eps)

        def loss(optimizer=optimizer, scale=scale, scaled=scaled, strength=strength):
            optimizer.zero_grad()
            weight = scale * scaled
            value = F.cross_entropy(product(x, weight, bias), y) + strength / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        weight = (scale * scaled).detach()
        probabilities[i][:, present] = product(test_x, weight, bias.detach()).softmax(1)
    return probabilities if np.ndim(l2) else probabilities[0]

def held_out(groups: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Which of the training cells [N] are for validation: a fifth of the groups; none if there is one group only."""
    return (group_folds(groups, labels, 5, seed) == 0) & (groups.min() < groups.max())

def tuned_probe(train_x, train_y, test_x, groups: np.ndarray, n_classes: int, seed: int = 0) -> Tensor:
    """linear_probe at the l2 with the best weighted F1 on a fifth of the training groups; the test has no say."""
    y = train_y.cpu().numpy()
    held, l2 = held_out(groups, y, seed), 1e-2
    if held.any():
        guesses = linear_probe(train_x[~held], train_y[~held], train_x[held], L2, n_classes).argmax(2).cpu().numpy()
        l2 = L2[np.argmax([scores(confusion(y[held], guess, n_classes))["weighted_f1"] for guess in guesses])]
    return linear_probe(train_x, train_y, test_x, l2, n_classes)

def fine_tune(backbone: nn.Module, crops: Tensor, cells: Cells, train: np.ndarray, test: np.ndarray, seed: int = 0,
              epochs: int = 30, lr: float = 5e-4, decay: float = 0.75, patience: int = 5, log=print) -> Tensor:
    """Train the whole backbone with a linear head on crops[train], uint8 [n, 3, side, side]; probabilities of
    crops[test] at the epoch with the best weighted F1 on a fifth of the training groups. Stops `patience` epochs later.
    Each block's lr is `decay` times that of the block above (as in BEiT's and MAE's fine-tuning): what is near the
    pixels is general and worth keeping. epochs and lr are a guess."""
    from torchvision.transforms import v2

    torch.manual_seed(seed)
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.ColorJitter(0.2, 0.2)])
    y, device, n_classes = torch.from_numpy(cells.label), backbone.device, len(cells.classes)
    held = held_out(cells.group[train], cells.label[train], seed)
    fit, check, best, waited, result = train[~held], train[held] if held.any() else train, -1.0, 0, None
    net = copy.deepcopy(backbone).requires_grad_(True)
    head = nn.Linear(extract_features(net, crops[:1]).shape[1], n_classes).to(device)
    top = len(getattr(net, "blocks", ())) + 1
    parameters = [{"params": head.parameters(), "lr": lr}]
    for name, p in net.named_parameters():  # layer 0 is the patch embedding, 1 the first block; a ResNet is one layer
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else top if name.startswith("norm") else 0
        parameters.append({"params": [p], "lr": lr * decay ** (top - layer)})
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # bfloat16, from Ampere on
    began = time.monotonic()
    while schedule.last_epoch < epochs and waited < patience:
        net.train()
        for some in torch.from_numpy(fit)[torch.randperm(len(fit))].split(64):
            x = network_input(torch.stack([*map(augment, crops[some])]), (net.size, net.size), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(head(net(x)).float(), y[some].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        net.eval()
        with torch.inference_mode():
            probs = [head(extract_features(net, crops[w]).to(device)).softmax(1).cpu() for w in (check, test)]
        score = scores(confusion(cells.label[check], probs[0].argmax(1).numpy(), n_classes))["weighted_f1"]
        best, waited, result = (score, 0, probs[1]) if score > best else (best, waited + 1, result)
        if schedule.last_epoch == 1:
            log(f"fine-tuning on {len(fit):,} cells: {epochs} epochs or fewer, {time.monotonic() - began:.0f} s each")
    return result

# ----------------------------------------------------------------------------------------------------------------------
# Splits and scores.

def group_folds(groups: np.ndarray, labels: np.ndarray, k: int = 5, seed: int = 0) -> np.ndarray:
    """A fold number 0..k-1 for each cell [n]: groups stay whole, classes are spread evenly. Largest group first, each
    goes where it adds least to the sum of squares of the folds' shares of the classes."""
    groups = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    share = counts / counts.sum(0).clip(1)  # [G, C]
    order = np.random.default_rng(seed).permutation(len(share))
    load, fold = np.zeros((min(k, len(share)), share.shape[1])), np.zeros(len(share), int)
    for g in order[np.argsort(-share[order].max(1), kind="stable")]:
        fold[g] = np.argmin(load @ share[g] + 1e-9 * load.sum(1))  # among equals the emptiest
        load[fold[g]] += share[g]
    return fold[groups]

def make_splits(cells: Cells, folds: int, seed: int, log=print) -> dict[str, list[tuple]]:
    """{name: [(training cells, test cells), ...]}: k folds or the CSV's own split; and each source left out in turn."""
    fold, splits = group_folds(cells.group, cells.label, folds, seed), {}
    tests = [(f"{fold.max() + 1} folds by {cells.by}", fold == f) for f in range(fold.max() + 1)]
    learn = ask = np.ones(len(fold), bool)
    if cells.split is not None:
        learn, ask = cells.split == "train", cells.split == "test"
        tests = [("the CSV's split", ask)]
    if len(cells.sources) > 1:
        tests += [("one source left out", cells.source == s) for s in range(len(cells.sources))]
    for name, part in tests:
        test, train = ask & part, learn & ~part
        both = train & (np.isin(cells.group, cells.group[test]) | np.isin(cells.image, cells.image[test]))
        if both.any():
            log(f"{name}: {both.sum()} cells are not trained on, as their image or group is tested")
        if (train & ~both).any() and test.any():
            splits.setdefault(name, []).append((np.flatnonzero(train & ~both), np.flatnonzero(test)))
    if not splits:
        raise UserError("no way of splitting leaves cells to train on and others to test on; add images")
    for name, parts in splits.items():
        if (n := len(np.unique(cells.group[np.concatenate([test for _, test in parts])]))) < 10:
            log(f"{name}: tests on {n} {cells.by}s only, too few for the intervals to be trusted")
    return splits

def confusion(truth: np.ndarray, guess: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts [true class, predicted class]."""
    return np.bincount(truth * n_classes + guess, minlength=n_classes**2).reshape(n_classes, n_classes)

def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of confusion matrices [..., C, C]; as in scikit-learn, classes that never occur do not count."""
    hit, true, called = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    recall = hit / np.where(true, true, np.nan)
    f1 = 2 * hit / np.where(true + called, true + called, np.nan)
    return {"accuracy": hit.sum(-1) / true.sum(-1), "balanced_accuracy": np.nanmean(recall, -1),
            "macro_f1": np.nanmean(f1, -1), "weighted_f1": np.nansum(f1 * true, -1) / true.sum(-1)}

def auroc(truth: np.ndarray, score: np.ndarray, weights=(1.0,)) -> np.ndarray:
    """The chance that a positive scores above a negative, ties counting half, for each of the weightings (of [n], or
    one number): [R]; NaN unless there are both."""
    level, found = np.unique(score, return_inverse=True)[1], []
    for weight in weights:
        positive, negative = np.bincount(level, weight * truth), np.bincount(level, weight * ~truth)
        pairs = positive.sum() * negative.sum()
        found.append(positive @ (negative.cumsum() - negative / 2) / pairs if pairs else math.nan)
    return np.array(found)

def bootstrap(n: int, seed: int) -> np.ndarray:
    """How often each of n groups counts, [1 + REPLICATES, n]: once; then as often as it comes up in n draws with
    replacement. The same seed draws the same groups for each backbone, so that their difference can be taken replicate
    by replicate. (What the intervals leave out: on other training cells the classifier would have been another.)"""
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(REPLICATES)]
    return np.stack([np.ones(n), *draws]).astype(np.float32)

def judge(truth: np.ndarray, probs: np.ndarray, group: np.ndarray, seed: int = 0) -> dict:
    """A result: what is to know about predictions [n, C], and "again": {metric: [1 + REPLICATES]}, as by bootstrap. A
    confusion matrix is a sum over groups, so that of a replicate is a weighted sum of theirs."""
    n_classes, guess, group = probs.shape[1], probs.argmax(1), np.unique(group, return_inverse=True)[1]
    counts = np.zeros((group.max() + 1, n_classes**2), np.float32)
    np.add.at(counts, (group, truth * n_classes + guess), 1)
    times, whole = bootstrap(len(counts), seed), confusion(truth, guess, n_classes)
    again = scores((times @ counts).astype(float).reshape(-1, n_classes, n_classes))
    if n_classes == 2 and whole.sum(1).all():
        again["auroc"] = auroc(truth == 1, probs[:, 1], (t[group] for t in times))
    recall = [hit / n if n else None for hit, n in zip(whole.diagonal().tolist(), whole.sum(1).tolist())]
    return {"cells": len(truth), "recall": recall, "confusion": whole.tolist(), "again": again}

# ----------------------------------------------------------------------------------------------------------------------
# Protocols.

def study_level(truth: np.ndarray, probs: np.ndarray, group: np.ndarray, seed: int) -> dict[str, dict]:
    """AUROC of whole studies (groups), scored by the mean or the maximum of their members' probabilities: results by
    name. A study is positive for a class if any member is; the mean over the classes that some studies have, some not.
    """
    study, results = np.unique(group, return_inverse=True)[1], {}
    has = np.zeros((study.max() + 1, probs.shape[1]), bool)
    has[study, truth] = True
    classes, times = np.flatnonzero(has.any(0) & ~has.all(0)), bootstrap(len(has), seed)
    if not len(classes):
        return {}
    members, probs = torch.from_numpy(study)[:, None].expand(probs.shape), torch.from_numpy(probs)
    for pool, how in (("mean", "mean"), ("maximum", "amax")):
        score = probs.new_zeros(has.shape).scatter_reduce(0, members, probs, how, include_self=False).numpy()
        each = np.stack([auroc(has[:, c], score[:, c], times) for c in classes])  # [classes, 1 + REPLICATES]
        mean = torch.from_numpy(each).nanmean(0).numpy()  # over the classes that a replicate has and lacks
        results[f"{pool} of a study"] = {"studies": len(has), "again": {"auroc": mean}}
    return results

def few_shot(x: Tensor, y: Tensor, cells: Cells, parts: list, shots: int, seed: int) -> dict:
    """Linear probes on `shots` random training cells a class, DRAWS times, each on the next fold: a result with their
    mean, and their standard deviation; {} where a class has fewer."""
    drawn, n_classes = [], len(cells.classes)
    for draw in range(DRAWS):
        train, test = parts[draw % len(parts)]
        train = np.random.default_rng([seed, draw]).permutation(train)
        chosen = np.concatenate([train[cells.label[train] == c][:shots] for c in range(n_classes)])
        if len(chosen) < shots * n_classes:
            return {}
        probs = linear_probe(x[chosen], y[chosen], x[test], FEWSHOT_L2, n_classes).cpu().numpy()
        drawn.append(judge(cells.label[test], probs, cells.group[test], seed + draw % len(parts))["again"])
    again = {k: np.stack([a[k] for a in drawn]) for k in drawn[0] if all(k in a for a in drawn)}  # [DRAWS, 1 + R]
    deviation = {k: v[:, 0].std(ddof=1) for k, v in again.items()}
    return {"shots": shots, "deviation": deviation, "again": {k: v.mean(0) for k, v in again.items()}}

def measure(x: Tensor, cells: Cells, parts: list, protocols, seed: int, tune=None, log=print) -> dict[str, dict]:
    """{protocol: result} of one backbone's features [n, D] on one way to split the cells; each test cell counts once.
    tune: (backbone, crops) to fine-tune it too."""
    y, n_classes, methods = torch.from_numpy(cells.label).to(x.device), len(cells.classes), {}
    if "knn" in protocols:
        methods |= {f"{k}-NN": lambda a, b, k=k: knn(x[a], y[a], x[b], k, n_classes) for k in (1, 20)}
    if "linear" in protocols:
        methods["linear probe"] = lambda a, b: tuned_probe(x[a], y[a], x[b], cells.group[a], n_classes, seed)
    if tune:
        methods["fine-tuned"] = lambda a, b: fine_tune(*tune, cells, a, b, seed, log=log)
    tested, results = np.concatenate([test for _, test in parts]), {}
    truth, group = cells.label[tested], cells.group[tested]
    for name, method in methods.items():
        probs = np.concatenate([method(train, test).cpu().numpy() for train, test in parts])
        results[name] = judge(truth, probs, group, seed)
        if cells.by == "group" and name != "1-NN":  # which has no probabilities to pool
            results |= {f"{name}, {pool}": row for pool, row in study_level(truth, probs, group, seed).items()}
    few = {f"few-shot, {n} a class": few_shot(x, y, cells, parts, n, seed) for n in SHOTS if "fewshot" in protocols}
    return results | {name: row for name, row in few.items() if row}

def knn_monitor(tables: list[str], crop: int, size: int, window=None):
    """A look at features during training (reddino.py --eval-data): reads each table's cells once; what it returns takes
    a backbone and its device, and gives the weighted F1 of 20-NN on each table, over the first of make_splits."""
    sets = []
    for table in tables:
        cells = read_cells(table, window=window)
        splits = next(iter(make_splits(cells, 5, 0, lambda text: None).values()))
        sets.append((cells, torch.cat(list(crops_of(cells, crop, size))), splits))

    def score(backbone: VisionTransformer, device: torch.device) -> list[float]:
        found, backbone = [], copy.deepcopy(backbone).float().eval()
        backbone.size, backbone.device = size, device
        for cells, crops, splits in sets:
            x, y, total = extract_features(backbone, crops), torch.from_numpy(cells.label), 0
            for train, test in splits:
                guess = knn(x[train], y[train], x[test], 20, len(cells.classes)).argmax(1).numpy()
                total = total + confusion(cells.label[test], guess, len(cells.classes))
            found.append(float(scores(total)["weighted_f1"]))
        return found

    return score

def compare(found: dict[str, dict], split: str) -> tuple[list, list]:
    """{backbone: {protocol: result}} to rows, with intervals, and to the differences of all pairs of backbones."""
    def interval(again): return np.nanpercentile(again[1:], [2.5, 97.5]).tolist()
    rows, pairs = [], []
    for protocol in dict.fromkeys(itertools.chain(*found.values())):
        place = {"protocol": protocol, "split": split}
        block = {label: dict(by[protocol]) for label, by in found.items() if protocol in by}
        again = {label: result.pop("again") for label, result in block.items()}
        for a, result in block.items():
            rows.append(place | {"weights": a} | {k: float(v[0]) for k, v in again[a].items()} | result
                        | {"interval": {k: interval(v) for k, v in again[a].items()}})
            gaps = [(b, k, again[a][k] - again[b][k]) for b in block if b != a for k in again[a]]
            pairs += [place | {"weights": a, "minus": b, "metric": k, "difference": float(gap[0]),
                               "interval": interval(gap)} for b, k, gap in gaps]
    return rows, pairs

def evaluate(data, weights, protocols=PROTOCOLS, crop=80, out=None, device="auto", size=None, seed=0, log=print,
             drop_labels=(), folds=5, finetune=False, figures=None, window=None) -> dict:
    """Score backbones on labelled cells; gives the table to `log`, returns what results.json holds. Options: as on the
    command line; weights may also be {name in the table: path or name}; out=None writes nothing. Raises UserError, and
    OSError where `out` or `figures` can't be written to, before any work."""
    if unknown := [p for p in protocols if p not in PROTOCOLS]:
        raise UserError(f"--protocols {unknown[0]}: choose from {', '.join(PROTOCOLS)}")
    if crop < 2 or folds < 2 or (size or 1) < 1:
        raise UserError("--crop and --folds have to be at least 2, and --size at least 1")
    check_window(window)
    if figures and not importlib.util.find_spec("matplotlib"):
        raise UserError("--figures needs matplotlib: pip install matplotlib")
    for folder in filter(None, (out, figures)):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can it be written to?
    weights = weights if isinstance(weights, dict) else {str(w): w for w in weights}
    backbones = dict.fromkeys(weights)
    for label, name in sorted(weights.items(), key=lambda item: str(item[1]) == "random"):  # `random` looks at others
        like = next((b for b in backbones.values() if isinstance(b, VisionTransformer)), None)
        backbones[label] = load_backbone(name, size, device, like, seed)

    cells = read_cells(str(data), drop_labels, window)
    if cells.skipped:
        log(f"{len(cells.skipped)} images can't be read and are left out, e.g. {BadImage(*min(cells.skipped.items()))}")
    features = {label: embed(label, backbone, cells, crop, out, log) for label, backbone in backbones.items()}
    for c, name in enumerate(cells.classes):
        if cells.split is None and len(set(cells.group[cells.label == c])) == 1:
            log(f"class {name!r} is in one {cells.by} only, so it is never both learnt and tested")
    crops = torch.cat(list(crops_of(cells, crop, 224))) if finetune else None  # 19 KB each at 80 pixels
    rows, pairs = [], []
    for split, parts in make_splits(cells, folds, seed, log).items():
        found = {}
        for label, backbone in backbones.items():
            began, x = time.monotonic(), features[label]
            x = x.to(backbone.device) if backbone.device.type == "cuda" else x
            tune = (backbone, crops) if finetune and backbone.state_dict() else None
            found[label] = measure(x, cells, parts, protocols, seed, tune, log)
            log(f"{label}: {split}, {time.monotonic() - began:.0f} s")
        rows, pairs = (a + b for a, b in zip((rows, pairs), compare(found, split)))
        protocols = [p for p in protocols if p != "fewshot"]  # whose draws are of the first split
    results = {"data": str(data), "crop": crop, "window": window, "seed": seed, "cells": len(cells.label),
               "images": len(cells.files), "groups": len(set(cells.group)), "classes": cells.classes,
               "sources": cells.sources, "skipped": cells.skipped, "rows": rows, "pairs": pairs}
    log(as_table(results, "\033[1m" if sys.stdout.isatty() else "", "\033[0m" if sys.stdout.isatty() else ""))
    if out:
        write_results(results, out)
    if figures:
        draw_figures(figures, results, features, backbones, cells, seed)
    return results

# ----------------------------------------------------------------------------------------------------------------------
# What a person sees.

def as_table(results: dict, bold: str, plain: str) -> str:
    """Markdown, a table for each protocol and split, its best line between `bold` and `plain`."""
    def text(value, ends): return f"{100 * value:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    page = f"\nIn %, with 95% intervals by groups; few-shot: mean of {DRAWS} draws, [its interval] ± their deviation.\n"
    gaps = {tuple(p[k] for k in ("protocol", "split", "metric", "weights", "minus")): p for p in results["pairs"]}
    for title in dict.fromkeys((row["protocol"], row["split"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["protocol"], row["split"]) == title]
        lead = "weighted_f1" if "weighted_f1" in rows[0] else "auroc"  # ranks, and shows how sure it is
        best, shown = max(rows, key=lambda row: row[lead])["weights"], [k for k in SCORES if k in rows[0]]
        table = [[", ".join(title), *(SCORES[k] for k in shown), "minus the best"], ["---"] * (2 + len(shown))]
        for row in rows:
            line = {k: f"{100 * row[k]:.1f}" for k in shown}
            line[lead] = text(row[lead], row["interval"][lead])
            if "deviation" in row:
                line[lead] += f" ± {100 * row['deviation'][lead]:.1f}"
            gap = gaps.get((*title, lead, row["weights"], best))
            table.append([row["weights"], *line.values(), text(gap["difference"], gap["interval"]) if gap else "best"])
        widths = [max(map(len, column)) for column in zip(*table)]
        for line in ["", *table]:
            start, end = (bold, plain) if line and line[0] == best else ("", "")
            cells = [start + cell + end + " " * (width - len(cell)) for cell, width in zip(line, widths)]
            page += f"| {' | '.join(cells)} |\n" if line else "\n"
    return page

def write_results(results: dict, out):
    """results.json: everything; results.csv: a line a row; results.md: the table; skipped.txt: what can't be read."""
    Path(out, "results.md").write_text(as_table(results, "**", "**"))
    Path(out, "skipped.txt").write_text("".join(f"{BadImage(*bad)}\n" for bad in results["skipped"].items()))
    Path(out, "results.json").write_text(json.dumps(results, indent=1))
    with open(os.path.join(out, "results.csv"), "w", newline="") as file:
        table, keys = csv.writer(file), ("protocol", "split", "weights", *SCORES)
        table.writerow([*keys, *(f"{k}_{end}" for k in SCORES for end in ("low", "high"))])
        for row in results["rows"]:
            table.writerow([row.get(k) for k in keys] + [v for k in SCORES for v in row["interval"].get(k, ("", ""))])

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000"]  # Okabe and Ito 2008
MARKS = list(zip("oXs*^PvD" * 7, COLOURS * 8))  # 56 different ones; where a colour comes back, its shape is far off

def draw_figures(folder, results: dict, features: dict, backbones: dict, cells: Cells, seed: int):
    """PNGs in `folder`: few-shot curves, and for each backbone its confusion matrix, maps of the cells, one smear."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend

    def draw(name, draw_on, *given):
        draw_on(figure := Figure(layout="constrained"), *given)
        figure.savefig(os.path.join(folder, re.sub(r"\W+", "_", name)[-100:] + ".png"), dpi=150)

    if any("shots" in row for row in results["rows"]):
        draw("few-shot", few_shot_curves, results["rows"], backbones)
    for label, backbone in backbones.items():
        if judged := [row for row in results["rows"] if row["weights"] == label and "confusion" in row]:
            draw(f"confusion {label}", confusion_matrix, judged[-1], cells.classes)
        draw(f"map {label}", maps, label, features[label].numpy(), cells, seed)
        if isinstance(backbone, VisionTransformer):
            path = cells.files[cells.file[0]]
            pictures = smear(backbone, read_image(path, window=cells.window), results["crop"])
            draw(f"smear {label}", panels, f"{label}: {os.path.basename(path)}", pictures)

def few_shot_curves(figure, rows: list[dict], labels):
    axes = figure.subplots()
    for label, (marker, colour) in zip(labels, MARKS):
        own = [(row["shots"], row["weighted_f1"], row["deviation"]["weighted_f1"])
               for row in rows if row["weights"] == label and "shots" in row]
        n, mean, deviation = np.array(own).T * [[1], [100], [100]]
        axes.semilogx(n, mean, label=label, marker=marker, color=colour)
        axes.fill_between(n, mean - deviation, mean + deviation, alpha=0.15, color=colour)
    axes.minorticks_off()
    axes.set(xticks=SHOTS, xticklabels=SHOTS, xlabel="labelled cells of each class", ylabel="weighted F1, %",
             title=f"Few-shot linear probe: mean and standard deviation of {DRAWS} draws")
    axes.legend()

def confusion_matrix(figure, row: dict, classes: list[str]):
    counts, side = np.array(row["confusion"]), 3 + 0.45 * len(classes)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    figure.set_size_inches(side + 0.5, side)
    axes = figure.subplots()
    shades = axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(shades, label="share of the true class (numbers: cells)", shrink=0.8)
    for (i, j), n in np.ndenumerate(counts):
        axes.text(j, i, n, ha="center", va="center", size=7, color="white" if share[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    figure.suptitle(f"{row['weights']}: {row['protocol']}, {row['split']}")

def maps(figure, label: str, x: np.ndarray, cells: Cells, seed: int):
    """Up to 3,000 cells in two dimensions: PCA, which keeps distances, and where scikit-learn is installed t-SNE, which
    keeps neighbours; coloured by class and, beside it, by source."""
    some = np.random.default_rng(seed).permutation(len(x))[:3000]
    ways, by = {"PCA": principal(x[some], 2)}, {"class": (cells.label, cells.classes)}
    if len(some) >= 50 and importlib.util.find_spec("sklearn"):
        from sklearn.manifold import TSNE
        ways["t-SNE"] = TSNE(random_state=seed).fit_transform(x[some])
    if cells.sources:
        by["source"] = (cells.source, cells.sources)
    figure.set_size_inches(8 * len(by), 6 * len(ways))
    grid = figure.subplots(len(ways), len(by), squeeze=False).flat
    for axes, ((way, xy), (what, (index, names))) in zip(grid, itertools.product(ways.items(), by.items())):
        for i, (name, (marker, colour)) in enumerate(zip(names, itertools.cycle(MARKS))):
            axes.scatter(*xy[index[some] == i].T, s=12, label=name, marker=marker, color=colour, linewidths=0)
        axes.set(title=f"{label}: {way} of {len(some):,} cells, by {what}", xticks=[], yticks=[])
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)

def panels(figure, title: str, pictures: dict[str, np.ndarray]):
    height, shape = math.ceil(len(pictures) / 2), next(iter(pictures.values())).shape
    figure.set_size_inches(11, 0.8 + 5.5 * height * shape[0] / shape[1])
    figure.suptitle(title)
    for i, (name, picture) in enumerate(pictures.items(), 1):
        axes = figure.add_subplot(height, 2, i, title=name, xticks=[], yticks=[])
        axes.imshow(picture, vmax=np.percentile(picture, 99))  # of attention, which a single patch may draw most of

def principal(x: np.ndarray, n: int) -> np.ndarray:
    """The first n principal components of [N, D], [N, n]."""
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return u[:, :n] * s[:n]

@torch.inference_mode()
def smear(backbone: VisionTransformer, image: np.ndarray, crop: int | None = None) -> dict[str, np.ndarray]:
    """Pictures by name: an image [H, W, 3] (at most 1,024 pixels of it: a slide would take hours), three principal
    components of its patch tokens as colours [h, w, 3], the last block's attention of the class token by head [h, w].
    crop: shrink it as far as squares of this side are shrunk where cells are scored."""
    image, patch, attention, seen = image[:1024, :1024], backbone.patch_size, backbone.blocks[-1].attn, []
    scale = min(1, backbone.size / (crop or backbone.size))  # cells as small as where they are scored, or as they are
    scale = max(scale, backbone.size / min(image.shape[:2]))
    rows, columns = (int(n * scale) // patch for n in image.shape[:2])
    x = network_input(torch.from_numpy(image).permute(2, 0, 1)[None], (rows * patch, columns * patch), backbone.device)
    with attention.qkv.register_forward_hook(lambda module, given, out: seen.append(out[0])):
        tokens = principal(backbone.forward_features(x)[1][0].cpu().numpy(), 3)
    q, k, _ = seen[0].unflatten(1, (3, attention.heads, -1)).permute(1, 2, 0, 3)  # [heads, N, D / heads]
    look = (q[:, :1] @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)[:, 0, -rows * columns:].cpu().numpy()
    low, high = np.percentile(tokens, [1, 99], axis=0)
    colours = ((tokens - low) / (high - low)).clip(0, 1).reshape(rows, columns, 3)
    return {"image": image, "patch tokens, PCA as RGB": colours} | {
        f"attention of head {i}, {100 * head.min():.2f} to {100 * head.max():.2f}% a patch": head.reshape(rows, columns)
        for i, head in enumerate(look, 1)}

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="a CSV or a folder of class folders")
    add("--weights", required=True, nargs="+", help="paths, names, random, pixels, colour")
    add("--protocols", nargs="+", default=PROTOCOLS, help=f"of {', '.join(PROTOCOLS)}; default: all that data allow")
    add("--crop", type=int, default=80, help="side of the square around a cell in pixels; default 80")
    add("--out", default="out/eval", help="folder for the results and the cache of features; default out/eval")
    add("--window", nargs=2, type=float, metavar=("LEVEL", "WIDTH"), help="what is seen of 16-bit grey, in its units")
    add("--size", type=int, help="the network's input in pixels; default: what it was trained at, at most 224")
    add("--drop-label", nargs="+", default=[], dest="drop_labels", metavar="LABEL", help="classes to leave out")
    add("--folds", type=int, default=5, help="default 5")
    add("--finetune", action="store_true", help="also train all of each backbone, once a fold")
    add("--figures", metavar="DIR", help="draw figures into DIR; needs matplotlib")
    add("--seed", type=int, default=0, help="of folds, draws and `random`; default 0")
    add("--device", default="auto", help="cuda, mps, cpu; default: the first that is there")
    parser.error = lambda message: parser.exit(2, f"eval.py: error: {message}\n")  # one line, without the usage
    try:
        evaluate(**vars(parser.parse_args(argv)), log=lambda text: print(text, flush=True))
    except (UserError, BadImage, OSError) as error:
        parser.error(error)

if __name__ == "__main__":
    main()
