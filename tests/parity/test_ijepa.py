"""I-JEPA: the encoder against Transformers' IJepaModel, the predictor against lightly's, and the
whole step, teacher and loss in torch, against the method; copied weights, float32."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
timm_modules = pytest.importorskip("lightly.models.modules.ijepa_timm")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402

from ssljax.data.multiblock import multiblock  # noqa: E402
from ssljax.methods.latent_prediction import latent_prediction  # noqa: E402
from ssljax.models import positions  # noqa: E402
from ssljax.models.vit import vit  # noqa: E402

pytestmark = pytest.mark.parity
DEPTH, WIDTH, NARROW, GRID = 2, 32, 16, 8


def linear(state, name):
  return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def norm(state, name):
  return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def encoder_params(state):
  def block(i):
    at = f"layers.{i}"
    parts = [linear(state, f"{at}.attention.{word}_proj") for word in "qkv"]
    qkv = {k: np.concatenate([p[k] for p in parts], -1) for k in ("kernel", "bias")}
    return {
      "attn": {"qkv": qkv, "proj": linear(state, f"{at}.attention.o_proj")},
      "mlp": {k: linear(state, f"{at}.mlp.{k}") for k in ("fc1", "fc2")},
      "norm1": norm(state, f"{at}.layernorm_before"),
      "norm2": norm(state, f"{at}.layernorm_after"),
    }

  stem = state["embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
  return {
    "stem": {
      "kernel": stem.reshape(-1, WIDTH),
      "bias": state["embeddings.patch_embeddings.projection.bias"],
    },
    "blocks": {f"block_{i}": block(i) for i in range(DEPTH)},
    "norm": norm(state, "layernorm"),
  }


def predictor_params(state):
  def block(i):
    at = f"decoder.blocks.{i}"
    return {
      "attn": {k: linear(state, f"{at}.attn.{k}") for k in ("qkv", "proj")},
      "mlp": {k: linear(state, f"{at}.mlp.{k}") for k in ("fc1", "fc2")},
      "norm1": norm(state, f"{at}.norm1"),
      "norm2": norm(state, f"{at}.norm2"),
    }

  return {
    "embed": linear(state, "predictor_embed"),
    "mask_token": state["decoder.mask_token"].reshape(-1),
    "blocks": {f"block_{i}": block(i) for i in range(DEPTH)},
    "norm": norm(state, "decoder.norm"),
    "head": linear(state, "predictor_proj"),
  }


@pytest.fixture(scope="module")
def pair():
  """Their encoder, teacher and predictor, our method, and parameters, extra and batch for it."""
  config = transformers.IJepaConfig(
    hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=128,
    image_size=4 * GRID, patch_size=4, layer_norm_eps=1e-6, attn_implementation="eager",
  )  # fmt: skip
  models = [randomise(transformers.IJepaModel(config), seed) for seed in (0, 1)]
  predictor = timm_modules.IJEPAPredictorTIMM(GRID**2, DEPTH, WIDTH, NARROW, 4)
  randomise(predictor, 2)
  table = torch.nn.Parameter(torch.tensor(positions.sincos((GRID, GRID), WIDTH)[None]))
  narrow = torch.tensor(positions.sincos((GRID, GRID), NARROW)[None])
  with torch.no_grad():
    predictor.decoder.pos_embed.copy_(narrow)
    for model in models:
      model.embeddings.position_embeddings.copy_(table)
  encoder = vit(
    width=WIDTH, depth=DEPTH, heads=4, patch=(4, 4), class_token=False, pool="mean",
    init_kernels="normal",
  )  # fmt: skip
  method = latent_prediction(
    encoder, predictor_width=NARROW, predictor_depth=DEPTH, teacher_momentum=0.9
  )
  student, teacher = (encoder_params(arrays(model)) for model in models)
  params = {"encoder": student, "predictor": predictor_params(arrays(predictor))}
  x, torch_x = images((3, 4 * GRID, 4 * GRID, 3))
  index = np.arange(3)
  batch = {"image": x, "index": index} | multiblock((GRID, GRID)).batch(0, 0, index)
  template = jax.eval_shape(method.init, jax.random.key(0), batch)[0]
  assert jax.tree.structure(template) == jax.tree.structure(params)
  return (
    models,
    predictor,
    method,
    encoder,
    params,
    {"teacher": {"encoder": teacher}},
    batch,
    torch_x,
  )


def gathered(x, places):
  return torch.gather(
    x, 1, torch.tensor(places, dtype=torch.int64)[..., None].expand(-1, -1, x.shape[-1])
  )


def test_encoder(pair):
  models, _, method, encoder, params, extra, batch, torch_x = pair
  with torch.no_grad():
    theirs = [model(torch_x).last_hidden_state for model in models]
  close(encoder.apply({"params": params["encoder"]}, batch["image"])["tokens"], theirs[0])
  close(method.encode(params, extra, batch)["patches"], theirs[1])  # the teacher


def test_loss_and_teacher(pair):
  models, predictor, method, _, params, extra, batch, torch_x = pair
  context, targets = batch["context"][:, 0], batch["targets"][:, 0]
  with torch.no_grad():
    seen = gathered(models[0].embeddings(torch_x), context)
    for layer in models[0].layers:
      seen = layer(seen)
    seen = models[0].layernorm(seen)
    lists = [torch.tensor(targets[:, m], dtype=torch.int64) for m in range(4)]
    pred = predictor(seen, torch.tensor(context, dtype=torch.int64), lists)
    wanted = models[1](torch_x).last_hidden_state
    wanted = torch.nn.functional.layer_norm(wanted, (WIDTH,))
    wanted = torch.cat([gathered(wanted, targets[:, m]) for m in range(4)])  # theirs: lists first
    theirs = torch.nn.functional.smooth_l1_loss(pred, wanted)
  loss, (_, metrics) = jax.jit(method.loss)(params, extra, batch, jax.random.key(0), 0)
  close(loss, theirs)
  assert set(metrics) == {"std", "rank"}
  moved = method.update(params, extra, {}, 0)["teacher"]["encoder"]
  want = jax.tree.map(
    lambda a, b: 0.9 * a + 0.1 * b, extra["teacher"]["encoder"], params["encoder"]
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), moved, want)
