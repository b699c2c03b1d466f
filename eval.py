"""How good is a backbone? Freeze it, describe each labelled cell by it, ask simple classifiers.

    python eval.py --data cells.csv --weights out/backbone.pth random pixels colour --crop 80
    python eval.py --data CLASS_FOLDERS --weights dinov2_vits14 resnet50 --protocols knn linear
    python eval.py --data cells.csv --weights a.pth --finetune lora --figures out/figures

--weights  our checkpoints, backbone.pth; DINOv2's, RedDino's, timm's files; dinov2_vits14 and its
           sisters; torchvision's classifiers; and what their scores have to be compared with:
           random   an untrained network of the first checkpoint's shape, or of nano's;
           pixels   the crop itself, 16 x 16;
           colour   its histogram. A backbone that scores like this one is a detector of stains.

Why frozen: a small classifier can only use what is there, so the score is the backbone's own. Why
groups: cells of a smear share stain, focus and patient, and whoever learnt some recognises the
smear. So a group (or image) is never on both sides; and as its cells err together, 95% intervals
come from drawing groups anew. Leaving a source out asks: does it work on our microscope?

Labelled cells: from a CSV or class folders (eval.py --data) to arrays, crops, and ways to split.

A CSV has columns `image`, `label` and, where an image holds many cells, `x`, `y` (a cell's centre
in pixels) or a box `xmin`, `xmax`, `ymin`, `ymax`, whose centre is taken. Others that count:
`group` (patient, study), `source` (hospital, stain), `split` (train, test, val), `study_label` (of
the whole group), `slice` (a number: the image's place in its group). Class folders are
FOLDER/CLASS/*.png; or FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png.
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
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

from augment import MEAN, STD, BadImage, UserError, check_window, find_images, normalise, read_image
from reddino import (
    DINOV2,
    VisionTransformer,
    build_vit,
    choose_device,
    configure,
    read_backbone,
    vit_from_state,
    write_aside,
)

PROTOCOLS = ("knn", "linear", "fewshot")  # what is done by default
CHOICES = {"protocols": (*PROTOCOLS, "study", "release"), "finetune": ("full", "head", "lora"),
           "features": ("cls", "cls+mean")}
SCORES = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "macro_f1": "macro F1",
          "weighted_f1": "weighted F1", "auroc": "AUROC"}
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strengths that the linear probe chooses from
SHOTS, DRAWS, FEWSHOT_L2 = (1, 5, 10, 50), 20, 0.1  # the best of 1, 0.1, 0.01 on Chula
REPLICATES = 1000  # of the bootstrap: an interval's ends then move by a few % between seeds
PIXELS, COLOUR, BINS = 16, 64, 32  # input sizes of these two baselines; a channel's bins

# --------------------------------------------------------------------------------------------------
def printable(text, most: int = 60) -> str:
    """One line without terminal escapes, newlines, broken UTF-8."""
    text = str(text) if len(str(text)) <= most else f"{str(text)[:most]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def quiet(text):
    """A log that nobody reads."""

# --------------------------------------------------------------------------------------------------
# Labels. Whatever the layout, cells end as parallel arrays, an entry for each row of the table,
# sorted by image, so that each image is decoded once.

@dataclass
class Cells:
    files: list[str]  # the images; the arrays below are [n]
    file: np.ndarray  # index into files, ascending
    centre: np.ndarray  # [n, 2]: x, y in pixels; NaN: the image is the cell
    label: np.ndarray  # index into classes
    classes: list[str]
    image: np.ndarray  # the same number: of files with the same pixels
    group: np.ndarray  # the same number: stay together. The table's groups, or the images
    by: str = "image"  # or "group"
    source: np.ndarray | None = None  # index into sources
    sources: list[str] = field(default_factory=list)
    split: np.ndarray | None = None  # "train" or "test"
    split_by: str = "the CSV's split"  # or the folders'
    study: np.ndarray | None = None  # index into studies, the labels of groups
    studies: list[str] = field(default_factory=list)
    place: np.ndarray | None = None  # grows along the slices of a group
    skipped: dict[str, str] = field(default_factory=dict)  # files that can't be read, and why
    digest: str = ""  # of all that the crops depend on
    window: tuple | None = None  # level and width, see read_image

USED = ("image", "label", "group", "source", "split", "study_label", "slice")
CENTRES = (("x", "y"), ("xmin", "xmax", "ymin", "ymax"), ("xmin", "width", "ymin", "height"))

def csv_rows(path: str, log) -> list[dict]:
    """The rows of a CSV, each checked, with "centre". UserError says what is wrong where."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            given = reader.fieldnames or [""]
            rows = [{**row, "line": reader.line_num} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a CSV in UTF-8: {error}") from None
    if len(given) == 1 and re.search("[;\t]", given[0]):
        raise UserError(f"{path}, line 1: columns have to be separated by commas, not "
                        "semicolons or tabs")
    names = {name: re.sub(r"\W+", "_", name.strip().lower()) for name in given}
    names = {name: re.sub("^([xy])_(min|max)$", r"\1\2", plain) for name, plain in names.items()}
    columns = list(names.values())
    where = next((some for some in CENTRES if set(some) <= set(columns)), ())
    for name in ("image", "label", *(CENTRES[0] if set("xy") & set(columns) else where)):
        if columns.count(name) != 1:
            raise UserError(f"{path}: no column {name}, or two; it needs image,label and, for "
                            "cells in images, x,y or xmin,xmax,ymin,ymax")
    if not where and (half := set(columns) & set(sum(CENTRES[1:], ())) - {"width", "height"}):
        raise UserError(f"{path}: {min(half)} alone: a box needs xmin, xmax, ymin, ymax")
    if where == CENTRES[0] and {"width", "height"} <= set(columns):
        raise UserError(f"{path}: are x, y the middle of width, height? Then take these out. A "
                        "corner is called xmin, ymin")
    if unused := [name for name in columns if name not in (*USED, *where)]:
        log(f"{path}: columns not used: {', '.join(unused)}")
    return [checked(row, names, where, path) for row in rows if any(map(row.get, given))]

def checked(row: dict, names: dict, where: tuple, path: str) -> dict:
    """A row with the names that count, its numbers read, the CSV's folder before its image."""
    line = f"{path}, line {row['line']}"
    if None in row.values() or any(row.get(None) or ()):
        raise UserError(f"{line}: more or fewer values than the first line has names; a value "
                        'with a comma stands in quotes: "sickle, typical"')
    values = {plain: row[name].strip() for name, plain in names.items() if plain in (*USED, *where)}
    for name, value in values.items():
        if not value:
            raise UserError(f"{line}: {name} is ''")
        if name in (*where, "slice"):
            if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.I):
                raise UserError(f"{line}: {name} is {value!r}, not a number")
            values[name] = float(value)
    place = [values.pop(name) for name in where] or [math.nan, math.nan]
    if len(where) == 4:
        x, x2, y, y2 = place
        place = [x + x2 / 2, y + y2 / 2] if "width" in where else [(x + x2) / 2, (y + y2) / 2]
    values["image"] = os.path.join(os.path.dirname(path), values["image"])
    if not os.path.lexists(values["image"]):
        values["image"] = values["image"].replace("\\", "/")  # a path from Windows
    if not os.path.lexists(values["image"]):
        raise UserError(f"{line}: image is {values['image']}, which is not there")
    return values | {"centre": place}

