"""From an image file to training views: patches of smears, RedDino's 32 pixel transforms, multi-crop.

    python augment.py SMEAR.jpg -o gallery.png --seed 0     draws every transform by name on that image

In the order in which an image travels:
  find_images, read_image   a folder and a file; whatever is wrong with a file becomes one BadImage with a reason
  Patches                   folders of smears as one long list of 224 x 224 patches
  TRANSFORMS, GROUPS        the 32 pixel transforms, by what they mimic
  MultiCrop                 one patch -> 2 global and n local views, uint8, every draw from one given random stream

Papers: RedDino (Zedda et al., MICCAI 2025), DINOv2 (Oquab et al., 2023), multi-crop (SwAV, Caron et al., 2020).
Pixels are RGB uint8 throughout; they are normalised on the device, where it is free.
"""
import argparse
import logging
import math
import os
import random
import stat
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import: it asks the network for a newer version otherwise
import albumentations as A
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

cv2.setNumThreads(0)  # DataLoader workers are the parallelism; OpenCV's own threads would fight them for cores
warnings.filterwarnings("ignore", module=r"PIL\.")  # one reason per bad file, in BadImage: no second voice
logging.getLogger("PIL").setLevel(logging.CRITICAL)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB in 0..1: what DINOv2's weights expect
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 50_000_000  # 7,000 x 7,000; the greediest path (palette with transparency) takes 15 bytes a pixel: 0.75 GB


class UserError(Exception):
    """What the user can put right: printed as one line, exit code 2, no traceback."""


class BadImage(Exception):
    """A file that gives no pixels: `path`, and `reason` in one line. Training skips and lists it."""

    def __init__(self, path, reason):
        super().__init__(path, reason)  # both in args, so that it survives pickling on its way out of a worker
        self.path, self.reason = path, " ".join(str(reason).split())[:200]

    def __str__(self):
        return f"{self.path!r}: {self.reason}"  # !r: a newline or a lone surrogate in a name stays on one line


# ---------------------------------------------------------------------------------------------------------------------
# Files. Everything that a folder of 56,712 images collected over years may hold ends as RGB pixels or as one BadImage.

