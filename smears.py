"""Thin blood smears, drawn: data that anyone has, with labels that are certain.

    python smears.py OUT                          200 images of 640x480 in OUT/smears, their cells in OUT/cells.csv
    python smears.py OUT --images 50 --seed 1     fewer, of other patients
    python smears.py OUT --slices                 CT slices instead, .npy in OUT/slices; OUT/cells.csv tells the aortas

The drawing goes the way the light goes:
    1. a cell is a shape (signed distance to its outline) and a thickness: one short function for each class;
    2. stain turns thickness into optical density, and densities that lie on top of each other add up;
    3. light passes: intensity = background * exp(-density)  (Beer-Lambert), then optics, sensor and JPEG spoil it.
Shape and thickness tell the classes apart, colour does not: each laboratory ("source") has every class in the same
proportions. Weighted F1 on unseen patients: always "normal" 0.28, colour histogram 0.29, 16x16 pixels 0.41 (20-NN), a
small supervised CNN 0.98. Ranges are our choice after real smears (Chula RBC-12): no real patient has all ten classes.
"""
import argparse
import csv
import sys
from dataclasses import dataclass
from math import cos, pi, sin, sqrt
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT = 640, 480  # as Chula RBC-12
RADIUS = 22.0   # of a normal cell, in pixels: 40-50 wide as in Chula RBC-12, i.e. 7.5 micrometres at 1000x
MARGIN = 40     # a cell whose centre is nearer to the border is drawn but not labelled: its 80-pixel crop is cut
PER_PATIENT = 4  # images of one patient (column `group`): same slide, same stain; never split them

# ------------------------------------------------------------------------------------------------ 1. the cells
# Each takes coordinates u, v [h, w] in units of a normal cell's radius, the cell's centre at 0, and a random stream,
# and returns (inside, haemoglobin, azure), each [h, w]: `inside` is positive in the cell and falls to 0 at its outline
# (only its zero and its slope count), the others are how much of each dye lies there. Romanowsky stains are two dyes:
# eosin (pink) binds haemoglobin, azure (blue-violet) nucleic acids. All numbers come from ranges, so that a class is a
# continuum with borderline cells. Python floats keep the arrays float32 (numpy's float64 scalars would double them).

def pallor(q, depth):
    """Relative thickness of a dimpled disc: 1 - depth in the middle, 1 outside; q = 1 is the dimple's edge."""
    return 1 - depth * np.exp(-np.square(np.square(q)))

def union(a, b, soft=0.08):
    """Two shapes melted into one: a maximum without the crease."""
    return soft * np.logaddexp(a / soft, b / soft)

def normal(u, v, rng):
    """Discocyte: a biconcave disc, thin in the middle, hence a pale centre of about a third of the diameter."""
    r = np.hypot(u, v) / rng.uniform(0.88, 1.1)
    q = np.hypot(u - rng.normal(0, 0.06), v - rng.normal(0, 0.06)) / rng.uniform(0.28, 0.5)  # never quite central
    return 1 - r, pallor(q, rng.uniform(0.35, 0.75)), 0 * r

def spherocyte(u, v, rng):
    """Lost membrane, kept haemoglobin (hereditary spherocytosis, immune haemolysis): a small ball, no pallor."""
    r = np.hypot(u, v) / rng.uniform(0.72, 0.92)
    return 1 - r, 0.95 + 0.25 * np.sqrt(np.maximum(1 - r * r, 0)), 0 * r

def target(u, v, rng):
    """Codocyte: too much membrane for its content (thalassaemia, liver disease) folds up into a bull's-eye."""
    r = np.hypot(u, v) / rng.uniform(0.9, 1.12)
    ring, width = rng.uniform(0.42, 0.55), rng.uniform(0.13, 0.18)
    return 1 - r, 1 - rng.uniform(0.4, 0.7) * np.exp(-np.square((r - ring) / width)), 0 * r

def elliptocyte(u, v, rng):
    """A skeleton that does not spring back after the capillaries (hereditary elliptocytosis): an ellipse or a rod."""
    ratio, size = rng.uniform(1.45, 2.3), rng.uniform(0.85, 1.05)
    q = np.hypot(u / sqrt(ratio), v * sqrt(ratio)) / size
    return 1 - q, pallor(q / rng.uniform(0.3, 0.5), rng.uniform(0.0, 0.6)), 0 * q

