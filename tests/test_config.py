"""Configs: the signature is the schema; mistakes are named with the nearest right words."""

import copy
import importlib.util
import json
import pathlib
import sys
import types

import jax
import ml_collections
import numpy as np
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax import main

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
VARIANTS = {
  "mae_vitb": ("vitb16", "vitl16", "vith14"), "mae_digits": ("photo", "plain"),
  "msn_cifar10": ("", "pmsn"), "attmask_vits": ("", "high"),
  "swav_r50": ("", "small"), "swav_cifar10": ("", "queue"),
  "data2vec2_vitb": ("vitb16", "vitl16"), "dinov2_vitl": ("", "sinkhorn", "sinkhorn,highres"),
  "clip_vitb": ("clip", "flip"), "dcl_cifar10": ("dcl", "dclw"), "dcl_r50": ("dcl", "dclw"),
  "vicregl_r50": ("0.75", "0.9"), "vicregl_convnexts": ("0.75", "0.9"),
}  # fmt: skip


@pytest.fixture
def lab(tmp_path, monkeypatch):
  """A user's own package, on the path for one test."""
  package = tmp_path / "my_lab"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "my_method.py").write_text(
    "from ssljax.methods.masked import masked\n"
    "def my_method(encoder, hidden_count, total_steps, *, width=48, needed, scale=1.0):\n"
    "  decoder = dict(decoder_width=width, decoder_depth=1, decoder_heads=2)\n"
    "  return masked(encoder, hidden_count, **decoder)\n"
    "def other(encoder, *, amount: int = 3):\n"
    "  return amount\n"
  )
  (package / "broken.py").write_text("import nothing_of_this_name\ndef broken(): pass\n")
  monkeypatch.syspath_prepend(tmp_path)
  yield package
  for name in [name for name in sys.modules if name.startswith("my_lab")]:
    del sys.modules[name]


def changed(key: str, value):
  """The tiny config with one dotted key set."""
  config = tiny.config()
  *path, last = key.split(".")
  inner = config
  for part in path:
    inner = inner.setdefault(part, {})
  inner[last] = value
  return config


# Defaults and types


def test_every_default_comes_from_a_signature():
  full = config_lib.complete(tiny.config())
  assert full["encoder"]["variant"] == "B" and full["encoder"]["width"] == 32
  assert full["optimizer"] == {
    "name": "ssljax.optim.adamw", "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.05,
    "no_decay": (), "decay_vectors": False, "clip": 1.0, "clip_by": "global", "layer_decay": 1.0,
    "stem_rate": 1.0, "groups": None, "freeze": (), "freeze_steps": 0, "freeze_by": "gradient",
    "unit": (), "limits": (),
  }  # fmt: skip
  assert full["method"]["teacher_momentum"] == 0.9998  # a default that is no literal type hint
  assert full["data"]["max_pixels"] and full["data"]["hidden"]["rounding"] == "keep_floor"
  # What the run gives is no key of the config.
  assert "dtype" not in full["encoder"] and "hidden_count" not in full["method"]
  assert "schedule" not in full["optimizer"] and "grid" not in full["data"]["hidden"]


def test_completing_twice_changes_nothing():
  full = config_lib.complete(tiny.config())
  again = config_lib.complete(full)
  assert config_lib.as_json(again) == config_lib.as_json(full)


def test_the_given_config_is_left_alone():
  given = tiny.config()
  before = config_lib.as_json(given)
  config_lib.complete(given)
  config_lib.override(given, {"encoder.depth": "3", "data.views.name": "ssljax.data.views.keep"})
  assert config_lib.as_json(given) == before


def test_a_config_dict_a_dict_and_any_mapping_give_the_same():
  given = tiny.config()
  plain = config_lib.complete(given)
  dictionary = config_lib.complete(ml_collections.ConfigDict(given))
  assert isinstance(dictionary, ml_collections.ConfigDict) and type(plain) is dict
  proxy = config_lib.complete(config_lib.plain(types.MappingProxyType(given)))
  as_json = config_lib.as_json
  assert as_json(dictionary) == as_json(plain) == as_json(proxy)
  assert config_lib.differences(plain, dictionary) == []


