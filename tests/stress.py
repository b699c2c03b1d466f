"""Kill a training of two processes at random, again and again; compare it with one left alone.

    python tests/stress.py               # 50 rounds, about 12 minutes on 2 cores
    python tests/stress.py --rounds 5 --seed 1

Each round starts the same torchrun command and kills with -9 at a random moment: while it starts,
trains or writes. Two rounds in three kill all of its processes at once (a power cut), the third
kills one trainer, and the others have to end by themselves. Then the newest checkpoint must be
there and readable; at the end the losses of all steps and the backbone must be bit for bit those of
a run that nothing has happened to.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import smears

# What a line of metrics.jsonl says of the process: its clock, and signs of the images it has seen.
OF_THE_PROCESS = {"seconds", "rank", "std", "match"}


def lines(out: Path) -> list[str]:
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def losses(out: Path) -> list[dict]:
    steps = [json.loads(line) for line in lines(out)]
    return [{k: v for k, v in step.items() if k not in OF_THE_PROCESS} for step in steps]


def saved(out: Path, name: str = "checkpoint.pth") -> int:
    """The step of a checkpoint, which has to be there, and whole. A kill between the two renames of
    a save leaves previous.pth alone, and the run goes on from that."""
    path = out / name if (out / name).exists() else out / "previous.pth"
    return torch.load(path, weights_only=True)["step"]


def start(data: Path, out: Path, iters: int) -> subprocess.Popen:
    """The training, with its words in OUT.log."""
    options = dict(data=data, out=out, arch="nano", unit="cells", iters=iters)
    options |= dict(batch_size=8, save_every=3, workers=1, seed=5, device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command.append(str(ROOT / "reddino.py"))
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def end(processes: list[psutil.Process]):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill(run: subprocess.Popen, everything: bool, chance: random.Random) -> float:
    """Kill -9; returns seconds until all of the run's processes are gone."""
    launcher = psutil.Process(run.pid)
    family, trainers = launcher.children(recursive=True), launcher.children()
    began = time.monotonic()
    end([launcher, *family] if everything or not trainers else [chance.choice(trainers)])
    run.wait(120)
    _, alive = psutil.wait_procs(family, timeout=30)
    end(alive)
    assert not alive, f"still there after the launcher's end: {alive}"
    return time.monotonic() - began


def wait_until(run: subprocess.Popen, out: Path, ready, pause: float = 0.05):
    """AssertionError with its last words if the run ends before."""
    began = time.monotonic()
    while not ready():
        if run.poll() is not None or time.monotonic() - began > 300:
            raise AssertionError(out.with_suffix(".log").read_text()[-3000:])
        time.sleep(pause)


def finish(run: subprocess.Popen, out: Path):
    assert run.wait(3600) == 0, out.with_suffix(".log").read_text()[-3000:]


def one_round(n: int, data: Path, out: Path, iters: int, startup: float, most, chance, say) -> dict:
    """Start, kill, look: {"starting" or "training": 1, "redone": steps, "took": seconds}."""
    before, step = len(lines(out)), saved(out) if n else 0
    kind = "training" if n == 0 or chance.random() < 0.8 else "starting"
    wait, steps = startup * chance.random(), chance.randint(1, most)
    until = min(step + steps + 6 * (n == 0), iters - 9)  # it must not end before it is killed
    run, began = start(data, out, iters), time.monotonic()

    def ready():
        if kind == "starting":
            return time.monotonic() - began >= wait
        return len(lines(out)) >= until

    wait_until(run, out, ready, 0.01 + 0.05 * chance.random())
    took = kill(run, chance.random() < 0.67, chance)
    after, there = saved(out), len(lines(out))
    saved(out, "previous.pth")
    say(f"round {n + 1}: killed while {kind}, {there} steps written (before: {before}), "
        f"checkpoint of step {after}, all gone after {took:.1f} s")  # fmt: skip
    return {kind: 1, "redone": there - after, "took": took}


def stress(folder: Path, rounds: int, seed: int = 0, say=print, steps: int = 40) -> dict:
    """The summary, as a dict; AssertionError where something was lost. steps: of a round."""
    smears.draw(folder / "smears", 4, seed)
    data, out, whole = folder / "smears/smears", folder / "out", folder / "whole"
    iters, chance, began = steps * rounds, random.Random(seed), time.monotonic()
    run = start(data, whole, iters)
    wait_until(run, whole, lambda: lines(whole))
    startup = time.monotonic() - began
    finish(run, whole)
    most = 3 * steps // 2  # until it is killed
    found = [one_round(n, data, out, iters, startup, most, chance, say) for n in range(rounds)]
    finish(start(data, out, iters), out)
    ours, theirs = losses(out), losses(whole)
    assert [step["step"] for step in ours] == list(range(iters))
    assert ours == theirs, "the metrics differ from those of the run left alone"
    a, b = (torch.load(o / "backbone.pth", weights_only=True) for o in (out, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    unreadable = out.with_suffix(".log").read_text().count("can't go on from it")
    assert unreadable == 0
    return dict(
        rounds=rounds,
        starting=sum(one.get("starting", 0) for one in found),
        training=sum(one.get("training", 0) for one in found),
        steps=iters,
        steps_done_again=sum(one["redone"] for one in found),
        unreadable_checkpoints=unreadable,
        slowest_end_s=round(max(one["took"] for one in found), 1),
        losses_and_backbone="bit for bit those of the run left alone",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = stress(Path(place), args.rounds, args.seed, lambda text: print(text, flush=True))
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
