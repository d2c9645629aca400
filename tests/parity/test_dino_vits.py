"""The ViTs of DINOv2 (layer scale, registers, learned positions) and DINOv3 (rotary positions, no
bias of keys) against Transformers' with the same random weights; ≤ 1e-5 relative in float32."""

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
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
OURS = dict(width=32, depth=2, heads=4, patch=(8, 8), layer_scale=0.1)


def check(encoder, params, x, model, **given):
  template = jax.eval_shape(encoder.init, jax.random.key(0), x)["params"]
  shapes = lambda tree: jax.tree.map(np.shape, tree)  # noqa: E731
  assert shapes(template) == shapes(params)
  asked = dict(layers=(0,), attention_layers=(0, 1)) | given.pop("ours", {})
  out = encoder.apply({"params": params}, x, **asked)
  given |= dict(output_hidden_states=True, output_attentions=True)
  with torch.no_grad():
    theirs = model(torch.tensor(x.transpose(0, 3, 1, 2)), **given)
  close(out["tokens"], theirs.last_hidden_state)
  close(out["cls"], theirs.pooler_output)
  close(out["layer_0"], theirs.hidden_states[1])
  for i, weights in enumerate(theirs.attentions):
    close(out[f"attention_{i}"], weights[:, :, 0])


@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2(registers):
  kind = "Dinov2WithRegisters" if registers else "Dinov2"
  extra = {"num_register_tokens": registers} if registers else {}
  config = getattr(transformers, f"{kind}Config")(**TINY, attn_implementation="eager", **extra)
  model = randomise(getattr(transformers, f"{kind}Model")(config))
  state = arrays(model)
  place = state["embeddings.position_embeddings"][0]
  params = {
    "stem": stem(state, "embeddings.patch_embeddings.projection"),
    "cls_token": state["embeddings.cls_token"][0, 0] + place[0],
    "positions": place[1:],
    "blocks": blocks(state, "encoder.layer", 2),
    "norm": norm(state, "layernorm"),
  }
  if registers:  # without positions
    params["registers"] = state["embeddings.register_tokens"][0]
  encoder = vit(**OURS, positions="learned", registers=registers)
  check(encoder, params, images((2, 32, 32, 3))[0], model)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("shape", [(32, 32, 3), (16, 56, 3)])
def test_dinov3(registers, shape):
  config = transformers.DINOv3ViTConfig(
    **TINY, intermediate_size=128, num_register_tokens=registers, attn_implementation="eager"
  )
  model = randomise(transformers.DINOv3ViTModel(config))
  state = arrays(model)
  params = {
    "stem": stem(state, "embeddings.patch_embeddings"),
    "cls_token": state["embeddings.cls_token"][0, 0],
    "blocks": blocks(state, "model.layer", 2),
    "norm": norm(state, "norm"),
  }
  if registers:
    params["registers"] = state["embeddings.register_tokens"][0]
  encoder = vit(**OURS, positions="rotary", registers=registers, qkv_bias="qv", eps=1e-5)
  x = images((2, *shape))[0]
  check(encoder, params, x, model)
  hidden = np.random.default_rng(3).random((2, np.prod(encoder.grid(shape)))) < 0.4
  mask_token = state["embeddings.mask_token"].reshape(-1)
  given = dict(ours=dict(hidden=hidden, mask_token=mask_token))
  check(encoder, params, x, model, bool_masked_pos=torch.tensor(hidden), **given)


def test_dinov3_sees_a_part_of_the_grid():
  """Their layers on the visible tokens, with the angles of those."""
  config = transformers.DINOv3ViTConfig(**TINY, intermediate_size=128, attn_implementation="eager")
  model = randomise(transformers.DINOv3ViTModel(config))
  state = arrays(model)
  x, torch_x = images((1, 32, 32, 3))
  keep = np.sort(np.random.default_rng(0).permutation(16)[:6])[None].astype(np.int32)
  params = {
    "stem": stem(state, "embeddings.patch_embeddings"),
    "cls_token": state["embeddings.cls_token"][0, 0],
    "blocks": blocks(state, "model.layer", 2),
    "norm": norm(state, "norm"),
  }
  encoder = vit(**OURS, positions="rotary", qkv_bias="qv", eps=1e-5)
  got = encoder.apply({"params": params}, x, keep=keep)
  rows = np.concatenate([[0], 1 + keep[0]])
  with torch.no_grad():
    h = model.embeddings(torch_x)[:, rows]
    turn = [t[keep[0]] for t in model.rope_embeddings(torch_x)]
    for layer in model.model.layer:
      h = layer(h, position_embeddings=turn)
      h = h[0] if isinstance(h, tuple) else h
    close(got["tokens"], model.norm(h))