def folder_rows(data: str, log) -> list[dict]:
    """A row for each image in FOLDER/CLASS, or in FOLDER/train/CLASS and FOLDER/test/CLASS."""
    def folders(parent):
        found = [e.name for e in os.scandir(parent) if e.is_dir() and not e.name.startswith(".")]
        return sorted(found)

    names, rows = folders(data), []
    parts = [name for name in names if split_of(name)]
    if len({split_of(name) for name in parts}) < 2:
        parts = [""]
    elif len(parts) < len(names):
        log(f"{data}: only {', '.join(parts)} are used")
    for part in parts:
        for name in folders(os.path.join(data, part)):
            row = {"label": name, "centre": [math.nan, math.nan]}
            row |= {"split": part} if part else {}
            images = find_images(os.path.join(data, part, name))
            rows += [row | {"image": image} for image in images]
    return rows

def split_of(name: str) -> str:
    """What `Training`, `val` and the like mean: train, test, val; or nothing."""
    found = re.fullmatch("(train|test|val)(ing|id|idation)?", name.lower())
    return found[1] if found else ""

def chosen(rows: list[dict], drop_labels, log) -> list[dict]:
    """Without dropped labels; of a split train and test, or where there is no test, val."""
    labels = sorted({row["label"] for row in rows})
    if unknown := set(drop_labels) - set(labels):
        raise UserError(f"--drop-label {min(unknown)}: the labels are {', '.join(labels)}")
    rows = [row for row in rows if row["label"] not in drop_labels]
    if not rows or "split" not in rows[0]:
        return rows
    there = {row["split"] for row in rows}
    tests = "test" if "test" in map(split_of, there) else "val"
    means = {name: {"train": "train", tests: "test"}.get(split_of(name)) for name in there}
    if set(means.values()) - {None} != {"train", "test"}:
        raise UserError(f"split holds {', '.join(sorted(there))}: write train and test there")
    if others := sorted(name for name in there if not means[name]):
        log(f"cells whose split is {', '.join(others)} are left out")
    return [row | {"split": means[row["split"]]} for row in rows if means[row["split"]]]

def look(path: str, window=None) -> dict | BadImage:
    """What to know of an image, or why it can't be read."""
    try:
        image = read_image(path, writable=False, window=window)
    except BadImage as bad:
        return bad
    content = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
    return {"shape": image.shape[1::-1], "content": content}

def readable(rows: list[dict], window, log) -> tuple[list[dict], dict[str, str]]:
    """The rows whose image can be read, sorted by image, with its "shape" and "content"; and the
    reasons of the others."""
    files = sorted({row["image"] for row in rows})
    with ThreadPoolExecutor() as pool:
        looks = dict(zip(files, pool.map(look, files, itertools.repeat(window))))
    skipped = {path: bad.reason for path, bad in looks.items() if isinstance(bad, BadImage)}
    if skipped:
        first = BadImage(*min(skipped.items()))
        log(f"{len(skipped)} of {len(files)} images can't be read, e.g. {first}")
    rows = [row | looks[row["image"]] for row in rows if row["image"] not in skipped]
    for row in rows:
        if (np.array(row["centre"]) < 0).any() or (np.array(row["centre"]) > row["shape"]).any():
            raise UserError("x={:g}, y={:g} is outside of {image}, which has {shape[0]}x{shape[1]} "
                            "pixels".format(*row["centre"], **row))
    return sorted(rows, key=lambda row: row["image"]), skipped

def read_cells(data: str, drop_labels=(), window=None, log=quiet) -> Cells:
    """The labelled cells of a CSV or of class folders; UserError for all that would make their
    scores meaningless."""
    rows = folder_rows(data, log) if os.path.isdir(data) else csv_rows(data, log)
    rows, skipped = readable(chosen(rows, drop_labels, log), window, log)
    if len(skipped) > len({row["image"] for row in rows}):
        raise UserError(f"{data}: most images can't be read: {BadImage(*min(skipped.items()))}")
    if len({row["label"] for row in rows}) < 2:
        raise UserError(f"{data}: {len(rows)} cells, not of two classes; give a CSV or "
                        "FOLDER/CLASS/*.png")

    def column(name):
        """Its different values, and the index of each cell's."""
        if name not in rows[0]:
            return [], None
        values = sorted({row[name] for row in rows})
        numbers = {value: i for i, value in enumerate(values)}
        return values, np.array([numbers[row[name]] for row in rows])

    (files, file), (classes, label), (sources, source) = map(column, ("image", "label", "source"))
    (slices, place), (studies, study) = column("slice"), column("study_label")
    split = np.array([row["split"] for row in rows]) if "split" in rows[0] else None
    by, image = "group" if "group" in rows[0] else "image", column("content")[1]
    group = column("group")[1] if by == "group" else image  # Chula has 18 under two names
    centre, counts = np.array([row["centre"] for row in rows]), np.bincount(label)
    if counts.min() < 2:
        raise UserError(f"class {classes[counts.argmin()]!r} has one cell, which can't be both "
                        "learnt and tested; label more of it or leave it out with --drop-label")
    if split is None and len(np.unique(group)) < 2:
        raise UserError(f"{data}: all cells are of one {by}; that can't be split")
    if centre.max() <= 1:
        raise UserError(f"{data}: x and y look like fractions of the image's size; they have to be "
                        "pixels")
    if study is not None and len({*zip(group, study)}) > len(np.unique(group)):
        raise UserError(f"{data}: study_label has two values in one group")
    content = repr([(row["content"], *row["centre"]) for row in rows])
    digest = hashlib.sha256(content.encode()).hexdigest()
    split_by = "the folders' split" if os.path.isdir(data) else "the CSV's split"
    return Cells(files, file, centre, label, classes, image, group, by, source, sources, split,
                 split_by, study, studies, place if slices else file, skipped, digest, window)

# --------------------------------------------------------------------------------------------------
# Crops. Threads decode the files, each once for all of its cells.

def resize(images: Tensor, size) -> Tensor:
    """uint8 [B, 3, H, W] to [B, 3, *size], bicubic, antialiased."""
    images = images.contiguous(memory_format=torch.channels_last)  # resized 8 times as fast
    return F.interpolate(images, size, mode="bicubic", antialias=True)

