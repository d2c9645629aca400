"""Masked prediction: hide places of an example, predict something about them.

MAE (He et al. 2021, 2111.06377): layout "drop", head "decoder", target "normalised_pixels".
SimMIM (Xie et al. 2021, 2111.09886): layout "replace", head "linear", target "pixels", loss "l1".
data2vec for images (Baevski et al. 2022, 2202.03555): layout "replace", head "linear", target
"teacher", loss "smooth_l1".
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax import collapse, losses, names, schedules, targets
from ssljax.models import tokens as tokens_lib
from ssljax.models.decoders import LinearHead, TransformerDecoder
from ssljax.models.layers import TOKENS
from ssljax.models.views import evaluated
from ssljax.step import Method, example_keys

LOSSES: dict[str, Callable] = {
  "l1": losses.masked_l1,
  "l2": losses.masked_l2,
  "smooth_l1": losses.masked_smooth_l1,
}
CHOICES = {
  "layout": ("drop", "replace"),
  "head": ("decoder", "linear"),
  "target": ("normalised_pixels", "pixels", "teacher"),
  "teacher_norm": ("layer", "instance"),
  "loss": tuple(LOSSES),
}


class Parts(NamedTuple):
  """What the functions of the method share. `loss`: ([b m t], [b m t]) -> [b]; `sizes`: width,
  depth and heads of the decoder."""

  encoder: Any
  hidden_count: int
  layout: str
  head: str
  target: str
  loss: Callable
  sizes: tuple[int, int, int]
  momentum: Callable
  teacher_layers: int
  teacher_norm: str


def masked(
  encoder,
  hidden_count: int,
  *,
  layout: str = "drop",
  head: str = "decoder",
  target: str = "normalised_pixels",
  loss: str = "l2",
  loss_beta: float = 2.0,
  decoder_width: int = 512,
  decoder_depth: int = 8,
  decoder_heads: int = 16,
  teacher_momentum=0.9998,
  teacher_layers: int = 6,
  teacher_norm: str = "layer",
) -> Method:
  """A masked-prediction method.

  Args:
    encoder: from `models/`, e.g. `vit(…)`.
    hidden_count: how many places of every example `batch["hidden"]` bool [b n] hides.
    layout: "drop" (the encoder sees the visible tokens only) or "replace" (it sees all, the hidden
      ones exchanged for a learnt vector).
    head: "decoder" (transformer of `decoder_width`, `decoder_depth`, `decoder_heads`; needs layout
      "drop") or "linear".
    target: "normalised_pixels", "pixels", or "teacher": the mean of the last `teacher_layers`
      normalised blocks of an average of the encoder, moved by `teacher_momentum` (a number, or a
      schedule of the step) after each step, seeing the whole example.
    teacher_norm: of each block, "layer" (each token over its channels) or "instance" (each channel
      over the tokens, as for audio and in data2vec 2.0: what all tokens of an example share is no
      part of the target).
    loss: "l2", "l1", or "smooth_l1" with `loss_beta`.

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  _check(dict(layout=layout, head=head, target=target, loss=loss, teacher_norm=teacher_norm))
  if encoder.patch is None:
    raise ValueError("masked prediction hides patches: it needs an encoder of patches, such as vit")
  loss_fn = LOSSES[loss]
  if loss == "smooth_l1":
    loss_fn = functools.partial(loss_fn, beta=loss_beta)
  parts = Parts(
    encoder=encoder, hidden_count=hidden_count, layout=layout, head=head, target=target,
    loss=loss_fn, sizes=(decoder_width, decoder_depth, decoder_heads),
    momentum=schedules.moving(teacher_momentum), teacher_layers=teacher_layers,
    teacher_norm=teacher_norm,
  )  # fmt: skip
  init, loss_and_stats, update, encode, reconstruct = (
    functools.partial(f, parts) for f in (_init, _loss, _update, _encode, _reconstruct)
  )
  pictures = None if target == "teacher" else reconstruct
  return Method(init, loss_and_stats, update, encode, pictures, ("image", "hidden", "index"))


def _init(parts: Parts, rng, batch):
  encoder = parts.encoder
  x = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
  grid = encoder.grid(x.shape[1:-1])
  hidden = jnp.arange(math.prod(grid))[None] < parts.hidden_count
  keep, places = tokens_lib.split_hidden(hidden, parts.hidden_count)
  rngs = jax.random.split(rng, 3)
  params = {"encoder": encoder.init(rngs[0], x)["params"]}
  if parts.layout == "replace":
    params["mask_token"] = TOKENS[encoder.init_kernels](rngs[1], (encoder.width,))
  tokens = jnp.zeros((1, encoder.prefix + keep.shape[1], encoder.width))
  if parts.head == "linear":
    tokens = jnp.zeros((1, encoder.prefix + hidden.shape[1], encoder.width))
    params["head"] = _head(parts, x.shape).init(rngs[2], tokens, places)["params"]
  else:
    args = (tokens, grid, hidden, keep, places)
    params["decoder"] = _head(parts, x.shape).init(rngs[2], *args)["params"]
  extra = {"teacher": {"encoder": params["encoder"]}} if parts.target == "teacher" else {}
  return params, jax.tree.map(jnp.copy, extra)


