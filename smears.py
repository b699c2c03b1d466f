"""Thin blood smears, drawn: data that anyone has, with labels that are certain.

    python smears.py OUT             200 images in OUT/smears, their cells in cells.csv
    python smears.py OUT --slices    CT slices instead, in OUT/slices; their aortas

The drawing goes the way the light goes:
    1. a cell is a shape (signed distance to its outline) and a thickness: one function a class;
    2. stain turns thickness into optical density; densities on top of each other add up;
    3. intensity = background * exp(-density)  (Beer-Lambert); optics, sensor and JPEG spoil it.
Shape and thickness tell the classes apart, not colour: each laboratory ("source") has all. Weighted
F1 on unseen patients: always "normal" 0.28, colours 0.29, 16x16 pixels 0.41 (20-NN), a CNN 0.98.
"""
import argparse
import csv
import os
from collections import namedtuple
from math import cos, pi, sin, sqrt
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT = SIZE = 640, 480  # as Chula RBC-12
RADIUS = 22.0  # of a normal cell, pixels: 40-50 wide as in Chula RBC-12 (7.5 micrometres at 1000x)
MARGIN = 40  # a cell nearer to the border is not labelled: its 80-pixel crop would be cut
PER_PATIENT = 4  # images of one patient (column `group`): same slide, same stain; never split them

# ----------------------------------------------------------------------------------- 1. the cells
# Each takes u, v [h, w], in radii of a normal cell from the cell's centre, and a random stream, and
# returns (inside, haemoglobin, azure), each [h, w]: `inside` is positive in the cell and 0 on its
# outline (only its zero and its slope count), the others are how much of each dye lies there.
# Stains are two dyes: eosin (pink) binds haemoglobin, azure (violet) nucleic acids. Numbers come
# from ranges, so classes have borderline cells. Python floats keep arrays float32, numpy's do not.

def pallor(q, depth):
    """Relative thickness of a dimpled disc: 1 - depth in the middle, 1 outside its edge, q = 1."""
    return 1 - depth * np.exp(-np.square(np.square(q)))

def union(a, b, soft=0.08):
    """Two shapes melted into one: a maximum without the crease."""
    return soft * np.logaddexp(a / soft, b / soft)

def normal(u, v, rng):
    """Discocyte: a biconcave disc, thin and pale in its middle third, never quite central."""
    r = np.hypot(u, v) / rng.uniform(0.88, 1.1)
    q = np.hypot(u - rng.normal(0, 0.06), v - rng.normal(0, 0.06)) / rng.uniform(0.28, 0.5)
    return 1 - r, pallor(q, rng.uniform(0.35, 0.75)), 0 * r

def spherocyte(u, v, rng):
    """Lost membrane, kept haemoglobin (spherocytosis, immune haemolysis): a ball, no pallor."""
    r = np.hypot(u, v) / rng.uniform(0.72, 0.92)
    return 1 - r, 0.95 + 0.25 * np.sqrt(np.maximum(1 - r * r, 0)), 0 * r

def target(u, v, rng):
    """Codocyte: too much membrane (thalassaemia, liver disease) folds up into a bull's-eye."""
    r = np.hypot(u, v) / rng.uniform(0.9, 1.12)
    ring, width = rng.uniform(0.42, 0.55), rng.uniform(0.13, 0.18)
    return 1 - r, 1 - rng.uniform(0.4, 0.7) * np.exp(-np.square((r - ring) / width)), 0 * r

def elliptocyte(u, v, rng):
    """A skeleton that capillaries have stretched for good (elliptocytosis): an ellipse or a rod."""
    ratio, size = rng.uniform(1.45, 2.3), rng.uniform(0.85, 1.05)
    q = np.hypot(u / sqrt(ratio), v * sqrt(ratio)) / size
    return 1 - q, pallor(q / rng.uniform(0.3, 0.5), rng.uniform(0.0, 0.6)), 0 * q

def teardrop(u, v, rng):
    """Dacrocyte: squeezed out of a scarred marrow (myelofibrosis), it keeps a drawn-out tail."""
    u, v = u + 0.25, v + rng.uniform(-0.15, 0.15) * u * u
    size, tip = rng.uniform(0.7, 0.88), rng.uniform(1.45, 2.1)
    tail = size * rng.uniform(0.6, 0.9) * np.maximum(1 - u / tip, 0) ** rng.uniform(1.2, 2.2)
    r = np.hypot(u, v)
    inside = union(size - r, np.minimum(np.minimum(tail + 0.05 - np.abs(v), u), tip - u))
    return inside, pallor(r / rng.uniform(0.25, 0.45), rng.uniform(0.0, 0.7)), 0 * r

