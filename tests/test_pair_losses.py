"""Losses of two views that ask for more than two views: one coupling from given features, beside
independent statements of it in NumPy. Heads are the identity; nothing is encoded."""

import functools

import jax
import numpy as np
import pytest
import tiny

from ssljax import called, losses
from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.methods.two_view import two_view
from ssljax.models.vit import vit

B, D, KEY = 12, 4, jax.random.key(3)
ENCODER = vit(width=D, depth=1, heads=1, patch=(4, 4))
RNG = np.random.default_rng(0)
Z = {name: RNG.normal(size=(B, 2, D)).astype(np.float32) for name in ("student", "teacher")}
INDEX = RNG.permutation(100)[:B]


def method(loss, projector=(), **given):
  return two_view(ENCODER, B, loss=loss, projector=projector, **given)


def coupled(made, z=Z, extra=None, params=None, step=0, **batch):
  """Value, stats and metrics of one coupling; heads without parameters unless they are given."""
  nothing = {"projector": {}, "predictor": {}}
  places = {"stats": nothing, "teacher_stats": nothing, "teacher": nothing}
  batch = {"index": INDEX} | batch
  return made.couple(params or nothing, places | (extra or {}), z, batch, KEY, step)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def whitened(x):
  x = np.float64(x) - x.mean(0, dtype=np.float64)
  return np.linalg.solve(np.linalg.cholesky(x.T @ x / (len(x) - 1)), x.T).T


def test_w_mse_whitens_the_same_drawn_rows_of_both_views():
  value, _ = coupled(method(functools.partial(losses.w_mse, size=6)))
  rng = jax.random.fold_in(jax.random.fold_in(KEY, 0xDE211109), 0)
  draws = [float(jax.random.uniform(jax.random.fold_in(rng, i))) for i in INDEX]
  order = np.argsort(draws)
  parts = [
    unit(whitened(Z["student"][rows, 0])) - unit(whitened(Z["student"][rows, 1]))
    for rows in (order[:6], order[6:])
  ]
  np.testing.assert_allclose(value, np.mean([np.square(p).sum(1) for p in parts]), rtol=1e-4)
  turned = {name: z[::-1] for name, z in Z.items()}
  again, _ = coupled(method(functools.partial(losses.w_mse, size=6)), turned, index=INDEX[::-1])
  np.testing.assert_allclose(value, again, rtol=1e-5)


def test_mmcr_takes_the_views_of_student_and_teacher_at_once():
  value, _ = coupled(method(losses.mmcr, target="teacher"))
  centroids = np.concatenate([unit(Z["student"]), unit(Z["teacher"])], 1).mean(1)
  np.testing.assert_allclose(value, -np.linalg.svd(centroids, compute_uv=False).sum(), rtol=1e-5)


def test_a_whitened_projection_has_unit_covariance_in_each_group_and_view():
  made = method(losses.vibcreg, (D,), projector_last="whiten", whiten_groups=2)
  rng = np.random.default_rng(1)
  kernel, z = rng.normal(size=(D, D)), RNG.normal(size=(B, 2, D)) + 3 * np.arange(2)[:, None]
  scale = np.float32([1, 2, 3, 4])
  head = {"layer_0": {"kernel": kernel}, "norm_0_scale": scale, "norm_0_shift": np.ones(D)}
  value, _ = coupled(made, {"student": z}, params={"projector": head, "predictor": {}})
  views = []
  for x in np.moveaxis(z @ kernel, 1, 0):
    halves = []
    for part in np.split(x - x.mean(0), 2, axis=1):
      sigma = part.T @ part / B + 1e-5 * np.eye(2)
      root, trace = np.eye(2), np.trace(sigma)
      for _ in range(5):
        root = (3 * root - root @ root @ root @ sigma / trace) / 2
      halves.append(part @ root / np.sqrt(trace))
    views.append(np.float32(np.concatenate(halves, 1) * scale + 1))
  np.testing.assert_allclose(value, losses.vibcreg(*views)[0], rtol=1e-4)