def _head(parts: Parts, shape) -> LinearHead | TransformerDecoder:
  """The head for examples of a shape [… c]."""
  encoder, teacher = parts.encoder, parts.target == "teacher"
  out = encoder.width if teacher else math.prod(encoder.patch) * shape[-1]
  if parts.head == "linear":
    # SimMIM leaves its head at PyTorch's default; data2vec draws it like the encoder.
    start = encoder.init_kernels if teacher else "torch"
    return LinearHead(out, encoder.prefix, start, encoder.dtype)
  speed = dict(scan=encoder.scan, remat=encoder.remat, dtype=encoder.dtype)
  return TransformerDecoder(*parts.sizes, out, encoder.prefix, encoder.eps, **speed)


def _loss(parts: Parts, params, extra, batch, rng, step):
  """The loss at the hidden places."""
  pred, places, pooled = _predict(parts, params, batch, example_keys(rng, batch["index"]))
  wanted = tokens_lib.take(_target(parts, extra, batch["image"]), places)
  metrics = collapse.features(pooled)
  if (
    parts.target == "teacher"
  ):  # constant features would be predicted perfectly: watch their spread
    metrics["target_std"] = wanted.astype(jnp.float32).std(axis=(0, 1)).mean()
  rows = {"pooled": jax.lax.stop_gradient(pooled)}
  return parts.loss(pred, wanted).mean(), ({"rows": rows}, metrics)


def _predict(parts: Parts, params, batch, keys):
  """What is predicted at the hidden places, where they are, the pooled features of what was
  seen: [b m t], [b m], [b d]."""
  encoder, x, hidden = parts.encoder, batch["image"], batch["hidden"]
  keep, places = tokens_lib.split_hidden(hidden, parts.hidden_count)
  variables = {"params": params["encoder"]}
  if parts.layout == "drop":
    out = encoder.apply(variables, x, keep=keep, keys=keys)
  else:
    mask_token = params["mask_token"]
    out = encoder.apply(variables, x, hidden=hidden, mask_token=mask_token, keys=keys)
  linear, tokens = parts.head == "linear", out["tokens"]
  args = (places,) if linear else (encoder.grid(x.shape[1:-1]), hidden, keep, places)
  variables = {"params": params["head" if linear else "decoder"]}
  pred = _head(parts, x.shape).apply(variables, tokens, *args)
  return pred, places, out["pooled"]


def _target(parts: Parts, extra, x: jax.Array) -> jax.Array:
  """What is to be predicted at every place: [b s1…sr c] -> [b n t]."""
  encoder = parts.encoder
  if parts.target == "teacher":
    last = range(-parts.teacher_layers, 0)
    variables = {"params": extra["teacher"]["encoder"]}
    out = encoder.apply(variables, x, layers=tuple(last))
    blocks = [out[f"layer_{encoder.depth + i}"][:, encoder.prefix :] for i in last]
    return jax.lax.stop_gradient(targets.average_layers(blocks, norm=parts.teacher_norm))
  patches = tokens_lib.patchify(x, encoder.patch)
  return targets.normalised_pixels(patches) if parts.target == "normalised_pixels" else patches


def _update(parts: Parts, params, extra, stats, step):
  if parts.target != "teacher":
    return extra
  m = parts.momentum(step)
  move = lambda old, new: old * m + new * (1 - m)  # noqa: E731
  teacher = jax.tree.map(move, extra["teacher"], {"encoder": params["encoder"]})
  return extra | {"teacher": teacher}


def _encode(parts: Parts, params, extra, batch, layers=()):
  return evaluated(parts.encoder, params["encoder"], {}, batch["image"], layers)


def _reconstruct(parts: Parts, params, extra, batch, rng, step):
  """Pictures [b s1…sr c] with the predictions at the hidden places."""
  encoder, x = parts.encoder, batch["image"]
  pred, places, _ = _predict(parts, params, batch, None)
  patches = tokens_lib.patchify(x, encoder.patch).astype(jnp.float32)
  if parts.target == "normalised_pixels":
    pred = targets.unnormalise(pred, tokens_lib.take(patches, places))
  rows = jnp.arange(len(x))[:, None]
  patches = patches.at[rows, places].set(pred.astype(jnp.float32))
  return tokens_lib.unpatchify(patches, encoder.grid(x.shape[1:-1]), encoder.patch)


def _check(given: dict[str, str]) -> None:
  names.choices(given, CHOICES)
  if (given["layout"] == "drop") != (given["head"] == "decoder"):
    raise ValueError('layout "drop" needs head "decoder", and layout "replace" head "linear"')