def sickle(u, v, rng):
    """Without oxygen haemoglobin S makes fibres, which stretch the cell into a dense crescent."""
    length, width = rng.uniform(1.2, 1.5), rng.uniform(0.32, 0.46)
    v = v - rng.uniform(0.6, 1.0) * np.square(u / length)  # bent; the middle stays at the centre
    inside = width * np.maximum(1 - np.square(u / length), -1) - np.abs(v)
    return inside, 1.05 - 0.6 * np.square(v), 0 * u

def burr(u, v, rng):
    """Echinocyte: 10-30 short, even spicules all round (uraemia, or a slide that waited)."""
    size, count, phase = rng.uniform(0.85, 1.05), rng.integers(10, 23), rng.uniform(0, 2 * pi)
    theta, r = np.arctan2(v, u), np.hypot(u, v)  # more spicules than 22 would blur away
    wave = np.cos(int(count) * theta + phase + 0.9 * np.sin(2 * theta + phase))  # not quite regular
    outline = size * (1 + rng.uniform(0.05, 0.1) * (0.5 + 0.5 * wave) ** 1.5)
    return outline - r, pallor(r / rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.65)), 0 * r

def ring(u, v, rng):
    """Malaria: a young Plasmodium in a normal cell, a thin blue ring with a dot of chromatin."""
    inside, haemoglobin, azure = normal(u, v, rng)
    for _ in range(1 + (rng.random() < 0.15)):  # two in one cell speak for P. falciparum
        at, where, dot = rng.uniform(0, 0.55), rng.uniform(0, 2 * pi), rng.uniform(0, 2 * pi)
        size, width = rng.uniform(0.19, 0.27), rng.uniform(0.05, 0.08)
        pu, pv = u - at * cos(where), v - at * sin(where)
        azure += rng.uniform(0.4, 0.75) * np.exp(-np.square((np.hypot(pu, pv) - size) / width))
        r = np.hypot(pu - size * cos(dot), pv - size * sin(dot)) / rng.uniform(0.08, 0.12)
        azure += rng.uniform(1.1, 1.8) * np.exp(-np.square(r))
    return inside, haemoglobin, azure

def stomatocyte(u, v, rng):
    """A cup seen from above: its pallor is a slit (liver disease, alcohol, or slow drying)."""
    r = np.hypot(u, v) / rng.uniform(0.88, 1.1)
    length, bend = rng.uniform(0.45, 0.62), rng.uniform(-0.2, 0.2)
    q = np.hypot(u / length, (v + bend * u * u) / rng.uniform(0.12, 0.2))
    return 1 - r, pallor(q, rng.uniform(0.45, 0.75)), 0 * r

def schistocyte(u, v, rng):
    """Cut by fibrin in small vessels (TTP, DIC, a heart valve): a cornered piece, no pallor."""
    inside = rng.uniform(0.8, 1.0) - np.hypot(u, v + 0.3)
    if rng.random() < 0.5:  # helmet: a bite leaves two horns
        middle = rng.uniform(0.9, 1.5)
        cut = np.hypot(u - rng.uniform(-0.2, 0.2), v - middle) - middle + rng.uniform(0.25, 0.38)
    else:  # triangle: two straight cuts
        a, b = rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.8)
        cut = np.minimum(0.35 - sin(a) * v - cos(a) * u, 0.35 - sin(b) * v + cos(b) * u)
    return -union(-inside, -cut, 0.05), np.full_like(u, rng.uniform(0.8, 1.1)), 0 * u

CLASSES = {  # function, share of all cells (the same in every source), how far it reaches in radii
    "normal": (normal, 0.46, 1.3), "spherocyte": (spherocyte, 0.06, 1.1),
    "target": (target, 0.06, 1.3), "elliptocyte": (elliptocyte, 0.06, 1.7),
    "teardrop": (teardrop, 0.06, 2.0), "sickle": (sickle, 0.06, 1.9), "burr": (burr, 0.06, 1.3),
    "ring": (ring, 0.06, 1.3), "stomatocyte": (stomatocyte, 0.06, 1.3),
    "schistocyte": (schistocyte, 0.06, 1.4)}

