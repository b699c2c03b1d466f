"""eval.py against scikit-learn, timm and closed forms; what must not leak; what a user can get wrong."""

import copy
import importlib.util
import json
import os
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
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier

import eval as ev
from augment import MEAN, STD, UserError
from reddino import build_vit, resize_pos_embed

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHULA = os.environ.get("CHULA", os.path.join(HERE, "..", "shared", "data", "chula-rbc-12"))


def blobs(n=300, d=20, classes=4, seed=0, spread=1.0):
    """Gaussian classes, unbalanced, in correlated dimensions; float64."""
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    x = (spread * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))) @ rng.normal(size=(d, d))
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


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers.


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("k", [1, 20])
def test_knn_is_scikit_learns(case, k):
    x, y = blobs()
    train_x, train_y = DEGENERATE[case](x[:200], y[:200])
    test_x = widened(x[200:], train_x)
    k = min(k, len(train_x))
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(train_x, train_y)
    probs = ev.knn(train_x, train_y, test_x, k, n_classes=4).numpy()
    np.testing.assert_allclose(probs[:, reference.classes_], reference.predict_proba(test_x), atol=1e-9)
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
    halves = 2 if len(train_y.unique()) == 2 else 1  # with two classes scikit-learn has w where we have w/2 and -w/2
    reference = LogisticRegression(C=halves / (l2 * len(train_x)), tol=1e-10, max_iter=100_000)
    reference.fit((train_x - mean) / std, train_y)
    probs = ev.linear_probe(train_x, train_y, test_x, l2, n_classes=4).numpy()
    expected = np.zeros_like(probs)
    expected[:, reference.classes_] = reference.predict_proba((test_x - mean) / std)
    np.testing.assert_allclose(probs, expected, atol=0.005)
    absent = sorted(set(range(4)) - set(train_y.tolist()))
    assert (probs[:, absent] == 0).all()


def test_linear_probe_reaches_the_minimum_in_float32_on_hard_features():
    """Features as correlated as a ViT's (condition number 1e5): the objective is within 1e-4 of scikit-learn's."""
    x, y = blobs(1000, 100, 5, spread=0.2)
    x = x @ torch.diag(torch.logspace(0, -5, 100, dtype=x.dtype)) @ torch.randn(100, 100, dtype=x.dtype)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    for l2 in (1e-1, 1e-4):
        best = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=100_000).fit(x, y)
        weight = torch.from_numpy(best.coef_)
        penalty = l2 / 2 * weight.square().sum().item()
        target = metrics.log_loss(y, best.predict_proba(x)) + penalty
        probs = ev.linear_probe(x.float(), y, torch.cat([x, torch.zeros(1, 100), torch.eye(100)]).float(), l2).double()
        logits = probs.log()
        own = (logits[1001:] - logits[1000]).T  # the weights, read off the answers to unit vectors, up to a constant
        own = own - own.mean(0)
        found = (
            metrics.log_loss(y, probs[:1000] / probs[:1000].sum(1, keepdim=True)) + l2 / 2 * own.square().sum().item()
        )
        assert abs(found - target) < 1e-4 * target


def test_linear_probe_path_is_the_single_fits():
    x, y = blobs(spread=0.3)
    path = ev.linear_probe(x[:200], y[:200], x[200:], [1e-1, 1e-2, 1e-3])
    for l2, probs in zip([1e-1, 1e-2, 1e-3], path):
        np.testing.assert_allclose(probs, ev.linear_probe(x[:200], y[:200], x[200:], l2), atol=0.005)


def test_tuned_probe_takes_the_strength_that_is_best_on_held_out_groups():
    x, y = blobs(400, 60, 3, spread=0.15)  # noise enough for the weakest penalties to overfit
    groups = np.arange(400) // 5
    held = ev.held_out(groups, y.numpy(), 0)
    assert 0.1 < held.mean() < 0.3
    assert not set(groups[held]) & set(groups[~held])
    f1 = [metrics.f1_score(y[held], ev.linear_probe(x[~held], y[~held], x[held], l2).argmax(1), average="weighted")
          for l2 in ev.L2]  # fmt: skip
    best = ev.L2[int(np.argmax(f1))]
    assert best != ev.L2[-1]
    np.testing.assert_allclose(ev.tuned_probe(x, y, x[:9], groups, 3), ev.linear_probe(x, y, x[:9], best), atol=1e-9)
    assert not ev.held_out(np.zeros(9, int), np.zeros(9, int), 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, folds, bootstrap.


@pytest.mark.parametrize("truth", [[0, 1, 2, 3], [0, 2, 3], [2], [0, 1]], ids=str)
@pytest.mark.parametrize("called", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_scores_are_scikit_learns(truth, called):
    rng = np.random.default_rng(0)
    truth, guess = rng.choice(truth, 97), rng.choice(called, 97)
    found = ev.scores(ev.confusion(truth, guess, 4))
    np.testing.assert_array_equal(
        ev.confusion(truth, guess, 4), metrics.confusion_matrix(truth, guess, labels=range(4))
    )
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, guess))
    for average in ("weighted", "macro"):
        expected = metrics.f1_score(truth, guess, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected)


