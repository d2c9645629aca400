"""Towers of CLIP and SigLIP against Transformers' with the same random weights: features, cosines,
losses; ≤ 1e-5 relative in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402
from towers import blocks, linear, norm, stem  # noqa: E402

from ssljax.methods.image_text import image_text  # noqa: E402
from ssljax.models.text import text  # noqa: E402
from ssljax.models.vit import vit  # noqa: E402

pytestmark = pytest.mark.parity
END = 49
TOWER = dict(
  hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
  attn_implementation="eager",
)  # fmt: skip
TEXT = TOWER | dict(vocab_size=50, max_position_embeddings=9, bos_token_id=1, pad_token_id=0)
VISION = TOWER | dict(image_size=32, patch_size=8)
OURS = dict(width=32, depth=2, heads=4, mlp_ratio=2.0)


def ids():
  """Texts of several lengths; the rest of a row after its end is padding."""
  rng = np.random.default_rng(0)
  found = rng.integers(3, END, (5, 9)).astype(np.int32)
  for row, length in zip(found, (2, 4, 8, 6, 3)):
    row[length] = END
    row[length + 1 :] = 0
  return found


def text_tower(state):
  return {
    "embedding": state["text_model.embeddings.token_embedding.weight"],
    "positions": state["text_model.embeddings.position_embedding.weight"],
    "blocks": blocks(state, "text_model.encoder.layers", 2),
    "norm": norm(state, "text_model.final_layer_norm"),
  }


def attention_pool(state, name):
  """Their query, fused projections and MLP."""
  kernels = np.split(state[f"{name}.attention.in_proj_weight"].T, [32], axis=1)
  biases = np.split(state[f"{name}.attention.in_proj_bias"], [32])
  q, kv = ({"kernel": k, "bias": b} for k, b in zip(kernels, biases))
  return {
    "query": state[f"{name}.probe"][0, 0],
    "q": q,
    "kv": kv,
    "proj": linear(state, f"{name}.attention.out_proj"),
    "norm": norm(state, f"{name}.layernorm"),
    "mlp": {fc: linear(state, f"{name}.mlp.{fc}") for fc in ("fc1", "fc2")},
  }


def same_shapes(init, params):
  template = jax.eval_shape(init)
  shapes = lambda tree: jax.tree.map(np.shape, tree)  # noqa: E731
  assert shapes(template) == shapes(params)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(activation):
  """The whole method: both towers, projections, scale, loss."""
  towers = [t | dict(hidden_act=activation) for t in (TEXT, VISION)]
  config = transformers.CLIPConfig(
    text_config=towers[0] | dict(eos_token_id=END), vision_config=towers[1], projection_dim=16,
    attn_implementation="eager",
  )  # fmt: skip
  model = randomise(transformers.CLIPModel(config))
  state = arrays(model)
  place = state["vision_model.embeddings.position_embedding.weight"]
  vision = {
    "stem": stem(state, "vision_model.embeddings.patch_embedding"),
    "cls_token": state["vision_model.embeddings.class_embedding"] + place[0],
    "positions": place[1:],
    "pre_norm": norm(state, "vision_model.pre_layrnorm"),
    "blocks": blocks(state, "vision_model.encoder.layers", 2),
    "norm": norm(state, "vision_model.post_layernorm"),
  }
  params = {
    "encoder": vision,
    "text_encoder": text_tower(state),
    "image_projection": {"layer_0": linear(state, "visual_projection")},
    "text_projection": {"layer_0": linear(state, "text_projection")},
    "log_scale": state["logit_scale"],
  }
  same = dict(eps=1e-5, activation=activation)
  encoder = vit(**OURS, **same, patch=(8, 8), positions="learned", pre_norm=True)
  reader = lambda vocabulary, dtype: text(vocabulary, **OURS, **same, end=END)  # noqa: E731
  method = image_text(encoder, 5, 50, text_encoder=reader, width=16)
  x, torch_x = images((5, 32, 32, 3))
  words = ids()
  batch = {"image": x, "text": words, "index": jnp.arange(5)}
  same_shapes(lambda: method.init(jax.random.key(0), batch)[0], params)
  image = jax.jit(method.encode)(params, {}, batch)["joint"]
  said = jax.jit(method.encode_text)(params, {}, words)
  loss, (_, metrics) = jax.jit(method.loss)(params, {}, batch, jax.random.key(0), 0)
  with torch.no_grad():
    theirs = model(torch.tensor(words).long(), torch_x, return_loss=True)
  unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)  # noqa: E731
  close(unit(image), theirs.image_embeds)
  close(unit(said), theirs.text_embeds)
  close(metrics["scale"] * unit(image) @ unit(said).T, theirs.logits_per_image)
  close(loss, theirs.loss)


def test_siglip():
  """The whole method: both towers, pooling by attention, scale, bias, loss."""
  config = transformers.SiglipConfig(
    text_config=TEXT | dict(eos_token_id=END, projection_size=32), vision_config=VISION,
    attn_implementation="eager",
  )  # fmt: skip
  model = randomise(transformers.SiglipModel(config))
  state = arrays(model)
  vision = {
    "stem": stem(state, "vision_model.embeddings.patch_embedding"),
    "positions": state["vision_model.embeddings.position_embedding.weight"],
    "blocks": blocks(state, "vision_model.encoder.layers", 2),
    "norm": norm(state, "vision_model.post_layernorm"),
    "pool": attention_pool(state, "vision_model.head"),
  }
  params = {
    "encoder": vision,
    "text_encoder": text_tower(state),
    "text_projection": {"layer_0": linear(state, "text_model.head")},
    "log_scale": state["logit_scale"][0],
    "bias": state["logit_bias"][0],
  }
  same = dict(activation="gelu_tanh", eps=1e-6)
  encoder = vit(
    **OURS, **same, patch=(8, 8), positions="learned", class_token=False, pool="attention"
  )
  reader = lambda vocabulary, dtype: text(  # noqa: E731
    vocabulary, **OURS, **same, causal=False, pool="last"
  )
  method = image_text(encoder, 5, 50, text_encoder=reader, loss="siglip", project="text")
  x, torch_x = images((5, 32, 32, 3))
  words = ids()
  batch = {"image": x, "text": words, "index": jnp.arange(5)}
  same_shapes(lambda: method.init(jax.random.key(0), batch)[0], params)
  with torch.no_grad():
    theirs = model(torch.tensor(words).long(), torch_x, return_loss=True)
  out = jax.jit(method.encode)(params, {}, batch)
  close(out["patches"], theirs.vision_model_output.last_hidden_state)
  close(out["joint"], theirs.vision_model_output.pooler_output)
  close(jax.jit(method.encode_text)(params, {}, words), theirs.text_model_output.pooler_output)
  loss, (_, metrics) = jax.jit(method.loss)(params, {}, batch, jax.random.key(0), 0)
  close(loss, theirs.loss)
