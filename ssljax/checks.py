"""Whether a config, its method and its source fit together."""

from collections.abc import Mapping
from typing import Any

from ssljax.data.views import recipe_of
from ssljax.step import Method


def needs(config: Mapping, method: Method, batch: Mapping) -> None:
  """Raises ValueError where the batch lacks what the method reads, or must not be cut."""
  if config["accum"] > 1 and method.whole:
    raise ValueError(f"accum {config['accum']}: {method.whole}")
  missing = [key for key in method.needs if key not in batch]
  if not missing:
    return
  hints = {
    "views": "; data.views=dict(name='ssljax.data.views.two_views') makes views",
    "global": "; data.views=dict(name='ssljax.data.views.multi_crop') makes global and local",
    "boxes": "; data.views.boxes=True of two_views and multi_crop adds where the views lie",
    "image": "; data.views=dict(name='ssljax.data.views.crop_flip') makes image",
    "context": "; data.hidden is not set to what makes them, e.g."
    " data.hidden=dict(name='ssljax.data.multiblock')",
    "text": "; data.text=dict(name='ssljax.data.text.captions') makes text",
    "label": "; the method reads labels, and the source has none",
  }
  hint = next((hints[key] for key in missing if key in hints), "")
  raise ValueError(
    f"{config['method']['name']} needs {', '.join(missing)} in the batch, which has"
    f" {', '.join(batch)}{hint}"
  )


def patches(encoder: Any, views: Any) -> None:
  """Raises ValueError where views are put together from other patches than the encoder sees."""
  for view in recipe_of(views).each():
    if view.patch and view.patch != encoder.patch:
      raise ValueError(
        f"data.views.patch {view.patch} is not encoder.patch {encoder.patch}: the edges of the"
        " patches that the views are put together from would lie within those that the encoder sees"
      )


def size(method: Mapping, source: Any) -> None:
  """Raises ValueError where the method was told another number of examples than the source has."""
  queue, examples = method.get("queue", 0), method.get("examples", source.size)
  if isinstance(queue, int) and queue > source.size:
    raise ValueError(
      f"method.queue {queue} is larger than the {source.size} examples of {source.name}: it would"
      " hold an example twice"
    )
  if isinstance(examples, int) and examples != source.size:
    raise ValueError(
      f"method.examples {examples}: {source.name} has {source.size}, each of which has a row of"
      f" its own; set it to {source.size}"
    )


def probe_classes(probe: Mapping, source: Any) -> int:
  """How many classes a probe of the source's labels tells apart.

  Raises:
    ValueError: no labels, or more of them than `probe.classes`.
  """
  if not source.labelled:
    raise ValueError(
      f"probe.rate {probe['rate']}: {source.name} has no labels to probe; set it to 0"
    )
  if source.labels is None:
    if not probe["classes"]:
      raise ValueError(f"probe.classes: set it, the labels of {source.name} lie beside its images")
    return probe["classes"]
  low, high = int(source.labels.min()), int(source.labels.max())
  if low < 0 or 0 < probe["classes"] <= high:
    raise ValueError(
      f"probe.classes {probe['classes']}: the labels of {source.name} go from {low} to {high}"
    )
  return probe["classes"] or high + 1
