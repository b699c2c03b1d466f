"""eval.py against scikit-learn, timm and closed forms; what must not leak."""

import copy
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from corpus import picture
from PIL import Image
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from test_cells import HERE, draw_cells, plain
from torch.nn.utils import parametrize

import eval as ev
from augment import MEAN, STD, UserError
from reddino import build_vit, configure

torch.set_num_threads(1)
CPU = torch.device("cpu")


def blobs(n=300, d=20, classes=4, seed=0, spread=1.0):
    """Gaussian classes, unbalanced, in correlated dimensions; float64."""
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    x = spread * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    x = x @ rng.normal(size=(d, d))
    return torch.from_numpy(x), torch.from_numpy(y)


DEGENERATE = {
    "random": lambda x, y: (x, y),
    "one constant feature": lambda x, y: (torch.cat([x, torch.full_like(x[:, :1], 3.7)], 1), y),
    "a class in the middle is missing": lambda x, y: (x[y != 1], y[y != 1]),
    "a class with one member": lambda x, y: (
        torch.cat([x[y != 0], x[y == 0][:1]]),
        torch.cat([y[y != 0], y[y == 0][:1]]),
    ),
    "duplicated points": lambda x, y: (torch.cat([x, x[:50]]), torch.cat([y, y[:50]])),
    "fewer cells than features": lambda x, y: (x[:15], y[:15]),
    "two classes": lambda x, y: (x[y > 1], y[y > 1]),
}


def widened(x, like):
    """With the constant feature, where training has it."""
    return torch.cat([x, torch.full_like(x[:, :1], 3.7)], 1)[:, : like.shape[1]]


# --------------------------------------------------------------------------------------------------
# Classifiers.


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("k", [1, 20])
def test_knn_is_scikit_learns(case, k):
    x, y = blobs()
    train_x, train_y = DEGENERATE[case](x[:200], y[:200])
    test_x, k = widened(x[200:], train_x), min(k, len(train_x))
    cosine = {"metric": "cosine", "weights": lambda d: np.exp((1 - d) / 0.07)}
    reference = KNeighborsClassifier(k, **cosine).fit(train_x, train_y)
    probs = ev.knn(train_x, train_y, test_x, k, 4).numpy()
    expected = reference.predict_proba(test_x)
    np.testing.assert_allclose(probs[:, reference.classes_], expected, atol=1e-9)
    np.testing.assert_allclose(probs.sum(1), 1)


def test_knn_with_more_neighbours_than_cells_and_with_zeros():
    x, y = torch.zeros(5, 3), torch.tensor([0, 0, 0, 1, 1])
    np.testing.assert_allclose(ev.knn(x, y, x[:2], k=20), [[0.6, 0.4]] * 2, rtol=1e-6)


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_linear_probe_is_scikit_learns(case, l2):
    x, y = blobs(spread=0.3)
    train_x, train_y = DEGENERATE[case](x[:200], y[:200])
    test_x = widened(x[200:], train_x)
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    std[std < 1e-9] = 1
    # With two classes scikit-learn has w where we have w/2 and -w/2.
    halves = 2 if len(train_y.unique()) == 2 else 1
    reference = LogisticRegression(C=halves / (l2 * len(train_x)), tol=1e-10, max_iter=100_000)
    reference.fit((train_x - mean) / std, train_y)
    probs = ev.linear_probe(train_x, train_y, test_x, l2, n_classes=4).numpy()
    expected = np.zeros_like(probs)
    expected[:, reference.classes_] = reference.predict_proba((test_x - mean) / std)
    np.testing.assert_allclose(probs, expected, atol=0.005)
    absent = sorted(set(range(4)) - set(train_y.tolist()))
    assert (probs[:, absent] == 0).all()


def test_linear_probe_reaches_the_minimum_in_float32_on_hard_features():
    """Features as correlated as a ViT's (condition number 1e5): within 1e-4 of scikit-learn's."""
    x, y = blobs(1000, 100, 5, spread=0.2)
    x = x @ torch.diag(torch.logspace(0, -5, 100, dtype=x.dtype))
    x = x @ torch.randn(100, 100, dtype=x.dtype)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    for l2 in (1e-1, 1e-4):
        best = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=100_000).fit(x, y)
        weight = torch.from_numpy(best.coef_)
        penalty = l2 / 2 * weight.square().sum().item()
        target = metrics.log_loss(y, best.predict_proba(x)) + penalty
        asked = torch.cat([x, torch.zeros(1, 100), torch.eye(100)])
        probs = ev.linear_probe(x.float(), y, asked.float(), l2).double()
        logits = probs.log()
        own = (logits[1001:] - logits[1000]).T  # weights, read off the answers to unit vectors
        own = own - own.mean(0)  # up to a constant
        found = metrics.log_loss(y, probs[:1000] / probs[:1000].sum(1, keepdim=True))
        assert abs(found + l2 / 2 * own.square().sum().item() - target) < 1e-4 * target


