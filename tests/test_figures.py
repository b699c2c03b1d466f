"""figures.py: attention and colours against timm's and scikit-learn's; that all is drawn."""

import json

import numpy as np
import pytest
import torch
from corpus import picture
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from test_cells import draw_cells
from test_eval import small, timm_vit

import eval as ev

cl = ev
import figures
from reddino import build_vit, resize_pos_embed


@pytest.mark.parametrize("crop, grid", [(None, (60, 80)), (80, (24, 32)), (16, (60, 80)),
                                        (8000, (4, 5))])  # fmt: skip
def test_a_smear_is_shrunk_as_the_scored_cells_are(crop, grid):
    vit = build_vit("nano", img_size=32).eval()
    vit.size, vit.device = 32, torch.device("cpu")
    pictures = figures.smear(vit, picture(480, 640), crop)
    assert pictures["patch tokens, PCA as RGB"].shape == (*grid, 3)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_smears_attention_and_colours_are_timms(registers, tmp_path):
    model, state = timm_vit(registers)
    torch.save(state, tmp_path / "timm.pth")
    seen, attention = [], model.blocks[-1].attn
    attention.fused_attn = False  # so that the weights exist as such
    attention.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    image = picture(230, 300)  # 16 x 21 patches
    pictures = figures.smear(ev.load_backbone(str(tmp_path / "timm.pth"), device="cpu"), image)
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    x = cl.network_input(x, (224, 294), torch.device("cpu"))
    model.set_input_size((224, 294))  # timm resamples as DINOv2 does with registers only
    pos = state["pos_embed"]
    if pos.shape[1] != 257:
        pos = torch.cat([torch.zeros_like(pos[:, :1]), pos], 1)
    model.pos_embed.data = resize_pos_embed(pos, 16, 21, registers)[:, 1 if registers else 0 :]
    with torch.inference_mode():
        tokens = model.forward_features(x)[0, 1 + registers :].double().numpy()
    colours = pictures["patch tokens, PCA as RGB"]
    assert list(pictures)[:2] == ["image", "patch tokens, PCA as RGB"] and len(pictures) == 8
    for i, head, name in zip(range(1, 7), seen[0][:, 0, 1 + registers :], list(pictures)[2:]):
        share = f"{100 * head.min():.2f} to {100 * head.max():.2f}% a patch"
        assert name == f"attention of head {i}, {share}"
        np.testing.assert_allclose(pictures[name].ravel(), head, rtol=1e-3, atol=1e-7)
    components = PCA(3).fit_transform(tokens).reshape(16, 21, 3)
    for c in range(3):
        found = colours[..., c]
        inside = (found > 0) & (found < 1)
        assert abs(np.corrcoef(found[inside], components[..., c][inside])[0, 1]) > 0.9999
        assert inside.mean() > 0.97  # a hundredth at either end is cut off


def test_evals_figures(tmp_path):
    torch.save(small().state_dict(), tmp_path / "backbone.pth")
    said, folder = [], tmp_path / "f"
    ev.evaluate(draw_cells(tmp_path), {"a b": tmp_path / "backbone.pth"}, ["knn", "fewshot"], 24,
                figures=folder, log=said.append)  # fmt: skip
    sizes = {p.name: Image.open(p).size for p in folder.iterdir()}
    assert set(sizes) == {"few_shot.png", "confusion_a_b.png", "map_a_b.png", "smear_a_b.png"}
    assert all(min(size) > 300 for size in sizes.values())
    assert not any("not drawn" in s for s in said)


def test_neighbours_are_the_nearest_of_other_groups():
    torch.manual_seed(0)
    x, group = torch.randn(40, 6), np.arange(40) // 4
    found = figures.neighbours(x, 5, group, 8)
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x[5], dim=0)
    expected = [n for n in cosine.argsort(descending=True).tolist() if group[n] != 1]
    assert found.tolist() == expected[:8]


def test_demo_pictures(tmp_path):
    data = draw_cells(tmp_path, 4)
    torch.save(small().state_dict(), tmp_path / "trained.pth")
    steps = [{"step": s, "loss": 5 - s / 10} | ({"knn": 0.5, "knn1": 0.4} if s % 5 == 0 else {})
             for s in range(20)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
    said = []
    drawn = figures.demo_figures(
        tmp_path, data, tmp_path / "trained.pth", crop=24, device="cpu", log=said.append
    )
    assert [path.name for path in drawn] == ["neighbours.png", "tokens.png", "curves.png"]
    assert said == []


def test_frames_say_right_or_wrong_without_colour():
    figure = Figure()
    image = np.full((8, 8), 200, np.uint8)
    frames = {(0, 0): True, (0, 1): False}
    grid = figures.tiles(figure, [[image, image, None]], [["a", "b", ""]], frames)
    right, wrong, gap = (axes.spines["left"] for axes in grid[0])
    assert right.get_linewidth() > wrong.get_linewidth() and not gap.get_visible()
    assert right.get_linestyle() != wrong.get_linestyle()
    assert grid[0, 0].images[0].get_clim() == (0, 255)  # an even image is not stretched to black


@pytest.mark.parametrize("recipe", ["reddino", "ct", "none"])
def test_gallery_and_its_mistakes(recipe, tmp_path, capsys):
    Image.fromarray(picture(240, 300)).save(tmp_path / "smear.png")
    out = tmp_path / "gallery.png"
    options = ["--augment", recipe, "--seed", "1"]
    figures.main([str(tmp_path / "smear.png"), "-o", str(out), *options])
    assert min(Image.open(out).size) > 150
    for wrong in (["nothing.png"], [str(tmp_path / "smear.png"), "-o", str(tmp_path / "a.xyz")],
                  [str(tmp_path / "smear.png"), "--window", "40", "0"], ["--colour"]):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            figures.main(wrong + options)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1
        assert said.startswith("figures.py: error: ")
