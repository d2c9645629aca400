"""Weights in and out, without torch: round trips, layouts, resizing, and what misfits are told."""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import export, interop, load, train
from ssljax import job as job_lib
from ssljax.interop import convert
from ssljax.leaves import named
from ssljax.methods.masked import masked
from ssljax.models import positions
from ssljax.models.vit import vit

SHAPE = (8, 12, 3)
TINY = dict(width=32, depth=2, heads=4, patch=(4, 4))
VARIANTS = {
  "mae": {},
  "learned": dict(positions="learned"),
  "registers": dict(registers=3, positions="learned"),
  "mean": dict(class_token=False, pool="mean"),
  "registers alone": dict(class_token=False, registers=2, pool="mean"),
  "layer scale": dict(layer_scale=0.3),
  "no key bias": dict(qkv_bias="qv"),
  "no bias": dict(qkv_bias="none"),
  "no positions": dict(positions="none"),
}


def build(shape=SHAPE, **arguments):
  """An encoder and random parameters, in NumPy: nothing is zero or one."""
  encoder = vit(**(TINY | arguments))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
  rng = np.random.default_rng(0)
  return encoder, jax.tree.map(lambda s: np.float32(rng.normal(0, 0.3, s.shape)), shapes)


@functools.partial(jax.jit, static_argnums=0)
def tokens(encoder, params, x):
  return encoder.apply({"params": params}, x)["tokens"]


def image(shape=SHAPE):
  return np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)


def through(encoder, params, to, path, **changes):
  """Written to a file, read by another encoder."""
  tensors = interop.from_params(params, encoder, SHAPE, to)
  interop.write_weights(path, tensors, {"grid": json.dumps(encoder.grid(SHAPE))})
  grid = json.loads(interop.read_metadata(path)["grid"])
  return interop.to_params(interop.read_weights(path), encoder.clone(**changes), SHAPE, grid)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_timm_is_exact(variant, tmp_path):
  encoder, params = build(**VARIANTS[variant])
  got, report = through(encoder, params, "timm", tmp_path / "x.safetensors")
  assert report == interop.Report((), (), ())
  jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize("variant", ["mae", "learned", "no key bias", "no bias", "no positions"])
def test_round_trip_through_transformers_is_exact(variant, tmp_path):
  encoder, params = build(**VARIANTS[variant])
  got, report = through(encoder, params, "transformers", tmp_path / "x.safetensors")
  assert report == interop.Report((), (), ())
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_layer_scale_is_multiplied_into_the_matrices_for_transformers(tmp_path):
  encoder, params = build(layer_scale=0.3)
  path = tmp_path / "x.safetensors"
  got, report = through(encoder, params, "transformers", path, layer_scale=0.0)
  assert not report.missing and not report.unused
  x = image()
  plain = encoder.clone(layer_scale=0.0)
  np.testing.assert_allclose(tokens(plain, got, x), tokens(encoder, params, x), atol=2e-5)


def test_a_key_bias_has_no_effect_and_is_left_out(tmp_path):
  encoder, params = build()
  got, _ = through(encoder, params, "timm", tmp_path / "x.safetensors", qkv_bias="qv")
  x = image()
  without = tokens(encoder.clone(qkv_bias="qv"), got, x)
  np.testing.assert_allclose(without, tokens(encoder, params, x), atol=1e-5)


def test_layout_of_the_stem_and_of_linear_layers():
  encoder, params = build()
  out = interop.from_params(params, encoder, SHAPE, "timm")
  kernel = params["stem"]["kernel"].reshape(4, 4, 3, 32)
  assert out["patch_embed.proj.weight"][5, 2, 1, 3] == kernel[1, 3, 2, 5]  # [d c row column]
  qkv = params["blocks"]["block_1"]["attn"]["qkv"]["kernel"]
  np.testing.assert_array_equal(out["blocks.1.attn.qkv.weight"], qkv.T)
  np.testing.assert_array_equal(out["pos_embed"][0, 1:], positions.sincos((2, 3), 32))
  assert out["pos_embed"].shape == (1, 7, 32) and not out["pos_embed"][0, 0].any()
  assert out["cls_token"].shape == (1, 1, 32)


