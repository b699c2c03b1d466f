"""How fast, how small: each number of tests/RESULTS.md, side by side with what else one could use.

    python tests/bench.py                          ours alone; says which rows have no peer here
    python tests/bench.py --lightly PEER/bin/python --albumentations OLD/bin/python --out bench.json
    python tests/bench.py --only train decode --rounds 3        some rows
    python tests/bench.py --quick                  a minute: does it run? Its numbers mean nothing
    python tests/bench.py --device cuda --arch vits14 vitb14    on a GPU: bfloat16, compiled
    python tests/bench.py --plan                   which batch fits which GPU, counted, not measured

Linux. Run it with nothing else on the machine: ours and the peer take turns, so a slow moment hits
both, but memory bandwidth is shared with whoever is there. The peers live in environments of their
own:

    python -m venv PEER && PEER/bin/pip install torch torchvision lightly-train  # of our torch
    python -m venv OLD
    OLD/bin/pip install "albumentations==1.4.3" "numpy<2" "opencv-python-headless<4.11"

Each side is a child process that does one unit of work (a step, a pass over some images) when asked
and answers with what it took; its peak memory is its own. A ratio is between neighbours in time;
shown are min, median and max.
"""

import argparse
import contextlib
import itertools
import json
import operator
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import unittest.mock
import weakref
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# --------------------------------------------------------------------------------------------------
# Children. SERVE is all that both sides of a comparison share; it calls `measure`, made before it.

SERVE = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer
def serve(measure):
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), file=answers, flush=True)
"""

LIGHTLY = """
import resource, time, torch
from lightly_train._methods.dinov2 import dinov2
from lightly_train._models.embedding_model import EmbeddingModel
from lightly_train._models.package_helpers import get_wrapped_model
from lightly_train._torch_helpers import update_momentum

wrapped = get_wrapped_model(f"dinov2/{arch}-notpretrained", num_input_channels=3)
for block in wrapped.get_model().blocks:  # as ours: without stochastic depth
    block.sample_drop_ratio = 0.0
settings = dinov2.DINOv2Args(output_dim=prototypes, center_method="sinkhorn_knopp",
                             koleo_loss_weight=0.0)
settings.weight_decay_start = 0.04
model = EmbeddingModel(wrapped_model=wrapped)
method = dinov2.DINOv2(settings, dinov2.DINOv2AdamWViTArgs(), model, batch, 3)
class Numbers:
    global_step, max_epochs, estimated_stepping_batches = 0, 1, 1000
type(method).trainer = property(lambda self: Numbers)
method.to(device).train()
method.teacher_embedding_model.eval(), method.teacher_head.eval()
optimizer = method.configure_optimizers()[0][0]
trained = [p for group in optimizer.param_groups for p in group["params"]]
sizes = [224] * 2 + [98] * local_crops
views = [torch.randn(batch, 3, size, size, device=device) for size in sizes]
pairs = [(method.student_embedding_model, method.teacher_embedding_model),
         (method.student_head, method.teacher_head)]

def measure():
    began = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=half):
        loss = method.training_step_impl({"views": views}, 0).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 3.0)
    optimizer.step()
    for student, teacher in pairs:
        update_momentum(student, teacher, m=0.994)
    loss.item()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(0).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return dict(seconds=seconds, peak=peak)
"""

RELEASE = """
import itertools, os, time, warnings
warnings.simplefilter("ignore")
import albumentations as A, cv2

cv2.setNumThreads(0)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
names = '''RandomFog Blur GaussianBlur MedianBlur MotionBlur Defocus GlassBlur Sharpen Emboss
RingingOvershoot ColorJitter HueSaturationValue RGBShift RandomBrightnessContrast RandomGamma
RandomToneCurve FancyPCA
CLAHE Equalize ChannelShuffle ChannelDropout InvertImg Solarize Posterize GaussNoise ISONoise
MultiplicativeNoise Downscale ImageCompression RandomShadow RandomSunFlare RandomRain
RandomSnow'''.split()
def pipeline(size, *scale):
    some = A.SomeOf([getattr(A, name)(p=0.85) for name in names], n=4)
    turns = [A.HorizontalFlip(p=0.85), A.VerticalFlip(p=0.85), A.RandomRotate90(p=0.85)]
    return A.Compose([A.RandomResizedCrop(size, size, scale=scale), some, *turns, A.Normalize()])
