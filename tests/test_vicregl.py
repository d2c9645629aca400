"""VICRegL: steps against NumPy, matches against the picture, settings that do not go together."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from loss_cases.redundancy import ranks, vicreg

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.methods.vicregl import places, vicregl
from ssljax.models.convnext import convnext
from ssljax.models.resnet import resnet

B = 6
LEAVES = {"global": (2, 16, (4, 4)), "local": (2, 8, (2, 2))}  # views, their side, cells
ENCODERS = {
  "batch": lambda: resnet(variant="18", stem="cifar_pool", width=8, blocks=(1, 1)),
  "layer": lambda: convnext(stem=2, blocks=(1, 1), widths=(8, 16), layer_scale=0.5),
}


def batch(seed=0):
  rng = np.random.default_rng(seed)
  corner, side = rng.uniform(0, 0.5, (B, 4, 2)), rng.uniform(0.2, 0.5, (B, 4, 2))
  boxes = np.concatenate([corner, corner + side], -1)
  mirrored = rng.random((B, 4)) < 0.5
  boxes[mirrored] = boxes[mirrored][:, [0, 3, 2, 1]]
  views = {
    leaf: rng.normal(size=(B, v, side, side, 3)).astype(np.float32)
    for leaf, (v, side, _) in LEAVES.items()
  }
  return views | {"boxes": np.float32(boxes), "index": np.arange(B)}


def centres(box, cells):
  """Of a view's cells, row by row, as they lie in the picture: [n 2]."""
  top, left, bottom, right = np.float64(box)
  found = []
  for row in range(cells[0]):
    for column in range(cells[1]):
      if left < right:
        x = left + (column + 0.5) * (right - left) / cells[1]
      else:  # the first column of the view is the last of the part
        x = right + (cells[1] - column - 0.5) * (left - right) / cells[1]
      found.append((top + (row + 0.5) * (bottom - top) / cells[0], x))
  return np.array(found)


def head(params, x, norm):
  """Three layers of one view [b … d], the last without bias; statistics over all but d, or d."""
  p = jax.tree.map(np.float64, params)
  for i in range(2):
    x = x @ p[f"layer_{i}"]["kernel"] + p[f"layer_{i}"]["bias"]
    axes = tuple(range(x.ndim - 1)) if norm == "batch" else -1
    x = x - x.mean(axes, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axes, keepdims=True) + 1e-5)
    x = np.maximum(x * p[f"norm_{i}"]["scale"] + p[f"norm_{i}"]["bias"], 0)
  assert set(p["layer_2"]) == {"kernel"}
  return x @ p["layer_2"]["kernel"]


def statement(views, alpha=0.6):
  """views: (whole [b d], map [b n d], places [b n 2], pairs kept near, alike); the first two are
  large. The parts as in the authors' `global_loss` and `local_loss`, with the paper's numbers."""
  pairs = [(a, b) for a in views[:2] for b in views if a is not b]
  found = {"features": [], "locations": []}
  for (_, m, pos, near, alike), (_, m2, pos2, near2, alike2) in pairs:
    found["features"].append((ranks(m, m2, m, m2, alike) + ranks(m2, m, m2, m, alike2)) / 2)
    found["locations"].append((ranks(pos, pos2, m, m2, near) + ranks(pos2, pos, m2, m, near2)) / 2)
  found = {name: np.mean(value) for name, value in found.items()}
  apart = np.mean([np.square(a[0] - b[0]).mean() for a, b in pairs])
  # Of a view and itself VICReg is its spread and its redundancy, both twice halved.
  spread = np.mean([vicreg(view[0], view[0], 0.5, 0.5)[0] for view in views])
  found["global"] = 25 * apart + spread
  return alpha * found["global"] + (1 - alpha) * (found["features"] + found["locations"]), found


@pytest.mark.parametrize("norm", ENCODERS)
def test_a_step_is_that_of_the_formulas(norm):
  """Large and small views, mirrored ones among them; batch norm of each view by itself."""
  encoder, one = ENCODERS[norm](), batch()
  method = vicregl(
    encoder, B, views=tuple(LEAVES), projector=(12, 12, 7), map_projector=(9, 9, 5),
    projector_norm=norm, alpha=0.6, matches=(5, 3), feature_matches=(6, 0),
  )  # fmt: skip
  params, extra = method.init(jax.random.key(0), one)
  value, (stats, metrics) = jax.jit(method.loss)(params, extra, one, jax.random.key(1), 0)
  seen, number = [], 0
  for leaf, (count, _, cells) in LEAVES.items():
    near, alike = {"global": (5, 6), "local": (3, 4)}[leaf]
    for i in range(count):
      running = {"batch_stats": extra["stats"]["encoder"]} if norm == "batch" else {}
      out, _ = encoder.apply(
        {"params": params["encoder"], **running}, one[leaf][:, i], train=True,
        mutable=["batch_stats"],
      )  # fmt: skip
      whole = head(params["projector"], np.float64(out["pooled"]), norm)
      cell = head(params["map_projector"], np.float64(out["patches"]), norm)
      spots = np.stack([centres(box, cells) for box in one["boxes"][:, number]])
      seen.append((whole, cell, spots, near, alike))
      number += 1
      if number == 1:
        np.testing.assert_allclose(stats["rows"]["pooled"], out["pooled"], atol=1e-5)
  wanted, parts = statement(seen)
  for name, part in parts.items():
    np.testing.assert_allclose(metrics[name], part, rtol=1e-4)
  np.testing.assert_allclose(value, wanted, rtol=1e-4)
  after = method.update(params, extra, stats, 0)
  assert jax.tree.structure(after) == jax.tree.structure(extra)


