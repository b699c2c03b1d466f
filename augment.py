"""From an image file to training views: patches of smears, RedDino's 32 pixel transforms, multi-crop.

    python augment.py SMEAR.jpg -o gallery.png --seed 0     draws every transform by name on that smear
    python augment.py SLICE.npy --augment ct                those of another organ's recipe

An image travels through read_image (or is a BadImage), Patches (its 224 x 224 windows), MultiCrop (2 global and n
local views, each through some of TRANSFORMS). Pixels are RGB uint8 all the way (for `ct` values until RandomWindow, as
a window throws most of them away); the device normalises them.
Papers: RedDino (Zedda et al., MICCAI 2025), DINOv2 (Oquab et al., 2023), multi-crop (SwAV, Caron et al., 2020).
"""
import argparse
import contextlib
import itertools
import logging
import math
import os
import random
import signal
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before its import, or it asks the network for a newer version
import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

cv2.setNumThreads(0)  # DataLoader workers are the parallelism; OpenCV's own threads would fight them for cores
warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a file is said once, by BadImage
logging.getLogger("PIL").setLevel(logging.CRITICAL)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB in 0..1, which DINOv2's weights expect
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy")
MAX_PIXELS = 40_000_000  # 6,324 x 6,324; reading one takes up to 0.9 GiB (WebP with transparency that EXIF turns)

class UserError(Exception):
    """What the user can put right: main() prints it as one line and exits with code 2."""

class BadImage(Exception):
    """A file that gives no pixels: .path, and .reason in one line. Training lists it once and goes on."""

    def __init__(self, path, reason):
        self.path, self.reason = path, " ".join(str(reason).split())[:200]
        super().__init__(path, self.reason)  # args are what survives pickling, on the way out of a worker

    def __str__(self):
        return f"{self.path!r}: {self.reason}"  # !r: names with newlines or broken UTF-8 print on one line too

# ---------------------------------------------------------------------------------------------------------------------
# Files. Whatever a folder collected over years holds ends as RGB pixels or as one BadImage, never as a surprise.

def find_images(folder):
    """Paths of all images below `folder`, by extension, sorted. Hidden files and links to folders are left out."""
    def unlistable(error):
        raise UserError(f"{error.filename!r} is not a folder that can be listed: {error.strerror}")

    return sorted(os.path.join(here, name) for here, _, names in os.walk(folder, onerror=unlistable) for name in names
                  if name.lower().endswith(EXTENSIONS) and not name.startswith("."))

def apply_window(values, level, width):
    """Values of any unit -> uint8: level - width/2 and less is black, level + width/2 and more is white (DICOM PS3.3
    C.11.2.1.3.2, LINEAR_EXACT). CT counts in Hounsfield units, HU: air -1000, fat -100, water 0, muscle 50, bone 1000.
    """
    return (255 / width * (values - (level - width / 2))).clip(0, 255).astype(np.uint8)

def check_window(window):
    """UserError unless it is none, or a level and a width."""
    if window and not (len(window) == 2 and window[1] > 0 and np.isfinite(window).all()):
        raise UserError("--window takes LEVEL and WIDTH, finite, the width above 0")

def _deep(grey, window, raw):
    """Grey of more than 8 bits [H, W] -> RGB uint8 [H, W, 3]; raw: as float32 [H, W]. NaN, inf count as the lowest."""
    with np.errstate(over="ignore"):
        values = np.array(grey, np.float32, order="C")
    values = np.where(finite := np.isfinite(values), values, values.min(where=finite, initial=0))
    if not raw and not window:
        # Cameras leave the top bits of 16 unused, so full scale is the smallest of 8, 10, 12, 14, 16 bits that holds
        # the brightest pixel: stretching by the file's own range would undo its exposure.
        if (brightest := values.max()) < -10 * values.min():  # a little below 0 is noise
            raise ValueError("values far below 0: say --window LEVEL WIDTH, for a CT in HU e.g. 40 400")
        full = next((2**b - 1 for b in (8, 10, 12, 14, 16) if brightest < 2**b), brightest)
        full = 1 if grey.dtype.kind == "f" and brightest <= 1 else full  # floats in 0..1
    return values if raw else np.dstack([apply_window(values, *window or (full / 2, full))] * 3)

