"""eval.py's cells: every layout of tables and folders, crops, splits; what a user can get wrong."""

import os

import numpy as np
import pytest
import torch
from corpus import picture
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

import eval as ev
from augment import UserError

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHULA = os.environ.get("CHULA", os.path.join(HERE, "..", "shared", "data", "chula-rbc-12"))


def draw_cells(folder, images=8, size=(120, 160)):
    """Smears of eight cells each, bright or dark discs, of two sources; and a CSV: its path."""
    rng = np.random.default_rng(0)
    lines = ["image,x,y,label,source"]
    for i in range(images):
        image = np.full((*size, 3), 200 - 20 * (i % 2), np.uint8)
        for j in range(8):
            x, y, dark = 20 + 40 * (j % 4), 30 + 60 * (j // 4), rng.random() < 0.5
            yy, xx = np.ogrid[: size[0], : size[1]]
            inside = (yy - y) ** 2 + (xx - x) ** 2 < 100
            image[inside] = (90, 60, 90) if dark else (240, 150, 160)
            lines.append(f"{i}.png,{x},{y},{'dark' if dark else 'bright'},{'ab'[i % 2]}")
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "cells.csv").write_text("\n".join(lines) + "\n")
    return folder / "cells.csv"


def draw_images(folder, names, seed=0):
    """Small pictures, each different, under these names."""
    rng = np.random.default_rng(seed)
    for name in names:
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).save(folder / name)


def plain(n, groups=None, label=None, classes=("a", "b"), **more):
    """Cells without images."""
    label = np.arange(n) % 2 if label is None else label
    groups = np.arange(n) if groups is None else groups
    centre = np.full((n, 2), np.nan)
    return ev.Cells([], np.arange(n), centre, label, list(classes), groups, groups, **more)


# --------------------------------------------------------------------------------------------------
# Tables and folders.


@pytest.mark.parametrize("head, row", [
    ("image,label,xmin,xmax,ymin,ymax", "{i}.png,{l},{a},{b},{c},{d}"),  # as BCCD's
    ("image,label,x_min,y_min,x_max,y_max", "{i}.png,{l},{a},{c},{b},{d}"),
    ("image,label,x1,y1,x2,y2", "{i}.png,{l},{a},{c},{b},{d}"),  # as torchvision's
    ("image,label,y,x", "{i}.png,{l},{y},{x}"),
], ids=["extent", "corners", "numbers", "centre"])  # fmt: skip
def test_boxes_are_taken_as_their_centres(head, row, tmp_path):
    data = draw_cells(tmp_path, 4)
    expected = ev.read_cells(str(data))
    lines = [head]
    for i, (x, y), label in zip(expected.file, expected.centre, expected.label):
        a, b, c, d = int(x) - 10, int(x) + 10, int(y) - 15, int(y) + 15
        label = expected.classes[label]
        lines.append(row.format(i=i, l=label, a=a, b=b, c=c, d=d, x=int(x), y=int(y)))
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    said = []
    found = ev.read_cells(str(tmp_path / "boxes.csv"), log=said.append)
    np.testing.assert_array_equal(found.centre, expected.centre)
    assert found.label.tolist() == expected.label.tolist() and said == []


def test_columns_that_are_not_used_are_named_once(tmp_path):
    data = draw_cells(tmp_path, 4)
    lines = data.read_text().split()
    lines = [lines[0] + ",Area,notes", *(f"{line},3,blurred" for line in lines[1:])]
    data.write_text("\n".join(lines))
    said = []
    ev.evaluate(data, ["colour"], ["knn"], 24, log=said.append)
    assert len([s for s in said if "columns not used: area, notes" in s]) == 1


