"""All that is drawn: eval.py's figures, the demo's, and every transform by name on an image:

    python figures.py SLICE.npy -o gallery.png --augment ct --window 40 400

Without pyplot, which would change a notebook's settings. Colours are Okabe and Ito's (2008), which
everyone can tell apart; a shape or a line says the same once more.
"""
import argparse
import importlib.util
import itertools
import json
import math
import os
import random
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import augment
import eval as ev
from augment import UserError
from eval import printable

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000"]
MARKS = list(zip("oXs*^PvD" * 7, COLOURS * 8))  # 56 different ones

def figure_of(draw, *given, **options):
    """What draw(figure, ...) draws; a notebook shows it: figure_of(tiles, [images], [captions])."""
    figure = Figure(layout="constrained")
    with matplotlib.rc_context({"text.parse_math": False}):  # a label may hold a $
        draw(figure, *given, **options)
    return figure

def save(path, draw, *given, log=print):
    """A PNG. One that fails is a line of the log and costs nothing else."""
    try:
        figure_of(draw, *given).savefig(path, dpi=150, bbox_inches="tight")
    except Exception as error:  # whatever a label or a number does to matplotlib
        log(f"{path} is not drawn: {printable(error, 200)}")

def draw_figures(folder, results, features, backbones, cells, seed, log=print):
    """PNGs in `folder`: few-shot curves; of each backbone confusion, a map of cells, a smear."""
    def draw(title, function, *given):
        name = re.sub(r"[^\w.+-]", "_", f"{title[:20]}{title[20:][-99:]}")  # of a path its end
        save(os.path.join(folder, f"{name}.png"), function, *given, log=log)

    if any("shots" in row for row in results["rows"]):
        draw("few_shot", few_shot_curves, results["rows"])
    for label, backbone in backbones.items():
        own = [row for row in results["rows"] if row["weights"] == label and "confusion" in row
               and not row["protocol"].startswith("study")]
        if own:
            draw(f"confusion {label}", confusion_matrix, own[-1], cells.classes)
        draw(f"map {label}", maps, label, features[label].numpy(), cells, seed)
        if hasattr(backbone, "blocks"):
            draw(f"smear {label}", smear_panels, label, backbone, cells, results["crop"])

def few_shot_curves(figure, rows):
    axes, rows = figure.subplots(), [row for row in rows if "shots" in row]
    for label, (marker, colour) in zip(dict.fromkeys(row["weights"] for row in rows), MARKS):
        own = [row for row in rows if row["weights"] == label]
        low, high = 100 * np.array([row["interval"]["weighted_f1"] for row in own]).T
        n, mean = zip(*((row["shots"], 100 * row["weighted_f1"]) for row in own))
        axes.semilogx(n, mean, label=printable(label, 99), marker=marker, color=colour)
        axes.fill_between(n, low, high, alpha=0.15, color=colour)
    axes.minorticks_off()
    axes.set(xticks=ev.SHOTS, xticklabels=ev.SHOTS, xlabel="labelled cells of each class",
             ylabel="weighted F1, %", title=f"Few-shot: mean, 95% of {ev.DRAWS} linear probes")
    figure.legend(loc="outside lower left")

def confusion_matrix(figure, row, classes):
    counts, names = np.array(row["confusion"]), [printable(c, 30) for c in classes]
    share, side = counts / counts.sum(1, keepdims=True).clip(1), 3.5 + min(0.45 * len(names), 90)
    figure.set_size_inches(side + 0.5, side)
    axes = figure.subplots()
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(counts[:100, :100]):
        colour = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, n, ha="center", va="center", size=7, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted (grey: share of the true class)", ylabel="true")
    figure.suptitle(f"{printable(row['weights'])}: {row['protocol']}, {row['split']}", size=10)

def maps(figure, label, x, cells, seed):
    """Up to 3,000 cells in 2D: PCA, which keeps distances; with scikit-learn t-SNE, which keeps
    neighbours; by class and, beside it, by source."""
    some = np.random.default_rng(seed).permutation(len(x))[:3000]
    ways, by = {"PCA": principal(x[some], 2)}, {"class": (cells.label, cells.classes)}
    if len(some) >= 50 and importlib.util.find_spec("sklearn"):
        from sklearn.manifold import TSNE
        ways["t-SNE"] = TSNE(random_state=seed).fit_transform(x[some])
    if cells.sources:
        by["source"] = cells.source, cells.sources
    figure.set_size_inches(8 * len(by), 6 * len(ways))
    grid = figure.subplots(len(ways), len(by), squeeze=False).flat
    for axes, (way, what) in zip(grid, itertools.product(ways, by)):
        index, names = by[what]
        for i, (name, (marker, colour)) in enumerate(zip(names, itertools.cycle(MARKS))):
            axes.scatter(*ways[way][index[some] == i].T, s=12, label=printable(name, 30),
                         marker=marker, color=colour, linewidths=0)
        axes.set(title=f"{printable(label)}: {way}, by {what}", xticks=[], yticks=[])
        axes.set_aspect("equal", "datalim")
        columns = len(names) // 26 + 1
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, ncols=columns)

