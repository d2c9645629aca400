"""What of a training batch the accelerator makes: views, hidden places, the gather from a data set
that lives on it."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import ssljax.views
import ssljax.views.masking
from ssljax import config as config_lib
from ssljax import sharding
from ssljax.data import cache as cache_lib
from ssljax.data import pipeline
from ssljax.data.sources import Source
from ssljax.data.views import View, Views, keep, resize_crop

# key of `data` -> what it may be, the first being the default
CHOICES = {
  "views_on": ("host", "device"),
  "hidden_on": ("host", "device"),
  "cache": ("none", "device"),
}
HOMES = {"views": ssljax.views, "hidden": ssljax.views.masking}


class Feed(NamedTuple):
  """The way of a training batch into the step.

  `source` and `views` are the host's part; `shape` is that of one image as it arrives, known where
  the step makes the views. `make_views` (`draw(key)`, `apply(image, drawn)`) and `draw_hidden`
  (key -> bool [n]) are the step's part, or None. `cached`: the images are on the devices, and the
  host sends indices.
  """

  source: Source
  views: View | Views | None
  shape: tuple[int, ...] | None
  make_views: Any = None
  draw_hidden: Callable | None = None
  cached: bool = False


def check(data: Mapping) -> None:
  """Raises ValueError where the config's choices do not exist or do not go together."""
  for key, known in CHOICES.items():
    if data[key] not in known:
      raise ValueError(f"data.{key} {data[key]!r} is none of {', '.join(known)}")
  for key, part in (("views_on", "views"), ("hidden_on", "hidden")):
    if data[key] == "device" and data[part] is None:
      raise ValueError(f"data.{key}='device' needs data.{part}, which is not set")
  moving = data["views"] and not data["views"]["name"].endswith(".keep")
  if data["canvas"] is not None and (data["views_on"] == "host" or not moving):
    raise ValueError("data.canvas is where data.views start with data.views_on='device': set both")
  if data["cache"] == "device" and data["views_on"] == "host" and moving:
    raise ValueError(
      "data.cache='device' holds the images on the device, but data.views are made on the host:"
      " set data.views_on='device'"
    )


def feed(
  config: Mapping, source: Source, views: View | Views | None, planned: bool = False
) -> Feed:
  """The way of the config's batches; `views` are the host's. `hide` completes it. planned: shapes
  alone are wanted, nothing is read.

  Raises:
    ValueError: no such view on the device, images of many sizes without a canvas, a data set that
      cannot be cached.
  """
  data = config["data"]
  check(data)
  pipeline.check_channels(views, source.channels)
  host, shape, make_views = views, source.shape, None
  if data["views_on"] == "device":
    host, make_views = _canvas(data["canvas"]), device_component("views", data["views"])
    if host.size:
      shape = (*host.size, source.channels)
    elif shape is None and data["cache"] == "none":
      raise ValueError(
        f"the images of {source.name} differ in size: with data.views_on='device' the host brings"
        " them to one, e.g. data.canvas=(256, 256)"
      )
  if data["cache"] == "device" and not planned:
    reading = {key: data[key] for key in ("channels", "workers", "max_pixels")}
    source = cache_lib.in_memory(source, host, limit=device_memory() // 2, **reading)
    shape = source.shape
  return Feed(source, host, shape, make_views, cached=data["cache"] == "device" and not planned)


def hide(found: Feed, config: Mapping, hidden: Any) -> Feed:
  """The same with hidden places drawn in the step, where the config says so."""
  if config["data"]["hidden_on"] == "host" or hidden is None:
    return found
  spec = config["data"]["hidden"]
  return found._replace(
    draw_hidden=device_component("hidden", spec, grid=hidden.grid, count=hidden.count)
  )


def given_shapes(found: Feed, batch: Mapping, leaves: Sequence[str]) -> dict:
  """Shapes of the batch that the step is given: of those that the method sees, without what is made
  in the step; `leaves`: the names of what recipes of views make."""
  made = {*(leaves if found.make_views else ()), *(("hidden",) if found.draw_hidden else ())}
  shapes = {key: value for key, value in batch.items() if key not in made}
  if found.make_views:
    shape = (*batch["index"].shape, *(found.shape or ()))
    dtype = jax.dtypes.canonicalize_dtype(found.source.dtype)
    shapes["image"] = jax.ShapeDtypeStruct(shape, dtype)
  return shapes


def placer(found: Feed, mesh: jax.sharding.Mesh, batch_size: int) -> Callable:
  """`place(batch) -> global arrays`: this process's rows of a host batch as the step takes them.

  A cached data set is copied whole to every device here; each batch is then one gather.
  """
  if not found.cached:
    return lambda batch: sharding.to_global(batch, mesh, batch_size)
  whole = sharding.replicated(found.source.fetch(np.arange(found.source.size)), mesh)
  rows = sharding.batch_sharding(mesh)
  # The images are an argument, not a constant of the program: that would be compiled in.
  gather = jax.jit(lambda images, index: images.at[index].get(mode="clip"), out_shardings=rows)

  def place(batch):
    placed = sharding.to_global(batch, mesh, batch_size)
    return placed | {"image": gather(whole, placed["index"])}

  return place


def device_memory() -> int:
  """Bytes of one device; on the CPU each device's share of what the machine has."""
  device = jax.local_devices()[0]
  known = device.memory_stats() if device.platform != "cpu" else None
  if known and "bytes_limit" in known:
    return known["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def device_component(key: str, spec: Mapping | None, **given: Any) -> Any:
  """The device's version of data.views or data.hidden, of the same name and arguments:
  ssljax.data.views.crop_flip -> ssljax.views.crop_flip. None where none is set.

  Raises:
    ValueError: there is none; names those that there are.
  """
  if spec is None:
    return None
  home = HOMES[key]
  there = [name for name in home.__all__ if inspect.isfunction(getattr(home, name))]
  parent, _, last = spec["name"].rpartition(".")
  if not parent.startswith("ssljax.data") or last not in there:
    raise ValueError(
      f"data.{key}_on='device': {spec['name']} is made on the host only; on the device there are"
      f" {', '.join(there)}"
    )
  return config_lib.build({**spec, "name": f"{home.__name__}.{last}"}, **given)


def _canvas(size: Any) -> View:
  """What the host does where the step makes the views: the shorter side to the canvas, then its
  centre; nothing where no canvas is set."""
  if not size:
    return keep()
  sides = (size, size) if isinstance(size, int) else tuple(size)
  return resize_crop(size=sides, resize=min(sides))
