"""Weight files as dicts of NumPy arrays. Nothing that a file says is executed."""

import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np

TORCH = (".pth", ".pt", ".bin", ".ckpt")
# Keys under which training scripts keep the weights of the model.
INSIDE = ("model", "state_dict", "model_state_dict", "module")


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Tensors by name of a .safetensors file, a PyTorch file, or a folder of a Transformers model.

  PyTorch files are read with `weights_only=True` and need torch installed.

  Raises:
    FileNotFoundError: no such file, or a folder without weights.
    ValueError: a file that cannot be read; the message says why.
    ImportError: a PyTorch file, and torch is not installed.
  """
  parts = [_read_file(file) for file in _files(pathlib.Path(path))]
  return {name: tensor for part in parts for name, tensor in part.items()}


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
  """What a .safetensors file says of itself, and for a folder its config.json, as "heads" and
  "eps"; empty for other files."""
  from safetensors import SafetensorError, safe_open

  path = pathlib.Path(path)
  first = _files(path)[0]
  stated = _stated(path / "config.json") if path.is_dir() else {}
  if first.suffix != ".safetensors":
    return stated
  try:
    with safe_open(first, "np") as file:
      return stated | (file.metadata() or {})
  except SafetensorError as error:
    raise ValueError(f"{first} is no sound safetensors file: {error}") from None


def _stated(config: pathlib.Path) -> dict[str, str]:
  given = json.loads(config.read_text()) if config.is_file() else {}
  names = {"num_attention_heads": "heads", "layer_norm_eps": "eps"}
  return {ours: json.dumps(given[name]) for name, ours in names.items() if name in given}


def write_weights(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
  """Writes a .safetensors file in one go: a reader sees the old file or the whole new one."""
  from safetensors.numpy import save_file

  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  # safetensors writes the memory as it lies: transposed views would come out scrambled.
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, dict(metadata))
  partial.chmod(0o666 & ~_umask())  # safetensors leaves a file that its owner alone may read
  os.replace(partial, path)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise FileNotFoundError(f"no weight file {path}")
  index = path / "model.safetensors.index.json"
  if index.is_file():
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path / pathlib.PurePath(name).name for name in names]
  for name in ("model.safetensors", "pytorch_model.bin"):
    if (path / name).is_file():
      return [path / name]
  raise FileNotFoundError(f"{path} holds neither checkpoints/ of a run nor model.safetensors")


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  if path.suffix == ".safetensors":
    return _read_safetensors(path)
  if path.suffix in TORCH:
    return _read_torch(path)
  kinds = ", ".join((".safetensors", *TORCH))
  raise ValueError(f"{path}: weights are read from {kinds}, or from the workdir of a run")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  try:
    return load_file(path)
  except (SafetensorError, KeyError) as error:
    raise ValueError(f"{path} is no sound safetensors file: {error}") from None


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path} is a PyTorch file: install torch to read it, or convert it to .safetensors"
    ) from error
  import pickle

  try:
    found = torch.load(path, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ValueError(
      f"{path} holds more than tensors, or is damaged, and is not read: {reason}"
    ) from None
  for key in INSIDE:
    if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
      found = found[key]
  tensors = found.items() if isinstance(found, Mapping) else ()
  arrays = {k: v.float().numpy() for k, v in tensors if isinstance(v, torch.Tensor)}
  if not arrays:
    raise ValueError(f"{path} holds no tensors by name")
  return arrays
