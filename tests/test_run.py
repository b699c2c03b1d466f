"""reddino.py, the loop: resume, signals, full disks, bad files, bad numbers, several processes."""

import contextlib
import errno
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from corpus import bad_corpus, picture
from filelock import FileLock
from PIL import Image
from stress import stress

import augment
import reddino
from augment import Tiles
from eval import evaluate, knn_monitor
from reddino import configure, read_backbone, train, vit_from_state

torch.set_num_threads(1)
SCRIPT = Path(reddino.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}


# nano with 2 layers of 128 and DINOv2's projection of patches: what is tested is the loop.
SMALL = """
import reddino
reddino.ARCHS["nano"] = dict(embed_dim=128, depth=2, heads=2, patch_size=8, layerscale=1.0)
reddino.HEAD_SIZES["nano"] = dict(hidden=16, bottleneck=8)
reddino.cores = lambda: 1
"""


@pytest.fixture(autouse=True, scope="module")
def small():
    before = dict(reddino.ARCHS), dict(reddino.HEAD_SIZES), reddino.cores
    exec(SMALL)
    yield
    reddino.ARCHS.update(before[0])
    reddino.HEAD_SIZES.update(before[1])
    reddino.cores = before[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two folders of 96 x 96 pictures, 4 patches of 48 each: 3 and 5 of them, 32 patches, 8 batches
    of 4 an epoch."""
    folder = tmp_path_factory.mktemp("images")
    for name, count in (("a", 3), ("b", 5)):
        (folder / name).mkdir()
        for i in range(count):
            Image.fromarray(picture(96, 96, 10 * count + i)).save(folder / name / f"{i}.png")
    return folder


def options(images, folder, **more):
    """A run of 10 steps, an epoch and a bit: tens of milliseconds a step."""
    small = dict(
        arch="nano",
        prototypes=32,
        batch_size=4,
        global_size=32,
        local_size=16,
        local_crops=1,
        tile_size=48,
        iters=10,
        workers=0,
        save_every=3,
        log_every=2,
        device="cpu",
        dtype="float32",
        drop_path=0.2,
        koleo=0.1,
    )
    return {**small, "data": [str(images / "a"), str(images / "b")], "out": str(folder), **more}


def line(given):
    """Options as a command line."""
    words = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        words += (
            [flag]
            if value is True
            else [flag, *map(str, value if isinstance(value, list) else [value])]
        )
    return words


def go(images, out, monitor=None, **more):
    return train(configure(**options(images, out, **more)), monitor)


def main(capsys, given):
    """Exit code and error line of a command that must fail in words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        reddino.main(line(given))
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2 and said.startswith("reddino.py: error: ") and said.count("\n") == 1
    ), said
    return said


