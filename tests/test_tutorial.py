"""The course's checks, as they stand in tutorial.ipynb: they accept right answers in several forms,
refuse plausible wrong ones with a hint, and never stop a notebook. The method can be changed from
it: what is trained with is the change, each time anew."""
import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "tutorial.ipynb").read_text("utf-8"))
CELLS = [(cell, "".join(cell["source"]), cell["metadata"].get("tags", []))
         for cell in NOTEBOOK["cells"]]
STUBS, CHECKS, SOLUTIONS = [], {}, {}
for _, text, tags in CELLS:
    if "exercise" in tags:
        STUBS.append(text)
    if "check" in tags:
        CHECKS[int(re.search(r"# Check (\d+)", text)[1])] = text
    if "solution" in tags:
        number, code = re.search(r"Solution (\d+).*```python\n(.*?)```", text, re.S).groups()
        SOLUTIONS[int(number)] = code

# --------------------------------------------------------------------------------------------------
# Answers. The printed solution is one right form of each; here is a second one, and two wrong ones.

RIGHT = {
    1: """
def lazy_f1(counts):
    share = counts / counts.sum()
    precision, recall = share.max(), 1.0
    return np.array(2 / (1 / precision + 1 / recall) * share.max())    # an array without dimensions
""",
    2: """
def by_chance(group, source, q):
    same = total = 0
    for g, s in zip(group, source):
        if g != group[q]:
            total += 1
            same += s == source[q]
    return same / total
""",
    3: """
def half_life(m):
    steps, left = 0, 1.0
    while left > 0.5:
        steps, left = steps + 1, left * m
    return steps
""",
    4: """
def least_loss(targets):
    return F.cross_entropy(targets.clamp_min(1e-12).log(), targets).item()
""",
    5: """
def share_lost(height, width, tile):
    lost = height * width
    for y in range(height // tile):
        for x in range(width // tile):
            lost -= tile * tile
    return lost / (height * width)
""",
    6: """
def pairs(G, L):
    return sum(student != teacher for teacher in range(G) for student in range(G + L))
""",
    7: """
def embed(x, weight, bias):
    p = weight.shape[-1]
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
    return torch.einsum("bnk,dk->bnd", x, weight.reshape(len(weight), -1)) + bias
""",
    8: """
def alarm(row, K):                       # a line without rank raises KeyError: it can't be judged
    flat = np.log(K) - row["teacher_entropy"] <= 0.001 * np.log(K)
    return np.bool_(row["rank"] < 2) | np.bool_(row["std"] < 0.01) | flat
""",
    9: """
class Restain(A.ImageOnlyTransform):
    def get_params(self):
        return {"factor": np.array([1.5, 1.0, 0.7])}

    def apply(self, img, factor, **params):
        curves = 255 * np.linspace(0, 1, 256)[:, None] ** factor[None]
        return np.stack([curves[img[..., c], c] for c in range(3)], -1).astype(np.uint8)
""",
    10: """
def batch_centering(logits, temp, n_iters=3):
    likes = torch.exp((logits - logits.mean(0)) / temp)
    return likes / likes.sum(1, keepdim=True)
""",
    11: """
def disc_mask(rng, height, width, ratio):
    y, x = rng.random(2) * (height, width)
    places = [(math.hypot(i + 0.5 - y, j + 0.5 - x), i, j)
              for i in range(height) for j in range(width)]
    mask = np.full((height, width), False)
    for _, i, j in sorted(places)[:int(ratio * height * width)]:
        mask[i, j] = True
    return mask
""",
    12: """
def uniformity_loss(x, eps=1e-8):
    x = x / x.norm(dim=1, keepdim=True)
    squared = 2 - 2 * x @ x.T
    others = ~torch.eye(len(x), dtype=torch.bool)
    return torch.logsumexp(-2 * squared[others], 0) - math.log(others.sum())
""",
    13: """
def macro_f1(counts):
    f1 = []
    for c in range(len(counts)):
        precision = counts[c, c] / max(counts[:, c].sum(), 1)
        recall = counts[c, c] / max(counts[c].sum(), 1)
        f1.append(2 * precision * recall / max(precision + recall, 1e-12))
    return sum(f1) / len(f1)
""",
    14: """
def whiten(train, test):
    mean = train.mean(0, keepdim=True)
    values, axes = torch.linalg.eigh((train - mean).T @ (train - mean) / len(train))
    keep = values > 1e-8 * values.max()
    turn = axes[:, keep] / values[keep].sqrt()
    return (train - mean) @ turn, (test - mean) @ turn
""",
    15: """
def window(hu, centre, width):
    return augment.apply_window(hu, centre, width)
""",
    16: """
def adapted(x, weight, bias, down, up):
    return x @ weight.T + bias + torch.einsum("or,br->bo", up, torch.einsum("ri,bi->br", down, x))
""",
    17: """
def mean_disc():
    d = np.random.default_rng(0).uniform(-1, 1, 1_000_000)
    return np.sqrt(1 - d**2).mean()
""",
    18: """
def peak(lr, batch):
    return np.float32(lr / 32 * batch**0.5)
""",
}
WRONG = {
    1: ("def lazy_f1(counts): return counts.max() / counts.sum()",  # accuracy
        "def lazy_f1(counts): p = max(counts) / sum(counts); return 2 * p / (p + 1)"),  # one class
    2: ("def by_chance(group, source, q): return (source == source[q]).mean()",
        "def by_chance(group, source, q): return 1 / len(np.unique(source))"),
    3: ("def half_life(m): return 1 / (1 - m)",  # the mean age
        "def half_life(m): return 0.5 / (1 - m)"),
    4: ("def least_loss(targets): return torch.special.entr(targets).sum() / math.log(2)",
        "def least_loss(targets): return -(targets * targets.log()).sum(1).mean()"),  # 0 log 0
    5: ("def share_lost(h, w, tile): return (h % tile) * (w % tile) / (h * w)",
        "def share_lost(h, w, tile): return (h // tile * tile) * (w // tile * tile) / (h * w)"),
    6: ("def pairs(G, L): return G * (G + L)",
        "def pairs(G, L): return G * (G - 1) / 2 + G * L"),
    7: ("def embed(x, weight, bias): return F.conv2d(x, weight, bias, stride=8).flatten(2)",
        "def embed(x, weight, bias):\n"
        "    p = weight.shape[-1]\n"
        "    x = x.reshape(len(x), 3, -1, p, x.shape[3] // p, p)\n"
        "    x = x.permute(0, 4, 2, 1, 3, 5)\n"  # columns first
        "    return x.reshape(len(x), -1, 3 * p * p) @ weight.flatten(1).T + bias"),
    8: ("def alarm(row, K): return row.get('rank') is not None and row['rank'] < 2",
        "def alarm(row, K):\n"
        "    flat = row['teacher_entropy'] > 0.99 * math.log(K)\n"
        "    return 'rank' in row and (row['rank'] < 2 or row['std'] < 0.01 or flat)"),
    9: ("class Restain(A.ImageOnlyTransform):\n"
        "    def apply(self, img, factor, **params):\n"
        "        return (img * factor).clip(0, 255).astype(np.uint8)",  # brightness
        "class Restain(A.ImageOnlyTransform):\n"
        "    def apply(self, img, factor, **params):\n"
        "        return ((img / 255) ** factor).astype(np.uint8)"),  # nearly black
    10: ("def batch_centering(logits, temp, n_iters=3):\n"
         "    return ((logits - logits.mean(1, keepdim=True)) / temp).softmax(1)",  # of each image
         "def batch_centering(logits, temp, n_iters=3):\n"  # not at its temperature
         "    return (logits - logits.mean(0)).softmax(1)"),
    11: ("def disc_mask(rng, height, width, ratio):\n"  # a square
         "    y, x = np.mgrid[:height, :width] + 0.5\n"
         "    d = np.maximum(abs(y - rng.uniform(0, height)), abs(x - rng.uniform(0, width)))\n"
         "    nearest = d.ravel().argsort().argsort() < int(ratio * height * width)\n"
         "    return nearest.reshape(height, width)",
         "def disc_mask(rng, height, width, ratio):\n"  # a centre on a patch
         "    y, x = np.mgrid[:height, :width]\n"
         "    d = (y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2\n"
         "    nearest = d.ravel().argsort().argsort() < int(ratio * height * width)\n"
         "    return nearest.reshape(height, width)"),
    12: ("def uniformity_loss(x, eps=1e-8):\n"  # a point and itself
         "    return (-2 * torch.cdist(F.normalize(x), F.normalize(x)) ** 2).exp().mean().log()",
         "def uniformity_loss(x, eps=1e-8): return (-2 * F.pdist(x).square()).exp().mean().log()"),
    13: ("def macro_f1(counts): return (counts.diagonal() / counts.sum(1)).mean()",  # recall
         "def macro_f1(counts):\n"
         "    f1 = 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))\n"
         "    return (f1 * counts.sum(1)).sum() / counts.sum()"),
    14: ("def whiten(train, test): return ((train - train.mean(0)) / train.std(0), "
         "(test - train.mean(0)) / train.std(0))",  # the axes are not turned
         "def whiten(train, test):\n"
         "    found = []\n"
         "    for x in (train, test):\n"  # each by its own
         "        _, s, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)\n"
         "        axes, s = axes[s > 1e-4 * s[0]], s[s > 1e-4 * s[0]]\n"
         "        found.append((x - x.mean(0)) @ axes.T / (s / len(x) ** 0.5))\n"
         "    return found"),
    15: ("def window(hu, centre, width):\n"  # wraps around
         "    grey = (hu - (centre - width / 2)) / width * 255\n"
         "    return np.rint(grey).astype(np.int64).astype(np.uint8)",
         "def window(hu, centre, width):\n"  # begins at the centre
         "    return np.rint(((hu - centre) / width * 255).clip(0, 255)).astype(np.uint8)"),
    16: ("def adapted(x, weight, bias, down, up): return F.linear(x, weight + up @ down, bias)",
         "def adapted(x, weight, bias, down, up): return x @ weight.T + x @ down.T @ up.T"),
    17: ("def mean_disc(): return 2 / 3", "def mean_disc(): return 0.5"),
    18: ("def peak(lr, batch): return lr * batch / 1024",
         "def peak(lr, batch): return lr * math.sqrt(1024 / batch)"),
}

# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The names that the notebook's setup makes, and a small set of smears where it has more."""
    here = Path.cwd()
    names, path = {"__name__": "course"}, list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("MPLBACKEND", "agg")
        patch.setattr("IPython.display.display", lambda *shown, **options: Handle())
        for _, text, tags in CELLS:
            if "setup" in tags:
                exec(text, names)
        patch.chdir(tmp_path_factory.mktemp("course"))
        small_course(names)
        yield names
    sys.path[:] = path
    names["scratch"].cleanup()
    assert Path.cwd() == here

class Handle:
    def update(self, shown): ...

def small_course(names):
    """What parts 1 to 7 leave behind and a check may want to print from."""
    smears, torch, evaluation = names["smears"], names["torch"], names["evaluation"]
    names["SEEN"] = str(smears.draw("seen", 5, seed=0).parent)
    names["CELLS"] = str(smears.draw("unseen", 10, seed=1))
    cells = names["cells"] = evaluation.read_cells(names["CELLS"])
    side = names["CROP"] = names["reddino"].configure(arch="nano").tile_size[0]
    names["crops"] = torch.cat(list(evaluation.crops_of(cells, side, side)))
    names["names"], names["label"] = cells.classes, torch.tensor(cells.label)
    names["group"], names["laboratory"] = torch.tensor(cells.group), torch.tensor(cells.source)
    names["counts"] = names["label"].bincount().numpy()
    names["RARE"] = cells.classes.index("sickle")
    names["tile"] = names["augment"].read_image(cells.files[0])[:160, :160]
    names["logits"] = torch.randn(6, 4)
    pixels = names["crops"][:, :, ::14, ::14].flatten(1).float()
    names["features"] = {"before": pixels, "after": pixels}
    names["last"], names["cfg"] = {}, names["reddino"].configure(arch="nano")
    names["rivals"], names["splits"] = {}, ["by patient"]
    circle = next(text for _, text, _ in CELLS if "def on_circle" in text)
    exec(circle.split("\n\n\n")[0], names)  # of the cell on KoLeo the function alone

