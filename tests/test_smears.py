"""smears.py: reproducible drawings, true labels, and classes that colour gives no hint of."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import reddino
import smears

IMAGES = 50  # two to three patients of each source


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Folder and table of 50 smears, drawn once for all tests."""
    out = tmp_path_factory.mktemp("drawn") / "data"
    table = smears.draw(out, images=IMAGES, seed=0)
    with open(table, newline="") as file:
        return out, list(csv.DictReader(file))


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def run(*args):
    script = Path(smears.__file__)
    return subprocess.run(
        [sys.executable, str(script), *map(str, args)], capture_output=True, text=True
    )


# --------------------------------------------------------------------------- the random streams


def test_same_seed_gives_the_same_files_whatever_the_count(drawn, tmp_path):
    out, rows = drawn
    table = smears.draw(tmp_path / "few", images=3, seed=0)
    for k in range(3):
        name = f"smears/{k:04d}.jpg"
        assert (tmp_path / "few" / name).read_bytes() == (out / name).read_bytes()
    with open(table, newline="") as file:
        few = list(csv.DictReader(file))
    assert few == rows[: len(few)] and rows[len(few)]["image"] == "smears/0003.jpg"


def test_a_finished_drawing_is_not_drawn_again(drawn, monkeypatch):
    out, _ = drawn
    before = (out / "cells.csv").read_bytes()
    monkeypatch.setattr(smears, "smear", None)  # drawing would fail
    assert smears.draw(out, images=IMAGES, seed=0) == out / "cells.csv"
    assert (out / "cells.csv").read_bytes() == before
    assert {path.name for path in out.iterdir()} == {"smears", "cells.csv", "drawn.txt"}
    (out / "cells.csv").rename(out / "aside")  # broken off before the table
    with pytest.raises(TypeError):
        smears.draw(out, images=IMAGES, seed=0)
    (out / "aside").rename(out / "cells.csv")


def test_an_image_depends_on_seed_and_number_alone():
    pixels, cells, *_ = smears.smear(0, 7)
    smears.smear(0, 8)  # draws in between leave no trace: there is no shared stream
    again, same_cells, *_ = smears.smear(0, 7)
    assert (pixels == again).all() and cells == same_cells
    for seed, k in ((1, 7), (0, 12)):  # 12: the same source, another image
        other, other_cells, *_ = smears.smear(seed, k)
        assert other_cells != cells and (other != pixels).mean() > 0.5


def test_images_of_a_patient_share_source_and_stain(drawn):
    sources, images = defaultdict(set), defaultdict(set)
    for row in drawn[1]:
        sources[row["group"]].add(row["source"])
        images[row["group"]].add(row["image"])
    assert all(len(names) == 1 for names in sources.values())
    assert max(map(len, images.values())) == smears.PER_PATIENT
    assert sum(map(len, images.values())) == IMAGES  # no image belongs to two patients
    assert len(set.union(*sources.values())) == len(smears.SOURCES) >= 4


# ----------------------------------------------------------------------------------- the labels


def test_csv_has_the_agreed_columns_and_all_centres_lie_inside(drawn):
    out, rows = drawn
    assert list(rows[0]) == ["image", "x", "y", "label", "group", "source"]
    assert {row["image"] for row in rows} == {
        path.relative_to(out).as_posix() for path in (out / "smears").iterdir()
    }
    for row in rows:
        assert 40 <= float(row["x"]) <= 640 - 40 and 40 <= float(row["y"]) <= 480 - 40
    assert read(out / rows[0]["image"]).shape == (480, 640, 3)