def metrics(out):
    return [json.loads(text) for text in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    """What must be the same in a resumed run, step by step; each step must be there once."""
    steps = metrics(out)
    assert [s["step"] for s in steps] == list(range(len(steps)))
    return [{k: s[k] for k in ("loss", "dino", "ibot", "koleo", "lr") if k in s} for s in steps]


def checkpoint(out, name="checkpoint.pth"):
    saved = torch.load(Path(out) / name, weights_only=True)
    return saved | {"networks": [saved[part] for part in ("student", "teacher", "centers")]}


def assert_same(a, b):
    """Two nests of dicts, lists and tensors are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    a, b = checkpoint(a), checkpoint(b)
    for part in ("student", "teacher", "centers", "optimizer", "step"):
        assert_same(a[part], b[part])


def each_step(monkeypatch, act):
    """act(n, model, losses) in the n-th step from now on; what it returns are its losses."""
    forward, count = reddino.DINO.forward, iter(range(10**6))

    def wrapped(self, *args):
        losses = forward(self, *args)
        return act(next(count), self, losses) or losses

    monkeypatch.setattr(reddino.DINO, "forward", wrapped)
    return lambda: monkeypatch.setattr(reddino.DINO, "forward", forward)


def cut(monkeypatch, at, images, out, which=signal.SIGTERM, **more):
    """Run until a signal arrives in the middle of its step number `at`."""
    undo = each_step(monkeypatch, lambda n, *_: os.kill(os.getpid(), which) if n == at else None)
    with pytest.raises(SystemExit) as stop:
        go(images, out, **more)
    undo()
    assert stop.value.code == 128 + which


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("whole") / "out"
    go(images, out)
    return out


# ------------------------------------------------------------------------------------------- a run,
# and going on


def test_a_run_writes_what_it_says(whole):
    steps = metrics(whole)
    assert len(steps) == 10 and all(math.isfinite(s["loss"]) for s in steps)
    assert all(
        s["loss"] == pytest.approx(s["dino"] + s["ibot"] + s["koleo"], rel=1e-5) for s in steps
    )
    assert checkpoint(whole)["step"] == 10 and checkpoint(whole, "previous.pth")["step"] == 9
    state = torch.load(whole / "backbone.pth", weights_only=True)
    assert_same(dict(state), read_backbone(str(whole / "checkpoint.pth")))
    other = timm.models.VisionTransformer(
        32, 8, embed_dim=128, depth=2, num_heads=2, init_values=1.0, num_classes=0
    )
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert missing == [] and unexpected == ["mask_token"]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = other.eval().forward_features(x)[:, 0]
        torch.testing.assert_close(vit_from_state(state)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centering", ["sinkhorn-knopp", "moving-average"])
def test_a_resumed_run_is_the_uninterrupted_one(
    centering, images, whole, tmp_path, monkeypatch, capsys
):
    if centering == "moving-average":
        whole = tmp_path / "whole"
        go(images, whole, centering=centering)
    out, more = tmp_path / "out", dict(centering=centering)
    cut(monkeypatch, 1, images, out, workers=2, **more)
    assert (
        checkpoint(out)["step"] == 2 and len(metrics(out)) == 2
    )  # the step in hand was ended and counts
    cut(monkeypatch, 5, images, out, signal.SIGINT, workers=1, log_every=3, save_every=100, **more)
    assert checkpoint(out)["step"] == 8  # just where an epoch ends
    capsys.readouterr()
    go(images, out, **more)
    assert "at step 8" in capsys.readouterr().out
    assert_same_run(out, whole)
    go(images, out, **{**more, "iters": 10})  # a finished run stays as it is
    assert_same_run(out, whole)


def test_killed_at_any_moment(tmp_path):
    """Two short rounds of tests/stress.py: two processes under torchrun, kill -9 at a random moment
    of one or all of them, bit for bit."""
    summary = stress(tmp_path, rounds=2, steps=12)
    assert summary["rounds"] == 2 and summary["unreadable_checkpoints"] == 0


def test_a_signal_to_the_launcher_saves(images, tmp_path):
    """What a scheduler does: SIGTERM to torchrun, which passes it on."""
    (tmp_path / "driver.py").write_text(SMALL + "if __name__ == '__main__': reddino.main()")
    given = options(images, tmp_path / "out", iters=10**6, save_every=10**6, workers=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen([*command, tmp_path / "driver.py", *line(given)], env=ENVIRONMENT) as run:
        while not (tmp_path / "out/metrics.jsonl").exists() or len(metrics(tmp_path / "out")) < 5:
            time.sleep(0.2)
            assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) != 0
    assert checkpoint(tmp_path / "out")["step"] == len(losses(tmp_path / "out")) >= 5


def test_a_scaler_that_searches_its_scale_is_no_fault(images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**28)
    )
    go(images, tmp_path, dtype="float16", iters=24)
    skipped = [s["skipped"] for s in metrics(tmp_path)]
    assert 3 < sum(skipped) < 20 and not skipped[-1], skipped
    saved = checkpoint(tmp_path)
    assert saved["scaler"]["scale"] == 2.0 ** (28 - sum(skipped))
    go(images, tmp_path, dtype="float16", iters=26)  # and goes on with the scale that it has found
    assert not any(s["skipped"] for s in metrics(tmp_path)[24:])


@pytest.fixture(scope="module")
def tables(images, tmp_path_factory):
    """Labelled cells of the images: by brightness, which any features tell, and by nothing."""
    folder = tmp_path_factory.mktemp("tables")
    rows = {"bright": [], "nothing": []}
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        pixels = augment.read_image(path)
        for k, (y, x) in enumerate(itertools.product((20, 48, 76), (20, 48, 76))):
            bright = pixels[y - 8 : y + 8, x - 8 : x + 8].mean() > 128
            rows["bright"].append(f"{path},{x},{y},{'high' if bright else 'low'}")
            rows["nothing"].append(f"{path},{x},{y},{'odd' if (i + k) % 2 else 'even'}")
    for name, lines in rows.items():
        (folder / f"{name}.csv").write_text("\n".join(["image,x,y,label", *lines]))
    return [str(folder / f"{name}.csv") for name in rows]


def test_features_are_scored_meanwhile(images, tables, tmp_path, monkeypatch, capsys):
    cfg = reddino.configure(
        arch="nano", eval_data=tables, global_size=32, unit="cells", tile_size=16
    )
    monitor = knn_monitor(cfg)
    go(images, tmp_path / "whole", monitor, save_every=2, lr=0.05)
    found = {s["step"]: (s["knn"], s["knn1"]) for s in metrics(tmp_path / "whole") if "knn" in s}
    assert list(found) == [1, 3, 5, 7, 9]  # at each checkpoint
    table = evaluate(
        tables[0],
        {"last": tmp_path / "whole/backbone.pth"},
        ["knn"],
        crop=16,
        size=32,
        device="cpu",
        log=lambda text: None,
    )
    judged = {row["protocol"]: row["weighted_f1"] for row in table["rows"]}
    assert judged["20-NN"] == pytest.approx(found[9][0])
    assert f"knn {found[9][0]:.4g}" in capsys.readouterr().out

    cut(monkeypatch, 5, images, tmp_path / "cut", save_every=2, lr=0.05)
    go(images, tmp_path / "cut", monitor, save_every=2, lr=0.05)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    go(images, tmp_path / "blind", save_every=2, lr=0.05)  # looking changes nothing
    assert_same_run(tmp_path / "whole", tmp_path / "blind")
    given = options(images, tmp_path / "x", eval_data=["none.csv"])
    assert "none.csv" in main(capsys, given) and not (tmp_path / "x/metrics.jsonl").exists()


def test_a_frozen_backbone_waits_for_its_heads(images, tmp_path, monkeypatch):
    seen = []
    each_step(
        monkeypatch,
        lambda n, model, found: seen.append(
            [
                [p.detach().clone() for p in model.student[part].parameters()]
                for part in ("backbone", "dino_head")
            ]
        ),
    )
    go(images, tmp_path, freeze_backbone_steps=4, drop_path=0.0)
    moved = [
        [not all(map(torch.equal, a, b)) for a, b in zip(*pair)]
        for pair in itertools.pairwise(seen)
    ]
    assert [m[0] for m in moved] == [False] * 5 + [
        True
    ] * 4  # the fifth is the first of its warm-up, at rate 0
    assert all(m[1] for m in moved[1:])  # lr's own warm-up begins at 0
    rates = [(s["backbone_lr"] / s["lr"]) for s in metrics(tmp_path)[1:]]
    assert rates == pytest.approx([0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1])


def test_compiled_blocks_train_as_plain_ones(images, tmp_path, monkeypatch):
    """Traced, differentiated and cut at graph breaks as on a GPU; only C++ is not made of it."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    more = dict(iters=2, local_crops=0, drop_path=0.0)
    go(images, tmp_path, compile=True, **more)
    go(images, tmp_path / "plain", **more)
    for a, b in zip(losses(tmp_path), losses(tmp_path / "plain"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_an_unreadable_checkpoint(images, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    cut(monkeypatch, 6, images, out)  # checkpoints of steps 7 and 6
    newest, older = out / "checkpoint.pth", out / "previous.pth"
    newest.write_bytes(newest.read_bytes()[:-2000])
    capsys.readouterr()
    go(images, out, iters=10)
    said = capsys.readouterr().out
    assert "checkpoint.pth" in said and "previous.pth: going on at step 6" in said
    assert_same_run(out, whole)
    newest.write_bytes(b"")
    older.write_bytes(b"no checkpoint")
    said = main(capsys, options(images, out))
    assert "checkpoint.pth" in said and "previous.pth" in said and newest.read_bytes() == b""


def test_without_the_newest_checkpoint(images, whole, tmp_path, monkeypatch):
    cut(monkeypatch, 6, images, tmp_path)
    (tmp_path / "checkpoint.pth").rename(
        tmp_path / "checkpoint.pth.new"
    )  # a kill where there are no hard links
    go(images, tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_full_disk_keeps_the_last_good_checkpoint(images, whole, tmp_path, monkeypatch, capsys):
    save, count = torch.save, iter(range(100))

    def full(state, file):
        if next(count) == 1:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in main(capsys, options(images, tmp_path / "out"))
    assert checkpoint(tmp_path / "out")["step"] == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoint.pth",
        "lock",
        "metrics.jsonl",
    ]
    monkeypatch.setattr(torch, "save", save)
    go(images, tmp_path / "out")
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_really_full_disk(tmp_path):
    reddino.write_aside(tmp_path / "weights.pth", {"a": torch.ones(3)})
    (tmp_path / "weights.pth.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"weights\.pth"):
        reddino.write_aside(tmp_path / "weights.pth", {"a": torch.zeros(300_000)})
    assert torch.load(tmp_path / "weights.pth", weights_only=True)["a"].sum() == 3
    assert os.path.exists("/dev/full") and not os.path.lexists(tmp_path / "weights.pth.new")


def damaged(saved, kind):
    """A checkpoint in which something is wrong that its loading would not notice."""
    if kind == "no student":
        saved["student"] = {}
    if kind == "a short average":
        saved["optimizer"]["state"][3]["exp_avg"] = torch.zeros(1)
    if kind == "another shape":
        saved["teacher"]["backbone.norm.bias"] = torch.zeros(7)
    if kind == "no optimizer":
        del saved["optimizer"]
    return saved


@pytest.mark.parametrize(
    "kind", ["no student", "a short average", "another shape", "no optimizer", "a flipped bit"]
)
def test_a_damaged_checkpoint_is_noticed_and_the_good_one_kept(
    kind, images, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    cut(monkeypatch, 6, images, out)  # checkpoints of steps 7 and 6
    path, before = out / "checkpoint.pth", (out / "previous.pth").read_bytes()
    if kind == "a flipped bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    else:
        torch.save(damaged(torch.load(path, weights_only=True), kind), path)
    undo = each_step(monkeypatch, lambda n, *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        go(images, out)
    undo()
    assert (out / "previous.pth").read_bytes() == before  # the broken one did not take its place
    go(images, out)
    assert_same_run(out, whole)


def test_data_that_moved_goes_on_and_others_are_told(images, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    cut(monkeypatch, 4, images, out)
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    go(images, out, data=[str(moved / "a"), str(moved / "b")])
    assert "bit for bit" not in capsys.readouterr().out
    assert_same_run(out, whole)
    (moved / "a/0.png").rename(moved / "a/renamed.png")
    go(images, out, data=[str(moved / "a"), str(moved / "b")], iters=11)
    assert "bit for bit" in capsys.readouterr().out


def test_a_third_global_view_is_one_number(images, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "GLOBAL_VIEWS", 3)
    shapes, forward = [], reddino.DINO.forward

    def seen(self, global_views, local_views, *rest):
        shapes.append((global_views.shape[1], local_views.shape[1]))
        return forward(self, global_views, local_views, *rest)

    monkeypatch.setattr(reddino.DINO, "forward", seen)
    go(images, tmp_path / "out", iters=2, workers=0, local_crops=2)
    assert shapes == [(3, 2)] * 2 and not any(s["skipped"] for s in metrics(tmp_path / "out"))


def test_two_runs_in_one_folder(images, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/lock"):
        assert "another run" in main(capsys, options(images, tmp_path / "out"))
    go(images, tmp_path / "out", iters=1)


def test_metrics_with_strange_lines_keep_their_steps(images, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    cut(monkeypatch, 5, images, out)
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1:1] = [b"", b"\xff\xfe broken", b"[3]", '{"umlaut": "\u00e4"}'.encode(), lines[0][:20]]
    path.write_bytes(b"\r\n".join(lines) + b'\n{"step": 99}\n')
    go(images, out)
    assert_same_run(out, whole)


def test_a_bug_in_a_monitor_loses_no_step(images, whole, tmp_path):
    def monitor(backbone, device):
        if len(losses(tmp_path)) == 5:
            raise ValueError("a bug of mine")
        return {"mine": np.float32(0.5), "more": torch.tensor(2)}

    with pytest.raises(ValueError, match="a bug of mine"):
        go(images, tmp_path, monitor)
    assert checkpoint(tmp_path)["step"] == len(losses(tmp_path)) == 6
    assert [(s["mine"], s["more"]) for s in metrics(tmp_path) if "mine" in s] == [(0.5, 2)]
    go(images, tmp_path)
    assert_same_run(tmp_path, whole)


def test_from_python(images, tmp_path, monkeypatch):
    """In a thread, as in a server; without a stream that has settings, as in a notebook; with
    tuples and numpy's numbers; with a RANK that some other program left behind."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    more = {"iters": 2, "tile_size": (48, 32), "seed": np.int32(3)}
    thread = threading.Thread(target=go, args=(images, tmp_path / "thread"), kwargs=more)
    thread.start()
    thread.join()
    assert len(losses(tmp_path / "thread")) == 2
    go(images, tmp_path / "thread", **more | {"iters": 3})
    assert len(losses(tmp_path / "thread")) == 3
    with contextlib.redirect_stdout(io.StringIO()) as said:
        reddino.main(line(options(images, tmp_path / "main", iters=1)))
    assert "done: " in said.getvalue()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_closed_terminal_and_a_closed_pipe_save(images, tmp_path):
    command = [sys.executable, "-c", SMALL + "reddino.main()"]

    def closed(given, handler):
        """Exit code of a run whose terminal is closed while it trains."""
        run = subprocess.Popen(
            [*command, *line(given)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, handler),
        )
        run.stdout.readline()
        run.stdout.readline()
        run.send_signal(signal.SIGHUP)
        run.stdout.read()
        return run.wait(60)

    given = options(images, tmp_path / "hup", iters=10**6, save_every=10**6)
    assert closed(given, signal.SIG_DFL) == 128 + signal.SIGHUP
    assert checkpoint(tmp_path / "hup")["step"] == len(losses(tmp_path / "hup")) > 0

    given = options(images, tmp_path / "nohup", iters=30)
    assert closed(given, signal.SIG_IGN) == 0 and len(losses(tmp_path / "nohup")) == 30

    given = options(images, tmp_path / "pipe", iters=10**6, save_every=10**6)
    run = subprocess.Popen(
        [*command, *line(given)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run.stdout.readline()
    run.stdout.close()  # | head -1
    assert run.wait(60) == 2
    said = run.stderr.read()
    assert said.startswith("reddino.py: error: ") and said.count("\n") == 1
    run.stderr.close()
    assert checkpoint(tmp_path / "pipe")["step"] == len(losses(tmp_path / "pipe")) > 0


def torchrun_says(monkeypatch, world):
    told = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {"WORLD_SIZE": world, **told}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR"])
def test_what_torchrun_would_have_said_is_named(missing, images, tmp_path, monkeypatch, capsys):
    torchrun_says(monkeypatch, "2")
    monkeypatch.delenv(missing)
    assert f"{missing} is not: start" in main(capsys, options(images, tmp_path))


def test_no_compiler_is_said(images, tmp_path, monkeypatch, capsys):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "g++")))
    assert "or --no-compile" in main(capsys, options(images, tmp_path, compile=True))


@pytest.mark.parametrize(
    "told, world, wanted", [("3", "1", 3), ("1", "1", 1), ("1", "2", 2), (None, "1", 2)]
)
def test_threads_are_those_that_the_user_wants(told, world, wanted, monkeypatch):
    monkeypatch.setattr(reddino, "cores", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    set_to = [int(told or 0)]
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    torchrun_says(monkeypatch, world)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    reddino.start_processes(torch.device("cpu"))
    assert set_to[-1] == wanted


def test_options_that_make_another_run_are_named(images, tmp_path, capsys):
    out = tmp_path / "out"
    go(images, out, iters=2)
    said = main(capsys, options(images, out, prototypes=33, seed=5))
    assert "--prototypes was 32" in said and "--seed was 0" in said
    go(images, out, iters=4, workers=1, log_every=1, save_every=2)
    assert checkpoint(out)["step"] == 4


def test_a_power_cut_can_leave_zeros_in_the_metrics(images, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    with open(tmp_path / "out" / "metrics.jsonl", "r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(bytes(40))
    go(images, tmp_path / "out", iters=12)
    assert [s["step"] for s in metrics(tmp_path / "out")] == [*range(9), 10, 11]


def test_one_folder_may_be_a_string_and_none_is_refused(tmp_path):
    assert configure(data="smears", tile_size=48).data == ["smears"]
    with pytest.raises(augment.UserError, match="--data"):
        train(configure(out=str(tmp_path), arch="nano"))


# -------------------------------------------------------------------------------------------
# numbers gone wrong


def plant(kind, losses, model):
    if kind == "loss":
        return losses | {"dino": losses["dino"] * math.nan}
    weight = model.student["backbone"].norm.weight  # 0 forward, not a number backward
    return losses | {"dino": losses["dino"] + (weight.sum() * 0).sqrt()}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(kind, images, tmp_path, monkeypatch, capsys):
    seen = []

    def act(n, model, found):
        seen.append([p.detach().clone() for p in [*model.parameters(), *model.buffers()]])
        return plant(kind, found, model) if n in (2, 3, 5) else found

    each_step(monkeypatch, act)
    go(images, tmp_path, iters=8, centering="moving-average")
    assert len(seen) == 8
    for n in range(7):
        moved = not all(map(torch.equal, seen[n], seen[n + 1]))
        assert moved == (n not in (2, 3, 5))
    assert all(torch.isfinite(t).all() for t in seen[-1])
    assert [s["step"] for s in metrics(tmp_path) if s["skipped"]] == [2, 3, 5]
    said = [text for text in capsys.readouterr().out.splitlines() if "not finite" in text]
    assert len(said) == 3 and all(".png" in text for text in said)
    read = {
        Path(p).name for text in said for p in text.split("files: ")[1].replace("'", "").split(", ")
    }
    assert read <= {f"{i}.png" for i in range(5)}


def test_three_in_a_row_stop_the_run(images, tmp_path, monkeypatch, capsys):
    undo = each_step(
        monkeypatch, lambda n, model, found: plant("loss", found, model) if n >= 4 else found
    )
    assert "three" in main(capsys, options(images, tmp_path))
    good = checkpoint(tmp_path, "previous.pth")
    assert "three" in main(capsys, options(images, tmp_path))  # saves nothing new over the good
    assert_same(checkpoint(tmp_path, "previous.pth"), good)
    saved = checkpoint(tmp_path)
    assert saved["step"] == 7
    assert all(
        torch.isfinite(t).all() for net in ("student", "teacher") for t in saved[net].values()
    )
    undo()
    go(images, tmp_path)  # and it goes on from there
    assert len(losses(tmp_path)) == 10


# ------------------------------------------------------------------------------------------- bad
# data


def listed(out):
    return Counter(
        text.split("': ")[0].split('": ')[0][1:]
        for text in (out / "skipped.txt").read_text().splitlines()
    )


def test_a_folder_full_of_trouble(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    good, bad = bad_corpus(tmp_path / "data")
    steps = math.ceil((len(good) + len(bad)) / 8)  # at least an epoch
    go(
        tmp_path,
        tmp_path / "out",
        data=[str(tmp_path / "data")],
        tile_size=0,
        batch_size=8,
        iters=steps,
        workers=1,
    )
    assert listed(tmp_path / "out") == Counter(repr(path)[1:-1] for path in bad)
    assert len(losses(tmp_path / "out")) == steps
    with open(tmp_path / "out" / "skipped.txt", "ab") as file:
        file.write(b"'half a character \xc3")  # the disk was full
    more = {"data": [str(tmp_path / "data")], "tile_size": 0, "batch_size": 8, "workers": 1}
    go(tmp_path, tmp_path / "out", iters=steps + 1, **more)
    assert len(losses(tmp_path / "out")) == steps + 1
    said = capsys.readouterr().out
    assert all(said.count(repr(path)) <= 1 for path in bad) and str(len(bad)) in said


def test_more_broken_than_whole(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(9):
        path = tmp_path / "data" / f"{i}.jpg"
        Image.fromarray(picture(64, 64, i)).save(path)
        if i > 2:  # the header is whole: it shows when they are decoded
            path.write_bytes(path.read_bytes()[:-200])
    more = dict(data=[str(tmp_path / "data")], tile_size=0, log_every=1)
    go(tmp_path, tmp_path / "out", **more)
    assert "6 files can't be read" in capsys.readouterr().out and len(listed(tmp_path / "out")) == 6
    for i in range(9):
        (tmp_path / "data" / f"{i}.jpg").write_bytes(b"<html>")
    assert "can't be read" in main(capsys, options(tmp_path, tmp_path / "new", **more))


def test_files_that_disappear(images, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "KEEP", 0)  # these few would be read once and kept
    for i in range(8):
        Image.fromarray(picture(48, 48, i)).save(tmp_path / f"{i}.png")
    out, gone = tmp_path / "out", [tmp_path / "2.png", tmp_path / "6.png"]

    def lose(n, *_):
        for path in gone if n == 1 else []:
            path.unlink()

    each_step(monkeypatch, lose)
    given = dict(data=[str(tmp_path)], iters=9, save_every=4, log_every=3)
    go(images, out, **given)
    assert listed(out) == Counter(map(str, gone)) and len(losses(out)) == 9
    Image.fromarray(picture(48, 48, 3)).save(
        gone[0]
    )  # one comes back; what was listed stays listed, once
    (tmp_path / "4.png").unlink()
    (tmp_path / "4.png").symlink_to(tmp_path / "nowhere")
    go(images, out, **{**given, "iters": 15})
    assert {str(gone[0]), str(gone[1])} <= set(listed(out)) and max(listed(out).values()) == 1


def test_before_any_work(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cases = [
        (dict(batch_size=33), "33"),
        (dict(out=str(tmp_path / "file")), "file"),
        (dict(out=str(tmp_path / "file" / "within")), "within"),
        (dict(data=[str(images / "nowhere")]), "nowhere"),
        (dict(data=[str(images / "a"), str(images / "a")]), "twice"),
        (dict(init=str(tmp_path / "none.pth")), "none.pth"),
        (dict(global_size=33), "33"),
        (dict(local_size=40), "--local-size"),
        (dict(window=[40, 0]), "--window"),
        (dict(window=[math.nan, 400]), "--window"),
        (
            dict(data=[str(tmp_path / "slices")], augment="mri", batch_size=1),
            "--window",
        ),  # HU, and no window
    ]
    (tmp_path / "slices").mkdir()
    np.save(
        tmp_path / "slices" / "0.npy",
        np.random.default_rng(0).integers(-1000, 1000, (64, 64), np.int16),
    )
    if not torch.cuda.is_available():
        cases.append((dict(device="cuda"), "cuda"))
    for change, word in cases:
        given = options(images, tmp_path / "out", **change)
        assert word in main(capsys, given)
        assert not (tmp_path / "out/checkpoint.pth").exists()
    (tmp_path / "empty").mkdir()
    assert "empty" in main(
        capsys, options(images, tmp_path / "out", data=[str(tmp_path / "empty")])
    )


def test_init_of_another_architecture(images, tmp_path, capsys):
    torch.save(reddino.build_vit("vits14", depth=1).state_dict(), tmp_path / "vits14.pth")
    assert "another architecture" in main(
        capsys, options(images, tmp_path / "out", init=str(tmp_path / "vits14.pth"))
    )
    torch.save(reddino.build_vit("nano", 64).state_dict(), tmp_path / "nano.pth")
    go(images, tmp_path / "out", init=str(tmp_path / "nano.pth"), iters=1, lr=0.0, warmup=0.0)
    start = torch.load(tmp_path / "nano.pth", weights_only=True)
    saved = checkpoint(tmp_path / "out")
    for net in (saved["student"], saved["teacher"]):
        assert torch.equal(
            net["backbone.blocks.1.mlp.fc1.weight"], start["blocks.1.mlp.fc1.weight"]
        )
        assert net["backbone.pos_embed"].shape == (1, 17, 128)


# ------------------------------------------------------------------------------------------- who
# reads what


def drawn(images, world, start=0, **more):
    """[step][rank] -> list of (epoch, patch, ratios)."""
    cfg = configure(**options(images, "out", **more))
    tiles = Tiles(cfg.data, cfg.tile_size)
    shares = [augment.Batches(cfg, tiles, 8, rank, world) for rank in range(world)]
    return tiles, [[list(of.draws(step)) for of in shares] for step in range(start, cfg.iters)]


def test_each_patch_once_an_epoch_across_processes(images):
    tiles, steps = drawn(
        images, 2, batch_size=6, iters=16
    )  # 96 draws: three epochs of 32, which 6 does not divide
    draws = [draw for step in steps for rank in step for draw in rank]
    assert Counter(draw[:2] for draw in draws) == Counter(
        (e, p) for e in range(3) for p in range(len(tiles))
    )
    assert all(len(rank) == 3 for step in steps for rank in step)
    for world in (1, 3):  # the batch is the same however it is shared
        for a, b in zip(steps, drawn(images, world, batch_size=6, iters=16)[1]):
            assert sorted(x for rank in a for x in rank) == sorted(x for rank in b for x in rank)
    assert steps[5:] == drawn(images, 2, start=5, batch_size=6, iters=16)[1]
    orders = [
        [p for step in steps for rank in step for e, p, _ in rank if e == epoch]
        for epoch in range(3)
    ]
    assert orders[0] != orders[1] != orders[2]
    assert steps != drawn(images, 2, batch_size=6, iters=16, seed=1)[1]


def test_balance_draws_from_the_folders_evenly(images):
    _, steps = drawn(
        images, 1, batch_size=4, iters=30, balance=True
    )  # 60 from each: 12 and 20 patches
    counts = Counter(p for (rank,) in steps for _, p, _ in rank)
    assert {counts[p] for p in range(12)} == {5} and {counts[p] for p in range(12, 32)} == {3}
    assert all(sum(p < 12 for _, p, _ in rank) == 2 for (rank,) in steps)


def test_masks_are_drawn_by_sample(images):
    cfg = configure(**options(images, "out", batch_size=8))
    of_step = augment.Batches(cfg, Tiles(cfg.data, cfg.tile_size), 8)
    batch, again = of_step[0], of_step[0]
    for a, b in zip(batch[:3], again[:3]):
        assert np.array_equal(a, b)
    batch = [torch.as_tensor(part) for part in batch[:3]]
    assert batch[0].shape == (8, 2, 3, 32, 32) and batch[1].shape == (8, 1, 3, 16, 16)
    assert batch[2].shape == (8, 2, 16) and batch[0].dtype == torch.uint8
    assert batch[2].any(2).sum() <= 8 and batch[2].any()
    third = list(of_step.draws(0))[2]
    assert torch.equal(batch[0][2], torch.as_tensor(of_step.views(*third)[0]))


# -------------------------------------------------------------------------------------------
# several processes

DRIVER = '''
"""Runs each config of a JSON file in turn, as one of torchrun's processes; prints how each
ended."""
import atexit, json, os, signal, sys
from pathlib import Path
import torch
from reddino import DINO

def threads(when):
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    count = sum("gloo" in name for name in names)
    print(f"rank {rank} {count} of gloo's threads {when}", flush=True)

atexit.register(threads, "when Python goes")  # the first registered is the last to run
rank, teach, forward = int(os.environ["RANK"]), DINO.teacher_targets, DINO.forward
for job in json.load(open(sys.argv[1])):
    steps = iter(range(10**6))
    def act(self, *args, job=job, steps=steps):
        self.n = n = next(steps)
        if rank == 1 and n == job.get("fail"):
            raise RuntimeError("planted in process 1")
        if rank == 1 and n == job.get("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        return teach(self, *args)
    def spoil(self, *args, job=job):
        losses = forward(self, *args)
        bad = rank == 1 and self.n == job.get("nan")
        return losses | {"dino": losses["dino"] * float("nan")} if bad else losses
    DINO.teacher_targets, DINO.forward = act, spoil
    try:
        reddino.train(reddino.configure(**job["options"]))
        code = 0
    except SystemExit as stop:
        code = stop.code
    print(f"rank {rank} job {job['name']} code {code} after {next(steps)}", flush=True)
    torch.distributed.barrier()  # the next job reads what process 0 has just saved
logits = torch.load(sys.argv[2], weights_only=True)
mine = logits[:3] if rank == 0 else logits[3:]
empty = logits if rank == 0 else logits[:0]  # a process may hold no row at all
_, mean = reddino.moving_average(mine, 0.1, torch.zeros(1, logits.shape[1]))
found = {"uneven": reddino.sinkhorn_knopp(mine, 0.05), "mean": mean,
         "one has none": reddino.sinkhorn_knopp(empty, 0.05)}
torch.save(found, sys.argv[2] + str(rank))
threads("at work")
reddino.leave_processes()
'''


def torchrun(tmp_path, jobs, logits=None):
    (tmp_path / "driver.py").write_text(SMALL + DRIVER)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    torch.save(torch.zeros(4, 2) if logits is None else logits, tmp_path / "logits.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["driver.py", "jobs.json", str(tmp_path / "logits.pt")]
    return subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )


@pytest.fixture(scope="module")
def two(images, tmp_path_factory):
    """What two processes made: 20 steps in both centerings, one of them stopped by a signal to one
    process, resumed."""
    folder = tmp_path_factory.mktemp("two")
    exact = dict(iters=20, dtype="float64", drop_path=0.0, log_every=7, save_every=50)
    runs = {
        "sinkhorn": dict(exact, koleo=0.0),
        "moving": dict(exact, centering="moving-average", koleo=0.0, local_crops=0, accumulate=2),
    }
    jobs = [
        {"name": name, "options": options(images, folder / name, **more)}
        for name, more in runs.items()
    ]
    short = options(images, folder / "short", iters=9, save_every=3)
    jobs += [
        {"name": "stopped", "options": short, "stop": 4},
        {"name": "resumed", "options": short},
        {"name": "uncut", "options": {**short, "out": str(folder / "uncut")}},
        {"name": "nan", "options": options(images, folder / "nan", iters=4), "nan": 2},
    ]
    logits = torch.randn(10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = torchrun(folder, jobs, logits)
    assert run.returncode == 0, run.stderr
    for name, more in runs.items():
        go(images, folder / f"{name} alone", **more | dict(accumulate=1))
    return folder, run.stdout, logits


@pytest.mark.parametrize("name", ["sinkhorn", "moving"])
def test_two_processes_are_one(name, two):
    folder, _, _ = two
    together, alone = losses(folder / name), losses(folder / f"{name} alone")
    assert len(together) == len(alone) == 20
    for step, (a, b) in enumerate(zip(together, alone)):
        assert a == pytest.approx(b, rel=1e-9), step
    assert alone[-1]["loss"] != pytest.approx(alone[5]["loss"], rel=1e-4)  # it did learn meanwhile
    a, b = checkpoint(folder / name), checkpoint(folder / f"{name} alone")
    for net in ("student", "teacher", "centers"):
        for key in a[net]:
            torch.testing.assert_close(a[net][key], b[net][key], rtol=1e-6, atol=1e-8)


def test_targets_over_processes_with_unequal_rows(two):
    folder, _, logits = two
    parts = [torch.load(folder / f"logits.pt{rank}", weights_only=True) for rank in range(2)]
    whole = reddino.sinkhorn_knopp(logits, 0.05)
    assert [len(p["uneven"]) for p in parts] == [3, 7] and [
        len(p["one has none"]) for p in parts
    ] == [10, 0]
    torch.testing.assert_close(
        torch.cat([p["uneven"] for p in parts]), whole, rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(parts[0]["one has none"], whole, rtol=1e-12, atol=1e-14)
    for (
        part
    ) in parts:  # the mean over rows: that over processes would weigh three rows as much as seven
        torch.testing.assert_close(part["mean"][0], logits.mean(0))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_of_gloos_outlives_python(two):
    _, said, _ = two  # one that did would abort its process, now and then
    at_work, left = (
        re.findall(rf"rank [01] (\d) of gloo's threads {when}", said)
        for when in ("at work", "when P")
    )
    assert len(at_work) == 2 and "0" not in at_work and left == ["0", "0"], said


def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_goes_on(two):
    folder, said, _ = two
    for rank in range(2):
        assert (
            f"rank {rank} job stopped code 143 after 5" in said
            and f"rank {rank} job resumed code 0 after 4" in said
        )
    assert_same_run(folder / "short", folder / "uncut")


def test_a_bad_number_in_one_process_skips_the_step_in_all(two, images):
    folder, said, _ = two
    assert [s["skipped"] for s in metrics(folder / "nan")] == [False, False, True, False]
    tiles, steps = drawn(images, 2, iters=4)
    wanted = {tiles.file_of(p) for rank in steps[2] for _, p, _ in rank}
    said = "".join(text for text in said.splitlines() if "not finite" in text)
    assert all(repr(path) in said for path in wanted)  # each process names its own


def test_resuming_on_another_number_of_processes_says_so(two, images, capsys):
    folder, _, _ = two
    go(images, folder / "short", iters=11)
    said = capsys.readouterr().out
    assert "processes" in said.split("step 10/11")[0] and "bit" in said
    assert len(losses(folder / "short")) == 11
    go(images, folder / "short", iters=12)  # from here on it is one process's run


def test_one_processs_failure_ends_all(images, tmp_path):
    start = time.monotonic()
    given = options(images, tmp_path / "out", iters=10_000)
    run = torchrun(tmp_path, [{"name": "failing", "options": given, "fail": 2}])
    assert run.returncode != 0 and time.monotonic() - start < 60
    assert "planted in process 1" in run.stderr


def test_a_stopped_process_is_named(images, tmp_path):
    """By the other, after a time limit (10 minutes, here seconds) and a checkpoint."""
    given = options(images, tmp_path / "out", iters=100, save_every=100)
    script = """
from datetime import timedelta
import os, signal, sys
reddino.timedelta = lambda **given: timedelta(seconds=6)
reddino.time.sleep = lambda seconds, sleep=reddino.time.sleep: sleep(seconds / 8)
step = reddino.train_step
def stopped(run, *given):
    if run.rank == 1 and run.step == 3:
        open("pid", "w").write(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(run, *given)
reddino.train_step = stopped
reddino.main(sys.argv[1:])
"""
    (tmp_path / "driver.py").write_text(SMALL + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.Popen(
        [*command, "driver.py", *line(given)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = next(text for text in run.stderr if "reddino.py: error" in text)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # torchrun would wait 30 seconds
    run.stderr.read()
    assert said.endswith("failed: process 1 does not answer; start again\n") and run.wait(60)
    assert checkpoint(tmp_path / "out")["step"] == 3


def test_a_batch_that_the_processes_can_t_share(images, tmp_path, capsys, monkeypatch):
    torchrun_says(monkeypatch, "3")
    monkeypatch.setattr(reddino, "start_processes", lambda *_: (0, 3))
    assert "3 processes" in main(capsys, options(images, tmp_path))


def test_the_first_error_is_told_where_saving_fails_too(images, tmp_path, monkeypatch):
    def bug(backbone, device):
        monkeypatch.setattr(reddino, "write_aside", full)
        raise ZeroDivisionError("in the monitor")

    def full(*_, **__):
        raise OSError("is the disk full?")

    with pytest.raises(ZeroDivisionError, match="in the monitor"):
        reddino.train(reddino.configure(**options(images, tmp_path)), bug)