def principal(x, n):
    """The first n principal components of [N, D], [N, n]."""
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return u[:, :n] * s[:n]

@torch.inference_mode()
def smear(backbone, image, crop=None):
    """Pictures by name: an image [H, W, 3] (1,024 pixels of it), principal components of its patch
    tokens as colours [h, w, 3], the class token's attention in the last block by head [h, w]. crop:
    shrink it as squares of this side are for scores."""
    image, patch, attn = image[:1024, :1024], backbone.patch_size, backbone.blocks[-1].attn
    scale = backbone.size * max(1 / max(crop or 0, backbone.size), 1 / min(image.shape[:2]))
    rows, columns = (int(n * scale) // patch for n in image.shape[:2])
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    x, seen = ev.network_input(x, (rows * patch, columns * patch), backbone.device), []
    with attn.qkv.register_forward_hook(lambda module, given, out: seen.append(out[0])):
        tokens = principal(backbone.forward_features(x)[1][0].cpu().numpy(), 3)
    q, k, _ = seen[0].unflatten(1, (3, attn.heads, -1)).permute(1, 2, 0, 3)  # [heads, N, D / heads]
    look = (q[:, :1] @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    low, high = np.percentile(tokens, [1, 99], axis=0)
    colours = ((tokens - low) / (high - low)).clip(0, 1).reshape(rows, columns, 3)
    pictures = {"image": image, "patch tokens, PCA as RGB": colours}
    for i, head in enumerate(look[:, 0, -rows * columns:].cpu().numpy(), 1):
        name = f"attention of head {i}, {100 * head.min():.2f} to {100 * head.max():.2f}% a patch"
        pictures[name] = head.reshape(rows, columns)
    return pictures

def smear_panels(figure, label, backbone, cells, crop):
    image = augment.read_image(cells.files[0], window=cells.window)
    panels(figure, f"{label}: {os.path.basename(cells.files[0])}", smear(backbone, image, crop))

def panels(figure, title, pictures, wide=2):
    high, (height, width) = math.ceil(len(pictures) / wide), next(iter(pictures.values())).shape[:2]
    figure.set_size_inches(11, 0.8 + 11 / wide * high * height / width)
    figure.suptitle(printable(title, 100))
    for i, (name, picture) in enumerate(pictures.items(), 1):
        axes = figure.add_subplot(high, wide, i, title=name, xticks=[], yticks=[])
        axes.imshow(picture, vmax=np.percentile(picture, 99))  # one patch may draw most attention

def tiles(figure, rows, captions=(), frames=(), size=0.75):
    """Images, uint8 [H, W] or [H, W, 3], in rows (None: a gap), with captions; frames {(row,
    column): right or not} are thick blue or dotted orange. Returns the axes."""
    columns, high = max(map(len, rows)), size * (1.25 if captions else 1)
    figure.set_size_inches(size * columns, high * len(rows) + 0.6)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (r, c), axes in np.ndenumerate(grid):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible((r, c) in frames)
        if c < len(rows[r]) and rows[r][c] is not None:
            axes.imshow(rows[r][c], cmap="gray", vmin=0, vmax=255)
            axes.set_xlabel(printable(captions[r][c], 30) if captions else "", size=7)
        if (r, c) in frames:
            right = frames[r, c]
            axes.spines[:].set(linewidth=3 if right else 1.5, linestyle="-" if right else ":",
                               color=COLOURS[0] if right else COLOURS[4], capstyle="butt")
    return grid

def neighbours(x, query, group, k=8):
    """The k cells of other groups nearest to one, by cosine of features [n, D]."""
    cosine = torch.cosine_similarity(x, x[query:query + 1])
    cosine[torch.from_numpy(group == group[query])] = -2
    return cosine.topk(min(k, int((group != group[query]).sum()))).indices.numpy()

def neighbour_rows(figure, cells, crops, features, seed=0, k=8):
    """Of 5 classes, a sickle if there is one first, a cell drawn at random and, a row for each of
    features, its nearest neighbours."""
    rng, rows, frames, names = np.random.default_rng(seed), [], {}, []
    for c in sorted(range(len(cells.classes)), key=lambda c: cells.classes[c] != "sickle")[:5]:
        query = int(rng.choice(np.flatnonzero(cells.label == c)))
        for i, (name, x) in enumerate(features.items()):
            near = neighbours(x, query, cells.group, k)
            right = cells.label[near] == c
            frames |= {(len(rows), 1 + j): bool(right[j]) for j in range(len(near))}
            rows.append([None if i else crops[query], *crops[near]])
            names.append(f"{name}: {right.sum()} of {len(near)} {cells.classes[c]}")
    grid = tiles(figure, rows, frames=frames, size=0.8)
    for axes, name in zip(grid[:, -1], names):
        name = printable(name).replace(": ", ":\n", 1)
        axes.text(1.1, 0.5, name, va="center", size=11, transform=axes.transAxes)
    figure.suptitle(f"A cell drawn at random, and its nearest among other {cells.by}s' cells.\n"
                    "Frame: thick blue, of its class; dotted orange, of another", size=12)

def curves(figure, path):
    """Of a metrics.jsonl: losses, smoothed; and what grows: match, the scores of --eval-data."""
    lines = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    figure.set_size_inches(9, 3.6)
    losses, shares = figure.subplots(1, 2)
    names = sorted({key for line in lines for key in line if key.startswith("knn")})
    for name, (marker, colour) in zip(["loss", "dino", "match", *names], MARKS):
        own = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if own:
            on, scale = (losses, 1) if name in ("loss", "dino") else (shares, 100)
            step, value = np.array(own, float).T
            width = 1 + len(own) // 50
            value = scale * np.convolve(value, np.ones(width) / width, "valid")
            on.plot(step[width - 1:], value, color=colour, label=name, marker=marker, markevery=0.1)
            on.legend()
    losses.set(title="Losses: all, and that of class tokens", xlabel="step", ylabel="nats")
    title = "A view finds its partner among 64 (chance: 2%)" + "\n20-NN, weighted F1" * bool(names)
    shares.set(title=title, xlabel="step", ylabel="%")

def demo_figures(out, table, trained, crop=80, device="auto", log=print):
    """neighbours.png, tokens.png and, of OUT/metrics.jsonl, curves.png in OUT/scores: their paths.
    table: cells that training has not seen; trained: as --weights."""
    cells, folder = ev.read_cells(str(table)), Path(out, "scores")
    image = augment.read_image(cells.files[0])
    crops, pictures, features = torch.cat(list(ev.crops_of(cells, crop, 224))), {"image": image}, {}
    after = ev.load_backbone(trained, device=device)
    before = ev.load_backbone("random", device=device, like=after)
    for name, backbone in (("before training", before), ("after training", after)):
        features[name] = ev.extract_features(backbone, crops)
        pictures[name] = list(smear(backbone, image, crop).values())[1]
    folder.mkdir(exist_ok=True)
    title = "Patch tokens, their principal components as colours: alike to the network, alike here"
    paths = [folder / f"{name}.png" for name in ("neighbours", "tokens", "curves")]
    pixels = crops.permute(0, 2, 3, 1).numpy()
    save(paths[0], neighbour_rows, cells, pixels, features, log=log)
    save(paths[1], panels, title, pictures, 3, log=log)
    save(paths[2], curves, Path(out, "metrics.jsonl"), log=log)
    return [path for path in paths if path.is_file()]

def gallery(figure, tile, recipe="reddino", seed=0, window=None):
    """Every transform by name on a tile [h, w, 3] (or values [h, w]), a row for each group."""
    def shown(image):
        level, width = window or (40, 400)
        return image if image.dtype == np.uint8 else augment.apply_window(image, level, width)

    groups, views = augment.GROUPS, ("first global view", "second global view", "local view")
    if recipe != "reddino":
        groups = dict(zip(views, augment.MultiCrop(recipe, window=window).recipe))
    rows, captions = [[shown(tile)] for _ in groups], [["before"] for _ in groups]
    for r, transforms in enumerate(groups.values()):
        before = tile
        for c, transform in enumerate(transforms):
            rng = augment.sample_rng(seed, r, c)
            transform.set_random_state(rng, random.Random(int(rng.integers(2**62))))
            after = transform(image=before, force_apply=True)["image"]
            rows[r].append(shown(after))
            captions[r].append(getattr(transform, "function", type(transform)).__name__)
            before = after if after.dtype != before.dtype else before  # what follows needs 8 bits
    for axes, title in zip(tiles(figure, rows, captions, size=1.6)[:, 0], groups):
        axes.set_title(title, size=9, loc="left")
    figure.suptitle(f"--augment {recipe}, seed {seed}: every pixel transform by name")

def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw every transform by name on an image.")
    add = parser.add_argument
    add("image")
    add("-o", "--out", default="gallery.png")
    add("--seed", type=int, default=0)
    add("--augment", choices=augment.RECIPES, default="reddino")
    add("--window", nargs=2, type=float)
    parser.error = lambda text: parser.exit(2, f"figures.py: error: {printable(text, 2000)}\n")
    args = parser.parse_args(argv)
    try:
        augment.check_window(args.window)
        image = augment.read_image(args.image, window=args.window, raw=args.augment == "ct")
        if args.augment not in ("ct", "mri", "xray"):  # anatomy is looked at as a whole
            y, x = (max(0, n - 224) // 2 for n in image.shape[:2])
            image = image[y:y + 224, x:x + 224]
        figure_of(gallery, image, args.augment, args.seed, args.window).savefig(args.out, dpi=120)
    except (UserError, augment.BadImage, OSError, ValueError) as error:  # an --out of no kind
        parser.error(error)

if __name__ == "__main__":
    main()
