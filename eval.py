"""How good is a backbone? Freeze it, describe every labelled cell by its class token, and ask simple classifiers.

    python eval.py --data cells.csv --weights out/backbone.pth random pixels colour --crop 80 --out out/eval
    python eval.py --data CLASS_FOLDERS --weights dinov2_vits14 resnet50 --protocols knn linear
    python eval.py --data cells.csv --weights a.pth b.pth --finetune --figures out/figures    # hours without a GPU

--data     a CSV `image,label` or `image,x,y,label` (a cell's centre in pixels: the square of --crop pixels around it),
           with optional columns `group` (patient, study), `source` (hospital, stain), `split` (train, test; other rows
           are left out); or a folder that holds one folder of images per class.
--weights  any number of: our checkpoints and backbone.pth; DINOv2's, RedDino's and timm's files; dinov2_vits14 and its
           sisters; resnet50 and torchvision's other classifiers; and what their scores have to be compared with:
           random   an untrained network of the first checkpoint's shape (or random:vits14, random:resnet50);
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from augment import MEAN, STD, BadImage, UserError, find_images, read_image
from reddino import VisionTransformer, build_vit, normalise, resize_pos_embed, write_aside

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
    image: np.ndarray  # cells with the same number are of one image: of files with the same content
    group: np.ndarray  # cells with the same number stay together: the CSV's groups, or the images
    by: str  # "group" or "image"
    source: np.ndarray | None = None  # index into sources
    sources: tuple[str, ...] = ()
    split: np.ndarray | None = None  # "train" or "test"
    digest: str = ""  # of all that the crops depend on

def csv_rows(path: str) -> list[dict]:
    """The rows of a CSV, each checked, with the CSV's folder before the image. UserError names the line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{**row, "line": reader.line_num} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data {path} can't be read as a CSV: {error}") from None
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

def file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else path
    except OSError:  # reported when its pixels are wanted
        return path

def read_cells(data: str, drop_labels=()) -> Cells:
    """The labelled cells of a CSV or of class folders; UserError for all that would make their scores meaningless."""
    if os.path.isdir(data):
        folders = sorted(e.name for e in os.scandir(data) if e.is_dir() and not e.name.startswith("."))
        rows = [{"image": f, "label": c} for c in folders for f in find_images(os.path.join(data, c))]
    else:
        rows = csv_rows(data)
    labels = sorted({r["label"] for r in rows})
    if unknown := set(drop_labels) - set(labels):
        raise UserError(f"--drop-label {min(unknown)}: the labels are {', '.join(labels)}")
    rows = [r for r in rows if r["label"] not in drop_labels and r.get("split", "test") in ("train", "test")]
    if len({r["label"] for r in rows}) < 2:
        raise UserError(f"--data {data}: {len(rows)} cells, not of two classes; give a CSV or FOLDER/CLASS/*.png")
    rows.sort(key=lambda r: r["image"])

    def column(name):  # its different values, and the index of each cell's
        values, index = np.unique([r[name] for r in rows], return_inverse=True) if name in rows[0] else ([], None)
        return [str(v) for v in values], index

    (classes, label), (files, file), (sources, source) = column("label"), column("image"), column("source")
    group, split = column("group")[1], np.array([r["split"] for r in rows]) if "split" in rows[0] else None
    if np.bincount(label).min() < 2:
        raise UserError(f"class {classes[np.bincount(label).argmin()]!r} has one cell, which can't be both learnt and "
                        "tested; label more of it or leave it out with --drop-label")
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, files))
    image = np.unique(digests, return_inverse=True)[1][file]  # under two names it is one (Chula has 18 such)
    by, group = ("image", image) if group is None else ("group", group)
    if len(np.unique(group if split is None else split)) < 2:
        raise UserError(f"--data {data}: all cells are of one {by if split is None else 'split'}; that can't be split")
    centre = np.array([(r["x"], r["y"]) for r in rows], float) if "x" in rows[0] else None
    if centre is not None and centre.max() <= 1:
        raise UserError(f"{data}: x and y look like fractions of the image's size; they have to be pixels")
    content = os.fsencode("".join(digests)) + file.tobytes() + (b"" if centre is None else centre.tobytes())
    return Cells(files, file, centre, label, classes, image, group, by, source, tuple(sources), split,
                 hashlib.sha256(content).hexdigest())

