"""Antialiased resize of one image: two products with banded matrices, in float32.

The kernels are Pillow's and torchvision's: a triangle, and Keys' cubic with a = -0.5, as wide as
the image shrinks. SciPy multiplies a sparse matrix row by row with vector instructions and without
the interpreter's lock; OpenCV transposes and rounds in a quarter of NumPy's time. (OpenCV's own
resize is not antialiased, and its cubic has a = -0.75.)
"""

import functools

import cv2
import numpy as np
from scipy.sparse import csr_array

# Values of a piece that is made float at once: a picture of 8192 x 8192 does not become 800 MB.
PIECE = 2**19
REACH = {"bilinear": 1.0, "bicubic": 2.0}


def resize(
  image: np.ndarray,
  size: tuple[int, int],
  method: str,
  rounded: bool,
  mirrored: bool = False,
  into: np.ndarray | None = None,
) -> np.ndarray:
  """[h w c] -> [size c]: float32, or `rounded` to uint8 (clipped). method: bicubic or bilinear.

  `mirrored`, left for right, costs nothing here: the weights of the columns stand in reverse.
  `into`: where the result goes, contiguous; None: a new array.
  """
  height, width, channels = image.shape
  rows, columns = matrix(height, size[0], method), matrix(width, size[1], method, mirrored)
  flat = image.reshape(height, width * channels)
  # Transposed between the products, columns are rows too: [w c rows].
  turned = np.empty((width * channels, size[0]), np.float32)
  step = max(1, PIECE // height)
  for at in range(0, width * channels, step):
    piece = rows @ flat[:, at : at + step].astype(np.float32)
    cv2.transpose(piece, dst=turned[at : at + step])
  out = columns @ turned.reshape(width, channels * size[0])
  if rounded:
    # Rounds, to even where it is a tie, and clips. NumPy's maximum alone took twice as long.
    out = cv2.addWeighted(out, 1.0, out, 0.0, 0.0, dtype=cv2.CV_8U)
  place = None if into is None else into.reshape(size[0], size[1] * channels)
  done = cv2.transpose(out.reshape(size[1] * channels, size[0]), dst=place)
  return done.reshape(*size, channels)


@functools.lru_cache(maxsize=1024)
def matrix(length: int, size: int, method: str, mirrored: bool = False) -> csr_array:
  """Weights [size length] of a resized axis: each row holds its kernel, with the sum 1."""
  scale = length / size
  spread = max(scale, 1.0)
  reach = REACH[method] * spread
  centre = (np.arange(size)[:: -1 if mirrored else 1] + 0.5) * scale
  first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
  last = np.minimum((centre + reach + 0.5).astype(np.int64), length)
  place = first[:, None] + np.arange((last - first).max())
  inside = place < last[:, None]
  weight = np.where(inside, kernel((place + 0.5 - centre[:, None]) / spread, method), 0.0)
  weight /= weight.sum(1, keepdims=True)
  start = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int32)
  entries = weight[inside].astype(np.float32), place[inside].astype(np.int32), start
  return csr_array(entries, shape=(size, length))


def kernel(x: np.ndarray, method: str) -> np.ndarray:
  """The kernel at distances x, in pixels of the input (of the output if it is smaller)."""
  x = np.abs(x)
  if method == "bilinear":
    return np.maximum(1 - x, 0)
  near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))