@pytest.mark.parametrize(
  "key, value, kept",
  [
    ("optimizer.b1", 1, 1.0),
    ("encoder.patch", [4, 4], (4, 4)),
    ("data.mean", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ("data.eval_test", None, None),
    ("method.teacher_momentum", dict(schedule="cosine", start=0.9, end=1.0), None),
  ],
)
def test_values_that_fit(key, value, kept):
  section, last = key.split(".")
  got = config_lib.complete(changed(key, value))[section][last]
  assert got == (value if isinstance(value, dict) else kept)
  assert type(got) is type(value if isinstance(value, dict) else kept)


WRONG = [
  ("total_step", 3, "unknown config key total_step; did you mean total_steps?"),
  ("dta", {}, "unknown config key dta; did you mean data?"),
  ("data.veiws", None, "unknown config key data.veiws; did you mean data.views"),
  ("data.name", "digits", "unknown config key data.name; there are cache, canvas, channels, "),
  ("checkpoint.evry", 3, "unknown config key checkpoint.evry; did you mean checkpoint.every?"),
  ("mesh.device", 3, "unknown config key mesh.device; did you mean mesh.devices?"),
  ("eval.evry", 3, "unknown config key eval.evry; did you mean eval.every?"),
  ("encoder.depht", 3, "unknown config key encoder.depht; did you mean encoder.depth"),
  ("encoder.dtype", "bfloat16", "unknown config key encoder.dtype"),
  ("method.encoder", "x", "unknown config key method.encoder; did you mean method.decoder"),
  ("method.name", "ssljax.methods.maskd", "did you mean ssljax.methods.masked?"),
  ("method.name", "masked", "no component 'masked' for method.*mean ssljax.methods.masked?"),
  ("method.name", "ssljax.method.masked", "no module 'ssljax.method'; .*ssljax.methods.masked?"),
  ("method.name", "ssljax.models.layers", "module ssljax.models.layers has no function layers"),
  ("method.name", "", "no component ''"),
  ("encoder.name", "ssljax.models.vti", "did you mean ssljax.models.vit?"),
  ("optimizer.name", "ssljax.optim.adam", "did you mean ssljax.optim.adamw?"),
  ("schedule.name", "ssljax.schedules.cosine", "did you mean ssljax.schedules.warmup_cosine?"),
  ("eval.knn", dict(name="ssljax.evals.kn"), "for eval.knn; did you mean ssljax.evals.knn?"),
  ("data.hidden.name", "ssljax.data.masking.randm", "did you mean ssljax.data.masking.random?"),
  ("eval.knn", dict(name="ssljax.evals.knn", K=(1,)), "unknown config key eval.knn.K; "),
  ("method.name", None, "method lacks its name"),
  ("method", "mae", "method must be a section"),
  ("schedule", None, "schedule must be a section"),
  ("data.views", "crop_flip", "data.views must be dict"),
  ("dtype", "flaot32", "dtype 'flaot32' is none of float32, bfloat16"),
  ("dtype", 32, "dtype wants a str like 'float32', not 32"),
  ("seed", "a", "seed wants a int like 0, not 'a'"),
  ("init_from", 3, "init_from wants a str"),
  ("total_steps", 0, "total_steps must be a positive whole number, not 0"),
  ("batch_size", 2.5, "batch_size must be a positive whole number, not 2.5"),
  ("accum", True, "accum must be a positive whole number, not True"),
  ("log.every", 0, "log.every must be a positive whole number, not 0"),
  ("eval.every", -1, r"eval.every must be 0 \(off\) or more"),
  ("method.decoder_width", "wide", "method.decoder_width wants a int like 512, not 'wide'"),
  ("method.decoder_width", None, "method.decoder_width wants a int like 512, not None"),
  ("method.decoder_width", {"a": 1}, "method.decoder_width wants a int like 512"),
  ("encoder.patch", 4, r"encoder.patch wants a tuple like \(16, 16\), not 4"),
  ("encoder.scan", 1, "encoder.scan wants a bool like False, not 1"),
  ("log.tensorboard", "no", "log.tensorboard wants a bool like True, not 'no'"),
]


@pytest.mark.parametrize("key, value, message", WRONG)
def test_mistakes_are_named(key, value, message):
  with pytest.raises(ValueError, match=message) as raised:
    config_lib.complete(changed(key, value))
  assert "\n" not in str(raised.value)


def test_a_misspelt_evaluation_names_the_others():
  config = tiny.config(eval=dict(knn=dict(name="ssljax.evals.knn"), knm=dict(k=(1,))))
  with pytest.raises(ValueError, match="eval.knm lacks its name; did you mean eval.knn?"):
    config_lib.complete(config)


def test_missing_sections_are_named():
  config = tiny.config()
  del config["encoder"], config["batch_size"]
  with pytest.raises(ValueError, match="the config lacks batch_size, encoder"):
    config_lib.complete(config)


# Components of the user's own


def test_a_method_of_the_users_own(lab):
  config = changed("method", dict(name="my_lab.my_method", needed="x"))
  full = config_lib.complete(config)
  assert full["method"] == {"name": "my_lab.my_method", "width": 48, "needed": "x", "scale": 1.0}
  job = job_lib.assemble(full)
  assert job.state.params["decoder"]["embed"]["kernel"].shape == (32, 48)


def test_what_a_users_component_lacks_is_named(lab):
  with pytest.raises(ValueError, match="method lacks needed"):
    config_lib.complete(changed("method", dict(name="my_lab.my_method")))
  with pytest.raises(ValueError, match="my_method.other needs 'encoder'"):
    config_lib.build(dict(name="my_lab.my_method.other"))
  assert config_lib.build(dict(name="my_lab.my_method.other"), encoder=0, unused=1) == 3


def test_a_missing_dependency_is_not_taken_for_a_misspelt_name(lab):
  with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
    config_lib.resolve("my_lab.broken")


def test_build_turns_moving_values_into_functions_of_the_step(lab):
  (lab / "moving.py").write_text("def moving(*, value=0.5, size=(1, 1)):\n  return value, size\n")
  spec = dict(name="my_lab.moving", value=dict(schedule="linear", start=0.0, end=1.0), size=[2, 3])
  value, size = config_lib.build(spec, total_steps=10)
  assert float(value(5)) == 0.5 and size == (2, 3)
  with pytest.raises(ValueError, match="must name one of constant, linear, cosine"):
    config_lib.build(spec | dict(value=dict(schedule="cosin", start=0.0)), total_steps=10)


# Overrides and differences


def test_overrides_are_literals_or_strings():
  settings = {
    "encoder.depth": "3", "encoder.patch": "(8, 8)", "data.source": "folder:/imgs",
    "log.tensorboard": "true", "encoder.scan": "True", "optimizer.clip": "2",
    "data.views.name": "ssljax.data.views.keep", "init_from": "",
  }  # fmt: skip
  full = config_lib.override(tiny.config(), settings)
  assert full["encoder"]["depth"] == 3 and full["encoder"]["patch"] == (8, 8)
  assert full["data"]["source"] == "folder:/imgs" and full["log"]["tensorboard"] is True
  assert full["encoder"]["scan"] is True and full["optimizer"]["clip"] == 2.0
  assert full["data"]["views"] == {"name": "ssljax.data.views.keep"}


def test_overrides_never_run_code(tmp_path):
  mark = tmp_path / "run"
  text = f"__import__('pathlib').Path({str(mark)!r}).touch()"
  full = config_lib.override(tiny.config(), {"data.source": text})
  assert full["data"]["source"] == text and not mark.exists()


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("dta.source", "x", "unknown config key dta; did you mean data?"),
    ("data.sorce", "x", "unknown config key data.sorce; did you mean data.source?"),
    ("encoder.depth.x", "1", "unknown config key encoder.depth.x; did you mean encoder.depth"),
    ("method.name", "ssljax.methods.maskd", "did you mean ssljax.methods.masked?"),
    ("optimizer", "adamw", "optimizer must be a section"),
  ],
)
def test_a_misspelt_override_is_named(key, value, message):
  with pytest.raises(ValueError, match=message):
    config_lib.override(tiny.config(), {key: value})


