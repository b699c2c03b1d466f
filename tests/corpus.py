"""A folder of everything that can be wrong, or merely unusual, with image files."""

import os
import struct
import zlib

import numpy as np
from PIL import Image


def picture(height=300, width=260, seed=0):
    """A smooth RGB picture, uint8 [height, width, 3], that survives JPEG to a few grey levels."""
    y, x = np.mgrid[:height, :width] / 40
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    return (127 + 90 * np.sin(y[..., None] + phase) * np.cos(x[..., None] - phase)).astype(np.uint8)


def _bomb(width, height):
    """A PNG whose header promises width x height pixels and that has next to none."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(999)))
        + chunk(b"IEND", b"")
    )


def bad_corpus(folder):
    """Fills `folder`. Returns (good, bad): {path: (height, width)} as it should be read,
    {path: word in the reason}.

    As many good files as bad ones, so that a run goes through them. Some bad ones show only when
    they are decoded.
    """
    folder = str(folder)
    good, bad, rgb = {}, {}, picture()

    def save(name, array, size=None, **options):
        path = os.path.join(folder, name)
        im = array if isinstance(array, Image.Image) else Image.fromarray(array)
        im.save(path, **options)
        good[path] = size or (im.height, im.width)
        return path

    def write(name, data, word):
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(data)
        bad[path] = word

    # Usual and unusual, but readable
    for i in range(20):
        save(f"usual {i}.png", picture(240, 320, i))
    save("space and\nnewline \U0001fa78.png", rgb)
    save("UPPER.JPG", rgb, quality=95)
    save("one.png", rgb[:1, :1])
    save("strip.png", picture(3, 5000))
    save("grey.png", rgb[..., 0])
    save("sixteen.png", rgb[..., 0].astype(np.uint16) * 257)
    save("twelve.tif", rgb[..., 0].astype(np.uint16) * 16)
    save("bit.png", Image.fromarray(rgb).convert("1"))
    transparent = np.dstack((rgb, np.full(rgb.shape[:2], 255, np.uint8)))
    transparent[:100, :100, 3] = 0
    save("rgba.webp", transparent, lossless=True)
    palette = Image.fromarray(rgb).quantize(16)
    save("palette.png", palette, transparency=palette.getpixel((0, 0)))
    save("cmyk.jpg", Image.fromarray(rgb).convert("CMYK"), quality=95)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = (260, 300) if orientation > 4 else (300, 260)
        save(f"exif{orientation}.jpg", rgb, size=turned, exif=exif, quality=95)
    save("exif6.tiff", rgb, size=(260, 300), tiffinfo={0x0112: 6})
    save(
        "animated.webp",
        rgb,
        save_all=True,
        append_images=[Image.fromarray(255 - rgb)],
        lossless=True,
    )
    save("pages.tif", rgb, save_all=True, append_images=[Image.new("RGB", (9, 9))])
    os.mkdir(os.path.join(folder, "folder.png"))
    save("folder.png/inside.bmp", rgb)

    # Unreadable
    for name, kind in (("jpg", "JPEG"), ("png", "PNG")):
        whole = save(f"whole.{name}", rgb, format=kind)
        with open(whole, "rb") as file:
            data = file.read()
        for tenth in range(1, 10):
            write(f"truncated{tenth}.{name}", data[: len(data) * tenth // 10], "")
    write("empty.jpg", b"", "not an image")
    write("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image")
    write("bomb.png", _bomb(60_000, 60_000), "too large")
    write("smaller bomb.png", _bomb(10_000, 10_000), "too large")
    bad[os.path.join(folder, "dangling.png")] = "No such file"
    os.symlink(os.path.join(folder, "nowhere.png"), os.path.join(folder, "dangling.png"))
    bad[os.path.join(folder, "pipe.png")] = "not a regular file"
    os.mkfifo(os.path.join(folder, "pipe.png"))
    if os.geteuid() != 0:  # root may read everything
        save("secret.png", rgb)
        secret = os.path.join(folder, "secret.png")
        os.chmod(secret, 0)
        del good[secret]
        bad[secret] = "Permission denied"
    return good, bad
