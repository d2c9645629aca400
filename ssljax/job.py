"""From a complete config to what a run needs. Every mistake of the user's shows here, before
anything is compiled."""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from ssljax import channels, checks, groups, on_device, processes, sharding
from ssljax import config as config_lib
from ssljax.data import pipeline, sources
from ssljax.data.views import Views, recipe_of
from ssljax.methods.combine import IMAGES, VIEWED, normalised, viewed, with_probe
from ssljax.step import Method, init_state


@dataclasses.dataclass(frozen=True)
class Job:
  """A run, built: `batch` holds the shapes of a global batch as `method` sees it, `given` as the
  training step is given it and `trained` takes it: the same, unless views or hidden places are made
  in the step. `trained` is `method` with these and a probe, where the config asks for them, and
  makes the state, whose shapes `state` holds."""

  config: dict[str, Any]
  mesh: jax.sharding.Mesh
  source: Any
  views: Any
  eval_views: Any
  hidden: Any
  text: Any
  grid: tuple[int, ...]
  encoder: Any
  method: Method
  tx: optax.GradientTransformation
  schedule: Callable
  batch: dict[str, jax.ShapeDtypeStruct]
  state: Any
  mean: Any
  std: Any
  feed: on_device.Feed
  given: dict[str, jax.ShapeDtypeStruct]
  trained: Method

  @property
  def image(self) -> jax.ShapeDtypeStruct:
    """One image [h w c] as the encoder sees it; of several views, the first."""
    leaf = next(key for key in IMAGES if key in self.batch)
    whole = self.batch[leaf]
    return jax.ShapeDtypeStruct(whole.shape[1 if leaf == "image" else 2 :], whole.dtype)

  def input(self) -> dict[str, Any]:
    """What a checkpoint remembers of the input, for those who use the encoder later."""
    image = self.image
    return {
      "shape": list(image.shape), "dtype": str(image.dtype),
      "mean": list(map(float, self.mean)), "std": list(map(float, self.std)),
    }  # fmt: skip

  def batches(self, start_step: int, steps: int | None = None) -> pipeline.Batches:
    """This process's training batches from a step on: endless, or `steps` of them."""
    config, data = self.config, self.config["data"]
    return pipeline.batches(
      self.feed.source,
      batch_size=config["batch_size"],
      seed=config["seed"],
      start_step=start_step,
      steps=steps,
      rows=sharding.local_rows(config["batch_size"], self.mesh).tolist(),
      views=self.feed.views,
      hidden=None if self.feed.draw_hidden else self.hidden,
      channels=data["channels"],
      workers=data["workers"],
      max_pixels=data["max_pixels"],
      images=not self.feed.cached,
      text=self.text,
    )

  def examples(
    self,
    source: Any,
    hidden: bool = False,
    indices: Any = None,
    known: dict | None = None,
    views: Any = None,
    rows: Any = None,
  ) -> pipeline.Batches:
    """One pass over a source in order, in the evaluation view or in `views`; `known` damage is not
    told again. hidden: with all that the method reads, hidden places and texts.

    Batches are whole (every process reads all of them), or hold only the given `rows`.
    """
    config, data = self.config, self.config["data"]
    return pipeline.examples(
      source,
      batch_size=eval_batch_size(config, self.mesh),
      views=views or self.eval_views,
      hidden=self.hidden if hidden else None,
      seed=config["seed"],
      channels=data["channels"],
      workers=data["workers"],
      max_pixels=data["max_pixels"],
      indices=indices,
      known=known,
      rows=rows,
      text=self.text if hidden else None,
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
  sharding.check_processes(mesh)
  encoder = config_lib.build(config["encoder"], dtype=config["dtype"])
  sharding.check_heads(encoder, mesh)
  views, eval_views = component(data["views"]), component(data["eval_views"])
  if isinstance(eval_views, Views):
    raise ValueError(
      "data.eval_views must give one view, e.g. dict(name='ssljax.data.views.resize_crop'), not"
      f" {data['eval_views']['name']}"
    )
  checks.patches(encoder, views)
  if source is None:
    source = open_source(config, data["split"])
  feed = on_device.feed(config, source, views, planned)
  source = feed.source
  shape = example_shape(source, views)
  grid = encoder.grid(shape[:-1])
  hidden = component(data["hidden"], grid=grid)
  feed = on_device.hide(feed, config, hidden)
  text = captions(config, source, workdir, planned)
  method = build_method(config, encoder, hidden)
  total = dict(total_steps=config["total_steps"], batch_size=config["batch_size"])
  mean, std = channels.statistics(config, source, workdir)
  method = normalised(method, mean, std)
  schedule = config_lib.build(config["schedule"], **total)
  tx = config_lib.build(config["optimizer"], schedule=schedule, **total)
  batch = batch_shapes(config, source, views, shape, hidden, text)
  checks.needs(config, method, batch)
  if not planned:
    checks.size(config["method"], source)
  trained, given = method, batch
  if config["probe"]["rate"]:
    trained = with_probe(method, checks.probe_classes(config["probe"], source))
    tx = groups.beside(tx, probe=optax.adam(config["probe"]["rate"]))
  if feed.make_views or feed.draw_hidden:
    trained = viewed(trained, feed.make_views, feed.draw_hidden)
    given = on_device.given_shapes(feed, batch, VIEWED)
  state = jax.eval_shape(lambda: init_state(trained, tx, batch, config["seed"]))
  # On shapes alone: parts that do not go together show before the workdir is claimed.
  jax.eval_shape(trained.loss, state.params, state.extra, given, state.rng, state.step)
  job = Job(
    dict(config), mesh, source, views, eval_views, hidden, text, grid, encoder, method, tx,
    schedule, batch, placed(state, config, mesh), mean, std, feed, given, trained,
  )  # fmt: skip
  if not planned:
    job.batches(0, steps=0).close()  # says now what the pipeline will not accept
  return job


def build_method(config: Mapping, encoder: Any, hidden: Any) -> Method:
  """The config's method around an encoder, on examples that are already normalised."""
  given = dict(encoder=encoder, total_steps=config["total_steps"], batch_size=config["batch_size"])
  if hidden is not None:
    given["hidden_count"] = hidden.count
  if config["data"]["text"]:
    given["vocabulary"] = config["data"]["text"]["vocabulary"]
  wanted = inspect.signature(config_lib.resolve(config["method"]["name"])).parameters
  count = wanted.get("hidden_count")
  if count is not None and count.default is count.empty and hidden is None:
    raise ValueError(
      "data.hidden is not set, and the method hides places:"
      " e.g. data.hidden=dict(name='ssljax.data.masking.random', ratio=.75)"
    )
  if "vocabulary" in wanted and "vocabulary" not in given:
    raise ValueError(
      "data.text is not set, and the method reads texts:"
      " e.g. data.text=dict(name='ssljax.data.text.captions')"
    )
  return config_lib.build(config["method"], **given)


def captions(config: Mapping, source: Any, workdir: pathlib.Path | None, planned: bool) -> Any:
  """What makes data.text, or None; its vocabulary is learnt once and kept in the workdir."""
  text = component(config["data"]["text"])
  if text is None or planned:
    return text
  text.check(source)
  return text.using(processes.from_first(lambda: text.vocabulary_of(source, workdir)))


def example_shape(source: Any, views: Any) -> tuple[int, ...]:
  """(h, w, c) of one example as the step sees it; of several views, the first."""
  size = recipe_of(views).each()[0].size
  if size is not None:
    return (*size, source.channels)
  if source.shape is None:
    raise ValueError(
      f"the images of {source.name} differ in size: set data.views,"
      " e.g. dict(name='ssljax.data.views.crop_flip', size=(224, 224))"
    )
  return tuple(source.shape)


def batch_shapes(
  config: Mapping, source: Any, views: Any, shape: tuple, hidden: Any, text: Any
) -> dict:
  """Shapes and types of a global batch."""
  b = config["batch_size"]
  recipe = recipe_of(views)
  shapes = {k: ((b, *s), source.dtype) for k, s in recipe.shapes(shape).items()}
  shapes |= {k: ((b, *s), t) for k, (s, t) in recipe.beside().items()} | {"index": ((b,), "int32")}
  if source.labelled:
    shapes["label"] = ((b,), "int32")
  if hidden is not None:
    shapes |= {k: ((b, *s), t) for k, (s, t) in hidden.shapes().items()}
  if text is not None:
    shapes["text"] = ((b, text.length), "int32")
  # As the device holds them: float64 arrives as float32.
  kind = jax.dtypes.canonicalize_dtype
  return {k: jax.ShapeDtypeStruct(s, kind(t)) for k, (s, t) in shapes.items()}


def placed(state: Any, config: Mapping, mesh: jax.sharding.Mesh) -> Any:
  """Shapes of the state with the sharding of each leaf."""
  where = sharding.state_shardings(
    state, mesh, placement=config["mesh"]["state"], min_size=config["mesh"]["min_size"]
  )
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
