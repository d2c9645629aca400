"""Exported files in timm and Transformers give our features, and theirs give the same in ours."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from copied import arrays, close, images, randomise  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from ssljax import config as config_lib  # noqa: E402
from ssljax import export, interop  # noqa: E402
from ssljax.interop import timm as timm_names  # noqa: E402
from ssljax.load import Run  # noqa: E402
from ssljax.models.vit import vit  # noqa: E402

pytestmark = pytest.mark.parity
TINY = dict(width=32, depth=2, heads=4, patch=(8, 8))
VARIANTS = {
  "mae": {},
  "mean of patches": dict(pool="mean", positions="learned"),
  "registers": dict(registers=3, layer_scale=0.3, positions="learned"),
  "no class token": dict(class_token=False, pool="mean", qkv_bias="none"),
  "no key bias": dict(qkv_bias="qv", layer_scale=0.3),
}
SHAPE = (16, 40, 3)


def finished(monkeypatch, **arguments):
  """`export.load` answers with a run of this encoder with random parameters."""
  encoder = vit(**(TINY | arguments))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, *SHAPE)))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: np.float32(rng.normal(0, 0.2, s.shape)), shapes)
  config = {"method": {"name": "ssljax.methods.masked"}}
  mean, std = (0.5,) * 3, (0.25,) * 3
  run = Run(config, 7, encoder, None, {"encoder": params}, {}, SHAPE, "uint8", mean, std, None)
  monkeypatch.setattr(export, "load", lambda workdir, step: run)
  return encoder, params


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_loads_our_file(variant, monkeypatch, tmp_path):
  encoder, params = finished(monkeypatch, **VARIANTS[variant])
  said = []
  out = export.export(tmp_path, "timm", log=said.append)
  assert out == tmp_path / "exports" / "timm" / "model.safetensors"
  assert any("timm's VisionTransformer agrees" in line for line in said)
  arguments = json.loads(interop.read_metadata(out)["timm_arguments"])
  model = VisionTransformer(**arguments).eval()
  model.load_state_dict(load_file(out), strict=True)
  x, torch_x = images((2, *SHAPE))
  want = encoder.apply({"params": params}, x)
  with torch.no_grad():
    close(want["tokens"], model.forward_features(torch_x))
    close(want["pooled"], model(torch_x))


@pytest.mark.parametrize("variant", ["mae", "mean of patches", "no key bias"])
def test_transformers_loads_our_folder(variant, monkeypatch, tmp_path):
  encoder, params = finished(monkeypatch, **VARIANTS[variant])
  said = []
  out = export.export(tmp_path, "transformers", log=said.append)
  assert any("Transformers' ViTModel agrees" in line for line in said)
  model = transformers.ViTModel.from_pretrained(out.parent, add_pooling_layer=False).eval()
  x, torch_x = images((2, *SHAPE))
  with torch.no_grad():
    close(encoder.apply({"params": params}, x)["tokens"], model(torch_x).last_hidden_state)
  processor = json.loads((out.parent / "preprocessor_config.json").read_text())
  assert processor["image_mean"] == [0.5] * 3 and processor["size"] == {"height": 16, "width": 40}


def test_a_file_that_differs_in_timm_is_refused(monkeypatch, tmp_path):
  finished(monkeypatch)
  monkeypatch.setattr(timm_names, "arguments", lambda *given: arguments(*given) | {"num_heads": 2})
  with pytest.raises(ValueError, match="not exported: in timm, tokens"):
    export.export(tmp_path, "timm", log=lambda line: None)
  assert not list(tmp_path.rglob("*.safetensors"))


arguments = timm_names.arguments


def test_reading_timm(tmp_path):
  """Square and not the encoder's grid: the positions are resized as timm itself does it."""
  model = randomise(VisionTransformer(
    img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5, reg_tokens=2,
    init_values=0.1, dynamic_img_size=True,
  ))  # fmt: skip
  save_file(model.state_dict(), tmp_path / "x.safetensors")
  encoder = vit(**TINY, registers=2, layer_scale=0.1, positions="learned")
  params, report = interop.to_params(
    interop.read_weights(tmp_path / "x.safetensors"), encoder, (32, 32, 3)
  )
  assert not report.missing and set(report.unused) == {"head.weight", "head.bias"}
  x, torch_x = images((2, 32, 32, 3))
  with torch.no_grad():
    close(encoder.apply({"params": params}, x)["tokens"], model.forward_features(torch_x))


@pytest.mark.parametrize("names", ["saved", "in memory"])
def test_reading_transformers_at_another_size(names, tmp_path):
  config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=8, layer_norm_eps=1e-6, attn_implementation="eager",
  )  # fmt: skip
  model = randomise(transformers.ViTModel(config))
  model.save_pretrained(tmp_path)
  tensors = interop.read_weights(tmp_path) if names == "saved" else arrays(model)
  encoder = vit(**TINY, positions="learned")
  params, report = interop.to_params(tensors, encoder, (24, 48, 3))
  assert not report.missing and set(report.unused) == {"pooler.dense.weight", "pooler.dense.bias"}
  x, torch_x = images((2, 24, 48, 3))
  with torch.no_grad():
    theirs = model(torch_x, interpolate_pos_encoding=True).last_hidden_state
  close(encoder.apply({"params": params}, x)["tokens"], theirs)


@pytest.mark.parametrize("kind", ["saved by Transformers", "pth", "pth of a training run"])
def test_reading_a_whole_mae(kind, tmp_path):
  config = transformers.ViTMAEConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=64,
  )  # fmt: skip
  model = randomise(transformers.ViTMAEForPreTraining(config))
  path = tmp_path
  if kind == "saved by Transformers":
    model.save_pretrained(path)
  else:
    path = tmp_path / "mae.pth"
    tensors = {k: torch.tensor(v) for k, v in interop.convert.canonical(arrays(model)).items()}
    torch.save({"model": tensors, "epoch": 3} if "run" in kind else tensors, path)
  tensors = interop.read_weights(path)
  encoder = vit(**TINY, positions="learned")
  params, report = interop.to_params(tensors, encoder, (32, 32, 3))
  method = config_lib.build(
    dict(
      name="ssljax.methods.masked", decoder_width=16, decoder_depth=1, decoder_heads=2
    ), encoder=encoder, hidden_count=12,
  )  # fmt: skip
  x, torch_x = images((2, 32, 32, 3))
  template = jax.eval_shape(method.init, jax.random.key(0), {"image": x})[0]
  decoder, used = interop.to_decoder(tensors, template["decoder"])
  assert jax.tree.structure(decoder) == jax.tree.structure(template["decoder"])
  assert not report.missing and set(report.unused) <= set(used)
  state = arrays(model)
  weight = state["decoder.decoder_layers.0.attention.k_proj.weight"]
  kernel = decoder["blocks"]["block_0"]["attn"]["qkv"]["kernel"]
  np.testing.assert_array_equal(kernel[:, 16:32], weight.T)


def test_torch_files_with_more_than_tensors_are_not_read(tmp_path):
  class Mischief:
    def __reduce__(self):
      return (print, ("executed",))

  torch.save({"model": Mischief()}, tmp_path / "x.pth")
  with pytest.raises(ValueError, match="more than tensors"):
    interop.read_weights(tmp_path / "x.pth")
  (tmp_path / "y.pth").write_bytes(b"nothing")
  with pytest.raises(ValueError, match="y.pth"):
    interop.read_weights(tmp_path / "y.pth")