class Colours:
  """An encoder whose map is the mean colours of 4×4 cells."""

  dtype, batch_norm, prefix = jnp.float32, False, 0

  def grid(self, shape):
    return (4, 4)

  def init(self, rng, x):
    return {"params": {}}

  def apply(self, variables, x, mutable=(), **given):
    b, h, w, c = x.shape
    cells = x.reshape(b, 4, h // 4, 4, w // 4, c).mean((2, 4)).reshape(b, 16, c)
    out = {"pooled": cells.mean(1), "patches": cells}
    return (out, {}) if mutable else out


def crops():
  """Two views of a picture of which every colour says where it is, and their boxes [b 2 4]."""
  rng, height, width = np.random.default_rng(1), 600, 800
  y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
  picture, views, boxes = np.stack([y, x], -1) / width, [], []
  for _ in range(2 * B):
    h, w = 4 * rng.integers(60, 120, 2)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    part = picture[top : top + h, left : left + w]
    part = part.reshape(4, h // 4, 4, w // 4, 2).mean((1, 3))  # so small that a cell is a pixel
    turned = rng.random() < 0.5
    views.append(part[:, ::-1] if turned else part)
    sides = (left + w, left) if turned else (left, left + w)
    boxes.append((top, sides[0], top + h, sides[1]))
  boxes = np.float32(boxes).reshape(B, 2, 4) / width
  return {
    "views": np.float32(views).reshape(B, 2, 4, 4, 2), "boxes": boxes, "index": np.arange(B)
  }  # fmt: skip


def test_places_are_matched_to_the_nearest_in_the_picture():
  """Where features are places, both kinds of matches are the same pairs; not if a flip is lost."""
  one = crops()
  np.testing.assert_allclose(
    places(one["boxes"], (4, 4)), one["views"].reshape(B, 2, 16, 2), atol=1e-6
  )
  method = vicregl(
    Colours(), B, projector=(), map_projector=(), matches=(7, 1), feature_matches=(7, 1)
  )
  params, extra = method.init(jax.random.key(0), one)
  loss = jax.jit(lambda one: method.loss(params, extra, one, jax.random.key(0), 0)[1][1])
  found = loss(one)
  np.testing.assert_allclose(found["locations"], found["features"], rtol=1e-5)
  forgotten = one | {"boxes": np.sort(one["boxes"].reshape(B, 2, 2, 2), 2).reshape(B, 2, 4)}
  assert loss(forgotten)["locations"] > 1.01 * found["locations"]
  # Every cell with the nearest of the other view: no other partner lies nearer.
  a, b = (np.float64(one["views"][:, i]).reshape(B, 16, 2) for i in range(2))
  np.testing.assert_allclose(
    found["locations"], (ranks(a, b, a, b, 7) + ranks(b, a, b, a, 7)) / 2, rtol=1e-5
  )


def test_two_large_views_alone():
  """Whole views are those of VICReg with both scales one half."""
  one = crops()
  method = vicregl(Colours(), B, projector=(), map_projector=(), matches=(16, 1), alpha=1.0)
  params, extra = method.init(jax.random.key(0), one)
  value, _ = method.loss(params, extra, one, jax.random.key(0), 0)
  whole = one["views"].mean((2, 3))
  np.testing.assert_allclose(value, vicreg(whole[:, 0], whole[:, 1], 0.5, 0.5)[0], rtol=1e-5)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"data.views.boxes": "False"}, "needs boxes in the batch.*data.views.boxes=True"),
    ({"method.matches": "(65, 4)"}, "matches 65: the map of a view in 'views' has 8 × 8 = 64"),
    ({"method.feature_matches": "(70, 0)"}, "method.feature_matches 70: the map"),
    ({"method.matches": "(0, 4)"}, "method.matches and method.feature_matches: two numbers each"),
    ({"method.alpha": "1.5"}, "method.alpha 1.5 is not between 0 and 1"),
    ({"method.batch_norm": "'local'"}, "'local' is none of global, microbatch"),
    ({"method.projector_norm": "'group'"}, "Projector.norm 'group' is none of batch, layer, none"),
    ({"method.views": "('global', 'local')"}, "needs global, local in the batch"),
  ],
)  # fmt: skip
def test_what_a_config_must_not_say(settings, message):
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.override(tiny.config("vicregl"), settings))


def test_an_encoder_without_a_map():
  class Pooled(Colours):
    def apply(self, *given, **more):
      return {"pooled": super().apply(*given, **more)["pooled"]}

  method = vicregl(Pooled(), B, matches=(4, 1))
  with pytest.raises(ValueError, match="needs 'patches' of the encoder, which gives pooled"):
    method.init(jax.random.key(0), crops())
