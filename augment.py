"""From an image file to training views: tiles of smears, RedDino's 32 pixel transforms, multi-crop.

An image travels through read_image, Tiles (its 224 x 224 windows, or cells), MultiCrop (2 global, L
local views) and Batches as RGB uint8 (`ct`: values until RandomWindow). Papers: RedDino (Zedda et
al., MICCAI 2025), DINOv2 (Oquab et al., 2023), multi-crop (SwAV, Caron et al., 2020)."""
import hashlib
import itertools
import logging
import math
import multiprocessing
import os
import random
import signal
import traceback
import warnings
from collections import ChainMap, Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or its import asks the network
os.environ["OPENCV_LOG_LEVEL"] = "SILENT"  # BadImage alone says what is wrong
import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence

cv2.setNumThreads(0)  # the loading processes already share the cores
warnings.filterwarnings("ignore", module=r"PIL\.|pydicom")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2's weights expect

class UserError(Exception):
    """What the user can put right: main() prints it as one line, exit code 2."""

class BadImage(Exception):
    """A file without pixels: .path, .reason in one line. Training lists it and goes on."""

    def __init__(self, path, reason):
        self.path, self.reason = path, " ".join(reason.split())[:300]
        super().__init__(path, self.reason)  # these survive pickling

    def __str__(self):
        return f"{self.path!r}: {self.reason}"  # !r: a name may hold newlines

# ----------------------------------------
# Files. Each ends as RGB pixels or as one BadImage. FILE#0, FILE#1, ... are frames of a DICOM file.

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy", ".dcm")
MAX_PIXELS = 40_000_000  # 6,324 x 6,324; reading one takes up to 0.9 GiB
TOO_LARGE = f"""too large: over {MAX_PIXELS:,} pixels; cut it, e.g. python -c "import cv2; i =
cv2.imread('FILE'); [cv2.imwrite(f'{{y}}_{{x}}.png', i[y:y+4096, x:x+4096]) for y in range(0,
len(i), 4096) for x in range(0, len(i[0]), 4096)]" """

def in_threads(function, files):
    """[function(file), ...], 16 at a time, which mostly wait for the disk or the network. Some at a
    time, or an interrupt would have to wait for all, and a million waiting calls take gigabytes."""
    results = []
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(files), 256):
            results += pool.map(function, files[first:first + 256])
    return results

def find_images(folder, notes=None):
    """Paths of all images below `folder`, by extension (DICOM without one by its magic), sorted;
    hidden ones (Trash, notebooks' checkpoints) left out, links followed, each folder once. To the
    list `notes` goes what is left out. UserError if `folder` can't be listed."""
    files, seen, errors, notes = [], set(), [], [] if notes is None else notes
    for here, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        if os.path.realpath(here) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = [name for name in folders if name[0] != "."]
        files += [os.path.join(here, name) for name in names if name[0] != "."]
    if not seen:
        raise UserError(f"{folder!r} is not a folder that can be listed: {errors[0].strerror}")
    notes += [f"left out: {e.filename!r} can't be listed ({e.strerror})" for e in errors]
    files.sort()
    images = in_threads(images_in, files)
    others = Counter(Path(file).suffix.lower() for file, own in zip(files, images) if not own)
    kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in others.items())
    if kinds:
        notes.append(f"left out, as no images: {kinds} in {folder!r}")
    return [path for own in images for path in own]

def images_in(file):
    """Paths of a file's images: none, itself, or the frames of a DICOM file."""
    kind = Path(file).suffix.lower()
    if kind not in ("", ".dcm", ".ima") and not kind[1:].isdecimal():  # IM0001, 1.2.840.113619.2
        return [file] if kind in EXTENSIONS else []
    try:
        header = dicom_header(file)
        frames = int(header.get("NumberOfFrames") or 1)
    except Exception:  # read_image will say what is wrong
        return [file]
    if header.get("Modality") in ("SEG", "RTDOSE"):  # pixels, but no picture
        return []
    if "Rows" not in header and kind != ".dcm":  # a DICOMDIR, or no DICOM file
        return []
    return [f"{file}#{n}" for n in range(frames)] if 1 < frames < os.stat(file).st_size else [file]

def file_and_frame(path):
    """FILE#3 is FILE, 3; any other path itself, None."""
    file, _, frame = str(path).rpartition("#")
    return (file, int(frame)) if frame.isdecimal() and not os.path.exists(path) else (path, None)