def test_every_class_is_there_in_the_same_proportions_everywhere(drawn):
    counts = Counter((row["source"], row["label"]) for row in drawn[1])
    names = [source.name for source in smears.SOURCES]
    table = np.array([[counts[source, label] for label in smears.CLASSES] for source in names])
    assert len(smears.CLASSES) >= 8 and (table.sum(0) >= 20).all() and (table > 0).all()
    expected = table.sum(1, keepdims=True) * [share for _, share, _ in smears.CLASSES.values()]
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert chi2 < 80.1  # 5 x 9 degrees of freedom: 99.9% of fair draws lie below
    assert table[:, 0].sum() == table.sum(0).max()  # "normal" leads


def test_labels_lie_on_their_cells(drawn):
    """A cell's centre is darker than the empty background near by, whatever the class."""
    out, rows = drawn
    images, darker = {}, defaultdict(list)
    for row in rows:
        if row["image"] not in images:
            # green: where eosin absorbs
            images[row["image"]] = read(out / row["image"])[..., 1].astype(float)
        image, x, y = images[row["image"]], round(float(row["x"])), round(float(row["y"]))
        around = image[max(0, y - 60) : y + 61, max(0, x - 60) : x + 61]
        darker[row["label"]].append(
            image[y - 1 : y + 2, x - 1 : x + 2].mean() < 0.93 * np.percentile(around, 90)
        )
    for label, hits in darker.items():
        assert np.mean(hits) > 0.97, (label, np.mean(hits))
    # and the measure can fail: random places are background as often as not
    rng = np.random.default_rng(0)
    image = images[rows[0]["image"]]
    at = rng.uniform((60, 60), (420, 580), (500, 2)).astype(int)
    hits = [
        image[y, x] < 0.93 * np.percentile(image[y - 60 : y + 61, x - 60 : x + 61], 90)
        for y, x in at
    ]
    assert np.mean(hits) < 0.7


