"""The encoder's parameters to and from named tensors: every tensor is used, or named."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssljax.interop import resnet as resnet_names
from ssljax.interop import timm as timm_names
from ssljax.interop import transformers as transformers_names
from ssljax.leaves import named, nested
from ssljax.models import positions as positions_lib

FORMATS = ("timm", "transformers")
Tensors = Mapping[str, np.ndarray]


class Report(NamedTuple):
  """Of a file: our parameters that it lacks, its tensors that were not used, remarks."""

  missing: tuple[str, ...]
  unused: tuple[str, ...]
  notes: tuple[str, ...]


class Misfit(ValueError):
  """A tensor of another shape than ours."""


def from_params(params: Any, encoder: Any, shape: Sequence[int], to: str) -> dict[str, np.ndarray]:
  """The encoder's parameters as tensors that timm or Transformers load.

  shape: (h, w, c) of an example. Fixed positions are written out; "transformers" has no layer
  scale, which is multiplied into the matrices. Of a ResNet `params` are all its variables,
  {"params", "batch_stats"}.

  Raises:
    ValueError: the other side cannot express this encoder; says what and why.
  """
  check_exportable(encoder, to)
  if encoder.patch is None:
    return resnet_names.from_variables(params)
  grid, d = encoder.grid(tuple(shape[:-1])), encoder.width
  table = np.zeros((math.prod(grid), d), np.float32)
  if encoder.positions == "sincos":
    table = positions_lib.sincos(grid, d)
  tensors = {}
  for path, leaf in named(params).items():
    leaf = np.asarray(leaf, np.float32)
    if path == "positions":
      table = leaf
    elif path.endswith("/q_bias"):  # keys without a bias are keys with a bias of zero
      v = np.asarray(named(params)[path.replace("/q_bias", "/v_bias")], np.float32)
      name = timm_names.timm_name(path.replace("/q_bias", "/qkv/bias"))
      tensors[name] = np.concatenate([leaf, np.zeros_like(leaf), v])
    elif not path.endswith("/v_bias"):
      tensors[timm_names.timm_name(path)] = timm_names.to_timm(path, leaf, encoder.patch)
  # Class token and registers get no position here: theirs are rows of zeros.
  tensors["pos_embed"] = np.concatenate([np.zeros((encoder.prefix, d), np.float32), table])[None]
  return tensors if to == "timm" else transformers_names.from_timm_names(tensors)


def check_exportable(encoder: Any, to: str) -> None:
  """Raises ValueError where timm's VisionTransformer or Transformers' ViTModel cannot be this."""
  if to not in FORMATS:
    raise ValueError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")
  if encoder.patch is None:
    return resnet_names.check_exportable(encoder, to)
  model = {"timm": "timm's VisionTransformer", "transformers": "Transformers' ViTModel"}[to]
  lacks = {
    'positions="relative"': (encoder.positions == "relative", "relative-position bias"),
    'positions="rotary"': (encoder.positions == "rotary", "rotary positions"),
    'norm="post"': (encoder.norm == "post", "norms after the branches"),
    'pool="attention"': (encoder.pool == "attention", "such pooling"),
    "pre_norm=True": (encoder.pre_norm, "such norm"),
    f'activation="{encoder.activation}"': (encoder.activation != "gelu", "such activation"),
  }
  for setting, (has, what) in lacks.items():
    if has:
      raise ValueError(f"{model} has no {what}: encoder.{setting} cannot be exported")
  if len(encoder.patch) != 2:
    raise ValueError(f"{model} takes images; this encoder's grid has {len(encoder.patch)} axes")
  if to == "transformers" and not encoder.class_token:
    raise ValueError(f"{model} always has a class token, this encoder has none; use --to=timm")
  if to == "transformers" and encoder.registers:
    raise ValueError(
      f"{model} has no register tokens, this encoder has {encoder.registers}; use --to=timm"
    )


def to_params(
  tensors: Tensors, encoder: Any, shape: Sequence[int], grid: Sequence[int] | None = None
) -> tuple[dict, Report]:
  """Named tensors (timm, MAE release, Transformers) as the encoder's parameters.

  shape: (h, w, c) of the examples to come. grid: the file's own, where its positions are not those
  of a square. Positions are resized to the encoder's grid. Parameters that the file lacks are left
  out of the tree and named in the report, as are tensors that were not used. For a ResNet the
  result are all its variables, {"params", "batch_stats"}.

  Raises:
    ValueError: the file is of another architecture; one line that says where.
  """
  if encoder.patch is None:
    variables, unused = resnet_names.to_variables(tensors, encoder, shape)
    return variables, Report((), unused, ())
  tensors = canonical(tensors)
  _check_depth(tensors, encoder)
  template = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
  found, missing, notes, used = {}, [], [], {"pos_embed"}
  for path, leaf in named(template).items():
    name = timm_names.timm_name(path)
    if path == "positions":
      continue
    if path.endswith(("/q_bias", "/v_bias")):
      name = re.sub(r"\.[qv]_bias$", ".qkv.bias", name)
    if path.startswith("norm/") and name not in tensors and f"fc_{name}" in tensors:
      notes.append(f"fc_{name}, which comes after the pooling there, is used as {name}")
      name = f"fc_{name}"
    if name in tensors:
      used.add(name)
      found[path] = _fitted(path, name, tensors[name], leaf.shape, encoder)
    elif re.search(r"/scale[12]$", path):
      found[path] = np.ones(leaf.shape, np.float32)
      notes.append("the file has no layer scale: it is set to 1")
    elif path.startswith(("stem/", "blocks/", "norm/")):
      raise ValueError(f"the weights lack {name}, which the encoder needs for {path}")
    else:
      missing.append(path)
  _place(found, missing, tensors, encoder, encoder.grid(tuple(shape[:-1])), grid)
  unused = tuple(name for name in tensors if name not in used)
  _check_unused(unused)
  return nested(found), Report(tuple(missing), unused, tuple(dict.fromkeys(notes)))


def to_decoder(tensors: Tensors, template: Any) -> tuple[dict, tuple[str, ...]]:
  """The tensors of MAE's decoder -> (parameters shaped as `template`, the names that were used).

  Its positions are taken to be the fixed table, which is computed here.

  Raises:
    ValueError: there is no such decoder in the file, or it is of another size.
  """
  tensors, found, used = canonical(tensors), {}, ["decoder_pos_embed"]
  for path, leaf in named(template).items():
    name = timm_names.decoder_name(path)
    if name not in tensors:
      raise ValueError(f"the file has no {name}")
    found[path] = timm_names.from_timm(path, np.asarray(tensors[name], np.float32))
    used.append(name)
    if found[path].shape != leaf.shape:
      raise Misfit(f"{name} is {_letters(tensors[name].shape)} and does not fit {path}")
  if more := [name for name in tensors if name.startswith("decoder_") and name not in used]:
    raise Misfit(f"the file's decoder also has {more[0]}: decoder_depth differs")
  return nested(found), tuple(used)


def canonical(tensors: Tensors) -> dict[str, np.ndarray]:
  """The tensors under timm's names, without the prefixes that wrappers leave."""
  for prefix in ("module.", "model.", "backbone."):
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
  if transformers_names.is_transformers(tensors):
    return transformers_names.to_timm_names(tensors)
  if "patch_embed.proj.weight" not in tensors:
    some = ", ".join(sorted(tensors)[:3])
    raise ValueError(
      f"these are no weights of a ViT of timm, MAE or Transformers (they hold {some}, …)"
    )
  return dict(tensors)