def test_names_of_transformers():
  encoder, params = build()
  out = interop.from_params(params, encoder, SHAPE, "transformers")
  block = "encoder.layer.0."
  names = {name.removeprefix(block) for name in out if name.startswith(block)}
  words = ("attention.query", "attention.key", "attention.value", "output.dense")
  modules = {f"attention.{word}" for word in words}
  modules |= {"intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"}
  assert names == {f"{m}.{leaf}" for m in modules for leaf in ("weight", "bias")}
  assert {name for name in out if "layer." not in name} == {
    "embeddings.cls_token", "embeddings.position_embeddings", "layernorm.weight", "layernorm.bias",
    "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.projection.bias",
  }  # fmt: skip
  key = params["blocks"]["block_0"]["attn"]["qkv"]["kernel"][:, 32:64]
  np.testing.assert_array_equal(out[f"{block}attention.attention.key.weight"], key.T)


def test_position_of_the_class_token_is_merged():
  encoder, params = build(positions="learned", registers=2)
  out = interop.from_params(params, encoder, SHAPE, "timm")
  row = np.float32(np.random.default_rng(3).normal(size=(3, 32)))
  out["pos_embed"] = out["pos_embed"] + np.pad(row, ((0, 6), (0, 0)))
  got, _ = interop.to_params(out, encoder, SHAPE, (2, 3))
  np.testing.assert_allclose(got["cls_token"], params["cls_token"] + row[0], rtol=1e-6)
  np.testing.assert_allclose(got["registers"], params["registers"] + row[1:], rtol=1e-6)
  # A table with a row for the class token alone, or with rows for the grid alone.
  for rows in (1, 0):
    out["pos_embed"] = np.concatenate([row[:rows], params["positions"]])[None]
    got, _ = interop.to_params(out, encoder, SHAPE)
    np.testing.assert_array_equal(got["positions"], params["positions"])
    np.testing.assert_array_equal(got["registers"], params["registers"])


def test_positions_are_resized():
  small, params = build((8, 8, 3), positions="learned")
  tensors = interop.from_params(params, small, (8, 8, 3), "timm")
  got, report = interop.to_params(tensors, small, (16, 12, 3))
  want = positions.resize_table(params["positions"], (2, 2), (4, 3))
  np.testing.assert_array_equal(got["positions"], want)
  assert not report.missing and not report.unused


def mae_file(encoder, params, decoder):
  """Tensors as in the release of MAE."""
  out = interop.from_params(params, encoder, SHAPE, "timm")
  for path, leaf in named(decoder).items():
    name = interop.timm.decoder_name(path)
    out[name] = interop.timm.to_timm(path, leaf, (4, 4))
  return out | {"decoder_pos_embed": np.zeros((1, 7, 16), np.float32)}


def mae(encoder):
  method = masked(encoder, 4, decoder_width=16, decoder_depth=1, decoder_heads=2)
  shapes = jax.eval_shape(method.init, jax.random.key(0), {"image": np.zeros((1, *SHAPE))})[0]
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape)), shapes)


def test_names_of_the_mae_release():
  encoder, params = build()
  full = mae(encoder)
  tensors = mae_file(encoder, params, full["decoder"])
  assert {k for k in tensors if "decoder" in k and "blocks" not in k} == {
    "decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight", "decoder_norm.bias",
    "decoder_pred.weight", "decoder_pred.bias", "decoder_pos_embed",
  }  # fmt: skip
  assert "decoder_blocks.0.attn.qkv.weight" in tensors
  assert tensors["mask_token"].shape == (1, 1, 16)
  decoder, used = interop.to_decoder(tensors, full["decoder"])
  jax.tree.map(np.testing.assert_array_equal, decoder, full["decoder"])
  got, report = interop.to_params(tensors, encoder, SHAPE, (2, 3))
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert set(report.unused) <= set(used)


def job_of(encoder, shape=SHAPE):
  return types.SimpleNamespace(encoder=encoder, image=jax.ShapeDtypeStruct(shape, np.uint8))


