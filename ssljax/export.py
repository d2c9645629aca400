"""python -m ssljax.export --workdir=DIR --to=timm|transformers [--out=FILE.safetensors]

The encoder of a run as weights that timm's VisionTransformer and ResNet or Transformers' ViTModel
load.
Nothing is written unless every tensor is used and gives the run's own outputs on a probe image.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ssljax import interop
from ssljax.interop import convert
from ssljax.interop import resnet as resnet_names
from ssljax.interop import timm as timm_names
from ssljax.interop import transformers as transformers_names
from ssljax.load import Run, load

TOLERANCE = 1e-4  # relative to the largest value: float32 over forty blocks in another order
FOLDED = 1e-5  # where layer scale was multiplied into the matrices; bit by bit elsewhere


def export(
  workdir: str | os.PathLike,
  to: str,
  out: str | os.PathLike = "",
  *,
  step: int | None = None,
  log: Any = print,
) -> pathlib.Path:
  """Writes the encoder of the run in `workdir`; -> the file.

  out: a .safetensors file; by default `exports/<to>/model.safetensors` in the workdir. With "to"
  transformers, config.json and preprocessor_config.json are written beside it.

  Raises:
    FileNotFoundError: no run there.
    ValueError: the other side cannot express this encoder, or the outputs do not agree.
  """
  out = pathlib.Path(out) if out else pathlib.Path(workdir, "exports", to, "model.safetensors")
  if out.suffix != ".safetensors":
    raise ValueError(f"--out {out} must end in .safetensors")
  if to not in convert.FORMATS:
    raise ValueError(f"--to {to!r} is none of {', '.join(convert.FORMATS)}")
  if to == "transformers":
    _check_folder(out)
  run = load(workdir, step=step)
  tensors = interop.from_params(run.weights(), run.encoder, run.shape, to)
  partial = out.with_name(f".unchecked.{out.name}")
  interop.write_weights(partial, tensors, metadata(run, to))
  try:
    checks = [_round_trip(partial, run, to)]
    check = {"timm": _against_timm, "transformers": _against_transformers}[to]
    checks.append(check(partial, run))
    os.replace(partial, out)
  finally:
    partial.unlink(missing_ok=True)
  if to == "transformers":
    for name, content in companions(run).items():
      out.with_name(name).write_text(json.dumps(content, indent=2) + "\n")
  log(f"wrote {out}: {len(tensors)} tensors, step {run.step}")
  for line in [*checks, *_how_to_load(run, to, out)]:
    log(line)
  return out


def metadata(run: Run, to: str) -> dict[str, str]:
  """What the file says of itself: everything needed to use the weights, as JSON texts."""
  encoder, (h, w, c) = run.encoder, run.shape
  notes = {
    "image_size": [h, w],
    "grid": list(encoder.grid((h, w))),
    "channels": c,
    "mean": [float(m) for m in run.mean],
    "std": [float(s) for s in run.std],
    "pool": encoder.pool,
    "step": run.step,
    "method": run.config["method"]["name"],
  }
  if encoder.patch is None:
    notes |= resnet_names.about(encoder, c)
  else:
    notes |= {"patch": list(encoder.patch), "heads": encoder.heads, "eps": encoder.eps}
  if to == "timm" and encoder.patch is not None:
    notes["timm_arguments"] = timm_names.arguments(encoder, (h, w), c)
  # Transformers refuses files that do not say which framework wrote them.
  return {"format": "pt"} | {key: json.dumps(value) for key, value in notes.items()}


def companions(run: Run) -> dict[str, dict]:
  """The files that Transformers wants beside model.safetensors."""
  size, channels = run.shape[:2], run.shape[2]
  return {
    "config.json": transformers_names.config(run.encoder, size, channels),
    "preprocessor_config.json": transformers_names.preprocessor(size, run.mean, run.std),
  }


def _check_folder(out: pathlib.Path) -> None:
  other = out.with_name("config.json")
  if other.exists() and "model_type" not in json.loads(other.read_text()):
    raise ValueError(
      f"{other} is not of Transformers and would be overwritten;"
      f" use another folder, e.g. --out={out.parent / 'exports' / out.name}"
    )


def probe(shape: Sequence[int]) -> np.ndarray:
  """One fixed image as the encoder sees it, normalised: [1 h w c]."""
  return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def outputs(weights: Any, encoder: Any, x: np.ndarray) -> dict[str, np.ndarray]:
  """Tokens [1 m+n d], or patches [1 n d] where there are no others, and pooled [1 d] in float32."""
  encoder = encoder.clone(dtype=np.dtype("float32"), remat="none")
  variables = weights if encoder.patch is None else {"params": weights}
  with jax.default_matmul_precision("float32"):
    found = jax.jit(encoder.apply)(variables, x)
  places = "tokens" if "tokens" in found else "patches"
  return {key: np.asarray(found[key]) for key in (places, "pooled")}


def _round_trip(path: pathlib.Path, run: Run, to: str) -> str:
  """Reads the file back and compares."""
  encoder, shape, x = run.encoder, run.shape, probe(run.shape)
  folded = to == "transformers" and bool(encoder.layer_scale)  # a ResNet never goes there
  again = encoder.clone(layer_scale=0.0) if folded else encoder
  grid = json.loads(interop.read_metadata(path)["grid"])
  params, report = interop.to_params(interop.read_weights(path), again, shape, grid)
  if report.missing or report.unused:
    raise ValueError(f"not exported: tensors are lost, {report.missing + report.unused}")
  want, got = outputs(run.weights(), encoder, x), outputs(params, again, x)
  worst = _compare(got, want, FOLDED if folded else 0.0, "read back")
  told = f"outputs agree to {worst:.1e}" if folded else "outputs equal to the last bit"
  return f"checked: read back, every tensor used, {told}"


def _against_timm(path: pathlib.Path, run: Run) -> str:
  """Loads the file into timm's own model and compares, where timm is installed."""
  if lacking := _lacking("torch", "timm.models.vision_transformer"):
    return f"not checked against timm itself: {lacking}"
  got = _timm_resnet(path, run) if run.encoder.patch is None else _timm_vit(path, run)
  worst = _compare(got, outputs(run.weights(), run.encoder, probe(run.shape)), TOLERANCE, "in timm")
  model = "ResNet" if run.encoder.patch is None else "VisionTransformer"
  return f"checked: timm's {model} agrees to {worst:.1e}"