def _slice(path):
    """What np.save wrote of a slice, [H, W] or uint8 [H, W, 3]; mapped, so that pixels are read when asked for."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    grey, rgb = values.ndim == 2 and values.dtype.kind in "iuf", values.shape[2:] == (3,) and values.dtype == np.uint8
    if not values.size or not (grey or rgb):
        raise ValueError(f"it holds {values.dtype} {list(values.shape)}")
    return values

def _to_rgb(im):
    """A PIL image of at most 8 bits a channel -> RGB."""
    if "A" in im.mode or "a" in im.mode or "transparency" in im.info:
        im = im.convert("RGBA")  # onto white: what a bright field shows where there is nothing
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return im if im.mode == "RGB" else im.convert("RGB")  # CMYK too: PIL knows that Adobe's JPEGs hold it inverted

def read_image(path, header_only=False, writable=True, window=None, raw=False):
    """A file's pixels, RGB uint8 [H, W, 3], upright by its EXIF, first frame or page. Raises BadImage, nothing else.
    header_only: (H, W) instead, without decoding. writable=False spares a copy: 2.4 for 4.5 ms at 640 x 480.
    Grey of more than 8 bits, e.g. what np.save wrote of a slice [H, W], is made 8 bit by window (level, width) in its
    own units, else by its depth; or stays as it is (raw): float32 [H, W]. Then, without a window, its unit is HU."""
    npy = str(path).lower().endswith(".npy")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")  # opening a named pipe would wait for ever
        with contextlib.nullcontext(_slice(path)) if npy else Image.open(path) as im:
            height, width = im.shape[:2] if npy else (im.height, im.width)
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            kind = im.mode if not npy else im.dtype.str[1:] if im.ndim == 2 else "RGB"  # I, F, I;16, u1, i2, f4, ...
            unsigned = kind.startswith(("I;16", "u2", "u4", "u8"))
            if raw and unsigned and not window:
                raise ValueError("no sign: is water 0, 1024, 32768? --window LEVEL WIDTH in their units, e.g. 1064 400")
            # PIL turns a TIFF by itself. In a PNG only EXIF ahead of the pixels counts: looking behind decodes them.
            asks = not npy and im.format != "TIFF" and (im.format != "PNG" or "exif" in im.info)
            orientation = im.getexif().get(0x0112, 1) if asks else 1  # 1 upright; 5 to 8 swap width and height
            if header_only:
                return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
            if not npy:
                im.load()
                im = im if orientation == 1 else ImageOps.exif_transpose(im)
            if unsigned or kind[0] in "IFif":
                return _deep(np.asarray(im), window, raw)
            im = _to_rgb(Image.fromarray(im) if npy else im)
            return np.array(im) if writable else np.asarray(im)
    except Image.DecompressionBombError:  # a header of 60,000 x 60,000 costs a few bytes; its pixels would cost 10 GB
        reason = f"too large: over {MAX_PIXELS:,} pixels"
    except Image.UnidentifiedImageError:
        reason = "not an image, or of a kind that can't be read"
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, KeyError, MemoryError, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if npy and not isinstance(error, OSError) and "--window" not in reason:
            reason = f"np.save one slice a file, numbers [H, W] or uint8 [H, W, 3] ({reason})"
    raise BadImage(path, reason)

# ---------------------------------------------------------------------------------------------------------------------
# Patches. RedDino: patches cut from whole smears beat segmented cells, so an image counts as its 224 x 224 windows.
# A bare grid drops 35% of a 640 x 480 smear; windows spread evenly from edge to edge (3 x 3, overlapping by 16 and 96
# pixels) keep all of it. Every read decodes the whole file: 2.4 ms for a 640 x 480 JPEG, a third of what its views take
# at 224 pixels, twice what nano's take. So smears are kept, decoded, as far as KEEP bytes reach.
KEEP = 600e6  # decoded, in each loading process: 650 smears of 640 x 480

def window_starts(length, patch_size):
    """Where the fewest windows begin that cover 0..length, evenly spaced; one (the whole) if patch_size is 0."""
    n = math.ceil(length / patch_size) if patch_size else 1
    return [round(k * (length - patch_size) / (n - 1)) for k in range(n)] if n > 1 else [0]

class Patches:
    """Folders of images as one list of patches: p[i] -> RGB uint8 [h, w, 3], h and w at most patch_size (0: any), or
    BadImage. A longer side is cut into windows, a shorter one kept whole; of several patch sizes each cuts all of the
    image: as all views end at one size, these are magnifications. window, raw: see read_image. Only headers are read
    here. files: paths. sources: (folder, first patch, one past the last) for each folder. skipped: {path: reason}.
    Raises UserError for a folder missing, given twice or without images, and if most files are unreadable."""

    def __init__(self, folders, patch_size=224, window=None, raw=False):
        self.patch_sizes, self.files, self.sources, self.skipped = np.atleast_1d(patch_size).tolist(), [], [], {}
        self.reading = {"window": window, "raw": raw}
        self.sizes, ends = [], [0]  # of each file: (height, width); one past its last patch
        if len({os.path.realpath(f) for f in folders}) < len(folders):
            raise UserError(f"--data names a folder twice: {' '.join(map(repr, folders))}")
        for folder in folders:
            begin, found = ends[-1], find_images(folder)
            if not found:
                raise UserError(f"no images in {folder!r} or below it; looked for {' '.join(EXTENSIONS)}")
            with ThreadPoolExecutor(16) as pool:  # mostly waiting for the disk or the network
                headers = [pool.submit(read_image, path, header_only=True, **self.reading) for path in found]
            for path, header in zip(found, headers):
                if bad := header.exception():
                    self.skipped[path] = bad.reason
                    continue
                self.files.append(path)
                self.sizes.append(header.result())
                ends.append(ends[-1] + len(self.windows(self.sizes[-1])))
            self.sources.append((folder, begin, ends[-1]))
        if len(self.skipped) > len(self.files):
            raise UserError(f"{len(self.skipped)} of {len(self.skipped) + len(self.files)} images can't be read; the "
                            f"first is {BadImage(*next(iter(self.skipped.items())))}")
        self.sizes, self.ends = np.array(self.sizes), np.array(ends[1:])  # arrays: a forked worker copies none of them
        largest = (4 if raw else 3) * int(self.sizes.prod(1).max(initial=1))
        self.kept, self.open = {}, max(int(KEEP // largest), 1)  # decoded, the oldest first; how many at most

    def __len__(self):
        return int(self.ends[-1])

    def windows(self, shape):
        """Side, top and left of all patches of an image of this shape, magnification by magnification."""
        return [(size, *corner) for size in self.patch_sizes
                for corner in itertools.product(*(window_starts(side, size) for side in shape))]

    def file_number(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"patch {i} of {len(self)}")
        return np.searchsorted(self.ends, i, side="right")

    def file_of(self, i):
        return self.files[self.file_number(i)]

    def shuffled(self, first, last, rng, mix=0):
        """Patches first..last-1 in random order, those of `mix` smears at a time (0: of all), or of as many as can be
        kept: then each is decoded once, not once a patch (at 2560 x 1920 decoding was 82% of loading, and is 4%)."""
        files = np.searchsorted(self.ends, np.arange(first, last), side="right")
        present, smear = np.unique(files, return_inverse=True)
        at_once = min(mix or len(present), len(present) if len(present) <= self.open else max(self.open / 2, 1))
        if at_once == len(present):
            return first + rng.permutation(last - first)
        place = rng.permutation(len(present))[smear] + rng.random(last - first) * at_once
        return first + np.argsort(place % len(present))  # %: the last smears' late patches begin the epoch

    def __getitem__(self, i):
        f = self.file_number(i)
        image = self.kept.pop(f, None)
        if image is None:
            image = read_image(self.files[f], writable=False, **self.reading)
            if image.shape[:2] != tuple(self.sizes[f]):
                raise BadImage(self.files[f], "its size has changed since the run began")
            while len(self.kept) >= self.open:
                del self.kept[next(iter(self.kept))]
        self.kept[f] = image
        size, y, x = self.windows(image.shape[:2])[i - self.ends[f]]  # counted from the end: negative
        return image[y:y + (size or MAX_PIXELS), x:x + (size or MAX_PIXELS)].copy()

# ---------------------------------------------------------------------------------------------------------------------
# RedDino: 32 pixel transforms where DINOv2 has four. Its release switches on 33 of Albumentations' by name, at the
# defaults of the library's 1.4; the paper counts 32. We leave out RandomFog, which alone takes 41 of their 88 ms.
# Every parameter is written out, for the names alone mean something else in 2.0.8 (GaussNoise went from a standard
# deviation of 3-7 grey levels to 51-112). Six do something else there, or take long; their form in 1.4 follows.
# Times: one 224 x 224 image on one core, 2.0.8's -> ours.

class FancyPCA(A.FancyPCA):  # 7.7 -> 0.5 ms; 2.0.8 stretches colours along the axes, 1.4 (and AlexNet) shift them
    def apply(self, img, alpha_vector, **params):
        variances, axes = np.linalg.eigh(np.cov(img.reshape(-1, 3)[::7] / 255, rowvar=False))  # every 7th pixel will do
        return cv2.add(img, (*np.rint(255 * axes @ (alpha_vector * variances)), 0))

class GlassBlur(A.GlassBlur):  # 13.8 -> 0.8 ms; each pixel comes from a random walk of `iterations` steps away
    def get_params_dependent_on_data(self, params, data):
        shape = (self.iterations, 2, *params["shape"][:2])
        steps = self.random_generator.integers(-self.max_delta, self.max_delta, shape, np.int8)
        return {"source": np.indices(shape[2:], np.int16) + steps.sum(0, np.int16)}  # [(y, x), h, w]

    def apply(self, img, source, **params):
        img = cv2.GaussianBlur(img, (0, 0), self.sigma)
        img = cv2.remap(img, cv2.merge(source[::-1]), None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
        return cv2.GaussianBlur(img, (0, 0), self.sigma)

class ISONoise(A.ISONoise):  # 3.2 -> 1.5 ms; 2.0.8 lost factors of 255 and 360: no hue noise, sparse specks for grain
    def apply(self, img, color_shift, intensity, random_seed, **params):
        hue, lightness, saturation = cv2.split(cv2.cvtColor(img / np.float32(255), cv2.COLOR_RGB2HLS))
        colour, grain = np.random.default_rng(random_seed).standard_normal((2, *img.shape[:2]), np.float32)
        hue += colour * (360 * color_shift * intensity)  # degrees; cv2 wraps them
        photons = 255 * intensity * float(lightness.std())  # 1.4 draws Poisson numbers of this mean; near normal
        lightness += np.maximum(grain * math.sqrt(photons) + photons, 0) * (1 - lightness) / 255
        return cv2.convertScaleAbs(cv2.cvtColor(cv2.merge((hue, lightness, saturation)), cv2.COLOR_HLS2RGB), alpha=255)

class RandomRain(A.RandomRain):  # 1.4 blurs and darkens all of the image, 2.0.8 blurs the drops alone
    def get_params_dependent_on_data(self, params, data):
        h, w = params["shape"][:2]
        tops = self.random_generator.integers((0, -self.drop_length), (w, h), (h * w // 600, 2))  # 1.4's density
        ends = tops + np.array([int(self.py_random.uniform(*self.slant_range)), self.drop_length])
        return {"drops": np.stack((tops, ends), 1).astype(np.int32)}  # [drops, 2 ends, (x, y)]

    def apply(self, img, drops, **params):
        img = cv2.polylines(img.copy(), drops, False, self.drop_color, self.drop_width)
        return cv2.convertScaleAbs(cv2.blur(img, (self.blur_value,) * 2), alpha=self.brightness_coefficient)

class RandomShadow(A.RandomShadow):  # 1.4 halves HLS lightness, which keeps the saturation; 2.0.8 halves RGB
    def apply(self, img, vertices_list, **params):
        mask, hls = np.zeros(img.shape[:2], np.uint8), cv2.cvtColor(img, cv2.COLOR_RGB2HLS)
        for corners in vertices_list:
            cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
        hls[..., 1] >>= mask
        return cv2.cvtColor(hls, cv2.COLOR_HLS2RGB)

class RandomSunFlare(A.RandomSunFlare):  # 7.3 -> 0.9 ms; 2.0.8 dims the flare, in 1.4 its middle is pure white
    def apply(self, img, flare_center, circles, **params):
        ghosts = img.copy()
        for alpha, centre, radius, colour in circles:
            cv2.circle(ghosts, centre, radius, colour, -1)
            img = cv2.addWeighted(ghosts, alpha, img, 1 - alpha, 0)
        # 40 white discs laid over each other, the smallest opaque: at distance d all those of radius d or more count.
        discs = self.src_radius // 10
        radii, opaque = np.linspace(1, self.src_radius, discs).astype(int), np.linspace(1, 0, discs) ** 3
        passed = np.append(np.cumprod(1 - opaque[::-1])[::-1], 1)  # share of the image seen through discs i and larger
        y, x = np.ogrid[:img.shape[0], :img.shape[1]]
        d = np.sqrt((x - flare_center[0]) ** 2 + (y - flare_center[1]) ** 2, dtype=np.float32).round().astype(np.int32)
        passed = passed[np.searchsorted(radii, np.arange(d.max() + 1))].astype(np.float32)
        return (255 - (255 - img) * passed[d][..., None]).astype(np.uint8)

P = 0.85  # of each transform drawn, and of each flip (release)
GROUPS = {
    # Stain batch, pH and age, lamp and exposure: every laboratory differs in these, every smear shows them.
    "illumination and stain": [
        A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.2, 0.2), p=P),
        A.HueSaturationValue(hue_shift_limit=(-20, 20), sat_shift_limit=(-30, 30), val_shift_limit=(-20, 20), p=P),
        A.RGBShift(r_shift_limit=(-20, 20), g_shift_limit=(-20, 20), b_shift_limit=(-20, 20), p=P),  # white balance
        A.RandomBrightnessContrast(brightness_limit=(-0.2, 0.2), contrast_limit=(-0.2, 0.2), p=P),
        A.RandomGamma(gamma_limit=(80, 120), p=P),  # the camera's response
        A.RandomToneCurve(scale=0.1, per_channel=False, p=P),
        FancyPCA(alpha=0.1, p=P),  # hardly anything: 1 grey level on a smear, for the variances are small
        A.CLAHE(clip_limit=(1, 4), tile_grid_size=(8, 8), p=P),  # contrast as viewing software lifts it
        A.Equalize(mode="cv", by_channels=True, p=P),  # stronger than any stain: the background turns to noise
    ],
    # No smear shows these. They take colour away as a cue, so that shape and texture must do.
    "colour set aside": [
        A.ChannelShuffle(p=P),
        A.ChannelDropout(channel_drop_range=(1, 1), fill=0, p=P),
        A.InvertImg(p=P),  # near a dark field
        A.Solarize(threshold_range=(128 / 255, 128 / 255), p=P),
        A.Posterize(num_bits=4, p=P),
    ],
    # A 100x oil objective is in focus over about 0.5 um, a cell is 2 um thick: some part of a smear is always soft.
    "focus and edges": [
        A.Blur(blur_limit=(3, 7), p=P),  # 1.4.3 drew 3-7 here and for MedianBlur, but by a slip always used 3
        A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(0.8, 1.4), p=P),  # 1.4: the sigma that belongs to the kernel
        A.MedianBlur(blur_limit=(3, 7), p=P),  # denoising in the camera
        A.MotionBlur(blur_limit=(3, 7), allow_shifted=True, p=P),  # a moving stage; 2.0.8 smears a third less far
        A.Defocus(radius=(3, 10), alias_blur=(0.1, 0.5), p=P),  # the upper end loses a cell's inner structure
        GlassBlur(sigma=0.7, max_delta=4, iterations=2, p=P),  # dirt on the lens, dried oil: rare and milder
        A.Sharpen(alpha=(0.2, 0.5), lightness=(0.5, 1.0), method="kernel", p=P),  # the camera's default, often
        A.Emboss(alpha=(0.2, 0.5), strength=(0.2, 0.7), p=P),  # oblique light or DIC
        A.RingingOvershoot(blur_limit=(7, 15), cutoff=(math.pi / 4, math.pi / 2), p=P),  # condenser closed too far
    ],
    "sensor and file": [
        # Short exposure, high gain. 1.4's variance of 10-50 is 3.2-7.1 grey levels; 2.0.8 loses 0.4 by truncation.
        A.GaussNoise(std_range=(3.6 / 255, 7.5 / 255), mean_range=(0, 0), per_channel=True, p=P),
        ISONoise(color_shift=(0.01, 0.05), intensity=(0.1, 0.5), p=P),
        A.MultiplicativeNoise(multiplier=(0.9, 1.1), per_channel=False, elementwise=False, p=P),  # lamp flicker
        A.Downscale(scale_range=(0.25, 0.25), p=P,  # a lower objective or digital zoom; real ones do not alias so
                    interpolation_pair={"downscale": cv2.INTER_NEAREST, "upscale": cv2.INTER_NEAREST}),
        A.ImageCompression(compression_type="jpeg", quality_range=(99, 100), p=P),  # all but lossless; files are worse
    ],
    # Made for photographs of streets. What a smear has of the kind is named behind each.
    "optics and debris": [
        RandomShadow(shadow_roi=(0, 0.5, 1, 1), num_shadows_limit=(1, 2), shadow_dimension=5, p=P),  # dirt out of focus
        RandomSunFlare(flare_roi=(0, 0, 1, 0.5), src_radius=400, src_color=(255, 255, 255), angle_range=(0, 1),
                       num_flare_circles_range=(6, 10), p=P),  # a reflection; this one hides half of the view
        RandomRain(slant_range=(-10, 10), drop_length=20, drop_width=1, drop_color=(200, 200, 200), blur_value=7,
                   brightness_coefficient=0.7, p=P),  # nothing: scratches come closest
        A.RandomSnow(snow_point_range=(0.1, 0.3), brightness_coeff=2.5, method="bleach", p=P),  # nothing: turns pale
    ],
}
TRANSFORMS = [t for group in GROUPS.values() for t in group]

# DINOv2's own, in this order, for the first and second global view and the local ones. Blur with 1.0, 0.1, 0.5 is what
# DINOv2 describes; its code hands 1 - p to the transform, so that its models saw 0, 0.9, 0.5.
DINOV2 = [[
    A.HorizontalFlip(p=0.5),
    A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1), p=0.8),
    A.ToGray(p=0.2),
    A.GaussianBlur(blur_limit=(9, 9), sigma_limit=(0.1, 2.0), p=blur),
    A.Solarize(threshold_range=(128 / 255, 128 / 255), p=solarize),
] for blur, solarize in ((1.0, 0), (0.1, 0.2), (0.5, 0))]

# Other organs: short lists, all of it in this order, each entry with the artefact that it mimics. Grey stays grey, and
# nothing is mirrored where organs have a side: a mirrored chest is situs inversus, a rare abnormality that has to stay
# one. Ranges are our choice, by the looks (augment.py SLICE --augment ct). `ct` computes in HU up to its window, by
# what is ours here, Rotate and Blur: the library's other filters clip floats to 0..1 without a word.

class RandomWindow(A.ImageOnlyTransform):  # values or 8 bit -> 8 bit; 8 bit has been through some window already
    def __init__(self, windows):
        super().__init__(p=1)
        self.windows = windows

    def apply(self, img, **params):
        level, width = (127.5, 255) if img.dtype == np.uint8 else self.py_random.choice(self.windows)
        level, width = level + width * self.py_random.uniform(-0.1, 0.1), width * self.py_random.uniform(0.8, 1.25)
        return apply_window(img.astype(np.float32), level, width)

class Effect(A.ImageOnlyTransform):
    """One of the functions below: float32 [H, W, C], rng, and numbers, each drawn evenly from its range in `ranges`."""
    def __init__(self, function, p, **ranges):
        super().__init__(p=p)
        self.function, self.ranges = function, ranges

    def apply(self, img, **params):
        drawn = {name: self.py_random.uniform(*ends) for name, ends in self.ranges.items()}
        x = self.function(img.astype(np.float32).reshape(*img.shape[:2], -1), self.random_generator, **drawn)
        x = x.astype(np.float32).reshape(img.shape)
        return np.rint(x).clip(0, 255).astype(np.uint8) if img.dtype == np.uint8 else x

def noise(x, rng): return rng.standard_normal((*x.shape[:2], 1), np.float32)  # the same in all channels

def low_dose(x, rng, dose):  # a quarter of the X-rays, twice the noise: 6 HU at full dose
    return x + 6 / math.sqrt(dose) * noise(x, rng)

def kernel(x, rng, sharpness, sigma):  # -1: a Gaussian blur, as for soft tissue; 1: edges and noise, as for bone
    return x + sharpness * (x - cv2.GaussianBlur(x, (0, 0), sigma).reshape(x.shape))

def bias_field(x, rng, strength):  # a coil hears best what is near: brightness drifts, smoothly, by a factor
    log = cv2.resize(rng.normal(0, strength, (3, 3)), x.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return x * np.exp(log)[..., None]

def ghosting(x, rng, copies, share):  # breath, pulse: in k-space all but each n-th line are weaker by `share`, which
    n, axis = int(copies), rng.integers(2)  # amounts to n faint copies along the phase-encoding axis
    return (1 - share) * x + share / n * sum(np.roll(x, k * x.shape[axis] // n, axis) for k in range(n))

def rician(x, rng, sigma):  # magnitude of a signal with noise in both its parts: the dark gets brighter
    return np.hypot(x + sigma * noise(x, rng), sigma * noise(x, rng))

def collimation(x, rng, most):  # lead leaves around the field, black
    (h, w), field = x.shape[:2], np.zeros_like(x)
    top, bottom, left, right = (rng.uniform(-most, most, 4).clip(0) * (h, h, w, w)).astype(int)
    field[top:h - bottom, left:w - right] = 1
    return field * x

def grid_lines(x, rng, period, depth):  # of the grid that holds back scattered rays
    wave = 1 + depth * np.sin(2 * np.pi / period * np.arange(max(x.shape)) + rng.uniform(0, 2 * np.pi))
    return x * (wave[:x.shape[0], None, None] if rng.random() < 0.5 else wave[:x.shape[1], None])

# Optical density of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001)
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

def stain(x, rng, spread):  # more or less of each dye (Tellez et al. 2018). A.HEStain drops what its two dyes don't
    # explain: 24 grey levels on a drawn smear, before it has varied anything
    to_dyes_and_back = np.linalg.inv(HED) @ (rng.uniform(1 - spread, 1 + spread, (3, 1)) * HED)
    more = spread / 10 * rng.uniform(-1, 1, 3) @ HED
    return 256 * np.exp(np.log((x + 1) / 256) @ to_dyes_and_back - more) - 1  # -log is density (Beer-Lambert)

TURN = A.Rotate((-8, 8), border_mode=cv2.BORDER_REPLICATE, p=0.5)  # no further: gravity says which way is up
RECIPES = {"reddino": [], "dinov2": DINOV2, "ct": [[
    TURN,
    Effect(low_dose, 0.5, dose=(1 / 16, 1)),
    Effect(kernel, 0.5, sharpness=(-1, 1), sigma=(0.6, 1.2)),  # each maker has its own
    A.Blur(blur_limit=(3, 5), p=0.2),  # thick slices average what lies above each other
    RandomWindow([(-600, 1500), (40, 400), (400, 1800), (200, 700)]),  # HU: lung, mediastinum, bone, vessels
    A.MotionBlur(blur_limit=(3, 9), p=0.2),  # breath
    A.RandomToneCurve(scale=0.15, per_channel=False, p=0.5),  # contrast timing: blood gains or loses against tissue
]], "mri": [[
    A.HorizontalFlip(p=0.5),  # brains, knees and breasts are all but symmetric; take it out for a heart or a liver
    TURN,
    Effect(bias_field, 0.5, strength=(0.05, 0.3)),
    A.RandomBrightnessContrast(brightness_limit=(0, 0), contrast_limit=(-0.3, 0.3), p=0.5),  # there are no units
    A.RandomGamma(gamma_limit=(70, 140), p=0.5),  # echo and repetition times weigh tissues in their own way
    A.MotionBlur(blur_limit=(3, 7), p=0.1),
    Effect(ghosting, 0.2, copies=(2, 7), share=(0.1, 0.4)),
    A.RingingOvershoot(blur_limit=(7, 15), cutoff=(math.pi / 2, 3 * math.pi / 4), p=0.1),  # Gibbs: k-space cut short
    Effect(rician, 0.5, sigma=(2, 12)),
]], "xray": [[
    TURN,
    A.RandomBrightnessContrast(brightness_limit=(-0.2, 0.2), contrast_limit=(-0.2, 0.2), p=0.5),  # exposure
    A.RandomGamma(gamma_limit=(60, 160), p=0.5),  # tube voltage
    A.RandomToneCurve(scale=0.1, per_channel=False, p=0.3),  # the maker's look-up table
    A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.5), p=0.3),  # detector and focal spot
    Effect(grid_lines, 0.2, period=(2.5, 8), depth=(0.01, 0.06)),
    A.GaussNoise(std_range=(0.01, 0.04), per_channel=False, p=0.3),  # few quanta
    Effect(collimation, 0.3, most=(0.15, 0.15)),
    A.InvertImg(p=0.05),  # MONOCHROME1: exports that show bone black
]], "histology": [[
    A.D4(p=1),  # tissue has no up or left: all eight orientations alike
    Effect(stain, 0.8, spread=(0, 0.3)),
    A.ColorJitter(brightness=(0.9, 1.1), contrast=(0.9, 1.1), saturation=(0.9, 1.1), hue=(-0.02, 0.02), p=0.5),  # lamp
    A.Downscale(scale_range=(0.4, 0.8), p=0.2,  # a lower objective; for others give --patch-size several sizes
                interpolation_pair={"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}),
    A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.5), p=0.3),  # thick or folded sections leave the focus
    A.ImageCompression(compression_type="jpeg", quality_range=(50, 95), p=0.3),  # as slides are stored
]]}

# ---------------------------------------------------------------------------------------------------------------------
# Views. DINOv2's multi-crop: two global views for teacher and student, local ones for the student alone, who must
# tell from a twentieth to a third of the patch what the whole looks like.

def sample_rng(seed, index, epoch):
    """The random stream of a sample: a function of these three alone, whichever worker or process draws from it."""
    return np.random.default_rng((seed, index, epoch))

class MultiCrop:
    """mc(patch, rng): RGB uint8 [h, w, 3] of any size -> 2 global uint8 [2, 3, G, G], L local views [L, 3, l, l].
    augment: one of RECIPES. "ct" takes values [h, w] as well, and draws its windows around `window` (level, width).
    All randomness comes from rng, a numpy Generator: see sample_rng."""

    def __init__(self, augment="reddino", global_size=224, local_size=98, local_crops=1, global_scale=(0.32, 1.0),
                 local_scale=(0.05, 0.32), transforms=4, window=None):
        if augment not in RECIPES:
            raise UserError(f"--augment {augment!r}: it is one of {', '.join(RECIPES)}")
        self.transforms, self.local_shape = transforms, (local_crops, 3, local_size, local_size)
        self.recipe = [[RandomWindow([window]) if window and isinstance(t, RandomWindow) else t for t in of_view]
                       for of_view in (RECIPES[augment] * 3)[:3]]  # first and second global view, local ones
        # Of random area and aspect 3/4 to 4/3. Shrunk by averaging, for the others would skip pixels and alias;
        # enlarged bilinearly as the release does, bicubically as DINOv2.
        enlarge = cv2.INTER_CUBIC if augment == "dinov2" else cv2.INTER_LINEAR
        self.crops = [A.RandomResizedCrop((size, size), scale, interpolation=enlarge, area_for_downscale="image")
                      for size, scale in [(global_size, global_scale)] * 2 + [(local_size, local_scale)] * local_crops]

    def __call__(self, patch, rng):
        # Albumentations draws from two generators. Given both here, its own never count: left alone, in 2.0.8, two
        # workers draw the same, and again in each epoch. Seeding a pipeline of 32 anew would take 1.05 ms, this 0.01.
        python_rng = random.Random(int(rng.integers(2**62)))
        views = []
        for v, crop in enumerate(self.crops):  # cropped first, since colour work costs by the pixel
            # RedDino: four different ones of the 32, each with its p. (1.4's SomeOf drew with replacement, ignored p.)
            some = self.recipe[min(v, 2)] if self.recipe else python_rng.sample(TRANSFORMS, self.transforms)
            view = patch
            for transform in (crop, *some):
                transform.set_random_state(rng, python_rng)
                view = transform(image=view)["image"]
            if not self.recipe:  # RedDino: a smear has no up or left; the release flips and turns with 0.85, not 0.5
                view = view[:, ::-1] if rng.random() < P else view  # numpy: 0.05 ms for the three; the library: 0.26
                view = view[::-1] if rng.random() < P else view
                view = np.rot90(view, rng.integers(4)) if rng.random() < P else view
            view = view if view.ndim == 3 else np.stack([view] * 3, 2)  # grey slices travel as one channel
            views.append(np.ascontiguousarray(view.transpose(2, 0, 1)))  # [3, size, size]
        return np.stack(views[:2]), np.array(views[2:], np.uint8).reshape(self.local_shape)

# ---------------------------------------------------------------------------------------------------------------------
# Batches. Sample n of a run is number n % length of a shuffle of epoch n // length: each patch once an epoch, across
# all processes, and the place in the data is the step alone. Masks hide half of the global views in part from the
# student, who has to fill them in (iBOT, DINOv2).

def mask_ratios(seed: int, step: int, views: int) -> np.ndarray:
    """Share of patches to mask in each of a step's global views, [views]: 0 for a random half, the others spread
    evenly over 0.1 to 0.5 (iBOT, DINOv2), so that each batch holds easy and hard ones."""
    rng = np.random.default_rng((seed, step, 2))  # 2: a stream of its own
    ratios, masked = np.zeros(views), views // 2
    ratios[rng.permutation(views)[:masked]] = 0.1 + 0.4 * (np.arange(masked) + rng.random(masked)) / max(masked, 1)
    return ratios

def block_mask(rng: np.random.Generator, height: int, width: int, ratio: float) -> np.ndarray:
    """bool [height, width] with about ratio*height*width patches set, in rectangles (BEiT, Bao et al. 2021): single
    patches could be filled in from their neighbours. A rectangle has 4 patches to what is left, aspect ratio
    log-uniform in 0.3 to 1/0.3, and never adds more than is left; after 10 rectangles that don't fit it's enough."""
    mask, left = np.zeros((height, width), bool), int(ratio * height * width)
    misses = 0
    while left > 0 and misses < 10:
        area = 4 + (left - 4) * rng.random()
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        misses += 1
        if 0 < h < height and 0 < w < width:
            top, side = rng.integers(height - h + 1), rng.integers(width - w + 1)
            block = mask[top : top + h, side : side + w]
            new = block.size - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                left, misses = left - new, 0
    return mask

class Draws:
    """Batch sampler: for each of `steps`, this process's share of a batch of `batch` as (epoch, patch, mask ratios)."""

    def __init__(self, patches, steps, batch, seed, balance=False, rank=0, world=1, mix=0):
        self.steps, self.batch, self.seed, self.rank, self.world, self.shuffles = steps, batch, seed, rank, world, {}
        self.patches, self.mix = patches, mix
        pools = [range(first, last) for _, first, last in patches.sources if last > first]
        self.pools = pools if balance else [range(len(patches))]  # balance: the sources take turns

    def draw(self, sample):
        """Epoch and patch of a sample of the run."""
        turn, n = divmod(sample, len(self.pools))
        epoch, place = divmod(turn, len(self.pools[n]))
        if self.shuffles.get(n, (None,))[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, n, 1))  # 1: a stream of its own
            self.shuffles[n] = epoch, self.patches.shuffled(self.pools[n].start, self.pools[n].stop, rng, self.mix)
        return epoch, int(self.shuffles[n][1][place])

    def __iter__(self):
        for step in self.steps:
            ratios = mask_ratios(self.seed, step, 2 * self.batch).reshape(self.batch, 2)
            # interleaved, so that each process gets its share of each mask ratio
            yield [(*self.draw(step * self.batch + slot), tuple(ratios[slot]))
                   for slot in range(self.rank, self.batch, self.world)]