def test_tuned_probe_takes_the_strength_that_is_best_on_held_out_groups():
    x, y = blobs(400, 60, 3, spread=0.15)  # noise enough for the weakest penalties to overfit
    groups = np.arange(400) // 5
    held = ev.group_folds(groups, y.numpy(), 5, 0) == 0
    f1 = []
    for l2 in ev.L2:
        guess = ev.linear_probe(x[~held], y[~held], x[held], l2).argmax(1)
        f1.append(metrics.f1_score(y[held], guess, average="weighted"))
    best = ev.L2[int(np.argmax(f1))]
    assert best != ev.L2[-1]
    found, expected = ev.tuned_probe(x, y, x[:9], groups, 3), ev.linear_probe(x, y, x[:9], best)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    one = ev.tuned_probe(x, y, x[:9], np.zeros(400, int), 3)  # of one group nothing is held out
    np.testing.assert_allclose(one, ev.linear_probe(x, y, x[:9], 1e-2), atol=1e-9)


# --------------------------------------------------------------------------------------------------
# Metrics, bootstrap.


@pytest.mark.parametrize("truth", [[0, 1, 2, 3], [0, 2, 3], [2], [0, 1]], ids=str)
@pytest.mark.parametrize("called", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
@pytest.mark.filterwarnings("ignore:y_pred contains classes", "ignore:A single label was found")
def test_scores_are_scikit_learns(truth, called):
    rng = np.random.default_rng(0)
    truth, guess = rng.choice(truth, 97), rng.choice(called, 97)
    counts = ev.confusion(truth, guess, 4)
    found = ev.scores(counts)
    expected = metrics.confusion_matrix(truth, guess, labels=range(4))
    np.testing.assert_array_equal(counts, expected)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess))
    balanced = metrics.balanced_accuracy_score(truth, guess)
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    for average in ("weighted", "macro"):
        expected = metrics.f1_score(truth, guess, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected)


def test_bootstrap_draws_groups():
    """Each replicate is what scikit-learn gives on the cells of the groups drawn, repeated as
    often as drawn; the first is of all cells once."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 120)
    group = rng.permutation(np.repeat([3, 5, 7, 11, 20, 21], 20))
    probs = rng.dirichlet(np.ones(3), 120)
    again = ev.judge(truth, probs, group, seed=4)["again"]
    times = np.stack([*ev.bootstrap(6, seed=4)])
    assert times.shape == (1001, 6) and (times.sum(1) == 6).all() and (times[0] == 1).all()
    assert times[1:].mean(0) == pytest.approx(1, abs=0.1)
    assert times[1:].var() == pytest.approx(5 / 6, rel=0.1)  # binomial
    index = np.unique(group, return_inverse=True)[1]
    for r in range(20):
        some = np.repeat(np.arange(120), times[r][index].astype(int))
        guess = probs.argmax(1)[some]
        f1 = metrics.f1_score(truth[some], guess, average="weighted")
        assert again["accuracy"][r] == pytest.approx(metrics.accuracy_score(truth[some], guess))
        assert again["weighted_f1"][r] == pytest.approx(f1)


def test_interval_knows_that_cells_of_a_group_err_together():
    """50 groups of 20 cells that are right or wrong as a whole: the error is that of 50 answers."""
    right = np.repeat(np.random.default_rng(0).random(50) < 0.7, 20)
    probs = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
    again = ev.judge(np.zeros(1000, int), probs, np.repeat(np.arange(50), 20))["again"]
    p = right.mean()
    assert again["accuracy"][1:].std() == pytest.approx(np.sqrt(p * (1 - p) / 50), rel=0.1)


def test_comparison_is_paired():
    """b errs where a does and on one more group: its interval is wide, the difference's is not."""
    truth, group = np.zeros(400, int), np.arange(400) // 10
    wrong = np.random.default_rng(0).random(40) < 0.4
    more = wrong.copy()
    more[np.flatnonzero(~wrong)[0]] = True
    found = {}
    for label, errs in (("a", wrong), ("b", more)):
        found[label] = {"20-NN": ev.judge(truth, np.eye(2)[errs[group].astype(int)], group)}
    rows = ev.rows_of(found, "folds")
    assert [row["weights"] for row in rows] == ["a", "b"] and list(rows[1]["minus"]) == ["a"]
    assert (rows[1]["protocol"], rows[1]["split"]) == ("20-NN", "folds")
    gap = rows[1]["minus"]["a"]
    assert gap["accuracy"] == pytest.approx(-1 / 40)
    low, high = rows[0]["interval"]["accuracy"]
    assert rows[0]["accuracy"] == pytest.approx(1 - wrong.mean()) and high - low > 0.2
    assert gap["interval"]["accuracy"] == [pytest.approx(-3 / 40), 0]  # Poisson, mean 1