def find_images(folder):
    """All image files below `folder` by extension, sorted. Links are followed, hidden names left out. UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder!r} is no folder: --data takes folders of images")

    def unlistable(error):
        raise UserError(f"{error.filename!r} can't be listed: {error.strerror}; make it readable or move it away")

    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=unlistable):
        folders[:] = [d for d in folders if not d.startswith(".")]
        real = os.path.realpath(here)
        if real in seen:  # a link back up: walked once
            folders[:] = []
            continue
        seen.add(real)
        found += [os.path.join(here, n) for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(".")]
    return sorted(found)


def _open(path):
    """A PIL image, header only, and its EXIF orientation (1 = upright). Raises BadImage."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
            raise BadImage(path, "not a regular file")
        im = Image.open(path)
        # PNG's EXIF may stand behind the pixels, where looking for it would decode them: only what comes first counts
        orientation = im.getexif().get(0x0112, 1) if im.format != "PNG" or "exif" in im.info else 1
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(path, f"too large: over {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, zlib.error, KeyError, ...
        raise BadImage(path, _reason(error)) from None
    if im.width * im.height > MAX_PIXELS:
        raise BadImage(path, f"too large: {im.width} x {im.height}, over {MAX_PIXELS:,} pixels")
    return im, orientation


def _reason(error):
    """One line for an exception out of PIL or the system, without the path, which BadImage has."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image in it, or of a kind that can't be read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _size(path):
    """(height, width) as read_image will return it, from the header alone. Raises BadImage."""
    im, orientation = _open(path)
    with im:
        return (im.width, im.height) if orientation in (5, 6, 7, 8) else (im.height, im.width)


def _to_rgb(im):
    """Any PIL mode -> RGB."""
    if im.mode in ("I", "F") or im.mode.startswith("I;16"):
        # 16-bit grey: cameras put 10, 12 or 14 bits into it, so the scale is the fewest bits that hold the maximum.
        # Unlike stretching by the file's own range, that keeps dim and bright exposures of one camera apart.
        grey = np.nan_to_num(np.asarray(im, np.float32)).clip(0)
        top = grey.max()
        bits = next((b for b in (0, 8, 10, 12, 14, 16) if top <= 2**b - (b > 0)), math.ceil(math.log2(top + 1)))
        im = Image.fromarray((grey * (255 / max(1, 2**bits - 1))).astype(np.uint8))
    if im.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in im.info:
        im = im.convert("RGBA")  # onto white, which is what a microscope shows where there is nothing
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return im.convert("RGB")  # CMYK too: PIL knows that Adobe stores it inverted


def read_image(path):
    """A file's pixels, RGB uint8 [H, W, 3], upright by its EXIF, first frame or page. Raises BadImage, nothing else."""
    im, orientation = _open(path)
    try:
        with im:
            im.load()
            if orientation != 1:
                im = ImageOps.exif_transpose(im)
            return np.array(_to_rgb(im))
    except Exception as error:
        raise BadImage(path, _reason(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Patches. RedDino: patches cut from whole smears beat segmented single cells, so an image is what it holds of
# 224 x 224 windows. A bare grid would throw away 35% of a 640 x 480 smear; windows evenly spaced from edge to edge
# keep all of it: 3 x 3, neighbours overlapping by 16 and 96 pixels.

def window_starts(length, patch_size):
    """First pixels of the fewest windows that cover 0..length, evenly spaced; one window where length is smaller."""
    n = max(1, math.ceil(length / patch_size)) if patch_size else 1
    return [round(k * (length - patch_size) / (n - 1)) for k in range(n)] if n > 1 else [0]


class Patches:
    """Folders of images as one list of patches: p[i] -> RGB uint8 [h, w, 3], h and w at most patch_size (0: any).

    A dimension larger than patch_size is cut into windows, a smaller one taken whole. Sizes come from headers.
    files: list of paths. sources: (folder, first patch, one past the last). skipped: {path: reason}.
    Raises UserError: no image, a folder missing or given twice, most files unreadable. p[i] raises BadImage.
    """

    def __init__(self, folders, patch_size=224):
        self.patch_size, self.files, self.sources, self.skipped = patch_size, [], [], {}
        sizes, seen = [], set()
        for folder in folders:
            found = find_images(folder)
            if not found:
                raise UserError(f"no image in {folder!r}: looked for {' '.join(EXTENSIONS)}, in folders within it too")
            if os.path.realpath(folder) in seen:
                raise UserError(f"--data names {folder!r} twice")
            seen.add(os.path.realpath(folder))
            with ThreadPoolExecutor(16) as pool:  # waiting for the disk or the network, mostly
                scanned = list(pool.map(self._scan, found))
            good = [(f, s) for f, s in zip(found, scanned) if isinstance(s, tuple)]
            self.skipped |= {f: s for f, s in zip(found, scanned) if isinstance(s, str)}
            self.files += [f for f, _ in good]
            sizes += [s for _, s in good]
            self.sources.append((folder, len(sizes) - len(good), len(sizes)))  # in files; in patches below
        if len(self.skipped) > len(self.files):
            path, reason = next(iter(self.skipped.items()))
            raise UserError(f"{len(self.skipped)} of {len(self.skipped) + len(self.files)} files can't be read, "
                            f"the first {path!r}: {reason}")
        self.sizes = np.array(sizes, np.int64).reshape(-1, 2)  # [files, (height, width)]
        self.columns = np.array([len(window_starts(w, patch_size)) for _, w in sizes], np.int64)
        rows = np.array([len(window_starts(h, patch_size)) for h, _ in sizes], np.int64)
        self.ends = np.cumsum(rows * self.columns)  # one past each file's last patch
        first = np.concatenate(([0], self.ends))
        self.sources = [(folder, int(first[a]), int(first[b])) for folder, a, b in self.sources]

    @staticmethod
    def _scan(path):
        try:
            return _size(path)
        except BadImage as bad:
            return bad.reason

    def __len__(self):
        return int(self.ends[-1])

    def _file(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return int(np.searchsorted(self.ends, i, side="right"))

    def file_of(self, i):
        return self.files[self._file(i)]

    def __getitem__(self, i):
        f = self._file(i)
        (h, w), columns = self.sizes[f], int(self.columns[f])
        image = read_image(self.files[f])
        if image.shape[:2] != (h, w):
            raise BadImage(self.files[f], f"was {w} x {h} when the run began, now {image.shape[1]} x {image.shape[0]}")
        ys, xs, P = window_starts(h, self.patch_size), window_starts(w, self.patch_size), self.patch_size or max(h, w)
        row, column = divmod(int(i - self.ends[f]) + len(ys) * columns, columns)
        return image[ys[row]:ys[row] + P, xs[column]:xs[column] + P]


# ---------------------------------------------------------------------------------------------------------------------
# The 32 pixel transforms.

class ISONoise(A.ISONoise):
    def apply(self, img, color_shift, intensity, random_seed, **params):
        hls = cv2.cvtColor(img.astype(np.float32) / 255, cv2.COLOR_RGB2HLS)
        rng, (h, w) = np.random.default_rng(random_seed), img.shape[:2]
        mean = 255 * intensity * hls[..., 1].std()
        grain = np.maximum(0, mean + math.sqrt(mean) * rng.standard_normal((h, w), np.float32))
        hls[..., 0] = (hls[..., 0] + 360 * color_shift * intensity * rng.standard_normal((h, w), np.float32)) % 360
        hls[..., 1] += grain / 255 * (1 - hls[..., 1])
        return (cv2.cvtColor(hls, cv2.COLOR_HLS2RGB) * 255).astype(np.uint8)


class FancyPCA(A.FancyPCA):
    def apply(self, img, alpha_vector, **params):
        pixels = img.reshape(-1, 3)[::7] / np.float32(255)
        values, vectors = np.linalg.eigh(np.cov(pixels, rowvar=False))
        shift = 255 * vectors @ (alpha_vector * values)
        return cv2.add(img, np.array([*np.rint(shift), 0]))


class GlassBlur(A.GlassBlur):
    def get_params_dependent_on_data(self, params, data):
        h, w = params["shape"][:2]
        d = self.max_delta
        steps = self.random_generator.integers(-d, d, (self.iterations, h, w, 2), dtype=np.int8)
        return {"dxy": steps.sum(0, dtype=np.int16)}

    def apply(self, img, dxy, **params):
        h, w = img.shape[:2]
        where = dxy + np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.int16)  # [h, w, (x, y)]
        img = cv2.GaussianBlur(img, (0, 0), self.sigma)
        img = cv2.remap(img, where, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
        return cv2.GaussianBlur(img, (0, 0), self.sigma)


class RandomRain(A.RandomRain):
    def get_params_dependent_on_data(self, params, data):
        h, w = params["shape"][:2]
        start = self.random_generator.integers((0, 1 - self.drop_length), (w, h), (h * w // 600, 2))
        return {"slant": self.py_random.uniform(*self.slant_range), "rain_drops": start}

    def apply(self, img, slant, rain_drops, **params):
        lines = np.stack((rain_drops, rain_drops + np.array([int(slant), self.drop_length])), 1).astype(np.int32)
        img = cv2.polylines(img.copy(), lines, False, self.drop_color, self.drop_width)
        img = cv2.blur(img, (self.blur_value, self.blur_value))
        return cv2.convertScaleAbs(img, alpha=self.brightness_coefficient)


class RandomShadow(A.RandomShadow):
    def apply(self, img, vertices_list, intensities, **params):
        mask = np.zeros(img.shape[:2], np.uint8)
        for vertices in vertices_list:
            cv2.fillPoly(mask, [vertices.astype(np.int32)], 1)
        hls = cv2.cvtColor(img, cv2.COLOR_RGB2HLS)
        hls[..., 1] >>= mask
        return cv2.cvtColor(hls, cv2.COLOR_HLS2RGB)


class RandomSunFlare(A.RandomSunFlare):
    def apply(self, img, flare_center, circles, **params):
        ghosts, img = img.copy(), img
        for alpha, centre, radius, colour in circles:
            cv2.circle(ghosts, centre, radius, colour, -1)
            img = cv2.addWeighted(ghosts, alpha, img, 1 - alpha, 0)
        discs = self.src_radius // 10
        radii, veil = np.linspace(1, self.src_radius, discs).astype(int), np.linspace(1, 0, discs) ** 3
        passed = np.append(np.cumprod((1 - veil)[::-1])[::-1], 1).astype(np.float32)
        y, x = np.ogrid[:img.shape[0], :img.shape[1]]
        distance = np.sqrt((x - flare_center[0]) ** 2 + (y - flare_center[1]) ** 2)
        passed = passed[np.searchsorted(radii, np.arange(int(distance.max()) + 1))][distance.astype(np.int32), None]
        return (255 - (255 - img) * passed).astype(np.uint8)


P = 0.85
GROUPS = {
    "illumination and stain": [
        A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.2, 0.2), p=P),
        A.HueSaturationValue(hue_shift_limit=(-20, 20), sat_shift_limit=(-30, 30), val_shift_limit=(-20, 20), p=P),
        A.RGBShift(r_shift_limit=(-20, 20), g_shift_limit=(-20, 20), b_shift_limit=(-20, 20), p=P),
        A.RandomBrightnessContrast(brightness_limit=(-0.2, 0.2), contrast_limit=(-0.2, 0.2), p=P),
        A.RandomGamma(gamma_limit=(80, 120), p=P),
        A.RandomToneCurve(scale=0.1, per_channel=False, p=P),
        FancyPCA(alpha=0.1, p=P),
        A.CLAHE(clip_limit=(1, 4), tile_grid_size=(8, 8), p=P),
        A.Equalize(mode="cv", by_channels=True, p=P),
    ],
    "colour made useless": [
        A.ChannelShuffle(p=P),
        A.ChannelDropout(channel_drop_range=(1, 1), fill=0, p=P),
        A.InvertImg(p=P),
        A.Solarize(threshold_range=(128 / 255, 128 / 255), p=P),
        A.Posterize(num_bits=4, p=P),
    ],
    "focus": [
        A.Blur(blur_limit=(3, 7), p=P),
        A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(0.8, 1.4), p=P),
        A.MedianBlur(blur_limit=(3, 7), p=P),
        A.MotionBlur(blur_limit=(3, 7), allow_shifted=True, p=P),
        A.Defocus(radius=(3, 10), alias_blur=(0.1, 0.5), p=P),
        GlassBlur(sigma=0.7, max_delta=4, iterations=2, p=P),
        A.Sharpen(alpha=(0.2, 0.5), lightness=(0.5, 1.0), method="kernel", p=P),
        A.Emboss(alpha=(0.2, 0.5), strength=(0.2, 0.7), p=P),
        A.RingingOvershoot(blur_limit=(7, 15), cutoff=(np.pi / 4, np.pi / 2), p=P),
    ],
    "sensor and file": [
        A.GaussNoise(std_range=(10**0.5 / 255, 50**0.5 / 255), mean_range=(0, 0), per_channel=True, p=P),
        ISONoise(color_shift=(0.01, 0.05), intensity=(0.1, 0.5), p=P),
        A.MultiplicativeNoise(multiplier=(0.9, 1.1), per_channel=False, elementwise=False, p=P),
        A.Downscale(scale_range=(0.25, 0.25), p=P,
                    interpolation_pair={"downscale": cv2.INTER_NEAREST, "upscale": cv2.INTER_NEAREST}),
        A.ImageCompression(compression_type="jpeg", quality_range=(99, 100), p=P),
    ],
    "optics and debris": [
        RandomShadow(shadow_roi=(0, 0.5, 1, 1), num_shadows_limit=(1, 2), shadow_dimension=5, p=P),
        RandomSunFlare(flare_roi=(0, 0, 1, 0.5), src_radius=400, src_color=(255, 255, 255), angle_range=(0, 1),
                       num_flare_circles_range=(6, 10), p=P),
        RandomRain(slant_range=(-10, 10), drop_length=20, drop_width=1, drop_color=(200, 200, 200), blur_value=7,
                   brightness_coefficient=0.7, p=P),
        A.RandomSnow(snow_point_range=(0.1, 0.3), brightness_coeff=2.5, method="bleach", p=P),
    ],
}
TRANSFORMS = [t for group in GROUPS.values() for t in group]


def dinov2_transforms(view):
    """DINOv2's own pixel augmentation of view 0, 1 (global) or 2 and above (local)."""
    return [A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=9, sigma_limit=(0.1, 2.0), p=(1.0, 0.1, 0.5)[min(view, 2)]),
            A.Solarize(threshold_range=(128 / 255, 128 / 255), p=0.2 if view == 1 else 0)]


# ---------------------------------------------------------------------------------------------------------------------
# Views.

def sample_rng(seed, index, epoch):
    """The one random stream of a sample: a function of these three alone, whatever worker or process draws it."""
    return np.random.default_rng((seed, index, epoch))


def random_resized_crop(image, size, scale, rng, enlarge=cv2.INTER_LINEAR):
    """A random part of `scale` of the area, aspect 3/4 to 4/3, resized: [h, w, 3] -> [size, size, 3]."""
    height, width = image.shape[:2]
    for _ in range(10):
        area, aspect = height * width * rng.uniform(*scale), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
            break
    else:  # too elongated a patch: its middle, cut to the nearest allowed aspect
        h, w = max(1, min(height, round(width * 4 / 3))), max(1, min(width, round(height * 4 / 3)))
        y, x = (height - h) // 2, (width - w) // 2
    shrink = h > size and w > size
    return cv2.resize(image[y:y + h, x:x + w], (size, size), interpolation=cv2.INTER_AREA if shrink else enlarge)


class MultiCrop:
    """One patch -> its training views: mc(patch uint8 [h, w, 3], rng) -> uint8 [2, 3, G, G], uint8 [L, 3, l, l]."""

    def __init__(self, augment="reddino", global_size=224, local_size=98, local_crops=1, global_scale=(0.32, 1.0),
                 local_scale=(0.05, 0.32)):
        if augment not in ("reddino", "dinov2"):
            raise UserError(f"--augment {augment}: it is reddino or dinov2")
        self.dinov2 = [dinov2_transforms(v) for v in range(3)] if augment == "dinov2" else None
        self.views = [(global_size, global_scale)] * 2 + [(local_size, local_scale)] * local_crops

    def __call__(self, patch, rng):
        python_rng = random.Random(int(rng.integers(2**62)))
        views = [self.view(patch, v, rng, python_rng) for v in range(len(self.views))]
        local = np.stack(views[2:]) if views[2:] else np.empty((0, 3, 1, 1), np.uint8)
        return np.stack(views[:2]), local

    def view(self, patch, v, rng, python_rng):
        """View number v of a patch, uint8 [3, size, size]."""
        size, scale = self.views[v]
        if self.dinov2:
            image = random_resized_crop(patch, size, scale, rng, cv2.INTER_CUBIC)
            chosen = self.dinov2[min(v, 2)]
        else:
            image = random_resized_crop(patch, size, scale, rng)
            chosen = [TRANSFORMS[t] for t in rng.choice(len(TRANSFORMS), 4, replace=False)]
        for transform in chosen:
            transform.set_random_state(rng, python_rng)
            image = transform(image=image)["image"]
        if not self.dinov2:
            if rng.random() < P: image = image[:, ::-1]
            if rng.random() < P: image = image[::-1]
            if rng.random() < P: image = np.rot90(image, rng.integers(4))
        return np.ascontiguousarray(image.transpose(2, 0, 1))