def answer(course, number: int, text: str) -> str:
    """What check `number` prints of an answer."""
    names = dict(course)
    exec(text, names)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(CHECKS[number], names)
    return said.getvalue()

def test_each_exercise_has_a_stub_a_check_and_a_solution():
    numbers = list(range(1, 1 + len(CHECKS)))
    assert len(numbers) >= 14
    assert list(CHECKS) == list(SOLUTIONS) == numbers  # in this order
    assert len(STUBS) == len(numbers)
    assert set(RIGHT) == set(WRONG) == set(numbers)

@pytest.mark.parametrize("number", CHECKS)
def test_check(course, number):
    stub = STUBS[number - 1]
    assert answer(course, number, stub) == f"Exercise {number} is open.\n"
    for text in (SOLUTIONS[number], RIGHT[number]):
        assert answer(course, number, text).startswith(f"Exercise {number}: right."), text
    hints = {answer(course, number, text) for text in WRONG[number]}
    assert len(hints) == 2  # each wrong answer gets its own
    for hint in hints:
        assert hint.startswith(f"Exercise {number}: not yet. "), hint
        assert "raises" not in hint
    name = re.search(r"(?:def|class) (\w+)", stub)[1]
    raising = f"def {name}(*given, **options): raise ValueError('no such thing')"
    assert "raises ValueError: no such thing" in answer(course, number, raising)
    assert "raises NameError" in answer(dict(course), number, f"{name} = lambda *a, **k: unknown")