def _timm_resnet(path: pathlib.Path, run: Run) -> dict[str, np.ndarray]:
  import torch
  from safetensors.torch import load_file

  model = resnet_names.timm_model(run.encoder, run.shape[2])
  model.load_state_dict(load_file(path), strict=True)
  with torch.no_grad():
    last = model.forward_features(torch.tensor(probe(run.shape).transpose(0, 3, 1, 2)))
    patches = last.flatten(2).transpose(1, 2)
    return {"patches": patches.numpy(), "pooled": model.forward_head(last).numpy()}


def _timm_vit(path: pathlib.Path, run: Run) -> dict[str, np.ndarray]:
  import functools

  import torch
  from safetensors.torch import load_file
  from timm.models.vision_transformer import VisionTransformer

  encoder, x = run.encoder, probe(run.shape)
  arguments = timm_names.arguments(encoder, run.shape[:2], run.shape[2])
  norm = functools.partial(torch.nn.LayerNorm, eps=encoder.eps)
  model = VisionTransformer(**arguments, norm_layer=norm).eval()
  model.load_state_dict(load_file(path), strict=True)
  with torch.no_grad():
    tokens = model.forward_features(torch.tensor(x.transpose(0, 3, 1, 2)))
    return {"tokens": tokens.numpy(), "pooled": model.forward_head(tokens).numpy()}