def test_no_leak():
    """The label is a property of the group, and features tell the group: chance by groups, all
    right by cells."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 10)
    labels = rng.permutation(np.repeat([0, 1], 50))[groups]
    x = rng.normal(size=(100, 200))[groups] + 0.01 * rng.normal(size=(1000, 200))

    def score(groups):
        cells = plain(1000, groups, labels)
        parts = ev.make_splits(cells, 5, 0)["5 folds by image"]
        for train, test in parts:
            assert not set(groups[train]) & set(groups[test])
        assert sorted(np.concatenate([test for _, test in parts])) == list(range(1000))
        found = ev.measure(torch.from_numpy(x).float(), cells, parts, ("knn", "linear"), 0)
        return {k: row["again"]["accuracy"][0] for k, row in found.items()}

    for accuracy in score(groups).values():
        assert 0.35 < accuracy < 0.65  # 100 groups: one standard deviation is 0.05
    for accuracy in score(np.arange(1000)).values():
        assert accuracy == 1


# --------------------------------------------------------------------------------------------------
# Studies, the release's evaluation, few labels.


def test_gated_attention_is_ilses_and_sees_no_padding():
    """Equation 9 by hand; slices that are not there, and slices of other studies, have no say."""
    torch.manual_seed(0)
    net = ev.GatedAttention(6, 2).double()
    x, place = torch.randn(2, 5, 6).double(), torch.tensor([[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]])
    found = net(x, place)
    for s, n in ((0, 3), (1, 5)):
        waves = place[s, :n, None] * 2.0 ** -torch.arange(0, 4, 0.125).double()
        h = net.embed(x[s, :n]) + torch.cat([waves.sin(), waves.cos()], 1)
        h = torch.nn.functional.gelu(h)
        w, v, u = net.weight.weight[0], net.look, net.gate
        scores = torch.stack([(w * torch.tanh(v(k)) * torch.sigmoid(u(k))).sum() for k in h])
        a = torch.exp(scores) / torch.exp(scores).sum()
        expected = net.head(sum(weight * k for weight, k in zip(a, h)))
        torch.testing.assert_close(found[s], expected, rtol=1e-5, atol=1e-6)


def studies(kind, n=120, seed=0):
    """Features of `n` studies of 10 slices, noisy; one says "finding". Labels that no slice tells
    alone: whether the finding stands in one run of four slices or in two runs of two."""
    rng, x, label = np.random.default_rng(seed), [], []
    for s in range(n):
        runs = s % 2
        start = rng.integers(0, 4) if runs else rng.integers(0, 6)
        found = np.zeros(10)
        found[start : start + (2 if runs else 4)] = 1
        if runs:
            found[start + 4 : start + 6] = 1
        x.append(np.stack([found, *rng.normal(size=(3, 10))], 1) + 0.1 * rng.normal(size=(10, 4)))
        label += [runs] * 10
    group, study = np.repeat(np.arange(n), 10), np.array(label)
    order = np.arange(10 * n) if kind == "in order" else rng.permutation(10 * n)
    place = np.tile(np.arange(10), n)
    cells = plain(10 * n, group[order], study[order], ("one", "two"), by="group",
                  place=place[order])  # fmt: skip
    return torch.from_numpy(np.concatenate(x)[order]).float(), cells


def test_attention_tells_what_pooling_cannot():
    """One run of slices or two: each slice, and their mean, look the same; places tell. Rows in any
    order: what counts is `slice`."""
    x, cells = studies("shuffled", 200)
    parts = ev.make_splits(cells, 2, 0)["2 folds by group"][:1]
    found = ev.measure(x, cells, parts, ["study"], 0)
    score = {name: row["again"]["accuracy"][0] for name, row in found.items()}
    assert list(score) == ["study: mean", "study: maximum", "study: attention"]
    assert max(score["study: mean"], score["study: maximum"]) < 0.65
    assert score["study: attention"] > 0.9 and found["study: attention"]["cells"] == 100


def test_places_are_a_studys_own():
    """In mm, each scan from a start of its own, slices have the order that numbers give them."""
    x, cells = studies("in order", 60)
    parts = ev.make_splits(cells, 2, 0)["2 folds by group"][:1]
    expected = ev.measure(x, cells, parts, ["study"], 0)["study: attention"]["again"]
    start = np.random.default_rng(0).uniform(-300, 300, 60)[cells.group]
    for values in (start + 5 * cells.place, 1000 * cells.place + cells.group):
        cells.place = np.unique(values, return_inverse=True)[1]  # as read_cells does
        found = ev.measure(x, cells, parts, ["study"], 0)["study: attention"]["again"]
        np.testing.assert_array_equal(found["accuracy"], expected["accuracy"])


def test_a_slice_with_a_copy_on_the_other_side_is_not_learnt_from(monkeypatch):
    """60 studies on each side; the first slices are copies. Each pool is of what is left."""
    group, place = np.repeat(np.arange(24), 5), np.tile(np.arange(5), 24)
    x, image = torch.randn(120, 4), np.arange(120)
    image[np.arange(60, 120, 5)] = image[np.arange(0, 60, 5)]
    cells = ev.Cells([], np.arange(120), np.full((120, 2), np.nan), group % 2, ["a", "b"], image,
                     group, "group", split=np.where(group < 12, "train", "test"), place=place)
    parts, pooled = ev.make_splits(cells, 5, 0, ev.quiet)["the given split"], []
    probe = ev.tuned_probe

    def watched(train_x, train_y, test_x, *rest):
        pooled.append((train_x, test_x))
        return probe(train_x, train_y, test_x, *rest)

    monkeypatch.setattr(ev, "tuned_probe", watched)
    ev.measure(x, cells, parts, ["study"], 0)
    slices = x.view(24, 5, 4)
    torch.testing.assert_close(pooled[0][0], slices[:12, 1:].mean(1))
    torch.testing.assert_close(pooled[0][1], slices[12:].mean(1))
    torch.testing.assert_close(pooled[1][0], slices[:12, 1:].amax(1))


def test_pools_are_scikit_learns_and_study_labels_come_first():
    """Mean and maximum of a study's slices, then a probe. What slices show does not count where
    studies have labels; else a study's class is all that its slices show."""
    x, cells = studies("in order", 40)
    parts = ev.make_splits(cells, 2, 0)["2 folds by group"][:1]
    ((train, test),) = [[np.unique(cells.group[some]) for some in part] for part in parts]
    first = cells.label.reshape(-1, 10)[:, 0]
    cells.study, cells.label = cells.label, np.zeros(400, int)
    found = ev.measure(x, cells, parts, ["study"], 0)
    slices, y = x.view(40, 10, 4), torch.from_numpy(first)
    for name, pooled in (("mean", slices.mean(1)), ("maximum", slices.amax(1))):
        probs = ev.tuned_probe(pooled[train], y[train], pooled[test], train, 2)
        expected = metrics.accuracy_score(first[test], probs.argmax(1))
        assert found[f"study: {name}"]["again"]["accuracy"][0] == pytest.approx(expected)
    cells.study, cells.label = None, np.tile(np.arange(10) % 2, 40) * np.repeat(first, 10)
    again = ev.measure(x, cells, parts, ["study"], 0)["study: mean"]
    expected = found["study: mean"]["again"]["accuracy"]
    np.testing.assert_array_equal(again["again"]["accuracy"], expected)