def test_what_the_committed_notebook_shows():
    outputs = [(out, tags) for cell, _, tags in CELLS for out in cell.get("outputs", [])]
    assert not [out for out, _ in outputs if out["output_type"] == "error"]
    order = [cell["execution_count"] for cell, *_ in CELLS if cell["cell_type"] == "code"]
    assert order == list(range(1, len(order) + 1))  # run once, from top to bottom
    said = ["".join(out.get("text", "")) for out, tags in outputs if "check" in tags]
    assert said == [f"Exercise {number} is open.\n" for number in CHECKS]  # and no hint
    assert (ROOT / "tutorial.ipynb").stat().st_size < 3e6
    assert all("raises-exception" in tags for _, _, tags in CELLS if "exercise" in tags)

def test_train_and_compare_trains_with_the_change(course):
    """A function of the course in the place of the project's, in fresh folders, from one start."""
    reddino, shown, calls = course["reddino"], [], []
    original = reddino.koleo_loss

    def mine(x, eps=1e-8):
        calls.append(len(x))
        return 100 * original(x, eps)

    course["table"] = lambda head, rows: shown.append({row[0]: row[1:] for row in rows})
    course["train_and_compare"].__globals__["WORKERS"] = 0
    configure = reddino.configure
    options = dict(batch_size=16, prototypes=8)
    course["reddino"].configure = lambda **given: configure(**options | given)
    try:
        course["train_and_compare"]({"reddino.koleo_loss": mine}, "mine", steps=6)
        assert len(calls) == 2 * 6  # two views a step, in the changed run alone
        course["train_and_compare"]({"koleo": 0.1}, "as it was", steps=6)
        assert len(calls) == 2 * 6
        with pytest.raises(AttributeError):
            course["train_and_compare"]({"reddino.no_such_loss": mine}, steps=6)
    finally:
        reddino.configure = configure
    assert reddino.koleo_loss is original
    first, second = shown
    assert first["base"] == second["base"]  # trained once
    assert first["mine"][:2] != first["base"][:2]
    assert second["as it was"][:5] == second["base"][:5]  # trained anew, from the same start
    assert math.isclose(float(second["as it was"][6].split(" ")[0]), 0)
