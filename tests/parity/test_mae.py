"""ViT and the whole MAE against Transformers' ViTMAEForPreTraining: the same weights, tables,
tokens and noise; pictures that are square and that are not; ≤ 1e-5 relative in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402

from ssljax import interop, targets  # noqa: E402
from ssljax.interop import convert  # noqa: E402
from ssljax.interop.timm import from_timm  # noqa: E402
from ssljax.leaves import named  # noqa: E402
from ssljax.methods.masked import masked  # noqa: E402
from ssljax.models import positions, tokens  # noqa: E402
from ssljax.models.vit import vit  # noqa: E402

pytestmark = pytest.mark.parity
# Their constructor wants a square number of patches even where the picture is none: 2·8 here.
SIZES = {"square": (32, 32), "wide": (16, 64)}


def sincos_table(grid, width):
  """The fixed table with a zero row for the class token, for the torch model."""
  table = np.concatenate([np.zeros((1, width), np.float32), positions.sincos(grid, width)])
  return torch.nn.Parameter(torch.tensor(table[None]), requires_grad=False)


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def pair(request):
  """A torch MAE, our method, the same parameters, images, noise and the mask that it means."""
  h, w = request.param
  config = transformers.ViTMAEConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=(h, w), patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2, decoder_intermediate_size=64, layer_norm_eps=1e-6,
    norm_pix_loss=True, mask_ratio=0.75, attn_implementation="eager",
  )  # fmt: skip
  model = randomise(transformers.ViTMAEForPreTraining(config))
  grid = (h // 8, w // 8)
  patchify = model.patchify  # refuses pictures that are not square, unless told
  model.patchify = lambda x, interpolate_pos_encoding=True: patchify(x, True)
  model.vit.embeddings.position_embeddings = sincos_table(grid, 32)
  model.decoder.decoder_pos_embed = sincos_table(grid, 16)
  encoder = vit(width=32, depth=2, heads=4, patch=(8, 8))
  n = grid[0] * grid[1]
  count = n - int(n * (1 - 0.75))
  method = masked(encoder, count, decoder_width=16, decoder_depth=2, decoder_heads=2)
  x, torch_x = images((3, h, w, 3))
  state = arrays(model)
  template = jax.eval_shape(method.init, jax.random.key(0), {"image": x})[0]
  params, report = interop.to_params(state, encoder, x.shape[1:], grid)
  decoder, used = interop.to_decoder(state, template["decoder"])
  assert not report.missing and set(report.unused) <= set(used)
  params = {"encoder": params, "decoder": decoder}
  assert jax.tree.structure(params) == jax.tree.structure(template)
  noise = np.random.default_rng(2).random((3, n))
  # Theirs keeps the places of least noise.
  hidden = noise.argsort(1).argsort(1) >= n - count
  batch = {"image": x, "hidden": hidden, "index": np.arange(3)}
  noise = torch.tensor(noise, dtype=torch.float32)
  return model, method, encoder, params, batch, torch_x, noise


def test_sincos_table_is_theirs():
  config = transformers.ViTMAEConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    image_size=48, patch_size=8, decoder_hidden_size=24, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=48,
  )  # fmt: skip
  decoder = transformers.ViTMAEForPreTraining(config).decoder
  table = decoder.decoder_pos_embed
  table._is_hf_initialized = False  # a fresh model's table is zero: theirs is filled in by hand
  decoder.initialize_weights(36)
  assert not table[0, 0].any()
  close(positions.sincos((6, 6), 24), table[0, 1:], 1e-6)


def test_encoder_on_visible_places(pair):
  model, _, encoder, params, batch, torch_x, noise = pair
  hidden = jnp.asarray(batch["hidden"])
  keep, _ = tokens.split_hidden(hidden, int(hidden[0].sum()))
  ours = encoder.apply({"params": params["encoder"]}, batch["image"], keep=keep)["tokens"]
  with torch.no_grad():
    out = model.vit(torch_x, noise=noise)
  np.testing.assert_array_equal(out.mask.numpy().astype(bool), batch["hidden"])
  # Their tokens lie in the order of the noise, ours in that of the places.
  order = np.argsort(noise.numpy(), axis=1)[:, : keep.shape[1]]
  np.testing.assert_array_equal(np.sort(order, 1), keep)
  place = np.argsort(order, axis=1)
  theirs = out.last_hidden_state.numpy()
  close(ours[:, 0], theirs[:, 0])
  close(ours[:, 1:], np.take_along_axis(theirs[:, 1:], place[..., None], 1))


def test_loss(pair):
  model, method, _, params, batch, torch_x, noise = pair
  loss, _ = jax.jit(method.loss)(params, {}, batch, jax.random.key(0), 0)
  with torch.no_grad():
    close(loss, model(torch_x, noise=noise).loss)


def test_prediction_at_hidden_places(pair):
  """`reconstruct` undoes the normalisation; the same is done to their prediction."""
  model, method, encoder, params, batch, torch_x, noise = pair
  ours = jax.jit(method.reconstruct)(params, {}, batch, jax.random.key(0), 0)
  with torch.no_grad():
    logits = model(torch_x, noise=noise).logits.numpy()
  patches = tokens.patchify(jnp.asarray(batch["image"]), encoder.patch)
  theirs = targets.unnormalise(jnp.asarray(logits), patches)
  ours = tokens.patchify(ours, encoder.patch)
  close(ours[batch["hidden"]], np.asarray(theirs)[batch["hidden"]])
  np.testing.assert_array_equal(ours[~batch["hidden"]], patches[~batch["hidden"]])


def test_gradients(pair):
  model, method, encoder, params, batch, torch_x, noise = pair
  model.zero_grad()
  model(torch_x, noise=noise).loss.backward()
  theirs = {k: v.grad.numpy() for k, v in model.named_parameters() if v.grad is not None}
  theirs = convert.canonical(theirs)
  loss = lambda p: method.loss(p, {}, batch, jax.random.key(0), 0)[0]  # noqa: E731
  ours = jax.jit(jax.grad(loss))(params)
  largest = max(np.abs(g).max() for g in theirs.values())
  names = {"encoder": interop.timm.timm_name, "decoder": interop.timm.decoder_name}
  for part, name_of in names.items():
    for path, grad in named(ours[part]).items():
      want = from_timm(path, theirs.pop(name_of(path)))
      # Relative to the parameter's largest gradient, or to a thousandth of the model's: gradients
      # of keys' biases are zero but for rounding.
      error = np.abs(grad - want).max() / max(np.abs(want).max(), largest * 1e-3)
      assert error <= 1e-5, f"{part}/{path}: {error:.2e}"
  assert not theirs


def test_raw_pixels(pair):
  model, method, encoder, params, batch, torch_x, noise = pair
  count = int(batch["hidden"][0].sum())
  decoder = dict(decoder_width=16, decoder_depth=2, decoder_heads=2)
  raw = masked(encoder, count, target="pixels", **decoder)
  loss, _ = jax.jit(raw.loss)(params, {}, batch, jax.random.key(0), 0)
  model.config.norm_pix_loss = False
  try:
    with torch.no_grad():
      close(loss, model(torch_x, noise=noise).loss)
  finally:
    model.config.norm_pix_loss = True