def release_evaluation(x, y, n_classes):
    """The recipe of tests/RESULTS.md, RedDino's own evaluation: {model: weighted F1 of 5 folds}."""
    models = {"1-NN": KNeighborsClassifier(1), "20-NN": KNeighborsClassifier(20),
              "logistic": LogisticRegression(C=x.shape[1] * n_classes / 100, max_iter=1000)}
    return {name: cross_val_score(model, x, y, cv=StratifiedKFold(5), scoring="f1_weighted")
            for name, model in models.items()}  # fmt: skip


def test_the_releases_evaluation_runs():
    """Smears are on both sides of its folds, which flatters."""
    x, y = blobs(400, 12, 3, spread=0.5)
    found = release_evaluation(x, y, 3)
    assert all(len(f1) == 5 and 0.4 < f1.mean() < 1 for f1 in found.values())
    assert found["logistic"].mean() > found["1-NN"].mean()


def test_few_shot_is_its_draws_and_their_mean(monkeypatch):
    """Each draw learns from n training cells of each class, and from nothing else; its scores are
    scikit-learn's. More labels help; {} where a class has too few."""
    x, y = blobs(600, 10, 3)
    cells = plain(600, np.arange(600) // 10, y.numpy(), "abc")
    parts, f1, probe = ev.make_splits(cells, 5, 0)["5 folds by image"], [], ev.linear_probe

    def watched(train_x, train_y, test_x, *rest):
        assert train_y.bincount().tolist() == [5, 5, 5]
        train, test = parts[len(f1) % 5]
        assert {tuple(row) for row in train_x.tolist()} <= {tuple(row) for row in x[train].tolist()}
        assert torch.equal(test_x, x[test])
        probs = probe(train_x, train_y, test_x, *rest)
        f1.append(metrics.f1_score(y[test], probs.argmax(1), average="weighted"))
        return probs

    with monkeypatch.context() as patched:
        patched.setattr(ev, "linear_probe", watched)
        row = ev.few_shot(x, y, parts, 5, 0)
    assert len(f1) == 20 and len(set(f1)) == 20
    assert row["again"]["weighted_f1"] == pytest.approx([np.mean(f1), *f1])
    accuracy = {5: row["again"]["accuracy"][0]}
    for shots in (1, 50):
        accuracy[shots] = ev.few_shot(x, y, parts, shots, 0)["again"]["accuracy"][0]
    assert accuracy[1] < accuracy[5] < accuracy[50]
    assert ev.few_shot(x, y, parts, 500, 0) == {}


# --------------------------------------------------------------------------------------------------
# Backbones.


def test_colour_is_a_histogram_and_pixels_are_pixels():
    image = picture(64, 64)
    backbone = ev.load_backbone("colour", device="cpu")
    found = ev.extract_features(backbone, [image, image[::-1, ::-1]])
    expected = np.concatenate([np.histogram(image[..., c], 32, (0, 256))[0] for c in range(3)])
    counts = found[0].square() * 64 * 64
    np.testing.assert_allclose(counts, expected, atol=1e-2 * 64 * 64)  # 8 levels a bin, rounding
    torch.testing.assert_close(found[0], found[1])  # where things are does not matter
    assert found.shape == (2, 96)
    pixels = ev.extract_features(ev.load_backbone("pixels", device="cpu"), [image])
    assert pixels.shape == (1, 3 * 16 * 16)


def timm_vit(registers=0, img_size=224, **options):
    import timm

    torch.manual_seed(0)
    name = f"vit_small_patch14{'_reg4' if registers else ''}_dinov2"
    options = {"img_size": img_size, "depth": 2, "num_classes": 0, "init_values": 1.0} | options
    model = timm.create_model(name, **options).eval()
    return model, {k: v.clone() for k, v in model.state_dict().items()}


def as_dinov2(state):
    """timm's state dict as DINOv2 publishes it: other names, a mask token, a class position."""
    state = {k.replace("reg_token", "register_tokens"): v for k, v in state.items()}
    state["mask_token"] = torch.zeros(1, 384)
    if "register_tokens" in state:
        at_cls = torch.randn(1, 1, 384)
        state["pos_embed"] = torch.cat([at_cls, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - at_cls
    return state


def timms_tokens(model, image):
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.inference_mode():
        return model.forward_features((x - mean) / std)


@pytest.mark.parametrize("registers, img_size", [(0, 224), (4, 518)])
def test_every_layout_of_weights_gives_the_same_features(registers, img_size, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, state = timm_vit(registers, img_size)
    torch.save(state, tmp_path / "timm.pth")
    safetensors.save_file(state, tmp_path / "timm.safetensors")
    torch.save(as_dinov2(state), tmp_path / "dinov2.pth")
    released = {f"backbone.{k}": v for k, v in as_dinov2(state).items()}  # RedDino's, DinoBloom's
    released["dino_head.mlp.0.weight"] = torch.zeros(4, 4)
    torch.save({"teacher": released}, tmp_path / "reddino.pth")
    image = picture(img_size, img_size)
    expected = timms_tokens(model, image)
    for name in ("timm.pth", "timm.safetensors", "dinov2.pth", "reddino.pth"):
        backbone = ev.load_backbone(str(tmp_path / name), size=img_size, device="cpu")
        x = ev.network_input(torch.from_numpy(image).permute(2, 0, 1)[None], (img_size,) * 2, CPU)
        with torch.inference_mode():
            cls, patches = backbone.forward_features(x)
        torch.testing.assert_close(cls, expected[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(patches, expected[:, 1 + registers :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ev.extract_features(backbone, [image]), cls)
        both = ev.extract_features(backbone, [image], mean=True)  # as DINOv2's linear evaluation
        torch.testing.assert_close(both, torch.cat([cls, patches.mean(1)], 1))
        assert ev.load_backbone(str(tmp_path / name), device="cpu").size == 224  # RedDino's


def test_heads_that_the_width_does_not_tell(tmp_path):
    """320 = 4 x 80, as of ViT-H/14: features are timm's with --heads 4, others with 5."""
    model, state = timm_vit(embed_dim=320, num_heads=4)
    for name, weight in state.items():
        if "qkv.weight" in name:  # as sharp attention as trained networks have
            torch.nn.init.normal_(weight, std=0.15)
    model.load_state_dict(state)
    torch.save(state, tmp_path / "h.pth")
    image = picture(224, 224)
    expected = timms_tokens(model, image)[:, 0]
    found = {}
    for heads in (4, 5):
        backbone = ev.load_backbone(tmp_path / "h.pth", device="cpu", heads=heads)
        found[heads] = ev.extract_features(backbone, [image])
    torch.testing.assert_close(found[4], expected, rtol=1e-4, atol=1e-4)
    assert torch.cosine_similarity(found[5], expected) < 0.9
    with pytest.raises(UserError, match="--heads"):
        ev.load_backbone(tmp_path / "h.pth", device="cpu")


def test_offline_damaged_and_without_packages_it_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    names = {"dinov2_vits14": "dinov2_vits14_pretrain.pth", "resnet50": "resnet50-11ad3fa6.pth"}
    for name in names:
        with pytest.raises(UserError, match=f"{name}.*(URLError|no route)") as error:
            ev.load_backbone(name)
        assert "\n" not in str(error.value)
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "whole.pth")
    cut = (tmp_path / "whole.pth").read_bytes()[:200_000]  # a download that broke off
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name, file in names.items():
        (tmp_path / "hub" / "checkpoints" / file).write_bytes(cut)
        with pytest.raises(UserError, match=name):
            ev.load_backbone(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        ev.evaluate(tmp_path, ["pixels"], figures=tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name, last", [("resnet18", "fc"), ("squeezenet1_1", "classifier.1")])
def test_torchvision_classifier_without_its_last_layer(name, last, monkeypatch):
    """Features are the input of the layer that gives the 1,000 classes (squeezenet's has pixels:
    their mean)."""
    torch.manual_seed(0)
    asked, seen, whole = [], [], torchvision.models.get_model(name).eval()
    layer = whole.get_submodule(last)
    layer.register_forward_hook(lambda module, given, out: seen.append(given[0]))

    def get_model(*given, **options):
        asked.append((given, options))
        return copy.deepcopy(whole)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    backbone = ev.load_backbone(name, device="cpu")
    assert asked == [((name,), {"weights": "DEFAULT"})] and backbone.size == 224
    image = torch.from_numpy(picture(64, 64)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        assert whole(ev.network_input(image, (224, 224), CPU)).shape == (1, 1000)
    expected = seen[0].mean((2, 3)) if seen[0].dim() == 4 else seen[0]
    torch.testing.assert_close(ev.extract_features(backbone, image), expected, rtol=1e-4, atol=1e-4)


def test_random_takes_the_shape_of_a_checkpoint_and_tells_images_apart():
    like = build_vit("nano", img_size=32, embed_dim=128, depth=3, heads=2)
    random = ev.load_backbone("random", device="cpu", like=like)
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (random, like)]
    assert shapes[0] == shapes[1] and random.blocks[0].attn.heads == 2
    x = ev.extract_features(random, [picture(80, 80, seed) for seed in range(9)])
    assert (x - x.mean(0)).norm() > 1e-2 * x.norm()  # with LayerScale 1e-5 it would be some 1e-5


# --------------------------------------------------------------------------------------------------
# Fine-tuning.


def tiny(**options):
    """A frozen ViT for 16 pixels."""
    torch.manual_seed(1)  # eval.py's `random` takes 0
    shape = {"img_size": 16, "embed_dim": 64, "depth": 2, "heads": 1} | options
    backbone = build_vit("nano", **shape).requires_grad_(False)
    backbone.size, backbone.device = 16, CPU
    return backbone


def small():
    """One whose width tells its heads."""
    return tiny(embed_dim=128, depth=1, heads=2)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_fine_tuning_learns_and_leaves_the_backbone_alone(kind):
    """Stripes of any phase and direction; the middle is darker in one class."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 240)
    wave = 127 + 120 * np.sin(np.arange(16) * 1.5 + rng.uniform(0, 6, 240)[:, None])
    crops = [np.broadcast_to(w[:, None] if rng.random() < 0.5 else w, (3, 16, 16)) for w in wave]
    crops = np.stack(crops).astype(np.uint8)
    crops[label == 1, :, 6:10, 6:10] //= 3
    backbone, crops, label = tiny(), torch.from_numpy(crops), torch.from_numpy(label)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    net = ev.fine_tune(backbone, crops[:160], label[:160], kind, 2, epochs=60)
    assert (ev.extract_features(net, crops[160:]).argmax(1) == label[160:]).float().mean() > 0.8
    after = backbone.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items())  # the given one is not touched
    tuned = net[0].state_dict()
    changed = {k for k, v in tuned.items() if not torch.equal(v, before[k])}
    assert tuned.keys() == before.keys()  # adapters are merged: a backbone like others
    if kind == "lora":
        names = {f"blocks.{i}.attn.{part}.weight" for i in (0, 1) for part in ("qkv", "proj")}
        assert changed == names
        for name in changed:
            assert torch.linalg.matrix_rank(tuned[name] - before[name], atol=1e-5) <= 8
        assert net.trained == 2 * (8 * (64 + 192) + 8 * (64 + 64)) + 2 * 64 + 2
    else:
        assert net.trained == sum(p.numel() for p in backbone.parameters()) + 2 * 64 + 2


def test_adapters_start_as_nothing_and_end_in_the_weights():
    linear, x = torch.nn.Linear(6, 12), torch.randn(3, 6)
    expected = linear(x)
    parametrize.register_parametrization(linear, "weight", ev.LowRank(linear.weight, 2))
    torch.testing.assert_close(linear(x), expected)  # up is 0 at first
    low = linear.parametrizations.weight[0]
    torch.nn.init.normal_(low.up)
    weight = linear.parametrizations.weight.original + low.up @ low.down
    torch.testing.assert_close(linear(x), x @ weight.T + linear.bias)
    parametrize.remove_parametrizations(linear, "weight")
    torch.testing.assert_close(linear.weight, weight)


def test_batch_norm_does_not_learn_where_the_head_alone_does(monkeypatch):
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: get_model(name))
    backbone = ev.load_backbone("resnet18", size=32, device="cpu")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    crops = torch.randint(0, 256, (65, 3, 32, 32), dtype=torch.uint8)  # the last batch is of one
    net = ev.fine_tune(backbone, crops, torch.arange(65) % 2, "head", 2, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in net[0].state_dict().items())
    net = ev.fine_tune(backbone, crops[:64], torch.arange(64) % 2, "full", 2, epochs=1)
    assert not torch.equal(net[0].bn1.running_mean, before["bn1.running_mean"])


def test_a_head_alone_learns_and_nothing_else():
    crops = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    net = ev.fine_tune(tiny(), crops, torch.arange(60) % 2, "head", 2, epochs=1)
    before = tiny().state_dict()
    assert all(torch.equal(v, before[k]) for k, v in net[0].state_dict().items())
    assert net.trained == 2 * 64 + 2


# --------------------------------------------------------------------------------------------------
# The whole.


def test_whole_evaluation_of_a_csv(tmp_path):
    data, said = draw_cells(tmp_path), []
    torch.save(small().state_dict(), tmp_path / "backbone.pth")
    weights = {"untrained": "random", "ours": tmp_path / "backbone.pth", "colour": "colour"}
    out = tmp_path / "out"
    result = ev.evaluate(data, weights, crop=24, out=out, log=said.append)
    names = {(r["protocol"], r["split"]) for r in result["rows"]}
    few = {(f"few-shot, {n} a class", "5 folds by image") for n in (1, 5, 10)}
    both = ("5 folds by image", "one source left out")
    assert names == few | {(p, s) for p in ("1-NN", "20-NN", "linear probe") for s in both}
    rows = {(r["weights"], r["protocol"], r["split"]): r for r in result["rows"]}
    assert [r["weights"] for r in result["rows"]][:3] == list(weights)
    row = rows["colour", "linear probe", "5 folds by image"]
    assert row["accuracy"] == 1 and row["interval"]["accuracy"] == [1, 1]
    assert result["classes"] == ["bright", "dark"]
    assert sum(map(sum, row["confusion"])) == 64 == row["cells"]
    first, second = (rows[name, "1-NN", "5 folds by image"] for name in ("untrained", "colour"))
    pair = first["minus"]["colour"]
    assert pair["accuracy"] == pytest.approx(first["accuracy"] - second["accuracy"])
    assert pair["interval"]["accuracy"][0] <= pair["accuracy"] <= pair["interval"]["accuracy"][1]

    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result))
    table = (out / "results.md").read_text()
    assert table.count("\n| **") == len(names)  # one best line for each
    assert re.search(r"\| macro_f1 +\| weighted_f1", table)
    assert all(f"{protocol}, {split}" in said[-1] for protocol, split in names)

    told = [s for s in said if "features of" in s]
    assert len(told) == 3
    ev.evaluate(data, weights, ["knn"], crop=25, log=said.append, features="cls+mean")
    assert "256 features" in [s for s in said if "features of" in s][-2]


def test_every_protocol_by_groups(tmp_path):
    data = draw_cells(tmp_path, 6)
    lines = data.read_text().split()
    rows = [f"{line[:-2]},p{line[0]},{int(line[0]) % 2}" for line in lines[1:]]
    lines = ["image,x,y,label,group,study_label", *rows]
    data.write_text("\n".join(lines))
    torch.save(small().state_dict(), tmp_path / "backbone.pth")
    result = ev.evaluate(data, [tmp_path / "backbone.pth", "pixels"], ["knn", "study"],
                         24, finetune=["head", "lora"], folds=2, log=ev.quiet)  # fmt: skip
    rows = {(r["protocol"], r["weights"]): r for r in result["rows"]}
    names = {name for name, _ in rows}
    assert names == {"1-NN", "20-NN", "fine-tuned, head", "fine-tuned, lora", "study: attention",
                     "study: mean", "study: maximum"}  # fmt: skip
    ours = str(tmp_path / "backbone.pth")
    assert rows["fine-tuned, head", ours]["trained"] == 2 * 128 + 2
    assert ("fine-tuned, lora", "pixels") not in rows
    assert rows["study: attention", "pixels"]["cells"] == 6
    assert " (258 trained)" in ev.as_table(result)


def test_strange_names_and_labels_are_shown_as_text(tmp_path, capsys):
    """Escapes, newlines, dollars, 100,000 characters, no UTF-8: in classes, names."""
    classes = [b"\x1b[31mred", b"$x^{$", b"new\nline", b"no \xff utf"]
    rng = np.random.default_rng(0)
    for c in classes:
        folder = os.fsencode(tmp_path / "data") + b"/" + c
        os.makedirs(folder)
        for i in range(4):
            image = Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8))
            with open(folder + b"/%d.png" % i, "wb") as file:
                image.save(file, "png")
    with open(os.fsencode(tmp_path / "data") + b"/" + classes[0] + b"/bad.png", "wb") as file:
        file.write(b"")
    out = tmp_path / "out"
    ev.main(["--data", str(tmp_path / "data"), "--weights", "pixels", "--protocols", "knn",
             "--out", str(out), "--figures", str(tmp_path / "figures")])  # fmt: skip
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"\x1b[31mred/bad.png" in said and "is not drawn" not in said
    classes = json.loads((out / "results.json").read_text())["classes"]
    assert {"\x1b[31mred", "$x^{$", "new\nline"} < set(classes)
    assert len(list((tmp_path / "figures").iterdir())) == 2  # confusion, map

    long = "L" * 100_000
    table = [["image", "label"]]
    for i in range(4):
        table.append([f"data/new\nline/{i}.png", long if i % 2 else "short"])
    with open(tmp_path / "long.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    said = []
    result = ev.evaluate(tmp_path / "long.csv", {"a|b\x1b": "pixels"}, ["knn"], out=out,
                         figures=tmp_path / "long", log=said.append)  # fmt: skip
    assert result["classes"] == [long, "short"]
    assert max(map(len, said)) < 3000 and "\x1b" not in "".join(said)
    assert r"a\|b\x1b" in (out / "results.md").read_text()
    assert len(list((tmp_path / "long").iterdir())) == 2


def test_results_are_there_whatever_becomes_of_figures(tmp_path, monkeypatch):
    import figures

    def fails(*given):
        raise ValueError("no such glyph")

    monkeypatch.setattr(figures, "confusion_matrix", fails)
    said = []
    ev.evaluate(draw_cells(tmp_path, 4), ["colour"], ["knn"], 24, tmp_path / "out",
                figures=tmp_path / "figures", log=said.append)  # fmt: skip
    assert "confusion_colour.png is not drawn: no such glyph" in said[-1]
    assert (tmp_path / "out" / "results.json").exists()
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["map_colour.png"]


def test_a_diverged_backbone_is_not_scored(tmp_path):
    vit = small()
    torch.nn.init.constant_(vit.norm.weight, torch.nan)
    torch.save(vit.state_dict(), tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth: some features are not finite"):
        ev.evaluate(draw_cells(tmp_path), [tmp_path / "bad.pth"], crop=24, log=ev.quiet)


def test_class_folders_broken_images_and_odd_shapes(tmp_path):
    rng = np.random.default_rng(0)
    for c, level in (("dark", 60), ("bright", 200)):
        for i in range(8):
            os.makedirs(tmp_path / "data" / c / "deeper", exist_ok=True)
            image = level + rng.integers(0, 9, (20 + 10 * i, 50))
            image = Image.fromarray(image.astype(np.uint8))
            image.save(tmp_path / "data" / c / "deeper" / f"{i}.png")
    broken = tmp_path / "data" / "dark" / "broken.png"
    broken.write_bytes(b"<html>")
    said, out = [], tmp_path / "out"
    result = ev.evaluate(tmp_path / "data", ["pixels", "colour"], ["knn"], out=out, log=said.append)
    assert result["cells"] == 16 and list(result["skipped"]) == [str(broken)]
    assert len([s for s in said if "broken.png" in s]) == 1
    assert json.loads((out / "results.json").read_text())["skipped"] == result["skipped"]
    scores = {r["weights"]: r["accuracy"] for r in result["rows"] if r["protocol"] == "1-NN"}
    assert scores["colour"] == 1
    for p in (tmp_path / "data" / "dark" / "deeper").iterdir():
        p.write_bytes(b"no image")
    with pytest.raises(UserError, match="9 of 17 images can't be read"):
        ev.evaluate(tmp_path / "data", ["pixels"], ["knn"], log=said.append)


def test_monitor_is_evaluates_20_nn(tmp_path):
    """What training is told of its features is what eval.py says of them, table by table."""
    tables = [tmp_path / "one", tmp_path / "two"]
    for i, folder in enumerate(tables):
        folder.mkdir()
        draw_cells(folder, 4 + 2 * i)
    backbone = small()
    cfg = configure(
        arch="nano",
        eval_data=[str(t / "cells.csv") for t in tables],
        global_size=16,
        unit="cells",
        tile_size=24,
    )
    monitor = ev.knn_monitor(cfg)
    found = monitor(backbone.train().bfloat16(), CPU)
    assert list(found) == ["knn", "knn1"] and backbone.training
    torch.save(backbone.float().state_dict(), tmp_path / "b.pth")
    for name, table in zip(found, tables):
        weights = {"ours": tmp_path / "b.pth"}
        result = ev.evaluate(table / "cells.csv", weights, ["knn"], 24, log=ev.quiet)
        row = next(r for r in result["rows"] if r["protocol"] == "20-NN")
        assert found[name] == pytest.approx(row["weighted_f1"])


def test_command_line(tmp_path):
    data = draw_cells(tmp_path)
    command = [sys.executable, os.path.join(HERE, "eval.py"), "--data", data, "--weights", "pixels"]
    command += ["--protocols", "knn", "--crop", "24", "--out", tmp_path / "o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1-NN, one source left out" in done.stdout and "\033" not in done.stdout
    assert (tmp_path / "o" / "results.json").exists()
