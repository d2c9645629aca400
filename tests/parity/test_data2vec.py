"""data2vec for images: the encoder against Transformers' Data2VecVisionModel (hidden states, shared
relative bias, layer scale, keys without bias), the target and the loss against NumPy statements."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402

from ssljax.methods.masked import masked  # noqa: E402
from ssljax.models import positions  # noqa: E402
from ssljax.models.vit import vit  # noqa: E402

pytestmark = pytest.mark.parity
DEPTH, WIDTH, GRID = 3, 32, 4


def from_theirs(state):
  """Their state dict as our encoder's parameters."""
  linear = lambda name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}  # noqa: E731
  norm = lambda name: {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}  # noqa: E731

  def block(i):
    at = f"encoder.layer.{i}"
    attention = f"{at}.attention.attention"
    qkv = [state[f"{attention}.{word}.weight"].T for word in ("query", "key", "value")]
    attn = {
      "qkv": {"kernel": np.concatenate(qkv, 1)},
      "q_bias": state[f"{attention}.query.bias"],
      "v_bias": state[f"{attention}.value.bias"],
      "proj": linear(f"{at}.attention.output.dense"),
    }
    mlp = {"fc1": linear(f"{at}.intermediate.dense"), "fc2": linear(f"{at}.output.dense")}
    norms = {"norm1": norm(f"{at}.layernorm_before"), "norm2": norm(f"{at}.layernorm_after")}
    scales = {"scale1": state[f"{at}.lambda_1"], "scale2": state[f"{at}.lambda_2"]}
    return norms | scales | {"attn": attn, "mlp": mlp}

  stem = state["embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
  return {
    "stem": {
      "kernel": stem.reshape(-1, WIDTH),
      "bias": state["embeddings.patch_embeddings.projection.bias"],
    },
    "cls_token": state["embeddings.cls_token"].reshape(-1),
    "relative_bias": state["encoder.relative_position_bias.relative_position_bias_table"],
    "blocks": {f"block_{i}": block(i) for i in range(DEPTH)},
    "norm": norm("layernorm"),
  }


@pytest.fixture(scope="module")
def pair():
  config = transformers.Data2VecVisionConfig(
    hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=128,
    image_size=8 * GRID, patch_size=8, layer_norm_eps=1e-6, layer_scale_init_value=0.1,
    use_shared_relative_position_bias=True, use_absolute_position_embeddings=False,
    use_mask_token=True, use_mean_pooling=False, attn_implementation="eager",
  )  # fmt: skip
  model = randomise(transformers.Data2VecVisionModel(config))
  encoder = vit(
    width=WIDTH, depth=DEPTH, heads=4, patch=(8, 8), positions="relative", layer_scale=0.1,
    qkv_bias="qv", pool="mean",
  )  # fmt: skip
  state = arrays(model)
  params = from_theirs(state)
  x, torch_x = images((2, 8 * GRID, 8 * GRID, 3))
  template = jax.eval_shape(encoder.init, jax.random.key(0), x)["params"]
  assert jax.tree.structure(template) == jax.tree.structure(params)
  hidden = np.stack([np.random.default_rng(i).permutation(GRID**2) < 10 for i in range(2)])
  return model, encoder, params, state["embeddings.mask_token"].reshape(-1), x, torch_x, hidden


def test_hidden_states(pair):
  model, encoder, params, _, x, torch_x, _ = pair
  with torch.no_grad():
    theirs = model(torch_x, output_hidden_states=True)
  ours = encoder.apply({"params": params}, x, layers=tuple(range(DEPTH)))
  for i in range(DEPTH):
    close(ours[f"layer_{i}"], theirs.hidden_states[i + 1])
  close(ours["tokens"], theirs.last_hidden_state)


def test_mask_tokens(pair):
  model, encoder, params, mask_token, x, torch_x, hidden = pair
  with torch.no_grad():
    theirs = model(torch_x, bool_masked_pos=torch.tensor(hidden)).last_hidden_state
  ours = encoder.apply({"params": params}, x, hidden=hidden, mask_token=mask_token)["tokens"]
  close(ours, theirs)


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_relative_index(pair, grid):
  bias = pair[0].encoder.relative_position_bias
  theirs = bias.generate_relative_position_index(grid).numpy()
  np.testing.assert_array_equal(positions.relative_index(grid, 1), theirs)


def normalised(x):
  """Layer norm without parameters, epsilon 1e-5."""
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_target_loss_and_teacher(pair):
  """Their hidden states, the rest in NumPy, against the whole method with a teacher of its own."""
  model, encoder, params, mask_token, x, torch_x, hidden = pair
  method = masked(
    encoder, 10, layout="replace", head="linear", target="teacher", loss="smooth_l1", loss_beta=2.0,
    teacher_layers=2, teacher_momentum=0.9,
  )  # fmt: skip
  rng = np.random.default_rng(5)
  head = {"kernel": rng.normal(0, 0.3, (WIDTH, WIDTH)), "bias": rng.normal(0, 0.3, WIDTH)}
  head = jax.tree.map(np.float32, head)
  student = {"encoder": params, "mask_token": mask_token, "head": {"head": head}}
  teacher = jax.tree.map(lambda a: a * np.float32(0.9), params)
  batch = {"image": x, "hidden": hidden, "index": np.arange(2)}
  extra = {"teacher": {"encoder": teacher}}
  loss, (_, metrics) = jax.jit(method.loss)(student, extra, batch, jax.random.key(0), 0)

  with torch.no_grad():
    z = model(torch_x, bool_masked_pos=torch.tensor(hidden)).last_hidden_state.numpy()[:, 1:]
    own = {k: v.clone() for k, v in model.state_dict().items()}
    for tensor in model.parameters():
      tensor.mul_(0.9)
    states = model(torch_x, output_hidden_states=True).hidden_states[-2:]
    model.load_state_dict(own)
  target = normalised(np.mean([normalised(s.numpy()[:, 1:]) for s in states], axis=0))[hidden]
  error = np.abs(z[hidden] @ head["kernel"] + head["bias"] - target)
  want = np.where(error < 2, 0.25 * error**2, error - 1).mean()
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(metrics["target_std"], target.std(0).mean(), rtol=1e-5)

  moved = method.update(student, extra, {}, 0)["teacher"]["encoder"]
  want = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, teacher, params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), moved, want)