# ----------------------------------------------------------------------------------------------------------------------
# Weights: a backbone's state dict under DINOv2's names, from whatever layout it was published in. Everything is read
# with weights_only=True: a .pth is a pickle, and a hostile one would otherwise run its code here.

HUB = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth"  # 0: vits14 ...; 1: _reg4 or none

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
    except Exception as error:  # torch.load raises a different type for each way in which a file can be wrong
        unsafe = "Unsupported" in str(error) or "weights_only" in str(error)
        why = "refused: it holds more than tensors and plain values" if unsafe else "not a file that PyTorch can read"
        raise UserError(f"{path}: {why}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return loaded

def read_backbone(path_or_name: str) -> dict[str, Tensor]:
    """A backbone's state dict in DINOv2's names, from: our checkpoints and backbone.pth; DINOv2's .pth; RedDino's and
    DinoBloom's {"teacher": {"backbone.…"}}; timm's layout; or a name (dinov2_vits14, dinov2_vitb14_reg, ...), which
    is downloaded. Raises UserError for anything else."""
    name = re.fullmatch(r"dinov2_(vit[sblg]14)(_reg)?", str(path_or_name))
    if name and not Path(path_or_name).exists():
        url = HUB.format(name[1], "_reg4" if name[2] else "")
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{name[0]}: can't download {url} ({error}); fetch it elsewhere, pass its path") from None
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
    return from_timm(state)

def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names and shapes to DINOv2's; a state dict that has DINOv2's comes back as it is."""
    renames = {"reg_token": "register_tokens"}
    fc1, fc2 = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is not None and fc1.shape[0] == 2 * fc2.shape[1]:  # fc1 gives gate and value: timm's packed SwiGLU
        renames |= {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    for old, new in renames.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    pos = state["pos_embed"]
    if math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:  # timm adds the class token's position to the token itself
        state["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    return {k: v for k, v in state.items() if not k.startswith("head.")}

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

    UserError if it is another architecture's.
    """
    grid = vit.img_size // vit.patch_size
    state = dict(state)
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], grid, grid, state.get("register_tokens") is not None)
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
    from torchvision.models import get_model, list_models  # takes a second, which the training's demo need not wait for

    arch = name.removeprefix("random").removeprefix(":")
    if name in ("pixels", "colour"):
        return nn.Flatten() if name == "pixels" else Colour()
    if arch in list_models() and not os.path.exists(name):
        try:
            model = get_model(arch, weights="DEFAULT" if arch == name else None)  # trained on ImageNet
        except OSError as error:
            raise UserError(f"--weights {name}: torchvision can't download it ({error})") from None
        setattr(model, next(n for n in ("fc", "classifier", "heads", "head") if hasattr(model, n)), nn.Identity())
        return nn.Sequential(model, nn.Flatten())  # what its classifier would have seen, [B, D]
    if arch == name:
        return vit_from_state(read_backbone(name))
    # LayerScale 1: at DINOv2's 1e-5 class tokens of an untrained network are alike up to rounding, which is a straw man
    if arch or like is None:
        return build_vit(arch or "nano", 224 if arch else 64, layerscale=1.0)
    shape = like.img_size, like.patch_size, like.embed_dim, len(like.blocks), like.embed_dim // 64
    return VisionTransformer(*shape, swiglu=hasattr(like.blocks[0].mlp, "w12"), layerscale=1.0)