def teardrop(u, v, rng):
    """Dacrocyte: squeezed out of a scarred marrow (myelofibrosis), it keeps one drawn-out tail."""
    u, v = u + 0.25, v + rng.uniform(-0.15, 0.15) * u * u
    size, tip = rng.uniform(0.7, 0.88), rng.uniform(1.45, 2.1)
    tail = size * rng.uniform(0.6, 0.9) * np.maximum(1 - u / tip, 0) ** rng.uniform(1.2, 2.2) + 0.05 - np.abs(v)
    r = np.hypot(u, v)
    inside = union(size - r, np.minimum(np.minimum(tail, u), tip - u))
    return inside, pallor(r / rng.uniform(0.25, 0.45), rng.uniform(0.0, 0.7)), 0 * r

def sickle(u, v, rng):
    """Without oxygen haemoglobin S polymerises; its fibres stretch the cell into a dense crescent with two points."""
    length, width = rng.uniform(1.2, 1.5), rng.uniform(0.32, 0.46)
    v = v - rng.uniform(0.6, 1.0) * np.square(u / length)  # bends the spindle, and leaves its middle at the centre
    inside = width * np.maximum(1 - np.square(u / length), -1) - np.abs(v)
    return inside, 1.05 - 0.6 * np.square(v), 0 * u

def burr(u, v, rng):
    """Echinocyte: 10-30 short, even spicules all round (uraemia, or a slide that waited too long)."""
    size, count, phase = rng.uniform(0.85, 1.05), rng.integers(10, 23), rng.uniform(0, 2 * pi)  # > 22 blurs away
    theta, r = np.arctan2(v, u), np.hypot(u, v)
    wave = np.cos(int(count) * theta + phase + 0.9 * np.sin(2 * theta + phase))  # the sine: not quite regular
    outline = size * (1 + rng.uniform(0.05, 0.1) * (0.5 + 0.5 * wave) ** 1.5)
    return outline - r, pallor(r / rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.65)), 0 * r

def ring(u, v, rng):
    """Malaria, ring form: a young Plasmodium in a normal cell, a thin blue ring of cytoplasm with one chromatin dot."""
    inside, haemoglobin, azure = normal(u, v, rng)
    for _ in range(1 + (rng.random() < 0.15)):  # two in one cell speak for P. falciparum
        at, where, dot = rng.uniform(0, 0.55), rng.uniform(0, 2 * pi), rng.uniform(0, 2 * pi)
        size, width = rng.uniform(0.19, 0.27), rng.uniform(0.05, 0.08)
        pu, pv = u - at * cos(where), v - at * sin(where)
        azure = azure + rng.uniform(0.4, 0.75) * np.exp(-np.square((np.hypot(pu, pv) - size) / width))
        chromatin = np.hypot(pu - size * cos(dot), pv - size * sin(dot)) / rng.uniform(0.08, 0.12)
        azure = azure + rng.uniform(1.1, 1.8) * np.exp(-np.square(chromatin))
    return inside, haemoglobin, azure

def stomatocyte(u, v, rng):
    """A cup seen from above: the pallor is a slit, a mouth (liver disease, alcohol, or slow drying)."""
    r = np.hypot(u, v) / rng.uniform(0.88, 1.1)
    q = np.hypot(u / rng.uniform(0.45, 0.62), (v + rng.uniform(-0.2, 0.2) * u * u) / rng.uniform(0.12, 0.2))
    return 1 - r, pallor(q, rng.uniform(0.45, 0.75)), 0 * r