# What else is on a slide, never labelled: beside the cells and on them, coloured like a parasite.
def platelet(u, v, rng):
    """A violet crumb of 2-3 micrometres; on a red cell it is the classic false malaria."""
    r, theta = np.hypot(u * rng.uniform(0.75, 1.3), v), np.arctan2(v, u)
    inside = 1 - r + 0.12 * np.cos(3 * theta + rng.uniform(0, 6)) + 0.08 * np.cos(7 * theta)
    grain = 1 + 0.4 * rng.standard_normal(u.shape, np.float32)
    return inside, 0.25 + 0 * r, grain * np.exp(-0.7 * r * r)

def neutrophil(u, v, rng):
    """A white cell of 12-15 micrometres: granular plasma, a nucleus of three to five lobes."""
    r, angle, nucleus = np.hypot(u, v), rng.uniform(0, 6), -np.ones_like(u)
    for _ in range(rng.integers(3, 6)):
        lobe = rng.uniform(0.22, 0.32) - np.hypot(u - 0.42 * cos(angle), v - 0.42 * sin(angle))
        nucleus, angle = union(nucleus, lobe), angle + rng.uniform(0.9, 1.4)
    grain = 0.08 * rng.standard_normal(u.shape, np.float32)
    return 1 - r, 0.3 + 0 * r, 0.15 + grain + (1.2 + 2 * grain) / (1 + np.exp(-nucleus / 0.03))

def dust(u, v, rng):
    """Dirt on the far side of the glass: out of focus, so it has no edge at all."""
    spot = rng.uniform(0.1, 0.35) * np.exp(-5 * (np.square(u * rng.uniform(0.7, 1.4)) + v * v))
    return np.ones_like(u), spot, spot

# --------------------------------------------------------------------------------- 2. the sources
# A laboratory. light: of the background, RGB in 0..1 (lamp, white balance); eosin, azure: optical
# density of a normal cell, of a nucleus, RGB (pH decides between pink and grey-blue); scale:
# magnification against RADIUS; blur: of the focus, a standard deviation in pixels; noise: grey
# levels at full light; vignette, slope: light lost in the corners, to one side; quality: JPEG's.
Source = namedtuple("Source", "name light eosin azure scale blur noise vignette slope quality")
SOURCES = [  # after the looks of Chula RBC-12
    Source("pink", (.8, .8, .76), (.14, .62, .48), (.5, 1.05, .35), 1.0, 0.7, 2.0, .10, .05, 92),
    Source("blue", (.52, .62, .66), (.34, .6, .35), (.75, 1.0, .25), 0.94, 1.0, 3.0, .22, .08, 88),
    Source("grey", (.52, .52, .48), (.12, .36, .3), (.4, .9, .3), 1.08, 1.2, 2.5, .12, .15, 80),
    Source("yellow", (.8, .76, .58), (.26, .5, .52), (.6, .95, .5), 1.0, 0.9, 4.0, .18, .10, 85),
    Source("bright", (.92, .91, .97), (.16, .56, .26), (.65, 1.05, .25), .91, .8, 1.5, .04, .03, 95)
]

# --------------------------------------------------------------------------------- 3. an image
def stamp(slide, shape, reach, x, y, radius, rng):
    """Add a cell's densities to slide [2, H, W], in a small window; x, y, radius in pixels."""
    half = int(reach * radius) + 4
    x0, x1 = max(0, int(x) - half), min(WIDTH, int(x) + half + 1)
    y0, y1 = max(0, int(y) - half), min(HEIGHT, int(y) + half + 1)
    if min(x1 - x0, y1 - y0) < 2:  # outside, or too little of it for a slope
        return
    dx = ((np.arange(x0, x1) - x) / radius).astype(np.float32)[None, :]
    dy = ((np.arange(y0, y1) - y) / radius).astype(np.float32)[:, None]
    turn, squeeze, lean = rng.uniform(0, 2 * pi), sqrt(rng.uniform(1, 1.14)), rng.normal(0, 0.07)
    u = (cos(turn) * dx + sin(turn) * dy) * squeeze  # lies in any direction, is slightly oval ...
    v = (cos(turn) * dy - sin(turn) * dx) / squeeze
    u = u + rng.normal(0, 0.04) * np.sin(2.5 * v + rng.uniform(0, 6))  # ... and dries unevenly
    v = v + rng.normal(0, 0.04) * np.sin(2.5 * u + rng.uniform(0, 6))
    inside, haemoglobin, azure = shape(u, v, rng)
    gy, gx = np.gradient(inside)  # value / slope = pixels to the outline: an edge without steps
    d = inside / np.maximum(np.hypot(gx, gy), 0.3 / radius)
    cover = np.clip(d + 0.5, 0, 1)
    rim = 0.2 * np.exp(-np.square((d - 1.2) / 1.2))  # the steep edge refracts light away ...
    halo = 0.13 * np.exp(-np.square((d + 2.2) / 1.5))  # ... and throws it just outside
    strength = rng.lognormal(0, 0.16)  # age and content: hides the class from brightness
    slide[0, y0:y1, x0:x1] += strength * cover * (haemoglobin * (1 + lean * u) + rim) - halo
    slide[1, y0:y1, x0:x1] += cover * azure

