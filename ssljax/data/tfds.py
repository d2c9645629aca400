"""`tfds:NAME`: a data set prepared by TensorFlow Datasets, read where it lies; nothing is
downloaded."""

import logging
import os
import struct
from urllib.parse import parse_qs

import numpy as np

from ssljax.data.files import Shards, cached_index, text_digest
from ssljax.data.folder import first_readable
from ssljax.data.sources import Source, check_split, take, unknown
from ssljax.data.tensorflow import load


def open_tfds(rest: str, split: str, channels: int, cache_dir: str | None = None) -> Source:
  """`tfds:NAME[/CONFIG][:VERSION]`, then optionally `?data_dir=DIR&image=FEATURE&label=FEATURE`.

  ArrayRecord is read at random places as it is. TFRecord has no index: it is read through once, in
  sequence, to make one, which is said and cached.
  """
  if channels not in (1, 3):
    raise ValueError(f"tfds:{rest} holds pictures, which have 1 or 3 channels, not {channels}")
  name, _, query = rest.partition("?")
  asked = {k: v[-1] for k, v in parse_qs(query).items()}
  for key in asked:
    if key not in ("data_dir", "image", "label"):
      raise ValueError(
        unknown("key", key, ("data_dir", "image", "label"), f"after ? in tfds:{rest}")
      )
  load()
  import tensorflow_datasets as tfds

  place = find_prepared(name, asked.get("data_dir"))
  builder = tfds.builder_from_directory(place)
  where = f"tfds:{name}"
  part = builder.info.splits[check_split(split, tuple(builder.info.splits), where)]
  image, label = features(builder.info.features, asked, where)
  paths = [str(path) for path in part.filepaths]
  missing = [path for path in paths if not os.path.isfile(path)]
  if missing:
    raise FileNotFoundError(
      f"{where}: {len(missing)} of {len(paths)} files are missing, {missing[0]} first"
    )
  form = str(builder.info.file_format.value)
  records, close, size = open_records(form, paths, where, cache_dir)
  if size != part.num_examples:
    raise ValueError(
      f"{where}: the files of {part.name} hold {size} records, "
      f"dataset_info.json says {part.num_examples}"
    )

  def read(index):
    return parse(records(index), image, label)

  def pictures(index):
    return read(index)[0]

  if first_readable((pictures([i])[0] for i in range(size)), "picture", channels) is None:
    raise ValueError(f"{where}: none of the {size} images of {part.name} can be read")
  source = Source(
    name=where,
    size=size,
    labels=None,
    encoded=True,
    fetch=pictures,
    example_name=lambda i: f"{where}/{part.name}[{int(i)}]",
    fingerprint={
      "kind": "tfds",
      "size": size,
      "set": builder.info.full_name,
      "split": part.name,
      "digest": text_digest(f"{os.path.basename(p)}\t{os.path.getsize(p)}" for p in paths),
    },
    form="picture",
    channels=channels,
    read=read if label else None,
    close=close,
  )
  return take(source, split, (part.name,))


def find_prepared(name: str, data_dir: str | None) -> str:
  """Folder of the newest prepared version of a set. Raises FileNotFoundError with the command that
  prepares it."""
  base = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  base = os.path.expanduser(base)
  name, _, version = name.partition(":")
  found = []
  for place, folders, files in os.walk(os.path.join(base, name)):
    if "dataset_info.json" in files:
      folders.clear()
      found.append(place)
  numbered = [(tuple(map(int, os.path.basename(p).split("."))), p) for p in found if _is_version(p)]
  if version:
    numbered = [pair for pair in numbered if os.path.basename(pair[1]) == version]
  if not numbered:
    known = sorted(os.listdir(base)) if os.path.isdir(base) else []
    raise FileNotFoundError(
      f"tfds:{name} is not prepared in {base} (there are: {', '.join(known) or 'none'}); "
      f"run: tfds build {name} --file_format=array_record --data_dir={base}"
    )
  return max(numbered)[1]


def _is_version(place: str) -> bool:
  return all(part.isdigit() for part in os.path.basename(place).split("."))


def features(described, asked: dict, where: str) -> tuple[str, str | None]:
  """Names of the image and the label feature (None if the set has no single integer label)."""
  import tensorflow_datasets as tfds

  pictures = [k for k, v in described.items() if isinstance(v, tfds.features.Image)]
  image = asked.get("image", "image" if "image" in pictures else (pictures or ["image"])[0])
  if image not in pictures:
    raise ValueError(unknown("image feature", image, pictures or list(described), f"in {where}"))
  numbers = [k for k, v in described.items() if v.shape == () and np.dtype(v.np_dtype).kind in "ui"]
  label = asked.get("label", "label" if "label" in numbers else None)
  if label is not None and label not in numbers:
    raise ValueError(unknown("label feature", label, numbers or list(described), f"in {where}"))
  return image, label


def open_records(form: str, paths: list[str], where: str, cache_dir: str | None):
  """Reader of serialised examples by index, its close function, and how many there are."""
  if form == "array_record":
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    records = ArrayRecordDataSource(paths)
    return (lambda index: records.__getitems__([int(i) for i in index])), lambda: None, len(records)
  if form != "tfrecord":
    raise ValueError(f"{where} is stored as {form}: prepare it with --file_format=array_record")
  logging.warning(
    "%s is stored as TFRecord, which has no index: all %d files are read through once, in "
    "sequence, to find the records (kept in the cache). To start at once everywhere prepare it "
    "with: tfds build --file_format=array_record",
    where,
    len(paths),
  )
  parts = [cached_index(path, "tfrecord", index_tfrecord, cache_dir) for path in paths]
  shard = np.repeat(np.arange(len(paths)), [len(p["start"]) for p in parts])
  start, length = (np.concatenate([p[k] for p in parts]) for k in ("start", "length"))
  shards = Shards(paths, shard, start, length)
  return shards.read, shards.close, len(start)


def index_tfrecord(path: str) -> dict[str, np.ndarray]:
  """Place and length of each record: uint64 length, uint32 checksum, data, uint32 checksum, and so
  on."""
  start, length, at, end = [], [], 0, os.path.getsize(path)
  with open(path, "rb") as file:
    while at < end:
      file.seek(at)
      head = file.read(8)
      size = struct.unpack("<Q", head)[0] if len(head) == 8 else end
      if at + 16 + size > end:
        raise ValueError(f"TFRecord file {path} is cut off or damaged at byte {at} of {end}")
      start.append(at + 12)
      length.append(size)
      at += 16 + size
  return {"start": np.array(start, np.int64), "length": np.array(length, np.int64)}


def parse(
  records: list[bytes], image: str, label: str | None
) -> tuple[list[bytes], np.ndarray | None]:
  """Image bytes and labels of serialised examples; "" where a record holds no image."""
  tf = load()
  wanted = {image: tf.io.FixedLenFeature([], tf.string, "")}
  if label:
    wanted[label] = tf.io.FixedLenFeature([], tf.int64, -1)
  with tf.device("/CPU:0"):
    try:
      parsed = tf.io.parse_example(tf.constant(records, tf.string), wanted)
    except tf.errors.InvalidArgumentError:
      if len(records) == 1:
        return [b""], np.full(1, -1, np.int32) if label else None
      # One damaged record must not take the batch with it.
      pairs = [parse([record], image, label) for record in records]
      texts = [pair[0][0] for pair in pairs]
      return texts, np.concatenate([pair[1] for pair in pairs]) if label else None
  labels = parsed[label].numpy().astype(np.int32) if label else None
  return list(parsed[image].numpy()), labels