def schistocyte(u, v, rng):
    """A cell cut by fibrin in small vessels (TTP, DIC, a heart valve): a fragment with corners or horns, no pallor."""
    inside = rng.uniform(0.8, 1.0) - np.hypot(u, v + 0.3)
    if rng.random() < 0.5:  # helmet: a bite leaves two horns
        middle = rng.uniform(0.9, 1.5)
        cut = np.hypot(u - rng.uniform(-0.2, 0.2), v - middle) - middle + rng.uniform(0.25, 0.38)
    else:  # triangle: two straight cuts
        a, b = rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.8)
        cut = np.minimum(0.35 - sin(a) * v - cos(a) * u, 0.35 - sin(b) * v + cos(b) * u)
    return -union(-inside, -cut, 0.05), np.full_like(u, rng.uniform(0.8, 1.1)), 0 * u

CLASSES = {  # function, share of all cells (the same in every source), how far it reaches in radii
    "normal": (normal, 0.46, 1.3), "spherocyte": (spherocyte, 0.06, 1.1), "target": (target, 0.06, 1.3),
    "elliptocyte": (elliptocyte, 0.06, 1.7), "teardrop": (teardrop, 0.06, 2.0), "sickle": (sickle, 0.06, 1.9),
    "burr": (burr, 0.06, 1.3), "ring": (ring, 0.06, 1.3), "stomatocyte": (stomatocyte, 0.06, 1.3),
    "schistocyte": (schistocyte, 0.06, 1.4)}

# What else is on a slide, never labelled: it lies beside the cells and on them, in the colour of a parasite.

def platelet(u, v, rng):
    """A violet, granular crumb of 2-3 micrometres; on a red cell it is the classic false malaria."""
    r, theta = np.hypot(u * rng.uniform(0.75, 1.3), v), np.arctan2(v, u)
    inside = 1 - r + 0.12 * np.cos(3 * theta + rng.uniform(0, 6)) + 0.08 * np.cos(7 * theta)
    return inside, 0.25 + 0 * r, (1 + 0.4 * rng.standard_normal(u.shape, np.float32)) * np.exp(-0.7 * r * r)

def neutrophil(u, v, rng):
    """A white cell of 12-15 micrometres: pale granular plasma, a nucleus of three to five lobes on a thread."""
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

# ------------------------------------------------------------------------------------------------ 2. the sources

@dataclass(frozen=True)
class Source:
    """A laboratory: what its stain, microscope and camera do to every image."""
    name: str
    light: tuple      # colour of the empty background, RGB in 0..1: lamp and white balance
    eosin: tuple      # optical density of a normal cell, RGB: the buffer's pH decides between pink and grey-blue
    azure: tuple      # optical density of a nucleus, RGB
    scale: float      # magnification against RADIUS
    blur: float       # standard deviation of the focus, pixels
    noise: float      # of the sensor, grey levels at full light
    vignette: float   # light lost in the corners
    slope: float      # light lost from one side to the other: a lamp off its axis
    quality: int      # of the JPEG

SOURCES = (  # after the looks of Chula RBC-12
    Source("pink", (0.80, 0.80, 0.76), (0.14, 0.62, 0.48), (0.50, 1.05, 0.35), 1.00, 0.7, 2.0, 0.10, 0.05, 92),
    Source("blue", (0.52, 0.62, 0.66), (0.34, 0.60, 0.35), (0.75, 1.00, 0.25), 0.94, 1.0, 3.0, 0.22, 0.08, 88),
    Source("grey", (0.52, 0.52, 0.48), (0.12, 0.36, 0.30), (0.40, 0.90, 0.30), 1.08, 1.2, 2.5, 0.12, 0.15, 80),
    Source("yellow", (0.80, 0.76, 0.58), (0.26, 0.50, 0.52), (0.60, 0.95, 0.50), 1.00, 0.9, 4.0, 0.18, 0.10, 85),
    Source("bright", (0.92, 0.91, 0.97), (0.16, 0.56, 0.26), (0.65, 1.05, 0.25), 0.91, 0.8, 1.5, 0.04, 0.03, 95))

# ------------------------------------------------------------------------------------------------ 3. an image