def load_backbone(name: str, size: int | None = None, device: str = "auto", like=None, seed: int = 0) -> nn.Module:
    """A frozen backbone by path or name (see --weights) that maps images [B, 3, size, size] to features [B, D], with
    .size, .device and .digest (of its weights). UserError if there is none. size: default what its positions were
    trained at, at most 224. like: a network whose shape `random` takes."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: there is none here") from None
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

def window(image: np.ndarray, left: int, top: int, side: int) -> Tensor:
    """A square of uint8 [H, W, 3] as [3, side, side]. Beyond the border the edge goes on: black would be a hint."""
    rows = (top + np.arange(side)).clip(0, image.shape[0] - 1)
    columns = (left + np.arange(side)).clip(0, image.shape[1] - 1)
    return torch.from_numpy(image[rows[:, None], columns]).permute(2, 0, 1)

def cut(path: str, centres: np.ndarray | None, crop: int, size: int) -> Tensor:
    """The cells of one file, uint8 [k, 3, crop, crop]; or all of the file in a square of `size`, its shape kept."""
    image = read_image(path)
    height, width = image.shape[:2]
    if centres is None:
        height, width = (max(1, round(n * size / max(image.shape))) for n in (height, width))
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        return window(image, (width - size) // 2, (height - size) // 2, size)[None]
    for x, y in centres:
        if not (0 <= x <= width and 0 <= y <= height):
            raise UserError(f"a cell at x={x:g}, y={y:g} is outside {path}, which has {width}x{height} pixels")
    return torch.stack([window(image, x, y, crop) for x, y in np.rint(centres).astype(int) - crop // 2])

def crops_of(cells: Cells, crop: int, size: int, skipped: dict):
    """Yields all cells in order, uint8 [b, 3, side, side], about 256 at a time. Those of files that can't be read are
    black; `skipped` gets {path: reason}."""
    def read(f):
        here = slice(*np.searchsorted(cells.file, (f, f + 1)))
        try:
            return cut(cells.files[f], None if cells.centre is None else cells.centre[here], crop, size)
        except BadImage as bad:
            skipped[bad.path] = bad.reason
            side = size if cells.centre is None else crop
            return torch.zeros(here.stop - here.start, 3, side, side, dtype=torch.uint8)

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

def embed(label: str, backbone: nn.Module, cells: Cells, crop: int, out, log) -> tuple[Tensor, dict]:
    """Features [n, D] of all cells, NaN where the file can't be read, and those files: {path: reason}. Kept in `out`
    under a name made of the content of weights, images and preprocessing: the next protocol costs seconds."""
    key = hashlib.sha256(f"{backbone.digest}{cells.digest}{crop} {backbone.size} {backbone.device.type}".encode())
    cache = out and os.path.join(out, "features", key.hexdigest()[:32] + ".pt")
    if out and os.path.exists(cache):
        return tuple(torch.load(cache, weights_only=True))
    parts, skipped, done, began, told = [], {}, 0, time.monotonic(), 10
    for crops in crops_of(cells, crop, backbone.size, skipped):
        parts.append(extract_features(backbone, crops))
        done, took = done + len(crops), time.monotonic() - began
        if took > told:
            told = took + 10
            log(f"{label}: {done:,} of {len(cells.file):,} cells, {took * (len(cells.file) / done - 1):.0f} s left")
    if len(skipped) > len(cells.files) / 2:
        raise UserError(f"{len(skipped)} of {len(cells.files)} images can't be read; {BadImage(*min(skipped.items()))}")
    features = torch.cat(parts)
    features[np.isin(np.array(cells.files)[cells.file], list(skipped))] = math.nan
    log(f"{label}: {features.shape[1]} features of {done:,} cells in {time.monotonic() - began:.0f} s")
    if out:
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        write_aside(Path(cache), [features, skipped])
    return features, skipped

# ----------------------------------------------------------------------------------------------------------------------
# Classifiers on frozen features (and, to compare, on one that is not). All give probabilities [M, C].

def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, k=20, n_classes: int | None = None, temp=0.07) -> Tensor:
    """k nearest neighbours by cosine, each vote weighing exp(cosine / temp) as in DINO's evaluation: [N, D], int [N],
    [M, D] to the shares of the votes [M, C]."""
    n_classes = n_classes or int(train_y.max()) + 1
    train_x, shares = F.normalize(train_x, dim=1), []
    for some in F.normalize(test_x, dim=1).split(1024):  # so that the cosines take 4 KB per training cell, not 4 M
        cosine, nearest = (some @ train_x.T).topk(min(k, len(train_x)), dim=1)  # [m, k]
        votes = ((cosine - cosine[:, :1]) / temp).softmax(1)
        shares.append(votes.new_zeros(len(some), n_classes).scatter_add_(1, train_y[nearest], votes))
    return torch.cat(shares)

def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, l2=1e-2, n_classes: int | None = None) -> Tensor:
    """Multinomial logistic regression on standardised features, [N, D], int [N], [M, D] to probabilities [M, C] (0 for
    classes that training lacks): minimises mean cross-entropy + l2/2 |W|^2, the bias free; C = 1 / (l2 N).
    l2: a strength; or several, strongest first, for [len(l2), M, C]: each fit then starts from the one before."""
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
    weight, bias = x.new_zeros(x.shape[1], len(present)), x.new_zeros(len(present), requires_grad=True)
    probabilities = x.new_zeros(len(strengths), len(test_x), n_classes)
    for i, strength in enumerate(strengths):
        scale = (variance / 4 + strength).rsqrt()[:, None]
        scaled = (weight / scale).requires_grad_()
        optimizer = torch.optim.LBFGS([scaled, bias], max_iter=1000, history_size=50, line_search_fn="strong_wolfe",
                                      tolerance_grad=3e-5, tolerance_change=1e-9)

        def loss(optimizer=optimizer, scale=scale, scaled=scaled, strength=strength):
            optimizer.zero_grad()
            value = F.cross_entropy(x @ (scale * scaled) + bias, y) + strength / 2 * (scale * scaled).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        weight = (scale * scaled).detach()
        probabilities[i][:, present] = (test_x @ weight + bias.detach()).softmax(1)
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
              epochs: int = 30, lr: float = 5e-4, decay: float = 0.75, patience: int = 5) -> Tensor:
    """Train the whole backbone with a linear head on crops[train], uint8 [n, 3, side, side]; probabilities of
    crops[test] at the epoch with the best weighted F1 on a fifth of the training groups. Stops `patience` epochs later.
    Each block's lr is `decay` times that of the block above (as in BEiT's and MAE's fine-tuning): what is near the
    pixels is general and worth keeping. epochs and lr are a guess."""
    torch.manual_seed(seed)
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
    while schedule.last_epoch < epochs and waited < patience:
        net.train()
        for some in torch.from_numpy(fit)[torch.randperm(len(fit))].split(64):
            x = network_input(crops[some], (net.size, net.size), device)
            random = torch.rand(5, len(x), 1, 1, 1, device=device)
            for r, turned in zip(random, (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.transpose(2, 3))):
                x = torch.where(r < 0.5, turned(x), x)  # a cell has no up
            x = x * (0.8 + 0.4 * random[3]) + 0.4 * (random[4] - 0.5)  # contrast and light
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

def make_splits(cells: Cells, readable: np.ndarray, folds: int, seed: int, log=print) -> dict[str, list[tuple]]:
    """{name: [(training cells, test cells), ...]}: k folds or the CSV's own split; and each source left out in turn."""
    fold, splits = group_folds(cells.group, cells.label, folds, seed), {}
    tests = [(f"{fold.max() + 1} folds by {cells.by}", fold == f) for f in range(fold.max() + 1)]
    learn = ask = readable
    if cells.split is not None:
        learn, ask = readable & (cells.split == "train"), readable & (cells.split == "test")
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

