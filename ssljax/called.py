"""Losses called by the names of their parameters: a signature says what a loss wants."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssljax.step import example_keys

# What a method of several views gives besides them, to a loss that has a parameter of the name.
GIVEN = {
  "queue": "keys of earlier batches, [m d]",
  "memory": "what the loss returned beside its value in the step before, [d d], zeros at first",
  "labels": "classes, [b]",
  "order": "a permutation of the batch that belongs to its examples, [b]",
  "rngs": "one key an example, [b]",
  "step": "the number of the step, []",
  "p1": "predictions of the first view, [b d]",
  "p2": "predictions of the second view, [b d]",
}
PLACES = ("pooled", "projected")  # the encoder's features, and what the projector makes of them
TAKEN = ("loss", "grad_norm", "std", "rank", "probe_loss", "probe_top1")
EXAMPLE = "dict(name='ssljax.losses.nt_xent', temperature=.1)"


def asked(loss: Callable) -> tuple[str, ...]:
  """Names in `GIVEN` that the loss wants: its parameters, but for those that the config sets."""
  own = getattr(loss, "keywords", {})
  return tuple(n for n in inspect.signature(loss).parameters if n in GIVEN and n not in own)


def at_once(loss: Callable) -> bool:
  """Whether one call is for all views and both directions: of `z` [b v d], of `views`, a list of
  [b d], or of projections and predictions (z1, z2, p1, p2)."""
  return _first(loss) in ("z", "views") or "p1" in asked(loss)


def check(loss: Any, queue: bool) -> None:
  """Whether the loss can be called with what the method has.

  Raises:
    ValueError: no function, or one that lacks an argument or takes no queue.
  """
  if not callable(loss):
    raise ValueError(
      f"method.loss must be a function's name and arguments, {EXAMPLE}, not {loss!r}"
    )
  if not set(inspect.signature(loss).parameters):
    raise ValueError("method.loss takes no argument, and is called with two views")
  views = (None,) * (1 if _first(loss) in ("z", "views") else 2)
  has = {name: None for name in asked(loss) if queue or name != "queue"}
  try:
    inspect.signature(loss).bind(*views, **has | ({"queue": None} if queue else {}))
  except TypeError as error:
    given = "two views and a queue" if queue else "two views"
    hint = "; method.queue is 0" if "'queue'" in str(error) and not queue else ""
    raise ValueError(f"method.loss is called with {given}: {error}{hint}") from None


def check_views(loss: Callable, target: str, predictor: bool, symmetric: bool) -> None:
  """Whether the loss can be called with the views that the method compares.

  Raises:
    ValueError: which argument of the method does not fit.
  """
  if "p1" in asked(loss):
    if not predictor or not symmetric:
      raise ValueError("method.loss compares predictions: set method.predictor, and no .symmetric")
  elif at_once(loss) and target == "stopped":
    raise ValueError('method.loss sees all views at once: no method.target "stopped" for it')


def drawn(rng: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
  """What belongs to the examples of these ids [b], wherever they stand in the batch."""
  rngs = example_keys(rng, index)
  return {"rngs": rngs, "order": jnp.argsort(jax.vmap(jax.random.uniform)(rngs))}


def call(
  loss: Callable, views: Sequence[jax.Array], has: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """The loss of views, each [b d], given what it asks for of `has` -> its mean, the means of its
  terms, and its new memory or None."""
  wanted = asked(loss)
  given = {name: x for name, x in has.items() if name in wanted and x is not None}
  forms = {"z": lambda: (jnp.stack(views, 1),), "views": lambda: (list(views),)}
  found, rest = loss(*forms.get(_first(loss), lambda: views)(), **given), {}
  if isinstance(found, tuple):
    found, rest = found
  memory = None
  if "memory" in wanted:
    memory, rest = rest, {}
  if not isinstance(rest, dict):
    raise ValueError("method.loss must return a number, [b], or either with a dict of its terms")
  return jnp.mean(found), {name: jnp.mean(term) for name, term in rest.items()}, memory


def check_terms(terms: Mapping[str, Mapping[str, Any]], views: int) -> None:
  """Whether every term can be called with what it is on.

  Raises:
    ValueError: which term, and what it lacks.
  """
  for name, term in terms.items():
    where = f"method.terms.{name}"
    if name in TAKEN:
      raise ValueError(f"{where}: a metric has this name already; choose another")
    if term.get("on", "projected") not in PLACES:
      raise ValueError(f"{where}.on {term['on']!r} is none of {', '.join(PLACES)}")
    required = _required(term["call"])
    lacking = [p.name for p in required if p.annotation not in (p.empty, jax.Array)]
    if lacking:
      raise ValueError(f"{where} lacks {', '.join(lacking)}")
    count = len(required)
    if count not in (1, 2):
      raise ValueError(f"{where} is called with one or two arrays [b d], and requires {count}")
    if count > views:
      raise ValueError(f"{where} compares two views, and the encoder sees one: symmetric=False")


def added(
  terms: Mapping[str, Mapping[str, Any]], has: Mapping[str, jax.Array], taken: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The weighted sum of terms, and each by its name without its weight.

  has: what they are on, [b v d] by the names of `PLACES`. A term of one array is the mean over the
  views, one of two arrays compares the first two. taken: the loss's own terms.

  Raises:
    ValueError: a term with the name of one of the loss's own.
  """
  if clash := sorted(set(terms) & set(taken)):
    raise ValueError(f"method.terms.{clash[0]}: the loss has a term of this name; choose another")
  found: dict[str, jax.Array] = {}
  for name, term in terms.items():
    views, call = jnp.unstack(has[term.get("on", "projected")], axis=1), term["call"]
    pairs = [views[:2]] if len(_required(call)) == 2 else [(view,) for view in views]
    found[name] = jnp.stack([jnp.mean(call(*pair)) for pair in pairs]).mean()
  total = jnp.zeros(())
  for name, value in found.items():
    total += terms[name].get("weight", 1.0) * value
  return total, found


def _required(call: Callable) -> list[inspect.Parameter]:
  parameters = inspect.signature(call).parameters.values()
  return [p for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD]


def _first(loss: Callable) -> str:
  return next(iter(inspect.signature(loss).parameters))