def dicom_header(file):
    """All but the pixels of a DICOM file; {} for other files."""
    if not os.path.isfile(file):  # opening a named pipe would wait for ever
        return {}
    with open(file, "rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            return {}
    import pydicom

    return pydicom.dcmread(file, stop_before_pixels=True)

def dicom_group(path):
    """Whom a DICOM image shows, without a name: 12 hex digits of the SHA-256 of its PatientID."""
    try:
        patient = dicom_header(file_and_frame(path)[0]).PatientID
        return hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else None
    except Exception:  # no DICOM file, or a broken one
        return None

def read_image(path, header_only=False, window=None, raw=False):
    """An image's pixels, RGB uint8 [H, W, 3], upright by its EXIF, 0 black. Raises BadImage alone.
    header_only: (H, W), without decoding. More than 8 bits are made 8 by window (level, width) in
    their units, else by their depth. raw: such grey stays, float32 [H, W], in HU if no window."""
    try:
        file, frame = file_and_frame(path)
        if os.path.exists(file) and not os.path.isfile(file):
            raise ValueError("not a regular file")
        with open(file, "rb") as stream:
            if Path(file).suffix.lower() == ".npy":
                reader = array_reader(file)
            elif header := dicom_header(file):
                reader = dicom_reader(file, frame, header)
            elif frame is None:
                reader = picture_reader(stream)
            else:
                raise ValueError("only DICOM files have frames")
            height, width = next(reader)
            if height * width > MAX_PIXELS:
                raise Image.DecompressionBombError
            if header_only:
                return height, width
            return np.array(to_rgb(*next(reader), window, raw), order="C")  # theirs are read-only
    except Image.DecompressionBombError:  # a header of 60,000 x 60,000 costs a few bytes
        reason = TOO_LARGE
    except ImportError:
        reason = "a DICOM file: pip install pydicom --upgrade"
    except Image.UnidentifiedImageError:
        reason = "not an image, or of a kind that can't be read"
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, ...
        reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
        reason = reason.replace("all plugins are missing", "pip install one of the")  # pydicom's
    raise BadImage(path, reason)

# Readers yield (height, width), from the header; then, decoded, the array and whether 0 is white.
def array_reader(file):
    try:
        values = np.lib.format.open_memmap(file, "r")
        grey = values.ndim == 2 and values.dtype.kind in "iuf"
        if not values.size or not (grey or (values.shape[2:], values.dtype) == ((3,), np.uint8)):
            raise ValueError(f"it holds {values.dtype} {list(values.shape)}")
    except ValueError as error:
        what = "np.save one slice a file, numbers [H, W] or uint8 [H, W, 3]"
        raise ValueError(f"{what}: {error}") from None
    yield values.shape[:2]
    yield values, False

def dicom_reader(file, frame, header):
    """By pydicom: colours, or values in the modality's units, CT's in HU."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    if "Rows" not in header:
        raise ValueError(f"a DICOM file without pixels: {header.get('Modality')}")
    if frame is None and int(header.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"{header.NumberOfFrames} frames: name one, {file}#0 for the first")
    yield header.Rows, header.Columns
    frame, units, coding = frame or 0, header, header.PhotometricInterpretation
    pixels = pixel_array(file, index=frame)
    if coding == "PALETTE COLOR":
        yield apply_color_lut(pixels, header), False
    of_all = header.get("SharedFunctionalGroupsSequence", [])  # in enhanced CT, MR
    of_each = header.get("PerFrameFunctionalGroupsSequence", [])
    for group in (*of_all, *of_each[frame:frame + 1]):
        units = group.get("PixelValueTransformationSequence", [units])[0]
    yield apply_modality_lut(pixels, units), coding == "MONOCHROME1"

def picture_reader(stream):
    """By PIL, or deep_colours."""
    im = Image.open(stream)
    tags = getattr(im, "tag_v2", {})  # of a TIFF
    # PIL turns TIFFs itself; EXIF behind a PNG's pixels is left alone: to find it decodes them
    exif = im.getexif() if not tags and "exif" in im.info else {}
    yield im.size if exif.get(0x0112) in (5, 6, 7, 8) else im.size[::-1]  # size: width, height
    if im.info.get("progressive") and Path(stream.name).read_bytes().count(b"\xff\xda") > 200:
        raise ValueError("a JPEG of too many scans: save it anew")  # 2,000 take minutes
    deep = np.max(tags.get(258, 8)) > 8 or ";16" in str(im.tile)
    white_is_0 = deep and tags.get(262) == 0  # at 8 bits PIL inverts
    pages = [(page.size, page.mode) for page in ImageSequence.Iterator(im)] if tags else []
    im.seek(0)
    if sum(size == im.size for size, _ in pages) > 1:  # others are smaller copies
        depth = "slices=" in str(tags.get(270))  # as ImageJ says
        grey = im.mode == "L" or im.mode[0] in "IF"
        if depth or not grey or pages != 3 * [(im.size, im.mode)]:
            raise ValueError(f"{len(pages)} pages: save each as a file of its own")
        yield np.dstack(ImageSequence.all_frames(im, np.array)), white_is_0  # R, G, B, as OME's
    im.load()  # an error where it is cut short
    if deep and len(im.getbands()) > 1:
        if tags.get(284) == 2:
            raise ValueError("colours of more than 8 bits, plane by plane: import tifffile; "
                             "tifffile.imwrite(NEW, tifffile.imread(FILE).transpose(1, 2, 0))")
        yield deep_colours(stream.name, exif, im.has_transparency_data), white_is_0
    upright = ImageOps.exif_transpose(im) if exif else im
    if im.mode[0] not in "IF":  # CMYK and palettes too
        upright = upright.convert("RGBA" if im.has_transparency_data else "RGB")
    yield np.asarray(upright), white_is_0

def deep_colours(path, exif, has_alpha):
    """RGB(A) of more than 8 bits, by OpenCV: PIL would make them 8."""
    pixels = cv2.imread(path, cv2.IMREAD_UNCHANGED)  # BGR(A)
    if exif.get(0x0112, 1) != 1 or pixels is None or pixels.ndim != 3:
        raise ValueError("colours of more than 8 bits, turned by EXIF or packed as OpenCV can't "
                         "read: save them anew")
    return pixels[..., [2, 1, 0, 3][:min(pixels.shape[2], 3 + has_alpha)]]

@np.errstate(over="ignore")
def to_rgb(pixels, white_is_0, window, raw):
    """A file's [H, W] or [H, W, 3 or 4] -> what read_image returns. NaN and inf are the lowest."""
    colours = pixels if pixels.ndim == 2 else pixels[..., :3]
    if pixels.dtype != np.uint8:
        values = np.array(colours, np.float32, order="C")
        finite = np.isfinite(values)
        values[~finite] = values.min(where=finite, initial=0)
        if raw and values.ndim == 2:
            if pixels.dtype.kind == "u" and not window:
                raise ValueError("no sign: is water 0, 1024? --window LEVEL WIDTH as in 1064 400")
            return values
        colours = apply_window(values, *(window or full_scale(values, pixels.dtype.kind)))
    if white_is_0:
        colours = 255 - colours
    if colours.ndim == 2:
        colours = np.dstack([colours] * 3)
    if pixels.shape[2:] == (4,) and pixels[..., 3].any():  # 0 everywhere was never written
        alpha = np.dstack([pixels[..., 3]] * 3)
        alpha = alpha if alpha.dtype == np.uint8 else np.uint8(alpha / 257)
        colours = 255 - cv2.multiply(255 - colours, alpha, scale=1 / 255)  # onto white
    return colours

def full_scale(values, kind):
    """Level and width where no window is given. Cameras leave the top bits of 16 unused: white is
    the smallest of 8, 10, ... 16 bits that holds all but the brightest 0.1% (hot pixels). (The
    file's own range would undo its exposure.) Floats about 0..1: white is 1."""
    if values.max() < -10 * values.min():  # a little below 0 is noise
        raise ValueError("values far below 0: say --window LEVEL WIDTH, for a CT in HU e.g. 40 400")
    brightest = float(np.percentile(values, 99.9))
    if (0 < brightest < 0.1 or 1.5 < brightest < 32) and (values % 1).any():
        raise ValueError("floats of an unknown scale: say --window LEVEL WIDTH")
    if kind == "f" and brightest <= 1.5:
        return 0.5, 1.0
    white = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if brightest < 2**bits), brightest)
    return white / 2, white

