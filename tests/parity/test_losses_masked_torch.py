"""Losses of masked prediction and their targets against torch and transformers, with gradients.

What has no installable reference (HOG, focal frequency, ranks) is compared with a statement in
torch of the published module, written from its description.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch.nn.functional as F  # noqa: E402

from ssljax import losses, targets  # noqa: E402

pytestmark = pytest.mark.parity


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(0, 2, shape).astype(np.float32)


def same(ours, theirs, x, rtol=2e-5):
  """Value and gradient for x of two functions, of a jax array and of a torch tensor."""
  value, gradient = jax.value_and_grad(lambda x: jnp.mean(ours(x)))(jnp.asarray(x))
  tensor = torch.tensor(x, requires_grad=True)
  want = theirs(tensor).mean()
  want.backward()
  np.testing.assert_allclose(value, want.detach().numpy(), rtol=rtol)
  scale = np.abs(tensor.grad.numpy()).max()
  np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=rtol, atol=rtol * scale)


MASK = np.random.default_rng(5).random((4, 6)) < 0.5
MASK[2] = False


def focal_l1(pred, target):
  error = (pred - target).abs()
  return error * (2 * torch.sigmoid(0.2 * error) - 1)


@pytest.mark.parametrize("over", ["example", "batch"])
@pytest.mark.parametrize(
  "ours, theirs",
  [
    (losses.masked_l1, lambda p, t: F.l1_loss(p, t, reduction="none")),
    (losses.masked_l2, lambda p, t: F.mse_loss(p, t, reduction="none")),
    (losses.masked_smooth_l1, lambda p, t: F.smooth_l1_loss(p, t, reduction="none")),
    (
      lambda *a, **k: losses.masked_smooth_l1(*a, beta=2.0, **k),
      lambda p, t: F.smooth_l1_loss(p, t, beta=2.0, reduction="none"),
    ),
    (losses.masked_focal_l1, focal_l1),
  ],
  ids=["l1", "l2", "smooth_l1", "smooth_l1_beta_2", "focal_l1"],
)
def test_regressions(ours, theirs, over):
  target, mask = draw(4, 6, 5, seed=1), torch.tensor(MASK)

  def reference(pred):
    errors = theirs(pred, torch.tensor(target)).mean(-1)
    if over == "batch":
      return errors[mask].mean()
    # The example without hidden places is nan there and 0 here.
    each = [e[m].mean() if m.any() else 0 * e.sum() for e, m in zip(errors, mask)]
    return torch.stack(each)

  same(lambda p: ours(p, target, weights=MASK, over=over), reference, draw(4, 6, 5))


def test_inpainting():
  target, weights = draw(3, 4, 6, 2, seed=1), np.abs(draw(3, 4, 6, 1, seed=2))

  def reference(pred):
    w = torch.tensor(weights)
    errors = F.mse_loss(pred, torch.tensor(target), reduction="none") * w
    return errors.mean(-1).sum((1, 2)) / w.sum((1, 2, 3))

  same(lambda p: losses.inpainting_l2(p, target, weights), reference, draw(3, 4, 6, 2))


@pytest.mark.parametrize("background", [1.0, 0.3])
def test_regions(background):
  regions = draw(4, 3, 6, 5, seed=1) > 0

  def reference(logits):
    truth = torch.tensor(regions, dtype=torch.float32)
    errors = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    errors = errors * torch.where(truth == 0, background, 1.0)
    return errors.mean((1, 3))[torch.tensor(MASK)]

  def ours(x):
    return losses.region_bce(x, regions, MASK, background=background, over="batch")

  same(ours, reference, draw(4, 3, 6, 5))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_focal_frequency(average, alpha):
  target = draw(3, 8, 6, 2, seed=1)

  def reference(pred):
    both = [
      torch.fft.fft2(x.permute(0, 3, 1, 2), norm="ortho") for x in (pred, torch.tensor(target))
    ]
    a, b = (x.mean(0) for x in both) if average else both
    distance = (a - b).abs()
    weight = torch.log(distance.detach() ** alpha + 1)
    return weight / weight.max() * distance**2

  def ours(x):
    return losses.focal_frequency_loss(x, target, average=average, alpha=alpha)

  same(ours, reference, draw(3, 8, 6, 2), rtol=1e-4)


def test_uniformity():
  def reference(z):
    z = F.normalize(z)
    return (z @ z.T) ** 2

  same(losses.second_moment_uniformity, reference, draw(6, 5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_codes(smoothing):
  codes = np.random.default_rng(1).integers(0, 9, (4, 6))

  def reference(logits):
    truth = torch.tensor(np.where(MASK, codes, -100))  # torch leaves out -100
    return F.cross_entropy(logits.flatten(0, 1), truth.flatten(), label_smoothing=smoothing)

  at = jnp.asarray(np.where(MASK, codes, -100))

  def ours(x):
    return losses.codebook_ce(x, at, MASK, smoothing=smoothing, over="batch")

  same(ours, reference, draw(4, 6, 9))


@pytest.fixture(scope="module")
def chameleon():
  from transformers.models.chameleon import modeling_chameleon

  config = transformers.ChameleonVQVAEConfig(num_embeddings=7, embed_dim=5)
  layer = modeling_chameleon.ChameleonVQVAEVectorQuantizer(config)
  layer.embedding.weight.data = torch.tensor(draw(7, 5))
  return layer, layer.embedding.weight.detach().numpy().copy()


def test_quantiser(chameleon):
  layer, codebook = chameleon
  z, out = draw(2, 3, 4, 5, seed=1), draw(2, 12, 5, seed=2)
  tensor = torch.tensor(z.transpose(0, 3, 1, 2), requires_grad=True)
  quantised, loss, codes = layer(tensor)
  flat = z.reshape(2, 12, 5)
  ours, ids, (_, counts) = losses.quantise(
    jnp.asarray(flat), jnp.asarray(codebook), normalise=False
  )
  np.testing.assert_array_equal(ids.reshape(-1), codes.numpy())
  np.testing.assert_array_equal(counts, np.bincount(codes.numpy(), minlength=7))
  want = quantised.detach().numpy().transpose(0, 2, 3, 1).reshape(2, 12, 5)
  np.testing.assert_allclose(ours, want, atol=1e-5)
  # Straight through, and both terms: 0.25 weighs the codebook's there, not the encoder's.
  weights = torch.tensor(out.reshape(2, 3, 4, 5).transpose(0, 3, 1, 2))
  ((quantised * weights).sum() + loss).backward()

  def total(z, book):
    through, ids, _ = losses.quantise(z, book, normalise=False)
    own = losses.vq_commitment(z, through, normalise=False).mean()
    other = losses.vq_commitment(book[ids], z, normalise=False).mean()
    return (through * out).sum() + own + layer.beta * other, own + layer.beta * other

  (dz, dbook), value = jax.grad(total, (0, 1), has_aux=True)(
    jnp.asarray(flat), jnp.asarray(codebook)
  )
  np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-5)
  want = tensor.grad.numpy().transpose(0, 2, 3, 1).reshape(2, 12, 5)
  np.testing.assert_allclose(dz, want, atol=1e-5)
  np.testing.assert_allclose(dbook, layer.embedding.weight.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("over", ["example", "batch"])
def test_ranks(over):
  errors = np.round(draw(4, 6, seed=1))  # rounded: with ties

  def reference(scores):
    t = torch.tensor(errors)
    above, below = t[:, None] > t[:, :, None], t[:, None] < t[:, :, None]
    p = torch.sigmoid(scores[:, None] - scores[:, :, None])
    loss = -torch.log(torch.where(above, p, 1 - p) + 1e-6) * (above | below)
    some = above | below
    return loss.sum() / some.sum() if over == "batch" else loss.sum((1, 2)) / some.sum((1, 2))

  same(lambda s: losses.rank_loss(s, jnp.asarray(errors), over=over), reference, draw(4, 6))


def test_colours():
  bins = F.softmax(torch.tensor(draw(2, 4, 3, 7, seed=1)), -1).numpy()

  def reference(logits):
    return F.cross_entropy(logits.flatten(0, 2), torch.tensor(bins).flatten(0, 2))

  same(lambda x: losses.colorization_ce(x, jnp.asarray(bins)), reference, draw(2, 4, 3, 7))
  rare = np.abs(draw(7, seed=2))

  def rebalanced(logits):
    ce = F.cross_entropy(
      logits.permute(0, 3, 1, 2), torch.tensor(bins).permute(0, 3, 1, 2), reduction="none"
    )
    return ce * torch.tensor(rare)[torch.tensor(bins).argmax(-1)]

  def ours(x):
    return losses.colorization_ce(x, jnp.asarray(bins), jnp.asarray(rare))

  same(ours, rebalanced, draw(2, 4, 3, 7))


def torch_hog(x, bins, cell, window):
  """[b h w c] -> [b c bins h/cell w/cell] with convolution, arctangent and remainder."""
  x = torch.tensor(x).permute(0, 3, 1, 2)
  b, c, h, w = x.shape
  sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
  kernels = torch.stack([sobel, sobel.T])[:, None]
  padded = F.pad(x, (1, 1, 1, 1), mode="reflect").reshape(b * c, 1, h + 2, w + 2)
  gx, gy = F.conv2d(padded, kernels).unbind(1)
  place = torch.floor(torch.atan2(gx, gy) / torch.pi * bins).long().remainder(bins)
  votes = torch.hypot(gx, gy)
  if window:
    line = torch.exp(-0.5 * ((torch.arange(window) - (window - 1) / 2) / (window // 2)) ** 2)
    tile = torch.outer(line, line)
    votes = votes * (tile / tile.sum()).repeat(h // window, w // window)
  votes = F.one_hot(place, bins).permute(0, 3, 1, 2) * votes[:, None]
  cells = F.avg_pool2d(votes, cell) * cell**2
  return F.normalize(cells, dim=1).reshape(b, c, bins, h // cell, w // cell)


@pytest.mark.parametrize("bins, cell, window", [(9, 8, 0), (18, 4, 0), (9, 8, 16)])
def test_hog(bins, cell, window):
  # Whole numbers of 1/64: both sides compute gradients exactly. Otherwise the convolution leaves
  # ±1e-7 where a reflected border has 0, and with an even number of bins, where π/2 is a bound, its
  # sign decides about the bin. Ours is 0 there for any input.
  x = np.round(draw(2, 32, 48, 3) * 64) / 64
  want = torch_hog(x, bins, cell, window)
  got = targets.hog(jnp.asarray(x), bins=bins, cell=cell, window=window)
  np.testing.assert_allclose(got, want.permute(0, 3, 4, 1, 2).numpy(), atol=2e-6)
  side = 16 // cell
  # The published order: unfold patches of cells, channels and bins first.
  tokens = want.unfold(3, side, side).unfold(4, side, side).permute(0, 3, 4, 1, 2, 5, 6)
  got = targets.hog_tokens(jnp.asarray(x), (16, 16), bins=bins, cell=cell, window=window)
  np.testing.assert_allclose(got, tokens.reshape(2, 6, -1).numpy(), atol=2e-6)


def test_spectra():
  def reference(x):
    f = torch.fft.fft2(x, dim=(1, 2), norm="ortho")
    return f.real.abs() + f.imag.abs() * 2

  def both(s):
    return jnp.abs(s[..., 0]) + 2 * jnp.abs(s[..., 1])

  same(lambda x: both(targets.spectrum(x)), reference, draw(2, 6, 5, 3), rtol=1e-4)

  def amplitude(x):
    return torch.fft.fft2(x, dim=(1, 2), norm="ortho").abs()

  same(targets.amplitudes, amplitude, draw(2, 6, 5, 3), rtol=1e-4)
