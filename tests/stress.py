"""Kill a training of two processes at random, let it go on each time, compare it with one left alone.

    python tests/stress.py               # 50 rounds, about 12 minutes on 2 cores
    python tests/stress.py --rounds 5 --seed 1

Each round starts the same torchrun command and kills with -9 at a random moment: while it starts,
while it trains or while it writes. Two rounds in three kill all of its processes at once (a power
cut), the third kills one trainer, and the launcher has to end the other. Then the newest checkpoint
must be there and readable, and at the end the losses of
all steps and the backbone must be bit for bit those of a run that nothing has happened to.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import smears


def lines(out: Path) -> list[str]:
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def start(data: Path, out: Path, iters: int) -> subprocess.Popen:
    options = dict(
        data=data, out=out, arch="nano", iters=iters, batch_size=8, save_every=3, workers=1, seed=5
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "reddino.py",
    ]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    log = open(out.with_suffix(".log"), "a")
    return subprocess.Popen(
        command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def kill(run: subprocess.Popen, everything: bool, chance: random.Random) -> float:
    """Kill -9; returns seconds until all of the run's processes are gone."""
    launcher = psutil.Process(run.pid)
    family, trainers = launcher.children(recursive=True), launcher.children()
    victims = [launcher, *family] if everything or not trainers else [chance.choice(trainers)]
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    began = time.monotonic()
    run.wait(120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"still there after the launcher's end: {alive}"
    return time.monotonic() - began


def stress(folder: Path, rounds: int, seed: int = 0, say=print) -> dict:
    """The summary, as a dict; AssertionError where something was lost."""
    smears.draw(folder / "smears", 4, seed)
    data, out, whole, iters = (
        folder / "smears/smears",
        folder / "out",
        folder / "whole",
        40 * rounds,
    )
    began = time.monotonic()
    run = start(data, whole, iters)
    while not lines(whole):
        time.sleep(0.05)
        assert run.poll() is None, (folder / "whole.log").read_text()
    startup = time.monotonic() - began
    assert run.wait(3600) == 0, (folder / "whole.log").read_text()
    chance, kinds, slowest, redone = (
        random.Random(seed),
        dict.fromkeys(("starting", "training"), 0),
        0.0,
        0,
    )
    for n in range(rounds):
        before, began = len(lines(out)), time.monotonic()
        run = start(data, out, iters)
        kind = "training" if n == 0 or chance.random() < 0.8 else "starting"
        wait, steps = startup * chance.random(), chance.randint(1, 60)
        saved = torch.load(out / "checkpoint.pth", weights_only=True)["step"] if n else 0
        # the run must not end before it is killed
        until = min(saved + steps + (n == 0) * 6, iters - 9)
        while time.monotonic() - began < wait if kind == "starting" else len(lines(out)) < until:
            if run.poll() is not None or time.monotonic() - began > 300:
                raise AssertionError((folder / "out.log").read_text()[-3000:])
            time.sleep(0.01 + 0.05 * chance.random())
        took = kill(run, chance.random() < 0.67, chance)
        kinds[kind] += 1
        slowest = max(slowest, took)
        after = torch.load(out / "checkpoint.pth", weights_only=True)["step"]  # whole, and there
        torch.load(out / "previous.pth", weights_only=True)
        redone += len(lines(out)) - after
        say(f"round {n + 1}: killed while {kind}, {len(lines(out))} steps written (before: {before}), "
            f"checkpoint of step {after}, all gone after {took:.1f} s")  # fmt: skip
    assert start(data, out, iters).wait(3600) == 0, (folder / "out.log").read_text()[-3000:]
    # the clock, and signs from the last 2,048 tokens it has seen
    of_the_process = {"seconds", "rank", "std", "in_use", "match"}
    ours, theirs = ([{k: v for k, v in json.loads(line).items() if k not in of_the_process} for line in lines(o)]
                    for o in (out, whole))  # fmt: skip
    assert [line["step"] for line in ours] == list(range(iters))
    assert ours == theirs, "the metrics differ from those of the run left alone"
    a, b = (torch.load(o / "backbone.pth", weights_only=True) for o in (out, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)
    unreadable = (folder / "out.log").read_text().count("not a file that PyTorch can read")
    assert unreadable == 0
    return dict(
        rounds=rounds,
        **kinds,
        steps=iters,
        steps_done_again=redone,
        unreadable_checkpoints=unreadable,
        slowest_end_s=round(slowest, 1),
        losses_and_backbone="bit for bit those of the run left alone",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(
            json.dumps(
                stress(Path(place), args.rounds, args.seed, lambda text: print(text, flush=True)),
                indent=1,
            )
        )
