"""Which of RedDino's claims hold at a size that a laptop can repeat? Trainings on Chula RBC-12.

    python tests/ablations.py --chula CHULA             every run that tests/ablations.jsonl lacks
    python tests/ablations.py --chula CHULA --jobs 2    two at a time, a core each
    python tests/ablations.py --chula CHULA --table     what is there, as a table
    python tests/ablations.py --chula CHULA --few out/backbone.pth    what labels are worth, see few

CHULA holds smears/NNN.jpg and cells.csv (image,x,y,label). A run trains a `nano` from scratch for
--iters steps on one core and is scored once: fit on the labels of the smears that it was trained
on, asked on a block of smears that neither training nor the choice of any recipe has seen. It can
be stopped at any moment; the same command goes on, within a run too. Each finished run is a line of
ablations.jsonl with its guess for each cell asked, for the paired intervals.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as ev
import reddino

LINES = Path(__file__).with_suffix(".jsonl")
NEVER_SEEN = 3  # of five blocks of smears, by number: see block
FITS = ["supervised", "linear", "head", "lora", "full"]
CROP = 56  # side of the square around a cell, in training and in judging

# The base is the preset of nano, on single cells. Below, what each run changes.
BASE = dict(arch="nano", unit="cells")
RUNS = {
    "base": {},
    "KoLeo off": dict(koleo=0),
    "moving-average centering": dict(centering="moving-average"),
    "32 transforms": dict(augment="reddino"),
    "DINOv2's transforms": dict(augment="dinov2"),
    "56-pixel tiles": dict(unit="tiles"),
    "224-pixel tiles": dict(unit="tiles", tile_size=224, global_size=64),
    "4 local views": dict(local_crops=4),
    "no patch-token loss": dict(ibot=0),
}

# Beside each with the base, whose transforms are a third list (`--augment none`: no list).
PAIRS = (("32 transforms", "DINOv2's transforms"), ("224-pixel tiles", "56-pixel tiles"))
FREE = ("pixels", "colour")  # no training, no seed


def block(image: str) -> int:
    """Of a smear, by the number in its name."""
    return (int(Path(image).stem) - 1) // 20 % 5


def prepare(chula: Path, out: Path) -> tuple[Path, Path]:
    """A folder to train on, without the smears never seen; and the table with the split to score
    on."""
    smears, table = out / "smears", out / "cells.csv"
    if table.exists():
        return smears, table
    smears.mkdir(parents=True, exist_ok=True)
    for path in sorted((chula / "smears").iterdir()):
        link = smears / path.name
        if block(path.name) != NEVER_SEEN and not link.exists():
            link.symlink_to(path.resolve())
    with open(chula / "cells.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] != "uncategorised"]
    with open(out / "cells.part", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "x", "y", "label", "split"])
        for row in rows:
            split = "test" if block(row["image"]) == NEVER_SEEN else "train"
            path = (chula / row["image"]).resolve()
            lines.writerow([path, row["x"], row["y"], row["label"], split])
    (out / "cells.part").rename(table)
    return smears, table


def f1_of(cells: ev.Cells, test: np.ndarray, guess: np.ndarray) -> float:
    """Weighted F1, 0 to 1, of guesses for the cells `test`."""
    counts = ev.confusion(cells.label[test], guess, len(cells.classes))
    return float(ev.scores(counts)["weighted_f1"])


def score(weights: str, cells: ev.Cells, train: np.ndarray, test: np.ndarray) -> dict:
    """Weighted F1 of 20-NN and of the linear probe, and their guesses, a letter a cell."""
    backbone = ev.load_backbone(weights, None, "cpu")
    x = ev.embed(weights, backbone, cells, CROP, ev.quiet)
    y, n, found = torch.from_numpy(cells.label), len(cells.classes), {}
    probs = {"20-NN": ev.knn(x[train], y[train], x[test], 20, n)}
    probs["linear"] = ev.tuned_probe(x[train], y[train], x[test], cells.group[train], n)
    for name, p in probs.items():
        guess = p.argmax(1).numpy()
        found[name] = {
            "weighted_f1": round(f1_of(cells, test, guess), 4),
            "guess": "".join(chr(97 + g) for g in guess),
        }
    return found


def train(name: str, seed: int, iters: int, smears: Path, out: Path) -> dict:
    """One run, or the rest of it: its recipe, its last step, where its backbone is."""
    folder = out / f"{name.replace(' ', '-')}-{iters}-{seed}"
    given = BASE | RUNS[name] | dict(data=smears, out=folder, iters=iters, seed=seed)
    given |= dict(workers=0, log_every=100, device="cpu")
    command = [sys.executable, str(ROOT / "reddino.py")]
    for option, value in given.items():
        command += ["--" + option.replace("_", "-"), str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if run.returncode:
        last = (run.stderr.strip() or "without a word").splitlines()[-1]
        raise RuntimeError(f"{name}, seed {seed}: {last}")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rank = [step["rank"] for step in steps if step.get("rank")]
    losses = [step["dino"] for step in steps[-20:] if step["dino"] is not None]
    return dict(
        run=name,
        seed=seed,
        iters=iters,
        options=RUNS[name],
        steps=len(steps),
        dino=round(float(np.mean(losses)), 3) if losses else None,
        rank=round(rank[-1], 1) if rank else None,
        weights=str(folder / "backbone.pth"),
    )


# ----------------------------------------------------------------------------------- the table


def replicates(line: dict, how: str, cells: ev.Cells, test: np.ndarray) -> np.ndarray:
    """Weighted F1 in %, and that of each replicate of the smears: [1 + replicates]."""
    guess = np.array([ord(c) - 97 for c in line[how]["guess"]])
    sure = np.eye(len(cells.classes))[guess]
    judged = ev.judge(cells.label[test], sure, cells.group[test])
    return 100 * judged["again"]["weighted_f1"]


def difference(own: dict, others: dict) -> str:
    """Of {seed: replicates}: mean over common seeds, 95% interval over smears and seeds."""
    gaps = np.array([own[seed] - others[seed] for seed in own if seed in others])  # [seeds, 1 + R]
    if not len(gaps):
        return ""
    n = gaps.shape[1] - 1
    drawn = np.random.default_rng(0).integers(len(gaps), size=(n, len(gaps)))
    again = gaps[drawn, np.arange(1, n + 1)[:, None]].mean(1)
    low, high = np.percentile(again, [2.5, 97.5])
    return f"{gaps[:, 0].mean():.1f} [{low:.1f}, {high:.1f}]"


def mean_of(values: list, digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{spread}"


def table(lines: list[dict], cells: ev.Cells, test: np.ndarray):
    """Prints each run's mean and deviation over seeds; mean differences from base and of PAIRS."""
    runs = {}
    for line in lines:
        runs.setdefault(line["run"], {})[line["seed"]] = line
    f1 = {}  # {how: {run: {seed: replicates}}}
    for how in ("20-NN", "linear"):
        f1[how] = {
            name: {seed: replicates(line, how, cells, test) for seed, line in own.items()}
            for name, own in runs.items()
        }

    def minus(name, base, how):
        own, others = f1[how][name], f1[how].get(base, {})
        if name in FREE:  # the same whatever the seed
            own = dict.fromkeys(others, own[0])
        return difference(own, others) if name != base else ""

    print("| run | seeds | steps | dino | 20-NN | minus base | linear probe | minus base |")
    print("|---" * 8 + "|")
    for name, own in runs.items():
        row = [name, str(len(own))]
        row.append(mean_of([line.get("steps") for line in own.values()], 0).split(" ")[0])
        row.append(mean_of([line.get("dino") for line in own.values()], 2).split(" ")[0])
        for how in ("20-NN", "linear"):
            row.append(mean_of([found[0] for found in f1[how][name].values()], 1))
            row.append(minus(name, "base", how))
        print("| " + " | ".join(row) + " |")
    for name, base in PAIRS:
        if name in runs and base in runs:
            near, linear = minus(name, base, "20-NN"), minus(name, base, "linear")
            print(f"| {name} minus {base} | | | | | {near} | | {linear} |")


