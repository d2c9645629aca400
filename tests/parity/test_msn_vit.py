"""MSN's ViT against Transformers' with the same random weights; ≤ 1e-5 relative in float32."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402
from towers import blocks, norm, stem  # noqa: E402

from ssljax.models.vit import vit  # noqa: E402

pytestmark = pytest.mark.parity
RENAMED = {"layernorm_before": "norm1", "layernorm_after": "norm2"}


@pytest.fixture(scope="module")
def pair():
  """Their model of 32×32 pixels, our encoder and its parameters."""
  config = transformers.ViTMSNConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=8, attn_implementation="eager",
  )  # fmt: skip
  model = randomise(transformers.ViTMSNModel(config))
  state = arrays(model)
  for old, new in RENAMED.items():
    state = {name.replace(old, new): leaf for name, leaf in state.items()}
  places = state["embeddings.position_embeddings"][0]
  params = {
    "stem": stem(state, "embeddings.patch_embeddings.projection"),
    "cls_token": state["embeddings.cls_token"][0, 0] + places[0],  # ours has no place
    "positions": places[1:],
    "blocks": blocks(state, "layers", 2),
    "norm": norm(state, "layernorm"),
  }
  sizes = dict(width=32, depth=2, heads=4, patch=(8, 8))
  encoder = vit(**sizes, positions="learned", positions_size=(32, 32))
  return model, encoder, params


@pytest.mark.parametrize("side", [32, 16])
def test_vit_msn(pair, side):
  """Views of another size read interpolated positions: focal views have 6×6 of 14×14 places."""
  model, encoder, params = pair
  x, theirs = images((2, side, side, 3))
  template = jax.eval_shape(encoder.init, jax.random.key(0), images((2, 32, 32, 3))[0])["params"]
  assert jax.tree.map(np.shape, template) == jax.tree.map(np.shape, params)
  with torch.no_grad():
    wanted = model(theirs, interpolate_pos_encoding=side != 32).last_hidden_state
  out = encoder.apply({"params": params}, x)
  close(out["tokens"], wanted)
  close(out["pooled"], wanted[:, 0])


def test_vit_msn_without_the_dropped_patches(pair):
  model, encoder, params = pair
  x, theirs = images((1, 32, 32, 3))
  keep = np.sort(np.random.default_rng(0).permutation(16)[:13])[None].astype(np.int32)
  with torch.no_grad():
    h = model.embeddings(theirs)[:, np.concatenate([[0], 1 + keep[0]])]
    for layer in model.layers:
      h = layer(h)
      h = h[0] if isinstance(h, tuple) else h
    wanted = model.layernorm(h)
  close(encoder.apply({"params": params}, x, keep=keep)["tokens"], wanted)
