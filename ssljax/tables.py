"""Rows of features to a file, batch by batch, in constant memory: .npz or .parquet."""

import os
import pathlib
import shutil
import tempfile
import zipfile
from typing import Any

import numpy as np

CHUNK = 2**24  # bytes copied at a time
ROW_GROUP = 2**25  # bytes of features in a row group of a parquet file


def open_table(out: str | os.PathLike, size: int) -> Any:
  """A writer for `size` rows: a context manager with `add(rows)` and `describe()`.

  rows: {column: array [k …] or list of k texts}, the same columns each time. The file appears under
  its name when all rows are there.

  Raises:
    ValueError: a kind of file that is not written, or pyarrow is missing.
  """
  out = pathlib.Path(out)
  kinds = {".npz": Npz, ".parquet": Parquet}
  if out.suffix not in kinds:
    raise ValueError(f"--out {out}: features are written as {' or '.join(kinds)}")
  out.parent.mkdir(parents=True, exist_ok=True)
  return kinds[out.suffix](out, size)


class Npz:
  """Columns grow in memory-mapped .npy files beside the target and are zipped at the end."""

  def __init__(self, out: pathlib.Path, size: int):
    self.out, self.size, self.done = out, size, 0
    self.columns: dict[str, Any] = {}

  def __enter__(self):
    self._folder = tempfile.TemporaryDirectory(dir=self.out.parent, prefix=f".{self.out.name}.")
    return self

  def add(self, rows: dict[str, Any]) -> None:
    count = len(rows["index"])
    for name, value in rows.items():
      if isinstance(value, list):
        self._texts(name).writelines(text.replace("\n", " ") + "\n" for text in value)
        continue
      if name not in self.columns:
        path = self._path(name)
        shape = (self.size, *value.shape[1:])
        self.columns[name] = np.lib.format.open_memmap(path, "w+", value.dtype, shape)
      self.columns[name][self.done : self.done + count] = value
    self.done += count

  def describe(self) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())

  def __exit__(self, kind, error, trace):
    try:
      if kind is None:
        self._zip()
    finally:
      self.columns.clear()
      self._folder.cleanup()

  def _path(self, name: str) -> str:
    return os.path.join(self._folder.name, f"{name}.npy")

  def _texts(self, name: str) -> Any:
    if name not in self.columns:
      self.columns[name] = open(self._path(name) + ".txt", "w", encoding="utf-8")
    return self.columns[name]

  def _zip(self) -> None:
    if self.done != self.size:
      raise ValueError(f"{self.out} was to have {self.size} rows and got {self.done}")
    self.shapes = {}
    for name, column in self.columns.items():
      if isinstance(column, np.memmap):
        column.flush()
        self.shapes[name] = list(column.shape)
      else:
        column.close()
        _texts_to_npy(column.name, self._path(name), self.size)
        self.shapes[name] = [self.size]
    partial = os.path.join(self._folder.name, "whole.npz")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
      for name in self.columns:
        with open(self._path(name), "rb") as read, \
             archive.open(f"{name}.npy", "w", force_zip64=True) as write:  # fmt: skip
          shutil.copyfileobj(read, write, CHUNK)
    os.replace(partial, self.out)


def _texts_to_npy(source: str, target: str, size: int) -> None:
  """Lines of a file as a NumPy array of fixed-width texts, twice through the file."""
  with open(source, encoding="utf-8", newline="\n") as lines:
    width = max((len(line) - 1 for line in lines), default=0)
  array = np.lib.format.open_memmap(target, "w+", f"<U{max(width, 1)}", (size,))
  with open(source, encoding="utf-8", newline="\n") as lines:
    for i, line in enumerate(lines):
      array[i] = line[:-1]
  array.flush()


class Parquet:
  """Row groups of at most `ROW_GROUP` bytes; arrays [k n d] are lists of n·d numbers a row, their
  shape is noted in the metadata of the column."""

  def __init__(self, out: pathlib.Path, size: int):
    try:
      import pyarrow
      import pyarrow.parquet
    except ImportError as error:
      raise ValueError("a .parquet file needs pyarrow: pip install 'ssljax[parquet]'") from error
    self.arrow, self.out, self.size, self.done = pyarrow, out, size, 0
    self.partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    self.writer: Any = None
    self.waiting: list[Any] = []
    self.bytes = 0

  def __enter__(self):
    return self

  def add(self, rows: dict[str, Any]) -> None:
    if self.writer is None:
      self.shapes = {k: [self.size, *np.shape(v)[1:]] for k, v in rows.items()}
      self.schema = self.arrow.schema([self._field(k, v) for k, v in rows.items()])
      self.writer = self.arrow.parquet.ParquetWriter(self.partial, self.schema)
    columns = [self._column(rows[field.name], field.type) for field in self.schema]
    self.waiting.append(self.arrow.record_batch(columns, schema=self.schema))
    self.bytes += self.waiting[-1].nbytes
    self.done += len(rows["index"])
    if self.bytes >= ROW_GROUP:
      self._flush()

  def describe(self) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())

  def __exit__(self, kind, error, trace):
    try:
      if kind is None:
        if self.done != self.size:
          raise ValueError(f"{self.out} was to have {self.size} rows and got {self.done}")
        self._flush()
        self.writer.close()
        os.replace(self.partial, self.out)
    finally:
      self.partial.unlink(missing_ok=True)

  def _flush(self) -> None:
    if self.waiting:
      table = self.arrow.Table.from_batches(self.waiting, self.schema)
      self.writer.write_table(table, row_group_size=max(len(table), 1))
    self.waiting, self.bytes = [], 0

  def _field(self, name: str, value: Any) -> Any:
    if isinstance(value, list):
      return self.arrow.field(name, self.arrow.string())
    kind = self.arrow.from_numpy_dtype(value.dtype)
    if value.ndim == 1:
      return self.arrow.field(name, kind)
    kind = self.arrow.list_(kind, int(np.prod(value.shape[1:])))
    return self.arrow.field(name, kind, metadata={"shape": str(list(value.shape[1:]))})

  def _column(self, value: Any, kind: Any) -> Any:
    if isinstance(value, list) or value.ndim == 1:
      return self.arrow.array(value, kind)
    flat = self.arrow.array(np.ascontiguousarray(value).reshape(-1))
    return self.arrow.FixedSizeListArray.from_arrays(flat, kind.list_size)