def test_supcon_draws_all_views_of_a_class_together():
  label = np.arange(B) % 3
  value, _ = coupled(method(functools.partial(losses.supcon, temperature=0.2)), label=label)
  z = unit(Z["student"]).reshape(-1, D)
  same, found = np.repeat(label, 2)[:, None] == np.repeat(label, 2), []
  for i, scores in enumerate(z @ z.T / 0.2):
    others = np.arange(2 * B) != i
    found.append(np.log(np.exp(scores[others]).sum()) - scores[others & same[i]].mean())
  np.testing.assert_allclose(value, np.mean(found), rtol=1e-5)


def test_tico_carries_its_covariance_through_both_directions_and_steps():
  made, memory = method(losses.tico, target="teacher"), np.zeros((D, D))
  extra = {"memory": memory, "stats": {}, "teacher_stats": {}, "teacher": {}}
  for step in range(2):
    value, (stats, _) = coupled(made, extra={"memory": extra["memory"]}, step=step)
    found = []
    for online, wanted in ((0, 1), (1, 0)):
      a, b = unit(Z["student"][:, online]), unit(Z["teacher"][:, wanted])
      memory = 0.9 * memory + 0.1 * a.T @ a / B
      found.append(1 - (a * b).sum(1) + 8 * np.einsum("bi,ij,bj->b", a, memory, a))
    np.testing.assert_allclose(value, np.mean(found), rtol=1e-5)
    extra = made.update({}, extra, stats, step)
    np.testing.assert_allclose(extra["memory"], memory, rtol=1e-5)


def test_nnclr_predicts_the_neighbours_and_keeps_the_first_views():
  loss = functools.partial(losses.nnclr, temperature=0.2)
  made = method(loss, target="stopped", predictor=(D,), queue=20, queued="first")
  rng = np.random.default_rng(2)
  queue, kernel = rng.normal(size=(20, D)).astype(np.float32), rng.normal(size=(D, D))
  head = {"layer_0": {"kernel": kernel, "bias": np.ones(D)}}
  extra = {"queue": queue, "position": np.int32(15), "stats": {}}
  params = {"projector": {}, "predictor": head}
  value, (stats, _) = coupled(made, extra={"queue": queue}, params=params)
  z = [unit(Z["student"][:, i]) for i in range(2)]
  p = [unit(Z["student"][:, i] @ kernel + 1) for i in range(2)]
  found = []
  for i, j in ((0, 1), (1, 0)):
    near = unit(queue)[(z[i] @ unit(queue).T).argmax(1)]
    scores = near @ p[j].T / 0.2
    found.append(np.log(np.exp(scores).sum(1)) - np.diag(scores))
  np.testing.assert_allclose(value, np.mean(found), rtol=1e-5)
  after = made.update(params, extra, stats, 0)
  np.testing.assert_allclose(after["queue"][15:], z[0][:5], rtol=1e-5)
  np.testing.assert_allclose(after["queue"][:7], z[0][5:], rtol=1e-5)
  np.testing.assert_array_equal(after["queue"][7:15], queue[7:15])


def test_mochi_mixes_for_each_example_its_own_negatives_from_its_start_on():
  loss = functools.partial(losses.mochi, temperature=0.2, n_hard=6, s=4, s2=2, start=3)
  made = method(loss, target="teacher", symmetric=False, queue=20)
  queue = np.random.default_rng(2).normal(size=(20, D)).astype(np.float32)
  z = {name: x[:, :1] for name, x in Z.items()}
  before, _ = coupled(made, z, {"queue": queue}, step=2)
  plain = losses.info_nce_queue(z["student"][:, 0], z["teacher"][:, 0], queue, 0.2).mean()
  np.testing.assert_allclose(before, plain, rtol=1e-6)
  value, _ = coupled(made, z, {"queue": queue}, step=3)
  assert value > plain + 0.1  # more negatives, and hard ones
  turned = {name: x[::-1] for name, x in z.items()}
  again, _ = coupled(made, turned, {"queue": queue}, step=3, index=INDEX[::-1])
  np.testing.assert_allclose(value, again, rtol=1e-5)
  others, _ = coupled(made, z, {"queue": queue}, step=3, index=INDEX + 1)
  assert abs(others - value) > 1e-4
  np.testing.assert_allclose(made.chance, np.log(20 + 1 + 6), rtol=1e-6)