def test_graft_of_a_whole_mae_and_of_an_encoder(tmp_path):
  encoder, params = build()
  start = mae(encoder)
  other = jax.tree.map(lambda leaf: leaf + 1, start)
  tensors = mae_file(encoder, params, start["decoder"])
  said = []
  path = tmp_path / "mae.safetensors"
  interop.write_weights(path, tensors | {"head.weight": np.zeros((10, 32), np.float32)}, {})
  got, extra = interop.graft(str(path), job_of(encoder), other, {}, log=said.append)
  jax.tree.map(np.testing.assert_array_equal, got, start | {"encoder": params})
  assert extra == {} and "head.weight" in said[-1] and "not used" in said[-1]
  # Without a decoder in the file, ours stays and is named; a teacher begins from the same encoder.
  bare = {k: v for k, v in tensors.items() if "decoder" not in k and k != "mask_token"}
  interop.write_weights(path, bare, {})
  said.clear()
  extra = {"teacher": {"encoder": other["encoder"]}}
  got, extra = interop.graft(str(path), job_of(encoder), other, extra, log=said.append)
  jax.tree.map(np.testing.assert_array_equal, got["decoder"], other["decoder"])
  jax.tree.map(np.testing.assert_array_equal, extra["teacher"]["encoder"], params)
  assert any("left at their start: decoder" in line for line in said)


def test_graft_of_a_smaller_decoder_leaves_ours_and_says_so(tmp_path):
  encoder, params = build()
  start = mae(encoder)
  tensors = mae_file(encoder, params, start["decoder"])
  tensors["decoder_embed.weight"] = np.zeros((8, 32), np.float32)
  path = tmp_path / "mae.safetensors"
  interop.write_weights(path, tensors, {})
  said = []
  got, _ = interop.graft(str(path), job_of(encoder), start, {}, log=said.append)
  jax.tree.map(np.testing.assert_array_equal, got["encoder"], params)
  jax.tree.map(np.testing.assert_array_equal, got["decoder"], start["decoder"])
  assert any("decoder is not taken: decoder_embed.weight is [8 32]" in line for line in said)


def test_a_deeper_decoder_is_not_cut(tmp_path):
  encoder, params = build()
  start = mae(encoder)
  tensors = mae_file(encoder, params, start["decoder"])
  block = {k: v for k, v in tensors.items() if k.startswith("decoder_blocks.0.")}
  tensors |= {k.replace(".0.", ".1.", 1): v for k, v in block.items()}
  with pytest.raises(ValueError, match="also has decoder_blocks.1.*decoder_depth differs"):
    interop.to_decoder(tensors, start["decoder"])


def wrong(change, **arguments):
  """Reads a sound file after `change(tensors)` into an encoder with other arguments."""
  encoder, params = build()
  tensors = interop.from_params(params, encoder, SHAPE, "timm")
  change(tensors)
  return interop.to_params(tensors, vit(**(TINY | arguments)), SHAPE, (2, 3))


