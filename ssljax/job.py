"""From a complete config to what a run needs. Every mistake of the user's shows here, before
anything is compiled."""

import dataclasses
import inspect
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from ssljax import config as config_lib
from ssljax import reporting, sharding
from ssljax.data import moments, pipeline, sources
from ssljax.methods.combine import normalised
from ssljax.step import Method, init_state

# Of the red, green and blue channels of ImageNet, on the 0…1 scale.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Job:
  """A run, built: `batch` holds the shapes of a global batch, `state` those of the state."""

  config: dict[str, Any]
  mesh: jax.sharding.Mesh
  source: Any
  views: Any
  eval_views: Any
  hidden: Any
  grid: tuple[int, ...]
  encoder: Any
  method: Method
  tx: optax.GradientTransformation
  schedule: Callable
  batch: dict[str, jax.ShapeDtypeStruct]
  state: Any
  mean: Any
  std: Any

  def input(self) -> dict[str, Any]:
    """What a checkpoint remembers of the input, for those who use the encoder later."""
    image = self.batch["image"]
    return {
      "shape": list(image.shape[1:]), "dtype": str(image.dtype),
      "mean": list(map(float, self.mean)), "std": list(map(float, self.std)),
    }  # fmt: skip

  def batches(self, start_step: int, steps: int | None = None) -> pipeline.Batches:
    """This process's training batches from a step on: endless, or `steps` of them."""
    config, data = self.config, self.config["data"]
    return pipeline.batches(
      self.source,
      batch_size=config["batch_size"],
      seed=config["seed"],
      start_step=start_step,
      steps=steps,
      rows=sharding.local_rows(config["batch_size"], self.mesh).tolist(),
      views=self.views,
      hidden=self.hidden,
      channels=data["channels"],
      workers=data["workers"],
      max_pixels=data["max_pixels"],
    )

  def examples(
    self, source: Any, hidden: bool = False, indices: Any = None, known: dict | None = None
  ) -> pipeline.Batches:
    """One pass over a source in order, in the evaluation view; `known` damage is not told again."""
    config, data = self.config, self.config["data"]
    return pipeline.examples(
      source,
      batch_size=eval_batch_size(config, self.mesh),
      views=self.eval_views,
      hidden=self.hidden if hidden else None,
      seed=config["seed"],
      channels=data["channels"],
      workers=data["workers"],
      max_pixels=data["max_pixels"],
      indices=indices,
      known=known,
    )


def eval_batch_size(config: Mapping, mesh: jax.sharding.Mesh) -> int:
  """Examples per batch of an evaluation: as set, else that of one training microbatch."""
  size = config["eval"]["batch_size"] or config["batch_size"] // config["accum"]
  sharding.check_batch(size, mesh, name="eval.batch_size")
  return size


def open_source(config: Mapping, split: str) -> Any:
  """The config's source, opened at a split."""
  data = config["data"]
  return sources.open_source(data["source"], split, channels=data["channels"])


def component(spec: Mapping | None, **given: Any) -> Any:
  """A component of the config, or None where none is set."""
  return None if spec is None else config_lib.build(spec, **given)


def assemble(
  config: Mapping, workdir: pathlib.Path | None = None, *, mesh: Any = None, source: Any = None
) -> Job:
  """Builds everything but the first array. A plan gives `mesh` (devices that need not be here) and
  `source` (a description without data).

  Raises:
    ValueError, FileNotFoundError: what is wrong, in the user's words.
  """
  data = config["data"]
  planned = source is not None
  if mesh is None:
    axes = {key: config["mesh"][key] for key in ("devices", "replica", "tensor")}
    mesh = sharding.make_mesh(**axes)
  sharding.check_batch(config["batch_size"], mesh, config["accum"])
  eval_batch_size(config, mesh)
  encoder = config_lib.build(config["encoder"], dtype=config["dtype"])
  sharding.check_heads(encoder, mesh)
  views, eval_views = component(data["views"]), component(data["eval_views"])
  if source is None:
    source = open_source(config, data["split"])
  shape = example_shape(source, views)
  grid = encoder.grid(shape[:-1])
  hidden = component(data["hidden"], grid=grid)
  method = build_method(config, encoder, hidden)
  total = dict(total_steps=config["total_steps"], batch_size=config["batch_size"])
  mean, std = statistics(config, source, workdir)
  method = normalised(method, mean, std)
  schedule = config_lib.build(config["schedule"], **total)
  tx = config_lib.build(config["optimizer"], schedule=schedule)
  batch = batch_shapes(config, source, shape, hidden)
  missing = [key for key in method.needs if key not in batch]
  if missing:
    raise ValueError(f"{config['method']['name']} needs {', '.join(missing)} in the batch")
  state = jax.eval_shape(lambda: init_state(method, tx, batch, config["seed"]))
  # On shapes alone: parts that do not go together show before the workdir is claimed.
  jax.eval_shape(method.loss, state.params, state.extra, batch, state.rng, state.step)
  job = Job(
    dict(config), mesh, source, views, eval_views, hidden, grid, encoder, method, tx, schedule,
    batch, placed(state, config, mesh), mean, std,
  )  # fmt: skip
  if not planned:
    job.batches(0, steps=0).close()  # says now what the pipeline will not accept
  return job


