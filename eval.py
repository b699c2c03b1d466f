"""How good is a backbone? Freeze it, describe each labelled cell by it, ask simple classifiers.

    python eval.py --data cells.csv --weights out/backbone.pth dinov2_vits14 random pixels colour

--data     a CSV of image, label; where an image holds many cells, x, y (the centre in pixels) or
           xmin, xmax, ymin, ymax; if known, group (patient), source (hospital, stain), split
           (train, test, val), study_label (of a whole group), slice (an image's place in it). Or
           folders: CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png.
--weights  files of ours, DINOv2, RedDino, timm; dinov2_vits14, hf_hub:OWNER/NAME, resnet50; and to
           compare with: random, an untrained network of the same shape; pixels, 16 x 16; colour, a
           histogram: who scores like it detects stains.

Why frozen: a small classifier can only use what is there, so the score is the backbone's own. Why
groups: cells of a smear share stain, focus and patient. So a group (or image) is never on both
sides; and as its cells err together, 95% intervals come from drawing groups anew.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

import augment
import reddino
from augment import MEAN, STD, BadImage, UserError

PROTOCOLS = ("knn", "linear", "fewshot")  # what is done by default
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strengths that the linear probe chooses from
SHOTS, DRAWS, FEWSHOT_L2 = (1, 5, 10, 50), 20, 0.1  # the best of 1, 0.1, 0.01 on Chula
SIZES, BINS = {"pixels": 16, "colour": 64}, 32  # inputs of these baselines; a channel's bins

def printable(text, most=60):
    """One line without terminal escapes, newlines, broken UTF-8."""
    text = str(text) if len(str(text)) <= most else f"{str(text)[:most]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def quiet(text):
    """A log that nobody reads."""

# ----------------------------------------
# Labels. Whatever the layout, cells end as parallel arrays, an entry for each row of the table,
# sorted by image, so that each image is decoded once.

@dataclass
class Cells:
    files: list[str]  # the images; arrays are [n]
    file: np.ndarray  # index into files, ascending
    centre: np.ndarray  # [n, 2]: x, y in pixels; NaN: the image is the cell
    label: np.ndarray  # index into classes
    classes: list[str]
    image: np.ndarray  # the same number: the same pixels
    group: np.ndarray  # the same number: stay together
    by: str = "image"  # what groups are: images, patients (of DICOM), or the table's "group"
    source: np.ndarray | None = None  # index into sources
    sources: list | tuple = ()
    split: np.ndarray | None = None  # "train", "test" or neither
    study: np.ndarray | None = None  # index of study_label
    place: np.ndarray | None = None  # grows along the slices of a group
    skipped: dict | None = None  # files that can't be read: why
    window: tuple | None = None  # level and width, see read_image

SPLIT, NUMBER = "(train|test|val)(ing|id|idation)?", r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
CENTRE, BOX = ("x", "y"), ("xmin", "xmax", "ymin", "ymax")
CORNERS = {"x1": "xmin", "x2": "xmax", "y1": "ymin", "y2": "ymax"}  # as others call them
NOWHERE = [math.nan, math.nan]
COLUMNS = dict.fromkeys(("image", "label", "group", "source", "study_label"), ".+")
COLUMNS |= dict.fromkeys((*CENTRE, *BOX, "slice"), NUMBER) | {"split": SPLIT}

def csv_rows(path, log):
    """The rows of a CSV as {column: text}, with "file" and "centre". UserError: what is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)  # or an open quote would swallow rows
            lines = [(reader.line_num, values) for values in reader if any(values)] or [(1, [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        quote = isinstance(error, csv.Error)
        where = f", up to line {reader.line_num} (a quote too many?)" if quote else ""
        raise UserError(f"{path} can't be read as a CSV in UTF-8{where}: {error}") from None
    names = [re.sub("[ -]", "_", name.strip().lower()) for name in lines.pop(0)[1]]
    names = [re.sub("^([xy])_", r"\1", name) for name in names]  # x_min
    names = [CORNERS.get(name, name) for name in names]
    where = next((some for some in (CENTRE, BOX) if set(some) & set(names)), ())
    corner = where == CENTRE and {"w", "h", "width", "height", *BOX} & set(names)
    missing = {"image", "label", *where} - set(names)
    if corner or missing or any(names.count(name) > 1 for name in COLUMNS):
        raise UserError(f"{path} has the columns {', '.join(names)}. It needs, between commas and "
                        "once: image, label; of cells in images also x, y (the centre; without "
                        "width, height or box) or xmin, xmax, ymin, ymax")
    if unused := [name for name in names if name not in COLUMNS]:
        log(f"{path}: columns not used: {', '.join(unused)}")
    rows = []
    for number, values in lines:
        row = dict(zip(names, map(str.strip, values)))
        file = os.path.join(os.path.dirname(path), row.get("image", ""))
        file = file if os.path.lexists(file) else file.replace("\\", "/")  # from Windows
        wrong = [f"{name} is {value!r}" for name, value in row.items()
                 if not re.fullmatch(COLUMNS.get(name, ".*"), value, re.S | re.I)]
        if len(values) < len(names) or any(values[len(names):]):
            wrong = ["more or fewer values than names; a value with a comma stands in quotes"]
        elif not os.path.lexists(augment.file_and_frame(file)[0]):
            wrong.append(f"image {file} is not there")
        if wrong:
            raise UserError(f"{path}, line {number}: {wrong[0]}")
        place = np.array([row[name] for name in where] or NOWHERE, float)
        rows.append(row | {"file": file, "centre": place.reshape(2, -1).mean(1)})
    return rows

def folder_rows(data, log):
    """A row for each image in FOLDER/CLASS, or in FOLDER/train/CLASS and FOLDER/test/CLASS."""
    notes = []
    files = augment.find_images(data, notes)
    folders = [Path(file).relative_to(data).parts[:-1] for file in files]
    parts = {names[0] for names in folders if names and re.fullmatch(SPLIT, names[0], re.I)}
    if len({part[:3].lower() for part in parts}) < 2:
        parts, folders = {""}, [("", *names) for names in folders]
    rows = [{"file": file, "split": names[0], "label": names[1], "centre": NOWHERE}
            for file, names in zip(files, folders) if len(names) > 1 and names[0] in parts]
    if len(rows) < len(files):
        used = ", ".join(sorted(parts)) or "folders of classes"
        notes.append(f"{data}: only {used} are used, {len(files) - len(rows)} images are elsewhere")
    for note in notes:
        log(note)
    return rows

def look(file, window):
    """What to know of an image, or the BadImage that it is."""
    try:
        image = augment.read_image(file, window=window)
    except BadImage as bad:
        return bad
    content = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
    return {"shape": image.shape[1::-1], "image": content, "patient": augment.dicom_group(file)}

def column(rows, name, kind=str):
    """A column's different values, and the index of each cell's; [], None where a cell has none."""
    values = np.array([kind(row[name]) for row in rows if row.get(name)], object)
    different, index = np.unique(values, return_inverse=True)
    return (different.tolist(), index) if len(index) == len(rows) else ([], None)

def read_cells(data, drop_labels=(), window=None, log=quiet):
    """Cells of a CSV or of class folders. UserError: what would make their scores meaningless."""
    rows = folder_rows(data, log) if os.path.isdir(data) else csv_rows(data, log)
    labels = {row["label"] for row in rows}
    if unknown := set(drop_labels) - labels:
        raise UserError(f"--drop-label {min(unknown)}: labels are {', '.join(sorted(labels))}")
    rows = [row for row in rows if row["label"] not in drop_labels]
    files = sorted({row["file"] for row in rows})
    looks = dict(zip(files, augment.in_threads(lambda file: look(file, window), files)))
    if bad := {file: seen.reason for file, seen in looks.items() if isinstance(seen, BadImage)}:
        text = f"{len(bad)} of {len(files)} images can't be read: {looks[min(bad)]}"
        log(text)
        if 2 * len(bad) > len(files):
            raise UserError(text)
    rows = [row | looks[row["file"]] for row in rows if row["file"] not in bad]
    unknown = {row["file"] for row in rows if not (row["patient"] or row.get("group"))}
    if 0 < len(unknown) < len(files) - len(bad):
        log(f"{len(unknown)} images name no patient: each counts as one, e.g. {min(unknown)}")
        for row in rows:
            row["patient"] = row["patient"] or row["image"]
    rows.sort(key=lambda row: row["file"])
    classes, label = column(rows, "label")
    if len(classes) < 2:
        raise UserError(f"{data}: {len(rows)} cells, not of two classes; see --data in --help")
    files, file = column(rows, "file")
    sources, source = column(rows, "source")
    by = next(name for name in ("group", "patient", "image") if column(rows, name)[0])
    centre, shape = (np.array([row[name] for row in rows]) for name in ("centre", "shape"))
    place = column(rows, "slice", float)[1]
    image, group, study = (column(rows, name)[1] for name in ("image", by, "study_label"))
    parts = np.array([row.get("split", "")[:3].lower() for row in rows])
    tested = parts == ("tes" if "tes" in parts else "val")
    split = np.select([parts == "tra", tested], ["train", "test"], "") if any(parts) else None
    cells = Cells(files, file, centre, label, classes, image, group, by, source, sources, split,
                  study, file if place is None else place, bad, window)
    if problem := problem_of(cells, shape):
        raise UserError(f"{data}: {problem}")
    return cells

def problem_of(cells, shape):
    """What would make scores of these cells meaningless, or None."""
    counts, groups = np.bincount(cells.label), len(set(cells.group))
    outside = ((cells.centre < 0) | (cells.centre > shape)).any(1)
    if outside.any():
        i = outside.argmax()
        return (f"{cells.centre[i].tolist()} is outside of {cells.files[cells.file[i]]}, of "
                f"{shape[i].tolist()} pixels")
    if counts.min() < 2:
        return (f"class {cells.classes[counts.argmin()]!r} has one cell, which can't be both "
                "learnt and tested; label more of it or leave it out with --drop-label")
    if cells.split is None and groups < 2:
        return f"all cells are of one {cells.by}"
    if cells.centre.max() <= 1:
        return "x and y look like fractions of the image's size, not pixels"
    if cells.study is not None and len({*zip(cells.group, cells.study)}) > groups:
        return "study_label has two values in one group"

# ----------------------------------------
# Crops, and ways to split them.

def resize(images, size):
    """uint8 [B, 3, H, W] to [B, 3, *size], bicubic, antialiased; size may be a side."""
    images = images.contiguous(memory_format=torch.channels_last)  # resized 8 times as fast
    return F.interpolate(images, size, mode="bicubic", antialias=True)

def cut(path, centres, crop, size, window=None):
    """The cells of a file at centres [k, 2]: uint8 [k, 3, side, side], side at most `size`; for NaN
    all of the file, its shape kept. Beyond the border the edge goes on: black would be a hint."""
    image = torch.from_numpy(augment.read_image(path, window=window)).permute(2, 0, 1)[None]
    if np.isnan(centres).any():
        longer = max(image.shape[2:])
        image = resize(image, [max(round(n * size / longer), 1) for n in image.shape[2:]])
        crop, centres = size, np.full_like(centres, [n // 2 for n in image.shape[:1:-1]])
    high, wide = image.shape[2:]
    cells = []
    for x, y in np.rint(centres).astype(int) - crop // 2:
        rows = torch.arange(y, y + crop).clamp(0, high - 1)
        cell = image[:, :, rows[:, None], torch.arange(x, x + crop).clamp(0, wide - 1)]
        cells.append(resize(cell, size) if crop > size else cell)
    return torch.cat(cells)

def crops_of(cells, crop, size):
    """Yields all cells in order, uint8 [b, 3, side, side], about 256 at a time; see cut."""
    def read(f):
        return cut(cells.files[f], centres[f], crop, size, cells.window)

    files = range(len(cells.files))
    centres = np.split(cells.centre, np.searchsorted(cells.file, files[1:]))  # of each file
    batch = math.ceil(256 * len(files) / len(cells.file))
    with ThreadPoolExecutor() as pool:
        for first in files[::batch]:
            yield torch.cat(list(pool.map(read, files[first:first + batch])))

def network_input(images, size, device):
    """uint8 [B, 3, H, W] to float32 [B, 3, *size], normalised as DINOv2's weights expect."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise UserError(f"images have to be uint8 (0 to 255) [B, 3, H, W], not {images.dtype} "
                        f"{list(images.shape)}; of 0..1: (255 * x).byte()")
    return augment.normalise(resize(images, size), device, torch.float32)

def group_folds(groups, labels, k=5, seed=0):
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

def make_splits(cells, folds, seed, log=print):
    """{name: [(training cells, test cells), ...]}: k folds or the data's own split; and each source
    left out in turn: does it work on our microscope?"""
    fold, splits = group_folds(cells.group, cells.label, folds, seed), {}
    k = fold.max() + 1
    tests = [(f"{k} folds by {cells.by}", fold == f) for f in range(k)]
    learn = ask = np.ones(len(fold), bool)
    if cells.split is not None:
        learn, ask = cells.split == "train", cells.split == "test"
        tests = [("the given split", ask)]
    tests += [("one source left out", cells.source == s) for s in range(len(cells.sources))]
    for name, part in tests:
        test, train = np.flatnonzero(ask & part), np.flatnonzero(learn & ~part)
        known = np.isin(cells.group[train], cells.group[test])
        known |= np.isin(cells.image[train], cells.image[test])
        if known.any():
            log(f"{name}: {known.sum()} cells are not trained on: their image or group is tested")
        if len(test) and not known.all():
            splits.setdefault(name, []).append((train[~known], test))
        elif len(test):
            log(f"{name}: {len(test)} cells are not tested: none is left to learn from")
    if not splits:
        raise UserError("no cells are left to train on or to test on: add images; where `split` "
                        "is given, of both train and test")
    if not (ask | learn).all():
        log(f"{(~(ask | learn)).sum()} cells are neither of train nor of the tested split")
    for (name, parts), (c, own) in itertools.product(splits.items(), enumerate(cells.classes)):
        if not any((cells.label[a] == c).any() and (cells.label[b] == c).any() for a, b in parts):
            log(f"{name}: class {own!r} is never both learnt and tested")
    if len(set(cells.group[ask])) < 10:
        log(f"fewer than 10 {cells.by}s are tested: don't trust the intervals")
    return splits

# ----------------------------------------
# Backbones: modules that map normalised images [B, 3, S, S] to features [B, D].

class Colour(nn.Module):
    """How much of each colour, nothing of where: histograms of R, G and B. (Of counts the square
    root, so that the cosine of two histograms is their overlap.)"""

    def forward(self, x):
        mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        bins = ((x * std + mean) * BINS).long().clamp(0, BINS - 1).flatten(2)  # [B, 3, S S]
        counts = x.new_zeros(len(x), 3, BINS).scatter_add_(2, bins, torch.ones_like(x).flatten(2))
        return counts.flatten(1).sqrt() / x.shape[3]  # [B, 3 BINS]

def untrained(like):
    """A random network. LayerScale is 1: at DINOv2's 1e-5 all class tokens would be alike."""
    if like is None:
        return reddino.build_vit("nano", 64, layerscale=1.0)
    block, stem = like.blocks[0], "convs" if "stem" in like.patch_embed else "linear"
    return type(like)(like.img_size, like.patch_size, like.embed_dim, len(like.blocks),
                      block.attn.heads, hasattr(block.mlp, "w12"), layerscale=1.0, stem=stem)

def make_backbone(name, like, heads):
    import torchvision.models as zoo  # takes a second, which a demo need not wait for
    own = {"pixels": nn.Flatten, "colour": Colour, "random": lambda: untrained(like)}
    if os.path.isfile(name) or name in reddino.DINOV2 or name.startswith("hf_hub:"):
        return reddino.vit_from_state(reddino.read_backbone(name), heads=heads)
    if name in own:
        return own[name]()
    if name not in zoo.list_models(module=zoo):
        known = ", ".join([*own, *reddino.DINOV2])
        raise UserError(f"--weights {name}: no such file, nor one of torchvision's, {known}")
    try:
        model = zoo.get_model(name, weights="DEFAULT")
    except Exception as error:  # a different type for each way in which a file can be wrong
        raise UserError(f"--weights {name}: not to be had, or damaged in {torch.hub.get_dir()}: "
                        f"delete it there ({error})") from None
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    model.set_submodule(layers[-1], nn.Identity())  # features: what tells ImageNet's classes
    return model

def load_backbone(name, size=None, device="auto", like=None, seed=0, heads=None):
    """A frozen backbone, [B, 3, size, size] to features [B, D], with .size and .device. name, size,
    heads: as on the command line; like: whose shape `random` takes. Raises UserError."""
    name, device = str(name), reddino.choose_device(reddino.configure(device=device))[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(name, like, heads).eval().requires_grad_(False)
    patch = getattr(backbone, "patch_size", 1)
    default = min(getattr(backbone, "img_size", 224), 224) // patch * patch
    backbone.size = SIZES.get(name) or size or default
    if backbone.size % patch:
        raise UserError(f"--size {size}: {name} takes multiples of its patch size, {patch}")
    backbone.device = device
    return backbone.to(device)

@torch.inference_mode()
def extract_features(backbone, images, mean=False):
    """Features float32 [B, D] of images: uint8 [B, 3, H, W], or [H, W, 3] arrays of one size.
    mean: a ViT's class token and mean patch token, [B, 2 D], as DINOv2's linear evaluation."""
    if not torch.is_tensor(images):
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    parts, device = [], backbone.device
    for some in images.split(256):
        x = network_input(some, backbone.size, device)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):  # as DINOv2
            if mean and hasattr(backbone, "blocks"):
                cls, patches = backbone.forward_features(x)
                x = torch.cat([cls, patches.mean(1)], 1)
            else:
                x = backbone(x)
        parts.append(x.float().cpu())
    return torch.cat(parts)

def embed(label, backbone, cells, crop, log, mean=False):
    """Features [n, D] of all cells. UserError if they are not finite."""
    x = torch.cat([extract_features(backbone, crops, mean=mean)
                   for crops in crops_of(cells, crop, backbone.size)])
    if not x.isfinite().all():
        raise UserError(f"--weights {label}: some features are not finite; did training diverge?")
    log(f"{label}: {x.shape[1]} features of {len(x):,} cells")
    return x

# ----------------------------------------
# Classifiers on features [N, D] with classes int [N]: probabilities of others, [M, C].

def knn(train_x, train_y, test_x, k=20, n_classes=-1):
    """Shares of the votes of the k nearest by cosine; one weighs exp(cosine / 0.07), as in DINO."""
    truth, shares = F.one_hot(train_y, n_classes), []  # [N, C]; -1: as many as train_y has
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    for some in test_x.split(1024):  # so that the cosines take 4 KB per training cell, not 4 M
        near, nearest = (some @ train_x.T).topk(min(k, len(train_x)), dim=1)  # [m, k]
        shares.append((truth[nearest] * (near / 0.07).softmax(1)[:, :, None]).sum(1))
    return torch.cat(shares)

def linear_probe(train_x, train_y, test_x, l2=1e-2, n_classes=0, tolerance=1e-7):
    """Logistic regression: the minimum of mean cross-entropy + l2/2 |W|^2 on standardised features
    (scikit-learn's C is 1 / (l2 N)), to a gain of `tolerance` a pass. An absent class gets 0."""
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)  # constant: stays about 0
    x, test_x = (train_x - mean) / std, (test_x - mean) / std
    # A ViT's features are so correlated that L-BFGS crawls to the minimum. So W = V axes, principal
    # axes divided by the root of the loss's curvature along them (at most variance / 4, plus l2).
    _, s, axes = torch.linalg.svd(torch.linalg.qr(x, "r")[1], full_matrices=False)
    axes = axes * (s.square() / len(x) / 4 + l2).rsqrt()[:, None]  # [A, D]
    absent = train_y.bincount(minlength=n_classes) == 0
    bias = x.new_zeros(len(absent), requires_grad=True)
    v = x.new_zeros(len(absent), len(axes), requires_grad=True)  # [C, A]
    optimizer = torch.optim.LBFGS([v, bias], max_iter=1000, history_size=50, tolerance_grad=1e-6,
                                  tolerance_change=tolerance, line_search_fn="strong_wolfe")

    def logits(x):
        return F.linear(x, v @ axes, bias).masked_fill(absent, -math.inf)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(logits(x), train_y) + l2 / 2 * (v @ axes).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return logits(test_x).detach().softmax(1)

def tuned_probe(train_x, train_y, test_x, groups, n_classes, seed=0):
    """linear_probe at the l2 with the best weighted F1 on a fifth of the groups, held out."""
    y, l2 = train_y.cpu().numpy(), 1e-2
    held = group_folds(groups, y, 5, seed) == 0
    if not held.all():
        counts = []
        for l2 in L2:  # loose fits rank strengths as well, in half of the time
            probs = linear_probe(train_x[~held], train_y[~held], train_x[held], l2, n_classes, 1e-5)
            counts.append(confusion(y[held], probs.argmax(1).cpu().numpy(), n_classes))
        l2 = L2[scores(np.stack(counts))["weighted_f1"].argmax()]
    return linear_probe(train_x, train_y, test_x, l2, n_classes)

def train_net(net, inputs, y, lr, epochs, batch=64):
    """Train what of a classifier requires gradients; inputs(i) are those of the labels y[i]."""
    trained = [p for p in net.parameters() if p.requires_grad]
    net.trained = sum(p.numel() for p in trained)
    net.train(all(p.requires_grad for p in net.parameters()))  # or batch norm would learn
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for some in torch.randperm(len(y)).split(batch):
            with torch.autocast(y.device.type, torch.bfloat16, enabled=y.is_cuda):
                loss = F.cross_entropy(net(*inputs(some)).float(), y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval()

class LowRank(nn.Module):
    """LoRA (Hu et al. 2021): a fixed W + up @ down, of rank 8. up is 0 at first."""

    def __init__(self, weight, rank=8):
        super().__init__()
        self.down = nn.Parameter(torch.randn_like(weight[:rank]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros_like(weight[:, :rank]))

    def forward(self, weight):
        return weight + self.up @ self.down

def fine_tune(backbone, crops, y, kind, n_classes, seed=0, epochs=15):
    """A copy of the backbone and a linear head, trained on crops, uint8 [N, 3, h, w]; its
    extract_features are logits. kind: all of it (full), the head, or head and LowRank adapters
    (lora), for whom labels are few and the backbone is good (Surgical-DINO, Cui et al. 2024)."""
    from torchvision.transforms import v2
    torch.manual_seed(seed)
    jitter = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.ColorJitter(0.2, 0.2)]
    head = nn.Linear(extract_features(backbone, crops[:1]).shape[1], n_classes)
    net = nn.Sequential(copy.deepcopy(backbone).requires_grad_(kind == "full"), head)
    for block in net[0].blocks if kind == "lora" else ():
        for linear in (block.attn.qkv, block.attn.proj):
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
    net.size, net.device = backbone.size, backbone.device

    def inputs(some):
        seen = torch.stack([v2.Compose(jitter)(crop) for crop in crops[some]])
        return [network_input(seen, net.size, net.device)]

    lr = 1e-4 if kind == "full" else 4e-3  # guesses, as are the other numbers
    train_net(net.to(net.device), inputs, y.to(net.device), lr, epochs)
    for layer in [layer for layer in net.modules() if parametrize.is_parametrized(layer)]:
        parametrize.remove_parametrizations(layer, "weight")  # the adapters end in the weights
    return net

class GatedAttention(nn.Module):
    """Slices, each with its place, pooled by weights of their own (Ilse et al. 2018, eq. 9)."""

    def __init__(self, dim, n_classes, width=64):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_classes))
        self.look, self.gate, self.weight = (nn.Linear(width, n) for n in (width, width, 1))
        self.register_buffer("waves", 2 ** -torch.arange(0, 4, 8 / width))  # of 6 to 100 slices

    def forward(self, x, place):
        """[S, L, D] and places [S, L], -1 where there is no slice, to logits [S, C]."""
        angle = place[:, :, None] * self.waves
        x = F.gelu(self.embed(x) + torch.cat([angle.sin(), angle.cos()], 2))
        weight = self.weight(self.look(x).tanh() * self.gate(x).sigmoid())
        weight = weight.masked_fill(place[:, :, None] < 0, -math.inf).softmax(1)  # [S, L, 1]
        return self.head((weight * x).sum(1))

def attend(x, place, y, n_classes, seed):
    """GatedAttention trained on the first studies, those of y: probabilities of the others.
    Features [S, L, D] get noise: studies are few, and without it they are learnt by heart."""
    torch.manual_seed(seed)
    seen, where = x[:len(y)], place[:len(y)]
    known = seen[where >= 0]
    mean, std = known.mean(0), known.std(0, correction=0) + 1e-6
    net = GatedAttention(x.shape[2], n_classes).to(x.device)

    def inputs(i):
        return torch.normal((seen[i] - mean) / std, 0.5), where[i]

    train_net(net, inputs, y, 1e-2, 600, len(seen))
    return net((x[len(y):] - mean) / std, place[len(y):]).detach().softmax(1)

# ----------------------------------------
# Scores. "again" is {metric: [1 + R]}: a score; then as it is R times on groups that a bootstrap
# drew. Draws are the same for all backbones, so that differences are paired.

def confusion(truth, guess, n_classes, times=None):
    """Counts [true class, predicted class]; times: how often each cell counts."""
    return np.bincount(truth * n_classes + guess, times, n_classes**2).reshape(n_classes, -1)

def scores(counts):
    """Metrics of confusion matrices [..., C, C]; classes that never occur do not count."""
    hit, true, called = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    recall = hit / np.where(true, true, np.nan)
    f1 = 2 * hit / np.where(true + called, true + called, np.nan)
    return {"accuracy": hit.sum(-1) / true.sum(-1), "balanced_accuracy": np.nanmean(recall, -1),
            "macro_f1": np.nanmean(f1, -1), "weighted_f1": np.nansum(f1 * true, -1) / true.sum(-1)}

def bootstrap(n, seed):
    """Yields how often each of n groups counts, 1 + 1000 times [n]: once; then as often as in n
    draws with replacement. (Between seeds an interval's ends move by a few %.)"""
    rng = np.random.default_rng(seed)
    yield np.ones(n)
    for _ in range(1000):
        yield np.bincount(rng.integers(n, size=n), minlength=n)

def judge(truth, probs, group, seed=0):
    """A result of predictions [n, C]."""
    guess, group = probs.argmax(1), np.unique(group, return_inverse=True)[1]
    draws = bootstrap(group.max() + 1, seed)
    counts = np.stack([confusion(truth, guess, probs.shape[1], times[group]) for times in draws])
    return {"cells": len(truth), "confusion": counts[0].astype(int).tolist(),
            "again": scores(counts)}

def summary(again):
    """Of "again": {metric: score}, and the ends of their 95% intervals."""
    ends = {k: np.percentile(v[1:], [2.5, 97.5]).tolist() for k, v in again.items()}
    return {k: float(v[0]) for k, v in again.items()} | {"interval": ends}

def judge_parts(truth, found, group, parts, seed):
    """{protocol: result} on all test cells of {protocol: [probabilities of each part's]}."""
    tested = np.concatenate([test for _, test in parts])
    return {name: judge(truth[tested], torch.cat(probs).cpu().numpy(), group[tested], seed)
            for name, probs in found.items()}

def rows_of(found, split):
    """{backbone: {protocol: result}} to a row of results.json for each; "minus": its scores less
    each other backbone's, on the same draws."""
    rows = []
    for name in dict.fromkeys(name for results in found.values() for name in results):
        again = {label: of[name].pop("again") for label, of in found.items() if name in of}
        for label, own in again.items():
            minus = {other: summary({k: own[k] - theirs[k] for k in own})
                     for other, theirs in again.items() if other != label}
            row = {"protocol": name, "split": split, "weights": label, "minus": minus}
            rows.append(row | found[label][name] | summary(own))
    return rows

def few_shot(x, y, parts, shots, seed):
    """A result: the mean of DRAWS; then each, a linear probe on `shots` random training cells a
    class, on the next fold. {} where a class has fewer."""
    truth, n, drawn = y.cpu().numpy(), int(y.max()) + 1, []
    for draw in range(DRAWS):
        train, test = parts[draw % len(parts)]
        train = np.random.default_rng([seed, draw]).permutation(train)
        some = np.concatenate([train[truth[train] == c][:shots] for c in range(n)])
        if len(some) < shots * n:
            return {}
        guess = linear_probe(x[some], y[some], x[test], FEWSHOT_L2, n).argmax(1).cpu().numpy()
        drawn.append(confusion(truth[test], guess, n))
    again = {k: np.insert(v, 0, v.mean()) for k, v in scores(np.stack(drawn)).items()}
    return {"shots": shots, "again": again}

# ----------------------------------------
# The whole.

def measure(x, cells, parts, protocols, seed):
    """{protocol: result} of one backbone's features [n, D] on one way to split the cells."""
    y, n, found = torch.from_numpy(cells.label).to(x.device), len(cells.classes), {}
    if "knn" in protocols:
        for k in (1, 20):
            found[f"{k}-NN"] = [knn(x[a], y[a], x[b], k, n) for a, b in parts]
    if "linear" in protocols:
        found["linear probe"] = [tuned_probe(x[a], y[a], x[b], cells.group[a], n, seed)
                                 for a, b in parts]
    results = judge_parts(cells.label, found, cells.group, parts, seed)
    if "fewshot" in protocols:
        few = {f"few-shot, {k} a class": few_shot(x, y, parts, k, seed) for k in SHOTS}
        results |= {name: result for name, result in few.items() if result}
    if "study" in protocols:
        results |= measure_studies(x, cells, parts, seed)
    return results

def measure_studies(x, cells, parts, seed):
    """The same of studies, groups of slices pooled in three ways. Their class: study_label, or all
    labels of their slices."""
    def studies(some):
        """Of each study its slices among these cells, in order."""
        some = some[np.lexsort((cells.place[some], cells.group[some]))]
        return np.split(some, np.flatnonzero(np.diff(cells.group[some])) + 1)

    label = cells.label if cells.study is None else cells.study
    truth = [str(sorted({*label[s]})) for s in studies(np.arange(len(x)))]
    truth, found = np.unique(truth, return_inverse=True)[1], {}
    y, n = torch.from_numpy(truth).to(x.device), truth.max() + 1
    numbers = [[np.unique(cells.group[some]) for some in part] for part in parts]
    for part, (a, _) in zip(parts, numbers):
        seen, asked = map(studies, part)  # slices that have a copy on the other side are not seen
        for name, pool in (("mean", torch.mean), ("maximum", torch.amax)):
            z, q = (torch.stack([pool(x[s], 0) for s in of]) for of in (seen, asked))
            found.setdefault(f"study: {name}", []).append(tuned_probe(z, y[a], q, a, n, seed))
        place = [np.unique(cells.place[s], return_inverse=True)[1] for s in seen + asked]
        place = pad_sequence([torch.from_numpy(p).to(x.device) for p in place], True, -1)
        slices = pad_sequence([x[s] for s in seen + asked], True)
        probs = attend(slices, place, y[a], n, seed)
        found.setdefault("study: attention", []).append(probs)
    return judge_parts(truth, found, np.arange(len(truth)), numbers, seed)

def measure_tuned(backbone, cells, crop, parts, kinds, seed):
    """The same of a backbone's fine-tuning, by those of `kinds` that it can; reads the images."""
    y, results, kinds = torch.from_numpy(cells.label), {}, kinds if backbone.state_dict() else ()
    crops = torch.cat(list(crops_of(cells, crop, backbone.size))) if kinds else None
    for kind in kinds:
        if kind != "lora" or hasattr(backbone, "blocks"):
            name, probs = f"fine-tuned, {kind}", []
            for train, test in parts:
                net = fine_tune(backbone, crops[train], y[train], kind, len(cells.classes), seed)
                probs.append(extract_features(net, crops[test]).softmax(1))
            results |= judge_parts(cells.label, {name: probs}, cells.group, parts, seed)
            results[name]["trained"] = net.trained
    return results

def knn_monitor(cfg):
    """For reddino.py --eval-data: monitor(backbone, device) gives {"knn": weighted F1 of 20-NN on
    the first table, "knn1": on the second, ...}. Tables and images are read once."""
    sets, size = [], cfg.global_size
    window = cfg.window or ([40, 400] if cfg.augment == "ct" else None)
    crop = cfg.tile_size[0] if cfg.unit == "cells" else 80
    for table in cfg.eval_data:
        cells = read_cells(table, window=window)
        parts = next(iter(make_splits(cells, 5, 0, quiet).values()))
        sets.append((torch.cat(list(crops_of(cells, crop, size))), cells, parts))

    def monitor(backbone, device):
        found, backbone = {}, copy.deepcopy(backbone).float().eval()
        backbone.size, backbone.device = size, device
        for i, (crops, *given) in enumerate(sets):
            result = measure(extract_features(backbone, crops), *given, ["knn"], 0)["20-NN"]
            found[f"knn{i or ''}"] = float(result["again"]["weighted_f1"][0])
        return found

    return monitor

CHOICES = {"protocols": {*PROTOCOLS, "study"}, "finetune": {"full", "head", "lora"},
           "features": {"cls", "cls+mean"}}
LIMITS = {"crop": (2, 4096), "folds": (2, 4096), "size": (1, 4096), "seed": (0, 2**32 - 1)}

def check_options(**given):
    """UserError for values that are not among CHOICES, or not within LIMITS."""
    for name, value in given.items():
        if name in LIMITS:
            low, high = LIMITS[name]
            if not low <= value <= high:
                raise UserError(f"--{name} {value}: must lie between {low} and {high}")
        elif wrong := {*value} - CHOICES[name]:
            choices = ", ".join(sorted(CHOICES[name]))
            raise UserError(f"--{name} {min(wrong)}: choose from {choices}")

def evaluate(data, weights, protocols=PROTOCOLS, crop=80, out=None, device="auto", size=None,
             seed=0, log=print, drop_labels=(), folds=5, finetune=(), figures=None, window=None,
             heads=None, features="cls"):
    """Score backbones as on the command line; the table goes to `log`. Returns what results.json
    holds. weights: also {shown name: path or name}; out=None: no files. Raises UserError, and
    OSError where a folder can't be written to."""
    def say(text):
        log(printable(text, 1000))

    check_options(protocols=protocols, finetune=finetune, features=[features], crop=crop,
                  folds=folds, size=size or 1, seed=seed)
    if figures and not importlib.util.find_spec("matplotlib"):
        raise UserError("--figures needs matplotlib: pip install matplotlib")
    augment.check_window(window)
    for folder in filter(None, (out, figures)):
        os.makedirs(folder, exist_ok=True)
    weights = weights if isinstance(weights, dict) else {str(w): w for w in weights}
    backbones, like = dict.fromkeys(weights), None
    for label, name in sorted(weights.items(), key=lambda item: str(item[1]) == "random"):
        backbones[label] = load_backbone(name, size, device, like, seed, heads)
        like = like or (backbones[label] if hasattr(backbones[label], "blocks") else None)
    cells = read_cells(str(data), drop_labels, window, say)
    counts = ", ".join(map("{} {}".format, cells.classes, np.bincount(cells.label)))
    say(f"{len(cells.label)} cells of {len(cells.files)} images: {counts}")
    if "study" in protocols and cells.by == "image":
        raise UserError("--protocols study: column `group` has to say which study a slice is of")
    x = {label: embed(label, backbone, cells, crop, say, features == "cls+mean")
         for label, backbone in backbones.items()}
    rows, asked = [], {*protocols}
    for split, parts in make_splits(cells, folds, seed, say).items():
        found = {}
        for label, backbone in backbones.items():
            found[label] = measure(x[label].to(backbone.device), cells, parts, asked, seed)
            found[label] |= measure_tuned(backbone, cells, crop, parts, finetune, seed)
            say(f"{label}: {split}, done")
        rows += rows_of(found, split)
        asked -= {"fewshot"}  # of the first split
    results = dict(data=str(data), crop=crop, window=window, seed=seed, cells=len(cells.label),
                   classes=cells.classes, sources=cells.sources, skipped=cells.skipped, rows=rows)
    if out:
        Path(out, "results.json").write_text(json.dumps(results, indent=1))
        Path(out, "results.md").write_text(as_table(results), "utf-8")
    log(as_table(results))
    if figures:
        from figures import draw_figures
        draw_figures(figures, results, x, backbones, cells, seed, say)
    return results

def as_table(results):
    """Markdown: a table for each protocol and split, its best line in bold."""
    def text(row):
        low, high = (100 * end for end in row["interval"]["weighted_f1"])
        return f"{100 * row['weighted_f1']:.1f} [{low:.1f}, {high:.1f}]"

    lines = ["", "In %, with 95% intervals by groups (few-shot: by draws).", ""]
    for title, rows in itertools.groupby(results["rows"], lambda r: [r["protocol"], r["split"]]):
        rows = list(rows)
        best = max(rows, key=lambda row: row["weighted_f1"])["weights"]
        names = list(rows[0]["interval"])
        table = [[", ".join(title), *names, "minus the best"], ["---"] * (len(names) + 2)]
        for row in rows:
            name = printable(row["weights"], 1000).replace("|", "\\|")
            name += f" ({row['trained']:,} trained)" if "trained" in row else ""
            line = [text(row) if k == "weighted_f1" else f"{100 * row[k]:.1f}" for k in names]
            gap = row["minus"].get(best)
            line = [name, *line, text(gap) if gap else "best"]
            table.append([f"**{cell}**" for cell in line] if row["weights"] == best else line)
        widths = [max(map(len, column)) for column in zip(*table)]
        lines += ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table] + [""]
    return "\n".join(lines)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument  # what is not given is left to evaluate
    add("--data", required=True)
    add("--weights", required=True, nargs="+")
    add("--protocols", nargs="+")
    add("--finetune", nargs="+")
    add("--crop", type=int, help="side of the square around a cell in pixels (80)")
    add("--size", type=int, help="the network's input in pixels (as trained, at most 224)")
    add("--heads", type=int, help="of a ViT's attention, where its width doesn't tell")
    add("--features", help="cls, or cls+mean: with the mean patch token")
    add("--window", nargs=2, type=float, help="LEVEL WIDTH: what is seen of deep grey")
    add("--drop-label", nargs="+", dest="drop_labels", help="classes to leave out")
    add("--out", default="out/eval", help="folder of results (out/eval)")
    add("--figures", help="folder to draw into")
    add("--folds", type=int)
    add("--seed", type=int)
    add("--device")
    # One line, without the usage.
    parser.error = lambda text: parser.exit(2, f"eval.py: error: {printable(text, 2000)}\n")
    try:
        evaluate(**vars(parser.parse_args(argv)), log=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        parser.exit(130, "eval.py: interrupted\n")
    except (UserError, BadImage, OSError) as error:
        parser.error(error)

if __name__ == "__main__":
    main()