def test_auroc_is_scikit_learns():
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):  # with many ties, with few
        truth, score = rng.random(200) < 0.3, rng.integers(0, levels, 200) / levels
        weights = rng.integers(0, 4, (3, 200))
        expected = [metrics.roc_auc_score(truth, score, sample_weight=w) for w in (np.ones(200), *weights)]
        np.testing.assert_allclose(ev.auroc(truth, score, [1.0, *weights]), expected)
    assert ev.auroc(truth, np.zeros(200)) == 0.5
    assert np.isnan(ev.auroc(np.ones(5, bool), np.arange(5.0)))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_bootstrap_draws_groups(n_classes):
    """Each replicate is what scikit-learn gives on the cells of the groups drawn, repeated as often as drawn; the first
    is of all cells once."""
    rng = np.random.default_rng(1)
    truth, group = rng.integers(0, n_classes, 120), rng.permutation(np.repeat([3, 5, 7, 11, 20, 21], 20))
    probs = rng.dirichlet(np.ones(n_classes), 120)
    again, times = ev.judge(truth, probs, group, seed=4)["again"], ev.bootstrap(6, seed=4)
    assert times.shape == (1001, 6) and (times.sum(1) == 6).all() and (times[0] == 1).all()
    assert times[1:].mean(0) == pytest.approx(1, abs=0.1)
    assert times[1:].var() == pytest.approx(5 / 6, rel=0.1)  # binomial
    index = np.unique(group, return_inverse=True)[1]
    for r in range(20):
        cells = np.repeat(np.arange(120), times[r][index].astype(int))
        guess = probs.argmax(1)[cells]
        assert again["accuracy"][r] == pytest.approx(metrics.accuracy_score(truth[cells], guess))
        assert again["weighted_f1"][r] == pytest.approx(metrics.f1_score(truth[cells], guess, average="weighted"))
        if n_classes == 2:
            assert again["auroc"][r] == pytest.approx(metrics.roc_auc_score(truth[cells], probs[cells, 1]))


def test_recall_is_scikit_learns_and_nothing_for_a_class_that_is_not_tested():
    truth, probs = np.array([0, 0, 1, 1, 1]), np.eye(3)[[0, 2, 1, 1, 0]]
    row = ev.judge(truth, probs, np.arange(5))
    assert row["recall"] == [*metrics.recall_score(truth, probs.argmax(1), labels=[0, 1], average=None), None]
    assert "auroc" not in ev.judge(np.zeros(4, int), np.full((4, 2), 0.5), np.arange(4))["again"]


def test_interval_knows_that_cells_of_a_group_err_together():
    """50 groups of 20 cells that are right or wrong as a whole: the standard error is that of 50 answers."""
    right = np.repeat(np.random.default_rng(0).random(50) < 0.7, 20)
    probs = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
    again = ev.judge(np.zeros(1000, int), probs, np.repeat(np.arange(50), 20))["again"]
    p = right.mean()
    assert again["accuracy"][1:].std() == pytest.approx(np.sqrt(p * (1 - p) / 50), rel=0.1)


def test_comparison_is_paired():
    """b errs where a does and on one more group: its own interval is wide, that of the difference is not."""
    truth, group = np.zeros(400, int), np.arange(400) // 10
    wrong = np.random.default_rng(0).random(40) < 0.4
    more = wrong.copy()
    more[np.flatnonzero(~wrong)[0]] = True
    found = {label: {"20-NN": ev.judge(truth, np.eye(2)[w[group].astype(int)], group)}
             for label, w in (("a", wrong), ("b", more))}  # fmt: skip
    rows, pairs = ev.compare(found, "folds")
    (gap,) = [p for p in pairs if p["weights"] == "b" and p["metric"] == "accuracy"]
    assert gap["minus"] == "a" and gap["difference"] == pytest.approx(-1 / 40)
    low, high = rows[0]["interval"]["accuracy"]
    assert rows[0]["accuracy"] == pytest.approx(1 - wrong.mean()) and high - low > 0.2
    assert gap["interval"] == [pytest.approx(-3 / 40), 0]  # Poisson with mean 1: 0 to 3 times among 40


def test_folds_keep_groups_whole_and_classes_even():
    rng = np.random.default_rng(0)
    for seed in range(5):
        groups = rng.permutation(1000)[rng.integers(0, 80, 1500)]
        labels = (rng.choice(6, 1500, p=[0.5, 0.2, 0.1, 0.1, 0.07, 0.03]) + groups) % 6  # classes cluster in groups
        fold = ev.group_folds(groups, labels, 5, seed)
        assert set(fold) == {0, 1, 2, 3, 4}
        assert all(len(set(fold[groups == g])) == 1 for g in set(groups))
        reference = np.zeros(1500, int)
        for f, (_, test) in enumerate(
            StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, groups)
        ):
            reference[test] = f

        def unevenness(fold, labels=labels):
            share = np.array(
                [[(labels[fold == f] == c).sum() / (labels == c).sum() for c in range(6)] for f in range(5)]
            )
            return np.abs(share - 0.2).mean()

        assert unevenness(fold) < 1.2 * unevenness(reference)
    assert set(ev.group_folds(np.array([7, 7, 9]), np.array([0, 1, 0]), 5)) == {0, 1}  # two groups, two folds