@pytest.mark.parametrize(
  "change, arguments, message",
  [
    (lambda t: None, dict(depth=3), "has 2 blocks, encoder.depth is 3"),
    (lambda t: None, dict(width=64), r"is \[32\] in the file, the encoder wants \[64\]"),
    (lambda t: None, dict(patch=(2, 2)), r"the encoder wants \[32 3 2 2\]"),
    (lambda t: t.pop("norm.weight"), {}, "lack norm.weight"),
    (lambda t: t.update({"blocks.0.attn.q_norm.weight": t["norm.bias"]}), {}, "q_norm.weight"),
    (lambda t: t.update({"blocks.0.ls1.gamma": t["norm.bias"]}), {}, "set encoder.layer_scale"),
    (lambda t: t.update(pos_embed=t["pos_embed"] + 1), {}, 'set encoder.positions="learned"'),
    (lambda t: None, dict(positions="none"), 'set encoder.positions="learned"'),
    (lambda t: t.pop("patch_embed.proj.weight"), {}, "no weights of a ViT"),
  ],
)  # fmt: skip
def test_misfits_are_one_line(change, arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    wrong(change, **arguments)
  assert "\n" not in str(error.value)


def test_positions_without_a_square_grid_are_refused():
  encoder, params = build(positions="learned")
  tensors = interop.from_params(params, encoder, SHAPE, "timm")
  with pytest.raises(ValueError, match="7 rows, which are no square grid"):
    interop.to_params(tensors, encoder, (16, 16, 3))


def test_missing_tokens_and_layer_scale_are_named():
  encoder, params = build()
  tensors = interop.from_params(params, encoder, SHAPE, "timm")
  other = vit(**TINY, registers=2, layer_scale=0.1)
  got, report = interop.to_params(tensors, other, SHAPE, (2, 3))
  assert report.missing == ("registers",) and "registers" not in got
  assert "layer scale" in report.notes[0]
  assert (got["blocks"]["block_0"]["scale1"] == 1).all()


@pytest.mark.parametrize(
  "arguments, to, message",
  [
    (dict(positions="relative"), "timm", "no relative-position bias"),
    (dict(positions="relative"), "transformers", "no relative-position bias"),
    (dict(norm="post"), "timm", "norms after the branches"),
    (dict(registers=2), "transformers", "no register tokens"),
    (dict(class_token=False, pool="mean"), "transformers", "always has a class token"),
    (dict(patch=(2, 4, 4)), "timm", "takes images"),
    ({}, "onnx", "there are timm, transformers"),
  ],
)
def test_what_cannot_be_exported_is_refused(arguments, to, message):
  with pytest.raises(ValueError, match=message):
    convert.check_exportable(vit(**(TINY | arguments)), to)


def test_a_file_that_says_another_number_of_heads_is_refused(tmp_path):
  encoder, params = build()
  tensors = interop.from_params(params, encoder, SHAPE, "transformers")
  interop.write_weights(tmp_path / "model.safetensors", tensors, {"format": "pt"})
  about = interop.transformers.config(encoder, SHAPE[:2], 3)
  (tmp_path / "config.json").write_text(json.dumps(about))
  start = {"encoder": params}
  job = job_of(encoder.clone(eps=1e-5))
  said = []
  interop.graft(str(tmp_path), job, start, {}, log=said.append)
  assert any("made with eps 1e-06, encoder.eps is 1e-05" in line for line in said)
  with pytest.raises(ValueError, match="init_from: .* has 4 heads, encoder.heads is 8"):
    interop.graft(str(tmp_path), job_of(encoder.clone(heads=8)), start, {})


# Files


def test_files_that_are_no_weights(tmp_path):
  with pytest.raises(FileNotFoundError, match="no weight file"):
    interop.read_weights(tmp_path / "absent.safetensors")
  with pytest.raises(FileNotFoundError, match="holds neither checkpoints"):
    interop.read_weights(tmp_path)
  (tmp_path / "x.h5").write_bytes(b"")
  with pytest.raises(ValueError, match=r"read from .safetensors, .pth"):
    interop.read_weights(tmp_path / "x.h5")
  whole = tmp_path / "x.safetensors"
  interop.write_weights(whole, {"a": np.ones(100, np.float32)}, {})
  whole.write_bytes(whole.read_bytes()[:-8])
  with pytest.raises(ValueError, match="no sound safetensors"):
    interop.read_weights(whole)


def test_a_transposed_view_is_written_as_it_reads(tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3).T
  interop.write_weights(tmp_path / "x.safetensors", {"x": x}, {})
  np.testing.assert_array_equal(interop.read_weights(tmp_path / "x.safetensors")["x"], x)
  assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_with_several_files_is_read(tmp_path):
  for i in range(2):
    x = {f"t{i}": np.full(2, i, np.float32)}
    interop.write_weights(tmp_path / f"part{i}.safetensors", x, {})
  weight_map = {f"t{i}": f"part{i}.safetensors" for i in range(2)}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  assert set(interop.read_weights(tmp_path)) == {"t0", "t1"}


def test_half_precision_is_read_as_float32(tmp_path):
  encoder, params = build()
  tensors = interop.from_params(params, encoder, SHAPE, "timm")
  tensors = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
  interop.write_weights(tmp_path / "x.safetensors", tensors, {})
  read = interop.read_weights(tmp_path / "x.safetensors")
  read["pos_embed"] = np.concatenate([np.zeros((1, 32)), positions.sincos((2, 3), 32)])[None]
  got, _ = interop.to_params(read, encoder, SHAPE, (2, 3))
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), got, params)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train.run(tiny.config(total_steps=3), workdir)
  return workdir


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_export_of_a_run(run, to, tmp_path):
  said = []
  out = export.export(run, to, tmp_path / "new" / "model.safetensors", log=said.append)
  assert any("read back, every tensor used, outputs equal to the last bit" in s for s in said)
  about = interop.read_metadata(out)
  assert about["format"] == "pt"
  assert json.loads(about["image_size"]) == [32, 32] and json.loads(about["patch"]) == [4, 4]
  np.testing.assert_allclose(json.loads(about["mean"]), [0.485, 0.456, 0.406])
  opened = load.load(run)
  got, _ = interop.to_params(interop.read_weights(out), opened.encoder, opened.shape)
  jax.tree.map(np.testing.assert_array_equal, got, opened.params["encoder"])
  names = {p.name for p in out.parent.iterdir()}
  extra = {"config.json", "preprocessor_config.json"} if to == "transformers" else set()
  assert names == {"model.safetensors"} | extra
  # And back: a new run begins from the file.
  params, _ = interop.graft(str(out), job_of(opened.encoder, opened.shape), opened.params, {})
  jax.tree.map(np.testing.assert_array_equal, params, opened.params)