def test_one_row_is_one_feature(tmp_path):
    """An image that a table names twice has two entries, both its own."""
    draw_images(tmp_path, [f"{i}.png" for i in range(12)])
    rows = [f"{i}.png,{'ab'[i % 2]},p{i // 2},{'test' if i < 4 else 'train'}" for i in range(12)]
    (tmp_path / "once.csv").write_text("\n".join(["image,label,group,split", *rows]))
    again = ["3.png,a,p1,test", *rows, *rows[5:8]]
    (tmp_path / "twice.csv").write_text("\n".join(["image,label,group,split", *again]))
    backbone, features = ev.load_backbone("pixels", device="cpu"), {}
    once = ev.read_cells(str(tmp_path / "once.csv"))
    x = ev.embed("pixels", backbone, once, 80, ev.quiet)
    features = {os.path.basename(once.files[f]): row for f, row in zip(once.file, x)}
    twice = ev.read_cells(str(tmp_path / "twice.csv"))
    x = ev.embed("pixels", backbone, twice, 80, ev.quiet)
    assert len(x) == len(twice.label) == 16
    for f, row in zip(twice.file, x):
        assert torch.equal(row, features[os.path.basename(twice.files[f])])
    third = twice.file == twice.files.index(str(tmp_path / "3.png"))
    assert sorted(twice.classes[c] for c in twice.label[third]) == ["a", "b"]


def test_class_folders_with_and_without_a_split(tmp_path):
    names = [f"{part}/{c}/{i}.png" for part in ("Train", "valid", "test") for c in "ab"
             for i in range(3)]  # fmt: skip
    draw_images(tmp_path, names)
    draw_images(tmp_path, ["Train/.ipynb_checkpoints/0.png", ".Trash-1000/a/0.png"], 1)
    said = []
    cells = ev.read_cells(str(tmp_path), log=said.append)
    assert cells.classes == ["a", "b"] and len(cells.label) == 18
    for f, part in zip(cells.file, cells.split):
        assert ("Train" in cells.files[f]) == (part == "train")
        assert ("test" in os.path.relpath(cells.files[f], tmp_path)) == (part == "test")
    ((train, test),) = ev.make_splits(cells, 5, 0, ev.quiet)["the given split"]
    assert len(train) == len(test) == 6
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    cells = ev.read_cells(str(tmp_path), log=said.append)  # where there is no test, val is asked
    assert cells.classes == ["a", "b"] and sorted({*cells.split}) == ["test", "train"]
    assert "only Train, valid are used, 6 images are elsewhere" in said[0]
    linked = tmp_path / "linked"
    linked.mkdir()
    for c in "ab":
        os.symlink(tmp_path / "Train" / c, linked / c)  # as on clusters
    cells = ev.read_cells(str(linked))
    assert cells.classes == ["a", "b"] and len(cells.label) == 6


