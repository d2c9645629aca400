"""Contexts and targets: exact counts, the released sampler's statistics, keys per example."""

import numpy as np
import pytest

from ssljax.data import multiblock as lib
from ssljax.data.multiblock import contexts, multiblock, rolled

INDEX = np.arange(48)
SAMPLERS = [
  multiblock((16, 16)),
  multiblock((16, 16), released=True),
  multiblock((6, 9), targets=2),
  multiblock((2, 8, 8)),
  contexts((14, 14)),
  contexts((30,), clones=2),
  rolled((16, 16)),
  rolled((8, 6), ratio=0.5, predict=0.2),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_counts_are_exact_and_no_target_is_seen(sampler):
  drawn = sampler.batch(0, 0, INDEX)
  shapes = sampler.shapes()
  assert {k: (v.shape[1:], str(v.dtype)) for k, v in drawn.items()} == shapes
  context, targets = drawn["context"], drawn["targets"]
  assert context.shape[-1] + sampler.count == np.prod(sampler.grid)
  for places in (context, targets):
    assert (np.diff(places, axis=-1) > 0).all()  # sorted, none twice
    assert places.min() >= 0 and places.max() < np.prod(sampler.grid)
  seen = np.zeros((*context.shape[:2], np.prod(sampler.grid)), bool)
  np.put_along_axis(seen, context, True, axis=-1)
  assert not np.take_along_axis(seen, targets.reshape(*context.shape[:2], -1), -1).any()
  np.testing.assert_array_equal(sampler.shown(drawn), ~seen[:, 0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_depend_on_seed_epoch_and_index_alone(sampler):
  whole = sampler.batch(3, 1, INDEX)
  part = sampler.batch(3, np.full(3, 1), INDEX[[9, 2, 40]])
  others = [sampler.batch(4, 1, INDEX), sampler.batch(3, 2, INDEX), sampler.batch(3, 1, INDEX + 48)]
  for key, value in whole.items():
    np.testing.assert_array_equal(part[key], value[[9, 2, 40]])
  for other in others:
    new = {k: (other[k] != v).any(axis=tuple(range(1, v.ndim))) for k, v in whole.items()}
    # A rolled rectangle has some hundred places on this grid: one leaf alone may come again.
    assert all(differs.mean() > 0.9 for differs in new.values())
    assert np.any(list(new.values()), axis=0).all()


@pytest.fixture(scope="module")
def released():
  """(draw, tables) of the released rule on 16x16: uniforms -> context and blocks, uncut."""
  plane = (16, 16)
  small = lib._sizes(plane, (0.15, 0.2), (0.75, 1.5), True)
  large = lib._sizes(plane, (0.85, 1.0), (1.0, 1.0), True)
  return lambda u, size: lib._draw(u, size, small, large, plane, True), small, large


def test_released_blocks_have_five_sizes_and_miss_the_last_row_and_column(released):
  draw, small, large = released
  assert sorted({int(a) for a in small.prod(1)}) == [35, 36, 42, 48, 54]
  assert {tuple(x) for x in large.tolist()} == {(15, 15)}
  rng = np.random.default_rng(0)
  seen, blocks = draw(rng.random((2000, 5, 2)), rng.random((2000, 2)))
  for places in (seen, blocks):
    places = places.reshape(-1, 16, 16).any(0)
    assert places[:15, :15].all() and not places[15].any() and not places[:, 15].any()
  both = multiblock((16, 16)).batch(0, 0, np.arange(500))
  for key in ("context", "targets"):
    assert set(np.unique(both[key])) == set(range(256))


# A loader batch of the released sampler shares its sizes and is cut to its shortest context.
@pytest.mark.parametrize(("loader", "mean"), [(1, 110), (8, 86), (64, 73), (128, 69)])
def test_released_contexts_have_the_measured_lengths(released, loader, mean):
  rng = np.random.default_rng(0)
  groups = 10240 // loader
  size = np.repeat(rng.random((groups, 1, 2)), loader, axis=1)
  seen, _ = released[0](rng.random((groups, loader, 5, 2)), size)
  assert abs(seen.sum(-1).min(1).mean() - mean) < 1.5
  assert multiblock((16, 16)).shapes()["context"] == ((1, 69), "int32")


def test_a_context_that_no_draw_leaves_is_made(monkeypatch):
  """The most that is always left needs targets that fall together, which draws do not."""
  sampler = multiblock((16, 16), context=256 * 85 // 100 - 60)
  drawn = sampler.batch(0, 0, INDEX)
  together = (drawn["targets"][:, 0].max((1, 2)) - drawn["targets"][:, 0].min((1, 2))) < 16 * 9
  assert together.mean() > 0.5
  assert drawn["context"].shape == (48, 1, 157)


def test_blocks_reach_over_the_other_axes():
  drawn = multiblock((3, 8, 8)).batch(0, 0, INDEX)
  for key in ("context", "targets"):
    copies = drawn[key].reshape(*drawn[key].shape[:-1], 3, -1)
    np.testing.assert_array_equal(copies, copies[..., :1, :] + np.array([0, 64, 128])[:, None])


def test_contexts_are_blocks():
  """39 of 196 places as data2vec 2.0 keeps them; more neighbours than places drawn one by one."""
  sampler = contexts((14, 14))
  assert sampler.shapes() == {
    "context": ((16, 39), "int32"), "targets": ((16, 1, 157), "int32"),
  }  # fmt: skip
  drawn = sampler.batch(0, 0, np.arange(64))["context"]
  kept = np.zeros((64, 16, 196), bool)
  np.put_along_axis(kept, drawn, True, axis=-1)
  kept = kept.reshape(-1, 14, 14)
  pairs = (kept[:, 1:] & kept[:, :-1]).sum((1, 2)).mean()
  alone = 39 * 38 / (196 * 195) * 13 * 14
  assert pairs > 2 * alone


def test_a_rolled_context_is_a_rectangle_anywhere():
  """90 of 256 places as CAPI keeps them; every place is seen as often as any other."""
  drawn = rolled((16, 16)).batch(0, 0, np.arange(4000))
  assert drawn["context"].shape == (4000, 1, 90) and drawn["targets"].shape == (4000, 1, 1, 8)
  share = np.bincount(drawn["context"].reshape(-1), minlength=256) / 4000
  assert np.abs(share - 90 / 256).max() < 4 * np.sqrt(90 / 256 * 166 / 256 / 4000)
  seen = np.zeros((4000, 256), bool)
  np.put_along_axis(seen, drawn["context"][:, 0], True, axis=1)
  seen = seen.reshape(-1, 16, 16)
  borders = [(seen != np.roll(seen, 1, axis)).sum((1, 2)) for axis in (1, 2)]
  width, height = borders[0] // 2, borders[1] // 2  # a rectangle's, counted round the edges
  assert (width * height >= 90).all() and ((width - 1) * height < 90 + height).all()
  assert 6 < width.min() < width.max() < 15


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: multiblock((16,)), "two axes or more"),
    (lambda: multiblock((16, 16), targets=0), "and a target"),
    (lambda: multiblock((16, 16), context=240), "is not between 1 and"),
    (lambda: multiblock((3, 3), context=9), "is not between 1 and"),
    (lambda: rolled((16,)), "two axes"),
    (lambda: rolled((4, 4)), "are 0"),
    (lambda: contexts((14, 14), block=4), "is even"),
    (lambda: contexts((14, 14), keep=1.0), "one place left"),
    (lambda: contexts((3, 3), keep=0.05, adjust=0.0), "at least one of each"),
  ],
)
def test_errors_say_what_is_wrong(make, words):
  with pytest.raises(ValueError, match=words):
    make()