def auroc(truth: np.ndarray, score: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN unless there are both."""
    level = np.unique(score, return_inverse=True)[1]
    positive, negative = np.bincount(level, weight * truth), np.bincount(level, weight * ~truth)
    pairs = positive.sum() * negative.sum()
    return float(positive @ (negative.cumsum() - negative / 2) / pairs) if pairs else math.nan

def bootstrap(n: int, seed: int) -> np.ndarray:
    """How often each of n groups is drawn, [REPLICATES, n]: as many as there are, with replacement. The same seed draws
    the same groups for each backbone, so that their difference can be taken replicate by replicate. (What the intervals
    leave out: on other training cells the classifier would have been another.)"""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float32) for _ in range(REPLICATES)])

def judge(truth: np.ndarray, probs: np.ndarray, group: np.ndarray, seed: int = 0) -> dict:
    """Metrics of predictions [n, C], the confusion matrix, and replicates of the metrics in "again": {metric: [R]}. A
    confusion matrix is a sum over groups, so that of a replicate is a weighted sum of theirs."""
    n_classes, guess, group = probs.shape[1], probs.argmax(1), np.unique(group, return_inverse=True)[1]
    counts = np.zeros((group.max() + 1, n_classes**2), np.float32)
    np.add.at(counts, (group, truth * n_classes + guess), 1)
    times, whole = bootstrap(len(counts), seed), confusion(truth, guess, n_classes)
    value, again = scores(whole), scores((times @ counts).reshape(-1, n_classes, n_classes))
    if n_classes == 2:
        value["auroc"] = auroc(truth == 1, probs[:, 1])
        again["auroc"] = np.array([auroc(truth == 1, probs[:, 1], t[group]) for t in times])
    recall = (whole.diagonal() / whole.sum(1).clip(1)).tolist()
    return {**value, "cells": len(truth), "recall": recall, "confusion": whole.tolist(), "again": again}

# ----------------------------------------------------------------------------------------------------------------------
# Protocols. A result is a row of results.json: metrics by name, and in "again" their replicates.

def study_level(truth: np.ndarray, probs: np.ndarray, group: np.ndarray, seed: int) -> dict[str, dict]:
    """AUROC of whole studies (groups), scored by the mean or the maximum of their members' probabilities. A study is
    positive for a class if any member is; the AUROC is the mean over the classes that some studies have, some not."""
    study, rows = np.unique(group, return_inverse=True)[1], {}
    has, highest, total = (np.zeros((study.max() + 1, probs.shape[1])) for _ in range(3))
    has[study, truth] = 1
    np.maximum.at(highest, study, probs)
    np.add.at(total, study, probs)
    times = np.vstack([np.ones(len(has)), bootstrap(len(has), seed)])
    classes = np.flatnonzero(has.any(0) & ~has.all(0))
    for pool, score in (("mean", total / np.bincount(study)[:, None]), ("maximum", highest)) if len(classes) else ():
        auc = np.array([[auroc(has[:, c] > 0, score[:, c], t) for c in classes] for t in times])  # [1 + R, classes]
        auc = np.nansum(auc, 1) / np.where(known := (~np.isnan(auc)).sum(1), known, np.nan)
        rows[f"{pool} of a study"] = {"auroc": float(auc[0]), "studies": len(has), "again": {"auroc": auc[1:]}}
    return rows

def few_shot(x: Tensor, y: Tensor, cells: Cells, parts: list, shots: int, seed: int) -> dict:
    """Linear probes on `shots` random training cells a class, DRAWS times; {} where a class has fewer."""
    draws, n_classes = [], len(cells.classes)
    for draw in range(DRAWS):
        train, test = parts[draw % len(parts)]
        train = np.random.default_rng([seed, draw]).permutation(train)
        chosen = np.concatenate([train[cells.label[train] == c][:shots] for c in range(n_classes)])
        if len(chosen) < shots * n_classes:
            return {}
        guess = linear_probe(x[chosen], y[chosen], x[test], FEWSHOT_L2).argmax(1).cpu().numpy()
        draws.append(scores(confusion(cells.label[test], guess, n_classes)))
    again = {k: np.array([d[k] for d in draws]) for k in draws[0]}
    deviation = {k: v.std(ddof=1) for k, v in again.items()}
    return {k: v.mean() for k, v in again.items()} | {"shots": shots, "deviation": deviation, "again": again}

def measure(x: Tensor, cells: Cells, parts: list, protocols, seed: int, tune=None) -> dict[str, dict]:
    """{protocol: result} of one backbone's features [n, D] on one way to split the cells; each test cell counts once.
    tune: (backbone, crops) to fine-tune it too."""
    y, n_classes, methods = torch.from_numpy(cells.label).to(x.device), len(cells.classes), {}
    if "knn" in protocols:
        methods |= {f"{k}-NN": lambda a, b, k=k: knn(x[a], y[a], x[b], k, n_classes) for k in (1, 20)}
    if "linear" in protocols:
        methods["linear probe"] = lambda a, b: tuned_probe(x[a], y[a], x[b], cells.group[a], n_classes, seed)
    if tune:
        methods["fine-tuned"] = lambda a, b: fine_tune(*tune, cells, a, b, seed)
    tested, results = np.concatenate([test for _, test in parts]), {}
    truth, group = cells.label[tested], cells.group[tested]
    for name, method in methods.items():
        probs = np.concatenate([method(train, test).cpu().numpy() for train, test in parts])
        by_source = {}
        results[name] = judge(truth, probs, group, seed) | {"by_source": by_source}
        for s in np.unique(cells.source[tested]) if cells.sources else ():
            here = cells.source[tested] == s
            by_source[cells.sources[s]] = scores(confusion(truth[here], probs[here].argmax(1), n_classes))
        if cells.by == "group" and name != "1-NN":  # which has no probabilities to pool
            results |= {f"{name}, {pool}": row for pool, row in study_level(truth, probs, group, seed).items()}
    few = {f"few-shot, {n} a class": few_shot(x, y, cells, parts, n, seed) for n in SHOTS if "fewshot" in protocols}
    return results | {name: row for name, row in few.items() if row}

def compare(found: dict[str, dict], split: str) -> tuple[list, list]:
    """{backbone: {protocol: result}} to rows, with intervals, and to the differences of all pairs of backbones."""
    def interval(replicates): return np.nanpercentile(replicates, [2.5, 97.5]).tolist()
    rows, pairs = [], []
    for protocol in dict.fromkeys(itertools.chain(*found.values())):
        block = {label: by[protocol] for label, by in found.items() if protocol in by}
        place, again = {"protocol": protocol, "split": split}, {label: row.pop("again") for label, row in block.items()}
        for a, row in block.items():
            rows.append(place | {"weights": a} | row | {"interval": {k: interval(v) for k, v in again[a].items()}})
            pairs += [place | {"weights": a, "minus": b, "metric": k, "difference": row[k] - block[b][k],
                               "interval": interval(v - again[b][k])}
                      for b in block if b != a for k, v in again[a].items()]
    return rows, pairs

def evaluate(data, weights, protocols=PROTOCOLS, crop=80, out=None, device="auto", size=None, seed=0, log=print,
             drop_labels=(), folds=5, finetune=False, figures=None) -> dict:
    """Score backbones on labelled cells; gives the table to `log`, returns what results.json holds. Options: as on the
    command line; weights may also be {name in the table: path or name}; out=None writes nothing. Raises UserError, and
    OSError where `out` or `figures` can't be written to, before any work."""
    if unknown := [p for p in protocols if p not in PROTOCOLS]:
        raise UserError(f"--protocols {unknown[0]}: choose from {', '.join(PROTOCOLS)}")
    if crop < 2 or folds < 2 or (size or 1) < 1:
        raise UserError("--crop and --folds have to be at least 2, and --size at least 1")
    if figures and not importlib.util.find_spec("matplotlib"):
        raise UserError("--figures needs matplotlib: pip install matplotlib")
    for folder in filter(None, (out, figures)):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can it be written to?
    cells = read_cells(str(data), drop_labels)
    weights = weights if isinstance(weights, dict) else {str(w): w for w in weights}
    backbones = dict.fromkeys(weights)
    for label, name in sorted(weights.items(), key=lambda item: str(item[1]) == "random"):  # `random` looks at others
        like = next((b for b in backbones.values() if hasattr(b, "blocks")), None)
        backbones[label] = load_backbone(name, size, device, like, seed)

    features, skipped = {}, {}
    for label, backbone in backbones.items():
        features[label], bad = embed(label, backbone, cells, crop, out, log)
        skipped |= bad
    readable = ~features[label][:, 0].isnan().numpy()
    if skipped:
        log(f"{len(skipped)} of {len(cells.files)} images can't be read, e.g. {BadImage(*min(skipped.items()))}")
    for c, name in enumerate(cells.classes):
        if cells.split is None and len(set(cells.group[cells.label == c])) == 1:
            log(f"class {name!r} is in one {cells.by} only, so it is never both learnt and tested")
    crops = torch.cat(list(crops_of(cells, crop, 224, {}))) if finetune else None  # 19 KB each at 80 pixels
    rows, pairs = [], []
    for split, parts in make_splits(cells, readable, folds, seed, log).items():
        found = {}
        for label, backbone in backbones.items():
            began, x = time.monotonic(), features[label]
            x = x.to(backbone.device) if backbone.device.type == "cuda" else x
            tune = (backbone, crops) if finetune and backbone.state_dict() else None
            found[label] = measure(x, cells, parts, protocols, seed, tune)
            log(f"{label}: {split}, {time.monotonic() - began:.0f} s")
        rows, pairs = (a + b for a, b in zip((rows, pairs), compare(found, split)))
        protocols = [p for p in protocols if p != "fewshot"]  # whose draws are of the first split
    results = {"data": str(data), "crop": crop, "seed": seed, "cells": int(readable.sum()), "images": len(cells.files),
               "groups": len(set(cells.group)), "classes": cells.classes, "sources": cells.sources, "skipped": skipped,
               "rows": rows, "pairs": pairs}
    log(as_table(results, "\033[1m" if sys.stdout.isatty() else "", "\033[0m" if sys.stdout.isatty() else ""))
    if out:
        write_results(results, out)
    if figures:
        draw_figures(figures, results, features, backbones, cells)
    return results

# ----------------------------------------------------------------------------------------------------------------------
# What a person sees.

def as_table(results: dict, bold: str, plain: str) -> str:
    """Markdown, a table for each protocol and split, its best line between `bold` and `plain`."""
    def text(value, ends): return f"{100 * value:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    page = f"\nIn %, with 95% intervals by groups; few-shot: mean ± standard deviation over {DRAWS} draws.\n"
    pairs = {tuple(p[k] for k in ("protocol", "split", "metric", "weights", "minus")): p for p in results["pairs"]}
    for title in dict.fromkeys((row["protocol"], row["split"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["protocol"], row["split"]) == title]
        lead = "weighted_f1" if "weighted_f1" in rows[0] else "auroc"  # ranks, and shows how sure it is
        best, shown = max(rows, key=lambda row: row[lead]), [k for k in SCORES if k in rows[0]]
        table = [[", ".join(title), *(SCORES[k] for k in shown), "minus the best"], ["---"] * (2 + len(shown))]
        for row in rows:
            line = {k: f"{100 * row[k]:.1f}" for k in shown}
            gap = pairs.get((*title, lead, row["weights"], best["weights"]))
            spread = f"{line[lead]} ± {100 * row['deviation'][lead]:.1f}" if "deviation" in row else ""
            line[lead] = spread or text(row[lead], row["interval"][lead])
            table.append([row["weights"], *line.values(), text(gap["difference"], gap["interval"]) if gap else ""])
        widths = [max(map(len, column)) for column in zip(*table)]
        table = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in table]
        line = table[2 + rows.index(best)]
        line[:-1] = [(bold + cell.rstrip() + plain).ljust(len(bold + cell + plain)) for cell in line[:-1]]
        page += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)
    return page

