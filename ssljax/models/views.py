"""Encoders on several views of each example, in training, and on whole examples in evaluation."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from ssljax.models import tokens as tokens_lib
from ssljax.models.norms import with_statistics


def merged(x: jax.Array) -> jax.Array:
  """[b v …] -> [b·v …]: in this order nothing moves between devices."""
  return x.reshape(-1, *x.shape[2:])


def run_views(
  module: Any, params: Any, stats: Any, x: jax.Array, together: bool = False, **given: Any
) -> tuple[Any, Any]:
  """A module in training mode on views [b v …] -> its output, leaves [b v …], and new statistics.

  Per-view arrays among `given` are [b v …], too. Where views are not `together`, what belongs to a
  batch (batch norm, whitening) is of each view, and the running statistics take one step a view, as
  where a network is called once a view.
  """
  b, v = x.shape[:2]
  arrays = {k: a for k, a in given.items() if isinstance(a, jax.Array)}
  fixed = {k: a for k, a in given.items() if k not in arrays}

  def apply(stats, x, arrays):
    return with_statistics(module, params, stats, x, **arrays, **fixed)

  alone = not stats and getattr(module, "last", "") != "whiten"  # without either, all the same
  if together or alone:
    out, stats = apply(stats, *jax.tree.map(merged, (x, arrays)))
    return jax.tree.map(lambda a: a.reshape(b, v, *a.shape[1:]), out), stats
  outs = []
  for i in range(v):
    out, stats = apply(stats, *jax.tree.map(lambda a: a[:, i], (x, arrays)))  # noqa: B023
    outs.append(out)
  return jax.tree.map(lambda *a: jnp.stack(a, axis=1), *outs), stats


def see(
  encoder: Any, params: Any, stats: Any, views: jax.Array, fixed: Any = None, **given: Any
) -> tuple[dict[str, jax.Array], Any]:
  """ "pooled" [b v d] and "patches" [b v n d] of views [b v h w c] of one size, seen together, and
  the running statistics after them. `given` are arrays [b v …], `fixed` is the same for all; what
  it asks for besides ("attention_i") comes along."""
  arrays = {name: merged(x) for name, x in given.items()}
  out, stats = with_statistics(encoder, params, stats, merged(views), **arrays, **(fixed or {}))
  kept = {k: x for k, x in out.items() if k in ("pooled", "patches") or k.startswith("attention_")}
  return jax.tree.map(lambda a: a.reshape(*views.shape[:2], *a.shape[1:]), kept), stats


def see_all(
  encoder: Any,
  params: Any,
  stats: Any,
  batch: Any,
  keys: jax.Array,
  fixed: Any = None,
  **given: Any,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Pooled features [b v d] of the global views, then the local ones, each size in one pass; what
  `see` says of the global ones; running statistics. keys [b v] one a view; `given` and `fixed` are
  for the global views."""
  large = batch["global"].shape[1]
  out, stats = see(
    encoder, params, stats, batch["global"], keys=keys[:, :large], fixed=fixed, **given
  )
  pooled = [out["pooled"]]
  if "local" in batch:
    few, stats = see(encoder, params, stats, batch["local"], keys=keys[:, large:])
    pooled.append(few["pooled"])
  return jnp.concatenate(pooled, axis=1), out, stats


def view_keys(keys: jax.Array, batch: Any) -> jax.Array:
  """One key a view from one an example: [b] -> [b v]."""
  count = sum(batch[leaf].shape[1] for leaf in ("global", "local") if leaf in batch)
  return jax.vmap(lambda key: jax.random.split(key, count))(keys)


def attended(
  encoder: Any, out: Any, drawn: jax.Array, keys: jax.Array, reveal: tuple[float, ...] = ()
) -> jax.Array:
  """As many places as were drawn, bool [b v n], but those that the class token attends to in the
  last layer, over all heads, of which `tokens.hide_attended` may `reveal` some. out: what `see`
  says of the views with their "attention_i"; keys [b v]."""
  scores = out[f"attention_{encoder.depth - 1}"][..., encoder.prefix :].mean(2)
  fold = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(b"hint")))
  keys, counts = fold(merged(keys)), merged(drawn).sum(-1)
  hidden = tokens_lib.hide_attended(merged(scores), counts, keys, reveal)
  return jax.lax.stop_gradient(hidden.reshape(drawn.shape))


def evaluated(
  encoder: Any, params: Any, stats: Any, image: jax.Array, layers: tuple[int, ...] = ()
) -> dict[str, jax.Array]:
  """What an encoder says of examples [b h w c] in evaluation mode; layers without their prefix."""
  variables = {"params": params} | ({"batch_stats": stats} if stats else {})
  out = encoder.apply(variables, image, layers=layers)
  out.pop("tokens", None)
  taken = {k: v[:, encoder.prefix :] for k, v in out.items() if k.startswith("layer_")}
  return out | taken


def why_whole(encoder: Any, batch_norm: str) -> str:
  """Why a batch must not be cut into microbatches: "" where the encoder has no batch norm, or where
  it may see each microbatch by itself (`batch_norm` "microbatch")."""
  if not getattr(encoder, "batch_norm", False) or batch_norm == "microbatch":
    return ""
  return (
    "the encoder's batch norm sees the whole batch;"
    ' method.batch_norm="microbatch" gives each microbatch its own statistics'
  )