def stamp(slide, shape, reach, x, y, radius, rng):
    """Add one cell's densities to slide [2, H, W]; x, y, radius in pixels. Only a small window is touched."""
    half = int(reach * radius) + 4
    x0, x1 = max(0, int(x) - half), min(WIDTH, int(x) + half + 1)
    y0, y1 = max(0, int(y) - half), min(HEIGHT, int(y) + half + 1)
    if min(x1 - x0, y1 - y0) < 2: return  # outside, or too little of it for a slope
    dx = ((np.arange(x0, x1) - x) / radius).astype(np.float32)[None, :]
    dy = ((np.arange(y0, y1) - y) / radius).astype(np.float32)[:, None]
    turn, squeeze, lean = rng.uniform(0, 2 * pi), sqrt(rng.uniform(1, 1.14)), rng.normal(0, 0.07)
    u = (cos(turn) * dx + sin(turn) * dy) * squeeze  # lies in any direction, is slightly oval ...
    v = (cos(turn) * dy - sin(turn) * dx) / squeeze
    u = u + rng.normal(0, 0.04) * np.sin(2.5 * v + rng.uniform(0, 6))  # ... and no cell dries evenly
    v = v + rng.normal(0, 0.04) * np.sin(2.5 * u + rng.uniform(0, 6))
    inside, haemoglobin, azure = shape(u, v, rng)
    # value / slope = distance to the outline in pixels, to first order: an edge without steps, no supersampling
    gy, gx = np.gradient(inside)
    d = inside / np.maximum(np.hypot(gx, gy), 0.3 / radius)
    cover = np.clip(d + 0.5, 0, 1)
    rim = 0.2 * np.exp(-np.square((d - 1.2) / 1.2))    # the edge is steep: it refracts light away ...
    halo = 0.13 * np.exp(-np.square((d + 2.2) / 1.5))  # ... and throws it just outside
    strength = rng.lognormal(0, 0.16)  # per cell: age and haemoglobin content; hides the class from brightness
    slide[0, y0:y1, x0:x1] += strength * cover * (haemoglobin * (1 + lean * u) + rim) - halo
    slide[1, y0:y1, x0:x1] += cover * azure

def layout(rng, radius, taken):
    """Centres and radii (x, y, r) of an image's cells, in pixels, clear of those in `taken`; one in eight overlaps."""
    cells = list(taken)
    for _ in range(rng.integers(60, 110)):
        for _ in range(20):  # tries; a full image takes no more
            r, apart = radius * rng.uniform(0.93, 1.07), 1.02
            x, y = rng.uniform(-15, WIDTH + 15), rng.uniform(-15, HEIGHT + 15)
            if cells and rng.random() < 0.12:
                (x, y, other), turn, apart = cells[rng.integers(len(cells))], rng.uniform(0, 2 * pi), 0.75
                away = (r + other) * rng.uniform(0.76, 1.0)
                x, y = x + away * cos(turn), y + away * sin(turn)
            if -15 < x < WIDTH + 15 and -15 < y < HEIGHT + 15 and all(
                    (x - a) ** 2 + (y - b) ** 2 > (apart * (r + c)) ** 2 for a, b, c in cells):
                cells.append((x, y, r))
                break
    return cells[len(taken):]