def write_results(results: dict, out):
    """results.json: everything; results.csv: a line a row; results.md: the table; skipped.txt: what can't be read."""
    Path(out, "results.md").write_text(as_table(results, "**", "**"))
    Path(out, "results.json").write_text(json.dumps(results, indent=1))
    Path(out, "skipped.txt").write_text("".join(f"{BadImage(*bad)}\n" for bad in results["skipped"].items()))
    with open(os.path.join(out, "results.csv"), "w", newline="") as file:
        table, keys = csv.writer(file), ("protocol", "split", "weights", *SCORES)
        table.writerow([*keys, *(f"{k}_{end}" for k in SCORES for end in ("low", "high"))])
        for row in results["rows"]:
            table.writerow([row.get(k) for k in keys] + [v for k in SCORES for v in row["interval"].get(k, ("", ""))])

def principal(x: np.ndarray, n: int) -> np.ndarray:
    """The first n principal components of [N, D], [N, n]."""
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return u[:, :n] * s[:n]

def neighbour_map(x: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """A second map of [N, D], which keeps neighbours together where PCA keeps distances: {name: [N, 2]} by umap-learn
    or else scikit-learn, {} where neither is installed or there are too few points."""
    if len(x) < 50:
        return {}
    if importlib.util.find_spec("umap"):
        from umap import UMAP
        return {"UMAP": UMAP(random_state=seed, n_jobs=1).fit_transform(x)}
    if importlib.util.find_spec("sklearn"):
        from sklearn.manifold import TSNE
        return {"t-SNE": TSNE(random_state=seed).fit_transform(x)}
    return {}

def draw_figures(folder, results: dict, features: dict, backbones: dict, cells: Cells, seed: int = 0):
    """PNGs in `folder`: few-shot curves, and for each backbone its confusion matrix, maps of the cells, one smear."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def save(name, **settings):
        plt.gca().set(**settings)
        plt.savefig(os.path.join(folder, re.sub(r"\W+", "_", name) + ".png"), dpi=150, bbox_inches="tight")
        plt.close()

    styles = [{"marker": m, "color": f"C{i}"} for i, m in enumerate("osD^vX*Pph")]
    for style, label in zip(itertools.cycle(styles), backbones):
        rows = [row for row in results["rows"] if row["weights"] == label and "shots" in row]
        n, mean, deviation = np.array([(row["shots"], 100 * row["weighted_f1"], 100 * row["deviation"]["weighted_f1"])
                                       for row in rows]).reshape(-1, 3).T
        plt.semilogx(n, mean, label=label, **style)
        plt.fill_between(n, mean - deviation, mean + deviation, alpha=0.15)
    plt.legend()
    save("few-shot", xticks=SHOTS, xticklabels=SHOTS, xlabel="labelled cells a class", ylabel="weighted F1, %",
         title=f"Few-shot linear probe: mean ± standard deviation of {DRAWS} draws")
    for label, backbone in backbones.items():
        for row in [row for row in results["rows"] if row["weights"] == label and "confusion" in row][-1:]:
            counts, ticks = np.array(row["confusion"]), range(len(cells.classes))
            share = counts / counts.sum(1, keepdims=True).clip(1)
            plt.matshow(share, cmap="Greys", vmin=0, vmax=1)
            plt.colorbar(label="share of the true class")
            for (i, j), n in np.ndenumerate(counts):
                plt.text(j, i, n, ha="center", va="center", size=6, color="white" if share[i, j] > 0.5 else "black")
            plt.xticks(ticks, cells.classes, rotation=90)
            plt.yticks(ticks, cells.classes)
            save(f"confusion {label}", xlabel="predicted", ylabel="true",
                 title=f"{label}: {row['protocol']}, {row['split']}")
        some = np.random.default_rng(seed).permutation(np.flatnonzero(~features[label][:, 0].isnan()))[:3000]
        x, maps = features[label].numpy()[some], [("class", cells.label, cells.classes)]
        maps += [("source", cells.source, cells.sources)] if cells.sources else []
        ways = {"PCA": principal(x, 2)} | neighbour_map(x, seed)
        axes = plt.subplots(len(ways), len(maps), figsize=(7 * len(maps), 6 * len(ways)), squeeze=False)[1]
        for (row, (way, xy)), (column, (what, index, names)) in itertools.product(enumerate(ways.items()),
                                                                                  enumerate(maps)):
            for style, (i, name) in zip(itertools.cycle(styles), enumerate(names)):
                axes[row, column].scatter(*xy[index[some] == i].T, s=9, label=name, **style)
            axes[row, column].set(title=f"{label}: {way} of {len(some)} cells, by {what}", xticks=[], yticks=[])
            axes[row, column].legend(fontsize=7, markerscale=2)
        save(f"map {label}")
        if hasattr(backbone, "blocks"):
            panels = smear_panels(backbone, read_image(cells.files[cells.file[some.min()]]))
            height = math.ceil(len(panels) / 3)
            plt.figure(figsize=(15, 4 * height))
            for i, (title, panel) in enumerate(panels.items(), 1):
                plt.subplot(height, 3, i, title=title, xticks=[], yticks=[]).imshow(panel)
            plt.suptitle(label)
            save(f"smear {label}")

@torch.inference_mode()
def smear_panels(backbone: nn.Module, image: np.ndarray) -> dict[str, np.ndarray]:
    """A smear [H, W, 3], three principal components of its patch tokens as red, green and blue, and the
    attention of the class token in the last block, head by head: pictures by title."""
    patch, attention, seen = backbone.patch_size, backbone.blocks[-1].attn, []
    scale = max(1, backbone.size / min(image.shape[:2]))  # as it is, if it is large enough: so it was in training
    rows, columns = (int(n * scale) // patch for n in image.shape[:2])
    x = network_input(torch.from_numpy(image).permute(2, 0, 1)[None], (rows * patch, columns * patch), backbone.device)
    with attention.qkv.register_forward_hook(lambda module, given, out: seen.append(out[0])):
        tokens = principal(backbone.forward_features(x)[1][0].cpu().numpy(), 3)
    q, k, _ = seen[0].unflatten(1, (3, attention.heads, -1)).permute(1, 2, 0, 3)  # [heads, N, D / heads]
    look = (q[:, :1] @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)[:, 0, -rows * columns:].cpu().numpy()
    low, high = np.percentile(tokens, [1, 99], axis=0)
    colours = ((tokens - low) / (high - low)).clip(0, 1).reshape(rows, columns, 3)
    return {"smear": image, "patch tokens, PCA": colours} | {
        f"class token's attention, head {i}": head.reshape(rows, columns) for i, head in enumerate(look)}

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="a CSV or a folder of class folders")
    add("--weights", required=True, nargs="+", help="paths, names, random, pixels, colour")
    add("--protocols", nargs="+", default=PROTOCOLS, help=f"of {', '.join(PROTOCOLS)}; default: all that data allow")
    add("--crop", type=int, default=80, help="side of the square around a cell in pixels; default 80")
    add("--out", default="out/eval", help="folder for the results and the cache of features; default out/eval")
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
    except (UserError, OSError) as error:
        parser.error(error)

if __name__ == "__main__":
    main()
