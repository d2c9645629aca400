"""k-NN, linear probe, rank and feature extraction against independent statements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ssljax.evals.features import Features, extract, pixel_cell, pixels
from ssljax.evals.knn import knn, neighbours
from ssljax.evals.linear import _accuracy, _optimum, _problem, _standardised, linear
from ssljax.evals.rank import effective_rank, rank


def clouds(size: int, width: int = 12, classes: int = 4, seed: int = 0) -> Features:
  """Overlapping Gaussian clouds, stretched so that the columns differ by a factor of 100."""
  rng = np.random.default_rng([seed, size])
  centre = np.random.default_rng(7).normal(size=(classes, width))
  label = rng.integers(0, classes, size)
  rows = (centre[label] + 1.2 * rng.normal(size=(size, width))) * np.logspace(-1, 1, width) + 3
  # Labels that are no counting from zero: classes are found, not assumed.
  return Features(rows.astype(np.float32), (label * 5 + 2).astype(np.int32), np.arange(size))


def brute_knn(train: Features, test: Features, k: int, temperature: float) -> float:
  a = train.pooled.astype(np.float64)
  b = test.pooled.astype(np.float64)
  a /= np.linalg.norm(a, axis=1, keepdims=True)
  b /= np.linalg.norm(b, axis=1, keepdims=True)
  right = 0
  for row, label in zip(b @ a.T, test.label, strict=True):
    nearest = np.argsort(-row, kind="stable")[:k]
    votes = {
      c: np.exp(row[nearest] / temperature)[train.label[nearest] == c].sum()
      for c in np.unique(train.label)
    }
    right += max(votes, key=votes.get) == label
  return right / len(test.label)


def test_knn_equals_brute_force_for_every_k_and_any_tiles():
  train, test = clouds(301), clouds(97, seed=1)
  want = {f"knn_k{k}_T0.07/top1": brute_knn(train, test, k, 0.07) for k in (1, 10, 200)}
  assert want["knn_k10_T0.07/top1"] > 0.4
  assert knn(train, test, k=(10, 1, 200)) == want
  assert knn(train, test, k=(10, 1, 200), query_tile=32, bank_tile=50) == want


def test_knn_equals_scikit_learn():
  train, test = clouds(300), clouds(80, seed=1)
  for k, temperature in ((5, 0.07), (40, 0.5)):
    # Its cosine distance is 1 - similarity; the constant factor does not change the votes.
    other = KNeighborsClassifier(
      k, metric="cosine", weights=lambda distance, t=temperature: np.exp((1 - distance) / t)
    ).fit(train.pooled.astype(np.float64), train.label)
    want = other.score(test.pooled.astype(np.float64), test.label)
    assert knn(train, test, k=(k,), temperature=temperature) == {
      f"knn_k{k}_T{temperature:g}/top1": want
    }


def test_neighbours_keep_the_order_of_the_bank_among_equals():
  bank = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0) * np.arange(1, 13)[:, None]
  similarity, place = neighbours(bank.astype(np.float32), np.eye(3)[[1]], 6, bank_tile=5)
  np.testing.assert_array_equal(place, [[4, 5, 6, 7, 0, 1]])
  np.testing.assert_allclose(similarity, [[1, 1, 1, 1, 0, 0]], atol=1e-6)


def test_knn_caps_k_at_the_bank_and_its_key_says_so():
  train, test = clouds(30), clouds(9, seed=1)
  assert set(knn(train, test, k=(10, 100, 200))) == {"knn_k10_T0.07/top1", "knn_k30_T0.07/top1"}


def test_knn_survives_tiny_temperatures_huge_features_and_a_mesh():
  train, test = clouds(60), clouds(20, seed=1)
  large = [x._replace(pooled=x.pooled * np.float32(1e30)) for x in (train, test)]
  want = brute_knn(train, test, 5, 0.07)
  assert knn(*large, k=(5,))["knn_k5_T0.07/top1"] == want
  assert knn(train, test, k=(5,), temperature=1e-4)["knn_k5_T0.0001/top1"] == brute_knn(
    train, test, 1, 1.0
  )
  mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert knn(train, test, k=(5,))["knn_k5_T0.07/top1"] == want


@pytest.mark.parametrize("evaluation", [knn, linear])
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a, b: (a._replace(label=None), b), "needs labels, but the train split has none"),
    (lambda a, b: (a, b._replace(label=None)), "needs labels, but the test split has none"),
    (lambda a, b: (a._replace(label=a.label * 0 + 3), b), r"same label \(3\)"),
    (lambda a, b: (a._replace(label=a.label[:-1]), b), "40 train examples but labels of shape"),
    (lambda a, b: (a, b._replace(label=b.label + 1)), "no label in common"),
    (lambda a, b: (a, b._replace(pooled=b.pooled[:, :5])), r"differ in width \(12 and 5\)"),
    (lambda a, b: (a._replace(pooled=a.pooled * np.nan), b), "train features are not finite"),
  ],
)
def test_bad_features_are_named(evaluation, change, message):
  with pytest.raises(ValueError, match=message):
    evaluation(*change(clouds(40), clouds(20, seed=1)))


def test_bad_arguments_are_named():
  train, test = clouds(40), clouds(20, seed=1)
  with pytest.raises(ValueError, match="k must be at least 1"):
    knn(train, test, k=(0, 5))
  with pytest.raises(ValueError, match="temperature must be above 0"):
    knn(train, test, temperature=0)
  with pytest.raises(ValueError, match="50 neighbours asked for, but there are 40"):
    neighbours(train.pooled, test.pooled, 50)
  with pytest.raises(ValueError, match="at least 10 train examples, got 8"):
    linear(clouds(8), test)
  with pytest.raises(ValueError, match="held_out"):
    linear(train, test, held_out=1.0)


@pytest.mark.parametrize("cells", [2**26, 400])
@pytest.mark.parametrize(("l2", "number"), [(1e-1, 4), (1e-3, 4), (1e-3, 2)])
def test_linear_reaches_the_optimum_of_scikit_learn(l2, number, cells):
  train = clouds(400, classes=number)
  scaler = StandardScaler().fit(train.pooled.astype(np.float64))
  x = scaler.transform(train.pooled.astype(np.float64))
  classes, ids = np.unique(train.label, return_inverse=True)
  # scikit-learn: C sum(loss) + |w|^2 / 2, so C = 1 / (l2 n); for two classes it has one vector, the
  # difference of the two here, whose penalty is twice that of the pair.
  strength = (2 if number == 2 else 1) / (l2 * len(x))
  other = LogisticRegression(C=strength, tol=1e-10, max_iter=10000).fit(x, ids)
  problem = _problem(x.astype(np.float32), ids, len(classes), cells)
  fit = _optimum(problem, np.ones(len(x), np.float32), l2, None, 300, 1e-6)
  if number > 2:
    kernel = fit.kernel - fit.kernel.mean(1, keepdims=True)
    np.testing.assert_allclose(kernel, other.coef_.T, atol=3e-3)
    np.testing.assert_allclose(fit.bias - fit.bias.mean(), other.intercept_, atol=3e-3)
  found = np.asarray(jax.nn.softmax(x @ fit.kernel + fit.bias, 1))
  np.testing.assert_allclose(found, other.predict_proba(x), atol=1e-3)


def test_rows_of_weight_zero_are_not_fitted():
  train = clouds(120)
  ids = np.unique(train.label, return_inverse=True)[1]
  x = _standardised(train.pooled, train.pooled.mean(0), train.pooled.std(0))
  weight = np.ones(120, np.float32)
  weight[80:] = 0
  part = _optimum(_problem(x, ids, 4), weight, 1e-2, None, 300, 1e-6)
  alone = _optimum(_problem(x[:80], ids[:80], 4), np.ones(80, np.float32), 1e-2, None, 300, 1e-6)
  np.testing.assert_allclose(part.kernel, alone.kernel, atol=3e-3)
  assert _accuracy(alone, x[:80], ids[:80]) == _accuracy(part, x[:80], ids[:80])


def test_linear_agrees_with_scikit_learn_end_to_end_and_repeats_itself():
  train, test = clouds(500), clouds(300, seed=1)
  found = linear(train, test)
  assert found == linear(train, test)
  model = LogisticRegression(C=1 / (found["linear/l2"] * 500), tol=1e-8, max_iter=10000)
  scaler = StandardScaler().fit(train.pooled)
  model.fit(scaler.transform(train.pooled), train.label)
  want = model.score(scaler.transform(test.pooled), test.label)
  assert abs(found["linear/top1"] - want) <= 1 / 300
  assert found["linear/gradient"] < 1e-3
  assert found["linear/top1"] > 0.6


def test_linear_chooses_strong_regularisation_where_features_are_noise():
  rng = np.random.default_rng(0)

  def split(size):
    label = rng.integers(0, 2, size).astype(np.int32)
    rows = rng.normal(size=(size, 300)).astype(np.float32)
    rows[:, 0] += 2 * label
    return Features(rows, label)

  train, test = split(600), split(800)
  chosen = linear(train, test, l2=(1e-1, 1e-6), held_out=0.3)
  weak = linear(train, test, l2=(1e-6,))
  assert chosen["linear/l2"] == 0.1
  assert chosen["linear/top1"] > weak["linear/top1"] + 0.02


def test_linear_ignores_constant_features():
  train, test = clouds(200), clouds(100, seed=1)
  constant = [
    x._replace(pooled=np.pad(x.pooled, ((0, 0), (0, 2)), constant_values=1e3 / 3))
    for x in (train, test)
  ]
  assert abs(linear(*constant)["linear/top1"] - linear(train, test)["linear/top1"]) <= 0.02


def test_effective_rank_of_known_tables():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(300, 8)))[0]
  assert effective_rank(basis) == pytest.approx(8, abs=1e-3)
  assert effective_rank(basis.T) == pytest.approx(8, abs=1e-3)
  assert effective_rank(np.outer(np.arange(1, 50), np.ones(6))) == pytest.approx(1, abs=1e-3)
  assert effective_rank(np.zeros((10, 4))) == 1
  rows = rng.normal(size=(200, 10)) * np.logspace(0, -2, 10)
  share = np.linalg.svd(rows, compute_uv=False)
  share = share / share.sum() + 1e-7
  assert effective_rank(rows) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_rank_tells_collapse():
  rng = np.random.default_rng(0)
  spread = Features(rng.normal(size=(2000, 16)).astype(np.float32))
  point = Features(np.ones((2000, 16), np.float32) + 1e-4 * spread.pooled)
  good, bad = rank(spread, spread), rank(point, point)
  assert good["rank/effective"] > 15
  assert bad["rank/effective"] < 1.1
  assert good["rank/std_unit"] == pytest.approx(1, abs=0.05)
  assert bad["rank/std_unit"] < 1e-3
  half = Features(np.where(np.arange(16) < 8, spread.pooled, 5).astype(np.float32))
  assert rank(half, half)["rank/dead"] == 0.5
  assert rank(spread, spread, examples=500)["rank/effective"] > 15
  with pytest.raises(ValueError, match="at least 2"):
    rank(Features(np.ones((1, 16), np.float32)), spread)


def images(size: int, batch: int, labelled: bool = True):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (size, 4, 6, 3), np.uint8)
  for start in range(0, size, batch):
    take = np.arange(start, start + batch)
    made = {"image": image[take % size], "index": take.astype(np.int32), "valid": take < size}
    yield made | ({"label": (take % 3).astype(np.int32)} if labelled else {})


def test_extract_keeps_the_order_and_drops_padding():
  encode = jax.jit(lambda image: image.astype(jnp.bfloat16).mean((1, 2)))
  found = extract(lambda batch: {"pooled": encode(batch["image"])}, images(10, 4))
  assert found.pooled.shape == (10, 3)
  assert found.pooled.dtype == np.float32
  np.testing.assert_array_equal(found.index, np.arange(10))
  np.testing.assert_array_equal(found.label, np.arange(10) % 3)
  assert pixels(images(10, 4, labelled=False)).label is None


def test_extract_names_examples_without_finite_features():
  def encode(batch):
    return {"pooled": np.where(batch["index"][:, None] == 6, np.nan, 1.0)}

  with pytest.raises(ValueError, match="1 examples are not finite .examples 6"):
    extract(encode, images(10, 4))
  with pytest.raises(ValueError, match="no readable example"):
    extract(encode, [])


def test_pixels_are_raw_unless_too_wide():
  raw = pixels(images(10, 4))
  whole = np.concatenate([b["image"][b["valid"]] for b in images(10, 4)])
  np.testing.assert_allclose(raw.pooled, whole.reshape(10, -1) / 255, rtol=1e-6)
  assert pixel_cell((32, 32, 3)) == 1
  assert pixel_cell((224, 224, 3)) == 7
  small = pixels(images(10, 4), max_width=18)
  cells = whole.reshape(10, 2, 2, 3, 2, 3).mean((2, 4)) / 255
  np.testing.assert_allclose(small.pooled, cells.reshape(10, -1), rtol=1e-5)
  # A side that is no multiple of the cell: the last cell is smaller, its mean is still a mean.
  flat = [{"image": np.full((2, 5, 7, 1), 0.25, np.float32)}]
  assert pixel_cell((5, 7, 1), 6) == 3
  np.testing.assert_allclose(pixels(flat, max_width=6).pooled, 0.25)