def test_no_leak():
    """The label is a property of the group, and features tell the group: chance by groups, all right by cells."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 10)
    labels = rng.permutation(np.repeat([0, 1], 50))[groups]
    x = torch.from_numpy(rng.normal(size=(100, 200))[groups] + 0.01 * rng.normal(size=(1000, 200))).float()

    def score(groups, **kept):
        cells = ev.Cells(["f"], np.arange(1000), None, labels, ["a", "b"], groups, groups)
        parts = ev.make_splits(cells, 5, 0)["5 folds by image"]
        for train, test in parts:
            assert not set(groups[train]) & set(groups[test])
        assert sorted(np.concatenate([test for _, test in parts])) == list(range(1000))
        return {k: row["again"]["accuracy"][0] for k, row in ev.measure(x, cells, parts, ("knn", "linear"), 0).items()}

    for accuracy in score(groups).values():
        assert 0.35 < accuracy < 0.65  # 100 groups: one standard deviation is 0.05
    for accuracy in score(np.arange(1000)).values():
        assert accuracy == 1


def test_study_level_against_scikit_learn():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 8)
    sick = rng.random(40) < 0.5
    truth = (sick[group] & (rng.random(320) < 0.3)).astype(int)  # a study is sick if any of its slices is
    probs = np.stack([1 - (p := np.clip(0.3 * truth + rng.random(320) * 0.7, 0, 1)), p], 1)
    rows = ev.study_level(truth, probs, group, 0)
    has = [truth[group == g].any() for g in range(40)]
    healthy = [not truth[group == g].all() for g in range(40)]
    for pool, f in (("mean", np.mean), ("maximum", np.max)):
        expected = [metrics.roc_auc_score(h, [f(probs[group == g, c]) for g in range(40)])
                    for c, h in ((0, healthy), (1, has)) if 0 < sum(h) < 40]  # fmt: skip
        assert rows[f"{pool} of a study"]["again"]["auroc"][0] == pytest.approx(np.mean(expected))
    assert ev.study_level(np.zeros(320, int), probs, group, 0) == {}


def test_few_shot_takes_so_many_a_class():
    x, y = blobs(600, 10, 3, spread=3.0)
    cells = ev.Cells([], np.arange(600), None, y.numpy(), ["a", "b", "c"], np.arange(600), np.arange(600))
    parts = ev.make_splits(cells, 5, 0)["5 folds by image"]
    rows = {shots: ev.few_shot(x, y, cells, parts, shots, 0) for shots in (1, 5, 50, 500)}
    accuracy = {shots: row["again"]["accuracy"][0] for shots, row in rows.items() if row}
    assert accuracy[1] < accuracy[5] < accuracy[50] and rows[500] == {}


def test_few_shot_is_the_mean_and_deviation_of_its_draws(monkeypatch):
    """Each draw learns from n training cells of each class, and from nothing else; its scores are scikit-learn's."""
    x, y = blobs(600, 10, 3)
    cells = ev.Cells([], np.arange(600), None, y.numpy(), ["a", "b", "c"], np.arange(600), np.arange(600) // 10)
    parts, f1, probe = ev.make_splits(cells, 5, 0)["5 folds by image"], [], ev.linear_probe

    def watched(train_x, train_y, test_x, *rest):
        assert train_y.bincount().tolist() == [5, 5, 5]
        train, test = parts[len(f1) % 5]
        assert {tuple(row) for row in train_x.tolist()} <= {tuple(row) for row in x[train].tolist()}
        assert torch.equal(test_x, x[test])
        probs = probe(train_x, train_y, test_x, *rest)
        f1.append(metrics.f1_score(y[test], probs.argmax(1), average="weighted"))
        return probs

    monkeypatch.setattr(ev, "linear_probe", watched)
    row = ev.few_shot(x, y, cells, parts, 5, 0)
    assert len(f1) == 20 and len(set(f1)) == 20
    assert row["again"]["weighted_f1"][0] == pytest.approx(np.mean(f1))
    assert row["deviation"]["weighted_f1"] == pytest.approx(np.std(f1, ddof=1))
    spread = row["again"]["weighted_f1"][1:].std()  # of the mean, by groups: far less than between draws
    assert 0.1 * row["deviation"]["weighted_f1"] < spread < row["deviation"]["weighted_f1"]


# ---------------------------------------------------------------------------------------------------------------------
# Images and backbones.


def test_a_crop_goes_on_at_the_edge(tmp_path):
    image = picture(40, 50)
    Image.fromarray(image).save(tmp_path / "smear.png")
    padded = np.pad(image, ((30, 30), (30, 30), (0, 0)), mode="edge")
    for side in (24, 25):
        centres = np.array([(0, 0), (20.4, 10.6), (49, 40)])
        found = ev.cut(str(tmp_path / "smear.png"), centres, side, 999).permute(0, 2, 3, 1).numpy()
        for crop, (x, y) in zip(found, [(0, 0), (20, 11), (49, 40)]):
            x, y = x + 30 - side // 2, y + 30 - side // 2
            np.testing.assert_array_equal(crop, padded[y : y + side, x : x + side])


def test_network_input_is_pillows_bicubic():
    image = picture(80, 80)
    found = ev.network_input(torch.from_numpy(image).permute(2, 0, 1)[None], (32, 32), torch.device("cpu"))[0]
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 2.5 / 255 / 0.22  # a grey level or two


def test_colour_is_a_histogram_and_pixels_are_pixels():
    image = picture(64, 64)
    backbone = ev.load_backbone("colour", device="cpu")
    found = ev.extract_features(backbone, [image, image[::-1, ::-1]])
    expected = np.concatenate([np.histogram(image[..., c], 32, (0, 256))[0] for c in range(3)])
    np.testing.assert_allclose(found[0].square() * 64 * 64, expected, atol=1e-2 * 64 * 64)  # 8 levels a bin, rounding
    torch.testing.assert_close(found[0], found[1])  # where things are does not matter
    assert found.shape == (2, 96)
    assert ev.extract_features(ev.load_backbone("pixels", device="cpu"), [image]).shape == (1, 3 * 16 * 16)


def timm_vit(registers=0, img_size=224):
    import timm

    torch.manual_seed(0)
    name = f"vit_small_patch14{'_reg4' if registers else ''}_dinov2"
    model = timm.create_model(name, img_size=img_size, depth=2, num_classes=0, init_values=1.0).eval()
    return model, {k: v.clone() for k, v in model.state_dict().items()}


def as_dinov2(state):
    """timm's state dict as DINOv2 publishes it: other names, a mask token, a position for the class token."""
    state = {k.replace("reg_token", "register_tokens"): v for k, v in state.items()}
    state["mask_token"] = torch.zeros(1, 384)
    if "register_tokens" in state:
        at_cls = torch.randn(1, 1, 384)
        state["pos_embed"] = torch.cat([at_cls, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - at_cls
    return state


def as_released(state):
    """As RedDino and DinoBloom publish it."""
    backbone = {f"backbone.{k}": v for k, v in as_dinov2(state).items()}
    return {"teacher": backbone | {"dino_head.mlp.0.weight": torch.zeros(4, 4)}}


def timms_tokens(model, image):
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255).sub_(torch.tensor(MEAN)[:, None, None])
    with torch.inference_mode():
        return model.forward_features(x / torch.tensor(STD)[:, None, None])


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("img_size", [224, 518], ids=["257 positions", "1370 positions"])
def test_every_layout_of_weights_gives_the_same_features(registers, img_size, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, state = timm_vit(registers, img_size)
    torch.save(state, tmp_path / "timm.pth")
    safetensors.save_file(state, tmp_path / "timm.safetensors")
    torch.save(as_dinov2(state), tmp_path / "dinov2.pth")
    torch.save(as_released(state), tmp_path / "reddino.pth")
    image = picture(img_size, img_size)
    expected = timms_tokens(model, image)
    for name in ("timm.pth", "timm.safetensors", "dinov2.pth", "reddino.pth"):
        backbone = ev.load_backbone(str(tmp_path / name), size=img_size, device="cpu")
        cls, patches = ev.extract_features(backbone, [image], patch_tokens=True)
        torch.testing.assert_close(cls, expected[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(patches, expected[:, 1 + registers :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ev.extract_features(backbone, [image]), cls)
        assert ev.load_backbone(str(tmp_path / name), device="cpu").size == 224  # RedDino's, whatever is stored


def test_a_name_is_a_download_and_the_same_network(tmp_path, monkeypatch):
    model, state = timm_vit(4, 518)
    address = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: {address: as_dinov2(state)}[url])
    image = picture(518, 518)
    found = ev.extract_features(ev.load_backbone("dinov2_vits14_reg", size=518, device="cpu"), [image])
    torch.testing.assert_close(found, timms_tokens(model, image)[:, 0], rtol=1e-4, atol=1e-4)


def test_offline_and_without_packages_it_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("dinov2_vits14", "dinov2_vitg14_reg", "resnet50"):
        with pytest.raises(UserError, match=f"{name}.*can't download.*no route") as error:
            ev.load_backbone(name)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="pip install safetensors"):
        ev.load_backbone(tmp_path / "a.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        ev.evaluate(tmp_path, ["pixels"], figures=tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name, last", [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"),
                                        ("squeezenet1_1", "classifier.1")])  # fmt: skip
def test_torchvision_classifier_without_its_last_layer(name, last, monkeypatch):
    """The features are the input of the layer that gives the 1,000 classes (squeezenet's has pixels: their mean)."""
    torch.manual_seed(0)
    asked, seen, whole = [], [], torchvision.models.get_model(name).eval()
    whole.get_submodule(last).register_forward_hook(lambda module, given, out: seen.append(given[0]))

    def get_model(*given, **options):
        asked.append((given, options))
        return copy.deepcopy(whole)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    backbone = ev.load_backbone(name, device="cpu")
    assert asked == [((name,), {"weights": "DEFAULT"})] and backbone.size == 224
    image = torch.from_numpy(picture(64, 64)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        assert whole(ev.network_input(image, (224, 224), torch.device("cpu"))).shape == (1, 1000)
    expected = seen[0].mean((2, 3)) if seen[0].dim() == 4 else seen[0]
    torch.testing.assert_close(ev.extract_features(backbone, image), expected, rtol=1e-4, atol=1e-4)
    next(whole.parameters()).data += 1
    assert ev.load_backbone(name, device="cpu").digest != backbone.digest  # features are cached by content, not by name


def test_random_takes_the_shape_of_a_checkpoint_and_tells_images_apart():
    like = build_vit("nano", img_size=32, embed_dim=128, depth=3, heads=2)
    random = ev.load_backbone("random", device="cpu", like=like)
    assert {k: v.shape for k, v in random.state_dict().items()} == {k: v.shape for k, v in like.state_dict().items()}
    x = ev.extract_features(random, [picture(80, 80, seed) for seed in range(9)])
    assert (x - x.mean(0)).norm() > 1e-2 * x.norm()  # with LayerScale 1e-5 it would be some 1e-5


def test_fine_tuning_learns_and_leaves_the_backbone_alone():
    """Stripes of any phase and direction; the middle is darker in one class."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 240)
    wave = 127 + 120 * np.sin(np.arange(16) * 1.5 + rng.uniform(0, 6, 240)[:, None])
    crops = np.stack([np.broadcast_to(w[:, None] if rng.random() < 0.5 else w, (3, 16, 16)) for w in wave])
    crops = crops.astype(np.uint8)
    crops[label == 1, :, 6:10, 6:10] //= 3
    cells = ev.Cells([], np.arange(240), None, label, ["a", "b"], np.arange(240), np.arange(240))
    backbone = build_vit("nano", img_size=16, embed_dim=64, depth=2, heads=1, layerscale=1.0).requires_grad_(False)
    backbone.size, backbone.device = 16, torch.device("cpu")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    probs = ev.fine_tune(backbone, torch.from_numpy(crops), cells, np.arange(160), np.arange(160, 240), epochs=20)
    assert (probs.argmax(1).numpy() == label[160:]).mean() > 0.8
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())  # the one given is not touched


def test_fine_tuning_never_looks_at_the_labels_of_the_test_and_stops_early(monkeypatch):
    torch.manual_seed(0)
    crops, label = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8), np.arange(60) % 2  # nothing to learn
    train, test, said = np.arange(40), np.arange(40, 60), []
    backbone = build_vit("nano", img_size=16, embed_dim=64, depth=2, heads=1, layerscale=1.0).requires_grad_(False)
    backbone.size, backbone.device = 16, torch.device("cpu")
    optimizers, adamw = [], torch.optim.AdamW

    def watched(*given, **options):
        optimizers.append(adamw(*given, **options))
        return optimizers[-1]

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    found = []
    for other in (label, np.where(np.arange(60) < 40, label, 1 - label)):
        cells = ev.Cells([], np.arange(60), None, other, ["a", "b"], np.arange(60), np.arange(60))
        found.append(ev.fine_tune(backbone, crops, cells, train, test, epochs=100, patience=2, log=said.append))
    assert torch.equal(*found) and len(said) == 2 and "100 epochs or fewer" in said[0]
    learned = {p: g["initial_lr"] for g in optimizers[0].param_groups for p in g["params"]}
    rates = [lr for p, lr in learned.items() if p.shape == (192, 64)]  # qkv of blocks 0 and 1
    assert rates == pytest.approx([5e-4 * 0.75**2, 5e-4 * 0.75])
    assert min(learned.values()) == pytest.approx(5e-4 * 0.75**3) and max(learned.values()) == 5e-4
    steps = optimizers[0].state[next(iter(learned))]["step"]  # one an epoch, of the 32 cells that are learnt from
    assert 3 <= steps < 50


def test_a_diverged_backbone_is_not_scored(tmp_path):
    vit = build_vit("nano", img_size=16, embed_dim=64, depth=1, heads=1)
    torch.nn.init.constant_(vit.norm.weight, torch.nan)
    torch.save(vit.state_dict(), tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth: some features are infinite"):
        ev.evaluate(draw_cells(tmp_path), [tmp_path / "bad.pth"], crop=24, log=lambda _: 0)


# ---------------------------------------------------------------------------------------------------------------------
# The whole.


def draw_cells(folder, images=8, size=(120, 160)):
    """Smears with eight cells each: bright or dark discs, and a CSV; two sources. Returns the CSV's path."""
    rng = np.random.default_rng(0)
    lines = ["image,x,y,label,source"]
    for i in range(images):
        image = np.full((*size, 3), 200 - 20 * (i % 2), np.uint8)
        for j in range(8):
            x, y, dark = 20 + 40 * (j % 4), 30 + 60 * (j // 4), rng.random() < 0.5
            yy, xx = np.ogrid[: size[0], : size[1]]
            image[(yy - y) ** 2 + (xx - x) ** 2 < 100] = (90, 60, 90) if dark else (240, 150, 160)
            lines.append(f"{i}.png,{x},{y},{'dark' if dark else 'bright'},{'ab'[i % 2]}")
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "cells.csv").write_text("\n".join(lines) + "\n")
    return folder / "cells.csv"


def test_whole_evaluation_of_a_csv(tmp_path):
    data, said = draw_cells(tmp_path), []
    vit = build_vit("nano", img_size=16, embed_dim=64, depth=1, heads=1, layerscale=1.0)
    torch.save(vit.state_dict(), tmp_path / "backbone.pth")
    weights = {"untrained": "random", "ours": tmp_path / "backbone.pth", "colour": "colour"}
    out = tmp_path / "out"
    result = ev.evaluate(data, weights, crop=24, out=out, figures=None, log=said.append)
    names = {(r["protocol"], r["split"]) for r in result["rows"]}
    few = {(f"few-shot, {n} a class", "5 folds by image") for n in (1, 5, 10)}
    assert names == few | {
        (p, s) for p in ("1-NN", "20-NN", "linear probe") for s in ("5 folds by image", "one source left out")
    }
    rows = {(r["weights"], r["protocol"], r["split"]): r for r in result["rows"]}
    assert [r["weights"] for r in result["rows"]][:3] == list(weights)
    row = rows["colour", "linear probe", "5 folds by image"]
    assert row["accuracy"] == 1 and row["interval"]["accuracy"] == [1, 1] and row["auroc"] == 1
    assert (
        row["recall"] == [1, 1]
        and result["classes"] == ["bright", "dark"]
        and sum(map(sum, row["confusion"])) == 64 == row["cells"]
    )
    want = {"weights": "untrained", "minus": "colour", "metric": "accuracy", "protocol": "1-NN"}
    pair = next(p for p in result["pairs"] if want.items() <= p.items())
    expected = rows["untrained", "1-NN", pair["split"]]["accuracy"] - rows["colour", "1-NN", pair["split"]]["accuracy"]
    assert (
        pair["difference"] == pytest.approx(expected)
        and pair["interval"][0] <= pair["difference"] <= pair["interval"][1]
    )
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result))
    assert len((out / "results.csv").read_text().splitlines()) == 1 + len(result["rows"])
    assert (out / "results.md").read_text().count("\n| **") == len(names)  # one best line for each
    assert all(f"{protocol}, {split}" in said[-1] for protocol, split in names)

    extracted = [s for s in said if "features of" in s]  # a second time, another protocol: no image is decoded
    again = ev.evaluate(data, weights, protocols=["knn"], crop=24, out=out, log=said.append)
    assert len(extracted) == 3 == len([s for s in said if "features of" in s])
    assert [r for r in again["rows"]] == [r for r in result["rows"] if "NN" in r["protocol"]]
    ev.evaluate(data, weights, protocols=["knn"], crop=25, out=out, log=said.append)  # another crop: all anew
    assert len([s for s in said if "features of" in s]) == 6


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    vit = build_vit("nano", img_size=16, embed_dim=128, depth=1, heads=2)
    torch.save(vit.state_dict(), tmp_path / "backbone.pth")
    ev.evaluate(
        draw_cells(tmp_path), {"a b": tmp_path / "backbone.pth"}, crop=24, figures=tmp_path / "f", log=lambda _: 0
    )
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "f").iterdir()}
    assert {"few_shot.png", "confusion_a_b.png", "map_a_b.png", "smear_a_b.png"} <= set(sizes)
    assert all(min(size) > 300 for size in sizes.values())


@pytest.mark.parametrize("crop, grid", [(None, (60, 80)), (80, (24, 32)), (16, (60, 80)), (8000, (4, 5))])
def test_a_smear_is_shrunk_as_the_scored_cells_are(crop, grid):
    vit = build_vit("nano", img_size=32).eval()
    vit.size, vit.device = 32, torch.device("cpu")
    pictures = ev.smear(vit, picture(480, 640), crop)
    assert pictures["patch tokens, PCA as RGB"].shape == (*grid, 3)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_smears_attention_and_colours_are_timms(registers, tmp_path):
    model, state = timm_vit(registers)
    torch.save(state, tmp_path / "timm.pth")
    seen, attention = [], model.blocks[-1].attn
    attention.fused_attn = False  # so that the weights exist as such
    attention.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    image = picture(230, 300)  # 16 x 21 patches
    pictures = ev.smear(ev.load_backbone(str(tmp_path / "timm.pth"), device="cpu"), image)
    x = ev.network_input(torch.from_numpy(image).permute(2, 0, 1)[None], (224, 294), torch.device("cpu"))
    model.set_input_size((224, 294))  # timm resamples positions, as DINOv2 does for its models with registers only
    model.pos_embed.data = resize_pos_embed(positions(state), 16, 21, registers)[:, 1 if registers else 0 :]
    with torch.inference_mode():
        tokens = model.forward_features(x)[0, 1 + registers :].double().numpy()
    assert list(pictures)[:2] == ["image", "patch tokens, PCA as RGB"] and len(pictures) == 8
    for i, head, name in zip(range(1, 7), seen[0][:, 0, 1 + registers :], list(pictures)[2:]):
        assert name == f"attention of head {i}, {100 * head.min():.2f} to {100 * head.max():.2f}% a patch"
        np.testing.assert_allclose(pictures[name].ravel(), head, rtol=1e-3, atol=1e-7)
    components = PCA(3).fit_transform(tokens).reshape(16, 21, 3)
    middle = (pictures["patch tokens, PCA as RGB"] > 0) & (pictures["patch tokens, PCA as RGB"] < 1)
    for c in range(3):
        found, inside = pictures["patch tokens, PCA as RGB"][..., c], middle[..., c]
        assert abs(np.corrcoef(found[inside], components[..., c][inside])[0, 1]) > 0.9999
        assert inside.mean() > 0.97  # a hundredth at either end is cut off


def positions(state):
    """timm's position embeddings, with one for the class token."""
    pos = state["pos_embed"]
    return pos if pos.shape[1] == 257 else torch.cat([torch.zeros_like(pos[:, :1]), pos], 1)


def test_class_folders_broken_images_and_odd_shapes(tmp_path):
    for c, level in (("dark", 60), ("bright", 200)):
        for i in range(8):
            os.makedirs(tmp_path / "data" / c / "deeper", exist_ok=True)
            image = np.full((20 + 10 * i, 50), level, np.uint8) + np.random.default_rng(i).integers(
                0, 9, (20 + 10 * i, 50)
            )
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "data" / c / "deeper" / f"{i}.png")
    broken = tmp_path / "data" / "dark" / "broken.png"
    broken.write_bytes(b"<html>")
    said = []
    result = ev.evaluate(tmp_path / "data", ["pixels", "colour"], ["knn"], out=tmp_path / "out", log=said.append)
    assert result["cells"] == 16 and list(result["skipped"]) == [str(broken)]
    assert len([s for s in said if "broken.png" in s]) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["skipped"] == result["skipped"]
    assert (tmp_path / "out" / "skipped.txt").read_text().count("\n") == len(result["skipped"])
    assert {r["weights"]: r["accuracy"] for r in result["rows"] if r["protocol"] == "1-NN"}["colour"] == 1
    for p in (tmp_path / "data" / "dark" / "deeper").iterdir():
        p.write_bytes(b"no image")
    with pytest.raises(UserError, match="9 of 17 images can't be read"):
        ev.evaluate(tmp_path / "data", ["pixels"], ["knn"], log=said.append)


