"""How good is a backbone? Freeze it, describe every labelled cell by its class token, and ask simple classifiers.

    python eval.py --data cells.csv --weights out/backbone.pth random pixels colour --crop 80 --out out/eval
    python eval.py --data CLASS_FOLDERS --weights dinov2_vits14 resnet50 --protocols knn linear
    python eval.py --data cells.csv --weights a.pth b.pth --finetune --figures out/figures    # hours without a GPU

--data     a CSV `image,label` or `image,x,y,label` (a cell's centre in pixels: a square of --crop pixels around it) with
           optional columns `group` (patient, study), `source` (hospital, stain), `split` (train, test; other rows are
           left out); or a folder that holds one folder of images per class.
--weights  any number of: our checkpoints and backbone.pth; DINOv2's, RedDino's and timm's files; dinov2_vits14 and its
           sisters; resnet50 and torchvision's other classifiers; and what their scores have to be compared with:
           random   an untrained network, of the first checkpoint's shape (or random:vits14, random:resnet50);
           pixels   the crop itself, 16 x 16;
           colour   its histogram. A backbone that scores like this one is a detector of stains.

Why frozen features: a small classifier can only use what is there, so the score is the backbone's own, in seconds. Why
groups: cells of one smear share stain, focus and patient, and a classifier that trained on some of them recognises the
smear. So a group (an image, if no column says more) is never on both sides; and as its cells also err together, the 95%
intervals come from drawing groups, not cells, anew. Leave-one-source-out asks what a laboratory asks: does it work on
our microscope? Results: a table here, and results.json, results.csv and results.md in --out.
"""

import argparse
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import MEAN, STD, BadImage, UserError, find_images, read_image
from reddino import build_vit, read_backbone, vit_from_state

PROTOCOLS = ("knn", "linear", "fewshot")
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strengths that the linear probe chooses from, strongest first
SHOTS, DRAWS, FEWSHOT_L2 = (1, 5, 10, 50), 20, 1e-1
REPLICATES = 1000  # of the bootstrap: the ends of an interval are then good to about a tenth of its length
PIXELS, BINS = 16, 32  # side of the `pixels` baseline; bins a channel of the `colour` baseline

# ----------------------------------------------------------------------------------------------------------------------
# Labels. Whatever the layout, the cells end as parallel arrays, sorted by image, so that each image is decoded once.


@dataclass
class Cells:
    files: list[str]  # the images; what follows has one entry per cell, [n]
    file: np.ndarray  # index into files, ascending
    centre: np.ndarray | None  # [n, 2] x, y in pixels; None: an image is a cell
    label: np.ndarray  # index into classes
    classes: list[str]
    group: np.ndarray  # cells with the same number must stay together
    by: str  # what a group is: "image", or "group" where the CSV says
    source: np.ndarray | None  # index into sources
    sources: list[str]
    split: np.ndarray | None  # "train" or "test"
    digest: str  # of everything that the crops depend on