# --------------------------------------------------------------------------- what labels are worth


def supervised(x, y, test_x, classes: int, seed: int, steps: int) -> np.ndarray:
    """What a nano says that learns from labels alone. x, test_x: crops, uint8 [n, 3, h, w]; y:
    int [n]; answers int [m]."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(reddino.build_vit("nano", 40), torch.nn.Linear(128, classes))
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    vary = v2.Compose([*flips, v2.ColorJitter(0.2, 0.2)])
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)

    def small(images):
        return ev.network_input(images, (40, 40), torch.device("cpu"))

    for _ in range(steps):
        some = torch.randint(len(x), (64,))
        varied = torch.stack([vary(image) for image in x[some]])
        loss = F.cross_entropy(net(small(varied)), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.inference_mode():
        return torch.cat([net(small(part)).argmax(1) for part in test_x.split(256)]).numpy()


def few(args, cells: ev.Cells, train: np.ndarray, test: np.ndarray):
    """Prints the weighted F1 on the smears never seen that comes of the labels of --labels cells a
    class (mean and deviation of --draws draws), and of all: by a nano that learns from labels
    alone; by a linear probe on what each backbone says; by training its head, adapters, or all of
    it."""
    crops = torch.cat(list(ev.crops_of(cells, CROP, CROP)))
    y, n = torch.from_numpy(cells.label), len(cells.classes)
    backbones = {w: ev.load_backbone(w, None, "cpu") for w in args.few}
    features = {w: ev.extract_features(backbone, crops) for w, backbone in backbones.items()}

    def guess(fit, w, some, seed):
        if fit == "supervised":
            steps = 3000 if some is train else 500
            return supervised(crops[some], y[some], crops[test], n, seed, steps)
        if fit == "linear" and some is train:
            x = features[w]
            return ev.tuned_probe(x[some], y[some], x[test], cells.group[some], n).argmax(1)
        if fit == "linear":
            x = features[w]
            return ev.linear_probe(x[some], y[some], x[test], ev.FEWSHOT_L2, n).argmax(1)
        net = ev.fine_tune(backbones[w], crops[some], y[some], fit, n, seed)
        return ev.extract_features(net, crops[test]).argmax(1)

    print("|  |", " | ".join(f"{k} labels a class" for k in args.labels), "| all labels |")
    print("|---" * (len(args.labels) + 2) + "|")
    for w in args.few:
        for fit in args.fits:
            if fit == "supervised" and w != args.few[0]:  # which no backbone changes
                continue
            if fit in ("head", "lora", "full") and not hasattr(backbones[w], "blocks"):
                continue
            row = []
            for k in args.labels:
                f1 = []
                for seed in range(args.draws):
                    drawn = np.random.default_rng(seed).permutation(train)
                    some = [drawn[cells.label[drawn] == c][:k] for c in range(n)]
                    guessed = guess(fit, w, np.concatenate(some), seed)
                    f1.append(100 * f1_of(cells, test, np.asarray(guessed)))
                row.append(mean_of(f1, 1))
            row.append(f"{100 * f1_of(cells, test, np.asarray(guess(fit, w, train, 0))):.1f}")
            what = fit if fit == "supervised" else f"{w}, {fit}"
            print("|", " | ".join([what, *row]), "|", flush=True)


# ------------------------------------------------------------------------------------ all runs


def write(line: dict):
    """Adds a finished run to LINES, and says so."""
    kept = {key: value for key, value in line.items() if key != "weights"}
    with open(LINES, "a") as file:
        print(json.dumps({"date": time.strftime("%Y-%m-%d")} | kept), file=file)
    f1 = [f"{how} {line[how]['weighted_f1']:.3f}" for how in ("20-NN", "linear")]
    print(*(line.get(key, "") for key in ("run", "seed", "steps")), *f1, flush=True)


def untrained(seed: int, out: Path) -> str:
    """The file of the backbone that the runs of a seed start with."""
    torch.manual_seed(seed)
    model = reddino.DINO(reddino.configure(**BASE, seed=seed))
    path = out / f"untrained-{seed}.pth"
    torch.save(model.teacher["backbone"].state_dict(), path)
    return str(path)


def all_runs(args, smears: Path, cells: ev.Cells, parts: tuple, done: list[dict]):
    """Every run that is not done; args.jobs at a time, a core each."""
    there = {(line["run"], line["seed"], line.get("iters", args.iters)) for line in done}
    for name in FREE:
        if (name, 0, args.iters) not in there:
            write(dict(run=name, seed=0) | score(name, cells, *parts))
    for seed in args.seeds:
        if ("untrained", seed, args.iters) not in there:
            found = score(untrained(seed, args.out), cells, *parts)
            write(dict(run="untrained", seed=seed) | found)
    cores, lock = sorted(os.sched_getaffinity(0))[: args.jobs], threading.Lock()

    def job(name, seed):
        with lock:
            core = cores.pop()
        os.sched_setaffinity(0, {core})  # of this thread, and of the training that it starts
        try:
            line = train(name, seed, args.iters, smears, args.out)
            line |= score(line["weights"], cells, *parts)
            with lock:
                write(line)
        finally:
            cores.append(core)

    todo = [(name, seed) for seed in args.seeds for name in args.runs]
    todo = [what for what in todo if (*what, args.iters) not in there]
    with ThreadPoolExecutor(len(cores)) as pool:
        try:
            for started in [pool.submit(job, *what) for what in todo]:
                started.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--chula", type=Path, required=True)
    add("--out", type=Path, default=ROOT / "out" / "ablations", help="folder for the runs")
    add("--iters", type=int, default=1000, help="steps of each run (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    add("--jobs", type=int, default=1, help="runs at a time, a core each")
    add("--table", action="store_true", help="print what is there")
    add("--few", nargs="+", metavar="WEIGHTS", help="what backbones and labels are worth")
    add("--labels", type=int, nargs="+", default=[10, 50], help="cells a class that --few draws")
    add("--draws", type=int, default=20, help="of these labels (default: %(default)s)")
    add("--fits", nargs="+", choices=FITS, default=FITS, help="how --few learns from labels")
    args = parser.parse_args()
    args.out = args.out.resolve()
    torch.set_num_threads(1)
    try:
        smears, path = prepare(args.chula, args.out)
        cells = ev.read_cells(str(path))
        parts = ev.make_splits(cells, 5, 0, ev.quiet)["the given split"][0]
        text = LINES.read_text() if LINES.exists() else ""
        done = [json.loads(line) for line in text.splitlines()]
        if args.table:
            table(done, cells, parts[1])
        elif args.few:
            few(args, cells, *parts)
        else:
            all_runs(args, smears, cells, parts, done)
    except (OSError, RuntimeError, ev.UserError) as error:
        parser.exit(2, f"ablations.py: error: {error}\n")


if __name__ == "__main__":
    main()
