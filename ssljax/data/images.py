"""What a picture file says before it is decoded: kind, size and EXIF rotation."""

import io
import struct
from typing import NamedTuple

import numpy as np

JPEG, PNG, BMP, WEBP, NPY = range(5)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# 8192 x 8192: 192 MiB once decoded to RGB. Larger images are refused from their header.
MAX_PIXELS = 2**26
ORIENTATION = 0x0112
# Markers of JPEG that open a frame and so hold its size: SOF0..SOF15 without DHT, JPG and DAC.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Header(NamedTuple):
  """Kind, height and width as stored, EXIF orientation (1 = upright), whether to repack."""

  kind: int
  height: int
  width: int
  turn: int = 1
  repack: bool = False


def read_header(data: bytes, max_pixels: int, channels: int = 3) -> Header:
  """Header of a JPEG, PNG, BMP or WebP file. Raises ValueError with the reason, in words."""
  if not data:
    raise ValueError("is empty or cannot be opened")
  try:
    if data[:2] == b"\xff\xd8":
      header = _jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
      header = _png(data)
    elif data[:2] == b"BM":
      header = _bmp(data, channels)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
      header = _webp(data, channels)
    else:
      raise ValueError("is not a JPEG, PNG, BMP or WebP file")
  except (struct.error, IndexError):
    raise ValueError("has a damaged or cut header") from None
  check_pixels(header.height, header.width, max_pixels)
  return header


def check_pixels(height: int, width: int, max_pixels: int):
  """Refuse what would not fit, before a byte is decoded."""
  if height < 1 or width < 1:
    raise ValueError(f"says that it is {width} x {height} pixels")
  if height * width > max_pixels:
    raise ValueError(f"has {width} x {height} pixels, more than the limit of {max_pixels}")


def _jpeg(data: bytes) -> Header:
  at, turn = 2, 1
  while True:
    while data[at + 1] == 0xFF:  # fill bytes before a marker
      at += 1
    if data[at] != 0xFF:
      raise ValueError("has a damaged or cut header")
    marker = data[at + 1]
    if marker == 0x01 or 0xD0 <= marker <= 0xD8:
      at += 2
      continue
    if marker in FRAMES:
      height, width = struct.unpack_from(">HH", data, at + 5)
      # Looked for from the end; cameras append data. Cut files must not depend on which part is
      # cropped.
      if data.rfind(b"\xff\xd9") < at:
        raise ValueError("is cut: the JPEG has no end")
      return Header(JPEG, height, width, turn)
    if marker in (0xD9, 0xDA):
      raise ValueError("has a damaged or cut header")
    (length,) = struct.unpack_from(">H", data, at + 2)
    if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
      turn = _orientation(data[at + 10 : at + 2 + length])
    at += 2 + length


def _png(data: bytes) -> Header:
  width, height = struct.unpack_from(">II", data, 16)
  turn, at = 1, 8
  while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
    (length,) = struct.unpack_from(">I", data, at)
    if data[at + 4 : at + 8] == b"eXIf":
      turn = _orientation(data[at + 8 : at + 8 + length])
    at += 12 + length
  return Header(PNG, height, width, turn)


def _bmp(data: bytes, channels: int) -> Header:
  (size,) = struct.unpack_from("<I", data, 14)
  if size < 40:
    width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
    return Header(BMP, height, width, repack=True)
  width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
  # TensorFlow reads palettes as grey and knows no packed rows: Pillow repacks all but plain RGB.
  return Header(BMP, abs(height), width, repack=bits != 24 or packing != 0 or channels != 3)


def _webp(data: bytes, channels: int) -> Header:
  chunk = data[12:16]
  if chunk == b"VP8X":
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    if len(data) < 30:
      raise IndexError
    # 2 animated, 8 EXIF: TensorFlow gives frames for the one and ignores the other.
    return Header(WEBP, height, width, repack=bool(data[20] & 0x0A) or channels != 3)
  if chunk == b"VP8L":
    (bits,) = struct.unpack_from("<I", data, 21)
    width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
  else:
    width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
  return Header(WEBP, height, width, repack=channels != 3)


def _orientation(tiff: bytes) -> int:
  """EXIF orientation 1..8; 1 if absent, invalid or damaged (there are files with 0)."""
  try:
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(min(entries, 512)):
      tag, kind = struct.unpack_from(order + "HH", tiff, start + 2 + 12 * entry)
      if tag == ORIENTATION and kind == 3:
        (turn,) = struct.unpack_from(order + "H", tiff, start + 10 + 12 * entry)
        return turn if 1 <= turn <= 8 else 1
  except (KeyError, struct.error):
    pass
  return 1


def repack(data: bytes, channels: int) -> bytes:
  """A file that TensorFlow does not read as meant, as an upright PNG, through Pillow."""
  out = io.BytesIO()
  picture(data, channels).save(out, "PNG", compress_level=1)
  return out.getvalue()


def picture(data: bytes, channels: int):
  """Decode with Pillow: upright, grey for 1 channel, else RGB. Raises OSError or ValueError."""
  from PIL import Image, ImageOps

  image = Image.open(io.BytesIO(data))
  return ImageOps.exif_transpose(image).convert({1: "L", 4: "RGBA"}.get(channels, "RGB"))


def read_npy(
  data: bytes, max_pixels: int, channels: int, dtype: str | None
) -> tuple[int, int, int, bytes]:
  """Height, width, channels and the plain little-endian values of a .npy file. Raises ValueError
  with the reason.

  Never unpickles. `dtype`: what all files must have, None for any.
  """
  if not data:
    raise ValueError("is empty or cannot be opened")
  file = io.BytesIO(data)
  try:
    version = np.lib.format.read_magic(file)
    reader = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    shape, fortran, found = reader(file)
  except Exception as error:  # ValueError, SyntaxError, EOFError… by the kind of damage
    raise ValueError("is not a .npy file or is cut") from error
  if len(shape) not in (2, 3) or found.kind not in "uif":
    raise ValueError(f"holds {found} of shape {shape}: numbers [h w] or [h w c] are needed")
  if dtype is not None and np.dtype(dtype) != found.newbyteorder("="):
    raise ValueError(f"holds {found}, the other files {dtype}")
  height, width, depth = (*shape, 1)[:3]
  check_pixels(height, width, max_pixels)
  if depth not in (1, channels):
    raise ValueError(f"has {depth} channels, but channels={channels} is asked for")
  body = memoryview(data)[file.tell() :]
  if len(body) != height * width * depth * found.itemsize:
    raise ValueError("is cut: it holds fewer values than its header says")
  if fortran or found.byteorder == ">":
    values = np.frombuffer(body, found).reshape(shape, order="F" if fortran else "C")
    return height, width, depth, np.ascontiguousarray(values, found.newbyteorder("<")).tobytes()
  return height, width, depth, bytes(body)