def test_an_evaluation_is_switched_off_by_none():
  evals = dict(knn=dict(name="ssljax.evals.knn"), rank=dict(name="ssljax.evals.rank"))
  full = config_lib.override(tiny.config(eval=evals), {"eval.knn": "None"})
  assert "knn" not in full["eval"] and full["eval"]["rank"]["examples"] == 25600


def test_differences_name_what_is_learnt_and_leave_the_rest_free():
  before = config_lib.complete(tiny.config())
  free = {
    "mesh.state": "'full'", "log.every": "7", "eval.every": "3", "checkpoint.keep": "5",
    "data.workers": "3", "encoder.scan": "True", "encoder.remat": "'full'",
    "data.eval_test": "train",
  }  # fmt: skip
  assert config_lib.differences(before, config_lib.override(before, free)) == []
  learnt = {"encoder.depth": "3", "seed": "1", "batch_size": "8", "optimizer.clip": "2.0"}
  assert config_lib.differences(before, config_lib.override(before, learnt)) == [
    "batch_size: 16 -> 8", "encoder.depth: 2 -> 3", "optimizer.clip: 1.0 -> 2.0", "seed: 0 -> 1",
  ]  # fmt: skip


def test_an_argument_newer_than_the_run_is_its_default():
  now = config_lib.complete(tiny.config())
  older = copy.deepcopy(now)
  del older["encoder"]["drop_path"], older["schedule"]["end"], older["data"]["max_pixels"]
  assert config_lib.differences(older, now) == []
  changed = config_lib.override(now, {"encoder.drop_path": "0.3"})
  assert config_lib.differences(older, changed) == ["encoder.drop_path: 0.0 -> 0.3"]
  # A key that is no more is one: what it did may be missed.
  older["encoder"]["gone"] = 1
  assert "encoder.gone: 1 -> None" in config_lib.differences(older, now)