class Views:
    """views[epoch, patch, mask ratios]: crops as MultiCrop's, bool masks [2, grid * grid], number of the patch, and
    {path: reason} of the files that could not be read on the way."""

    def __init__(self, patches, crop, grid, seed):
        self.patches, self.crop, self.grid, self.seed = patches, crop, grid, seed

    def __getitem__(self, draw):
        epoch, index, ratios = draw
        rng = sample_rng(self.seed, index, epoch)
        patch, faults = np.full((8, 8, 3), 128, np.uint8), {}  # grey if nothing can be read, in which training stops
        for _ in range(20):
            try:
                patch = self.patches[index]
                break
            except BadImage as bad:  # another patch takes its place, the same in every repetition of the run
                faults[bad.path] = bad.reason
                index = int(rng.integers(len(self.patches)))
        views = self.crop(patch, rng)
        masks = np.stack([block_mask(rng, self.grid, self.grid, ratio).ravel() for ratio in ratios])
        return *views, masks, index, faults

def collate(samples):
    """Samples to a batch, view after view: [2*B, 3, H, W], [L*B, 3, h, w], masks [2*B, N], patch numbers, faults."""
    *views, indices, faults = zip(*samples)
    views = [torch.from_numpy(np.stack(part, axis=1)).flatten(0, 1) for part in views]
    return *views, list(indices), {path: reason for one in faults for path, reason in one.items()}

