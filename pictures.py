"""Files of pictures → uint8 pixels (C, H, W)."""
import contextlib
import gzip
import io
import itertools
import math
import zipfile
from pathlib import Path

from configurator import UserError

import numpy as np

MOST_PIXELS = 100_000_000  # of a picture: a small file could else fill the memory
IMAGES = ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"


def picture_rows(name, opener, files, cfg):
    """Rows (where, pixels, label) of a picture file, of a .bin in CIFAR's format (a byte of label,
    then the pixels), or of two idx files in MNIST's; `files` holds the one with the labels, too."""
    if "-idx1-" in name:
        return  # read beside its images
    labels = None
    if "-idx3-" in name:
        labels = files.get(name.replace("images-idx3", "labels-idx1"))
    with opener() as raw, labels() if labels else contextlib.nullcontext() as label_raw:
        if not labels and not name.endswith(".bin"):
            yield name, decode_picture(raw.read(), name, cfg), Path(name).parent.name
            return
        if not cfg.image_size:
            raise UserError(f"{name}: give --image_size=[channels,height,width]")
        label_stream = raw
        if labels:
            raw, label_stream = (gzip.open(stream) if stream.peek(2)[:2] == b"\x1f\x8b" else stream
                                 for stream in (raw, label_raw))
            raw.read(16)  # magic number, count, height, width
            label_stream.read(8)  # magic number, count
        size = math.prod(cfg.image_size)
        for number in itertools.count():
            label = label_stream.read(1)
            pixels = raw.read(size)
            if not label and not pixels:
                return
            if len(pixels) < size or not label:
                raise UserError(f"{name}, image {number}: truncated")
            pixels = np.frombuffer(pixels, np.uint8).reshape(cfg.image_size)
            yield f"{name}, image {number}", pixels, str(label[0])


def decode_picture(content, name, cfg):
    """(C, H, W) uint8 of an image file, upright, transparent parts white; of several frames the
    first. None where it cannot be read and such files are left out.

    Grey stays one channel and everything else becomes RGB, unless cfg.image_size says how many
    channels there are. With cfg.resize a picture of another size is made that size.
    """
    from PIL import Image, ImageOps  # Pillow comes with matplotlib
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels, more than {MOST_PIXELS:,}")
        image = eight_bits(ImageOps.exif_transpose(image), image.format)
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile,
            Image.DecompressionBombError) as error:
        if cfg.drop_bad_rows:
            return None
        raise UserError(f"{name}: not a readable image ({error}); replace it, or leave such files "
                        "out with --drop_bad_rows=True") from None
    if cfg.image_size:
        channels, height, width = cfg.image_size
        image = image.convert("L" if channels == 1 else "RGB")
        if cfg.resize == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        elif cfg.resize == "fit":
            image = ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color="white")
    x = np.asarray(image)
    return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)


def eight_bits(image, file_format):
    """A picture of any mode as L (grey) or RGB."""
    from PIL import Image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        x = np.asarray(image, np.float64)
        is_png = image.mode == "I" and file_format == "PNG"  # Pillow's mode of 16 bits, formerly
        if not (image.mode.startswith("I;16") or is_png):
            raise ValueError("grey values of 32 bits, of which white is not known; save it with 8 "
                             "or 16")
        return Image.fromarray((x / 257).round().astype(np.uint8))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        is_grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
        return image.convert("L" if is_grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def check_shape(pixels, shape, where):
    if list(pixels.shape) != list(shape):
        C, H, W = shape
        raise UserError(f"{where}: (channels, height, width) are {pixels.shape}, not "
                        f"{tuple(shape)} as --image_size or the first image has them; to make all "
                        f"of one size: --image_size=[{C},{H},{W}] --resize=crop (the shorter side, "
                        "then the middle), or --resize=fit (all of it, on white); in predict.py "
                        "and eval.py --resize alone")