def test_the_schedule_may_differ_only_when_it_is_allowed():
  before = config_lib.complete(tiny.config())
  after = config_lib.override(before, {"total_steps": "9", "schedule.base": "0.5"})
  assert config_lib.differences(before, after) == [
    "schedule.base: 0.01 -> 0.5",
    "total_steps: 6 -> 9",
  ]
  assert config_lib.differences(before, after, new_schedule=True) == []


def test_json_round_trip():
  full = config_lib.complete(tiny.config("data2vec"))
  saved = json.loads(json.dumps(config_lib.as_json(full)))
  assert saved["data"]["source"]["image"] == "array [64, 32, 32, 3]"
  assert config_lib.differences(saved, full) == []
  again = config_lib.complete(saved)
  assert config_lib.build(again["encoder"], dtype="float32") == config_lib.build(
    full["encoder"], dtype="float32"
  )


# The configs that ssljax brings


def variants():
  return [(path, v) for path in CONFIGS for v in VARIANTS.get(path.stem, ("",))]


def ready(path, variant):
  """The config of a file, complete, on a few pictures in memory instead of its own data."""
  config = main.load_config(f"{path}:{variant}" if variant else str(path))
  assert isinstance(config, ml_collections.ConfigDict)
  config = config_lib.plain(config)
  side, channels = (8, 1) if variant == "plain" else (32, config["data"]["channels"])
  method = config["method"]
  count = method.get("examples") or max(config["batch_size"], method.get("queue", 0))
  picture = np.zeros((side, side, channels), np.uint8)
  source = {
    "image": np.broadcast_to(picture, (count, *picture.shape)),
    "label": np.arange(count) % 2,
  }
  if config["data"]["text"]:
    source["text"] = np.array(["a picture"] * count)
  splits = dict(source=source, split="train", eval_train="train", eval_test="train")
  return config | {"data": config["data"] | splits}