def worker_init(_):
    """A worker leaves signals to its parent, which finishes its step first, and computes on one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)

def batches(cfg, patches, start, patch, rank, world, workers, pin):
    """This process's batches (see collate) from step `start` on, as reddino.Config says; a generator, whose end is that
    of its `workers`. patch: pixels of a token, on whose grid the masks lie; pin: for a GPU."""
    crop = MultiCrop(cfg.augment, cfg.global_size, cfg.local_size, cfg.local_crops,
                     (cfg.global_scale, 1.0), (cfg.local_scale, cfg.global_scale), cfg.transforms, cfg.window)
    steps = itertools.count(start) if cfg.minutes else range(start, cfg.iters)
    draws = Draws(patches, steps, cfg.batch_size, cfg.seed, cfg.balance, rank, world, cfg.mix)
    yield from torch.utils.data.DataLoader(
        Views(patches, crop, cfg.global_size // patch, cfg.seed), batch_sampler=draws, collate_fn=collate,
        num_workers=workers, worker_init_fn=worker_init, pin_memory=pin, prefetch_factor=4 if workers else None)

def normalise(views, device, dtype):
    """uint8 crops to the device (a quarter of the bytes of floats), and there to ImageNet's mean 0 and std 1."""
    mean, std = (torch.tensor(v, device=device, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    return (views.to(device, non_blocking=True).to(dtype) / 255 - mean) / std

# ---------------------------------------------------------------------------------------------------------------------

def gallery(patch, seed=0, augment="reddino", window=None):
    """Every transform by name on one patch [h, w, 3] (or values [h, w]), a row for each group: a PIL image."""
    of_views = zip(("first global view", "second global view", "local view"), MultiCrop(augment, window=window).recipe)
    groups = dict(of_views) or GROUPS
    page = Image.new("RGB", (8 + 232 * max(map(len, groups.values())), 264 + 288 * len(groups)), "white")
    small, large, draw = ImageFont.load_default(15), ImageFont.load_default(24), ImageDraw.Draw(page)
    def paste(x, y, image):
        image = image if image.dtype == np.uint8 else apply_window(image, *window or (40, 400))
        page.paste(Image.fromarray(image), (x, y))

    paste(8, 8, patch := cv2.resize(patch, (224, 224), interpolation=cv2.INTER_AREA))
    draw.text((248, 8), f"{augment}: every pixel transform of the patch at the left, seed {seed}", "black", large)
    for row, (title, transforms) in enumerate(groups.items()):
        draw.text((8, 264 + 288 * row), title, "black", large)
        before = patch
        for column, transform in enumerate(transforms):
            x, y, rng = 8 + 232 * column, 296 + 288 * row, sample_rng(seed, row, column)
            transform.set_random_state(rng, random.Random(int(rng.integers(2**62))))
            paste(x, y, after := transform(image=before, force_apply=True)["image"])
            draw.text((x, y + 226), getattr(transform, "function", type(transform)).__name__, "black", small)
            before = after if after.dtype != before.dtype else before  # what follows a window needs one
    return page

def main():
    parser = argparse.ArgumentParser(description="Draw every transform by name on an image.")
    parser.add_argument("image")
    parser.add_argument("-o", "--out", default="gallery.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--augment", choices=RECIPES, default="reddino")
    parser.add_argument("--window", nargs=2, type=float, metavar=("LEVEL", "WIDTH"))
    args = parser.parse_args()
    try:
        check_window(args.window)
        image = read_image(args.image, window=args.window, raw=args.augment == "ct")
        side = min(image.shape[:2]) if args.augment in ("ct", "mri", "xray") else 224  # anatomy is looked at as a whole
        y, x = (max(0, (n - side) // 2) for n in image.shape[:2])
        gallery(image[y:y + side, x:x + side], args.seed, args.augment, args.window).save(args.out)
    except (UserError, BadImage, OSError, ValueError) as error:  # the last two: an --out that can't be written
        parser.exit(2, f"augment.py: error: {error}\n")

if __name__ == "__main__":
    main()