@pytest.mark.parametrize("name", smears.CLASSES)
def test_shapes_hold_their_centre_and_stay_within_their_reach(name):
    shape, _, reach = smears.CLASSES[name]
    axis = np.linspace(-3, 3, 121, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    r = np.hypot(u, v)
    for seed in range(100):
        inside, haemoglobin, azure = shape(u, v, np.random.default_rng(seed))
        # labels are up to 3.5 px = 0.16 radii off along each axis
        assert (inside[r < 0.2] > 0).all()
        # nothing is cut by the window of `stamp`
        assert (inside[np.maximum(abs(u), abs(v)) > reach] < 0.05).all()
        cell = inside > 0
        assert 0.3 < cell.sum() * 0.05**2 < 4.5  # area in radii squared; a disc has 3.1
        assert haemoglobin[cell].min() > 0.1 and haemoglobin[cell].max() < 1.3
        assert (azure[cell].max() > 0.4) == (name == "ring")


# ----------------------------------------------------------- what must not give the class away


def held_out_f1(features, rows):
    """Weighted F1 on some patients of 20 nearest neighbours among the others' cells, and of always
    "normal"."""
    labels, groups = (np.array([row[key] for row in rows]) for key in ("label", "group"))
    test = np.isin(groups, sorted(set(groups))[::3])
    knn = KNeighborsClassifier(20, metric="cosine").fit(features[~test], labels[~test])
    always = np.full(test.sum(), "normal")
    return (
        f1_score(labels[test], knn.predict(features[test]), average="weighted"),
        f1_score(labels[test], always, average="weighted", zero_division=0),
    )


def test_neither_colour_nor_small_pixels_tell_the_class(drawn):
    out, rows = drawn
    colours, pixels, path = [], [], None
    for row in rows:
        if row["image"] != path:
            path, image = row["image"], read(out / row["image"])
        x, y = round(float(row["x"])), round(float(row["y"]))
        crop = image[y - 40 : y + 40, x - 40 : x + 40]
        colours.append(
            np.concatenate([np.histogram(crop[..., c], 32, (0, 256))[0] for c in range(3)])
        )
        pixels.append(
            np.asarray(Image.fromarray(crop).resize((16, 16), Image.Resampling.BOX), float).ravel()
        )
    colour, always = held_out_f1(np.array(colours), rows)
    assert colour < always + 0.1  # measured on 200 images: 0.29 against 0.28
    assert held_out_f1(np.array(pixels), rows)[0] < 0.55  # measured: 0.41


# ------------------------------------------------------------------------------------ CT slices


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Folder and table of 240 slices: two patients for each scanner and disease."""
    out = tmp_path_factory.mktemp("drawn") / "slices"
    with open(smears.draw(out, images=240, seed=0, slices=True), newline="") as file:
        return out, list(csv.DictReader(file))


def test_slices_are_reproducible_values(slices, tmp_path):
    out, rows = slices
    smears.draw(tmp_path / "few", images=2, seed=0, slices=True)
    for k in range(2):
        name = f"slices/{k:04d}.npy"
        assert (tmp_path / "few" / name).read_bytes() == (out / name).read_bytes()
    with open(tmp_path / "few" / "cells.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows[:4]
    assert (smears.ct(1, 0)[0] != smears.ct(0, 0)[0]).mean() > 0.5
    assert {path.relative_to(out).as_posix() for path in (out / "slices").iterdir()} == {
        row["image"] for row in rows
    }
    for k in (0, 100, 200):
        hu = np.load(out / f"slices/{k:04d}.npy")
        assert hu.dtype == np.int16 and hu.shape == (512, 512)
        assert hu.min() >= -1024 and 350 < hu.max() <= 3071
        assert abs(np.median(hu[:40]) + 1000) < 15  # air around the patient
        lung = np.median(hu[200:300, 110:170])
        assert -900 < lung < -800
    with pytest.raises(FileExistsError, match="something else than 240 smears"):
        smears.draw(out, images=240, seed=0)


def test_every_aorta_is_labelled_and_nothing_but_itself_tells_its_class(slices):
    _, rows = slices
    assert list(rows[0]) == ["image", "x", "y", "label", "group", "source", "study_label"]
    assert Counter(Counter(row["image"] for row in rows).values()) == {2: 240}
    assert max(Counter(row["group"] for row in rows).values()) == 2 * smears.PER_STUDY
    assert all(40 <= float(row[axis]) <= 512 - 40 for row in rows for axis in "xy")
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == set(smears.AORTAS)
    assert counts["normal"] > 240 and min(counts.values()) >= 20
    groups = {label: {row["group"] for row in rows if row["label"] == label} for label in counts}
    assert all(len(groups[label]) == 6 for label in counts if label != "normal")
    assert len(groups["normal"]) > 20
    assert {(row["source"], row["label"]) for row in rows} == {
        (s, c) for s in smears.SCANNERS for c in smears.AORTAS
    }
    for group in {row["group"] for row in rows}:  # one patient, one scanner, at most one disease
        of = [row for row in rows if row["group"] == group]
        assert len({row["source"] for row in of}) == 1
        assert len({row["label"] for row in of} - {"normal"}) <= 1


def cross_section(kind, seed, blood=300):
    """An aorta alone in water, 0.7 mm a pixel, without noise: HU."""
    x = ((np.arange(200, dtype=np.float32) - 100) * smears.MM)[None]
    hu = np.zeros((200, 200), np.float32)
    smears.aorta(hu, x, x.T, 0, 0, kind, blood, np.random.default_rng(seed))
    return hu


@pytest.mark.parametrize("kind", smears.AORTAS)
def test_what_makes_each_class(kind):
    """In square millimetres and HU, by counting pixels: classes do not touch each other."""
    for seed in range(60):
        hu = cross_section(kind, seed)
        # with wall and bed of fat
        outer = np.ptp(np.argwhere(np.abs(hu) > 20), axis=0).max() * smears.MM / 2
        blood, plaque = (hu > 150).sum() * smears.MM**2, (hu > 500).sum() * smears.MM**2
        assert (plaque > 3) == (kind == "calcified")
        radius = np.sqrt(blood / np.pi)
        if kind == "normal":
            assert 9 < radius < 17.5 and abs(blood - np.pi * (outer - 4) ** 2) < 0.3 * blood
        if kind == "aneurysm":
            assert 18.5 < radius < 29.5
        if kind == "thrombus":  # the wall is wide, the channel is not
            assert radius < 0.75 * (outer - 4) and 45 < np.median(hu[(hu > 30) & (hu < 60)]) <= 50
        if kind == "dissection":  # the flap cuts the blood in two
            line = (hu > 30) & (hu < 110)
            inside = np.hypot(*(np.indices(hu.shape) - 100)) * smears.MM < 0.8 * (outer - 5)
            assert (line & inside).sum() * smears.MM > 8


def test_mean_brightness_does_not_tell_aortas_apart(slices):
    out, rows = slices
    crops = []
    for row in rows:
        x, y = round(float(row["x"])), round(float(row["y"]))
        hu = np.load(out / row["image"], mmap_mode="r")
        crops.append(hu[y - 40 : y + 40, x - 40 : x + 40].astype(float))
    labels, groups = (np.array([row[key] for row in rows]) for key in ("label", "group"))
    test = np.isin(groups, sorted(set(groups))[::3])
    means = np.array(crops).mean((1, 2))[:, None]
    guess = KNeighborsClassifier(20).fit(means[~test], labels[~test]).predict(means[test])
    always = f1_score(
        labels[test], np.full(test.sum(), "normal"), average="weighted", zero_division=0
    )
    assert f1_score(labels[test], guess, average="weighted") < always + 0.1


def of_studies(rows):
    """{patient: (disease or "normal", study_label, bool [slices]: which show it)}"""
    studies = {}
    for group in sorted({row["group"] for row in rows}):
        of = [row for row in rows if row["group"] == group]
        (length,) = {row["study_label"] for row in of}  # one a patient
        names = sorted({row["image"] for row in of})
        ill = {row["image"]: row["label"] for row in of if row["label"] != "normal"}
        disease = next(iter(ill.values()), "normal")
        studies[group] = disease, length, np.array([name in ill for name in names])
    return studies


def longest(shown):
    """The most slices on end: the longest word of a text."""
    return max(map(len, "".join("x" if s else " " for s in shown).split()), default=0)


def test_study_label_is_what_the_order_of_slices_tells_and_nothing_else(slices):
    """Long: five slices on end. Short: five as well, in two pieces; or a healthy patient."""
    studies = of_studies(slices[1])
    assert longest(np.array([1, 1, 0, 1, 1, 1])) == 3 and longest(np.zeros(8)) == 0
    for disease, length, shown in studies.values():
        assert len(shown) == smears.PER_STUDY and shown.sum() == 5 * (disease != "normal")
        assert (length == "long") == (longest(shown) == 5)
        assert length in ("long", "short")
        pieces = "".join("x" if s else " " for s in shown).split()
        assert len(pieces) == (0 if disease == "normal" else 1 if length == "long" else 2)
    # nor can scanner, disease or the number of diseased aortas: each has as many of both
    kinds = [(disease, length) for disease, length, _ in studies.values()]
    counts = Counter(kind for kind in kinds if kind[0] != "normal")
    assert set(counts.values()) == {3} and len(counts) == 8
    sources = {row["group"]: row["source"] for row in slices[1]}
    both = Counter((sources[group], *studies[group][:2]) for group in studies)
    assert all(n == 1 for (_, disease, _), n in both.items() if disease != "normal")
    assert len(both) == 3 * 8 + 3


def test_the_length_of_an_aneurysm_measured_in_the_pixels(slices):
    """study_label against diameters: the blood around each centre, by connected components."""
    out, rows = slices
    studies, wide = of_studies(rows), defaultdict(list)
    for row in rows:
        if studies[row["group"]][0] != "aneurysm":
            continue
        x, y = round(float(row["x"])), round(float(row["y"]))
        hu = np.load(out / row["image"])[y - 50 : y + 50, x - 50 : x + 50]
        middle = np.median(hu[45:55, 45:55])
        blood = cv2.GaussianBlur(hu.astype(np.float32), (0, 0), 1) > (middle + 45) / 2
        _, parts = cv2.connectedComponents(blood.astype(np.uint8), connectivity=4)
        area = (parts == parts[50, 50]).sum() * smears.MM**2
        wide[row["group"], row["image"]].append(np.sqrt(area / np.pi) > 18)
    found = defaultdict(list)
    for (group, _), of_slice in sorted(wide.items()):
        found[group].append(any(of_slice))  # of its two aortas
    assert len(found) == 6
    for group, shown in found.items():
        assert ("long" if longest(shown) == 5 else "short") == studies[group][1], (group, shown)
    assert {studies[group][1] for group in found} == {"long", "short"}


def test_mean_and_maximum_of_slices_do_not_tell_the_length_places_do(slices):
    """With slices' labels as perfect features, of the diseased: pooled they are all alike; weighted
    by place, a sum tells all."""
    ill = [of for of in of_studies(slices[1]).values() if of[0] != "normal"]
    shown, long = np.array([of[2] for of in ill], float), np.array([of[1] == "long" for of in ill])
    for pooled in (shown.mean(1), shown.max(1)):
        assert roc_auc_score(long, pooled) == 0.5
    place = np.abs(np.arange(8) - 3.5)
    assert roc_auc_score(long, -shown @ place) == 1


# ----------------------------------------------------------------------------- the command line


def test_command_line_draws_and_draws_again_but_never_over_other_files(tmp_path):
    out = tmp_path / "smears here"
    first = run(out, "--images", 1, "--seed", 5)
    assert first.returncode == 0 and Path(first.stdout.strip()) == out / "cells.csv"
    before = (out / "cells.csv").read_text()
    (out / "cells.csv").unlink()  # as if the first run had been stopped
    assert run(out, "--images", 1, "--seed", 5).returncode == 0
    assert (out / "cells.csv").read_text() == before
    assert run(tmp_path / "ct", "--images", 1, "--slices").returncode == 0
    assert np.load(tmp_path / "ct" / "slices" / "0000.npy").dtype == np.int16
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"dear")
    for args in (
        (out, "--images", 2, "--seed", 5),
        (out, "--images", 1, "--seed", 6),
        (other,),
        (other / "holiday.jpg",),
        (tmp_path / "new", "--images", 0),
        (tmp_path / "new", "--seed", -1),
    ):
        answer = run(*args)
        assert answer.returncode == 2 and not answer.stdout
        assert answer.stderr.startswith("smears.py: error: ")
        assert answer.stderr.count("\n") == 1
    assert (out / "cells.csv").read_text() == before
    assert [path.name for path in other.iterdir()] == ["holiday.jpg"]
    assert not (tmp_path / "new").exists()


def test_the_demo_from_end_to_end(tmp_path, monkeypatch, capsys):
    draw = smears.draw
    monkeypatch.setattr(smears, "draw", lambda out, images, seed: draw(out, images // 12, seed))
    monkeypatch.setattr("eval.L2", (0.1,))  # the fastest probe
    table = str(tmp_path / "unseen" / "cells.csv")
    few = ["--iters", "3", "--batch-size", "4", "--prototypes", "16", "--workers", "0"]
    reddino.main(["--out", str(tmp_path), "--eval-data", table, *few])
    said, steps = capsys.readouterr().out, (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "nano on" in said and "20-NN, one source left out" in said
    assert 0 < json.loads(steps[2])["knn"] < 1 and "knn" not in steps[1]
    pictures = said.splitlines()[-1].removeprefix("pictures: ").split()
    assert len(pictures) == 3 and all(os.path.getsize(picture) for picture in pictures)