def test_whole_image_keeps_its_shape(tmp_path):
    """A long cell must not become a round one, nor lose its ends."""
    image = np.full((10, 40, 3), 200, np.uint8)
    image[3:7, 5:35] = 50
    Image.fromarray(image).save(tmp_path / "long.png")
    crop = ev.cut(str(tmp_path / "long.png"), None, 80, 40)[0, 0].numpy()
    np.testing.assert_array_equal(crop[15:25], image[..., 0])
    assert (crop[:15] == 200).all() and (crop[25:] == 200).all()


def test_split_column_and_groups(tmp_path):
    draw_cells(tmp_path)
    lines = (tmp_path / "cells.csv").read_text().split()
    side = ["train", "train", "train", "test", "other", "train", "test", "test"]
    split = [lines[0] + ",split"] + [f"{line},{side[int(line[0])]}" for line in lines[1:]]
    (tmp_path / "split.csv").write_text("\n".join(split))
    result = ev.evaluate(tmp_path / "split.csv", ["colour"], ["knn"], crop=24, log=lambda _: 0)
    rows = {(r["protocol"], r["split"]): r for r in result["rows"]}
    assert result["cells"] == 56 and rows["1-NN", "the CSV's split"]["cells"] == 24
    cells = ev.read_cells(str(tmp_path / "split.csv"))
    for train, test in ev.make_splits(cells, 5, 0)["one source left out"]:
        assert (cells.split[train] == "train").all() and (cells.split[test] == "test").all()
        assert not set(cells.source[train]) & set(cells.source[test])

    grouped = [lines[0] + ",group"] + [f"{line},patient{int(line[0]) % 4}" for line in lines[1:]]
    (tmp_path / "grouped.csv").write_text("\n".join(grouped))
    cells = ev.read_cells(str(tmp_path / "grouped.csv"))
    splits = ev.make_splits(cells, 5, 0)
    assert list(splits) == ["4 folds by group", "one source left out"] and len(splits["4 folds by group"]) == 4