def csv_rows(path: str) -> list[dict]:
    """The rows of a CSV, each checked, images with their folder in front. UserError names the line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data {path} can't be read as a CSV: {error}") from None
    columns = [c for c in ("image", "x", "y", "label", "group", "source", "split") if c in (reader.fieldnames or ())]
    place = {"x", "y"} & set(columns)
    if missing := {"image", "label", *(place and "xy")} - set(columns):
        raise UserError(f"{path} has no column {' or '.join(sorted(missing))}; needed: image,x,y,label[,group][,source]")
    rows = []
    for line, row in lines:
        row = {c: (row[c] or "").strip() for c in columns}
        if empty := [c for c in columns if not row[c]]:
            raise UserError(f"{path}, line {line}: {empty[0]} is empty")
        for c in place:
            try:
                row[c] = float(row[c])
            except ValueError:
                row[c] = math.nan
            if not math.isfinite(row[c]):
                raise UserError(f"{path}, line {line}: {c} is not a number of pixels")
        rows.append({**row, "image": os.path.join(os.path.dirname(path), row["image"])})
    if rows and place and max(max(r["x"], r["y"]) for r in rows) <= 1:
        raise UserError(f"{path}: x and y look like fractions of the image's size; they have to be pixels")
    if unknown := [f for f in dict.fromkeys(r["image"] for r in rows) if not os.path.lexists(f)]:
        raise UserError(f"{path} names {unknown[0]}, which is not there (paths start at the CSV's folder)")
    return rows


def folder_rows(folder: str) -> list[dict]:
    """One row for each image of FOLDER/CLASS/**."""
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    rows = [{"image": f, "label": c} for c in classes for f in find_images(os.path.join(folder, c))]
    if not rows:
        raise UserError(f"--data {folder}: no class folders with images in it; give FOLDER/CLASS/*.png, or a CSV")
    return rows


def file_digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # reported when its pixels are wanted
        return hashlib.sha256(os.fsencode(path)).hexdigest()


def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One number for all that share a value of `a` or a value of `b`, also by way of others: connected components."""
    label, before = a, None
    while before is None or (label != before).any():
        before = label
        for key in (a, b):
            lowest = np.full(key.max() + 1, label.max())
            np.minimum.at(lowest, key, label)
            label = lowest[key]
    return np.unique(label, return_inverse=True)[1]


def read_cells(data: str, drop_labels=()) -> Cells:
    """The labelled cells of a CSV or of class folders; UserError for all that would make their scores meaningless."""
    if not os.path.exists(data):
        raise UserError(f"--data {data}: no such file or folder")
    rows = folder_rows(data) if os.path.isdir(data) else csv_rows(data)
    if unknown := set(drop_labels) - {r["label"] for r in rows}:
        raise UserError(f"--drop-label {min(unknown)}: the labels are {', '.join(sorted({r['label'] for r in rows}))}")
    rows = [r for r in rows if r["label"] not in drop_labels and r.get("split", "test") in ("train", "test")]
    rows.sort(key=lambda r: r["image"])

    def column(name):  # the different values, and the index of each cell's
        here = rows and name in rows[0]
        values, index = np.unique([r[name] for r in rows], return_inverse=True) if here else ([], None)
        return [str(v) for v in values], index

    (classes, label), (files, file), (sources, source) = column("label"), column("image"), column("source")
    if len(classes) < 2:
        raise UserError(f"--data {data}: {len(rows)} cells of {len(classes)} classes; at least two classes are needed")
    if np.bincount(label).min() < 2:
        raise UserError(f"class {classes[np.bincount(label).argmin()]!r} has one cell, which can't be both learnt and "
                        "tested; label more of it or leave it out with --drop-label")  # fmt: skip
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, files))
    group = np.unique(digests, return_inverse=True)[1][file]  # the same image under two names is one image
    group = joined(column("group")[1], group) if "group" in rows[0] else group
    split = np.array([r["split"] for r in rows]) if "split" in rows[0] else None
    if split is not None and set(split) != {"train", "test"}:
        raise UserError(f"{data}: the column split has no row with 'train', or none with 'test'")
    if split is not None and (both := np.intersect1d(group[split == "train"], group[split == "test"])).size:
        raise UserError(f"{data}: {files[file[group == both[0]][0]]} or its group is both in train and in test")
    if split is None and group.max() == 0:
        raise UserError(f"--data {data}: all cells are of one image or group; two are needed to split them")
    centre = np.array([(r["x"], r["y"]) for r in rows]) if "x" in rows[0] else None
    content = "".join(digests).encode() + file.tobytes() + (b"" if centre is None else centre.tobytes())
    return Cells(files, file, centre, label, classes, group, "group" if "group" in rows[0] else "image", source, sources,
                 split, hashlib.sha256(content).hexdigest())  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Backbones: modules that map normalised images [B, 3, S, S] to features [B, D].


class Pixels(nn.Module):
    """The baseline that learnt nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)  # [B, 3 S S]


class Colour(nn.Module):
    """How much of each colour, nothing of where: histograms of R, G and B. (Of their counts the square root, so that
    the cosine of two histograms is their overlap; otherwise it sees the background's bin and little else.)"""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
        bins = ((x * std + mean) * BINS).long().clamp(0, BINS - 1).flatten(0, 1).flatten(1)  # [B 3, S S]
        bins += BINS * torch.arange(len(bins), device=x.device)[:, None]  # each channel of each image counts apart
        counts = torch.bincount(bins.flatten(), minlength=len(bins) * BINS)
        return (counts.view(len(x), -1) / bins.shape[1]).sqrt()  # [B, 3 BINS]


class Headless(nn.Module):
    """A torchvision classifier without its last stage: what its classifier would have seen, [B, D]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        setattr(model, next(n for n in ("fc", "classifier", "heads", "head") if hasattr(model, n)), nn.Identity())
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        return x.mean((2, 3)) if x.ndim == 4 else x


def make_backbone(name: str, like: nn.Module | None) -> nn.Module:
    from torchvision.models import get_model, list_models  # a second to import: here, not in every training

    kind, _, arch = name.partition(":")
    if name in ("pixels", "colour"):
        return Pixels() if name == "pixels" else Colour()
    if name in list_models() and not os.path.exists(name):
        try:
            return Headless(get_model(name, weights="DEFAULT"))  # ImageNet's
        except OSError as error:
            raise UserError(f"--weights {name}: can't download torchvision's weights ({error})") from None
    if kind == "random" and arch in list_models():
        return Headless(get_model(arch))
    if kind == "random":  # LayerScale 1: at DINOv2's 1e-5 all class tokens are alike up to rounding, which is a straw man
        shape = {} if arch or like is None else dict(
            img_size=like.img_size, embed_dim=like.embed_dim, depth=len(like.blocks), heads=like.embed_dim // 64,
            patch_size=like.patch_size, swiglu=hasattr(like.blocks[0].mlp, "w12"))  # fmt: skip
        arch = arch or "nano"
        return build_vit(arch, **{"img_size": 64 if arch == "nano" else 224, **shape, "layerscale": 1.0})
    return vit_from_state(read_backbone(name))


def load_backbone(name: str, size: int | None = None, device: str = "auto", like=None, seed: int = 0) -> nn.Module:
    """A frozen backbone by path or name (see --weights) that maps images [B, 3, size, size] to features [B, D].

    size: default what its positions were trained at, at most 224. like: the network whose shape `random` takes.
    It carries .size, .device and .digest (of its weights). UserError if there is no such backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(str(name), like).eval().requires_grad_(False)
    patch = getattr(backbone, "patch_size", 1)
    fixed = {"pixels": PIXELS, "colour": 64}.get(name)
    backbone.size = fixed or size or min(getattr(backbone, "img_size", 224), 224) // patch * patch
    if backbone.size % patch:
        raise UserError(f"--size {size}: {name} cuts images into patches of {patch} pixels, which do not divide it")
    content = hashlib.sha256(type(backbone).__name__.encode())
    for key, value in backbone.state_dict().items():
        content.update(key.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    backbone.digest, backbone.device = content.hexdigest(), torch.device(device if device != "auto" else best_device())
    return backbone.to(backbone.device)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Features. Threads decode files ahead of the network, each file once for all of its cells.


def window(image: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """A square of [H, W, 3] as [3, side, side]. Beyond the border the edge goes on: black would tell where the cell is."""
    rows = (top + np.arange(side)).clip(0, image.shape[0] - 1)
    columns = (left + np.arange(side)).clip(0, image.shape[1] - 1)
    return image[rows[:, None], columns].transpose(2, 0, 1)


def resize(images: Tensor, size) -> Tensor:
    """uint8 [B, 3, H, W] to [B, 3, *size], bicubic, antialiased; 8 times as fast as bytes in this order as in floats."""
    images = images.contiguous(memory_format=torch.channels_last)
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def cut(cells: Cells, which: slice, crop: int, size: int) -> Tensor | BadImage:
    """The cells of one file, uint8 [k, 3, crop, crop]; or all of the file in a square of `size`, its shape kept."""
    path = cells.files[cells.file[which.start]]
    try:
        image = read_image(path)
    except BadImage as bad:
        return bad
    height, width = image.shape[:2]
    if cells.centre is None:
        scale = size / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        image = resize(torch.from_numpy(image).permute(2, 0, 1)[None], (height, width))[0].permute(1, 2, 0).numpy()
        return torch.from_numpy(window(image, (width - size) // 2, (height - size) // 2, size))[None]
    if (outside := (cells.centre[which] < 0) | (cells.centre[which] > (width, height))).any():
        x, y = cells.centre[which][outside.any(1)][0]
        raise UserError(f"a cell at x={x:g}, y={y:g} is outside {path}, which has {width}x{height} pixels")
    corners = np.rint(cells.centre[which]).astype(int) - crop // 2
    return torch.from_numpy(np.stack([window(image, x, y, crop) for x, y in corners]))


def crops_of(cells: Cells, crop: int, size: int):
    """Yields (cell numbers [b], crops uint8 [b, 3, side, side]) of 64 files at a time, and (path, reason) of bad ones."""
    starts = [*np.flatnonzero(np.diff(cells.file, prepend=-1)), len(cells.file)]
    files = [slice(*ends) for ends in itertools.pairwise(starts)]
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(files), 64):
            read = list(zip(files[i : i + 64], pool.map(lambda which: cut(cells, which, crop, size), files[i : i + 64])))
            yield from ((bad.path, bad.reason) for _, bad in read if isinstance(bad, BadImage))
            if good := [(which, crops) for which, crops in read if not isinstance(crops, BadImage)]:
                numbers = np.concatenate([np.arange(which.start, which.stop) for which, _ in good])
                yield numbers, torch.cat([crops for _, crops in good])


def network_input(images: Tensor, size: int, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, size, size], normalised as DINOv2's weights expect."""
    images = resize(images, (size, size)).to(device).float() / 255
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def half(device: torch.device):
    """Half precision where it is faster: on NVIDIA GPUs. A CPU stays in float32."""
    dtype = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    return torch.autocast(device.type, dtype, enabled=device.type == "cuda")


@torch.inference_mode()
def extract_features(backbone: nn.Module, images, patch_tokens: bool = False, batch: int = 256):
    """Features float32 [B, D] of images: uint8 [B, 3, H, W], or a list of [H, W, 3] arrays of one size.

    patch_tokens: (class tokens [B, D], patch tokens [B, N, D]) instead; only vision transformers have them.
    """
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    parts = []
    for some in images.split(batch):
        with half(backbone.device):
            x = network_input(some, backbone.size, backbone.device)
            x = backbone.forward_features(x) if patch_tokens else (backbone(x),)
        parts.append([t.float().cpu() for t in x])
    tokens = tuple(torch.cat(p) for p in zip(*parts))
    return tokens if patch_tokens else tokens[0]


def embed(name: str, backbone: nn.Module, cells: Cells, crop: int, cache: str | None, log) -> tuple[Tensor, dict]:
    """Features [n, D] of all cells, NaN where the file can't be read, and those files: {path: reason}."""
    key = hashlib.sha256(f"{backbone.digest}{cells.digest}{crop} {backbone.size} {backbone.device.type}".encode())
    path = cache and os.path.join(cache, key.hexdigest()[:32] + ".pt")
    if path and os.path.exists(path):
        return tuple(torch.load(path, weights_only=True))
    features, skipped, done, began = None, {}, 0, time.monotonic()
    told = began
    for numbers, crops in crops_of(cells, crop, backbone.size):
        if isinstance(numbers, str):
            skipped[numbers] = crops
            continue
        x = extract_features(backbone, crops)
        features = torch.full((len(cells.file), x.shape[1]), math.nan) if features is None else features
        features[numbers] = x
        done, now = done + len(numbers), time.monotonic()
        if now - told > 10:
            told, rate = now, done / (now - began)
            log(f"{name}: {done:,} of {len(cells.file):,} cells, {rate:,.0f}/s, {(len(cells.file) - done) / rate:.0f} s left")
    if features is None or len(skipped) > len(cells.files) / 2:
        raise UserError(f"{len(skipped)} of {len(cells.files)} images can't be read, e.g. {min(skipped.items())}")
    log(f"{name}: {features.shape[1]} features of {done:,} cells in {time.monotonic() - began:.0f} s")
    if path:
        os.makedirs(cache, exist_ok=True)
        torch.save([features, skipped], path + ".part")
        os.replace(path + ".part", path)  # a run that is killed here leaves no half a file
    return features, skipped


# ----------------------------------------------------------------------------------------------------------------------
# Classifiers on frozen features. Both give probabilities [M, C].


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int = 20, n_classes: int | None = None, temp=0.07) -> Tensor:
    """k nearest neighbours by cosine; a neighbour's vote weighs exp(cosine / temp), as in DINO's evaluation.

    train_x [N, D], train_y int [N], test_x [M, D] to the shares of the votes [M, C].
    """
    n_classes = n_classes or int(train_y.max()) + 1
    train_x, shares = F.normalize(train_x, dim=1), []
    for some in F.normalize(test_x, dim=1).split(1024):  # so that a table of cosines takes 4 KB per training cell
        cosine, nearest = (some @ train_x.T).topk(min(k, len(train_x)), dim=1)  # [m, k]
        votes = ((cosine - cosine[:, :1]) / temp).exp()
        shares.append(votes.new_zeros(len(some), n_classes).scatter_add_(1, train_y[nearest], votes))
    shares = torch.cat(shares)
    return shares / shares.sum(1, keepdim=True)


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, l2=1e-2, n_classes: int | None = None) -> Tensor:
    """Multinomial logistic regression on standardised features: minimises mean cross-entropy + l2/2 |W|^2 (no penalty
    on the bias): scikit-learn's with C = 1 / (l2 N), and the same minimum in a half to a fifth of its time.

    train_x [N, D], train_y int [N], test_x [M, D] to probabilities [M, C]; classes that training lacks get 0.
    l2: one strength, or several, strongest first, for [len(l2), M, C]; each fit starts from the one before.
    """
    n_classes = n_classes or int(train_y.max()) + 1
    present, y = train_y.unique(return_inverse=True)
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)  # a constant feature stays 0
    x, test_x = (train_x - mean) / std, (test_x - mean) / std
    # Features of a ViT are so correlated that L-BFGS crawls. Along the principal axes, each divided by the root of its
    # curvature (at most variance / 4, plus l2), it needs a half to a fifth of the passes. Few cells span few axes.
    if len(x) < x.shape[1]:
        _, s, axes = torch.linalg.svd(x, full_matrices=False)
        variance, axes = s.square() / len(x), axes.T
    else:
        variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    x, test_x = x @ axes, test_x @ axes
    weight, bias = x.new_zeros(x.shape[1], len(present)), x.new_zeros(len(present))
    probabilities = x.new_zeros(len(l2) if np.ndim(l2) else 1, len(test_x), n_classes)
    for i, strength in enumerate(np.atleast_1d(l2).tolist()):
        scale = (variance.clamp(min=0) / 4 + strength).rsqrt()[:, None]
        scaled, bias = (weight / scale).requires_grad_(), bias.detach().requires_grad_()
        optimizer = torch.optim.LBFGS([scaled, bias], max_iter=1000, history_size=50, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-4, tolerance_change=1e-9)  # fmt: skip

        def loss():
            optimizer.zero_grad()
            weight = scale * scaled
            value = F.cross_entropy(x @ weight + bias, y) + strength / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        weight = (scale * scaled).detach()
        probabilities[i][:, present] = (test_x @ weight + bias.detach()).softmax(1)
    return probabilities if np.ndim(l2) else probabilities[0]


def choose_l2(x: Tensor, y: Tensor, groups: np.ndarray, n_classes: int, seed: int = 0) -> float:
    """The strength whose weighted F1 is best on a fifth of the training groups, never on the test's."""
    if groups.min() == groups.max():
        return 1e-2
    held = group_folds(groups, y.cpu().numpy(), 5, seed) == 0
    found = linear_probe(x[~held], y[~held], x[held], L2, n_classes).argmax(2).cpu().numpy()
    return L2[np.argmax([scores(confusion(y[held].cpu().numpy(), guess, n_classes))["weighted_f1"] for guess in found])]


# ----------------------------------------------------------------------------------------------------------------------
# Splits and scores.


def group_folds(groups: np.ndarray, labels: np.ndarray, k: int = 5, seed: int = 0) -> np.ndarray:
    """A fold number 0..k-1 for each cell [n]: groups stay whole, classes are spread evenly.

    Largest group first, each goes where it adds least to the sum of squares of the folds' shares of the classes.
    """
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


def make_splits(cells: Cells, readable: np.ndarray, folds: int, seed: int) -> dict[str, list[tuple]]:
    """{name: [(training cells, test cells), ...]}: k folds, or the CSV's own split; and one source left out at a time."""
    learn = readable if cells.split is None else readable & (cells.split == "train")
    ask = readable if cells.split is None else readable & (cells.split == "test")
    if cells.split is None:
        fold = group_folds(cells.group, cells.label, folds, seed)
        tests = {f"{fold.max() + 1} folds by {cells.by}": [fold == f for f in range(fold.max() + 1)]}
    else:
        tests = {"the CSV's split": [cells.split == "test"]}
    if len(cells.sources) > 1:
        tests["one source left out"] = [cells.source == s for s in range(len(cells.sources))]
    splits = {}
    for name, parts in tests.items():
        for part in parts:  # a group that lies in two sources is kept out of training as a whole
            train, test = learn & ~part & ~np.isin(cells.group, cells.group[part & ask]), part & ask
            if train.any() and test.any():
                splits.setdefault(name, []).append((np.flatnonzero(train), np.flatnonzero(test)))
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
            "weighted_f1": np.nansum(f1 * true, -1) / true.sum(-1), "macro_f1": np.nanmean(f1, -1)}  # fmt: skip


def auroc(truth: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN unless there are both."""
    weight = np.ones(len(truth)) if weight is None else weight
    level = np.unique(score, return_inverse=True)[1]
    positive, negative = np.bincount(level, weight * truth), np.bincount(level, weight * ~truth)
    pairs = positive.sum() * negative.sum()
    return float(positive @ (negative.cumsum() - negative / 2) / pairs) if pairs else math.nan


def with_interval(truth: np.ndarray, probs: np.ndarray, groups: np.ndarray, seed: int = 0) -> tuple[dict, dict]:
    """Metrics, and their bootstrap replicates {metric: [R]}: each draws as many groups as there are, with replacement.

    A confusion matrix is a sum over groups, so a replicate is a weighted sum of the groups' own. The same seed draws the
    same groups for each backbone: their differences can be taken replicate by replicate. (What the interval leaves out:
    another training set would have given another classifier.)
    """
    n_classes, guess = probs.shape[1], probs.argmax(1)
    group = np.unique(groups, return_inverse=True)[1]
    own = np.zeros((group.max() + 1, n_classes**2), np.float32)
    np.add.at(own, (group, truth * n_classes + guess), 1)
    rng, drawn = np.random.default_rng(seed), []
    value = {k: float(v) for k, v in scores(confusion(truth, guess, n_classes)).items()}
    if n_classes == 2:
        value["auroc"] = auroc(truth == 1, probs[:, 1])
    for _ in range(REPLICATES // 100):
        times = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=100).astype(np.float32)  # [100, G]
        drawn.append(scores((times @ own).reshape(-1, n_classes, n_classes)))
        if n_classes == 2:
            drawn[-1]["auroc"] = np.array([auroc(truth == 1, probs[:, 1], t[group]) for t in times])
    return value, {k: np.concatenate([d[k] for d in drawn]) for k in value}


def interval(replicates: np.ndarray) -> list[float]:
    return np.nanpercentile(replicates, [2.5, 97.5]).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Protocols. A result is a row of results.json (a dict), in which `again` holds the replicates {metric: [R]}.


def judged(truth: np.ndarray, probs: np.ndarray, cells: Cells, tested: np.ndarray, seed: int) -> dict:
    value, again = with_interval(truth, probs, cells.group[tested], seed)
    counts = confusion(truth, probs.argmax(1), len(cells.classes))
    recall = np.diagonal(counts) / counts.sum(1).clip(1)
    row = {**value, "cells": len(tested), "recall": dict(zip(cells.classes, recall.tolist())), "again": again}
    if cells.sources:
        parts = {name: cells.source[tested] == s for s, name in enumerate(cells.sources)}
        row["sources"] = {name: {k: float(v) for k, v in scores(confusion(truth[p], probs[p].argmax(1), len(cells.classes)))
                                 .items()} for name, p in parts.items() if p.any()}  # fmt: skip
    return {**row, "confusion": counts.tolist()}


def study_level(truth: np.ndarray, probs: np.ndarray, group: np.ndarray, seed: int) -> dict[str, dict]:
    """AUROC of whole studies (groups), scored by the mean or the maximum of their members' probabilities. A study is
    positive for a class if any member is; the AUROC is the mean over the classes that not all or no studies have."""
    study = np.unique(group, return_inverse=True)[1]
    shape = study.max() + 1, probs.shape[1]
    has, highest, total = np.zeros(shape, bool), np.zeros(shape), np.zeros(shape)
    has[study, truth] = True
    np.maximum.at(highest, study, probs)
    np.add.at(total, study, probs)
    classes = [c for c in range(shape[1]) if 0 < has[:, c].sum() < len(has)]
    draws = np.random.default_rng(seed).multinomial(len(has), np.full(len(has), 1 / len(has)), size=REPLICATES // 5)
    rows = {}
    for pool, score in (("mean", total / np.bincount(study)[:, None]), ("maximum", highest)):
        auc = [[auroc(has[:, c], score[:, c], t) for c in classes] for t in [np.ones(len(has)), *draws]]
        if classes:
            auc = np.nanmean(auc, axis=1)
            rows[f"{pool} of a study"] = {"auroc": float(auc[0]), "studies": len(has), "again": {"auroc": auc[1:]}}
    return rows


def few_shot(x: Tensor, y: Tensor, cells: Cells, parts: list, shots: int, seed: int) -> dict:
    """Linear probes on `shots` random training cells a class, DRAWS times; {} where a class has fewer."""
    draws = []
    for draw in range(DRAWS):
        train, test = parts[draw % len(parts)]
        train = np.random.default_rng([seed, draw]).permutation(train)
        chosen = np.concatenate([train[cells.label[train] == c][:shots] for c in range(len(cells.classes))])
        if len(chosen) < shots * len(cells.classes):
            return {}
        guess = linear_probe(x[chosen], y[chosen], x[test], FEWSHOT_L2).argmax(1).cpu().numpy()
        draws.append(scores(confusion(cells.label[test], guess, len(cells.classes))))
    again = {k: np.array([d[k] for d in draws]) for k in draws[0]}
    mean = {k: float(v.mean()) for k, v in again.items()}
    return {**mean, "deviation": {k: float(v.std(ddof=1)) for k, v in again.items()}, "again": again}


def measure(x: Tensor, cells: Cells, parts: list, protocols, seed: int) -> dict[str, dict]:
    """{protocol: result} of one backbone's features [n, D] on one way to split the cells."""
    y, n_classes = torch.from_numpy(cells.label).to(x.device), len(cells.classes)
    tested = np.sort(np.concatenate([test for _, test in parts]))
    names = ["1-NN", "20-NN"] * ("knn" in protocols) + ["linear probe"] * ("linear" in protocols)
    results = {}
    for name in names:
        probs = np.zeros((len(y), n_classes), np.float32)
        for train, test in parts:
            given = x[train], y[train], x[test]
            if name == "linear probe":
                l2 = choose_l2(*given[:2], cells.group[train], n_classes, seed)
                probs[test] = linear_probe(*given, l2, n_classes).cpu()
            else:
                probs[test] = knn(*given, int(name[:-3]), n_classes).cpu()
        results[name] = judged(cells.label[tested], probs[tested], cells, tested, seed)
        if cells.by == "group":
            pooled = study_level(cells.label[tested], probs[tested], cells.group[tested], seed)
            results |= {f"{name}, {pool}": row for pool, row in pooled.items()}
    for shots in SHOTS if "fewshot" in protocols else ():
        if found := few_shot(x, y, cells, parts, shots, seed):
            results[f"few-shot, {shots} a class"] = found
    return results


# ----------------------------------------------------------------------------------------------------------------------
# The whole of it.


def load_all(weights, size: int | None, device: str, seed: int) -> dict[str, nn.Module]:
    """{label: backbone} in the order given; `random`, which takes the first one's shape, is made last."""
    weights = weights if isinstance(weights, dict) else {str(w): w for w in weights}
    loaded, like = {}, None
    for label, name in sorted(weights.items(), key=lambda item: str(item[1]) == "random"):
        loaded[label] = load_backbone(str(name), size, device, like, seed)
        like = like or (loaded[label] if hasattr(loaded[label], "blocks") else None)
    return {label: loaded[label] for label in weights}


def evaluate(data, weights, protocols=PROTOCOLS, crop=80, out=None, device="auto", size=None, seed=0, log=print,
             drop_labels=(), folds=5) -> dict:  # fmt: skip
    """Score backbones on labelled cells; prints the table through `log`, returns what results.json holds.

    data, protocols, crop, size, ...: as on the command line. weights: paths or names, or {name in the table: path or
    name}. out: folder for the results and the features' cache; None writes nothing. Raises UserError, before any work.
    """
    if unknown := [p for p in protocols if p not in PROTOCOLS]:
        raise UserError(f"--protocols {unknown[0]}: choose from {', '.join(PROTOCOLS)}")
    if crop < 2 or folds < 2 or (size or 1) < 1:
        raise UserError("--crop and --folds have to be at least 2, and --size at least 1")
    device = best_device() if device == "auto" else str(device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: there is none here") from None
    if out is not None:
        try:
            os.makedirs(out, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            raise UserError(f"--out {out} can't be written to: {error.strerror}") from None
    cells = read_cells(str(data), drop_labels)
    backbones = load_all(weights, size, device, seed)

    features, skipped = {}, {}
    for label, backbone in backbones.items():
        features[label], bad = embed(label, backbone, cells, crop, out and os.path.join(out, "features"), log)
        skipped |= bad
    readable = ~np.isin(cells.file, [i for i, f in enumerate(cells.files) if f in skipped])
    if skipped:
        log(f"{len(skipped)} of {len(cells.files)} images can't be read and are left out: " + str(BadImage(*min(skipped.items()))))
    rows, pairs = [], []
    for split, parts in make_splits(cells, readable, folds, seed).items():
        measured = {}
        for label, x in features.items():
            began = time.monotonic()
            x = x.to(device) if device.startswith("cuda") else x  # Apple's GPUs lack the eigenvectors
            measured[label] = measure(x, cells, parts, protocols, seed)
            log(f"{label}, {split}: {time.monotonic() - began:.0f} s")
        for protocol in next(iter(measured.values())):
            block = [{"protocol": protocol, "split": split, "weights": label, **found[protocol]} for label, found in measured.items()]
            again = {row["weights"]: row.pop("again") for row in block}
            for row in block:
                row["interval"] = {k: interval(v) for k, v in again[row["weights"]].items()}
            pairs += [{"protocol": protocol, "split": split, "weights": a["weights"], "minus": b["weights"], "metric": k,
                       "difference": a[k] - b[k], "interval": interval(again[a["weights"]][k] - again[b["weights"]][k])}
                      for a, b in itertools.permutations(block, 2) for k in again[a["weights"]]]  # fmt: skip
            rows += block
    results = {"data": str(data), "crop": crop, "seed": seed, "images": len(cells.files), "cells": int(readable.sum()), "groups": int(cells.group.max() + 1),
               "classes": dict(zip(cells.classes, np.bincount(cells.label).tolist())), "sources": cells.sources,
               "skipped": skipped, "rows": rows, "pairs": pairs}
    log(as_text(results))
    if out is not None:
        write_results(results, out)
    return results


COLUMNS = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "macro_f1": "macro F1", "weighted_f1": "weighted F1",
           "auroc": "AUROC"}  # fmt: skip


def sections(results: dict):
    """Yields (title, header, lines of text, number of the best line) for each protocol and split, scores in percent."""
    shown = [k for k in COLUMNS if any(k in row for row in results["rows"])]
    for (protocol, split), rows in itertools.groupby(results["rows"], lambda r: (r["protocol"], r["split"])):
        rows, lines = list(rows), []
        lead = "weighted_f1" if "weighted_f1" in rows[0] else "auroc"  # the metric that ranks, with its interval
        best = max(rows, key=lambda row: row[lead])["weights"]
        for row in rows:
            text = {k: f"{100 * row[k]:.1f}" if k in row else "" for k in shown}
            text[lead] += f" ± {100 * row['deviation'][lead]:.1f}" if "deviation" in row else span(row["interval"][lead])
            behind = [p for p in results["pairs"] if (p["protocol"], p["split"], p["metric"]) == (protocol, split, lead)
                      and (p["weights"], p["minus"]) == (row["weights"], best)]  # fmt: skip
            lines.append([row["weights"], *text.values(), *(f"{100 * p['difference']:+.1f}" + span(p["interval"]) for p in behind)])
        titles = [COLUMNS[k] + (" [95%]" if k == lead else "") for k in shown]
        yield f"{protocol}, {split}", ["", *titles, "against the best"], lines, [r["weights"] for r in rows].index(best)


def span(ends) -> str:
    return " [{:.1f}, {:.1f}]".format(*(100 * e for e in ends))


def as_text(results: dict) -> str:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    text = []
    for title, header, lines, best in sections(results):
        text.append("")
        for i, line in enumerate([[title, *header[1:]], *lines]):
            widths = [44, *(20 if "[" in h else 10 for h in header[1:-1]), 0]
            line = "".join(f"{cell[-w:] if w else cell:{w}}" for cell, w in zip(line, widths)).rstrip()
            text.append(bold + line + plain if i - 1 == best else line)
    return "\n".join(text)


def write_results(results: dict, out):
    """results.json: everything; results.csv: a line for each row; results.md: the table; skipped.txt: unreadable files."""
    with open(os.path.join(out, "results.json"), "w") as file:
        json.dump(results, file, indent=1)
    with open(os.path.join(out, "results.csv"), "w", newline="") as file:
        ends = [f"{k}_{end}" for k in COLUMNS for end in ("low", "high")]
        table = csv.DictWriter(file, ["protocol", "split", "weights", *COLUMNS, *ends], extrasaction="ignore")
        table.writeheader()
        for row in results["rows"]:
            spans = {f"{k}_{end}": v for k, both in row["interval"].items() for end, v in zip(("low", "high"), both)}
            table.writerow({**row, **spans})
    with open(os.path.join(out, "results.md"), "w") as file:
        for title, header, lines, best in sections(results):
            lines[best] = [f"**{cell}**" if cell else "" for cell in lines[best]]
            table = [header, ["---"] * len(header), *([*line, ""][: len(header)] for line in lines)]
            file.write(f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table) + "\n")
    with open(os.path.join(out, "skipped.txt"), "w") as file:
        file.writelines(f"{path}\t{reason}\n" for path, reason in results["skipped"].items())


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a CSV or a folder of class folders")
    parser.add_argument("--weights", required=True, nargs="+", help="paths, names, random, pixels, colour")
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, help=f"of {', '.join(PROTOCOLS)}; default: all")
    parser.add_argument("--crop", type=int, default=80, help="side of the square around a cell, in pixels (80)")
    parser.add_argument("--out", default="out/eval", help="folder for the results (out/eval)")
    parser.add_argument("--size", type=int, help="input size; default: what the backbone was trained at, at most 224")
    parser.add_argument("--drop-label", nargs="+", default=[], dest="drop_labels", help="classes to leave out")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")

    def fail(message):
        print(f"eval.py: error: {message}", file=sys.stderr)
        sys.exit(2)

    parser.error = fail  # one line, without the usage
    try:
        evaluate(**vars(parser.parse_args(argv)), log=lambda text: print(text, flush=True))
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
