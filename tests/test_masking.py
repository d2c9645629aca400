"""Hidden places: exact counts, released rounding rules, BEiT's statistics, keys per example."""

import numpy as np
import pytest

from ssljax.data import masking

INDEX = np.arange(64)


@pytest.mark.parametrize(
  ("places", "ratio", "rounding", "hidden"),
  [
    (196, 0.75, "keep_floor", 147),
    (49, 0.6, "keep_floor", 30),
    (36, 0.6, "keep_floor", 22),
    # 1 - .9 is 0.0999…: int keeps 9, not 10.
    (100, 0.9, "keep_floor", 91),
    (1568, 0.9, "keep_floor", 1412),
    (49, 0.6, "hide_ceil", 30),
    (36, 0.6, "hide_ceil", 22),
    # 100 * .55 is 55.000000000000007.
    (100, 0.55, "hide_ceil", 56),
    (196, 0.75, "keep_round", 147),
    (49, 0.6, "keep_round", 29),
    (36, 0.6, "keep_round", 22),
  ],
)
def test_counts_follow_the_released_rounding(places, ratio, rounding, hidden):
  sampler = masking.random((places,), ratio=ratio, rounding=rounding)
  assert sampler.count == hidden
  assert (sampler.draw(0, 0, INDEX).sum(1) == hidden).all()


def test_random_is_uniform_over_places():
  sampler = masking.random((4, 4), ratio=0.75)
  share = sampler.draw(0, 0, np.arange(4000)).mean(0)
  assert np.abs(share - 0.75).max() < 4 * np.sqrt(0.75 * 0.25 / 4000)


def test_injected_noise_hides_the_largest():
  noise = np.array([[0.4, 0.1, 0.9, 0.2], [0.5, 0.6, 0.1, 0.0]])
  expected = [[True, False, True, False], [True, True, False, False]]
  assert masking.hide_by_noise(noise, 2).tolist() == expected


@pytest.mark.parametrize(
  "sampler",
  [
    masking.random((7, 7)),
    masking.units((12, 12)),
    masking.block((7, 7), count=20, min_area=4),
    masking.block((2, 4, 4), count=13, min_area=4),
    masking.block((40,), count=17, min_area=3),
  ],
)
def test_draws_depend_on_seed_epoch_and_index_alone(sampler):
  whole = sampler.draw(3, 1, INDEX)
  assert whole.dtype == bool and whole.shape == (64, np.prod(sampler.grid))
  assert (whole.sum(1) == sampler.count).all()
  part = sampler.draw(3, np.full(4, 1), INDEX[[9, 2, 40, 63]])
  assert (part == whole[[9, 2, 40, 63]]).all()
  for other in (
    sampler.draw(4, 1, INDEX),
    sampler.draw(3, 2, INDEX),
    sampler.draw(3, 1, INDEX + 64),
  ):
    assert (other != whole).any(1).all()


@pytest.mark.parametrize(("grid", "hidden"), [((12, 12), 22), ((14, 14), 30)])
def test_units_are_whole_blocks_of_simmim(grid, hidden):
  sampler = masking.units(grid, unit=2, ratio=0.6)
  assert sampler.count == 4 * hidden
  cells = sampler.draw(0, 0, INDEX).reshape(-1, grid[0] // 2, 2, grid[1] // 2, 2)
  assert (cells == cells[:, :, :1, :, :1]).all()
  assert (cells[:, :, 0, :, 0].sum((1, 2)) == hidden).all()


def test_block_has_beits_statistics():
  draws = np.arange(3000)
  exact = masking.block((14, 14), count=75, min_area=16, aspect=0.3).draw(0, 0, draws)
  assert (exact.sum(1) == 75).all()
  streams = masking.generators(0, 0, draws)
  boxes = masking._boxes(streams, (14, 14), 75, 16, 0.3)
  counts = boxes.sum((1, 2))
  assert counts.max() == 75
  assert abs(counts.mean() - 74.49) < 0.1
  assert abs((counts == 75).mean() - 0.675) < 0.03
  assert abs(np.percentile(counts, 1) - 70) <= 1
  share = boxes.mean(0)
  assert abs(share[6:8, 6:8].mean() - 0.72) < 0.02
  assert abs(share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() - 0.04) < 0.02
  assert abs(share[[0, -1, 7, 7], [7, 7, 0, -1]].mean() - 0.19) < 0.02


def test_block_completion_only_adds():
  streams = masking.generators(0, 0, INDEX)
  boxes = masking._boxes(streams, (14, 14), 75, 16, 0.3).reshape(64, -1)
  exact = masking.block((14, 14), count=75).draw(0, 0, INDEX)
  assert (exact >= boxes).all()


def test_view_blocks_have_ibots_statistics():
  """At 14x14, half of the views hide nothing, and where shares are U(.1, .5), mean 58.8 places, the
  released sampler reaches 57.6; never more than is asked for."""
  draws = np.arange(1500)
  sampler = masking.view_blocks((14, 14))
  assert sampler.count == 98 and sampler.shapes() == {"hidden": ((2, 196), "bool")}
  hidden = sampler.draw(0, 0, draws)
  assert hidden.shape == (1500, 2, 196) and hidden.dtype == bool
  counts = hidden.sum(-1)
  assert abs((counts == 0).mean() - 0.51) < 0.03 and counts.max() <= 98
  assert abs(counts[counts > 0].mean() - 57.6) < 2
  # The views of an image hide apart from each other, and draws belong to examples.
  assert abs(np.corrcoef(counts.T)[0, 1]) < 0.1
  assert (sampler.draw(0, 0, draws[[7, 3]]) == hidden[[7, 3]]).all()
  exact = masking.view_blocks((14, 14), ratio=(0.3, 0.3), probability=1.0, exact=True)
  assert (exact.draw(0, 0, draws[:50]).sum(-1) == 58).all()


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: masking.random((4, 4), ratio=1.5), "not between 0 and 1"),
    (lambda: masking.random((2, 2), ratio=0.9), "nothing would be left"),
    (lambda: masking.random((4, 4), rounding="floor"), "there are"),
    (lambda: masking.units((7, 6), unit=2), "axis 0 of the grid"),
    (lambda: masking.units((6, 6), unit=(2,)), "1 axes"),
    (lambda: masking.block((4, 4), count=16), "not between 1 and 15"),
    (lambda: masking.block((4, 4), aspect=0.0), "aspect"),
    (lambda: masking.random((4, 0)), "empty axis"),
    (lambda: masking.view_blocks((4, 4), ratio=(0.5, 0.1)), "0 < low <= high < 1"),
    (lambda: masking.view_blocks((4, 4), probability=0.0), "probability 0.0 is not in"),
    (lambda: masking.view_blocks((2, 2), ratio=(0.1, 0.2)), "hides no place"),
  ],
)
def test_errors_say_what_is_wrong(make, words):
  with pytest.raises(ValueError, match=words):
    make()