def test_one_image_under_two_names_is_one_image(tmp_path):
    draw_cells(tmp_path, images=4)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    lines = (tmp_path / "cells.csv").read_text().split()
    lines = [line + ",split" * (line == lines[0]) for line in lines]
    rows = [f"{line},{'train' if line[0] in '01' else 'test'}" for line in lines[1:]]
    (tmp_path / "copied.csv").write_text("\n".join([lines[0], *rows, "copy.png,20,30,dark,a,test"]))
    cells, said = ev.read_cells(str(tmp_path / "copied.csv")), []
    assert cells.by == "image" and len(set(cells.group)) == 4 and len(cells.files) == 5
    train, _ = ev.make_splits(cells, 5, 0, said.append)["the CSV's split"][0]
    assert set(cells.file[train]) == {1} and "8 cells are not trained on" in said[0]
    lines = [lines[0].replace("source,split", "group"), *(f"{line[:-2]},{line[0]}" for line in lines[1:])]
    (tmp_path / "grouped.csv").write_text("\n".join([*lines, "copy.png,20,30,dark,4"]))  # of another patient
    cells = ev.read_cells(str(tmp_path / "grouped.csv"))
    for train, test in ev.make_splits(cells, 5, 0, said.append)["5 folds by group"]:
        assert not {0, 4} <= set(cells.file[train]) | set(cells.file[test]) or {0, 4} <= set(cells.file[train])