def cut(path: str, centres: np.ndarray, crop: int, size: int, window=None) -> Tensor:
    """The cells of a file, one for each of centres [k, 2]: uint8 [k, 3, side, side], side at most
    `size`; for NaN all of the file, its shape kept. Beyond the border the edge goes on: black would
    be a hint."""
    image = read_image(path, window=window)
    if np.isnan(centres).any():
        height, width = (max(1, round(n * size / max(image.shape))) for n in image.shape[:2])
        image = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        image, crop = np.asarray(image), size
        centres = np.full_like(centres, (width // 2, height // 2))
    cells = []
    for x, y in np.rint(centres).astype(int) - crop // 2:
        rows = np.arange(y, y + crop).clip(0, image.shape[0] - 1)
        columns = np.arange(x, x + crop).clip(0, image.shape[1] - 1)
        cell = torch.from_numpy(image[rows[:, None], columns]).permute(2, 0, 1)[None]
        cells.append(cell if crop <= size else resize(cell, (size, size)))
    return torch.cat(cells)

def crops_of(cells: Cells, crop: int, size: int):
    """Yields all cells in order, uint8 [b, 3, side, side], about 256 at a time; see cut."""
    def read(f):
        here = slice(*np.searchsorted(cells.file, (f, f + 1)))
        return cut(cells.files[f], cells.centre[here], crop, size, cells.window)

    files = range(len(cells.files))
    batch = math.ceil(256 * len(files) / len(cells.file))
    with ThreadPoolExecutor() as pool:
        for first in files[::batch]:
            yield torch.cat(list(pool.map(read, files[first:first + batch])))

def network_input(images: Tensor, size, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, *size], normalised as DINOv2's weights expect."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise UserError(f"images have to be uint8 (0 to 255) [B, 3, H, W], not {images.dtype} "
                        f"{list(images.shape)}; floats in 0..1: (255 * x).round().byte()")
    return normalise(resize(images, size), device, torch.float32)

# --------------------------------------------------------------------------------------------------
# Splits.

def group_folds(groups: np.ndarray, labels: np.ndarray, k: int = 5, seed: int = 0) -> np.ndarray:
    """A fold 0..k-1 for each cell [n]: groups stay whole, classes are spread evenly. Largest group
    first, each goes where it adds least to the sum of squares of the folds' shares of classes."""
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

def stratified_folds(labels: np.ndarray, k: int = 5) -> np.ndarray:
    """A fold for each cell [n] as scikit-learn's StratifiedKFold(k) has them: no groups."""
    first = np.argsort(np.unique(labels, return_index=True)[1])  # classes as they come
    fold, dealt = np.zeros(len(labels), int), np.sort(np.argsort(first)[labels])
    for place, c in enumerate(first):
        fold[labels == c] = np.repeat(range(k), [(dealt[f::k] == place).sum() for f in range(k)])
    return fold

def make_splits(cells: Cells, folds: int, seed: int, log=print) -> dict[str, list[tuple]]:
    """{name: [(training cells, test cells), ...]}: k folds or the data's own split; and each source
    left out in turn."""
    fold, splits = group_folds(cells.group, cells.label, folds, seed), {}
    tests = [(f"{fold.max() + 1} folds by {cells.by}", fold == f) for f in range(fold.max() + 1)]
    learn = ask = np.ones(len(fold), bool)
    if cells.split is not None:
        learn, ask = cells.split == "train", cells.split == "test"
        tests = [(cells.split_by, ask)]
    for s in range(len(cells.sources) if len(cells.sources) > 1 else 0):
        tests.append(("one source left out", cells.source == s))
    for name, part in tests:
        test, train = ask & part, learn & ~part
        known = np.isin(cells.group, cells.group[test]) | np.isin(cells.image, cells.image[test])
        if n := (train & known).sum():
            log(f"{name}: {n} cells are not trained on, as their image or group is tested")
        train, test = np.flatnonzero(train & ~known), np.flatnonzero(test)
        if len(train) and len(test):
            splits.setdefault(name, []).append((train, test))
    if not splits:
        raise UserError("no way of splitting leaves cells to train on and others to test on; add "
                        "images")
    for c, name in enumerate(cells.classes):
        if cells.split is None and len({*cells.group[cells.label == c]}) == 1:
            log(f"class {name!r} is in one {cells.by} only: it is never both learnt and tested")
    for name, parts in splits.items():
        n = len({*cells.group[np.concatenate([test for _, test in parts])]})
        if n < 10:
            log(f"{name}: tests on {n} {cells.by}s only, too few for the intervals to be trusted")
    return splits

# --------------------------------------------------------------------------------------------------
# Backbones: modules that map normalised images [B, 3, S, S] to features [B, D].

class Colour(nn.Module):
    """How much of each colour, nothing of where: histograms of R, G and B. (Of counts the square
    root, so that the cosine of two histograms is their overlap.)"""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
        bins = ((x * std + mean) * BINS).long().clamp(0, BINS - 1).flatten(2).flatten(0, 1)
        bins = bins + BINS * torch.arange(len(bins), device=x.device)[:, None]  # [B 3, S S]
        counts = bins.flatten().bincount(minlength=BINS * len(bins)).view(len(x), -1)
        return counts.sqrt() / x.shape[3]  # [B, 3 BINS]

def untrained(like: nn.Module | None) -> VisionTransformer:
    """A random network. Its LayerScale is 1: at DINOv2's 1e-5 all class tokens are alike up to
    rounding, which would be a straw man."""
    if like is None:
        return build_vit("nano", 64, layerscale=1.0)
    block, stem = like.blocks[0], "convs" if "stem" in like.patch_embed else "linear"
    return VisionTransformer(like.img_size, like.patch_size, like.embed_dim, len(like.blocks),
                             block.attn.heads, hasattr(block.mlp, "w12"), layerscale=1.0, stem=stem)

def classifier(zoo, name: str) -> nn.Module:
    """torchvision's, trained on ImageNet. Features are what its last layer would have seen."""
    try:
        model = zoo.get_model(name, weights="DEFAULT")
    except Exception as error:  # a different type for each way in which a file can be wrong
        file = os.path.basename(zoo.get_model_weights(name).DEFAULT.url)
        raise UserError(f"--weights {name}: torchvision can't download it, or {torch.hub.get_dir()}"
                        f"/checkpoints/{file} is damaged: delete it ({error})") from None
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    model.set_submodule(layers[-1], nn.Identity())
    return model

def make_backbone(name: str, like: nn.Module | None, heads: int | None) -> nn.Module:
    import torchvision.models as zoo  # takes a second, which a demo need not wait for

    own = {"pixels": nn.Flatten, "colour": Colour, "random": partial(untrained, like)}
    classifiers = zoo.list_models(module=zoo)
    if os.path.isfile(name) or name in DINOV2 or name.startswith("hf_hub:"):
        return vit_from_state(read_backbone(name), heads=heads)
    if name in own:
        return own[name]()
    if name in classifiers:
        return classifier(zoo, name)
    near = difflib.get_close_matches(name, [*own, *DINOV2, *classifiers], 1)
    hint = f"; is it {near[0]}?" if near else ""
    raise UserError(f"--weights {name}: no such file or name{hint}")

def load_backbone(name, size=None, device="auto", like=None, seed=0, heads=None) -> nn.Module:
    """A frozen backbone by path or name, see --weights: [B, 3, size, size] to features [B, D]; with
    .size, .device and .digest (of its weights). UserError if there is none. size: default what it
    was trained at, at most 224. like: whose shape `random` takes. heads: of attention."""
    name, device = str(name), choose_device(configure(device=device))[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(name, like, heads).eval().requires_grad_(False)
    patch = getattr(backbone, "patch_size", 1)
    default = min(getattr(backbone, "img_size", 224), 224) // patch * patch
    backbone.size = {"pixels": PIXELS, "colour": COLOUR}.get(name) or size or default
    if backbone.size % patch:
        raise UserError(f"--size {size}: {name} cuts images into patches of {patch} pixels, which "
                        "do not divide it")
    content = hashlib.sha256(f"{type(backbone).__name__} {heads}".encode())
    for key, value in backbone.state_dict().items():
        content.update(key.encode())
        content.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    backbone.digest, backbone.device = content.hexdigest(), device
    return backbone.to(device)

# --------------------------------------------------------------------------------------------------
# Features.

@torch.inference_mode()
def extract_features(backbone, images, patch_tokens=False, batch=256, mean=False):
    """Features float32 [B, D] of images: uint8 [B, 3, H, W], or [H, W, 3] arrays of one size. For
    vision transformers, patch_tokens: (class tokens [B, D], patch tokens [B, N, D]); mean: class
    token and mean patch token, as DINOv2's linear evaluation, [B, 2 D]. UserError for floats."""
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    parts, device, mean = [], backbone.device, mean and hasattr(backbone, "blocks")
    for some in images.split(batch):
        x = network_input(some, (backbone.size, backbone.size), device)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):  # as DINOv2
            x = backbone.forward_features(x) if patch_tokens or mean else (backbone(x),)
        if mean:
            x = (torch.cat([x[0], x[1].mean(1)], dim=1),)
        parts.append([t.float().cpu() for t in x])
    tokens = tuple(map(torch.cat, zip(*parts)))
    return tokens if patch_tokens else tokens[0]

def kept_features(path: Path, n: int) -> Tensor | None:
    """Features [n, D] that embed wrote; None if they aren't there, or not as they were written."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checksums, which torch.load doesn't compare
        features = torch.load(path, weights_only=True)
        return features if not damaged and len(features) == n else None
    except Exception:  # a different type for each way in which a file can be wrong
        return None

def embed(label: str, backbone, cells: Cells, crop: int, out, log, mean=False) -> Tensor:
    """Features [n, D] of all cells. Kept in `out` under a name made of the content of weights,
    images, preprocessing: the next protocol costs seconds. UserError if they are not finite."""
    key = f"{backbone.digest}{cells.digest}{crop} {backbone.size} {backbone.device.type} {mean}"
    cache = Path(out or ".", "features", hashlib.sha256(key.encode()).hexdigest()[:32] + ".pt")
    if out and (kept := kept_features(cache, len(cells.label))) is not None:
        return kept
    parts, done, began, told = [], 0, time.monotonic(), 10
    for crops in crops_of(cells, crop, backbone.size):
        parts.append(extract_features(backbone, crops, mean=mean))
        done, took = done + len(crops), time.monotonic() - began
        if took > told:
            told, left = took + 10, took * (len(cells.file) / done - 1)
            log(f"{label}: {done:,} of {len(cells.file):,} cells, {left:.0f} s left")
    x = torch.cat(parts)
    if not x.isfinite().all():
        raise UserError(f"--weights {label}: some features are infinite or not a number; did its "
                        "training diverge?")
    log(f"{label}: {x.shape[1]} features of {done:,} cells in {time.monotonic() - began:.0f} s")
    if out:
        cache.parent.mkdir(exist_ok=True)
        write_aside(cache, x)
    return x

# --------------------------------------------------------------------------------------------------
# Classifiers on frozen features: probabilities [M, C].

def knn(train_x, train_y, test_x, k=20, n_classes=None, temp=0.07) -> Tensor:
    """k nearest neighbours of [M, D] among [N, D], int [N]: shares of the votes. By cosine, a vote
    weighing exp(cosine / temp), as in DINO; without temp by distance, votes alike."""
    n_classes, shares = n_classes or int(train_y.max()) + 1, []
    if temp:
        train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    for some in test_x.split(1024):  # so that the cosines take 4 KB per training cell, not 4 M
        near = some @ train_x.T if temp else -torch.cdist(some, train_x)
        near, nearest = near.topk(min(k, len(train_x)), dim=1)  # [m, k]
        votes = ((near - near[:, :1]) / (temp or math.inf)).softmax(1)
        votes = votes.new_zeros(len(some), n_classes).scatter_add_(1, train_y[nearest], votes)
        shares.append(votes)
    return torch.cat(shares)

def linear_probe(train_x, train_y, test_x, l2=1e-2, n_classes=None, standardise=True) -> Tensor:
    """Multinomial logistic regression: the minimum of mean cross-entropy + l2/2 |W|^2, on features
    [N, D], standardised, and int [N]. scikit-learn's C is 1 / (l2 N). A class that isn't there gets
    0. l2: one, or several, strongest first, for [l2, M, C]: each starts from the one before."""
    n_classes, strengths = n_classes or int(train_y.max()) + 1, np.atleast_1d(l2).tolist()
    present, y = train_y.unique(return_inverse=True)
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    std = torch.where((std > 1e-6 * mean.abs()) & standardise, std, 1)  # constant: stays about 0
    x, test_x = (train_x - mean) / std, (test_x - mean) / std
    # A ViT's features are so correlated that L-BFGS crawls. Along their principal axes, each scaled
    # by the root of its curvature (at most variance / 4, plus l2), it needs fewer passes for the
    # same minimum (Chula, 768 features, one core: 8 s; scikit-learn 27). Few cells, few axes.
    small = x if len(x) < x.shape[1] else torch.linalg.qr(x, "r")[1]
    _, s, axes = torch.linalg.svd(small, full_matrices=False)
    x, test_x, variance = x @ axes.T, test_x @ axes.T, s.square() / len(x)
    weight = x.new_zeros(len(present), x.shape[1])
    bias = x.new_zeros(len(present), requires_grad=True)
    probabilities = x.new_zeros(len(strengths), len(test_x), n_classes)
    for i, strength in enumerate(strengths):
        scale = (variance / 4 + strength).rsqrt()
        scaled = (weight / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled, bias], max_iter=1000, history_size=50, line_search_fn="strong_wolfe",
            tolerance_grad=1e-6, tolerance_change=torch.finfo(x.dtype).eps)

        def loss(optimizer=optimizer, scale=scale, scaled=scaled, strength=strength):
            optimizer.zero_grad()
            weight = scale * scaled
            value = F.cross_entropy(F.linear(x, weight, bias), y)
            value = value + strength / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        weight = (scale * scaled).detach()
        probabilities[i][:, present] = F.linear(test_x, weight, bias.detach()).softmax(1)
    return probabilities if np.ndim(l2) else probabilities[0]

def held_out(groups: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Which training cells [N] are for validation: a fifth of the groups; of one group, none."""
    return (group_folds(groups, labels, 5, seed) == 0) & (groups.min() < groups.max())

def weighted_f1(truth: np.ndarray, probs: Tensor) -> float:
    counts = confusion(truth, probs.argmax(1).cpu().numpy(), probs.shape[1])
    return float(scores(counts)["weighted_f1"])

def tuned_probe(train_x, train_y, test_x, groups: np.ndarray, n_classes: int, seed=0) -> Tensor:
    """linear_probe at the l2 with the best weighted F1 on held_out groups; the test has no say."""
    y, l2 = train_y.cpu().numpy(), 1e-2
    held = held_out(groups, y, seed)
    if held.any():
        found = linear_probe(train_x[~held], train_y[~held], train_x[held], L2, n_classes)
        l2 = L2[np.argmax([weighted_f1(y[held], probs) for probs in found])]
    return linear_probe(train_x, train_y, test_x, l2, n_classes)

# --------------------------------------------------------------------------------------------------
# Scores.

def confusion(truth: np.ndarray, guess: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts [true class, predicted class]."""
    counts = np.bincount(truth * n_classes + guess, minlength=n_classes**2)
    return counts.reshape(n_classes, n_classes)

def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of confusion matrices [..., C, C]; classes that never occur do not count."""
    hit, true, called = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    recall = hit / np.where(true, true, np.nan)
    f1 = 2 * hit / np.where(true + called, true + called, np.nan)
    return {"accuracy": hit.sum(-1) / true.sum(-1), "balanced_accuracy": np.nanmean(recall, -1),
            "macro_f1": np.nanmean(f1, -1), "weighted_f1": np.nansum(f1 * true, -1) / true.sum(-1)}

def auroc(truth: np.ndarray, score: np.ndarray, weights=(1.0,)) -> np.ndarray:
    """The chance that a positive scores above a negative, ties counting half, for each of the
    weightings (of [n], or one number): [R]; NaN unless there are both."""
    level, found = np.unique(score, return_inverse=True)[1], []
    for weight in weights:
        positive, negative = np.bincount(level, weight * truth), np.bincount(level, weight * ~truth)
        pairs = positive.sum() * negative.sum()
        wins = positive @ (negative.cumsum() - negative / 2)
        found.append(wins / pairs if pairs else math.nan)
    return np.array(found)

def bootstrap(n: int, seed: int) -> np.ndarray:
    """How often each of n groups counts, [1 + REPLICATES, n]: once; then as often as in n draws
    with replacement. A seed's draws are the same for all backbones: differences are paired."""
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(REPLICATES)]
    return np.stack([np.ones(n), *draws]).astype(np.float32)

def judge(truth: np.ndarray, probs: np.ndarray, group: np.ndarray, seed: int = 0) -> dict:
    """A result: what is to know about predictions [n, C]; "again": {metric: [1 + REPLICATES]}, as
    by bootstrap. A confusion matrix is a sum over groups, so a replicate's is a weighted one."""
    n_classes, guess = probs.shape[1], probs.argmax(1)
    group = np.unique(group, return_inverse=True)[1]
    counts = np.zeros((group.max() + 1, n_classes**2), np.float32)
    np.add.at(counts, (group, truth * n_classes + guess), 1)
    times, whole = bootstrap(len(counts), seed), confusion(truth, guess, n_classes)
    again = scores((times @ counts).astype(float).reshape(-1, n_classes, n_classes))
    if n_classes == 2 and whole.sum(1).all():
        again["auroc"] = auroc(truth == 1, probs[:, 1], (t[group] for t in times))
    recall = [row[c] / sum(row) if sum(row) else None for c, row in enumerate(whole.tolist())]
    return {"cells": len(truth), "recall": recall, "confusion": whole.tolist(), "again": again}

def averaged(results: list[dict]) -> dict:
    """A result: the mean and the standard deviation of several."""
    drawn = [result["again"] for result in results]
    again = {k: np.stack([a[k] for a in drawn]) for k in drawn[0] if all(k in a for a in drawn)}
    return {"deviation": {k: v[:, 0].std(ddof=1) for k, v in again.items()},
            "again": {k: v.mean(0) for k, v in again.items()}}

def study_auroc(has: np.ndarray, score: np.ndarray, seed: int) -> dict:
    """A result of studies' scores [S, C]: the mean AUROC over the classes that some have, bool
    [S, C], and some have not."""
    classes, times = np.flatnonzero(has.any(0) & ~has.all(0)), bootstrap(len(has), seed)
    if not len(classes):
        return {}
    each = np.stack([auroc(has[:, c], score[:, c], times) for c in classes])  # [C', 1 + REPLICATES]
    mean = torch.from_numpy(each).nanmean(0).numpy()  # over the classes that a replicate has, lacks
    return {"studies": len(has), "again": {"auroc": mean}}

def study_level(truth: np.ndarray, probs: np.ndarray, group: np.ndarray, seed: int) -> dict:
    """Results of studies (groups) by the mean or maximum of their members' probabilities [n, C]. A
    study is positive for a class if any member is."""
    study, members = np.unique(group, return_inverse=True)[1], torch.from_numpy(probs)
    has = np.zeros((study.max() + 1, probs.shape[1]), bool)
    has[study, truth] = True
    index, results = torch.from_numpy(study)[:, None].expand(probs.shape), {}
    for pool, how in (("mean", "mean"), ("maximum", "amax")):
        score = torch.zeros(has.shape, dtype=members.dtype)
        score = score.scatter_reduce(0, index, members, how, include_self=False).numpy()
        results[f"{pool} of a study"] = study_auroc(has, score, seed)
    return {name: result for name, result in results.items() if result}

# --------------------------------------------------------------------------------------------------
# Protocols: {name: result}.

class GatedAttention(nn.Module):
    """Slices, each with its place, pooled by weights of their own (Ilse et al. 2018, eq. 9)."""

    def __init__(self, dim: int, n_classes: int, width: int = 64):
        super().__init__()
        self.embed, self.look, self.gate, self.weight = (
            nn.Linear(n, m) for n, m in ((dim, width), (width, width), (width, width), (width, 1)))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_classes))
        self.register_buffer("waves", 2 ** -torch.arange(0, 4, 8 / width))  # of 6 to 100 slices

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """[S, L, D] and places [S, L], -1 where there is no slice, to logits [S, C]."""
        angle = place[:, :, None] * self.waves
        x = F.gelu(self.embed(x) + torch.cat([angle.sin(), angle.cos()], 2))
        weight = self.weight(self.look(x).tanh() * self.gate(x).sigmoid())
        weight = weight.masked_fill(place[:, :, None] < 0, -math.inf).softmax(1)  # [S, L, 1]
        return self.head((weight * x).sum(1))

