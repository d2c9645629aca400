"""ResNets against torchvision's and timm's with the same weights: evaluation, training, running
statistics and gradients; then batch norm alone, whose numbers no depth amplifies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from copied import arrays, close, images  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from ssljax import export  # noqa: E402
from ssljax.interop import resnet as interop  # noqa: E402
from ssljax.leaves import named  # noqa: E402
from ssljax.load import Run  # noqa: E402
from ssljax.models.norms import BatchNorm  # noqa: E402
from ssljax.models.resnet import resnet  # noqa: E402

pytestmark = pytest.mark.parity
ONES = (1, 1, 1, 1)


def randomised(model, seed=0):
  """Every number random; convolutions keep the size of their outputs."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, nn.Conv2d):
        w = module.weight
        w.copy_(torch.tensor(rng.normal(0, (1 / w[0].numel()) ** 0.5, tuple(w.shape))))
      elif isinstance(module, nn.BatchNorm2d):
        d = module.num_features
        module.weight.copy_(torch.tensor(rng.uniform(0.5, 1.5, d)))
        module.bias.copy_(torch.tensor(rng.normal(0, 0.3, d)))
        module.running_mean.copy_(torch.tensor(rng.normal(0, 0.3, d)))
        module.running_var.copy_(torch.tensor(rng.uniform(0.5, 2, d)))
  return model.eval()


def theirs_of(library, variant, stem, blocks=()):
  """Their model with random weights, without its classifier."""
  bottleneck = variant in ("50", "101")
  counts = list(blocks or resnet(variant=variant).blocks)
  if library == "timm":
    module = pytest.importorskip("timm").models.resnet
    block = module.Bottleneck if bottleneck else module.BasicBlock
    model = module.ResNet(block, counts, num_classes=0)
  else:
    module = torchvision.models.resnet
    model = module.ResNet(module.Bottleneck if bottleneck else module.BasicBlock, counts)
    model.fc = nn.Identity()
  if stem != "imagenet":  # as for CIFAR in lightly and solo-learn
    padding = 2 if stem == "cifar_pad2" else 1
    model.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    model.maxpool = model.maxpool if stem == "cifar_pool" else nn.Identity()
  return randomised(model)


def read(model, encoder, shape):
  variables, unused = interop.to_variables(arrays(model), encoder, shape)
  assert not unused
  template = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, *shape)))
  assert jax.tree.structure(variables) == jax.tree.structure(template)
  return variables