def slices(folder, level=0, width=2000):
    """The smears of draw_cells as .npy of values in this window, int16, and their CSV: its path."""
    text = (folder / "cells.csv").read_text()
    for path in folder.glob("[0-9].png"):
        grey = np.asarray(Image.open(path))[..., 0].astype(float)
        np.save(path.with_suffix(".npy"), np.rint(level + (grey / 255 - 0.5) * width).astype(np.int16))
    (folder / "slices.csv").write_text(text.replace(".png", ".npy"))
    return folder / "slices.csv"


def test_slices_are_scored_through_their_window(tmp_path):
    """Values in a window are what the picture is that the window makes of them: crops, features, figures."""
    draw_cells(tmp_path)
    table = slices(tmp_path)
    grey = ev.read_cells(str(tmp_path / "cells.csv"))
    cells = ev.read_cells(str(table), window=(0, 2000))
    for mine, theirs in zip(ev.crops_of(cells, 24, 224), ev.crops_of(grey, 24, 224)):
        assert (mine == mine[:, :1]).all() and (mine[:, 0].int() - theirs[:, 0].int()).abs().max() <= 1
    narrow = ev.read_cells(str(table), window=(0, 1))
    assert len({cells.digest, narrow.digest, grey.digest}) == 3  # features of another window are no hit in the cache
    results = ev.evaluate(table, ["pixels"], ["knn"], 24, tmp_path / "out", log=lambda text: None, window=(0, 2000))
    assert results["window"] == (0, 2000) and results["rows"][0]["accuracy"] == 1
    with pytest.raises(UserError, match="all cells are of one image"):  # seen through a window in which all is white
        ev.read_cells(str(table), window=(-5000, 10))


