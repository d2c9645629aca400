"""data2vec 2.0: encoder, teacher's targets, decoder and loss against a statement in torch, whose
post-norm blocks are torch's own TransformerEncoderLayer; copied weights, float32."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from copied import arrays, close, images, randomise

from ssljax.data.multiblock import contexts
from ssljax.methods.latent_prediction import latent_prediction
from ssljax.models import positions
from ssljax.models.predictors import GridPredictor
from ssljax.models.vit import vit

pytestmark = pytest.mark.parity
DEPTH, WIDTH, GRID, CLONES = 3, 32, 6, 2


class Encoder(torch.nn.Module):
  """Patches, fixed positions, one extra token, a norm, post-norm blocks."""

  def __init__(self):
    super().__init__()
    self.stem = torch.nn.Conv2d(3, WIDTH, 4, 4)
    self.token = torch.nn.Parameter(torch.zeros(1, 1, WIDTH))
    self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)
    self.blocks = torch.nn.ModuleList([
      torch.nn.TransformerEncoderLayer(
        WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, layer_norm_eps=1e-6, batch_first=True
      )
      for _ in range(DEPTH)
    ])  # fmt: skip

  def forward(self, x, keep=None):
    """The last block's output, and what each MLP gives before it is added."""
    x = self.stem(x).flatten(2).transpose(1, 2) + positions.sincos((GRID, GRID), WIDTH)
    if keep is not None:
      x = torch.gather(x, 1, keep[..., None].expand(-1, -1, WIDTH))
    x = self.norm(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
    mlps = []
    for block in self.blocks:
      mlps.append(None)
      hook = block.linear2.register_forward_hook(lambda m, i, out: mlps.__setitem__(-1, out))
      x = block(x)
      hook.remove()
    return x, mlps


class Decoder(torch.nn.Module):
  def __init__(self, width):
    super().__init__()
    sizes = [WIDTH, width, width]
    self.convs = torch.nn.ModuleList(
      [torch.nn.Conv2d(a, b, 3, padding=1, groups=4) for a, b in zip(sizes, sizes[1:])]
    )
    self.head = torch.nn.Linear(width, WIDTH)

  def forward(self, x):
    x = x.transpose(1, 2).unflatten(2, (GRID, GRID))
    for conv in self.convs:
      y = conv(x).permute(0, 2, 3, 1)
      y = F.gelu(F.layer_norm(y, y.shape[-1:])).permute(0, 3, 1, 2)
      x = x + y if x.shape == y.shape else y
    return self.head(x.flatten(2).transpose(1, 2))


def linear(state, name):
  return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def encoder_params(state):
  norm = lambda name: {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}  # noqa: E731

  def block(i):
    at = f"blocks.{i}"
    qkv = {
      "kernel": state[f"{at}.self_attn.in_proj_weight"].T,
      "bias": state[f"{at}.self_attn.in_proj_bias"],
    }
    mlp = {"fc1": linear(state, f"{at}.linear1"), "fc2": linear(state, f"{at}.linear2")}
    attn = {"qkv": qkv, "proj": linear(state, f"{at}.self_attn.out_proj")}
    return {"attn": attn, "mlp": mlp, "norm1": norm(f"{at}.norm1"), "norm2": norm(f"{at}.norm2")}

  stem = state["stem.weight"].transpose(2, 3, 1, 0).reshape(-1, WIDTH)
  return {
    "stem": {"kernel": stem, "bias": state["stem.bias"]},
    "cls_token": state["token"].reshape(-1),
    "blocks": {f"block_{i}": block(i) for i in range(DEPTH)},
    "norm": norm("norm"),
  }


def decoder_params(state):
  convs = {
    f"conv_{i}": {
      "kernel": state[f"convs.{i}.weight"].transpose(2, 3, 1, 0),
      "bias": state[f"convs.{i}.bias"],
    }
    for i in range(2)
  }
  return convs | {"head": linear(state, "head")}


def scattered(seen, keep, noise):
  return noise.scatter(1, keep[..., None].expand(-1, -1, noise.shape[-1]), seen)


@pytest.mark.parametrize("width", [WIDTH, 48])
def test_decoder(width):
  model = randomise(Decoder(width))
  head = GridPredictor(width, 2, WIDTH, prefix=1, groups=4)
  rng = np.random.default_rng(3)
  tokens = rng.normal(size=(2, 1 + 9, WIDTH)).astype(np.float32)
  noise = rng.normal(size=(2, GRID**2, WIDTH)).astype(np.float32)
  order = np.stack([rng.permutation(GRID**2) for _ in range(2)])
  keep, targets = np.sort(order[:, :9]), np.sort(order[:, 9:])[:, None]
  params = decoder_params(arrays(model))
  args = tokens, (GRID, GRID), keep, targets, noise
  template = jax.eval_shape(lambda: head.init(jax.random.key(0), *args))["params"]
  assert jax.tree.map(lambda x: x.shape, template) == jax.tree.map(lambda x: x.shape, params)
  with torch.no_grad():
    theirs = model(scattered(*map(torch.tensor, (tokens[:, 1:], keep, noise))))
  theirs = np.take_along_axis(theirs.numpy(), targets[:, 0, :, None], 1)
  close(head.apply({"params": params}, *args)[:, 0], theirs)


def test_step():
  student, teacher = (randomise(Encoder(), seed) for seed in (0, 1))
  decoder = randomise(Decoder(WIDTH), 2)
  encoder = vit(width=WIDTH, depth=DEPTH, heads=4, patch=(4, 4), norm="post", scan=True)
  scale = WIDTH**0.5
  method = latent_prediction(
    encoder, predictor="convolution", predictor_width=WIDTH, predictor_depth=2, predictor_groups=4,
    noise=0.0, target_layers=2, loss="l2", loss_scale=scale, class_weight=0.3,
  )  # fmt: skip
  x, torch_x = images((2, 4 * GRID, 4 * GRID, 3))
  index = np.arange(2)
  batch = {"image": x, "index": index} | contexts((GRID, GRID), clones=CLONES).batch(0, 0, index)
  params = {
    "encoder": encoder_params(arrays(student)), "predictor": decoder_params(arrays(decoder))
  }  # fmt: skip
  template = jax.eval_shape(method.init, jax.random.key(0), batch)[0]
  assert jax.tree.structure(template) == jax.tree.structure(params)
  extra = {"teacher": {"encoder": encoder_params(arrays(teacher))}}
  loss, _ = jax.jit(method.loss)(params, extra, batch, jax.random.key(0), 0)

  with torch.no_grad():
    out, mlps = teacher(torch_x)
    layers = [F.instance_norm(y[:, 1:].transpose(1, 2)).transpose(1, 2) for y in mlps[-2:]]
    wanted = F.layer_norm(torch.stack(layers).mean(0), (WIDTH,))
    parts = []
    for clone in range(CLONES):
      keep = torch.tensor(batch["context"][:, clone], dtype=torch.int64)
      seen, _ = student(torch_x, keep)
      pred = decoder(scattered(seen[:, 1:], keep, torch.zeros(2, GRID**2, WIDTH)))
      hidden = torch.ones(2, GRID**2).scatter(1, keep, 0.0).bool()
      first = F.mse_loss(seen[:, 0], wanted.mean(1))
      parts.append(F.mse_loss(pred[hidden], wanted[hidden]) + 0.3 * first)
    theirs = scale * torch.stack(parts).mean()
  close(loss, theirs)
  close(encoder.apply({"params": extra["teacher"]["encoder"]}, x)["tokens"], out)