views = [pipeline(224, 0.32, 1.0)] * 2 + [pipeline(98, 0.05, 0.32)] * local_crops
endless = itertools.cycle(sorted(os.path.join(folder, name) for name in os.listdir(folder)))

def measure():
    began = time.process_time()
    for path in itertools.islice(endless, images):
        patch = cv2.resize(cv2.imread(path), (224, 224))
        for view in views:
            view(image=patch)
    return dict(seconds=time.process_time() - began)
"""


def step_flops(cfg, model) -> float:
    """Floating-point operations of a step's matrix products: 2 for each weight and token forward, 4
    more backward, and attention's 4 N^2 D a layer."""
    vit, head = model.student["backbone"], model.student["dino_head"]
    blocks, head = (
        2 * sum(p.numel() for p in part.parameters() if p.dim() == 2) for part in (vit.blocks, head)
    )

    def forward(size):
        n = (size // vit.patch_size) ** 2
        tokens = n + 1 + cfg.registers
        attention = (4 * tokens**2 * len(vit.blocks) + 6 * n * vit.patch_size**2) * vit.embed_dim
        return tokens * blocks + attention

    masked = 0.15 * (cfg.global_size // vit.patch_size) ** 2  # patches of a view, on average
    by_both = 2 * (forward(cfg.global_size) + head * (1 + masked))  # teacher, student
    return cfg.batch_size * (4 * by_both + 3 * cfg.local_crops * (forward(cfg.local_size) + head))


def matmul_rate(device, dtype) -> float:
    """Operations a second in a large matrix product here: what MFU is a share of."""

    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=8))


def a_batch(cfg, number, device, dtype):
    """Random views and real masks, as micro-batches on the device."""

    import augment
    import reddino

    B, patch = cfg.batch_size, reddino.ARCHS[cfg.arch]["patch_size"]
    grid, rng = cfg.global_size // patch, np.random.default_rng(number)
    views = [
        torch.randint(256, (B, n, 3, size, size), dtype=torch.uint8)
        for n, size in ((2, cfg.global_size), (cfg.local_crops, cfg.local_size))
    ]
    masks = [
        augment.block_mask(rng, grid, grid, r).ravel()
        for r in augment.mask_ratios(0, number, 2 * B)
    ]
    masks = torch.from_numpy(np.stack(masks)).unflatten(0, (B, 2))
    return reddino.split_batch(*views, masks, cfg.accumulate, device, dtype)


