"""Labelled cells: from a CSV or class folders (eval.py --data) to arrays, crops, and ways to split.

A CSV has columns `image`, `label` and, where an image holds many cells, `x`, `y` (a cell's centre
in pixels) or a box `xmin`, `xmax`, `ymin`, `ymax`, whose centre is taken. Others that count:
`group` (patient, study), `source` (hospital, stain), `split` (train, test, val), `study_label` (of
the whole group), `slice` (a number: the image's place in its group). Class folders are
FOLDER/CLASS/*.png; or FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png.
"""
import csv
import hashlib
import itertools
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from augment import BadImage, UserError, find_images, normalise, read_image

try:
    from augment import dicom_patient
except ImportError:  # until it is there
    def dicom_patient(path):
        return None


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
    return {"shape": image.shape[1::-1], "content": content, "patient": dicom_patient(path)}

def readable(rows: list[dict], window, log) -> tuple[list[dict], dict[str, str]]:
    """The rows whose image can be read, sorted by image, with "content" and, for DICOM, "group";
    and the reasons of the others."""
    files = sorted({row["image"] for row in rows})
    with ThreadPoolExecutor() as pool:
        looks = dict(zip(files, pool.map(look, files, itertools.repeat(window))))
    skipped = {path: bad.reason for path, bad in looks.items() if isinstance(bad, BadImage)}
    if skipped:
        first = BadImage(*min(skipped.items()))
        log(f"{len(skipped)} of {len(files)} images can't be read, e.g. {first}")
    rows = [row | looks[row["image"]] for row in rows if row["image"] not in skipped]
    patients = any(row["patient"] for row in rows)
    for row in rows:
        if (np.array(row["centre"]) < 0).any() or (np.array(row["centre"]) > row["shape"]).any():
            raise UserError("x={:g}, y={:g} is outside of {image}, which has {shape[0]}x{shape[1]} "
                            "pixels".format(*row["centre"], **row))
        if patients:
            row.setdefault("group", row["patient"] or row["content"])
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