def _against_transformers(path: pathlib.Path, run: Run) -> str:
  """The same with Transformers' ViTModel."""
  if lacking := _lacking("torch", "transformers.models.vit.modeling_vit"):
    return f"not checked against Transformers itself: {lacking}"
  import tempfile

  import torch
  from transformers import ViTModel

  x = probe(run.shape)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    for name, content in companions(run).items():
      pathlib.Path(folder, name).write_text(json.dumps(content))
    shutil.copyfile(path, pathlib.Path(folder, "model.safetensors"))
    # On the CPU build of torch attention is fused in another order; eager is the plain formula.
    loaded: Any = ViTModel.from_pretrained(
      folder, add_pooling_layer=False, attn_implementation="eager", output_loading_info=True
    )
  model, info = loaded
  lost = [name for key in ("missing_keys", "unexpected_keys") for name in info[key]]
  if lost:
    raise ValueError(f"not exported: Transformers does not match {', '.join(sorted(lost))}")
  with torch.no_grad():
    tokens = model.eval()(torch.tensor(x.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
  pooled = tokens[:, 0] if run.encoder.pool == "cls" else tokens[:, 1:].mean(1)
  want = outputs(run.weights(), run.encoder, x)
  worst = _compare({"tokens": tokens, "pooled": pooled}, want, TOLERANCE, "in Transformers")
  return f"checked: Transformers' ViTModel agrees to {worst:.1e}"


def _lacking(*modules: str) -> str:
  """Why a check against another library cannot be made, or nothing."""
  for module in modules:
    library = module.split(".")[0]
    if importlib.util.find_spec(library) is None:
      return f"{library} is not installed"
    try:
      importlib.import_module(module)
    except Exception as error:  # a broken build of theirs must not keep our file from being written
      reason = str(error).strip().splitlines()
      return f"{library} cannot be imported here: {reason[0] if reason else type(error).__name__}"
  return ""


def _compare(got: Mapping, want: Mapping, tolerance: float, where: str) -> float:
  """The largest relative difference; ValueError where it is above the tolerance."""
  worst = 0.0
  for key in want:
    error = np.abs(got[key] - want[key]).max() / np.abs(want[key]).max()
    worst = max(worst, float(error))
    if not error <= tolerance:
      raise ValueError(f"not exported: {where}, {key} of the probe image differ by {error:.1e}")
  return worst


def _how_to_load(run: Run, to: str, out: pathlib.Path) -> list[str]:
  mean, std = ([round(float(v), 4) for v in x] for x in (run.mean, run.std))
  lines = [f"input: 0…1, minus mean {mean}, over deviation {std}"]
  if to == "transformers":
    folder = out.parent
    if out.name != "model.safetensors":
      lines.append(f"Transformers wants the name model.safetensors: rename {out.name}")
    return [*lines, f'load: ViTModel.from_pretrained("{folder}", add_pooling_layer=False)']
  last = f'      model.load_state_dict(safetensors.torch.load_file("{out}"))'
  if run.encoder.patch is None:
    return [*lines, *resnet_names.how_to_load(run.encoder, run.shape[2]), last]
  arguments = timm_names.arguments(run.encoder, run.shape[:2], run.shape[2])
  given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
  return [*lines, f"load: model = timm.models.vision_transformer.VisionTransformer({given})", last]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; -> the exit code."""
  from ssljax.errors import explain

  parser = argparse.ArgumentParser("ssljax.export", description=__doc__, allow_abbrev=False)
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--to", required=True, help="timm or transformers")
  parser.add_argument("--out", default="", help="a .safetensors file")
  parser.add_argument("--step", type=int, help="a checkpoint other than the newest")
  flags = parser.parse_args(argv)
  try:
    export(flags.workdir, flags.to, flags.out, step=flags.step)
  except (ValueError, FileNotFoundError) as error:
    return explain(error)
  return 0


if __name__ == "__main__":
  sys.exit(main())