def apply_window(values, level, width):
    """Values -> uint8: level - width/2 black, level + width/2 white (DICOM PS3.3 C.11.2.1.3.2,
    LINEAR_EXACT). CT's Hounsfield units, HU: air -1000, fat -100, water 0, muscle 50, bone 1000."""
    return (255 / width * (values - (level - width / 2))).clip(0, 255).astype(np.uint8)

def check_window(window):
    """UserError unless it is none or a level and a width."""
    if window and not (len(window) == 2 and window[1] > 0 and np.isfinite(window).all()):
        raise UserError("--window takes LEVEL and WIDTH, finite, the width above 0")

# ----------------------------------------
# Tiles. RedDino: patches cut from whole smears beat segmented cells (here --unit cells), so an
# image counts as its 224 x 224 windows (tiles, as a patch is a ViT's token). A bare grid drops 35%
# of a 640 x 480 smear; 3 x 3 windows spread evenly from edge to edge keep all of it.

KEEP = 600e6  # bytes of decoded images in each loading process: 650 smears of 640 x 480

def window_starts(length, tile_size):
    """Starts of the fewest windows that cover 0..length, evenly spaced; one if tile_size is 0."""
    n = math.ceil(length / tile_size) if tile_size else 1
    return [round(k * (length - tile_size) / (n - 1)) for k in range(n)] if n > 1 else [0]

