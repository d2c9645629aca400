"""Weights of ResNets in and out, without torch: round trips, grafts with statistics, misfits."""

import json
import types

import jax
import numpy as np
import pytest

from ssljax import export, interop
from ssljax.interop import convert
from ssljax.leaves import named
from ssljax.load import Run
from ssljax.methods.two_view import two_view
from ssljax.models.resnet import resnet

SHAPE = (16, 24, 3)
ONES = (1, 1, 1, 1)
TINY = dict(variant="18", stem="cifar", width=8, blocks=(1, 1))


def build(**arguments):
  """An encoder and random variables."""
  encoder = resnet(**(TINY | arguments))
  x = jax.ShapeDtypeStruct((2, *SHAPE), np.float32)
  return encoder, numbers(jax.eval_shape(encoder.init, jax.random.key(0), x))


def numbers(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: np.float32(rng.uniform(0.1, 0.3, s.shape)), shapes)


@pytest.mark.parametrize("arguments", [{}, dict(variant="50", stem="imagenet")])
def test_round_trip_is_exact(arguments, tmp_path):
  encoder, variables = build(**arguments)
  path = tmp_path / "x.safetensors"
  tensors = interop.resnet.from_variables(variables)
  interop.write_weights(path, tensors, {})
  got, report = interop.to_params(interop.read_weights(path), encoder, SHAPE)
  assert report == interop.Report((), (), ())
  jax.tree.map(np.testing.assert_array_equal, got, variables)
  kernel = variables["params"]["stage_1_block_0"]["down_conv"]["kernel"]
  assert tensors["layer2.0.downsample.0.weight"][5, 2, 0, 0] == kernel[0, 0, 2, 5]
  first = tensors["layer1.0.conv2.weight"]
  assert first[3, 1, 0, 2] == variables["params"]["stage_0_block_0"]["conv2"]["kernel"][0, 2, 1, 3]


def test_names():
  encoder, variables = build(blocks=(2, 1))
  names = set(interop.resnet.from_variables(variables))
  norm = {"weight", "bias", "running_mean", "running_var"}
  assert {n for n in names if n.startswith("layer2.0.")} == (
    {f"layer2.0.{c}.weight" for c in ("conv1", "conv2", "downsample.0")}
    | {f"layer2.0.{b}.{k}" for b in ("bn1", "bn2", "downsample.1") for k in norm}
  )
  assert {n for n in names if "layer" not in n} == {"conv1.weight"} | {f"bn1.{k}" for k in norm}
  assert "layer1.1.conv1.weight" in names


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_prefixes_classifier_and_counters(prefix):
  encoder, variables = build()
  tensors = {prefix + k: v for k, v in interop.resnet.from_variables(variables).items()}
  tensors |= {f"{prefix}fc.weight": np.zeros((10, 16)), f"{prefix}bn1.num_batches_tracked": 3}
  got, report = interop.to_params(tensors, encoder, SHAPE)
  assert report.unused == (f"{prefix}fc.weight",)
  jax.tree.map(np.testing.assert_array_equal, got, variables)


@pytest.mark.parametrize(
  "change, arguments, message",
  [
    (lambda t: None, dict(blocks=(1, 2)), "the weights lack layer2.1"),
    (lambda t: None, dict(blocks=(1,)), "nothing like layer2.0"),
    (lambda t: None, dict(stem="imagenet"), r"conv1.weight is \[8, 3, 3, 3\] in the file"),
    (lambda t: t.pop("bn1.running_var"), {}, "lack bn1.running_var"),
    (lambda t: t.pop("layer1.0.conv1.weight"), {}, "no weights of a ResNet"),
    (
      lambda t: t.update({f"k.{k}": v for k, v in t.items()}),
      {},
      "holds several ResNets, '', 'k.', keep one",
    ),
  ],
)
def test_misfits_are_one_line(change, arguments, message):
  tensors = interop.resnet.from_variables(build()[1])
  change(tensors)
  with pytest.raises(ValueError, match=message) as error:
    interop.to_params(tensors, resnet(**(TINY | arguments)), SHAPE)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "arguments, to, message",
  [
    (dict(width=64, blocks=ONES), "transformers", "exported to timm, not to transformers"),
    (dict(width=64), "timm", "four stages, this encoder has 2"),
    (dict(blocks=ONES), "timm", "stem of 64 features, this encoder's has 8"),
  ],
)
def test_what_cannot_be_exported_is_refused(arguments, to, message):
  with pytest.raises(ValueError, match=message):
    convert.check_exportable(resnet(**(TINY | arguments)), to)


def test_graft_brings_parameters_and_statistics(tmp_path):
  """Into student and teacher; a method's empty parts and its heads stay."""
  encoder, variables = build()
  path = tmp_path / "x.safetensors"
  interop.write_weights(path, interop.resnet.from_variables(variables), {})
  method = two_view(
    encoder, 8, loss=lambda a, b: ((a - b) ** 2).mean(), projector=(4,), target="teacher"
  )
  batch = {"views": jax.ShapeDtypeStruct((2, 2, *SHAPE), np.float32)}
  shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
  params, extra = numbers(shapes, seed=1)
  job = types.SimpleNamespace(
    encoder=encoder, image=jax.ShapeDtypeStruct(SHAPE, np.uint8), method=method
  )
  said = []
  got, more = interop.graft(str(path), job, params, extra, log=said.append)
  assert jax.tree.structure((got, more)) == jax.tree.structure((params, extra))
  equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
  equal(got["encoder"], variables["params"])
  equal(more["teacher"]["encoder"], variables["params"])
  equal(more["stats"]["encoder"], variables["batch_stats"])
  equal(more["teacher_stats"]["encoder"], variables["batch_stats"])
  equal(got["projector"], params["projector"])
  equal(more["stats"]["projector"], extra["stats"]["projector"])
  assert any("left at their start: predictor, projector" in line for line in said)


def run_of(encoder, variables):
  config = {"method": {"name": "ssljax.methods.two_view"}}
  stats = {"stats": {"encoder": variables["batch_stats"]}}
  mean, std = (0.5,) * 3, (0.25,) * 3
  params = {"encoder": variables["params"]}
  return Run(config, 7, encoder, None, params, stats, SHAPE, "uint8", mean, std, None)


def test_export(monkeypatch, tmp_path):
  encoder, variables = build(width=64, blocks=ONES)
  monkeypatch.setattr(export, "load", lambda workdir, step: run_of(encoder, variables))
  monkeypatch.setattr(export, "_against_timm", lambda path, run: "")  # see tests/parity
  said = []
  out = export.export(tmp_path, "timm", log=said.append)
  assert any("every tensor used, outputs equal to the last bit" in line for line in said)
  assert any("model.maxpool = torch.nn.Identity()" in line for line in said)
  assert any("R.ResNet(R.BasicBlock, layers=[1, 1, 1, 1], in_chans=3" in line for line in said)
  about = interop.read_metadata(out)
  assert json.loads(about["stem"]) == "cifar" and json.loads(about["grid"]) == [2, 3]
  assert "patch" not in about and json.loads(about["timm_arguments"])["num_classes"] == 0
  got, _ = interop.to_params(interop.read_weights(out), encoder, SHAPE)
  assert set(named(got)) == set(named(variables))
