"""ConvNeXt against Transformers' ConvNextModel and timm's ConvNeXt with the same weights: outputs,
maps, gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402

from ssljax.leaves import named, nested  # noqa: E402
from ssljax.models.convnext import convnext  # noqa: E402

pytestmark = pytest.mark.parity
WIDTHS, BLOCKS = (8, 16, 24, 32), (1, 2, 1, 1)
NAMES = {
  "transformers": (
    (r"^stem/", "embeddings.patch_embeddings/"),
    (r"^stem_norm/", "embeddings.layernorm/"),
    (r"^down_norm_(\d)", r"encoder.stages.\1.downsampling_layer.0"),
    (r"^down_(\d)", r"encoder.stages.\1.downsampling_layer.1"),
    (r"^stage_(\d)_block_(\d)/scale$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (r"^stage_(\d)_block_(\d)", r"encoder.stages.\1.layers.\2"),
    (r"/conv/", "/dwconv/"),
    (r"/norm/", "/layernorm/"),
    (r"/mlp/fc", "/pwconv"),
    (r"^norm/", "layernorm/"),
  ),
  "timm": (
    (r"^stem/", "stem.0/"),
    (r"^stem_norm/", "stem.1/"),
    (r"^down_norm_(\d)", r"stages.\1.downsample.0"),
    (r"^down_(\d)", r"stages.\1.downsample.1"),
    (r"^stage_(\d)_block_(\d)/scale$", r"stages.\1.blocks.\2.gamma"),
    (r"^stage_(\d)_block_(\d)", r"stages.\1.blocks.\2"),
    (r"/conv/", "/conv_dw/"),
    (r"^norm/", "head.norm/"),
  ),
}


def their_name(path, library):
  for pattern, new in NAMES[library]:
    path = re.sub(pattern, new, path)
  return re.sub(r"/(kernel|scale)$", "/weight", path).replace("/", ".")


def theirs_of(library):
  if library == "timm":
    module = pytest.importorskip("timm").models.convnext
    model = module.ConvNeXt(depths=BLOCKS, dims=WIDTHS, num_classes=0, ls_init_value=1.0)
    return randomise(model)
  config = transformers.ConvNextConfig(
    hidden_sizes=list(WIDTHS), depths=list(BLOCKS), layer_scale_init_value=1.0, layer_norm_eps=1e-6
  )
  return randomise(transformers.ConvNextModel(config))


@pytest.mark.parametrize("library", NAMES)
def test_same_numbers_and_gradients(library):
  model = theirs_of(library)
  encoder = convnext(blocks=BLOCKS, widths=WIDTHS)
  x, torch_x = images((2, 77, 96, 3))  # 77 is 2 places of 32 and a rest
  state = arrays(model)
  template = named(jax.eval_shape(encoder.init, jax.random.key(0), x)["params"])
  layout = lambda leaf: leaf.transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.T  # noqa: E731
  found = {path: layout(state.pop(their_name(path, library))) for path in template}
  assert not state and {k: v.shape for k, v in found.items()} == {
    k: v.shape for k, v in template.items()
  }
  weight = np.random.default_rng(2).normal(size=(2, WIDTHS[-1])).astype(np.float32)

  def loss(params):
    out = encoder.apply({"params": params}, x, layers=range(4))
    return jnp.sum(out["pooled"] * weight), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(nested(found))
  if library == "timm":
    maps = model.forward_intermediates(torch_x, intermediates_only=True)
    pooled = model(torch_x)
  else:
    theirs = model(torch_x, output_hidden_states=True)
    maps, pooled = theirs.hidden_states[-4:], theirs.pooler_output
  close(out["pooled"], pooled)
  for stage, one in enumerate(maps):
    close(out[f"layer_{stage}"], one.flatten(2).transpose(1, 2))
  (pooled * torch.tensor(weight)).sum().backward()
  gradients = {k: p.grad.numpy() for k, p in model.named_parameters()}
  for path, leaf in named(grads).items():
    close(leaf, layout(gradients.pop(their_name(path, library))), 2e-5)
  assert not gradients