def test_what_class_folders_leave_out_is_said(tmp_path):
    draw_images(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(3)] + ["0.png", "1.png"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.heic").write_bytes(b"x")
    said = []
    cells = ev.read_cells(str(tmp_path), log=said.append)
    assert cells.classes == ["a", "b"] and len(cells.label) == 6
    assert "1 .heic" in said[0] and "only folders of classes are used, 2 images" in said[1]


def test_cells_that_a_given_split_leaves_out_are_said():
    """Classes are a, A (never learnt) and b; of 12 cells 2 are in no part."""
    label, split = np.arange(12) % 3, np.repeat(["train", "test", ""], [6, 4, 2])
    label[:6] %= 2
    label[:6] *= 2
    cells, said = plain(12, label=label, classes=("a", "A", "b"), split=split), []
    ((train, test),) = ev.make_splits(cells, 5, 0, said.append)["the given split"]
    assert (len(train), len(test)) == (6, 4)
    assert any("2 cells are neither" in s for s in said)
    (one,) = [s for s in said if "never both learnt and tested" in s]
    assert one.startswith("the given split: class 'A' is")


def test_a_file_that_names_no_patient_is_one_of_its_own(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm", download=False))
    values = header.pixel_array
    lines = ["image,label"]
    for i in range(12):
        header.PatientID = f"P{i // 4}" if i else ""
        header.PixelData = (values + i).tobytes()
        header.save_as(tmp_path / f"{i}.dcm")
        lines.append(f"{i}.dcm,{'ab'[i % 2]}")
    (tmp_path / "cells.csv").write_text("\n".join(lines))
    said = []
    cells = ev.read_cells(str(tmp_path / "cells.csv"), log=said.append)
    assert cells.by == "patient" and sorted(np.bincount(cells.group)) == [1, 3, 4, 4]
    assert "1 images name no patient" in said[0] and "0.dcm" in said[0]


@pytest.mark.parametrize(
    "train, test",
    [("Train", "Test"), ("training", "TESTING"), ("train", "val"), ("train", "validation")],
)
def test_split_is_understood_as_people_write_it(train, test, tmp_path):
    draw_images(tmp_path, [f"{i}.png" for i in range(8)])
    rows = [f"{i}.png,{'ab'[i % 2]},{train if i < 4 else test}" for i in range(8)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label,split", *rows]))
    cells = ev.read_cells(str(tmp_path / "t.csv"))
    assert cells.split.tolist() == ["train"] * 4 + ["test"] * 4


def test_what_spreadsheets_write(tmp_path):
    draw_images(tmp_path, [f"img/{i}.png" for i in range(8)])
    rows = [f"img\\{i}.png, {'ab'[i % 2]} " for i in range(8)]
    text = "\r\n".join(["Image,Label", *rows, ",", ""])
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8-sig"))
    cells = ev.read_cells(str(tmp_path / "t.csv"))
    assert cells.classes == ["a", "b"] and len(cells.label) == 8


def test_split_column_and_groups(tmp_path):
    draw_cells(tmp_path)
    lines = (tmp_path / "cells.csv").read_text().split()
    side = ["train", "train", "train", "test", "val", "train", "test", "test"]
    split = [lines[0] + ",split"] + [f"{line},{side[int(line[0])]}" for line in lines[1:]]
    (tmp_path / "split.csv").write_text("\n".join(split))
    said = []
    result = ev.evaluate(tmp_path / "split.csv", ["colour"], ["knn"], crop=24, log=said.append)
    rows = {(r["protocol"], r["split"]): r for r in result["rows"]}
    assert result["cells"] == 64 and rows["1-NN", "the given split"]["cells"] == 24
    cells = ev.read_cells(str(tmp_path / "split.csv"))
    for train, test in ev.make_splits(cells, 5, 0)["one source left out"]:
        assert (cells.split[train] == "train").all() and (cells.split[test] == "test").all()
        assert not set(cells.source[train]) & set(cells.source[test])

    grouped = [lines[0] + ",group"] + [f"{line},patient{int(line[0]) % 4}" for line in lines[1:]]
    (tmp_path / "grouped.csv").write_text("\n".join(grouped))
    cells = ev.read_cells(str(tmp_path / "grouped.csv"))
    splits = ev.make_splits(cells, 5, 0)
    assert list(splits) == ["4 folds by group", "one source left out"]
    assert len(splits["4 folds by group"]) == 4


def test_one_image_under_two_names_is_one_image(tmp_path):
    draw_cells(tmp_path, images=4)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    head, *lines = (tmp_path / "cells.csv").read_text().split()
    rows = [f"{line},{'train' if line[0] in '01' else 'test'}" for line in lines]
    table = [head + ",split", *rows, "copy.png,20,30,dark,a,test"]
    (tmp_path / "copied.csv").write_text("\n".join(table))
    cells, said = ev.read_cells(str(tmp_path / "copied.csv")), []
    assert cells.by == "image" and len(set(cells.group)) == 4 and len(cells.files) == 5
    train, _ = ev.make_splits(cells, 5, 0, said.append)["the given split"][0]
    assert set(cells.file[train]) == {1} and "8 cells are not trained on" in said[0]
    rows = [f"{line[:-2]},{line[0]}" for line in lines]
    table = [head.replace("source", "group"), *rows, "copy.png,20,30,dark,4"]  # another patient
    (tmp_path / "grouped.csv").write_text("\n".join(table))
    cells = ev.read_cells(str(tmp_path / "grouped.csv"))
    for train, test in ev.make_splits(cells, 5, 0, said.append)["5 folds by group"]:
        for part, other in ((train, test), (test, train)):
            assert not ({0, 4} & set(cells.file[part]) and {0, 4} & set(cells.file[other]))


def slices(folder, level=0, width=2000):
    """The smears of draw_cells as .npy of values in this window, int16, and their CSV: its path."""
    text = (folder / "cells.csv").read_text()
    for path in folder.glob("[0-9].png"):
        grey = np.asarray(Image.open(path))[..., 0].astype(float)
        values = np.rint(level + (grey / 255 - 0.5) * width)
        np.save(path.with_suffix(".npy"), values.astype(np.int16))
    (folder / "slices.csv").write_text(text.replace(".png", ".npy"))
    return folder / "slices.csv"


def test_slices_are_scored_through_their_window(tmp_path):
    """Values in a window are what the picture is that the window makes of them: crops, features."""
    draw_cells(tmp_path)
    table = slices(tmp_path)
    grey = ev.read_cells(str(tmp_path / "cells.csv"))
    cells = ev.read_cells(str(table), window=(0, 2000))
    for mine, theirs in zip(ev.crops_of(cells, 24, 224), ev.crops_of(grey, 24, 224)):
        assert (mine == mine[:, :1]).all()
        assert (mine[:, 0].int() - theirs[:, 0].int()).abs().max() <= 1
    results = ev.evaluate(table, ["pixels"], ["knn"], 24, tmp_path / "out", log=ev.quiet,
                          window=(0, 2000))  # fmt: skip
    assert results["window"] == (0, 2000) and results["rows"][0]["accuracy"] == 1
    with pytest.raises(UserError, match="all cells are of one image"):  # all is white there
        ev.read_cells(str(table), window=(-5000, 10))


def test_a_group_of_dicom_files_is_the_patient(tmp_path):
    """Without a column `group`: in class folders, and in tables that name files."""
    pydicom = pytest.importorskip("pydicom")
    slice_ = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    pixels, rows = slice_.pixel_array, ["image,label"]
    for i in range(8):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        slice_.PatientID = f"patient {i // 2 % 3}"
        slice_.PixelData = np.roll(pixels, i).tobytes()  # no two are the same image
        slice_.save_as(folder / f"{i}.dcm")
        rows.append(f"{folder.name}/{i}.dcm,{folder.name}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    for data in (tmp_path, tmp_path / "t.csv"):
        cells = ev.read_cells(str(data), window=(40, 400))
        number = [int(os.path.basename(cells.files[f])[0]) // 2 % 3 for f in cells.file]
        assert cells.by == "patient" and len({*zip(cells.group, number)}) == 3
        assert list(ev.make_splits(cells, 5, 0, ev.quiet)) == ["3 folds by patient"]


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


def test_a_large_crop_is_shrunk_before_it_takes_memory(tmp_path):
    """--crop 3000: 27 MB a cell, and 150 KB once it has the network's size; the same features."""
    image = picture(300, 400)
    Image.fromarray(image).save(tmp_path / "smear.png")
    centres = np.array([(200.0, 150.0)] * 3)
    crops = ev.cut(str(tmp_path / "smear.png"), centres, 3000, 224)
    assert crops.shape == (3, 3, 224, 224)
    whole = ev.cut(str(tmp_path / "smear.png"), centres, 200, 999)
    small = ev.cut(str(tmp_path / "smear.png"), centres, 200, 32)
    cpu = torch.device("cpu")
    found, expected = (ev.network_input(x, (32, 32), cpu) for x in (small, whole))
    assert torch.equal(found, expected)


def test_whole_image_keeps_its_shape(tmp_path):
    """A long cell must not become a round one, nor lose its ends."""
    image = np.full((10, 40, 3), 200, np.uint8)
    image[3:7, 5:35] = 50
    Image.fromarray(image).save(tmp_path / "long.png")
    crop = ev.cut(str(tmp_path / "long.png"), np.full((1, 2), np.nan), 80, 40)[0, 0].numpy()
    np.testing.assert_array_equal(crop[15:25], image[..., 0])
    assert (crop[:15] == 200).all() and (crop[25:] == 200).all()
    Image.fromarray(np.full((2, 60_000, 3), 7, np.uint8)).save(tmp_path / "scan.png")
    crop = ev.cut(str(tmp_path / "scan.png"), np.full((1, 2), np.nan), 80, 40)  # a square: 10 GB
    assert crop.shape == (1, 3, 40, 40) and (crop == 7).all()


def test_network_input_is_pillows_bicubic_of_bytes():
    image = picture(80, 80)
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    found = ev.network_input(x, (32, 32), torch.device("cpu"))[0]
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 2.5 / 255 / 0.22  # grey levels
    backbone = ev.load_backbone("pixels", device="cpu")
    for wrong in (x / 255, x[0], x[:, :1], [image / 255], x.int()):  # the first: ToTensor's
        with pytest.raises(UserError, match=r"uint8 \(0 to 255\)"):
            ev.extract_features(backbone, wrong)


# --------------------------------------------------------------------------------------------------
# Splits.


def test_folds_keep_groups_whole_and_classes_even():
    rng = np.random.default_rng(0)
    for seed in range(5):
        groups = rng.permutation(1000)[rng.integers(0, 80, 1500)]
        labels = rng.choice(6, 1500, p=[0.5, 0.2, 0.1, 0.1, 0.07, 0.03])
        labels = (labels + groups) % 6  # classes cluster in groups
        fold = ev.group_folds(groups, labels, 5, seed)
        assert set(fold) == {0, 1, 2, 3, 4}
        assert all(len(set(fold[groups == g])) == 1 for g in set(groups))
        reference = np.zeros(1500, int)
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for f, (_, test) in enumerate(folds.split(labels, labels, groups)):
            reference[test] = f

        def unevenness(fold, labels=labels):
            counts = [[(labels[fold == f] == c).sum() for c in range(6)] for f in range(5)]
            return np.abs(np.array(counts) / np.bincount(labels) - 0.2).mean()

        assert unevenness(fold) < 1.2 * unevenness(reference)
    assert set(ev.group_folds(np.array([7, 7, 9]), np.array([0, 1, 0]), 5)) == {0, 1}  # two groups


def test_a_class_in_one_group_is_said():
    cells, said = plain(40, np.arange(40) // 4, (np.arange(40) < 4).astype(int), by="group"), []
    ev.make_splits(cells, 5, 0, said.append)
    assert any("class 'b' is never both learnt and tested" in s for s in said)


def test_what_a_split_can_t_ask_is_said():
    """A class of one source, when that is left out; a fold to which nothing is left to learn."""
    source, label = np.arange(40) % 2, (np.arange(40) // 2) % 2
    label[:8:2] = 2
    cells, said = plain(40, label=label, classes="abc", source=source, sources=["A", "B"]), []
    ev.make_splits(cells, 5, 0, said.append)
    assert said == ["one source left out: class 'c' is never both learnt and tested"]
    group = np.arange(40) % 4
    source = (np.arange(40) == 39).astype(int)  # B's patient was at A, too
    cells, said = plain(40, group, source=source, sources=["A", "B"]), []
    splits = ev.make_splits(cells, 2, 0, said.append)
    assert any("39 cells are not tested: none is left to learn from" in s for s in said)
    ((train, test),) = splits["one source left out"]
    assert test.tolist() == [39] and set(group[train]) == {0, 1, 2}


def test_chula_is_read():
    if not os.path.exists(CHULA):
        pytest.skip("Chula RBC-12 is not here (environment variable CHULA)")
    cells = ev.read_cells(os.path.join(CHULA, "cells.csv"), ["uncategorised"])
    assert (len(cells.label), len(cells.classes), len(cells.files)) == (18561, 12, 499)
    assert len(np.unique(cells.group)) == 481  # 18 files are there twice


# --------------------------------------------------------------------------------------------------
# Mistakes: one line, exit code 2, before any work.


def edited(edit):
    """Arguments for a CSV whose lines were changed."""

    def arguments(folder):
        lines = edit((folder / "cells.csv").read_text().split("\n"))
        (folder / "bad.csv").write_text("\n".join(lines))
        return ["--data", folder / "bad.csv", "--weights", "pixels"]

    return arguments


def raw(data):
    def arguments(folder):
        (folder / "bad.csv").write_bytes(data)
        return ["--data", folder / "bad.csv", "--weights", "pixels"]

    return arguments


def given(*more, weights="pixels"):
    """Arguments for the good CSV; TMP in them is the test's folder."""

    def arguments(folder):
        options = [str(option).replace("TMP", str(folder)) for option in more]
        weight = weights.replace("TMP", str(folder))
        return ["--data", folder / "cells.csv", "--weights", weight, *options]

    return arguments


FEW = ["0.png,.2,.3,a,a", "1.png,.2,.3,b,a", "0.png,.2,.3,b,a", "1.png,.2,.1,a,a"]
BOX = "image,label,xmin,xmax,ymin,ymax"
MISTAKES = {
    "no such data": (lambda t: ["--data", t / "no", "--weights", "pixels"], "No such file"),
    "no classes": (lambda t: ["--data", t, "--weights", "pixels"], "0 cells, not of two classes"),
    "an empty file": (raw(b""), "It needs, between commas"),
    "a header alone": (raw(b"image,label\n"), "0 cells, not of two classes"),
    "UTF-16": (raw("image,label\na.png,b\n".encode("utf-16")), "as a CSV in UTF-8"),
    "a zero byte": (raw(b"image,label\n0\0.png,a\n1.png,b"), "png is not there"),
    "semicolons": (edited(lambda s: [line.replace(",", ";") for line in s]), "between commas"),
    "an unquoted comma": (edited(lambda s: [*s[:3], "1.png,20,30,sickle, old,a", *s[4:]]),
                          "line 4: more or fewer values"),
    "too few values": (edited(lambda s: [*s[:3], "1.png,20,30", *s[4:]]), "line 4: more or fewer"),
    "no label": (edited(lambda s: [s[0].replace("label", "class"), *s[1:]]), "once: image, label"),
    "two labels": (edited(lambda s: [s[0].replace("source", "Label"), *s[1:]]), "label, label. It"),
    "x without y": (edited(lambda s: [s[0].replace(",y,", ",z,"), *s[1:]]), "x, y (the centre"),
    "x, y of a corner": (edited(lambda s: ["image,label,x,y,w,h", "0.png,a,1,2,3,4"]),
                         "without width, height"),
    "two groups": (edited(lambda s: [s[0] + ",group,Group", *s[1:]]), "group, group. It"),
    "an open quote": (edited(lambda s: [*s[:3], '1.png,20,30,"dark,a', *s[4:]]), "quote too many"),
    "half a box": (edited(lambda s: [BOX[:-5], "0.png,a,1,2,3"]), "or xmin, xmax, ymin, ymax"),
    "a corner or a centre": (edited(lambda s: ["image,label,x,y,width,height", "0.png,a,1,2,3,4"]),
                             "without width, height"),
    "x is no number": (edited(lambda s: [s[0], "0.png,left,3,a,a", *s[2:]]), "2: x is 'left'"),
    "x is nan": (edited(lambda s: [s[0], "0.png,nan,30,a,a", *s[2:]]), "line 2: x is 'nan'"),
    "an empty label": (edited(lambda s: [s[0], "0.png,20,30,,a", *s[2:]]), "2: label is ''"),
    "fractions": (edited(lambda s: [s[0], *FEW]), "fractions"),
    "an unknown image": (edited(lambda s: [*s[:-1], "9.png,20,30,dark,a"]), "png is not there"),
    "outside": (edited(lambda s: [*s[:-1], "1.png,500,30,dark,a"]), "[500.0, 30.0] is outside"),
    "one member": (edited(lambda s: [*s[:-1], "1.png,50,30,burr,a"]), "'burr' has one cell"),
    "one class": (edited(lambda s: [line.replace("dark", "bright") for line in s]), "of two"),
    "one image": (edited(lambda s: s[:9]), "all cells are of one image"),
    "an unknown split": (edited(lambda s: [line.replace("source", "split") for line in s]),
                         "line 2: split is 'a'"),
    "no study": (given("--protocols", "study"), "column `group` has to say"),
    "two labels of a study": (edited(lambda s: [
        s[0].replace("source", "group") + ",study_label", *[f"{r[:-1]}g{r[0]},{i}"
        for i, r in enumerate(s[1:]) if r]]), "study_label has two values in one group"),
    "an escape": (edited(lambda s: [line.replace("dark", "\x1b[31m") for line in s[:9]]),
                  "all cells are of one image"),
    "a color": (given(weights="color"), "color: no such file, nor one of"),
    "an escape in a name": (given(weights="\x1b[31mred\x07"), r"\x1b[31mred\x07: no such file"),
    "unknown weights": (given(weights="resnet5000"), "nor one of torchvision's, pixels, colour"),
    "no checkpoint": (given(weights="TMP/0.png"), "0.png"),
    "unknown protocol": (given("--protocols", "knnn"), "knnn"),
    "unknown tuning": (given("--finetune", "loras"), "loras: choose from full"),
    "unknown features": (given("--features", "patch"), "patch: choose from cls, cls+mean"),
    "unknown option": (given("--corp", "9"), "--corp"),
    "a size": (given("--size", "65", weights="random"), "65"),
    "a seed": (given("--seed", "-1"), "--seed -1: must lie between"),
    "a crop": (given("--crop", "40000"), "--crop 40000: must lie between 2 and 4096"),
    "a tuning as a protocol": (given("--protocols", "full"), "full: choose from fewshot, knn"),
    "an unknown label to drop": (given("--drop-label", "x"), "bright"),
    "out is a file": (given("--out", "TMP/0.png"), "File exists"),
    "a window without width": (given("--window", "40", "0"), "--window takes LEVEL and WIDTH"),
    "no window": (lambda t: ["--data", slices(t), "--weights", "pixels"], "--window LEVEL WIDTH"),
    "no such device": (given("--device", "tpu"), "--device tpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_line(case, tmp_path, capsys):
    draw_cells(tmp_path, images=4)
    arguments, words = MISTAKES[case]
    out = [] if case == "out is a file" else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        ev.main([str(argument) for argument in arguments(tmp_path)] + out)
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.startswith("eval.py: error: ") and said.err.count("\n") == 1
    assert words in said.err and "\x1b" not in said.err + said.out
    assert "features of" not in said.out  # nothing was done before


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(ev, "crops_of", interrupted)
    data = str(draw_cells(tmp_path))
    with pytest.raises(SystemExit) as end:
        ev.main(["--data", data, "--weights", "pixels", "--out", str(tmp_path / "out")])
    assert end.value.code == 130 and capsys.readouterr().err == "eval.py: interrupted\n"