def sequences(x: Tensor, y: Tensor, cells: Cells, some: np.ndarray) -> tuple[Tensor, ...]:
    """Studies of the cells `some`: features [S, L, D], places [S, L], what any slice has [S, C]."""
    some = some[np.lexsort((cells.place[some], cells.group[some]))]
    studies = np.split(some, np.flatnonzero(np.diff(cells.group[some])) + 1)
    places = [torch.from_numpy(cells.place[s] - cells.place[s[0]]) for s in studies]
    has = torch.stack([F.one_hot(y[s], int(y.max()) + 1).amax(0) for s in studies])
    slices = pad_sequence([x[s] for s in studies], True)
    return slices, pad_sequence(places, True, -1).to(x.device), has

def attend(train: tuple[Tensor, ...], test: tuple[Tensor, ...], seed: int) -> Tensor:
    """GatedAttention trained on sequences: probabilities of others [S, C], the mean of 3 networks.
    Features get noise: studies are few, and without it they are learnt by heart."""
    known, total = train[0][train[1] >= 0], 0
    x, test_x = ((some[0] - known.mean(0)) / (known.std(0) + 1e-6) for some in (train, test))
    for s in range(3):
        torch.manual_seed(seed + s)
        net = GatedAttention(x.shape[2], train[2].shape[1]).to(x.device)
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1, fused=True)
        for _ in range(300):
            logits = net(x + 0.5 * torch.randn_like(x), train[1])
            loss = F.binary_cross_entropy_with_logits(logits, train[2].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total = total + net(test_x, test[1]).detach().sigmoid()
    return total / 3

def studies(x: Tensor, cells: Cells, parts: list, seed: int) -> dict[str, dict]:
    """Studies from frozen features of their slices: a probe's probabilities pooled; and attention.
    Labels: study_label, or what any slice has."""
    label = cells.label if cells.study is None else cells.study
    y, tested = torch.from_numpy(label).to(x.device), np.concatenate([test for _, test in parts])
    probs = [tuned_probe(x[a], y[a], x[b], cells.group[a], label.max() + 1, seed) for a, b in parts]
    results = study_level(label[tested], torch.cat(probs).cpu().numpy(), cells.group[tested], seed)
    has, score = [], []
    for train, test in parts:
        train, test = (sequences(x, y, cells, some) for some in (train, test))
        score.append(attend(train, test, seed).cpu())
        has.append(test[2].cpu().bool())
    results["attention"] = study_auroc(torch.cat(has).numpy(), torch.cat(score).numpy(), seed)
    return {f"study: {name}": result for name, result in results.items() if result}

def release(x: Tensor, cells: Cells, seed: int) -> dict[str, dict]:
    """RedDino's own evaluation, for a number beside the paper's: features as they are, mean of 5
    folds of cells. Smears are on both sides, which flatters."""
    y, n_classes = torch.from_numpy(cells.label).to(x.device), len(cells.classes)
    fold, results = stratified_folds(cells.label, 5), {}
    for f in range(5):
        a, b = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        l2 = 100 / (x.shape[1] * n_classes * len(a))  # C = D x classes / 100
        probs = {f"release, {k}-NN": knn(x[a], y[a], x[b], k, n_classes, None) for k in (1, 20)}
        probs["release, logistic"] = linear_probe(x[a], y[a], x[b], l2, n_classes, False)
        for name, p in probs.items():
            result = judge(cells.label[b], p.cpu().numpy(), cells.group[b], seed)
            results.setdefault(name, []).append(result)
    return {name: averaged(found) for name, found in results.items()}

def few_shot(x: Tensor, y: Tensor, cells: Cells, parts: list, shots: int, seed: int) -> dict:
    """A result: linear probes on `shots` random training cells a class, DRAWS times, each on the
    next fold; {} where a class has fewer."""
    drawn, n_classes = [], len(cells.classes)
    for draw in range(DRAWS):
        train, test = parts[draw % len(parts)]
        train = np.random.default_rng([seed, draw]).permutation(train)
        some = np.concatenate([train[cells.label[train] == c][:shots] for c in range(n_classes)])
        if len(some) < shots * n_classes:
            return {}
        probs = linear_probe(x[some], y[some], x[test], FEWSHOT_L2, n_classes).cpu().numpy()
        drawn.append(judge(cells.label[test], probs, cells.group[test], seed + draw % len(parts)))
    return {"shots": shots} | averaged(drawn)

def measure(x, cells: Cells, parts: list, protocols, seed: int, tunes=None) -> dict[str, dict]:
    """All of one backbone's features [n, D] on one way to split the cells; each test cell counts
    once. tunes: {kind: function(train, test)}, see fine_tune."""
    y, n_classes, probs = torch.from_numpy(cells.label).to(x.device), len(cells.classes), {}
    tested, results, trained = np.concatenate([test for _, test in parts]), {}, {}
    if "knn" in protocols:
        for k in (1, 20):
            probs[f"{k}-NN"] = [knn(x[a], y[a], x[b], k, n_classes) for a, b in parts]
    if "linear" in protocols:
        probs["linear probe"] = [tuned_probe(x[a], y[a], x[b], cells.group[a], n_classes, seed)
                                 for a, b in parts]
    for kind, tune in (tunes or {}).items():
        name, tuned = f"fine-tuned, {kind}", [tune(train, test) for train, test in parts]
        probs[name], trained[name] = [found[0] for found in tuned], {"trained": tuned[0][2]}
    for name, found in probs.items():
        given = cells.label[tested], torch.cat(found).cpu().numpy(), cells.group[tested], seed
        results[name] = judge(*given) | trained.get(name, {})
        if cells.by == "group" and name != "1-NN":  # which has no probabilities to pool
            results |= {f"{name}, {pool}": row for pool, row in study_level(*given).items()}
    if "study" in protocols:
        results |= studies(x, cells, parts, seed)
    if "fewshot" in protocols:
        results |= {f"few-shot, {n} a class": few_shot(x, y, cells, parts, n, seed) for n in SHOTS}
    return {name: result for name, result in results.items() if result}

def knn_monitor(tables: list[str], size: int, window=None, crop: int = 80):
    """For reddino.py --eval-data: monitor(backbone, device) gives {"knn": weighted F1 of 20-NN on
    the first table, "knn1": on the second, ...}. Tables and images are read once."""
    sets = []
    for table in tables:
        cells = read_cells(table, window=window)
        parts = next(iter(make_splits(cells, 5, 0, quiet).values()))
        sets.append((cells, torch.cat(list(crops_of(cells, crop, size))), parts))

    def monitor(backbone: VisionTransformer, device: torch.device) -> dict[str, float]:
        found, backbone = {}, copy.deepcopy(backbone).float().eval()
        backbone.size, backbone.device = size, device
        for i, (cells, crops, parts) in enumerate(sets):
            x, y = extract_features(backbone, crops), torch.from_numpy(cells.label)
            probs = [knn(x[a], y[a], x[b], 20, len(cells.classes)) for a, b in parts]
            truth = np.concatenate([cells.label[test] for _, test in parts])
            found[f"knn{i or ''}"] = weighted_f1(truth, torch.cat(probs))
        return found

    return monitor

def compare(found: dict[str, dict], split: str) -> tuple[list, list]:
    """{backbone: {protocol: result}} to rows, with intervals, and to differences of all pairs."""
    def interval(again):
        return np.nanpercentile(again[1:], [2.5, 97.5]).tolist()

    rows, pairs = [], []
    for protocol in dict.fromkeys(itertools.chain(*found.values())):
        place = {"protocol": protocol, "split": split}
        block = {label: dict(by[protocol]) for label, by in found.items() if protocol in by}
        again = {label: result.pop("again") for label, result in block.items()}
        for a, result in block.items():
            values = {k: float(v[0]) for k, v in again[a].items()}
            ends = {"interval": {k: interval(v) for k, v in again[a].items()}}
            rows.append(place | {"weights": a} | values | result | ends)
            for b, k in itertools.product(block, again[a]):
                gap = again[a][k] - again[b][k]
                row = {"weights": a, "minus": b, "metric": k, "difference": float(gap[0])}
                if a != b:
                    pairs.append(place | row | {"interval": interval(gap)})
    return rows, pairs

def check_options(options: dict, crop, folds, size, window, folders):
    """UserError or OSError, before any work."""
    for name, values in options.items():
        if unknown := set(values) - set(CHOICES[name]):
            raise UserError(f"--{name} {min(unknown)}: choose from {', '.join(CHOICES[name])}")
    if crop < 2 or folds < 2 or (size or 1) < 1:
        raise UserError("--crop and --folds have to be at least 2, and --size at least 1")
    check_window(window)
    if folders[1] and not importlib.util.find_spec("matplotlib"):
        raise UserError("--figures needs matplotlib: pip install matplotlib")
    for folder in filter(None, folders):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can it be written to?

def evaluate(data, weights, protocols=PROTOCOLS, crop=80, out=None, device="auto", size=None,
             seed=0, log=print, drop_labels=(), folds=5, finetune=(), figures=None, window=None,
             heads=None, features="cls") -> dict:
    """Score backbones on labelled cells; the table goes to `log`; returns what results.json holds.
    Options: as on the command line; weights may be {name in the table: path or name}; out=None
    writes nothing. Raises UserError, and OSError where a folder can't be written to."""
    def say(text):
        log(printable(text, 1000))

    options = {"protocols": protocols, "finetune": finetune, "features": [features]}
    check_options(options, crop, folds, size, window, (out, figures))
    weights = weights if isinstance(weights, dict) else {str(w): w for w in weights}
    backbones = dict.fromkeys(weights)
    for label, name in sorted(weights.items(), key=lambda item: str(item[1]) == "random"):
        like = next((b for b in backbones.values() if isinstance(b, VisionTransformer)), None)
        backbones[label] = load_backbone(name, size, device, like, seed, heads)
    cells = read_cells(str(data), drop_labels, window, say)
    if "study" in protocols and cells.by != "group":
        raise UserError("--protocols study: column `group` has to say which study a slice is of")
    found = {label: embed(label, backbone, cells, crop, out, say, features == "cls+mean")
             for label, backbone in backbones.items()}
    crops = torch.cat(list(crops_of(cells, crop, 224))) if finetune else None  # 19 KB each at 80
    blocks, once = [], set(protocols)
    for split, parts in make_splits(cells, folds, seed, say).items():
        results = {}
        for label, backbone in backbones.items():
            began, x, tunes = time.monotonic(), found[label].to(backbone.device), {}
            for kind in finetune:
                if backbone.state_dict() and (kind != "lora" or hasattr(backbone, "blocks")):
                    tunes[kind] = partial(fine_tune, backbone, crops, cells, kind=kind, seed=seed,
                                          log=say)
            results[label] = measure(x, cells, parts, once, seed, tunes)
            say(f"{label}: {split}, {time.monotonic() - began:.0f} s")
        blocks.append(compare(results, split))
        once -= {"fewshot"}  # whose draws are of the first split
    if "release" in protocols:
        results = {label: release(x, cells, seed) for label, x in found.items()}
        blocks.append(compare(results, "5 folds of cells"))
    rows, pairs = (list(itertools.chain(*some)) for some in zip(*blocks))
    results = dict(data=str(data), crop=crop, window=window, seed=seed, cells=len(cells.label),
                   images=len(cells.files), groups=len(set(cells.group)), classes=cells.classes,
                   sources=cells.sources, skipped=cells.skipped, rows=rows, pairs=pairs)
    if out:
        write_results(results, out)
    log(as_table(results, *(("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", ""))))
    if figures:
        from figures import draw_figures

        draw_figures(figures, results, found, backbones, cells, seed, say)
    return results

# --------------------------------------------------------------------------------------------------
# What a person sees.

def as_table(results: dict, bold: str, plain: str) -> str:
    """Markdown, a table for each protocol and split, its best line between `bold` and `plain`."""
    def text(value, ends):
        return f"{100 * value:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"

    lines, blocks = ["", "In %, with 95% intervals by groups; ±: deviation of draws or folds."], {}
    gaps = {(*list(pair.values())[:5],): pair for pair in results["pairs"]}
    for row in results["rows"]:
        blocks.setdefault((row["protocol"], row["split"]), []).append(row)
    for title, rows in blocks.items():
        lead = "weighted_f1" if "weighted_f1" in rows[0] else "auroc"  # ranks, shows how sure it is
        best = max(rows, key=lambda row: row[lead])["weights"]
        shown = [k for k in SCORES if k in rows[0]]
        more = ["trained"] if "trained" in rows[0] else []
        table = [[", ".join(title), *map(SCORES.get, shown), *more, "minus the best"]]
        table.append(["---"] * len(table[0]))
        for row in rows:
            line = {k: f"{100 * row[k]:.1f}" for k in shown} | {k: f"{row[k]:,}" for k in more}
            line[lead] = text(row[lead], row["interval"][lead])
            if "deviation" in row:
                line[lead] += f" ± {100 * row['deviation'][lead]:.1f}"
            gap = gaps.get((*title, row["weights"], best, lead))
            last = text(gap["difference"], gap["interval"]) if gap else "best"
            name = printable(row["weights"]).replace("|", "\\|")
            start, end = (bold, plain) if row["weights"] == best else ("", "")
            table.append([start + cell + end for cell in (name, *line.values(), last)])
        widths = [max(map(len, column)) for column in zip(*table)]
        lines += ["", *("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table)]
    return "\n".join([*lines, ""])

def write_results(results: dict, out):
    """results.json: everything; results.csv: a line a row; results.md: the table; skipped.txt."""
    skipped = "".join(f"{BadImage(*bad)}\n" for bad in results["skipped"].items())
    Path(out, "results.json").write_text(json.dumps(results, indent=1))
    Path(out, "results.md").write_text(as_table(results, "**", "**"), "utf-8")
    Path(out, "skipped.txt").write_text(skipped, "utf-8")
    names = ["protocol", "split", "weights", *SCORES]
    names += [f"{k}_{end}" for k in SCORES for end in ("low", "high")]
    with open(Path(out, "results.csv"), "w", newline="", errors="backslashreplace") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore")
        table.writeheader()
        for row in results["rows"]:
            for k, (low, high) in row["interval"].items():
                row = row | {f"{k}_low": low, f"{k}_high": high}
            table.writerow(row)

# --------------------------------------------------------------------------------------------------
# Fine-tuning: Fine-tuning, beside which eval.py's frozen features are judged: all of a backbone, a
# head alone, or low-rank adapters, for whom labels are few and the backbone is good (Surgical-DINO,
# Cui et al. 2024, adapts DINOv2 so). `eval.py --finetune full head lora` scores them with the same
# folds.

FEW = 8  # times the lr of all weights, for heads and adapters alone (drawn stripes: of 2 to 20)

class LowRank(nn.Module):
    """LoRA (Hu et al. 2021): a fixed W + up @ down, of rank 8. up is 0 at first."""

    def __init__(self, weight: Tensor, rank: int = 8):
        super().__init__()
        self.down = nn.Parameter(torch.randn_like(weight[:rank]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros_like(weight[:, :rank]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down

def trained_parts(net: nn.Module, kind: str, lr: float, decay: float = 0.75) -> list[dict]:
    """What the optimiser trains of a backbone. full: all, a block's lr `decay` times that of the
    block above, as in BEiT and MAE: what is near the pixels is general. lora: adapters of qkv and
    proj, at FEW lr. head: nothing."""
    net.requires_grad_(kind == "full")
    if kind == "lora":
        for attn in [block.attn for block in net.blocks]:
            for linear in (attn.qkv, attn.proj):
                parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
    top, parts = len(getattr(net, "blocks", ())) + 1, []
    for name, p in net.named_parameters():
        number = re.match(r"blocks\.(\d+)", name)
        layer = int(number[1]) + 1 if number else top * name.startswith("norm")  # 0: the patches
        rate = decay ** (top - layer) if kind == "full" else FEW
        if p.requires_grad:
            parts.append({"params": [p], "lr": lr * rate})
    return parts

def merge(net: nn.Module):
    """Adapters into the weights: a network like any other."""
    for layer in [layer for layer in net.modules() if parametrize.is_parametrized(layer)]:
        parametrize.remove_parametrizations(layer, "weight")

def fine_tune(backbone, crops: Tensor, cells: Cells, train: np.ndarray, test: np.ndarray,
              kind="full", seed=0, epochs=30, lr=5e-4, patience=5, log=print) -> tuple:
    """Train a linear head and, of the backbone, trained_parts, on crops[train], uint8 [n, 3, h, w].
    Keeps the epoch with the best weighted F1 on held_out groups, stops `patience` later (numbers:
    guesses). Returns probabilities of crops[test], the network, adapters merged into its weights,
    and how many numbers were trained."""
    from torchvision.transforms import v2

    torch.manual_seed(seed)
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
                          v2.ColorJitter(0.2, 0.2)])
    net, device, truth = copy.deepcopy(backbone), backbone.device, cells.label
    held = held_out(cells.group[train], truth[train], seed)
    fit, check = train[~held], train[held] if held.any() else train
    head = nn.Linear(extract_features(net, crops[:1]).shape[1], len(cells.classes)).to(device)
    rate = lr if kind == "full" else FEW * lr
    parts = [{"params": [p], "lr": rate} for p in head.parameters()] + trained_parts(net, kind, lr)
    optimizer = torch.optim.AdamW(parts, lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    both, best, waited, began = nn.ModuleList([net, head]), -1.0, 0, time.monotonic()

    def answers(which):
        with torch.inference_mode():
            return head(extract_features(net, crops[which]).to(device)).softmax(1).cpu()

    while schedule.last_epoch < epochs and waited < patience:
        net.train()
        for some in torch.from_numpy(fit)[torch.randperm(len(fit))].split(64):
            seen = torch.stack([augment(crop) for crop in crops[some]])
            x, y = network_input(seen, (net.size, net.size), device), torch.from_numpy(truth[some])
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(head(net(x)).float(), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        net.eval()
        score, waited = weighted_f1(truth[check], answers(check)), waited + 1
        if score > best:
            best, waited, kept = score, 0, copy.deepcopy(both.state_dict())
        if schedule.last_epoch == 1:
            took = f"{time.monotonic() - began:.0f} s each"
            log(f"fine-tuning ({kind}), {len(fit):,} cells: {epochs} epochs or fewer, {took}")
    both.load_state_dict(kept)
    merge(net)
    return answers(test), net, sum(part["params"][0].numel() for part in parts)

# --------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="a CSV or a folder of class folders")
    add("--weights", required=True, nargs="+", help="paths, names, random, pixels, colour")
    add("--protocols", nargs="+", default=PROTOCOLS, help="of knn, linear, fewshot (these), study "
        "(attention over the slices of a group), release (RedDino's own evaluation)")
    add("--crop", type=int, default=80, help="side of the square around a cell in pixels (80)")
    add("--out", default="out/eval", help="folder of results and cached features (out/eval)")
    add("--window", nargs=2, type=float, metavar=("LEVEL", "WIDTH"), help="what is seen of deep "
        "grey, in its units")
    add("--size", type=int, help="the network's input in pixels (as trained, at most 224)")
    add("--heads", type=int, help="of a ViT's attention, where its width doesn't tell")
    add("--features", default="cls", help="cls or cls+mean: with the mean patch token (cls)")
    add("--drop-label", nargs="+", default=[], dest="drop_labels", help="classes to leave out")
    add("--folds", type=int, default=5, help="5")
    add("--finetune", nargs="+", default=[], help="also train, once a fold: full, head, lora")
    add("--figures", metavar="DIR", help="draw figures into DIR; needs matplotlib")
    add("--seed", type=int, default=0, help="of folds, draws and `random`")
    add("--device", default="auto", help="cuda, mps, cpu (the first that is there)")
    # One line, without the usage.
    parser.error = lambda text: parser.exit(2, f"eval.py: error: {printable(text, 2000)}\n")
    try:
        evaluate(**vars(parser.parse_args(argv)), log=lambda text: print(text, flush=True))
    except (UserError, BadImage, OSError) as error:
        parser.error(error)

if __name__ == "__main__":
    main()
