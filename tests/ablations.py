"""Which of RedDino's claims hold where a laptop can repeat them? Pairs of trainings on Chula RBC-12.

    python tests/ablations.py --chula CHULA             every run that tests/ablations.jsonl lacks
    python tests/ablations.py --chula CHULA --jobs 2    two at a time, a core each
    python tests/ablations.py --chula CHULA --table     what is there, as a table
    python tests/ablations.py --chula CHULA --few out/backbone.pth    what it is worth, see few

CHULA holds smears/NNN.jpg and cells.csv (image,x,y,label). A run trains a `nano` from scratch for
--iters steps on one core and is scored once: fit on the labels of the smears that it was trained
on, asked on a block of smears that neither training nor the choice of any recipe has seen. It can be
stopped at any moment; the same command goes on, within a run too. Each finished run is a line of
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

# The base is nano on single cells, from all smears. Below, what each run changes.
BASE = dict(unit="cells")
RUNS = {
    "base": {},
    "KoLeo off": dict(koleo=0),
    "moving-average centering": dict(centering="moving-average"),
    "32 transforms": dict(augment="reddino"),
    "DINOv2's transforms": dict(augment="dinov2"),
    "80-pixel tiles": dict(unit="tiles"),
    "224-pixel tiles": dict(unit="tiles", tile_size=224, global_size=64),
    "4 local views": dict(local_crops=4),
    "no patch-token loss": dict(ibot=0),
}

PAIRS = (("32 transforms", "DINOv2's transforms"), ("224-pixel tiles", "80-pixel tiles"))


def block(image: str) -> int:
    """Of a smear, by the number in its name."""
    return (int(Path(image).stem) - 1) // 20 % 5


def prepare(chula: Path, out: Path) -> dict[str, Path]:
    """A folder to train on, without the smears never seen; and the table with the split to
    score."""
    folders = {"smears": out / "smears", "table": out / "cells.csv"}
    if folders["table"].exists():
        return folders
    folders["smears"].mkdir(parents=True, exist_ok=True)
    for path in sorted((chula / "smears").iterdir()):
        link = folders["smears"] / path.name
        if block(path.name) != NEVER_SEEN and not link.exists():
            link.symlink_to(path.resolve())
    with open(chula / "cells.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] != "uncategorised"]
    with open(out / "cells.part", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "x", "y", "label", "split"])
        for row in rows:
            split = "test" if block(row["image"]) == NEVER_SEEN else "train"
            path = (chula / row["image"]).resolve()
            table.writerow([path, row["x"], row["y"], row["label"], split])
    (out / "cells.part").rename(folders["table"])
    return folders


def score(weights: str, size: int, cells: ev.Cells, parts: list) -> dict:
    """Weighted F1 of 20-NN and of the linear probe, and their guesses, a letter for each cell
    asked."""
    x = ev.embed(
        weights, ev.load_backbone(weights, size, "cpu"), cells, 80, None, lambda text: None
    )
    y, found, (train, test) = torch.from_numpy(cells.label), {}, parts[0]
    probs = {
        "20-NN": ev.knn(x[train], y[train], x[test], 20, len(cells.classes)),
        "linear": ev.tuned_probe(
            x[train], y[train], x[test], cells.group[train], len(cells.classes)
        ),
    }
    for name, p in probs.items():
        guess = p.argmax(1).numpy()
        f1 = ev.scores(ev.confusion(cells.label[test], guess, len(cells.classes)))["weighted_f1"]
        found[name] = {
            "weighted_f1": round(float(f1), 4),
            "guess": "".join(chr(97 + g) for g in guess),
        }
    return found


def train(name: str, seed: int, iters: int, folders: dict, out: Path) -> dict:
    """One run, or the rest of it: its recipe, its last step, where its backbone is."""
    folder = out / f"{name.replace(' ', '-')}-{iters}-{seed}"
    given = (
        dict(
            data=folders["smears"],
            out=folder,
            arch="nano",
            iters=iters,
            seed=seed,
            workers=0,
            log_every=100,
            device="cpu",
        )
        | BASE
        | RUNS[name]
    )
    command = [sys.executable, ROOT / "reddino.py"]
    for option, value in given.items():
        command += ["--" + option.replace("_", "-"), value]
    run = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if run.returncode:
        last = (run.stderr.strip() or "without a word").splitlines()[-1]
        raise RuntimeError(f"{name}, seed {seed}: {last}")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rank = [step["rank"] for step in steps if step.get("rank")]
    dino = np.mean([step["dino"] or np.nan for step in steps[-20:]])
    return dict(
        run=name,
        seed=seed,
        iters=iters,
        options=RUNS[name],
        steps=len(steps),
        dino=round(dino, 3),
        rank=round(rank[-1], 1) if rank else None,
        weights=str(folder / "backbone.pth"),
    )


def table(lines: list[dict], cells: ev.Cells, test: np.ndarray):
    """Each run's mean and deviation over seeds; mean differences from base and of PAIRS, with
    intervals over smears and
    seeds."""

    def again(line, how):  # weighted F1, and of each replicate: [1 + replicates]
        guess = np.array([ord(c) - 97 for c in line[how]["guess"]])
        judged = ev.judge(cells.label[test], np.eye(len(cells.classes))[guess], cells.group[test])
        return 100 * judged["again"]["weighted_f1"]

    runs = {}
    for line in lines:
        runs.setdefault(line["run"], {})[line["seed"]] = line | {
            how: again(line, how) for how in ("20-NN", "linear")
        }

    def minus(name, base, how):
        own, others = runs[name], runs.get(base, {})
        own = (
            dict.fromkeys(others, own[0]) if name in ("pixels", "colour") else own
        )  # which know no seed
        gaps = [own[seed][how] - others[seed][how] for seed in own if seed in others]
        if name == base or not gaps:
            return ""
        gaps = np.array(
            gaps
        )  # [seeds, 1 + replicates of the smears]; of the seeds as many are drawn each time, too
        drawn = np.random.default_rng(0).integers(len(gaps), size=(gaps.shape[1] - 1, len(gaps)))
        again = gaps[drawn, np.arange(1, gaps.shape[1])[:, None]].mean(1)
        return "{:.1f} [{:.1f}, {:.1f}]".format(
            gaps[:, 0].mean(), *np.percentile(again, [2.5, 97.5])
        )

    print(
        "| run | seeds | steps | dino | 20-NN | minus base | linear probe | minus base |\n"
        + "|---" * 8
        + "|"
    )
    for name, own in runs.items():
        own = [*own.values()]
        row = [
            name,
            len(own),
            *(
                f"{np.mean([x[k] for x in own]):.{d}f}" if k in own[0] else ""
                for k, d in (("steps", 0), ("dino", 2))
            ),
        ]
        for how in ("20-NN", "linear"):
            f1 = [x[how][0] for x in own]
            row.append(
                f"{np.mean(f1):.1f}" + (f" ± {np.std(f1, ddof=1):.1f}" if len(f1) > 1 else "")
            )
            row.append(minus(name, "base", how))
        print("| " + " | ".join(map(str, row)) + " |")
    for name, base in PAIRS:
        if {name, base} <= runs.keys():
            print(
                f"| {name} minus {base} | | | | | {minus(name, base, '20-NN')} | | {minus(name, base, 'linear')} |"
            )


def supervised(
    x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor, classes: int, seed: int, steps: int
):
    """What a nano says that learns from labels alone: crops [n, 3, 80, 80], their classes, crops
    asked; int [m]."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(reddino.build_vit("nano", 40), torch.nn.Linear(128, classes))
    vary = v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.ColorJitter(0.2, 0.2)]
    )
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)

    def small(images):
        return ev.network_input(images, (40, 40), torch.device("cpu"))

    for _ in range(steps):
        some = torch.randint(len(x), (64,))
        loss = F.cross_entropy(net(small(torch.stack([*map(vary, x[some])]))), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        return torch.cat([net.eval()(small(part)).argmax(1) for part in test_x.split(256)]).numpy()


def few(weights: list[str], cells: ev.Cells, train: np.ndarray, test: np.ndarray):
    """Prints the weighted F1 on the smears never seen that comes of the labels of 10 cells a class
    (mean and deviation of three draws), and of all: by a nano that learns from labels alone, and
    by linear probes on what backbones say."""
    crops, y, n = (
        torch.cat(list(ev.crops_of(cells, 80, 80))),
        torch.from_numpy(cells.label),
        len(cells.classes),
    )
    features = {w: ev.extract_features(ev.load_backbone(w, None, "cpu"), crops) for w in weights}

    def f1(guess):
        return 100 * float(ev.scores(ev.confusion(cells.label[test], guess, n))["weighted_f1"])

    by = {"supervised": [f1(supervised(crops[train], y[train], crops[test], n, 0, 3000))]}
    for w, x in features.items():
        by[w] = [
            f1(ev.tuned_probe(x[train], y[train], x[test], cells.group[train], n).argmax(1).numpy())
        ]
    for seed in range(3):
        drawn = np.random.default_rng(seed).permutation(train)
        ten = np.concatenate([drawn[cells.label[drawn] == c][:10] for c in range(n)])
        by["supervised"].append(f1(supervised(crops[ten], y[ten], crops[test], n, seed, 500)))
        for w, x in features.items():
            by[w].append(
                f1(ev.linear_probe(x[ten], y[ten], x[test], ev.FEWSHOT_L2, n).argmax(1).numpy())
            )
    print("| | 10 labels a class | all labels |\n|---|---|---|")
    for name, (of_all, *of_ten) in by.items():
        print(f"| {name} | {np.mean(of_ten):.1f} ± {np.std(of_ten, ddof=1):.1f} | {of_all:.1f} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chula", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "ablations", help="folder for the runs"
    )
    parser.add_argument("--iters", type=int, default=2000, help="steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--few", nargs="+", metavar="WEIGHTS", help="what backbones and labels are worth"
    )
    args = parser.parse_args()
    args.out = args.out.resolve()
    folders = prepare(args.chula, args.out)
    cells = ev.read_cells(str(folders["table"]))
    parts = ev.make_splits(cells, 5, 0, lambda text: None)["the CSV's split"]
    done = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    if args.table:
        return table(done, cells, parts[0][1])
    torch.set_num_threads(1)
    if args.few:
        return few(args.few, cells, *parts[0])
    cores, lock = sorted(os.sched_getaffinity(0))[: args.jobs], threading.Lock()

    def write(line: dict):
        line = dict(date=time.strftime("%Y-%m-%d")) | line
        with open(LINES, "a") as file:
            print(
                json.dumps({k: v for k, v in line.items() if k != "weights"}), file=file, flush=True
            )
        f1 = [f"{how} {line[how]['weighted_f1']:.3f}" for how in ("20-NN", "linear")]
        print(*(line.get(k, "") for k in ("run", "seed", "steps")), *f1, flush=True)

    there = {(line["run"], line["seed"], line.get("iters", args.iters)) for line in done}
    for name in {"pixels", "colour"} - {run for run, *_ in there}:
        write(dict(run=name, seed=0) | score(name, None, cells, parts))
    for seed in args.seeds:
        if ("untrained", seed, args.iters) not in there:
            torch.manual_seed(seed)
            model = reddino.DINO(reddino.configure(arch="nano", seed=seed))
            torch.save(model.teacher["backbone"].state_dict(), args.out / "untrained.pth")
            write(
                dict(run="untrained", seed=seed)
                | score(str(args.out / "untrained.pth"), None, cells, parts)
            )

    def job(what):
        with lock:
            core = cores.pop()
        os.sched_setaffinity(0, {core})  # of this thread, and of the training that it starts
        try:
            line = train(*what, args.iters, folders, args.out)
            line |= score(line["weights"], None, cells, parts)
            with lock:
                write(line)
        finally:
            cores.append(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        todo = [
            (name, seed)
            for seed in args.seeds
            for name in args.runs
            if (name, seed, args.iters) not in there
        ]
        try:
            for finished in [pool.submit(job, what) for what in todo]:
                finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