def build_method(config: Mapping, encoder: Any, hidden: Any) -> Method:
  """The config's method around an encoder, on examples that are already normalised."""
  given = dict(encoder=encoder, total_steps=config["total_steps"], batch_size=config["batch_size"])
  if hidden is not None:
    given["hidden_count"] = hidden.count
  wanted = inspect.signature(config_lib.resolve(config["method"]["name"])).parameters
  if "hidden_count" in wanted and hidden is None:
    raise ValueError(
      "data.hidden is not set, and the method hides places:"
      " e.g. data.hidden=dict(name='ssljax.data.masking.random', ratio=.75)"
    )
  return config_lib.build(config["method"], **given)


def example_shape(source: Any, views: Any) -> tuple[int, ...]:
  """(h, w, c) of one example as the step sees it."""
  if views is not None and views.size is not None:
    return (*views.size, source.channels)
  if source.shape is None:
    raise ValueError(
      f"the images of {source.name} differ in size: set data.views,"
      " e.g. dict(name='ssljax.data.views.crop_flip', size=(224, 224))"
    )
  return tuple(source.shape)


def batch_shapes(config: Mapping, source: Any, shape: tuple, hidden: Any) -> dict:
  """Shapes and types of a global batch."""
  b = config["batch_size"]
  shapes = {"image": ((b, *shape), source.dtype), "index": ((b,), "int32")}
  if source.labelled:
    shapes["label"] = ((b,), "int32")
  if hidden is not None:
    shapes["hidden"] = ((b, int(np.prod(hidden.grid))), "bool")
  # As the device holds them: float64 arrives as float32.
  kind = jax.dtypes.canonicalize_dtype
  return {k: jax.ShapeDtypeStruct(s, kind(t)) for k, (s, t) in shapes.items()}


def placed(state: Any, config: Mapping, mesh: jax.sharding.Mesh) -> Any:
  """Shapes of the state with the sharding of each leaf."""
  where = sharding.state_shardings(
    state, mesh, placement=config["mesh"]["state"], min_size=config["mesh"]["min_size"]
  )
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def statistics(config: Mapping, source: Any, workdir: pathlib.Path | None) -> tuple[Any, Any]:
  """Mean and deviation per channel: the config's, ImageNet's for RGB, or measured once over a
  sample and kept in `moments.json` of the workdir."""
  data = config["data"]
  if data["mean"] is not None or data["std"] is not None:
    return _checked_statistics(data)
  if source.channels == 3 and np.issubdtype(np.dtype(source.dtype), np.integer):
    return IMAGENET
  kept = workdir / "moments.json" if workdir else None
  if kept and kept.exists():
    found = json.loads(kept.read_text())
    # A dry run, or a run that failed at once, may have measured another source here.
    if found["source"] == json.loads(json.dumps(source.fingerprint)):
      return found["mean"], found["std"]
  mean, std = (np.asarray(x).tolist() for x in moments.moments(source, source.channels))
  if kept:
    kept.parent.mkdir(parents=True, exist_ok=True)
    reporting.write_json(kept, {"mean": mean, "std": std, "source": source.fingerprint})
  return mean, std


def _checked_statistics(data: Mapping) -> tuple[Any, Any]:
  for key in ("mean", "std"):
    value = data[key]
    if value is None or len(value) != data["channels"]:
      raise ValueError(f"data.{key} must hold one number for each of {data['channels']} channels")
  if min(data["std"]) <= 0:
    raise ValueError(f"data.std must be positive, not {data['std']}")
  return data["mean"], data["std"]
