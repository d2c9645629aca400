"""Sources that fit in memory: scikit-learn's digits, npz files, arrays. NumPy only."""

import hashlib
import os
from collections.abc import Mapping
from urllib.parse import parse_qs

import numpy as np

from ssljax.data.files import text_digest
from ssljax.data.sources import Source, check_labels, check_split, take, unknown

ROLES = ("image", "label", "text")  # keys of arrays


def open_mapping(arrays: Mapping, where: str, channels: int) -> Source:
  """`{"image": [N h w c] or [N h w], "label": [N], "text": [N]}` as a source, label and text
  where there are any; the images are not copied."""
  if "image" not in arrays:
    raise ValueError(
      unknown("images: key 'image' is missing", "image", list(arrays), f"in {where}")
    )
  image = np.asarray(arrays["image"])
  if image.ndim == 3:
    image = image[..., None]
  if image.ndim != 4 or not len(image):
    raise ValueError(f"images of {where} have shape {image.shape}: [N h w c] or [N h w] is needed")
  if image.dtype.kind not in "uif":
    raise ValueError(f"images of {where} are {image.dtype}: integers or floats are needed")
  if image.dtype.kind in "ui" and image.dtype.itemsize > 2:
    # Scaled by their type's maximum they would be black; devices hold no 64 bits at all.
    raise ValueError(
      f"images of {where} are {image.dtype}: make them uint8, uint16, or floats on their own scale"
    )
  found = image.shape[-1]
  if found != channels and found != 1:
    raise ValueError(
      f"{where} has {found} channels, but channels={channels} is asked for: set channels={found}"
    )
  labels = check_labels(arrays.get("label"), len(image), where)
  texts = check_texts(arrays.get("text"), len(image), where)

  def fetch(index):
    part = image[np.asarray(index)]
    return part if found == channels else np.repeat(part, channels, axis=-1)

  return Source(
    name=where,
    size=len(image),
    labels=labels,
    encoded=False,
    fetch=fetch,
    example_name=lambda index: f"{where}[{int(index)}]",
    fingerprint={
      "kind": "arrays",
      "size": len(image),
      "shape": list(image.shape[1:]),
      "dtype": str(image.dtype),
      "digest": digest(image, labels),
      **({} if texts is None else {"texts": text_digest(texts)}),
    },
    dtype=str(image.dtype),
    channels=channels,
    shape=(*image.shape[1:3], channels),
    captions=None if texts is None else (lambda index: [(texts[int(i)],) for i in index]),
  )


def check_texts(texts, size: int, where: str) -> list[str] | None:
  """Texts as a list of strings, one an image, or None; a wrong length or type is an error."""
  if texts is None:
    return None
  found = np.asarray(texts)
  if found.shape != (size,) or found.dtype.kind != "U":
    raise ValueError(
      f"texts of {where} are {found.dtype} of shape {found.shape}: one string for each of the"
      f" {size} images is needed"
    )
  return found.tolist()


def digest(image: np.ndarray, labels: np.ndarray | None, limit: int = 2**26) -> str:
  """Hash of the labels and of evenly spaced images, at most 64 MiB: large sets open fast."""
  each = max(1, image[0].nbytes)
  rows = np.unique(
    np.linspace(0, len(image) - 1, min(len(image), max(1, limit // each))).astype(int)
  )
  state = hashlib.blake2b(digest_size=16)
  for start in range(0, len(rows), 1024):
    state.update(np.ascontiguousarray(image[rows[start : start + 1024]]).data)
  if labels is not None:
    state.update(labels.tobytes())
  return state.hexdigest()


def open_npz(rest: str, split: str, channels: int, cache_dir: str | None = None) -> Source:
  """`npz:FILE` with keys image, label and text, or `npz:FILE?image=KEY&label=KEY&text=KEY`. Its
  only split is "train"."""
  path, _, query = rest.partition("?")
  asked = {k: v[-1] for k, v in parse_qs(query).items()}
  for key in asked:
    if key not in ROLES:
      raise ValueError(unknown("key", key, ROLES, f"after ? in npz:{rest}"))
  if not os.path.isfile(path):
    raise FileNotFoundError(f"npz:{path}: there is no such file")
  try:
    with np.load(path, allow_pickle=False) as stored:
      for role in [r for r in ROLES if r == "image" or r in asked]:
        if asked.get(role, role) not in stored.files:
          raise KeyError(
            unknown("key", asked.get(role, role), stored.files, f"({role}) in npz:{path}")
          )
      names = {role: asked.get(role, role) for role in ROLES}
      arrays = {role: stored[name] for role, name in names.items() if name in stored.files}
  except KeyError as error:
    raise ValueError(error.args[0]) from None
  except Exception as error:  # zip, zlib, lzma and numpy raise half a dozen kinds on a damaged file
    raise ValueError(f"npz:{path} cannot be read: {str(error).splitlines()[0]}") from error
  source = open_mapping(arrays, f"npz:{rest}", channels)
  return take(source, split, ("train",))


def open_digits(kind: str, split: str, channels: int) -> Source:
  """`digits` (8x8, grey, 0..255) or `digits_photo` (24x24 RGB), splits "train" and "test"."""
  name = check_split(split, ("train", "test"), kind)
  if kind == "digits":
    image, label = digits(name)
  else:
    from ssljax.data.photos import digits_photo

    if channels != 3:
      raise ValueError(f"digits_photo has 3 channels, but channels={channels} is asked for")
    image, label = digits_photo(name)
  source = open_mapping({"image": image, "label": label}, kind, channels)
  source = source._replace(fingerprint=source.fingerprint | {"kind": kind, "split": name})
  if "[" in split:
    return take(source, split, (name,))
  return source


def digits(name: str) -> tuple[np.ndarray, np.ndarray]:
  """scikit-learn's handwritten digits: uint8 [N 8 8 1], int [N]; 1,437 train, 360 test."""
  from sklearn.datasets import load_digits

  data = load_digits()
  # Shuffled once: the file's order goes by writer, so that a plain cut would test on other hands.
  order = np.random.default_rng(0).permutation(len(data.target))
  part = order[360:] if name == "train" else order[:360]
  image = np.round(data.images[part] * (255 / 16)).astype(np.uint8)[..., None]
  return image, data.target[part]
