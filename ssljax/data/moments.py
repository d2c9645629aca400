"""Mean and deviation of each channel, measured over a sample."""

import numpy as np

from ssljax.data import images
from ssljax.data.images import MAX_PIXELS
from ssljax.data.sources import Source


def value_range(dtype) -> float:
  """Largest value of an integer dtype; 1 for floats: what the 0..1 scale divides by."""
  dtype = np.dtype(dtype)
  return float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0


def moments(source: Source, channels: int = 3, sample: int = 2000) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation over evenly spaced examples: float32 [c] each, integers on the 0..1 scale.

  Every pixel counts the same. Unreadable images are left out.
  """
  index = np.unique(np.linspace(0, source.size - 1, min(source.size, sample)).astype(int))
  count, total, square = 0, np.zeros(channels), np.zeros(channels)
  for start in range(0, len(index), 64):
    for image in readable(source, index[start : start + 64], channels):
      flat = image.reshape(-1, channels).astype(np.float64)
      count += len(flat)
      total += flat.sum(0)
      square += (flat**2).sum(0)
  if not count:
    raise ValueError(f"no readable image in the sample of {source.name}")
  mean = total / count
  scale = value_range(source.dtype)
  deviation = np.sqrt(np.maximum(square / count - mean**2, 0))
  # A constant channel would divide by zero on the device.
  deviation = np.where(deviation > 1e-6 * scale, deviation, scale)
  return (mean / scale).astype(np.float32), (deviation / scale).astype(np.float32)


def readable(source: Source, index: np.ndarray, channels: int) -> list[np.ndarray]:
  """Decoded images [h w c] of any size, the damaged ones left out."""
  records = source.fetch(index)
  if not source.encoded:
    return list(records)
  found = []
  for record in records:
    try:
      if source.form == "npy":
        height, width, depth, body = images.read_npy(record, MAX_PIXELS, channels, source.dtype)
        image = np.frombuffer(body, source.dtype).reshape(height, width, depth)
        found.append(np.broadcast_to(image, (height, width, channels)))
      else:
        images.read_header(record, MAX_PIXELS, channels)
        picture = np.asarray(images.picture(record, channels))
        found.append(picture.reshape(*picture.shape[:2], channels))
    except (ValueError, OSError, SyntaxError):
      continue
  return found
