"""What all pictures share: colours, lettering, how an array becomes something to look at."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart with any common colour blindness, and in this order also in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT, RULE = "#1b1f24", "#5b6470", "#d5dae1"
HIDDEN = 0.62  # grey of a hidden place: neither black nor white, which images contain


def figure(width: float, height: float) -> Figure:
  """An empty figure in inches that draws with Agg; pyplot and its global state stay out."""
  made = Figure(figsize=(width, height), facecolor="white")
  FigureCanvasAgg(made)
  return made


def save(made: Figure, path: str | Path, dpi: int = 130) -> Path:
  """Writes a PNG; the file appears under its name only when it is whole."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  data = io.BytesIO()
  with matplotlib.rc_context({"font.family": "sans-serif"}):
    made.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
  part = path.with_name(path.name + ".part")
  part.write_bytes(data.getvalue())
  part.replace(path)
  return path


def as_rgb(image: np.ndarray) -> np.ndarray:
  """Any images as colours to look at: [b h w c] of any dtype -> [b h w 3] float32, 0..1.

  Integers are divided by their type's maximum; floats within 0..1 stay, others are stretched, each
  image and channel on its own. One or two channels: the first in grey; more than three: the first
  three.
  """
  image = np.asarray(image)
  if image.ndim != 4:
    raise ValueError(f"images must be [b h w c], got shape {image.shape}")
  image = image[..., :1] if image.shape[-1] < 3 else image[..., :3]
  if image.dtype == np.uint8:
    image = image.astype(np.float32) / 255
  else:
    image = image.astype(np.float32)
    low, high = np.nanmin(image), np.nanmax(image)
    if low < -1e-3 or high > 1 + 1e-3:
      low = np.nanmin(image, axis=(1, 2), keepdims=True)
      high = np.nanmax(image, axis=(1, 2), keepdims=True)
      image = (image - low) / np.maximum(high - low, 1e-12)
  return np.broadcast_to(np.nan_to_num(image), (*image.shape[:3], 3)).clip(0, 1)


def cover(image: np.ndarray, hidden: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
  """Greys the hidden places: [b h w 3], bool [b n], grid (rows, columns) -> [b h w 3]."""
  (height, width), (rows, columns) = image.shape[1:3], grid
  hidden = np.asarray(hidden, bool)
  if hidden.shape != (len(image), rows * columns):
    raise ValueError(
      f"hidden of shape {hidden.shape} does not fit {len(image)} images, grid {grid}"
    )
  # By pixel centre, so that it also holds where the side is no multiple of the grid.
  row = (np.arange(height) * rows) // height
  column = (np.arange(width) * columns) // width
  places = hidden.reshape(-1, rows, columns)[:, row][:, :, column]
  return np.where(places[..., None], np.float32(HIDDEN), image)


def show(axes, image: np.ndarray, frame: str | None = None, style: str | tuple = "-") -> None:
  """One image [h w 3] without ticks; small images stay blocky, large ones are smoothed."""
  smooth = "antialiased" if min(image.shape[:2]) >= 64 else "nearest"
  axes.imshow(image, interpolation=smooth, vmin=0, vmax=1)
  axes.set_xticks([])
  axes.set_yticks([])
  for spine in axes.spines.values():
    spine.set_visible(frame is not None)
    if frame:
      spine.set(color=frame, linewidth=2.2, linestyle=style)


def image_rows(
  rows: list[tuple[str, np.ndarray]], title: str, note: str = "", side: float = 1.15
) -> Figure:
  """Rows of images under each other with a label at the left: [(label, [b h w 3]), …] -> figure."""
  count = len(rows[0][1])
  height, width = rows[0][1].shape[1:3]
  tall = side * min(max(height / width, 0.4), 2.5)
  left, top, gap = 1.12, 0.62, 0.07
  total = (left + count * (side + gap) + 0.1, top + len(rows) * (tall + gap) + 0.1)
  # A title needs room of its own, also above one single image.
  total = (max(total[0], 4.6), total[1])
  made = figure(*total)
  heading(made, title, note)
  for i, (label, images) in enumerate(rows):
    bottom = total[1] - top - (i + 1) * (tall + gap) + gap
    middle = (bottom + tall / 2) / total[1]
    made.text(0.13 / total[0], middle, label, va="center", fontsize=9, color=FAINT)
    for j, image in enumerate(images):
      x = left + j * (side + gap)
      box = (x / total[0], bottom / total[1], side / total[0], tall / total[1])
      show(made.add_axes(box), image)
  return made


def heading(made: Figure, title: str, note: str = "") -> None:
  """Title and a line of explanation in the upper left corner."""
  width, height = made.get_size_inches()
  x, y = 0.13 / width, 1 - 0.12 / height
  made.text(x, y, title, ha="left", va="top", fontsize=11.5, fontweight="bold", color=INK)
  if note:
    y = 1 - 0.36 / height
    made.text(x, y, note, ha="left", va="top", fontsize=8.5, color=FAINT)