def test_terms_are_added_by_their_weights_and_told_by_their_names():
  terms = {
    "entropy": dict(name="ssljax.losses.er_entropy", weight=-0.5, concentration=4.0),
    "far": dict(name="ssljax.losses.er_reconstruction", weight=2.0),
    "dimension": dict(name="ssljax.losses.ldreg", neighbours=4, on="pooled"),
  }
  spec = dict(name="ssljax.methods.two_view", loss=dict(name="ssljax.losses.vicreg"), terms=terms)
  head = dict(projector=(D,), projector_norm="none", projector_bias="none", loss_scale=3.0)
  whole = config_lib.complete(tiny.config("simclr") | dict(method=spec | head))["method"]
  assert whole["terms"]["far"]["on"] == "projected" and whole["terms"]["far"]["concentration"] == 10
  made = config_lib.build(whole | {"batch_norm": "global"}, encoder=ENCODER, batch_size=B)
  kernel = np.random.default_rng(4).normal(size=(D, D)).astype(np.float32)
  params = {"projector": {"layer_0": {"kernel": kernel}}, "predictor": {}}
  value, (_, metrics) = coupled(made, params=params)
  x = [Z["student"][:, i] for i in range(2)]
  z = [one @ kernel for one in x]
  wanted = {
    "entropy": np.mean([losses.er_entropy(one, 4.0) for one in z]),
    "far": losses.er_reconstruction(*z).mean(),
    "dimension": np.mean([losses.ldreg(one, neighbours=4).mean() for one in x]),
  }
  for name, one in wanted.items():
    np.testing.assert_allclose(metrics[name], one, rtol=1e-5)
  added = -0.5 * wanted["entropy"] + 2 * wanted["far"] + wanted["dimension"]
  np.testing.assert_allclose(value, 3 * losses.vicreg(*z)[0] + added, rtol=1e-5)
  assert made.chance == 0


ENTROPY = {"name": "ssljax.losses.er_entropy"}


@pytest.mark.parametrize(
  "terms, message",
  [
    ({"e": ENTROPY | {"wieght": 1.0}}, "unknown config key method.terms.e.wieght; did you mean"),
    ({"e": ENTROPY | {"weight": "a"}}, "method.terms.e.weight wants a float like 1.0"),
    ({"e": {"name": "ssljax.losses.er_entrpy"}}, "did you mean ssljax.losses.er_entropy"),
    ({"e": ENTROPY | {"on": "patches"}}, "terms.e.on 'patches' is none of pooled, projected"),
    ({"e": {"name": "ssljax.losses.max_entropy_marginals"}}, "terms.e lacks covariance_weight"),
    ({"std": ENTROPY}, "method.terms.std: a metric has this name already"),
    ({"e": {"name": "ssljax.losses.nnclr", "temperature": 0.1}}, "two arrays .*requires 5"),
    ({"variance": ENTROPY}, "method.terms.variance: the loss has a term of this name"),
  ],
)
def test_mistakes_of_terms_are_named(terms, message):
  config = tiny.config("simclr")
  config["method"] |= dict(loss=dict(name="ssljax.losses.vicreg"), terms=terms)
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.complete(config))


def test_losses_say_what_they_want():
  assert called.asked(functools.partial(losses.w_mse, size=4)) == ("order",)
  assert called.asked(functools.partial(losses.supcon, labels=None, temperature=0.1)) == ()
  assert called.at_once(losses.mmcr) and not called.at_once(losses.vicreg)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"method.whiten_groups": "5"}, "whiten_groups 5 must divide the projector's width, 16"),
    ({"method.target": "stopped"}, 'at once: no method.target "stopped"'),
    ({"method.loss": "{'name': 'ssljax.losses.sigreg'}"}, "two views: missing .*'key'"),
    ({"method.loss.name": "ssljax.losses.info_nce_queue"}, "method.queue is 0"),
    ({"method.predictor": "()"}, "compares predictions: set method.predictor"),
    ({"method.queued": "last"}, "method.queued 'last' is none of all, first"),
  ],
)
def test_mistakes_are_named(settings, message):
  key = next(iter(settings))
  name = {"method.whiten_groups": "vibcreg", "method.predictor": "nnclr"}.get(key, "mmcr")
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.override(tiny.config(name), settings))


def test_a_loss_of_labels_refuses_a_source_without_them():
  config = tiny.config("supcon", data=dict(source={"image": tiny.images(64)["image"]}))
  with pytest.raises(ValueError, match="needs label in the batch.*the source has none"):
    job_lib.assemble(config_lib.complete(config))