def broken(tmp_path, edit):
    lines = (tmp_path / "cells.csv").read_text().split("\n")
    (tmp_path / "bad.csv").write_text("\n".join(edit(lines)))
    return ["--data", str(tmp_path / "bad.csv"), "--weights", "pixels"]


MISTAKES = {
    "no such data": (lambda t: ["--data", str(t / "nothing"), "--weights", "pixels"], "No such file or directory"),
    "a folder without classes": (lambda t: ["--data", str(t), "--weights", "pixels"], "0 cells, not of two classes"),
    "no label": (lambda t: broken(t, lambda s: [s[0].replace("label", "class"), *s[1:]]), "no column label"),
    "x without y": (lambda t: broken(t, lambda s: [s[0].replace(",y,", ",z,"), *s[1:]]), "no column y"),
    "x is no number": (
        lambda t: broken(t, lambda s: [s[0], s[1].replace(",20,", ",left,"), *s[2:]]),
        "line 2: x is 'left'",
    ),
    "x is nan": (lambda t: broken(t, lambda s: [s[0], s[1].replace(",20,", ",nan,"), *s[2:]]), "line 2: x is 'nan'"),
    "an empty label": (lambda t: broken(t, lambda s: [s[0], "0.png,20,30,,a", *s[2:]]), "line 2: label is ''"),
    "fractions": (
        lambda t: broken(
            t, lambda s: [s[0], "0.png,.2,.3,a,a", "1.png,.2,.3,b,a", "0.png,.2,.3,b,a", "1.png,.2,.1,a,a"]
        ),
        "fractions",
    ),
    "an unknown image": (lambda t: broken(t, lambda s: [*s[:-1], "99.png,20,30,dark,a"]), "99.png, which is not there"),
    "outside of its image": (lambda t: broken(t, lambda s: [*s[:-1], "1.png,500,30,dark,a"]), "x=500, y=30 is outside"),
    "a color": (lambda t: ["--data", str(t / "cells.csv"), "--weights", "color"], "such file or name; is it colour?"),
    "one member": (lambda t: broken(t, lambda s: [*s[:-1], "1.png,50,30,burr,a"]), "class 'burr' has one cell"),
    "one class": (lambda t: broken(t, lambda s: [line.replace("dark", "bright") for line in s]), "not of two classes"),
    "one image": (lambda t: broken(t, lambda s: s[:9]), "all cells are of one image"),
    "unknown weights": (lambda t: ["--data", str(t / "cells.csv"), "--weights", "resnet5000"], "is it resnet50?"),
    "no checkpoint": (lambda t: ["--data", str(t / "cells.csv"), "--weights", str(t / "0.png")], "0.png"),
    "unknown protocol": (
        lambda t: ["--data", str(t / "cells.csv"), "--weights", "pixels", "--protocols", "knnn"],
        "knnn",
    ),
    "unknown option": (lambda t: ["--data", str(t / "cells.csv"), "--weights", "pixels", "--corp", "9"], "--corp"),
    "a size that patches do not divide": (
        lambda t: ["--data", str(t / "cells.csv"), "--weights", "random", "--size", "65"],
        "65",
    ),
    "an unknown label to drop": (
        lambda t: ["--data", str(t / "cells.csv"), "--weights", "pixels", "--drop-label", "x"],
        "bright",
    ),
    "out is a file": (
        lambda t: ["--data", str(t / "cells.csv"), "--weights", "pixels", "--out", str(t / "0.png")],
        "File exists",
    ),
    "a window without width": (
        lambda t: ["--data", str(t / "cells.csv"), "--weights", "pixels", "--window", "40", "0"],
        "--window takes LEVEL and WIDTH",
    ),
    "values without a window": (lambda t: slices(t) and ["--data", str(t / "slices.csv"), "--weights", "pixels"],
                                "--window LEVEL WIDTH"),
    "no such device": (
        lambda t: ["--data", str(t / "cells.csv"), "--weights", "pixels", "--device", "tpu"],
        "--device tpu",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_line(case, tmp_path, capsys):
    draw_cells(tmp_path, images=4)
    arguments, words = MISTAKES[case]
    out = [] if case == "out is a file" else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        ev.main(arguments(tmp_path) + out)
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.startswith("eval.py: error: ") and said.err.count("\n") == 1 and words in said.err
    assert said.out == ""  # nothing was done before


def test_command_line(tmp_path):
    data = draw_cells(tmp_path)
    command = [
        sys.executable,
        os.path.join(HERE, "eval.py"),
        "--data",
        data,
        "--weights",
        "pixels",
        "--protocols",
        "knn",
    ]
    done = subprocess.run([*command, "--crop", "24", "--out", tmp_path / "o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1-NN, one source left out" in done.stdout and "\033" not in done.stdout
    assert (tmp_path / "o" / "results.json").exists()


def test_chula_is_read():
    if not os.path.exists(CHULA):
        pytest.skip("Chula RBC-12 is not here (environment variable CHULA)")
    cells = ev.read_cells(os.path.join(CHULA, "cells.csv"), ["uncategorised"])
    assert (len(cells.label), len(cells.classes), len(cells.files)) == (18561, 12, 499)
    assert len(np.unique(cells.group)) == 481  # 18 files are there twice
