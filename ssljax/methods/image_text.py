"""Images and their texts in one space: two encoders and a contrast of pairs.

CLIP (Radford et al. 2021, 2103.00020): loss "clip".
SigLIP (Zhai et al. 2023, 2303.15343): loss "siglip", `scale` 10, `bias` -10, `project` "text".
SLIP (Mu et al. 2021, 2112.12750): loss "clip" and SimCLR on two more views, with a `projector`.
FLIP (Li et al. 2022, 2212.00794): `flip`, whose image encoder sees the visible patches alone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax import collapse, losses, names
from ssljax.models import tokens as tokens_lib
from ssljax.models.heads import Projector
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import evaluated
from ssljax.step import Method, coupled, example_keys

CHOICES = {"loss": ("clip", "siglip"), "project": ("both", "text")}


class Parts(NamedTuple):
  """What the functions of the methods share. `reader` is the encoder of texts, `to_common` the maps
  into the common space, `projector` the head of further views, None where the method has none."""

  encoder: Any
  reader: Any
  to_common: dict[str, Any]
  projector: Any
  hidden_count: int
  loss: str
  scale: float
  bias: float
  row_only_grad: bool
  views_weight: float
  views_temperature: float


def image_text(
  encoder,
  batch_size: int,
  vocabulary: int,
  *,
  text_encoder: Callable,
  loss: str = "clip",
  width: int = 512,
  project: str = "both",
  scale: float = 1 / 0.07,
  bias: float = -10.0,
  row_only_grad: bool = False,
  projector: tuple[int, ...] = (),
  views_weight: float = 1.0,
  views_temperature: float = 0.1,
) -> Method:
  """A method of pairs, `batch["image"]` [b h w c] and `batch["text"]` [b l] of ids.

  Args:
    encoder: from `models/`, without batch norm.
    text_encoder: vocabulary -> the encoder of texts, `models.text`.
    loss: "clip" (softmax over the batch) or "siglip" (sigmoid of every pair).
    width: of the common space.
    project: "both": linear maps without bias of both pooled features (CLIP); "text": of the
      text's alone, with bias, into the width of the image encoder (SigLIP).
    scale, bias: starting values of the learnt factor of cosines (its logarithm is the parameter
      `log_scale`) and of what SigLIP adds to them. Neither decays; CLIP's scale is kept at 100 or
      less by the optimizer's `limits`.
    row_only_grad: of `losses.clip_loss`, as in the published runs of SLIP.
    projector: widths of SLIP's head for `batch["views"]` [b 2 h w c], batch norm between its
      layers; () is no further loss. views_weight, views_temperature: of that loss.

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  given = (text_encoder, loss, width, project, scale, bias, row_only_grad)
  views = (projector, views_weight, views_temperature)
  return _pairs(encoder, batch_size, vocabulary, 0, *given, *views)


def flip(
  encoder,
  batch_size: int,
  vocabulary: int,
  hidden_count: int,
  *,
  text_encoder: Callable,
  width: int = 512,
  scale: float = 100.0,
) -> Method:
  """`image_text` with CLIP's loss on the places that `batch["hidden"]` [b n] leaves visible.

  Raises:
    ValueError: the encoder has no patches to hide.
  """
  if encoder.patch is None:
    raise ValueError("method flip hides patches: an encoder of patches is needed, such as a ViT")
  given = (text_encoder, "clip", width, "both", scale, 0.0, False)
  return _pairs(encoder, batch_size, vocabulary, hidden_count, *given, (), 1.0, 0.1)


def _pairs(
  encoder, batch_size, vocabulary, hidden_count, text_encoder, loss, width, project, scale, bias,
  row_only_grad, projector, views_weight, views_temperature,
) -> Method:  # fmt: skip
  _check(encoder, batch_size, dict(loss=loss, project=project), scale)
  biases = "none" if project == "both" else "all"
  size = width if project == "both" else encoder.width
  linear = functools.partial(Projector, norm="none", bias=biases, start="normal")
  maps = ("text_projection", *(("image_projection",) if project == "both" else ()))
  parts = Parts(
    encoder=encoder, reader=text_encoder(vocabulary, dtype=encoder.dtype),
    to_common={name: linear((size,), dtype=encoder.dtype) for name in maps},
    projector=Projector(projector, last="none", dtype=encoder.dtype) if projector else None,
    hidden_count=hidden_count, loss=loss, scale=scale, bias=bias, row_only_grad=row_only_grad,
    views_weight=views_weight, views_temperature=views_temperature,
  )  # fmt: skip
  init, embed, couple, update, encode, encode_text = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode, _encode_text)
  )
  needs = ("image", "text", *(("views",) if projector else ()), "index")
  needs += ("hidden",) if hidden_count else ()
  made = Method(init, coupled(embed, couple), update, encode, None, needs, embed, couple)
  return made._replace(encode_text=encode_text)


