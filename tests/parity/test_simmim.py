"""SimMIM. Transformers' ViTForMaskedImageModeling agrees with it in the place of the mask token
(after the patch embedding, before positions), the linear head and the loss: these are compared with
it. It has absolute positions and no relative bias, layer scale or unbiased keys: with those, as in
the published ViT-B, the loss is compared with a NumPy statement of the paper's."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402

from ssljax import interop  # noqa: E402
from ssljax.methods.masked import masked  # noqa: E402
from ssljax.models.vit import vit  # noqa: E402

pytestmark = pytest.mark.parity
SIMMIM = dict(layout="replace", head="linear", target="pixels", loss="l1")


def units(b, n, seed=3):
  """Hidden units of 2·2 patches, as many in each example, on a 4·4 grid."""
  rng = np.random.default_rng(seed)
  rows = np.stack([rng.permutation(4) < n for _ in range(b)]).reshape(b, 2, 2)
  return rows.repeat(2, 1).repeat(2, 2).reshape(b, 16)


def paper_loss(x, reconstruction, hidden):
  """Σ|x-x̂|·M / (ΣM + 1e-5) / 3 with M [b h w] the hidden pixels: sums over the whole batch."""
  m = hidden.reshape(-1, 4, 4).repeat(8, 1).repeat(8, 2)[..., None]
  return (np.abs(x - reconstruction) * m).sum() / (m.sum() + 1e-5) / 3


@pytest.fixture(scope="module")
def pair():
  config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=8, encoder_stride=8, layer_norm_eps=1e-6,
    attn_implementation="eager",
  )  # fmt: skip
  model = randomise(transformers.ViTForMaskedImageModeling(config))
  encoder = vit(width=32, depth=2, heads=4, patch=(8, 8), positions="learned")
  method = masked(encoder, 8, **SIMMIM)
  x, torch_x = images((3, 32, 32, 3))
  state = arrays(model)
  params, report = interop.to_params(state, encoder, x.shape[1:])
  assert not report.missing
  assert set(report.unused) == {"mask_token", "decoder.0.weight", "decoder.0.bias"}
  # PixelShuffle takes (channel, row, column), our patches are (row, column, channel).
  kernel = state["decoder.0.weight"].reshape(3, 8, 8, 32).transpose(3, 1, 2, 0).reshape(32, -1)
  bias = state["decoder.0.bias"].reshape(3, 8, 8).transpose(1, 2, 0).reshape(-1)
  params = {
    "encoder": params,
    "mask_token": state["vit.embeddings.mask_token"].reshape(-1),
    "head": {"head": {"kernel": kernel, "bias": bias}},
  }
  return model, method, params, x, torch_x


def test_reconstruction_and_loss(pair):
  model, method, params, x, torch_x = pair
  hidden = units(3, 2)
  batch = {"image": x, "hidden": hidden, "index": np.arange(3)}
  with torch.no_grad():
    out = model(torch_x, bool_masked_pos=torch.tensor(hidden))
  loss, _ = jax.jit(method.loss)(params, {}, batch, jax.random.key(0), 0)
  close(loss, out.loss)
  ours = np.asarray(jax.jit(method.reconstruct)(params, {}, batch, jax.random.key(0), 0))
  theirs = out.reconstruction.numpy().transpose(0, 2, 3, 1)
  m = hidden.reshape(-1, 4, 4).repeat(8, 1).repeat(8, 2)
  close(ours[m], theirs[m])
  np.testing.assert_array_equal(ours[~m], x[~m])
  np.testing.assert_allclose(loss, paper_loss(x, theirs, hidden), rtol=1e-5)


def test_gradients(pair):
  model, method, params, x, torch_x = pair
  hidden = units(3, 2)
  batch = {"image": x, "hidden": hidden, "index": np.arange(3)}
  model.zero_grad()
  model(torch_x, bool_masked_pos=torch.tensor(hidden)).loss.backward()
  loss = lambda p: method.loss(p, {}, batch, jax.random.key(0), 0)[0]  # noqa: E731
  ours = jax.jit(jax.grad(loss))(params)
  theirs = {k: v.grad.numpy() for k, v in model.named_parameters() if v.grad is not None}
  close(ours["mask_token"], theirs["vit.embeddings.mask_token"].reshape(-1))
  table = theirs["vit.embeddings.position_embeddings"][0]
  close(ours["encoder"]["positions"], table[1:])
  close(ours["encoder"]["cls_token"], table[0])  # their token and its position have one gradient
  first = ours["encoder"]["blocks"]["block_0"]["attn"]["qkv"]["kernel"]
  want = [theirs[f"vit.layers.0.attention.{letter}_proj.weight"] for letter in "qkv"]
  close(first.T, np.concatenate(want))
  stem = theirs["vit.embeddings.patch_embeddings.projection.weight"]
  close(ours["encoder"]["stem"]["kernel"], stem.transpose(2, 3, 1, 0).reshape(-1, 32))


def test_loss_of_the_published_encoder_against_numpy():
  encoder = vit(
    width=32, depth=2, heads=4, patch=(8, 8), positions="relative", layer_scale=0.1, qkv_bias="qv",
  )  # fmt: skip
  method = masked(encoder, 8, **SIMMIM)
  x, _ = images((3, 32, 32, 3))
  hidden = units(3, 2)
  batch = {"image": x, "hidden": hidden, "index": np.arange(3)}
  params, _ = jax.jit(method.init)(jax.random.key(0), {"image": x})
  loss, _ = jax.jit(method.loss)(params, {}, batch, jax.random.key(0), 0)
  reconstruction = jax.jit(method.reconstruct)(params, {}, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(loss, paper_loss(x, np.asarray(reconstruction), hidden), rtol=1e-5)