def test_a_run_begins_from_another_run(run, tmp_path, capsys):
  still = dict(schedule=dict(base=0.0, warmup_steps=0), optimizer=dict(weight_decay=0.0))
  train.run(tiny.config(total_steps=1, init_from=str(run), **still), tmp_path)
  got, want = load.load(tmp_path).params, load.load(run).params
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert "parameters read from step 3" in capsys.readouterr().out


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
  """A run of DINO whose teacher differs from its student."""
  folder = tmp_path_factory.mktemp("distilled")
  train.run(tiny.config("dino", total_steps=3), folder)
  return folder


@pytest.mark.parametrize("fixed", [True, False], ids=["positions read larger", "resized"])
def test_a_run_at_a_higher_resolution_goes_on_from_student_teacher_heads_and_centre(
  distilled, fixed
):
  """DINOv2's last phase: larger views, everything else as it stood."""
  earlier = load.load(distilled)
  changed = tiny.config("dino")
  changed["data"]["views"] = changed["data"]["views"] | dict(size=(32, 48))
  if not fixed:
    changed["encoder"]["positions_size"] = (32, 48)
  job = job_lib.assemble(config_lib.complete(changed))
  nothing = lambda tree: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)  # noqa: E731
  start = nothing(job.state.params), nothing(job.state.extra)
  got = named(interop.graft(str(distilled), job, *start))
  want = named((earlier.params, earlier.extra))
  assert set(got) == set(want)
  differ = {k for k in got if not np.array_equal(got[k], want[k])}
  tables = {"0/encoder/positions", "1/teacher/encoder/positions"}
  assert differ == (set() if fixed else tables)
  resized = positions.resize_table(want["1/teacher/encoder/positions"], (8, 8), (8, 12))
  if not fixed:
    np.testing.assert_array_equal(got["1/teacher/encoder/positions"], resized)
  kernel = "encoder/stem/kernel"
  assert not np.array_equal(got[f"0/{kernel}"], got[f"1/teacher/{kernel}"])


def test_export_errors(run, tmp_path, capsys):
  for arguments, message in (
    (["--to=onnx"], "'onnx' is none of timm, transformers"),
    (["--to=timm", f"--out={tmp_path / 'x.bin'}"], "must end in .safetensors"),
    (["--to=transformers", f"--out={run / 'model.safetensors'}"], "would be overwritten"),
    (["--to=timm", "--step=77"], "no checkpoint of step 77"),
  ):
    assert export.main([f"--workdir={run}", *arguments]) == 1
    assert message in capsys.readouterr().err
  assert export.main([f"--workdir={tmp_path}", "--to=timm"]) == 1
  assert "no config.json" in capsys.readouterr().err


def test_export_is_refused_where_outputs_differ(run, tmp_path, monkeypatch):
  original = convert.from_params

  def broken(*arguments):
    tensors = original(*arguments)
    return tensors | {"norm.bias": tensors["norm.bias"] + 1}

  monkeypatch.setattr(interop, "from_params", broken)
  with pytest.raises(ValueError, match="not exported: read back, tokens"):
    export.export(run, "timm", tmp_path / "x.safetensors", log=lambda line: None)
  assert not list(tmp_path.iterdir())


def test_number_of_tensors_is_that_of_parameters():
  encoder, params = build(registers=2)
  out = interop.from_params(params, encoder, SHAPE, "timm")
  assert len(out) == len(named(params)) + 1  # the fixed positions
  values = sum(math.prod(v.shape) for v in out.values())
  assert values == sum(leaf.size for leaf in jax.tree.leaves(params)) + 9 * 32