def _init(parts: Parts, rng, batch):
  encoder, reader = parts.encoder, parts.reader
  rngs = jax.random.split(rng, 5)
  x = jnp.zeros((2, *batch["image"].shape[1:]), jnp.float32)
  ids = jnp.zeros((2, batch["text"].shape[1]), jnp.int32)
  params = {
    "encoder": encoder.init(rngs[0], x)["params"],
    "text_encoder": reader.init(rngs[1], ids)["params"],
    "log_scale": jnp.asarray(math.log(parts.scale), jnp.float32),
  }
  widths = {"text_projection": reader.width, "image_projection": encoder.width}
  for key, (name, module) in zip(rngs[2:4], parts.to_common.items()):
    params[name] = module.init(key, jnp.zeros((2, widths[name])))["params"]
  if parts.loss == "siglip":
    params["bias"] = jnp.asarray(parts.bias, jnp.float32)
  if parts.projector is None:
    return params, {}
  made = parts.projector.init(rngs[4], jnp.zeros((2, encoder.width)))
  params["projector"] = made["params"]
  return params, {"stats": {"projector": made.get("batch_stats", {})}}


def _embed(parts: Parts, params, extra, batch, rng, step):
  """In the common space {"image": [b d], "text": [b d]}, and pooled features {"views": [b 2 w]}."""
  encoder = parts.encoder
  keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(rng, batch["index"]))
  variables, given = {"params": params["encoder"]}, {}
  if parts.hidden_count:
    given["keep"] = tokens_lib.split_hidden(batch["hidden"], parts.hidden_count)[0]
  pooled = encoder.apply(variables, batch["image"], keys=keys[:, 0], **given)["pooled"]
  z = {
    "image": _common(parts, params, "image_projection", pooled),
    "text": _encode_text(parts, params, extra, batch["text"]),
  }
  if parts.projector is not None:
    b = len(batch["views"])
    flat = batch["views"].reshape(2 * b, *batch["views"].shape[2:])
    out = encoder.apply(variables, flat, keys=keys[:, 1:].reshape(2 * b))
    z["views"] = out["pooled"].reshape(b, 2, -1)
  return z, {"rows": {"pooled": jax.lax.stop_gradient(pooled)}}


def _common(parts: Parts, params, name, pooled: jax.Array) -> jax.Array:
  """Pooled features in the common space: [b w] -> [b d]; as they are where no map has that name."""
  if name not in parts.to_common:
    return pooled
  return parts.to_common[name].apply({"params": params[name]}, pooled).astype(jnp.float32)


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  factor = jnp.exp(params["log_scale"])
  if parts.loss == "clip":
    value = losses.clip_loss(z["image"], z["text"], factor, parts.row_only_grad).mean()
  else:
    value = losses.siglip_loss(z["image"], z["text"], factor, params["bias"]).mean()
  metrics = {"scale": factor, **collapse.features(z["image"])}
  if parts.projector is None:
    return value, ({}, metrics)
  more, stats = _of_views(parts, params, extra, z["views"])
  metrics |= {"pairs": value, "views": more}
  kept = {"mean": jax.lax.stop_gradient({"projector": stats})}
  return value + parts.views_weight * more, (kept, metrics)


def _of_views(parts: Parts, params, extra, views: jax.Array):
  """SimCLR's loss of pooled features [b 2 w], and the projector's running statistics after them."""
  weights, stats, found = params["projector"], running(extra, "projector"), []
  for view in (0, 1):  # batch norm sees each view apart
    out, stats = with_statistics(parts.projector, weights, stats, views[:, view], train=True)
    found.append(out)
  return losses.nt_xent(found[0], found[1], parts.views_temperature).mean(), stats


def _update(parts: Parts, params, extra, stats, step):
  return extra if parts.projector is None else extra | {"stats": stats["mean"]}


def _encode(parts: Parts, params, extra, batch, layers=()):
  out = evaluated(parts.encoder, params["encoder"], {}, batch["image"], layers)
  return out | {"joint": _common(parts, params, "image_projection", out["pooled"])}


def _encode_text(parts: Parts, params, extra, ids: jax.Array) -> jax.Array:
  """Texts in the common space: [b l] -> [b d]."""
  pooled = parts.reader.apply({"params": params["text_encoder"]}, ids)["pooled"]
  return _common(parts, params, "text_projection", pooled)


def _check(encoder: Any, batch_size: int, given: dict[str, str], scale: float) -> None:
  names.choices(given, CHOICES)
  if getattr(encoder, "batch_norm", False):
    raise ValueError("image and text need an encoder without batch norm: a ViT or a ConvNeXt")
  if batch_size < 2:
    raise ValueError("batch_size 1: a loss between the pairs of a batch needs two or more")
  if scale <= 0:
    raise ValueError(f"method.scale {scale} must be positive")
