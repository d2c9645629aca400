"""Images and their texts in one space: two encoders and a contrast of pairs.

CLIP (Radford et al. 2021, 2103.00020): loss "clip".
SigLIP (Zhai et al. 2023, 2303.15343): loss "siglip", `scale` 10, `bias` -10, `project` "text".
SLIP (Mu et al. 2021, 2112.12750): loss "clip" and SimCLR on two more views, with a `projector`.
FLIP (Li et al. 2022, 2212.00794): `flip`, whose image encoder sees the visible patches alone.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssljax import checks, collapse, losses
from ssljax.models import tokens as tokens_lib
from ssljax.models.heads import Projector
from ssljax.models.views import evaluated
from ssljax.step import Method, coupled, example_keys

CHOICES = {"loss": ("clip", "siglip"), "project": ("both", "text")}


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
  parts = (text_encoder, loss, width, project, scale, bias, row_only_grad)
  views = (projector, views_weight, views_temperature)
  return _pairs(encoder, batch_size, vocabulary, 0, *parts, *views)


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
  parts = (text_encoder, "clip", width, "both", scale, 0.0, False)
  return _pairs(encoder, batch_size, vocabulary, hidden_count, *parts, (), 1.0, 0.1)


def _pairs(
  encoder, batch_size, vocabulary, hidden_count, text_encoder, loss, width, project, scale, bias,
  row_only_grad, projector, views_weight, views_temperature,
) -> Method:  # fmt: skip
  _check(encoder, batch_size, dict(loss=loss, project=project), scale)
  reader = text_encoder(vocabulary, dtype=encoder.dtype)
  biases = "none" if project == "both" else "all"
  size = width if project == "both" else encoder.width
  linear = dict(norm="none", bias=biases, start="normal", dtype=encoder.dtype)
  to_common = {"text_projection": Projector((size,), **linear)}
  if project == "both":
    to_common["image_projection"] = Projector((size,), **linear)
  head = Projector(projector, last="none", dtype=encoder.dtype)

  def init(rng, batch):
    rngs = jax.random.split(rng, 5)
    x = jnp.zeros((2, *batch["image"].shape[1:]), jnp.float32)
    params = {
      "encoder": encoder.init(rngs[0], x)["params"],
      "text_encoder": reader.init(rngs[1], jnp.zeros((2, batch["text"].shape[1]), jnp.int32)),
      "log_scale": jnp.asarray(math.log(scale), jnp.float32),
    }
    params["text_encoder"] = params["text_encoder"]["params"]
    widths = {"text_projection": reader.width, "image_projection": encoder.width}
    for key, (name, module) in zip(rngs[2:4], to_common.items()):
      params[name] = module.init(key, jnp.zeros((2, widths[name])))["params"]
    if loss == "siglip":
      params["bias"] = jnp.asarray(bias, jnp.float32)
    if not projector:
      return params, {}
    made = head.init(rngs[4], jnp.zeros((2, encoder.width)))
    params["projector"] = made["params"]
    return params, {"stats": {"projector": made.get("batch_stats", {})}}

  def common(params, name, pooled):
    if name not in to_common:
      return pooled
    return to_common[name].apply({"params": params[name]}, pooled).astype(jnp.float32)

  def of_text(params, ids):
    pooled = reader.apply({"params": params["text_encoder"]}, ids)["pooled"]
    return common(params, "text_projection", pooled)

  def embed(params, extra, batch, rng, step):
    keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(rng, batch["index"]))
    variables, given = {"params": params["encoder"]}, {}
    if hidden_count:
      given["keep"] = tokens_lib.split_hidden(batch["hidden"], hidden_count)[0]
    pooled = encoder.apply(variables, batch["image"], keys=keys[:, 0], **given)["pooled"]
    z = {
      "image": common(params, "image_projection", pooled),
      "text": of_text(params, batch["text"]),
    }
    if projector:
      b = len(batch["views"])
      flat = batch["views"].reshape(2 * b, *batch["views"].shape[2:])
      out = encoder.apply(variables, flat, keys=keys[:, 1:].reshape(2 * b))
      z["views"] = out["pooled"].reshape(b, 2, -1)
    return z, {"rows": {"pooled": jax.lax.stop_gradient(pooled)}}

  def couple(params, extra, z, batch, rng, step):
    factor = jnp.exp(params["log_scale"])
    if loss == "clip":
      value = losses.clip_loss(z["image"], z["text"], factor, row_only_grad).mean()
    else:
      value = losses.siglip_loss(z["image"], z["text"], factor, params["bias"]).mean()
    metrics = {"scale": factor, **collapse.features(z["image"])}
    if not projector:
      return value, ({}, metrics)
    stats, found = extra["stats"]["projector"], []
    for view in (0, 1):  # batch norm sees each view apart
      variables = {"params": params["projector"], "batch_stats": stats}
      out, new = head.apply(variables, z["views"][:, view], train=True, mutable=["batch_stats"])
      stats = new.get("batch_stats", stats)
      found.append(out)
    more = losses.nt_xent(*found, views_temperature).mean()
    metrics |= {"pairs": value, "views": more}
    kept = {"mean": jax.lax.stop_gradient({"projector": stats})}
    return value + views_weight * more, (kept, metrics)

  def update(params, extra, stats, step):
    return extra | {"stats": stats["mean"]} if projector else extra

  def encode(params, extra, batch, layers=()):
    out = evaluated(encoder, params["encoder"], {}, batch["image"], layers)
    return out | {"joint": common(params, "image_projection", out["pooled"])}

  needs = ("image", "text", *(("views",) if projector else ()), "index")
  needs += ("hidden",) if hidden_count else ()
  return Method(
    init, coupled(embed, couple), update, encode, None, needs, embed, couple,
    encode_text=lambda params, extra, ids: of_text(params, ids),
  )  # fmt: skip


def _check(encoder: Any, batch_size: int, given: dict[str, str], scale: float) -> None:
  checks.choices(given, CHOICES)
  if getattr(encoder, "batch_norm", False):
    raise ValueError("image and text need an encoder without batch norm: a ViT or a ConvNeXt")
  if batch_size < 2:
    raise ValueError("batch_size 1: a loss between the pairs of a batch needs two or more")
  if scale <= 0:
    raise ValueError(f"method.scale {scale} must be positive")
