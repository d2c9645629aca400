"""Writes CIFAR-10 as one plain npz: `image` uint8 [50000 32 32 3], `label` int32 [50000].

  python experiments/cifar10_npz.py --source=DIR --out=cifar10.npz

DIR holds cifar10_train_a.npz and cifar10_train_b.npz, whose pictures are packed as lossless WebP
mosaics of 40 × 25; the official order of the training pictures is kept.
"""

import argparse
import io
import pathlib

import numpy as np
from PIL import Image


def unpack(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """One packed file -> pictures [25000 32 32 3] and labels [25000]."""
  packed = np.load(path)
  offsets, data = packed["offsets"], packed["webp"]
  mosaics = []
  for begin, end in zip(offsets, offsets[1:]):
    mosaic = np.asarray(Image.open(io.BytesIO(data[begin:end].tobytes())).convert("RGB"))
    mosaics.append(mosaic.reshape(40, 32, 25, 32, 3).swapaxes(1, 2).reshape(1000, 32, 32, 3))
  return np.concatenate(mosaics), packed["labels"].astype(np.int32)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--source", required=True, type=pathlib.Path)
  parser.add_argument("--out", required=True, type=pathlib.Path)
  flags = parser.parse_args()
  parts = [unpack(flags.source / f"cifar10_train_{half}.npz") for half in "ab"]
  image, label = (np.concatenate(arrays) for arrays in zip(*parts))
  mean, std = image.mean((0, 1, 2)) / 255, image.std((0, 1, 2)) / 255
  print(f"{len(image)} pictures, mean {mean.round(4)}, deviation {std.round(4)}")
  np.savez(flags.out, image=image, label=label)


if __name__ == "__main__":
  main()
