"""smears.py: reproducible drawings, true labels, and classes that colour gives no hint of."""
import csv
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

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
    return subprocess.run([sys.executable, str(script), *map(str, args)], capture_output=True, text=True)


# ------------------------------------------------------------------------------------------- the random streams

def test_same_seed_gives_the_same_files_whatever_the_count(drawn, tmp_path):
    out, rows = drawn
    table = smears.draw(tmp_path / "few", images=3, seed=0)
    for k in range(3):
        name = f"smears/{k:04d}.jpg"
        assert (tmp_path / "few" / name).read_bytes() == (out / name).read_bytes()
    with open(table, newline="") as file:
        few = list(csv.DictReader(file))
    assert few == rows[:len(few)] and rows[len(few)]["image"] == "smears/0003.jpg"


def test_a_finished_drawing_is_not_drawn_again(drawn, monkeypatch):
    out, _ = drawn
    before = (out / "cells.csv").read_bytes()
    monkeypatch.setattr(smears, "smear", None)  # drawing would fail
    assert smears.draw(out, images=IMAGES, seed=0) == out / "cells.csv" and (out / "cells.csv").read_bytes() == before
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


# ------------------------------------------------------------------------------------------------- the labels

def test_csv_has_the_agreed_columns_and_all_centres_lie_inside(drawn):
    out, rows = drawn
    assert list(rows[0]) == ["image", "x", "y", "label", "group", "source"]
    assert {row["image"] for row in rows} == {path.relative_to(out).as_posix() for path in (out / "smears").iterdir()}
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
    """Light through a cell's centre is weaker than through the empty background near by, whatever the class."""
    out, rows = drawn
    images, darker = {}, defaultdict(list)
    for row in rows:
        if row["image"] not in images:
            images[row["image"]] = read(out / row["image"])[..., 1].astype(float)  # green: where eosin absorbs
        image, x, y = images[row["image"]], round(float(row["x"])), round(float(row["y"]))
        around = image[max(0, y - 60):y + 61, max(0, x - 60):x + 61]
        darker[row["label"]].append(image[y - 1:y + 2, x - 1:x + 2].mean() < 0.93 * np.percentile(around, 90))
    for label, hits in darker.items():
        assert np.mean(hits) > 0.97, (label, np.mean(hits))
    rng = np.random.default_rng(0)  # and the measure can fail: random places are background as often as not
    image = images[rows[0]["image"]]
    at = rng.uniform((60, 60), (420, 580), (500, 2)).astype(int)
    assert np.mean([image[y, x] < 0.93 * np.percentile(image[y - 60:y + 61, x - 60:x + 61], 90) for y, x in at]) < 0.7


@pytest.mark.parametrize("name", smears.CLASSES)
def test_shapes_hold_their_centre_and_stay_within_their_reach(name):
    shape, _, reach = smears.CLASSES[name]
    axis = np.linspace(-3, 3, 121, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    r = np.hypot(u, v)
    for seed in range(100):
        inside, haemoglobin, azure = shape(u, v, np.random.default_rng(seed))
        assert (inside[r < 0.2] > 0).all()  # labels are up to 3.5 px = 0.16 radii off along each axis
        assert (inside[np.maximum(abs(u), abs(v)) > reach] < 0.05).all()  # nothing is cut by the window of `stamp`
        cell = inside > 0
        assert 0.3 < cell.sum() * 0.05 ** 2 < 4.5  # area in radii squared; a disc has 3.1
        assert haemoglobin[cell].min() > 0.1 and haemoglobin[cell].max() < 1.3
        assert (azure[cell].max() > 0.4) == (name == "ring")


# --------------------------------------------------------------------------- what must not give the class away

def held_out_f1(features, rows):
    """20 nearest neighbours, fitted on some patients, scored on others: weighted F1, and that of always "normal"."""
    labels, groups = (np.array([row[key] for row in rows]) for key in ("label", "group"))
    test = np.isin(groups, sorted(set(groups))[::3])
    knn = KNeighborsClassifier(20, metric="cosine").fit(features[~test], labels[~test])
    always = np.full(test.sum(), "normal")
    return (f1_score(labels[test], knn.predict(features[test]), average="weighted"),
            f1_score(labels[test], always, average="weighted", zero_division=0))


def test_neither_colour_nor_small_pixels_tell_the_class(drawn):
    out, rows = drawn
    colours, pixels, path = [], [], None
    for row in rows:
        if row["image"] != path:
            path, image = row["image"], read(out / row["image"])
        x, y = round(float(row["x"])), round(float(row["y"]))
        crop = image[y - 40:y + 40, x - 40:x + 40]
        colours.append(np.concatenate([np.histogram(crop[..., c], 32, (0, 256))[0] for c in range(3)]))
        pixels.append(np.asarray(Image.fromarray(crop).resize((16, 16), Image.Resampling.BOX), float).ravel())
    colour, always = held_out_f1(np.array(colours), rows)
    assert colour < always + 0.1  # measured on 200 images: 0.29 against 0.28
    assert held_out_f1(np.array(pixels), rows)[0] < 0.55  # measured: 0.41


# --------------------------------------------------------------------------------------------- the command line

def test_command_line_draws_and_draws_again_but_never_over_other_files(tmp_path):
    out = tmp_path / "smears here"
    first = run(out, "--images", 1, "--seed", 5)
    assert first.returncode == 0 and Path(first.stdout.strip()) == out / "cells.csv"
    before = (out / "cells.csv").read_text()
    (out / "cells.csv").unlink()  # as if the first run had been stopped
    assert run(out, "--images", 1, "--seed", 5).returncode == 0
    assert (out / "cells.csv").read_text() == before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"dear")
    for args in ((out, "--images", 2, "--seed", 5), (out, "--images", 1, "--seed", 6), (other,),
                 (other / "holiday.jpg",), (tmp_path / "new", "--images", 0), (tmp_path / "new", "--seed", -1)):
        answer = run(*args)
        assert answer.returncode == 2 and answer.stderr.startswith("smears.py: error: ") and not answer.stdout
        assert answer.stderr.count("\n") == 1
    assert (out / "cells.csv").read_text() == before and [p.name for p in other.iterdir()] == ["holiday.jpg"]
    assert not (tmp_path / "new").exists()