CASES = {
  "resnet18 of torchvision": ("torchvision", "18", "imagenet", ()),
  "resnet50 of torchvision": ("torchvision", "50", "imagenet", ()),
  "resnet34 of timm": ("timm", "34", "imagenet", ()),
  "bottlenecks of timm": ("timm", "50", "imagenet", ONES),
  "cifar_pool": ("torchvision", "18", "cifar_pool", ONES),
  "cifar_pad2": ("torchvision", "18", "cifar_pad2", ONES),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluation(case):
  library, variant, stem, blocks = CASES[case]
  model = theirs_of(library, variant, stem, blocks)
  encoder = resnet(variant=variant, stem=stem, blocks=blocks)
  x, torch_x = images((2, 45, 64, 3))  # an odd side: paddings show
  variables = read(model, encoder, x.shape[1:])
  out = encoder.apply(variables, x)
  with torch.no_grad():
    close(out["pooled"], model(torch_x))


def test_maps_of_stages():
  model = theirs_of("timm", "50", "imagenet", ONES)
  encoder = resnet(variant="50", blocks=ONES)
  x, torch_x = images((2, 64, 45, 3))
  out = encoder.apply(read(model, encoder, x.shape[1:]), x, layers=range(4))
  with torch.no_grad():
    y = model.maxpool(model.act1(model.bn1(model.conv1(torch_x))))
    for i in range(4):
      y = getattr(model, f"layer{i + 1}")(y)
      close(out[f"layer_{i}"], y.flatten(2).transpose(1, 2))
  close(out["patches"], y.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("variant", ["18", "50"])
def test_training_mode_statistics_and_gradients(variant):
  """One block a stage: every block of batch norm over few values doubles a rounding error."""
  model = theirs_of("torchvision", variant, "cifar", ONES)
  encoder = resnet(variant=variant, stem="cifar", blocks=ONES)
  x, torch_x = images((8, 24, 20, 3))
  variables = read(model, encoder, x.shape[1:])
  weight = np.random.default_rng(2).normal(size=(8, encoder.width)).astype(np.float32)

  def loss(params):
    given = variables | {"params": params}
    out, new = encoder.apply(given, x, train=True, mutable=["batch_stats"])
    return jnp.sum(out["pooled"] * weight), (out["pooled"], new)

  grads, (pooled, new) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  model.train()
  theirs = model(torch_x)
  close(pooled, theirs)
  (theirs * torch.tensor(weight)).sum().backward()
  state = arrays(model)
  for path, leaf in named(new).items():
    close(leaf, state[interop.torch_name(path)])
  gradients = {k: p.grad.numpy() for k, p in model.named_parameters()}
  for path, leaf in named(grads).items():
    leaf = np.asarray(leaf)
    ours = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
    close(ours, gradients.pop(interop.torch_name(path)), 2e-5)
  assert not gradients


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_over_steps(affine):
  rng = np.random.default_rng(0)
  theirs = nn.BatchNorm1d(5, affine=affine)
  ours = BatchNorm(use_scale=affine, use_bias=affine)
  variables = ours.init(jax.random.key(0), jnp.zeros((2, 5)))
  apply = jax.jit(functools.partial(ours.apply, train=True, mutable=["batch_stats"]))
  for _ in range(20):
    x = rng.normal(3, 2, (6, 5)).astype(np.float32)
    y, new = apply(variables, x)
    variables = variables | new
    close(y, theirs(torch.tensor(x)), 3e-6)
  stats = variables["batch_stats"]
  close(stats["mean"], theirs.running_mean, 1e-6)
  close(stats["var"], theirs.running_var, 1e-6)


def test_initialisers_are_theirs():
  """Deviations of kernels, and which scales start at zero."""
  module = torchvision.models.resnet
  theirs = module.ResNet(module.BasicBlock, ONES, zero_init_residual=True)
  encoder = resnet(variant="18", blocks=ONES)
  variables = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  state = arrays(theirs)
  for path, leaf in named(variables).items():
    other = state[interop.torch_name(path)]
    if path.endswith("kernel"):
      np.testing.assert_allclose(leaf.std(), other.std(), rtol=0.05)
    else:
      np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("case", ["cifar_pad2", "bottlenecks of timm"])
def test_timm_loads_our_file(case, monkeypatch, tmp_path):
  _, variant, stem, blocks = CASES[case]
  model = theirs_of("timm", variant, stem, blocks)
  encoder = resnet(variant=variant, stem=stem, blocks=blocks)
  shape = (45, 64, 3)
  variables = read(model, encoder, shape)
  extra = {"stats": {"encoder": variables["batch_stats"]}}
  config = {"method": {"name": "ssljax.methods.two_view"}}
  about = (shape, "uint8", (0.5,) * 3, (0.25,) * 3, None)
  run = Run(config, 7, encoder, None, {"encoder": variables["params"]}, extra, *about)
  monkeypatch.setattr(export, "load", lambda workdir, step: run)
  said = []
  out = export.export(tmp_path, "timm", log=said.append)
  assert any("timm's ResNet agrees" in line for line in said)
  tensors = load_file(out)
  state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
  assert set(tensors) == set(state)
  assert all(torch.equal(tensors[k], v) for k, v in state.items())
  # What is printed makes the same model.
  lines = [line.removeprefix("load:").strip() for line in said[-4:] if "model" in line]
  names = {"timm": pytest.importorskip("timm"), "torch": torch, "safetensors": safetensors}
  exec("\n".join(line for line in lines if not line.startswith("wrote")), names)
  x, torch_x = images((2, *shape))
  with torch.no_grad():
    close(names["model"].eval()(torch_x), model(torch_x), 1e-6)
