"""Image files of any kind, as RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from wesam.errors import InputError, plainly

MOST_PIXELS = 150_000_000
"""An image with more is refused before it is decoded."""


BITS, KIND, COPY_OR_MASK = 258, 254, 5
"""Tags of a TIFF's page, its bits a channel and what it is, and of the latter those of a smaller copy and of a mask."""


def may_have_size(file: Path, size: tuple[int, int]) -> bool:
    """Whether an image has this (height, width), as it is stored or as its EXIF orientation turns it, by its header.

    Raises InputError if it is none, is too large, has more than 8 bits a channel, or several pages.
    """
    with _opened(file) as image:
        stored = image.height, image.width
        return size == stored or (size == stored[::-1] and _turned(image, file))


def read_image(file: Path, size: tuple[int, int] | None = None, content: bytes | None = None) -> np.ndarray:
    """The image in RGB, uint8 [H, W, 3]; raises InputError as :func:`may_have_size` does, and if it ends early.

    Grey, palette, transparent and CMYK images are converted; what is transparent keeps its colour. It is turned as its
    EXIF orientation says, unless it has the given (height, width) only as it is stored: so were its labels made.
    content: what the file holds, if it is no file; errors call it by this path all the same.
    """
    with _opened(file, content=content) as image:
        lying = size == (image.height, image.width) and image.height != image.width and _turned(image, file)
        try:
            return np.asarray((image if lying else ImageOps.exif_transpose(image)).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"cannot read the image {file}: {plainly(e)}") from None


def read_labels(file: Path) -> np.ndarray:
    """The values of a label image, int [H, W]: grey values of any depth, indices into a palette, or colours, red first,
    as one number, from 2^24 on but for black, which is 0; raises InputError if it is none, is too large or ends early.
    """
    with _opened(file, deep=True) as image:
        try:
            values = np.asarray(image.convert("RGB") if image.mode in ("RGBA", "CMYK", "YCbCr") else image)
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"cannot read the image {file}: {plainly(e)}") from None
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == values.round()).all()):
        raise InputError(f"{file} holds fractions: it is no label image")
    wide = values.astype(np.int64)
    if wide.ndim == 2:
        return wide
    if wide.shape[2] < 3:
        return wide[..., 0]
    colours = wide[..., 0] * 65536 + wide[..., 1] * 256 + wide[..., 2]
    return np.where(colours > 0, colours + 2**24, 0)


def _turned(image: Image.Image, file: Path) -> bool:
    """Whether its EXIF orientation makes its height its width."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError) as e:
        raise InputError(f"cannot read the image {file}: {plainly(e)}") from None


def _opened(file: Path, deep: bool = False, content: bytes | None = None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file if content is None else io.BytesIO(content))
    except UnidentifiedImageError:
        raise InputError(f"cannot read the image {file}: it is none, or of an unknown format") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise InputError(f"cannot read the image {file}: {plainly(e)}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{file} has more than {MOST_PIXELS // 10**6} million pixels: not read") from None
    if image.width * image.height > MOST_PIXELS:
        raise InputError(f"{file} has {image.width} x {image.height} pixels, more than {MOST_PIXELS // 10**6} million: "
                         "not read")  # fmt: skip
    grey = image.mode.startswith(("I", "F"))
    if (grey and not deep) or (not grey and _cut_to_8_bits(image)):
        raise InputError(f"{file} has more than 8 bits a channel: save it with 8, scaled as it should be seen")
    if pages := _pages(image):
        raise InputError(f"{file} has {pages} pages: save the one that is meant, or each in a file of its own")
    return image


def _cut_to_8_bits(image: Image.Image) -> bool:
    """Whether Pillow would leave away half of each channel's 16 bits, as it does where there are several."""
    tiles = [tile[3] for tile in getattr(image, "tile", ())]
    if image.format == "TIFF":
        return max(getattr(image, "tag_v2", {}).get(BITS) or (1,)) > 8
    return (image.format == "PNG" and any(";16" in str(t) for t in tiles)) or (
        image.format == "PPM" and any(isinstance(a, int) and a > 255 for t in tiles for a in t)
    )


def _pages(image: Image.Image) -> int:
    """How many pages a TIFF has that are as large as the first, and neither smaller copies of it nor what is
    transparent; 0 for no other.
    """
    if image.format != "TIFF":
        return 0
    size, count = image.size, 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in range(getattr(image, "n_frames", 1)):
                image.seek(n)
                count += image.size == size and not getattr(image, "tag_v2", {}).get(KIND, 0) & COPY_OR_MASK
    except Exception:  # Pillow has many for what is no page; what is wrong with the first is said when it is read
        pass
    image.seek(0)
    return count if count > 1 else 0