def layout(rng, radius, taken):
    """An image's cells (x, y, radius), pixels, clear of those in `taken`; one in eight overlaps."""
    cells = list(taken)
    for _ in range(rng.integers(60, 110)):
        for _ in range(20):  # tries; a full image takes no more
            r, apart = radius * rng.uniform(0.93, 1.07), 1.02
            x, y = rng.uniform(-15, WIDTH + 15), rng.uniform(-15, HEIGHT + 15)
            if cells and rng.random() < 0.12:
                x, y, other = cells[rng.integers(len(cells))]
                turn, apart = rng.uniform(0, 2 * pi), 0.75
                away = (r + other) * rng.uniform(0.76, 1.0)
                x, y = x + away * cos(turn), y + away * sin(turn)
            free = all((x - a) ** 2 + (y - b) ** 2 > (apart * (r + c)) ** 2 for a, b, c in cells)
            if free and -15 < x < WIDTH + 15 and -15 < y < HEIGHT + 15:
                cells.append((x, y, r))
                break
    return cells[len(taken):]

def cloud(rng, cells, amplitude):
    """Slow random variation [H, W], from a coarse grid: uneven stain, dried plasma."""
    grid = rng.normal(0, amplitude, (cells * 3 // 4, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))

def photograph(slide, source, seed, patient, rng):
    """Densities [2, H, W] to uint8 [H, W, 3], with the patient's stain and this image's light."""
    one = np.random.default_rng([seed, patient, 1])
    eosin = np.array(source.eosin) * one.lognormal(0, 0.1, 3) * one.lognormal(0, 0.1)
    azure = np.array(source.azure) * one.lognormal(0, 0.1, 3)
    light = np.array(source.light) * one.lognormal(0, 0.03, 3) * rng.lognormal(0, 0.03)
    x, y = (np.linspace(-1, 1, pixels, dtype=np.float32) for pixels in SIZE)
    y, turn = y[:, None], rng.uniform(0, 2 * pi)
    side = cos(turn) * x + sin(turn) * y
    lamp = 1 - source.vignette * (x * x + y * y) / 2 + source.slope / 2 * side
    haemoglobin = slide[0] * (1 + cloud(rng, 160, 0.06)) + cloud(rng, 10, 0.02)
    planes = [255 * b * lamp * np.exp(-e * haemoglobin - a * slide[1])
              for b, e, a in zip(light.tolist(), eosin.tolist(), azure.tolist())]
    sharp = Image.fromarray(np.stack(planes, 2).clip(0, 255).astype(np.uint8))
    out = np.asarray(sharp.filter(ImageFilter.GaussianBlur(source.blur * rng.uniform(0.7, 1.4))))
    shot = source.noise * np.sqrt(np.arange(256, dtype=np.float32) / 255)  # photons: root of light
    out = out + shot[out] * rng.standard_normal(out.shape, np.float32)
    return out.clip(0, 255).astype(np.uint8)

def smear(seed, k):
    """Image k of a seed: (uint8 [H, W, 3], labelled cells [(x, y, label)], Source, patient)."""
    patient = k // len(SOURCES) // PER_PATIENT * len(SOURCES) + k % len(SOURCES)
    source, rng = SOURCES[k % len(SOURCES)], np.random.default_rng([seed, k])
    slide, radius, labelled = np.zeros((2, HEIGHT, WIDTH), np.float32), RADIUS * source.scale, []
    names, shares = list(CLASSES), [share for _, share, _ in CLASSES.values()]
    white = [(*rng.uniform(0, SIZE).tolist(), radius * rng.uniform(1.6, 2.0))
             for _ in range(rng.poisson(0.2))]
    for x, y, r in white:
        stamp(slide, neutrophil, 1.2, x, y, r, rng)
    for x, y, r in layout(rng, radius, white):
        name = names[rng.choice(len(names), p=shares)]
        shape, _, reach = CLASSES[name]
        stamp(slide, shape, reach, x, y, r, rng)
        if rng.random() < 0.03:
            dx, dy = r * rng.uniform(-0.5, 0.5), r * rng.uniform(-0.5, 0.5)
            stamp(slide, platelet, 1.4, x + dx, y + dy, r / 4, rng)
        x, y = (at + rng.triangular(-3.5, 0, 3.5) for at in (x, y))  # nobody clicks the middle
        if MARGIN <= x <= WIDTH - MARGIN and MARGIN <= y <= HEIGHT - MARGIN:
            labelled.append((round(x, 1), round(y, 1), name))
    for shape, often, small, large in ((platelet, 5, 0.18, 0.36), (dust, 2, 0.3, 1.5)):
        for _ in range(rng.poisson(often)):
            x, y = rng.uniform(0, SIZE).tolist()
            stamp(slide, shape, 1.3, x, y, radius * rng.uniform(small, large), rng)
    x, y = rng.uniform(0, SIZE).tolist()  # precipitate of the stain: a cluster of dark grains
    for _ in range(rng.poisson(5)):
        stamp(slide, platelet, 1.4, *rng.normal((x, y), 14).tolist(), rng.uniform(1.2, 2.5), rng)
    return photograph(slide, source, seed, patient, rng), labelled, source, patient

# --------------------------------------------------------------------------- 4. another organ: CT
# The same game in Hounsfield units (HU: air -1000, fat -100, water 0, muscle 50, bone 1000): axial
# slices of a chest whose ascending and descending aorta are normal or not. Brightness tells little:
# contrast is a patient's own. Weighted F1 on unseen patients (320 slices of seed 0, 240 of seed 1):
# always "normal" 0.59, mean HU 0.66, 16x16 pixels 0.73 (20-NN), a small CNN 0.96. study_label is
# what no slice shows alone: does a disease fill five slices on end? AUROC (640 slices of seed 0;
# a CNN trained on seed 1): mean or maximum 0.45, attention 0.59, with places 0.86. All in mm.
SIDE, MM, PER_STUDY = 512, 0.7, 8  # pixels of a slice, size of a pixel, slices of a patient
SCANNERS = {"soft": (12, 1.4), "sharp": (16, 0.7), "low dose": (28, 1.0)}  # noise in HU, blur in px
AORTAS = {"normal": (10, 17), "aneurysm": (20, 29), "dissection": (14, 24), "thrombus": (14, 24),
          "calcified": (10, 17)}  # radii; a diameter of 40 is wide
CHEST = (  # ellipses: centre x, y, half axes, HU
    (0, 0, 165, 112, -100), (0, 0, 152, 100, 55), (0, 2, 137, 85, -90),  # skin, muscle, fat
    (-76, 0, 57, 78, -860), (78, 4, 55, 76, -860), (12, -36, 50, 34, 45),  # lungs, heart
    (0, 72, 23, 18, 550), (0, 72, 20, 15, 190), (0, 95, 11, 9, 450), (0, 95, 7, 6, 30),  # spine
    (0, -90, 17, 6, 300), (-2, 42, 7, 5, 40), (-4, 26, 9, 8, -1000))  # breastbone, gullet, windpipe

def lay(hu, inside, value):
    """Fill a shape in place; inside: mm to its outline, whose pixels hold both (partial volume)."""
    hu += np.clip(inside / MM + 0.5, 0, 1) * (value - hu)

def around(hu, x, y, cx, cy, a, b):
    """The part of a slice that holds an ellipse: hu, x, y (from its centre), inside."""
    columns = slice(*np.searchsorted(x.ravel(), (cx - a - 5, cx + a + 5)))
    rows = slice(*np.searchsorted(y.ravel(), (cy - b - 5, cy + b + 5)))
    u, v = x[:, columns] - cx, y[rows] - cy
    return hu[rows, columns], u, v, (1 - np.hypot(u / a, v / b)) * min(a, b)

def aorta(hu, x, y, cx, cy, kind, blood, rng):
    """A cross-section: a wall of 1.5 mm around blood of so many HU, and what its kind changes."""
    r = rng.uniform(*AORTAS[kind])
    hu, x, y, inside = around(hu, x, y, cx, cy, r, r * rng.uniform(0.9, 1))
    lay(hu, inside + 4, -80)  # in a bed of fat
    lay(hu, inside + 1.5, 45)
    turn = rng.uniform(0, 2 * pi)
    u, v = cos(turn) * x + sin(turn) * y, cos(turn) * y - sin(turn) * x
    if kind == "thrombus":  # a clot, dark as muscle, leaves the blood a channel off the middle
        lay(hu, inside, 50)
        free = rng.uniform(0.5, 0.7)
        inside = free * r - np.hypot(u - 0.85 * (1 - free) * r, v)
    lay(hu, inside, blood)
    if kind == "dissection":  # a loose inner layer between two channels; the false one fills later
        flap = u - r * (rng.uniform(-0.4, 0.4) + rng.uniform(-0.3, 0.3) * np.square(v / r))
        lay(hu, np.minimum(inside, flap), 45 + (blood - 45) * rng.uniform(0.6, 1))
        lay(hu, np.minimum(inside, 0.9 - np.abs(flap)), 45)
    for _ in range(rng.integers(2, 5) if kind == "calcified" else 0):  # plaques of lime in the wall
        off = np.abs((np.arctan2(v, u) - rng.uniform(-pi, pi) + pi) % (2 * pi) - pi)
        thick = rng.uniform(0.9, 1.5) - np.abs(inside)
        lay(hu, np.minimum(thick, (rng.uniform(0.2, 0.6) - off) * r), 900)

def chest(scale, organs, blood, rng):
    """A slice without its aortas: HU [SIDE, SIDE], its x [1, SIDE] and y [SIDE, 1] in mm."""
    x = ((np.arange(SIDE, dtype=np.float32) - SIDE / 2) * scale)[None, :]
    hu, y = np.full((SIDE, SIDE), -1000, np.float32), x.T
    shapes = [(*rng.normal((cx, cy), 1).tolist(), a * rng.uniform(0.98, 1.02), b, value)
              for cx, cy, a, b, value in organs]
    for turn in np.arange(14) * pi / 7 + rng.uniform(-0.15, 0.15, 14):  # ribs
        shapes.append((144 * cos(turn), 92 * sin(turn), 7, 5, rng.uniform(300, 600)))
    for side, away, turn, r in rng.uniform((-1, 0, 0, 0.6), (1, 1, 2 * pi, 2.5), (90, 4)):
        cx, cy = 77 * np.sign(side) + 50 * away * cos(turn), 3 + 66 * away * sin(turn)
        shapes.append((cx, cy, r, r, 0.5 * blood))  # vessels in the lungs
    for *place, value in shapes:
        part, _, _, inside = around(hu, x, y, *place)
        lay(part, inside, value)
    return hu, x, y

def study(patient):
    """A patient's disease and study_label: "long" if five slices on end show it; "short" if two
    pieces of five slices in all do, so that their number does not tell; or if none does."""
    kind, number = list(AORTAS)[patient % len(AORTAS)], patient // len(AORTAS)
    return kind, "short" if number % 2 or kind == "normal" else "long"

def ct(seed, k):
    """Slice k of a seed: (HU, int16 [SIDE, SIDE], aortas [(x, y, label)], scanner, patient)."""
    patient, rng = k // PER_STUDY, np.random.default_rng([seed, k, 2])
    one, scanner = np.random.default_rng([seed, patient, 3]), [*SCANNERS][patient % len(SCANNERS)]
    blood, scale = one.uniform(120, 420), MM / one.uniform(0.95, 1.05)
    first, where = one.integers(0, 4), one.integers(1, 4)  # 1: ascending, 2: descending, 3: both
    disease, length = study(patient)
    first += 4 * (length == "short")  # then it goes on from the last slice to the first: two pieces
    ill = (k - first) % PER_STUDY < 5
    arteries = (24, -30, 13, 11, one.uniform(0.6, 1.2) * blood), (-34, -18, 8, 7, blood)
    hu, x, y = chest(scale, CHEST + arteries, blood, rng)
    found = []  # ascending; descending, left of the spine: seen from the feet, our right
    for which, (cx, cy) in enumerate(((-8, -22), (26, 46)), 1):
        cx, cy = rng.normal((cx, cy), 3).tolist()
        label = disease if ill and where & which else "normal"
        aorta(hu, x, y, cx, cy, label, blood, rng)
        cx, cy = (SIDE / 2 + at / scale + rng.triangular(-3.5, 0, 3.5) for at in (cx, cy))
        found.append((round(cx, 1), round(cy, 1), label))
    noise, blur = SCANNERS[scanner]  # the kernel filters the noise too, so that grains are as wide
    f = np.fft.fftfreq(SIDE)
    kernel = np.exp(-2 * np.square(pi * blur * np.hypot(f[:, None], f[:SIDE // 2 + 1])))
    hu += rng.normal(0, noise * 2 * sqrt(pi) * blur, hu.shape)
    hu = np.fft.irfft2(np.fft.rfft2(hu) * kernel).round().clip(-1024, 3071)
    return hu.astype(np.int16), found, scanner, patient

def draw(out, images=200, seed=0, slices=False):
    """Draw `images` smears (or CT slices) into the folder `out`: smears/NNNN.jpg (slices/NNNN.npy,
    int16 HU) and cells.csv (image,x,y,label,group,source; of slices also study_label). x, y: a
    cell's centre in pixels; group: the patient. Image k depends on seed and k alone. Returns the
    path of cells.csv, which is written last. ValueError on bad numbers, FileExistsError if out
    holds else than a drawing of the same images and seed."""
    if images < 1 or seed < 0:
        raise ValueError(f"images must be at least 1, seed at least 0, not {images} and {seed}")
    out, kind = Path(out), "slices" if slices else "smears"
    recipe = f"{images} {kind} of seed {seed}"
    marker, table, part = out / "drawn.txt", out / "cells.csv", out / "cells.part"
    same = marker.is_file() and marker.read_text() == recipe
    if out.exists() and not same and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else than {recipe}: name a new folder")
    if same and table.is_file():
        return table
    (out / kind).mkdir(parents=True, exist_ok=True)
    marker.write_text(recipe)  # before the first: what was broken off is drawn again
    rows = [("image", "x", "y", "label", "group", "source") + ("study_label",) * slices]
    for k in range(images):
        pixels, cells, source, patient = ct(seed, k) if slices else smear(seed, k)
        if slices:
            name, about = f"slices/{k:04d}.npy", [source, study(patient)[1]]
            np.save(out / name, pixels)
        else:
            name, about = f"smears/{k:04d}.jpg", [source.name]
            Image.fromarray(pixels).save(out / name, quality=source.quality)
        rows += [(name, *cell, f"patient{patient:03d}", *about) for cell in cells]
    with open(part, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return part.replace(table)  # only ever whole

def demo(cfg):
    """`python reddino.py` without --data: train on some smears, score the features on others, and
    those of an untrained network. cfg: a reddino.Config. Raises as train and evaluate do."""
    import reddino
    from eval import evaluate, knn_monitor
    from figures import demo_figures

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise reddino.UserError("--data: name your images; the demo is for one process")
    print(f"no --data: drawing blood smears in {cfg.out} to train on, and others to score on")
    seen = draw(Path(cfg.out, "seen"), 160, 2 * cfg.seed).with_name("smears")
    unseen = draw(Path(cfg.out, "unseen"), 60, 2 * cfg.seed + 1)
    cfg.data, crop = [str(seen)], cfg.tile_size[0]
    trained = reddino.train(cfg, knn_monitor(cfg))
    weights = dict(pixels="pixels", colour="colour", untrained="random", trained=trained)
    evaluate(unseen, weights, ["knn", "linear"], crop, Path(cfg.out, "scores"), cfg.device)
    print("pictures:", *demo_figures(cfg.out, unseen, trained, crop, cfg.device))

def main():
    parser = argparse.ArgumentParser(description="Draw thin blood smears with labelled red cells.")
    parser.add_argument("out", help="folder for smears/NNNN.jpg and cells.csv")
    parser.add_argument("--images", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--slices", action="store_true", help="CT slices instead")
    parser.add_argument("--seed", type=int, default=0, help="other patients (default: 0)")
    try:
        print(draw(**vars(parser.parse_args())))
    except (ValueError, OSError) as error:
        parser.exit(2, f"smears.py: error: {error}\n")

if __name__ == "__main__":
    main()