@pytest.mark.parametrize("path, variant", variants(), ids=lambda x: getattr(x, "stem", x) or "-")
def test_every_config_builds(path, variant):
  config = ready(path, variant)
  assert config_lib.as_json(config_lib.complete(config)) == config_lib.as_json(config)
  job = job_lib.assemble(config)
  params = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(job.state.params["encoder"]))
  expected = {"mae_vitb": 86e6, "simmim_vitb": 86e6, "data2vec_vitb": 86e6, "mae_folder": 21.6e6}
  expected |= {"mae_cifar10": 5.35e6, "vitl16": 304e6, "vith14": 631e6}
  published = expected.get(
    variant, expected.get(path.stem, params)
  )  # the demo has a size of its own
  assert abs(params / published - 1) < 0.02
  peak = float(job.schedule(config["schedule"]["warmup_steps"]))
  assert peak == pytest.approx(job.config["schedule"]["base"] * scale(job.config))
  changed = config_lib.override(config, {"optimizer.weight_decay": "0.3", "batch_size": "64"})
  assert changed["optimizer"]["weight_decay"] == 0.3 and changed["batch_size"] == 64
  saved = json.loads(json.dumps(config_lib.as_json(config)))
  assert config_lib.differences(saved, config) == []


def scale(config):
  per = config["schedule"]["per"]
  return config["batch_size"] / per if per else 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_how_to_run_it(path):
  spec = importlib.util.spec_from_file_location("described", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert f"--config=configs/{path.name}" in module.__doc__


def test_an_unknown_variant_is_named():
  path = next(path for path in CONFIGS if path.stem == "mae_vitb")
  with pytest.raises(ValueError, match="variant 'vitl61' is none of vitb16, vitl16, vith14"):
    main.load_config(f"{path}:vitl61")


# Losses of two-view methods are functions by name


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"method.loss": "ssljax.losses.nt_xent"}, "method.loss must be a function's name"),
    ({"method.loss": "{'name': 'ssljax.losses.nt_xent'}"}, "two views: missing .*'temperature'"),
    ({"method.loss.name": "ssljax.losses.nt_xemt"}, "did you mean ssljax.losses.nt_xent"),
    ({"method.loss.temprature": "0.1"}, "did you mean method.loss.temperature"),
    ({"method.queue": "64"}, 'method.queue needs method.target "teacher"'),
    ({"method.queue": "64", "method.target": "teacher"}, "two views and a queue: "),
    ({"method.predictor": "(8, 16)"}, 'needs method.target "stopped"'),
    ({"method.target": "techer"}, "method.target 'techer' is none of"),
    ({"batch_size": "1", "mesh.devices": "1"}, "a loss between the examples of a batch needs two"),
    ({"data.views": "None", "data.views_on": "device"}, "views_on='device' needs data.views"),
    ({"mesh.tensor": "2"}, "which the encoder does not have"),
  ],
)
def test_what_a_two_view_config_must_not_say(settings, message):
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.override(tiny.config("simclr"), settings))


def test_another_loss_by_its_name_alone_brings_its_own_arguments():
  changed = config_lib.override(
    tiny.config("barlow_twins"), {"method.loss.name": "ssljax.losses.vicreg"}
  )
  assert changed["method"]["loss"]["variance_weight"] == 25.0
  assert "redundancy_weight" not in changed["method"]["loss"]
  view = "ssljax.data.views.resize_crop"
  changed = config_lib.override(
    tiny.config("simclr"), {"data.eval_views.name": view, "data.eval_views.size": "(32, 32)"}
  )
  assert changed["data"]["eval_views"]["size"] == (32, 32)