def train_step(arch, prototypes, local_crops, batch, device, half=True, recompute=False):
    """Ours: what reddino.train does between a batch and the log line."""
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import reddino

    cfg = reddino.configure(
        arch=arch,
        prototypes=prototypes,
        local_crops=local_crops,
        batch_size=batch,
        device=device,
        checkpoint_activations=recompute,
    )
    device, _ = reddino.choose_device(cfg)
    reddino.start_processes(device)
    model = reddino.DINO(cfg).to(device)
    optimizer, now = reddino.make_optimizer(model.student), reddino.schedules(cfg, cfg.iters // 2)
    if device.type == "cuda":
        for block in [*model.student["backbone"].blocks, *model.teacher["backbone"].blocks]:
            block.compile()

    def step(batch):
        reddino.apply_schedules(optimizer, now)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            targets, signs = model.teacher_targets(batch, now["teacher_temp"])
            losses = model(*batch[0], *targets[0])
        sum(losses.values()).backward()
        for part in model.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        optimizer.step()
        model.update_teacher(now["momentum"], signs["means"])
        return sum(losses.values()).item()

    def measure(number, count=False):
        batch = a_batch(cfg, number, device, torch.float32)
        if count:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                step(batch)
            return dict(counted=counter.get_total_flops())
        began = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        rate = matmul_rate(device, torch.bfloat16 if half else torch.float32)
        return dict(seconds=seconds, peak=peak, flops=step_flops(cfg, model), matmul=rate)

    return measure


class Live(TorchDispatchMode):
    """Bytes of all tensors that exist at a time, and the most there were. On fake tensors, which
    have shapes and no numbers, it takes seconds and no memory, whatever the model."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, made)
        return made

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def counted_peak(arch, half=True, **options) -> float:
    """GiB of tensors at the height of a step of reddino.py on a GPU, counted."""
    import reddino

    cfg = reddino.configure(arch=arch, device="cpu", **options)
    B, N = cfg.batch_size // cfg.accumulate, (cfg.global_size // 14) ** 2
    masked = int(0.15 * 2 * B * N)  # as many as the masks hide on average
    shapes = [(B, 2, 3, cfg.global_size, cfg.global_size),
              (B, cfg.local_crops, 3, cfg.local_size, cfg.local_size)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with (unittest.mock.patch("torch.nn.init.trunc_normal_"),  # it looks at numbers
          unittest.mock.patch("reddino.PLAIN_BELOW", 0),  # as on a GPU
          FakeTensorMode(), Live() as live):
        model = reddino.DINO(cfg)
        optimizer, now = reddino.make_optimizer(model.student), reddino.schedules(cfg, 1)
        for parameter in model.student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes AdamW's averages
        optimizer.zero_grad()
        batch = [(*map(torch.randn, shapes), torch.zeros(B, 2, N, dtype=torch.bool),
                  torch.zeros(masked, dtype=torch.long), torch.ones(masked))
                 for _ in range(cfg.accumulate)]
        with autocast:
            targets, signs = model.teacher_targets(batch, now["teacher_temp"])
        for micro_batch, answers in zip(batch, targets):
            with autocast:
                losses = model(*micro_batch, *answers)
            sum(losses.values()).backward()
        optimizer.step()
        model.update_teacher(now["momentum"], signs["means"])
    return live.peak / 2**30


def plan():
    """The first question of everyone with a GPU."""
    def room(card):  # what the driver, the process and gaps between tensors take
        return 0.9 * card - 1

    print("A step's peak in GiB: tensors, counted; the process, its libraries and gaps are another "
          "GiB and a tenth.\n")
    print("| | batch a GPU | counted | with --checkpoint-activations |\n|---|---|---|---|")
    for arch, batch in (("vits14", 280), ("vitb14", 196), ("vitl14", 64)):
        both = [counted_peak(arch, batch_size=batch, checkpoint_activations=recompute)
                for recompute in (False, True)]
        print(f"| {arch}, RedDino's | {batch} | {both[0]:.1f} | {both[1]:.1f} |", flush=True)
    print("\nBatch 64 on one card, the fastest that fits:\n\n| | 16 GB | 24 GB | 80 GB |")
    print("|---|---|---|---|")
    for arch in ("vits14", "vitb14", "vitl14"):
        found = {}
        for recompute, accumulate in itertools.product((False, True), (1, 2, 4, 8)):
            need = counted_peak(arch, batch_size=64, accumulate=accumulate,
                                checkpoint_activations=recompute)
            flags = f"--accumulate {accumulate}" + " --checkpoint-activations" * recompute
            for card in (16, 24, 80):
                if card not in found and need <= room(card):
                    found[card] = f"{flags} ({need:.1f})"
            if 16 in found:
                break
        cells = " | ".join(found.get(card, "does not fit") for card in (16, 24, 80))
        print(f"| {arch} | {cells} |", flush=True)


def augmented(folder, images, local_crops):
    """Ours, from the same files, decoded each time."""
    import augment

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tiles, crop, done = augment.Tiles([folder]), augment.MultiCrop(local_crops=local_crops), 0

    def measure():
        nonlocal done
        began = time.process_time()
        for i in range(done, done + images):
            tiles.kept.clear()  # or each would be decoded once
            crop(tiles[i % len(tiles)], augment.sample_rng(0, i % len(tiles), i // len(tiles)))
        done += images
        return dict(seconds=time.process_time() - began)

    return measure


def decoded(folder, images):
    """Share of the time that reading files takes, in the batches of a run on data that memory can't
    keep."""
    import augment
    import reddino

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    augment.KEEP, read, spent = (
        augment.KEEP / 10,
        augment.read_image,
        0.0,
    )  # as for 10 times the smears
    cfg = reddino.configure(data=[folder], batch_size=16, workers=0)
    batches = augment.batches(cfg, augment.Tiles([folder]), 0, 14, 0, 1, workers=0, pin=False)

    def timed(*args, **options):
        nonlocal spent
        began = time.process_time()
        try:
            return read(*args, **options)
        finally:
            spent += time.process_time() - began

    augment.read_image = timed

    def measure():
        nonlocal spent
        began, spent = time.process_time(), 0.0
        for _ in range(images // 16):
            next(batches)
        seconds = time.process_time() - began
        return dict(share=spent / seconds, seconds=seconds)

    return measure


class Child:
    """One side of a comparison; what comes from `ask` is a dict of numbers."""

    def __init__(self, work, python=sys.executable, **given):
        command = (
            [python, __file__, "--child", work.__name__, json.dumps(given)]
            if callable(work)
            else [
                python,
                "-c",
                SERVE
                + "\n".join(f"{k} = {v!r}" for k, v in given.items())
                + work
                + "serve(measure)",
            ]
        )
        self.said = tempfile.TemporaryFile("w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said)
        self.process = subprocess.Popen(command, text=True, **pipes)

    def ask(self, **what) -> dict:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(what), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            self.said.seek(0)
            raise RuntimeError(
                f"a child ended: {(self.said.read().strip() or 'without a word').splitlines()[-1]}"
            )
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


# --------------------------------------------------------------------------------------------------
# Rows. Each yields (what, unit, values, goal): all values that were measured, and ">= 1.5" or the
# like.


def drawn(folder: Path, images: int) -> Path:
    """Smears to measure on."""
    import smears

    return smears.draw(folder / f"drawn{images}", images).parent / "smears"


def train(args, folder):
    """A whole step, in float32 and under bfloat16 autocast, against LightlyTrain's under the same;
    on a GPU for each --arch in bfloat16, as RedDino is trained there."""
    gpu, batches = args.device == "cuda", {"vits14": 280, "vitb14": 196, "vitl14": 64}
    variants = [(True, False)] if gpu else [(False, False), (True, False), (True, True)]
    for arch, (half, recompute) in itertools.product(args.arch, variants):
        batch = args.batch_size or (batches.get(arch, 64) if gpu else 8)
        work = dict(
            arch=arch,
            prototypes=131072 if gpu else 65536,
            local_crops=1 if gpu else 8,
            batch=batch,
            device=args.device,
            half=half,
        )
        work |= dict(prototypes=4096, local_crops=1, batch=2) if args.quick else {}
        name = f"{arch}, batch {work['batch']}, {'bfloat16' if half else 'float32'}"
        name += ", activations recomputed" if recompute else ""
        with contextlib.ExitStack() as stack:
            ours = stack.enter_context(Child(train_step, **work, recompute=recompute))
            peer = args.lightly and stack.enter_context(Child(LIGHTLY, args.lightly, **work))
            o, p = [], []
            for number in range(-1 - gpu, args.rounds):  # the first fills caches, or compiles
                o.append(ours.ask(number=number + 2))
                p += [peer.ask()] if peer else []
            o, p = o[-args.rounds :], p[-args.rounds :]
            counted = None
            if not (gpu or recompute):
                counted = ours.ask(number=0, count=True)["counted"]
        yield f"step of {name}", "s", [x["seconds"] for x in o], ""
        yield "its peak memory", "GiB", [o[-1]["peak"] / 2**30], ""
        if p:
            yield "LightlyTrain's step", "s", [x["seconds"] for x in p], ""
            yield "its peak memory", "GiB", [p[-1]["peak"] / 2**30], ""
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(o, p)]
            yield "LightlyTrain's time : ours", "x", ratios, ">= 1"
            yield "peak memory, ours : its", "x", [o[-1]["peak"] / p[-1]["peak"]], ""
        else:
            yield "LightlyTrain's step: skipped, --lightly is not given", "", [], ""
        if counted:
            ratio = o[0]["flops"] / counted
            yield "step_flops : torch's FlopCounterMode, one step", "x", [ratio], ""
        best = max(x["matmul"] for x in o)
        share = [100 * x["flops"] / x["seconds"] / best for x in o]
        yield "MFU: share of a large product's rate", "%", share, ""


def memory(args, folder):
    """What logits take: the peak at 16 times the prototypes, less what belongs to the prototypes
    themselves."""
    peaks = []
    for prototypes in (131072, 8192):
        work = dict(
            arch="vits14",
            prototypes=prototypes,
            local_crops=8,
            batch=2 if args.quick else 8,
            device="cpu",
        )
        with Child(train_step, **work) as child:
            peak = [child.ask(number=n)["peak"] for n in range(2)][-1]
        # weight_v and weight_g in float32: student, its gradient, AdamW's two averages, teacher
        peaks.append(peak - 5 * 4 * prototypes * (256 + 1))
        yield f"peak memory at {prototypes:,} prototypes", "GiB", [peak / 2**30], ""
        yield (
            "without prototypes, their gradients, averages, teacher",
            "GiB",
            [peaks[-1] / 2**30],
            "",
        )
    yield "that at 131,072 : at 8,192", "x", [peaks[0] / peaks[1]], "< 1.3"


def augmentation(args, folder):
    """Views of an image on one core, from 224-pixel JPEGs, against the release's recipe."""
    from PIL import Image

    import augment

    cut = folder / "cut"
    cut.mkdir(exist_ok=True)
    tiles, n = augment.Tiles([args.data or drawn(folder, 16)]), 8 if args.quick else 64
    for i in range(n):
        Image.fromarray(tiles[i * (len(tiles) // n)]).save(cut / f"{i:03d}.jpg", quality=95)
    for crops in (1, 8):
        work = dict(folder=str(cut), images=8 if args.quick else 192, local_crops=crops)
        with contextlib.ExitStack() as stack:
            ours = stack.enter_context(Child(augmented, **work))
            peer = args.albumentations and stack.enter_context(
                Child(RELEASE, args.albumentations, **work)
            )
            pairs = [(ours.ask(), peer.ask() if peer else None) for _ in range(args.rounds + 1)][1:]
        o, p = zip(*([x and work["images"] / x["seconds"] for x in pair] for pair in pairs))
        yield f"augmentation, 2 + {crops} views", "images per CPU second", o, ""
        if p[0]:
            yield "the release's recipe", "images per CPU second", p, ""
            yield "ours : the release's", "x", [a / b for a, b in zip(o, p)], ">= 2"
        else:
            yield "the release's recipe: skipped, --albumentations is not given", "", [], ""


def decode(args, folder):
    """5-megapixel smears (mosaics of 4 x 4 of 640 x 480), cut into 224-pixel patches."""
    from PIL import Image

    import augment

    small = [
        augment.read_image(path)
        for path in augment.find_images(args.data or drawn(folder, 16))[:16]
    ]
    small = [np.array(Image.fromarray(x).resize((640, 480))) for x in small]
    (folder / "large").mkdir(exist_ok=True)
    for i in range(4 if args.quick else 12):
        order = np.random.default_rng(i).permutation(16) % len(small)
        rows = [np.concatenate([small[k] for k in order[r : r + 4]], 1) for r in (0, 4, 8, 12)]
        Image.fromarray(np.concatenate(rows)).save(folder / "large" / f"{i}.jpg", quality=95)
    with Child(decoded, folder=str(folder / "large"), images=32 if args.quick else 432) as child:
        child.ask()
        answers = [child.ask() for _ in range(args.rounds)]
    yield (
        "2560 x 1920 smears: share of loading that is decoding",
        "%",
        [100 * x["share"] for x in answers],
        "< 20",
    )


def trained(args, folder, processes=1, arch="nano"):
    """Run a training; img/s and the share of time that it waits for data, of each line of its
    log."""
    data = args.data or drawn(folder, 16 if args.quick else 48)
    out = tempfile.mkdtemp(dir=folder)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    command = torchrun if processes > 1 else [sys.executable]
    command += [
        ROOT / "reddino.py",
        "--data",
        data,
        "--arch",
        arch,
        "--workers",
        "1",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    command += (
        ["--iters", 40 if args.quick else 160, "--log-every", 20]
        if arch == "nano"
        else [
            "--iters",
            5,
            "--log-every",
            1,
            "--batch-size",
            8,
            "--local-crops",
            1 if args.quick else 8,
            "--prototypes",
            1024 if args.quick else 65536,
        ]
    )
    threads = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // processes, 1))}
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | threads
    )
    found = re.findall(r"([\d.]+) images/s, (\d+)% waiting", run.stdout)[
        1:
    ]  # in the first, processes start
    if run.returncode:
        raise RuntimeError(
            f"reddino.py ended with {run.returncode}: {run.stderr.strip().splitlines()[-1]}"
        )
    return [float(rate) for rate, _ in found], [float(wait) for _, wait in found]


def loader(args, folder):
    """Does the demo's training wait for its data?"""
    waits = [wait for _ in range(1 if args.quick else 2) for wait in trained(args, folder)[1]]
    yield "nano, 1 loading worker: share of time waiting for data", "%", waits, "< 5"


def processes(args, folder):
    """The same batch over 2 processes with 1 thread each, or in 1 with 2: the first row's step, and
    nano's."""
    for arch in ("vits14", "nano"):
        pairs = [
            [statistics.median(trained(args, folder, n, arch)[0]) for n in (1, 2)]
            for _ in range(min(args.rounds, 3))
        ]
        yield f"{arch}, 1 process, all cores", "img/s", [a for a, _ in pairs], ""
        yield f"{arch}, 2 processes, half of them each", "img/s", [b for _, b in pairs], ""
        yield f"{arch}, 2 processes : 1", "x", [b / a for a, b in pairs], ">= 0.9"


def probe(args, folder):
    """Classifiers on frozen features of 18,744 cells (Chula RBC-12's number) against scikit-
    learn's."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    import eval as ev

    if args.cells:
        cells = ev.read_cells(args.cells)
        x = ev.extract_features(
            ev.load_backbone("pixels"), torch.cat(list(ev.crops_of(cells, 80, 64)))
        )
        y, what = torch.from_numpy(cells.label), f"16 x 16 pixels of {len(cells.label):,} cells"
    else:  # as a ViT-S gives: 384, variances falling as 1 / rank^2, all mixed
        rng, n = np.random.default_rng(0), 2000 if args.quick else 18744
        y = torch.from_numpy(rng.choice(12, n, p=np.arange(1, 13) / 78))
        x = (rng.normal(size=(12, 384))[y] * 0.6 + rng.normal(size=(n, 384))) / np.arange(1, 385)
        x = torch.from_numpy(x @ np.linalg.qr(rng.normal(size=(384, 384)))[0]).float()
        what = f"{n:,} x 384 synthetic features"
    test = torch.from_numpy(np.random.default_rng(1).permutation(len(x)) % 5 == 0)
    a, b, ya, yb = x[~test], x[test], y[~test], y[test].numpy()

    def sklearn_linear(l2=1e-3):
        mean, std = a.mean(0), a.std(0, correction=0)
        fit = LogisticRegression(C=1 / (l2 * len(a)), max_iter=5000).fit(
            ((a - mean) / std).numpy(), ya.numpy()
        )
        return fit.predict(((b - mean) / std).numpy())

    def sklearn_knn():
        unit = [torch.nn.functional.normalize(t, dim=1).numpy() for t in (a, b)]
        return (
            KNeighborsClassifier(
                20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute"
            )
            .fit(unit[0], ya.numpy())
            .predict(unit[1])
        )

    sides = {
        "linear probe": (lambda: ev.linear_probe(a, ya, b, 1e-3).argmax(1).numpy(), sklearn_linear),
        "20-NN": (lambda: ev.knn(a, ya, b).argmax(1).numpy(), sklearn_knn),
    }
    for name, both in sides.items():
        seconds, right = ([], []), [0, 0]
        for _ in range(1 if args.quick else min(args.rounds, 3)):
            for side, run in enumerate(both):
                began = time.perf_counter()
                right[side] = float((run() == yb).mean())
                seconds[side].append(time.perf_counter() - began)
        yield f"{name} on {what}", "s", seconds[0], ""
        yield "scikit-learn's", "s", seconds[1], ""
        yield (
            "scikit-learn's time : ours",
            "x",
            [q / p for p, q in zip(*seconds)],
            "> 1" if "linear" in name else "",
        )
        yield "accuracy, ours less scikit-learn's", "points", [100 * (right[0] - right[1])], ""


ROWS = {
    row.__name__: row for row in (train, memory, augmentation, decode, loader, processes, probe)
}


def reached(goal: str, value: float) -> bool:
    sign, than = goal.split()
    return {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[sign](
        value, float(than)
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lightly", help="python of an environment with lightly-train")
    parser.add_argument(
        "--albumentations", help="python of an environment with albumentations 1.4.3"
    )
    parser.add_argument("--data", help="folder of smears; without it they are drawn")
    parser.add_argument(
        "--cells", help="cells.csv for the evaluation's row; without it features are drawn"
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--arch", nargs="+", default=["vits14"])
    parser.add_argument(
        "--batch-size",
        type=int,
        default=0,
        help="of the train step; by default 8, on a GPU RedDino's",
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plan", action="store_true", help="a step's memory, counted; no timing")
    parser.add_argument("--out", default=str(ROOT / "out" / "bench.json"))
    args = parser.parse_args()
    if args.plan:
        return plan()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "bench.py: error: --device cuda: PyTorch finds none here\n")
    args.rounds, args.only = (
        1 if args.quick else args.rounds,
        ["train"] if args.device == "cuda" else args.only,
    )
    name = f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}, "
    name += torch.backends.cpu.get_cpu_capability()
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    results = dict(
        date=time.strftime("%Y-%m-%d"),
        machine=name,
        torch=torch.__version__,
        quick=args.quick,
        rows=[],
    )
    print(
        f"{results['date']}, {name}, torch {torch.__version__}",
        "--quick: not to be quoted" * args.quick,
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            try:
                for what, unit, values, goal in ROWS[name](args, Path(folder)):
                    row = dict(row=name, what=what, unit=unit, values=list(values), goal=goal)
                    if values:
                        low, mid, high = min(values), statistics.median(values), max(values)
                        row |= dict(min=low, median=mid, max=high)
                        verdict = ""
                        if goal:
                            word = "reached" if reached(goal, mid) else "MISSED"
                            verdict = f"  {goal}: {word}"
                        print(f"{name:12s} {what:58s} {mid:8.4g} [{low:.4g}, {high:.4g}] {unit}"
                              + verdict, flush=True)
                    else:
                        print(f"{name:12s} {what}", flush=True)
                    results["rows"].append(row)
            except (RuntimeError, ImportError) as error:  # the other rows are still worth having
                print(f"{name:12s} failed: {error}", flush=True)
                results["rows"].append(dict(row=name, what=f"failed: {error}", values=[]))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        exec(SERVE)
        serve(globals()[sys.argv[2]](**json.loads(sys.argv[3])))  # noqa: F821  (of SERVE)
    else:
        main()