def cloud(rng, cells, amplitude):
    """Slow random variation [H, W], from a coarse grid of normal numbers: uneven stain, dried plasma."""
    grid = rng.normal(0, amplitude, (cells * 3 // 4, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))

def photograph(slide, source, seed, patient, rng):
    """Slide [2, H, W] of densities to an image, uint8 [H, W, 3], with the patient's stain and this image's light."""
    of_patient = np.random.default_rng([seed, patient, 1])
    eosin = np.array(source.eosin) * of_patient.lognormal(0, 0.1, 3) * of_patient.lognormal(0, 0.1)
    azure = np.array(source.azure) * of_patient.lognormal(0, 0.1, 3)
    light = np.array(source.light) * of_patient.lognormal(0, 0.03, 3) * rng.lognormal(0, 0.03)
    x, y = np.linspace(-1, 1, WIDTH, dtype=np.float32), np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None]
    side = rng.uniform(0, 2 * pi)
    lamp = 1 - source.vignette * (x * x + y * y) / 2 + source.slope / 2 * (cos(side) * x + sin(side) * y)
    haemoglobin = slide[0] * (1 + cloud(rng, 160, 0.06)) + cloud(rng, 10, 0.02)
    planes = [255 * b * lamp * np.exp(-e * haemoglobin - a * slide[1])
              for b, e, a in zip(light.tolist(), eosin.tolist(), azure.tolist())]
    sharp = Image.merge("RGB", [Image.fromarray(plane.clip(0, 255).astype(np.uint8)) for plane in planes])
    out = np.asarray(sharp.filter(ImageFilter.GaussianBlur(source.blur * rng.uniform(0.7, 1.4))))
    shot = source.noise * np.sqrt(np.arange(256, dtype=np.float32) / 255)  # photons: noise grows with light's root
    return (out + shot[out] * rng.standard_normal(out.shape, np.float32)).clip(0, 255).astype(np.uint8)

def smear(seed, k):
    """Image k of a seed: (uint8 [H, W, 3], list of labelled cells (x, y, label), Source, number of the patient)."""
    source, patient = SOURCES[k % len(SOURCES)], k // len(SOURCES) // PER_PATIENT * len(SOURCES) + k % len(SOURCES)
    rng = np.random.default_rng([seed, k])
    slide, radius, labelled = np.zeros((2, HEIGHT, WIDTH), np.float32), RADIUS * source.scale, []
    names, shares = list(CLASSES), [share for _, share, _ in CLASSES.values()]
    def anywhere(): return rng.uniform(0, (WIDTH, HEIGHT)).tolist()
    white = [(*anywhere(), radius * rng.uniform(1.6, 2.0)) for _ in range(rng.poisson(0.2))]
    for x, y, r in white: stamp(slide, neutrophil, 1.2, x, y, r, rng)
    for x, y, r in layout(rng, radius, white):
        name = names[rng.choice(len(names), p=shares)]
        shape, _, reach = CLASSES[name]
        stamp(slide, shape, reach, x, y, r, rng)
        if rng.random() < 0.03:
            stamp(slide, platelet, 1.4, x + r * rng.uniform(-0.5, 0.5), y + r * rng.uniform(-0.5, 0.5), r / 4, rng)
        x, y = (at + rng.triangular(-3.5, 0, 3.5) for at in (x, y))  # nobody clicks the exact middle
        if MARGIN <= x <= WIDTH - MARGIN and MARGIN <= y <= HEIGHT - MARGIN:
            labelled.append((round(x, 1), round(y, 1), name))
    for shape, often, small, large in ((platelet, 5, 0.18, 0.36), (dust, 2, 0.3, 1.5)):
        for _ in range(rng.poisson(often)):
            stamp(slide, shape, 1.3, *anywhere(), radius * rng.uniform(small, large), rng)
    x, y = anywhere()  # precipitate of the stain: a cluster of dark grains
    for _ in range(rng.poisson(5)):
        stamp(slide, platelet, 1.4, x + rng.normal(0, 14), y + rng.normal(0, 14), rng.uniform(1.2, 2.5), rng)
    return photograph(slide, source, seed, patient, rng), labelled, source, patient

# ------------------------------------------------------------------------------------------- 4. another organ: CT
# The same game in Hounsfield units (HU: air -1000, fat -100, water 0, muscle 50, bone 1000): axial slices of a chest
# whose ascending and descending aorta are normal or not. Each patient has their own contrast, so that brightness tells
# little. Weighted F1 on unseen patients (320 slices of seed 0, 240 of seed 1): always "normal" 0.59, mean HU 0.66,
# 16x16 pixels 0.73 (20-NN), a small supervised CNN 0.96. Lengths are in mm.
SIDE, MM, PER_STUDY = 512, 0.7, 8  # pixels of a slice, size of a pixel, slices of a patient
SCANNERS = {"soft": (12, 1.4), "sharp": (16, 0.7), "low dose": (28, 1.0)}  # noise in HU, blur in pixels
AORTAS = ("normal", "aneurysm", "dissection", "thrombus", "calcified")

def lay(hu, inside, value):
    """Fill a shape in place; inside: about the distance to its outline, whose pixels hold both (partial volume)."""
    hu += np.clip(inside / MM + 0.5, 0, 1) * (value - hu)

def around(hu, x, y, cx, cy, a, b):
    """The part of a slice that holds an ellipse with half axes a, b: hu, x, y (from its centre), inside."""
    rows, columns = (slice(*np.searchsorted(axis.ravel(), (at - r - 5, at + r + 5))) for axis, at, r in
                     ((y, cy, b), (x, cx, a)))
    u, v = x[:, columns] - cx, y[rows] - cy
    return hu[rows, columns], u, v, (1 - np.hypot(u / a, v / b)) * min(a, b)

def aorta(hu, x, y, cx, cy, kind, blood, rng):
    """A cross-section: a wall of 1.5 mm around blood of so many HU, and what the kind changes in it."""
    low, high = {"normal": (10, 17), "calcified": (10, 17), "aneurysm": (20, 29)}.get(kind, (14, 24))  # 4 cm is wide
    r = rng.uniform(low, high)
    hu, x, y, inside = around(hu, x, y, cx, cy, r, r * rng.uniform(0.9, 1))
    lay(hu, inside + 4, -80)  # in a bed of fat
    lay(hu, inside + 1.5, 45)
    turn = rng.uniform(0, 2 * pi)
    u, v = cos(turn) * x + sin(turn) * y, cos(turn) * y - sin(turn) * x
    if kind == "thrombus":  # a clot, as dark as muscle, leaves the blood a channel off the middle
        lay(hu, inside, 50)
        free = rng.uniform(0.5, 0.7)
        inside = free * r - np.hypot(u - 0.85 * (1 - free) * r, v)
    lay(hu, inside, blood)
    if kind == "dissection":  # the inner layer has come off: a flap between two channels, the false one fills later
        flap = u - r * (rng.uniform(-0.4, 0.4) + rng.uniform(-0.3, 0.3) * np.square(v / r))
        lay(hu, np.minimum(inside, flap), 45 + (blood - 45) * rng.uniform(0.6, 1))
        lay(hu, np.minimum(inside, 0.9 - np.abs(flap)), 45)
    for _ in range(rng.integers(2, 5) if kind == "calcified" else 0):  # plaques of lime in the wall
        off = np.abs((np.arctan2(v, u) - rng.uniform(-pi, pi) + pi) % (2 * pi) - pi)
        lay(hu, np.minimum(rng.uniform(0.9, 1.5) - np.abs(inside), (rng.uniform(0.2, 0.6) - off) * r), 900)

def ct(seed, k):
    """Slice k of a seed: (HU, int16 [SIDE, SIDE], list of labelled aortas (x, y, label), scanner, patient's number)."""
    patient, rng = k // PER_STUDY, np.random.default_rng([seed, k, 2])
    one, scanner = np.random.default_rng([seed, patient, 3]), list(SCANNERS)[patient % len(SCANNERS)]
    blood, scale, disease = one.uniform(120, 420), MM / one.uniform(0.95, 1.05), AORTAS[patient % len(AORTAS)]
    first, ill = one.integers(0, 4), one.integers(1, 4)  # of the five diseased slices; 1: above, 2: below, 3: both
    x = ((np.arange(SIDE, dtype=np.float32) - SIDE / 2) * scale)[None, :]
    hu, y = np.full((SIDE, SIDE), -1000, np.float32), x.T
    def put(cx, cy, a, b, value): lay((part := around(hu, x, y, cx, cy, a, b))[0], part[3], value)
    for cx, cy, a, b, value in (
            (0, 0, 165, 112, -100), (0, 0, 152, 100, 55), (0, 2, 137, 85, -90),   # skin, muscle, chest: filled with fat
            (-76, 0, 57, 78, -860), (78, 4, 55, 76, -860), (12, -36, 50, 34, 45),  # lungs, heart
            (0, 72, 23, 18, 550), (0, 72, 20, 15, 190), (0, 95, 11, 9, 450), (0, 95, 7, 6, 30),  # vertebra, its canal
            (0, -90, 17, 6, 300), (-2, 42, 7, 5, 40), (-4, 26, 9, 8, -1000),  # breastbone, gullet, windpipe
            (24, -30, 13, 11, one.uniform(0.6, 1.2) * blood), (-34, -18, 8, 7, blood)):  # lung artery, vena cava
        put(cx + rng.normal(0, 1), cy + rng.normal(0, 1), a * rng.uniform(0.98, 1.02), b, value)
    for turn in np.arange(14) * pi / 7 + rng.uniform(-0.15, 0.15, 14):
        put(144 * cos(turn), 92 * sin(turn), 7, 5, rng.uniform(300, 600))  # ribs
    for side, away, turn, r in rng.uniform((-1, 0, 0, 0.6), (1, 1, 2 * pi, 2.5), (90, 4)):
        put(77 * np.sign(side) + 50 * away * cos(turn), 3 + 66 * away * sin(turn), r, r, 0.5 * blood)  # in the lungs
    found = []
    for which, (cx, cy) in enumerate(((-8, -22), (26, 46)), 1):  # ascending; descending, left of the spine: the patient
        cx, cy = cx + rng.normal(0, 3), cy + rng.normal(0, 3)  # is seen from the feet, so that their left is our right
        label = disease if ill & which and first <= k % PER_STUDY < first + 5 else "normal"
        aorta(hu, x, y, cx, cy, label, blood, rng)
        found.append((*(round(SIDE / 2 + at / scale + rng.triangular(-3.5, 0, 3.5), 1) for at in (cx, cy)), label))
    noise, blur = SCANNERS[scanner]  # the kernel filters both what is there and its noise, so that grains are as wide
    f = np.fft.fftfreq(SIDE)
    kernel = np.exp(-2 * np.square(pi * blur * np.hypot(f[:, None], f[:SIDE // 2 + 1])))
    hu += rng.normal(0, noise * 2 * sqrt(pi) * blur, hu.shape)
    return np.fft.irfft2(np.fft.rfft2(hu) * kernel).round().clip(-1024, 3071).astype(np.int16), found, scanner, patient

def draw(out, images=200, seed=0, slices=False):
    """Draw `images` smears (or CT slices) into the folder `out`: smears/NNNN.jpg (slices/NNNN.npy, int16 HU) and
    cells.csv (image,x,y,label,group,source).

    image is relative to out; x, y are the cell's centre in pixels. Image k depends on seed and k alone. Returns the
    path of cells.csv, which is written last. Raises ValueError on bad numbers, FileExistsError if out holds
    anything else than a drawing of the same images and seed (returned as it is; drawn again if it was broken off).
    """
    if images < 1 or seed < 0:
        raise ValueError(f"images must be at least 1 and seed at least 0, not {images} and {seed}")
    out, kind = Path(out), "slices" if slices else "smears"
    recipe = f"{images} {kind} of seed {seed}"
    marker, table = out / "drawn.txt", out / "cells.csv"
    same = marker.is_file() and marker.read_text() == recipe
    if out.exists() and not same and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else than {recipe}: name a new folder")
    if same and table.is_file(): return table
    (out / kind).mkdir(parents=True, exist_ok=True)
    marker.write_text(recipe)
    rows = [("image", "x", "y", "label", "group", "source")]
    for k in range(images):
        pixels, cells, source, patient = ct(seed, k) if slices else smear(seed, k)
        name = f"{kind}/{k:04d}.{'npy' if slices else 'jpg'}"
        if slices: np.save(out / name, pixels)
        else: Image.fromarray(pixels).save(out / name, quality=source.quality)
        rows += [(name, *cell, f"patient{patient:03d}", getattr(source, "name", source)) for cell in cells]
    with open(out / "cells.part", "w", newline="") as file: csv.writer(file).writerows(rows)
    return (out / "cells.part").replace(table)  # only ever whole

def main():
    parser = argparse.ArgumentParser(description="Draw thin blood smears with labelled red cells.")
    parser.add_argument("out", help="folder to write to: OUT/smears/NNNN.jpg and OUT/cells.csv")
    parser.add_argument("--images", type=int, default=200, help="how many images of 640x480 (default: %(default)s)")
    parser.add_argument("--slices", action="store_true", help="CT slices of 512x512 in OUT/slices/NNNN.npy instead")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other patients (default: %(default)s)")
    args = parser.parse_args()
    try:
        print(draw(args.out, args.images, args.seed, args.slices))
    except (ValueError, OSError) as error:
        print(f"smears.py: error: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