def _check_depth(tensors: Tensors, encoder: Any) -> None:
  blocks = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
  if len(blocks) != encoder.depth:
    raise ValueError(f"the file has {len(blocks)} blocks, encoder.depth is {encoder.depth}")


def _check_unused(unused: Sequence[str]) -> None:
  """Tensors inside the transformer cannot be passed over: the features would silently be wrong."""
  for name in unused:
    if name.endswith(".gamma"):
      raise ValueError("the file has layer scale: set encoder.layer_scale, e.g. to 1e-5")
    if name.startswith(("blocks.", "patch_embed.", "norm_pre.")):
      raise ValueError(f"the encoder has nothing like {name}: the file is of another architecture")


def _fitted(path: str, name: str, tensor: Any, shape: Sequence[int], encoder: Any) -> np.ndarray:
  """The tensor in our layout and shape."""
  tensor = np.asarray(tensor, np.float32)
  part = path.endswith(("/q_bias", "/v_bias"))
  want = (3 * shape[0],) if part else timm_names.timm_shape(path, shape, encoder.patch)
  if tensor.shape != want:
    raise Misfit(
      f"{name} is {_letters(tensor.shape)} in the file, the encoder wants {_letters(want)}"
      " (encoder.width, heads, patch or data.channels differ)"
    )
  if part:  # a bias of the keys would move all logits of a query alike: it has no effect
    return np.split(tensor, 3)[0 if path.endswith("/q_bias") else 2]
  return timm_names.from_timm(path, tensor)


def _place(found, missing, tensors, encoder, grid, old) -> None:
  """Positions: rows of the prefix go into its tokens, those of the grid are resized or compared."""
  table = tensors.get("pos_embed")
  if table is None:
    if encoder.positions == "learned":
      missing.append("positions")
    return
  table = np.asarray(table, np.float32).reshape(-1, table.shape[-1])
  registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
  prefix = int("cls_token" in tensors) + registers
  old = _old_grid(len(table), prefix, grid, old)
  rows, table = np.split(table, [len(table) - math.prod(old)])
  has_class = int("cls_token" in tensors)
  if len(rows) and has_class and "cls_token" in found:
    found["cls_token"] = found["cls_token"] + rows[0]
  if len(rows) > has_class and "registers" in found:
    found["registers"] = found["registers"] + rows[has_class:]
  if encoder.positions == "learned":
    found["positions"] = positions_lib.resize_table(table, old, grid)
    return
  fixed = positions_lib.sincos(old, encoder.width) if encoder.positions == "sincos" else 0 * table
  if np.abs(table - fixed).max() > 1e-4:
    raise ValueError(
      "the file's positions are a table of its own, the encoder's are"
      f' "{encoder.positions}": set encoder.positions="learned"'
    )


def _old_grid(rows: int, prefix: int, grid: Sequence[int], given: Any) -> tuple[int, ...]:
  """The file's grid: as given, the encoder's own if it has as many places, else a square.

  The table may hold rows for the whole prefix, for the class token alone or for no prefix at all.
  """
  if given is not None:
    return tuple(given)
  for first in (prefix, 1, 0):
    if rows - first == math.prod(grid):
      return tuple(grid)
  for first in (prefix, 1, 0):
    side = math.isqrt(max(rows - first, 0))
    if side and side**2 == rows - first and len(grid) == 2:
      return (side, side)
  raise ValueError(f"pos_embed has {rows} rows, which are no square grid: its grid is not known")


def _letters(shape: Sequence[int]) -> str:
  return f"[{' '.join(map(str, shape))}]"