def find_cells(image, size=80):
    """Centres [n, 2] (x, y) of the cells in a stained smear, RGB uint8 [H, W, 3], without labels.
    size: side of the square to be cut around a cell, of which the cell fills half or more; none
    leaves the image. (Otsu 1979; touching cells part where the distance transform peaks.) At 56 it
    finds 98% of drawn cells of 40 to 50 pixels, at 80 96%; 95% and 97% of its finds are cells."""
    grey = cv2.GaussianBlur(image[..., 1], (0, 0), size / 50)  # green: haemoglobin swallows it
    _, dark = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    _, gap, stats, _ = cv2.connectedComponentsWithStats(255 - dark, connectivity=4)
    pale = stats[:, cv2.CC_STAT_AREA] < size**2 / 8
    dark[pale[gap]] = 255  # pale middles of cells belong to them; larger gaps do not
    depth = cv2.GaussianBlur(cv2.distanceTransform(dark, cv2.DIST_L2, 5), (0, 0), size / 40)
    near = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, [size // 3 | 1] * 2)
    y, x = np.nonzero((depth == cv2.dilate(depth, near)) & (depth > size / 18))
    _, blob, stats, middle = cv2.connectedComponentsWithStats(dark)
    blob = blob[y, x]
    alone = np.bincount(blob, minlength=len(stats))[blob] == 1
    centres = np.where(alone[:, None], middle[blob], np.stack([x, y], 1))  # a sickle's peak is off
    large = stats[blob, cv2.CC_STAT_AREA] > size**2 / 24  # platelets and dust are smaller
    inside = (centres >= size / 2) & (centres <= np.array(image.shape[1::-1]) - size / 2)
    return centres[large & inside.all(1)]

class Tiles:
    """Folders of images as one list of tiles: t[i] -> RGB uint8 [h, w, 3], or BadImage.
    unit "tiles": windows of tile_size (0: the whole image); several sizes are magnifications, as
    all views end at one. unit "cells": squares around what find_cells finds, for which images are
    decoded here, else headers alone. window, raw: see read_image. files: the readable images.
    sources: of each folder (first tile, one past the last). skipped: {path: reason}. notes: what
    was left out. UserError for a folder missing, twice or empty, or if most files can't be read."""

    def __init__(self, folders, tile_size=224, window=None, raw=False, unit="tiles"):
        self.tile_sizes, self.unit = np.atleast_1d(tile_size).tolist(), unit
        self.files, self.sources, self.skipped, self.notes = [], [], {}, []
        self.window, self.raw = window, raw
        if not folders:
            raise UserError("--data: name at least one folder of images")
        if unit == "cells" and (0 in self.tile_sizes or (raw and not window)):
            raise UserError("--unit cells: needs a --tile-size above 0, and for ct a --window")
        real = [Path(folder).resolve() for folder in folders]
        if any(a == b or a in b.parents for a, b in itertools.permutations(real, 2)):
            raise UserError(f"--data names a folder twice, or one in another: {folders}")
        sizes, squares, first = [], [], 0
        for folder in folders:
            paths, last = find_images(folder, self.notes), first
            if not paths:
                raise UserError(f"no images in {folder!r} or below: none of {' '.join(EXTENSIONS)}")
            for path, look in zip(paths, in_threads(self.look, paths)):
                if isinstance(look, BadImage):
                    self.skipped[path] = look.reason
                    continue
                size, own = look
                squares.append(own)
                sizes.append(size)
                self.files.append(path)
                last += len(own)
            if last == first:
                self.notes.append(f"no {unit} found in {folder!r}")
            self.sources.append((first, last))
            first = last
        if len(self.skipped) > len(self.files):
            bad = BadImage(*next(iter(self.skipped.items())))
            raise UserError(f"{len(self.skipped)} of {len(self.skipped) + len(self.files)} images "
                            f"can't be read; the first is {bad}")
        self.sizes = np.array(sizes)  # of each image, [images, (height, width)]
        self.squares = np.concatenate(squares)  # side, top, left in the image of this number:
        self.image = np.repeat(np.arange(len(squares)), [len(own) for own in squares])
        self.kept, self.bytes = {}, 0  # decoded, the oldest first
        size = np.sort(self.sizes.prod(1)) * (4 if raw else 3)  # bytes
        most = len(size) if size.sum() <= KEEP else max((size.cumsum() <= KEEP / 2).sum(), 1)
        self.at_once = int(most)  # how many images are drawn from at a time

    def look(self, path):
        """(height, width) of an image and [n, 3]: side, top, left of its tiles; or its BadImage."""
        try:
            if self.unit == "tiles":
                h, w = size = read_image(path, header_only=True)
                squares = [(side, top, left) for side in self.tile_sizes
                           for top in window_starts(h, side) for left in window_starts(w, side)]
            else:
                image = read_image(path, window=self.window)
                size, dark = image.shape[:2], 255 - image if self.raw else image  # CT: bright
                squares = [(side, round(y - side / 2), round(x - side / 2))
                           for side in self.tile_sizes for x, y in find_cells(dark, side)]
        except BadImage as bad:
            return bad
        return size, np.array(squares, int).reshape(-1, 3)

    def __len__(self):
        return len(self.squares)

    def file_of(self, i):
        """Path of tile i's image."""
        return self.files[self.image[i]]

    def __getitem__(self, i):
        if i < 0:
            raise IndexError(f"tile {i}")
        number, (side, top, left) = self.image[i], self.squares[i]
        image = self.kept.pop(number, None)
        if image is None:
            image = read_image(self.files[number], window=self.window, raw=self.raw)
            if image.shape[:2] != tuple(self.sizes[number]):
                raise BadImage(self.files[number], "its size has changed since the run began")
            self.bytes += image.nbytes
            while self.bytes > KEEP and self.kept:
                self.bytes -= self.kept.pop(next(iter(self.kept))).nbytes
        self.kept[number] = image  # now the youngest
        return (image[top:top + side, left:left + side] if side else image).copy()

    def shuffled(self, first, last, rng, mix=0, batch=1, pools=1):
        """Tiles first..last-1 in random order, of as many images at a time as fill half of KEEP:
        each is decoded once an epoch, not once a tile (at 2560 x 1920 82% of loading, now 4%). mix:
        of at most so many, one a pool at least; of 1 come `batch` tiles in a row, repeated if there
        are fewer. pools: how many of these orders take turns, and share what is kept."""
        ids, image = np.unique(self.image[first:last], return_inverse=True)
        if mix == 1:
            own = np.split(np.arange(last - first), np.bincount(image).cumsum()[:-1])
            own = [rng.permutation(own[k]) for k in rng.permutation(len(ids))]
            own = [np.resize(tiles, max(len(tiles) // batch, 1) * batch) for tiles in own]
            return first + np.concatenate(own)
        at_once = self.at_once
        if mix or at_once < len(self.files):
            at_once = max(min(mix or at_once, at_once) // pools, 1)
        if at_once >= len(ids):
            return first + rng.permutation(last - first)
        place = rng.permutation(len(ids))[image] + rng.random(last - first) * at_once
        return first + np.argsort(place % len(ids))  # %: the last images' begin the epoch

# ----------------------------------------
# RedDino: 32 pixel transforms where DINOv2 has four. The release takes 33 of Albumentations 1.4,
# the paper counts 32; we leave out RandomFog (in 2.0.8 41 of 88 ms). Parameters are written out, as
# 2.0.8 has others (GaussNoise: a std of 51-112 grey levels, once 3-7), and so are five transforms.

class FancyPCA(A.FancyPCA):  # 4.3 -> 0.2 ms; 1.4 and AlexNet shift colours, 2.0.8 stretches them
    def apply(self, img, alpha_vector, **params):
        some = img.reshape(-1, 3)[::7] / 255  # every 7th pixel will do
        variances, axes = np.linalg.eigh(np.cov(some, rowvar=False))
        return cv2.add(img, (*np.rint(255 * axes @ (alpha_vector * variances)), 0))

class GlassBlur(A.ImageOnlyTransform):  # as 2.0.8, in 0.6 ms instead of 4: all pixels walk at once
    def apply(self, img, **params):
        walk = self.random_generator.integers(-4, 4, (2, 2, *img.shape[:2])).sum(0)  # of two steps
        y, x = np.float32(np.indices(img.shape[:2]) + walk)
        img = cv2.GaussianBlur(img, (0, 0), 0.7)
        img = cv2.remap(img, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
        return cv2.GaussianBlur(img, (0, 0), 0.7)

class ISONoise(A.ISONoise):  # 2.0.8 lost factors of 255 and 360: single white pixels, one hue
    def apply(self, img, color_shift, intensity, **params):
        hls = cv2.cvtColor(img / np.float32(255), cv2.COLOR_RGB2HLS)
        grain, shift = self.random_generator.standard_normal((2, *img.shape[:2]), np.float32)
        photons = 255 * intensity * float(hls[..., 1].std())  # 1.4: Poisson's mean; near normal
        grain = np.maximum(photons + math.sqrt(photons) * grain, 0)
        hls[..., 0] += 360 * color_shift * intensity * shift  # degrees; cv2 wraps them
        hls[..., 1] += grain / 255 * (1 - hls[..., 1])
        return cv2.convertScaleAbs(cv2.cvtColor(hls, cv2.COLOR_HLS2RGB), alpha=255)

class RandomRain(A.ImageOnlyTransform):  # 1.4 blurs all of the image, 2.0.8 the drops alone
    def apply(self, img, **params):
        h, w = img.shape[:2]
        tops = self.random_generator.integers((0, -20), (w, h), (h * w // 600, 2))
        slant = self.random_generator.integers(-10, 10), 20
        drops = np.stack((tops, tops + slant), 1).astype(np.int32)  # [drops, 2 ends, (x, y)]
        img = cv2.polylines(img.copy(), drops, False, (200, 200, 200))
        return cv2.convertScaleAbs(cv2.blur(img, (7, 7)), alpha=0.7)

class RandomSunFlare(A.ImageOnlyTransform):  # 1.4's middle is white, 2.0.8 dims it
    def apply(self, img, **params):
        h, w = img.shape[:2]
        middle_y, middle_x = self.random_generator.uniform(0, (h / 2, w))
        y, x = np.ogrid[:h, :w]
        near = np.float32(1 - np.hypot(y - middle_y, x - middle_x) / 400).clip(0)
        # what 40 white discs let through, radius 10 to 400, each opaque by (1 - radius / 400)^3
        passed = np.exp(-10 * near**4 - 3 * near**7)
        return (255 - (255 - img) * passed[..., None]).astype(np.uint8)

GROUPS = {"illumination and stain": [
    # stain batch, pH and age, lamp, exposure: every laboratory differs
    A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
    A.HueSaturationValue(hue_shift_limit=20, sat_shift_limit=30, val_shift_limit=20),
    A.RGBShift(r_shift_limit=20, g_shift_limit=20, b_shift_limit=20),  # white balance
    A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2),
    A.RandomGamma(gamma_limit=(80, 120)),  # the camera's response
    A.RandomToneCurve(scale=0.1, per_channel=False),
    FancyPCA(alpha=0.1),  # barely visible: a smear varies little
    A.CLAHE(clip_limit=(1, 4), tile_grid_size=(8, 8)),  # as viewing software lifts contrast
    A.Equalize(mode="cv", by_channels=True),  # beyond any stain: the background turns to noise
], "colour set aside": [
    # in no smear: they take colour away as a cue, so that shape and texture must do
    A.ChannelShuffle(),
    A.ChannelDropout(channel_drop_range=(1, 1), fill=0),
    A.InvertImg(),  # near a dark field
    A.Solarize(threshold_range=(128 / 255, 128 / 255)),
    A.Posterize(num_bits=4),
], "focus and edges": [
    # a 100x oil objective is in focus over 0.5 um, a cell is 2 um thick: some part is always soft
    A.Blur(blur_limit=(3, 7)),  # 1.4.3 drew 3-7 here and in MedianBlur, but by a slip used 3
    A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(0.8, 1.4)),  # 1.4: the kernel's own sigma
    A.MedianBlur(blur_limit=(3, 7)),  # denoising in the camera
    A.MotionBlur(blur_limit=(3, 7), allow_shifted=True),  # a moving stage; 1.4: a third more
    A.Defocus(radius=(3, 10), alias_blur=(0.1, 0.5)),  # at 10 a cell's inner structure is gone
    GlassBlur(),  # dirt, dried oil: rare and milder
    A.Sharpen(alpha=(0.2, 0.5), lightness=(0.5, 1.0), method="kernel"),  # cameras' default
    A.Emboss(alpha=(0.2, 0.5), strength=(0.2, 0.7)),  # oblique light or DIC
    A.RingingOvershoot(blur_limit=(7, 15), cutoff=(np.pi / 4, np.pi / 2)),  # closed condenser
], "sensor and file": [
    # short exposure, high gain. 1.4: 3.2-7.1 grey levels; 2.0.8 loses 0.4 by truncation
    A.GaussNoise(std_range=(3.6 / 255, 7.5 / 255), mean_range=(0, 0), per_channel=True),
    ISONoise(color_shift=(0.01, 0.05), intensity=(0.1, 0.5)),
    A.MultiplicativeNoise(multiplier=(0.9, 1.1), per_channel=False, elementwise=False),  # lamp
    A.Downscale(scale_range=(0.25, 0.25)),  # digital zoom, a lower objective; they alias less
    A.ImageCompression(compression_type="jpeg", quality_range=(99, 100)),  # files are worse
], "optics and debris": [
    # made for streets; a smear has dirt out of focus, reflections, at best scratches
    A.RandomShadow(shadow_roi=(0, 0.5, 1, 1), num_shadows_limit=(1, 2), shadow_dimension=5),
    RandomSunFlare(),
    RandomRain(),
    A.RandomSnow(snow_point_range=(0.1, 0.3), brightness_coeff=2.5, method="bleach"),
]}
TRANSFORMS = [t for group in GROUPS.values() for t in group]
FLIPS = [A.HorizontalFlip(), A.VerticalFlip(), A.RandomRotate90()]  # a smear has no up or left
for transform in TRANSFORMS + FLIPS:
    transform.p = 0.85  # RedDino: as the release, flips and turns too

# DINOv2's own, in this order, for the first and second global view and the local ones. Blur with
# 1.0, 0.1, 0.5 is what DINOv2 describes; its code hands 1 - p on: its models saw 0, 0.9, 0.5.
DINOV2 = [[
    A.HorizontalFlip(p=0.5),
    A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
    A.ToGray(p=0.2),
    A.GaussianBlur(blur_limit=(9, 9), sigma_limit=(0.1, 2.0), p=blur),
    A.Solarize(threshold_range=(128 / 255, 128 / 255), p=solarize),
] for blur, solarize in ((1.0, 0), (0.1, 0.2), (0.5, 0))]

# Other organs: short lists, in this order, each entry with the artefact that it mimics. Ranges are
# our choice, by the looks (figures.py SLICE --augment ct). What has a side is not mirrored: situs
# inversus is rare. `ct` is in HU up to its window; Rotate and Blur alone don't clip these to 0..1.

class RandomWindow(A.ImageOnlyTransform):
    """Values (or 8 bits: windowed already) -> 8 bits, as another scan had shown them: through one
    of the windows, by a lower dose (a quarter of the X-rays means twice the noise, in full 6 HU),
    by a softer reconstruction kernel, or a sharper one, as for bone."""

    def __init__(self, windows):
        super().__init__(p=1)
        self.windows = windows

    def apply(self, img, **params):
        eight = img.dtype == np.uint8
        level, width = (127.5, 255) if eight else self.py_random.choice(self.windows)
        level += width * self.py_random.uniform(-0.1, 0.1)
        width *= self.py_random.uniform(0.8, 1.25)
        sigma = 6 * math.sqrt(1 / self.py_random.uniform(1 / 16, 1) - 1)
        noise = self.random_generator.standard_normal(img.shape[:2], np.float32)
        values = np.ascontiguousarray((img.T + sigma * noise.T).T)  # .T: the same in all channels
        values += self.py_random.uniform(-1, 1) * (values - cv2.GaussianBlur(values, (0, 0), 0.9))
        return apply_window(values, level, width)

class Stain(A.ImageOnlyTransform):
    """More or less of each dye (Tellez et al. 2018); -log is density (Beer-Lambert)."""
    # of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001)
    HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

    def apply(self, img, **params):
        spread, rng = self.py_random.uniform(0, 0.3), self.random_generator
        dyes = rng.uniform(1 - spread, 1 + spread, (3, 1)) * self.HED
        more = spread / 10 * rng.uniform(-1, 1, 3) @ self.HED
        density = -np.log((img + np.float32(1)) / 256) @ np.linalg.inv(self.HED) @ dyes + more
        return np.rint(256 * np.exp(-density) - 1).clip(0, 255).astype(np.uint8)

TURN = A.Rotate((-8, 8), border_mode=cv2.BORDER_REPLICATE, p=0.5)  # gravity says what is up
WINDOW = RandomWindow([(-600, 1500), (40, 400), (400, 1800), (200, 700)])
SOFT = A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.5), p=0.3)
RECIPES = {"reddino": [[]], "none": [FLIPS], "dinov2": DINOV2, "ct": [[
    TURN,
    A.Blur(blur_limit=(3, 5), p=0.2),  # thick slices average what lies above each other
    WINDOW,  # of lung, soft tissue, bone or vessels; else --window
    A.MotionBlur(blur_limit=(3, 9), p=0.2),  # breath
    A.RandomToneCurve(scale=0.15, per_channel=False, p=0.5),  # when contrast agent came
]], "mri": [[
    A.HorizontalFlip(p=0.5),  # brains, knees, breasts are all but symmetric; not hearts or livers
    TURN,
    A.Illumination("gaussian", intensity_range=(0.05, 0.2), p=0.5),  # a coil hears what is near
    A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=0.3, p=0.5),  # there are no units
    A.RandomGamma(gamma_limit=(70, 140), p=0.5),  # echo and repetition times weigh tissues
    A.MotionBlur(blur_limit=(3, 7), p=0.2),  # breath, pulse
    A.RingingOvershoot(blur_limit=(7, 15), cutoff=(np.pi / 2, 3 * np.pi / 4), p=0.1),  # Gibbs
    A.GaussNoise(std_range=(0.01, 0.05), per_channel=False, p=0.5),  # Rician, in the dark, really
]], "xray": [[
    A.Affine(rotate=(-8, 8), translate_percent=(-0.1, 0.1), p=0.5),  # posture; black lead leaves
    A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),  # exposure
    A.RandomGamma(gamma_limit=(60, 160), p=0.5),  # tube voltage
    A.RandomToneCurve(scale=0.1, per_channel=False, p=0.3),  # the maker's look-up table
    SOFT,  # detector and focal spot
    A.GaussNoise(std_range=(0.01, 0.04), per_channel=False, p=0.3),  # few quanta
    A.InvertImg(p=0.05),  # exports that show bone black
]], "histology": [[
    A.D4(p=1),  # tissue has no up or left
    Stain(p=0.8),
    A.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02, p=0.5),  # the lamp
    SOFT,  # thick or folded sections, a lower objective
    A.ImageCompression(compression_type="jpeg", quality_range=(50, 95), p=0.3),  # as slides are
]]}
# histology without what blurs: in views of 40 pixels that erases what tells cells apart
RECIPES["cells"] = [RECIPES["histology"][0][:3]]

# ----------------------------------------
# Views. DINOv2's multi-crop: two global views for teacher and student, local ones for the student
# alone: from a twentieth to a third of the tile it must tell what the whole looks like.

GLOBAL_VIEWS = 2

def sample_rng(seed, index, epoch):
    """The random stream of a sample: of these three alone, whoever draws from it."""
    return np.random.default_rng((seed, index, epoch))

class MultiCrop:
    """mc(tile, rng): RGB uint8 [h, w, 3] -> global views uint8 [G, 3, S, S], local [L, 3, s, s].
    augment: one of RECIPES; "ct" takes values [h, w] too, and draws windows around `window` (level,
    width). unit "cells": what is cut out alone has no up or left, so TURN becomes all eight
    orientations. Global views show global_scale to all of the area, local ones 0.05 (DINOv2) to
    global_scale. All randomness comes from rng, see sample_rng."""

    def __init__(self, augment="reddino", global_size=224, local_size=98, local_crops=1,
                 global_scale=0.32, window=None, unit="tiles"):
        if augment not in RECIPES:
            raise UserError(f"--augment {augment!r}: it is one of {', '.join(RECIPES)}")
        self.augment, self.local_shape = augment, (-1, 3, local_size, local_size)
        instead = {TURN: A.D4(p=1)} if unit == "cells" else {}
        if window:
            instead[WINDOW] = RandomWindow([window])
        first, second, local = (RECIPES[augment] * 3)[:3]  # RECIPES have one list, or these three
        views = first, *[second] * (GLOBAL_VIEWS - 1), *[local] * local_crops
        self.recipe = [[instead.get(t, t) for t in view] for view in views]
        # Of aspect 3/4 to 4/3. Shrunk by averaging (the others skip pixels and alias), enlarged as
        # the release does, bilinearly, or as DINOv2, bicubically.
        enlarge = cv2.INTER_CUBIC if augment == "dinov2" else cv2.INTER_LINEAR
        resizing = {"interpolation": enlarge, "area_for_downscale": "image"}
        large = A.RandomResizedCrop([global_size] * 2, (global_scale, 1.0), **resizing)
        small = A.RandomResizedCrop([local_size] * 2, (0.05, global_scale), **resizing)
        self.crops = [large] * GLOBAL_VIEWS + [small] * local_crops

    def __call__(self, tile, rng):
        # Albumentations draws from these two; its own (2.0.8) repeat in each worker and epoch.
        python_rng, views = random.Random(int(rng.integers(2**62))), []
        for crop, transforms in zip(self.crops, self.recipe):
            if self.augment == "reddino":  # RedDino: four different ones of 32, each with its p
                transforms = python_rng.sample(TRANSFORMS, 4) + FLIPS
            view = tile
            for transform in (crop, *transforms):  # cropped first: colour work costs by the pixel
                transform.set_random_state(rng, python_rng)
                view = transform(image=view)["image"]
            views.append([view] * 3 if view.ndim == 2 else view.transpose(2, 0, 1))  # [3, s, s]
        local = np.array(views[GLOBAL_VIEWS:], np.uint8).reshape(self.local_shape)
        return np.array(views[:GLOBAL_VIEWS]), local

# ----------------------------------------
# Batches. Sample n of a run is number n % length of a shuffle of epoch n // length: each tile once
# an epoch, across all processes, and the place in the data is the step alone. Masks hide parts of
# half of the global views; the student has to fill them in (iBOT, DINOv2).

def mask_ratios(seed, step, views):
    """Share of patches to mask in each of a step's global views, [views]: 0 for a random half, the
    others spread evenly over 0.1 to 0.5: each batch holds easy and hard ones."""
    rng = np.random.default_rng((seed, step, 2))  # 2: a stream of its own
    ratios, masked = np.zeros(views), views // 2
    spread = (np.arange(masked) + rng.random(masked)) / max(masked, 1)
    ratios[rng.permutation(views)[:masked]] = 0.1 + 0.4 * spread
    return ratios

def block_mask(rng, height, width, ratio):
    """bool [height, width], about ratio*height*width patches set, in rectangles (BEiT, Bao et al.
    2021): single ones could be filled in from their neighbours. A rectangle has 4 patches to what
    is left, of which it never adds more, aspect log-uniform in 0.3 to 1/0.3; 10 misses end it."""
    mask, left, misses = np.zeros((height, width), bool), int(ratio * height * width), 0
    while left > 0 and misses < 10:
        area = 4 + (left - 4) * rng.random()
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        misses += 1
        if 0 < h < height and 0 < w < width:
            top, side = rng.integers(height - h + 1), rng.integers(width - w + 1)
            block = mask[top:top + h, side:side + w]
            new = np.count_nonzero(~block)
            if 0 < new <= left:
                block[:] = True
                left, misses = left - new, 0
    return mask

class Batches:
    """batches[step]: what this process trains on, a function of cfg.seed and the step alone:
    global views uint8 [B, G, 3, S, S], local ones [B, L, 3, s, s], masks bool [B, G, N], numbers of
    the tiles, {path: reason} of what could not be read. UserError where no tile of 20 could."""

    def __init__(self, cfg, tiles, patch_size, rank=0, world=1):
        self.cfg, self.tiles, self.grid = cfg, tiles, cfg.global_size // patch_size
        self.crop = MultiCrop(cfg.augment, cfg.global_size, cfg.local_size, cfg.local_crops,
                              cfg.global_scale, cfg.window, cfg.unit)
        self.rank, self.world = rank, world
        sources = tiles.sources if cfg.balance else [(0, len(tiles))]  # they take turns
        self.pools = [(first, last) for first, last in sources if last > first]
        self.orders = [(0, self.order(pool, 0)) for pool in range(len(self.pools))]

    def order(self, pool, epoch):
        """The tiles of a pool as they come in an epoch."""
        rng = np.random.default_rng((self.cfg.seed, epoch, pool, 1))  # 1: a stream of its own
        return self.tiles.shuffled(*self.pools[pool], rng, self.cfg.mix, self.cfg.batch_size,
                                   len(self.pools))

    def draws(self, step):
        """Yields this process's samples of a step, each as epoch, tile, mask ratios."""
        size = self.cfg.batch_size
        ratios = mask_ratios(self.cfg.seed, step, size * GLOBAL_VIEWS).reshape(size, GLOBAL_VIEWS)
        for sample in range(step * size, (step + 1) * size)[self.rank::self.world]:
            row = size if self.cfg.mix == 1 else 1  # samples that a folder gives in a row
            turn, pool = divmod(sample // row, len(self.pools))
            epoch, place = divmod(turn * row + sample % row, len(self.orders[pool][1]))
            if self.orders[pool][0] != epoch:
                self.orders[pool] = epoch, self.order(pool, epoch)
            tile = int(self.orders[pool][1][place])
            if self.cfg.mix == 1:  # a tile may come twice in an epoch: each time with other views
                epoch = sample
            yield epoch, tile, tuple(ratios[sample % size])

    def views(self, epoch, index, ratios):
        """What __getitem__ gives, of one sample."""
        rng, faults = sample_rng(self.cfg.seed, index, epoch), {}
        for _ in range(20):
            try:
                views = self.crop(self.tiles[index], rng)
                masks = [block_mask(rng, self.grid, self.grid, ratio).ravel() for ratio in ratios]
                return *views, np.stack(masks), index, faults
            except BadImage as bad:  # another takes its place, in a repetition the same
                faults[bad.path], last = bad.reason, bad
                index = int(rng.integers(len(self.tiles)))
        raise UserError(f"20 images in a row can't be read, is the folder still there? {last}")

    def __getitem__(self, step):
        samples = [self.views(*drawn) for drawn in self.draws(step)]
        *arrays, indices, faults = zip(*samples)
        return *map(np.stack, arrays), list(indices), dict(ChainMap(*faults))

def batches(cfg, tiles, start, patch_size, rank, world, workers, pin):
    """This process's batches as tensors, from step `start` on; None once a second while there is
    none yet. Its end is that of its `workers`. Masks lie on patch_size's grid; pin: for a GPU."""
    of_step, steps = Batches(cfg, tiles, patch_size, rank, world), range(start, cfg.iters)
    made = from_workers(of_step, steps, workers) if workers else map(of_step.__getitem__, steps)
    for batch in made:
        if batch is not None:
            tensors = [torch.from_numpy(array) for array in batch[:3]]
            batch = *[t.pin_memory() if pin else t for t in tensors], *batch[3:]
        yield batch

def work(of_step, steps, end, pipes):
    """A loading process: sends the batches of `steps`, or its error. Signals are its parent's."""
    for pipe in pipes:  # so that sending fails when the parent is gone
        pipe.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        for step in steps:
            end.send(of_step[step])
    except BrokenPipeError:
        return
    except Exception as error:
        error.add_note(traceback.format_exc())  # which pickling would lose
        end.send(error)

LOADER_TIMEOUT = 300  # seconds without a batch

def from_workers(of_step, steps, workers):
    """The batches, or None, by processes in turn; UserError if one is gone or stands still. A pipe
    ends with its process. (DataLoader waits for ever for the rest of a dead one's batch, and lays
    tensors into /dev/shm, of which Docker has 64 MB.)"""
    pipes, processes = [], []
    for first in range(workers):
        pipe, end = multiprocessing.Pipe(duplex=False)
        pipes.append(pipe)
        args = of_step, steps[first::workers], end, pipes
        processes.append(multiprocessing.Process(target=work, args=args, daemon=True))
        processes[-1].start()
        end.close()  # now the process alone holds it
    thread = ThreadPoolExecutor(1)  # recv can't be interrupted
    coming = thread.submit(pipes[0].recv)
    try:
        for turn in range(1, len(steps) + 1):
            waited = 0
            while not wait([coming], timeout=1).done:
                yield None
                waited += 1
                if waited == LOADER_TIMEOUT:
                    raise UserError(f"no batch for {waited} s: a file that takes for ever, or a "
                                    "stopped process; --workers 0 shows which")
            batch = coming.exception() or coming.result()
            if isinstance(batch, EOFError | OSError):
                yield None  # its signal may be the parent's too
                raise UserError("a loading process was killed: out of memory? Try fewer --workers")
            if isinstance(batch, Exception):
                raise batch
            coming = thread.submit(pipes[turn % workers].recv)  # while this one is trained on
            yield batch
    finally:
        for process in processes:
            process.kill()
            process.join(5)  # until then it holds our lock
        thread.shutdown(wait=False)

def normalise(views, device, dtype):
    """uint8 crops to the device (a quarter of floats' bytes), there to ImageNet's mean 0, std 1."""
    mean, std = torch.tensor((MEAN, STD), device=device, dtype=dtype).view(2, 3, 1, 1)
    return (views.to(device, non_blocking=True).to(dtype) / 255 - mean) / std
