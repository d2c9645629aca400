"""The arrows of the house (DESIGN §3), read from the imports themselves."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "ssljax"
# What the whole of a room may import of ssljax, besides itself; None: anything but `main`.
ROOMS: dict[str, tuple[str, ...]] = {
  "losses": (),
  "targets": (),
  "data": (),
  "views": (),
  "models": (),
  "evals": (),
  "viz": ("records", "evals"),
  "methods": ("losses", "targets", "models", "step", "schedules", "collapse", "called", "names"),
}
# Single files that others are built on.
FILES: dict[str, tuple[str, ...]] = {
  "schedules": (),
  "collapse": (),
  "called": ("step",),
  "sharding": (),
  "step": (),
  "groups": ("schedules",),
  "optim": ("schedules", "groups"),
  "metrics": ("board",),
  "board": (),
  "records": (),
  "flops": (),
  "signals": ("processes",),
  "processes": ("errors",),
  "launch": (),
  "errors": (),
  "trace": (),
  "hlo": (),
  "chips": (),
  "plan_table": (),
  "environment": (),
  "leaves": (),
  "checkpoint": ("leaves", "checkpoint_read"),
  "checkpoint_read": ("leaves",),
  "names": (),
  "config": ("schedules", "names"),
  "topology": (),
  "reporting": ("viz", "records"),
}
# Package -> the only places that may import it, at any depth.
HOMES = {
  "flax": ("models",),
  "orbax": ("checkpoint", "checkpoint_read", "leaves"),
  "clu": ("board",),
  "tensorflow_datasets": ("data",),
  "array_record": ("data",),
  "tensorflow": ("data", "board"),
  "matplotlib": ("viz",),
  "ml_collections": (),
  "torch": ("interop", "export"),
  "tokenizers": ("data",),
  "pickle": ("interop",),  # for the name of its error
}
HEAVY = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "tensorboard")


def imports(path: pathlib.Path, top_only: bool = False) -> set[str]:
  """Dotted names that a file imports; `from a import b` counts as `a.b`."""
  tree = ast.parse(path.read_text())
  # What runs at import time: all but the bodies of functions.
  inside = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(function)
    if node is not function
  }
  found: set[str] = set()
  for node in ast.walk(tree):
    if top_only and id(node) in inside:
      continue
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def files() -> dict[str, pathlib.Path]:
  """{"methods.masked": path, …}"""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found[".".join(part for part in parts if part != "__init__")] = path
  return found


FOUND = files()


def ours(name: str) -> set[str]:
  """Top-level names of ssljax that a file imports."""
  inside = {i.split(".")[1] for i in imports(FOUND[name]) if i.startswith("ssljax.")}
  return inside


def test_the_files_are_found():
  assert {"train", "methods.masked", "data.pipeline", "models.vit", "viz.report"} <= set(FOUND)
  assert "ssljax.step.Method" in imports(FOUND["methods.masked"])
  assert "clu.metric_writers" in imports(FOUND["board"])
  assert "clu.metric_writers" not in imports(FOUND["board"], top_only=True)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_of_a_room(room):
  for name in FOUND:
    if name.split(".")[0] == room:
      assert ours(name) <= {room, *ROOMS[room]}, name


@pytest.mark.parametrize("file", FILES)
def test_arrows_of_a_file(file):
  assert ours(file) <= set(FILES[file])


def test_nothing_imports_the_command_and_little_the_run():
  for name in FOUND:
    assert "main" not in ours(name) or name == "plan", name  # a command of its own
    if "train" in ours(name):
      assert name in ("main", "dry_run", "plan"), name
    if {"job", "evaluate"} & ours(name):
      allowed = ("main", "dry_run", "train", "evaluate", "load", "encode", "export", "plan")
      assert name in allowed, name


def test_methods_do_not_import_each_other():
  for name in FOUND:
    if name.startswith("methods."):
      others = {i for i in imports(FOUND[name]) if i.startswith("ssljax.methods.")}
      assert all(i.startswith("ssljax.methods.combine") for i in others), (name, others)


def test_data_never_imports_jax():
  for name in FOUND:
    if name.split(".")[0] == "data":
      tops = {i.split(".")[0] for i in imports(FOUND[name])}
      assert not tops & {"jax", "jaxlib", "flax", "optax"}, name


def test_losses_and_targets_import_jax_numpy_and_optax_only():
  for name in FOUND:
    if name.split(".")[0] in ("losses", "targets"):
      tops = {i.split(".")[0] for i in imports(FOUND[name])}
      assert tops <= {
        "jax",
        "numpy",
        "optax",
        "math",
        "functools",
        "ssljax",
        "collections",
        "typing",
      }


@pytest.mark.parametrize("package", HOMES)
def test_a_package_has_its_place(package):
  homes = HOMES[package]
  for name in FOUND:
    if package in {i.split(".")[0] for i in imports(FOUND[name])}:
      assert name.split(".")[0] in homes, name


@pytest.mark.parametrize("package", ["tensorflow", "tensorflow_datasets", "clu", "ml_collections"])
def test_heavy_packages_are_never_imported_at_the_top(package):
  for name in FOUND:
    tops = {i.split(".")[0] for i in imports(FOUND[name], top_only=True)}
    assert package not in tops, name


def test_no_import_is_hidden_in_a_try():
  for name, path in FOUND.items():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Try):
        for handler in node.handlers:
          caught = ast.unparse(handler.type) if handler.type else ""
          guarded = any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)
          says_so = any(isinstance(inner, ast.Raise) for inner in handler.body)
          assert says_so or not (guarded and "ImportError" in caught), name


def test_nothing_that_a_file_says_is_executed():
  for name, path in FOUND.items():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call):
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), name
        assert given.get("allow_pickle", "False") == "False", name
        assert called != "torch.load" or given.get("weights_only") == "True", name


def test_importing_brings_nothing_heavy():
  script = (
    "import sys\n"
    "import ssljax.train, ssljax.main, ssljax.losses, ssljax.methods.masked, ssljax.dry_run\n"
    f"heavy = [n for n in {HEAVY!r} if n in sys.modules]\n"
    "late = [n for n in ('matplotlib', 'tqdm') if n in sys.modules]\n"
    "sys.exit(f'imported: {heavy + late}' if heavy + late else 0)\n"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_losses_alone_bring_neither_flax_nor_orbax():
  script = (
    "import sys, ssljax.losses\n"
    "found = [n for n in ('flax', 'orbax', 'tensorflow', 'ssljax.train') if n in sys.modules]\n"
    "sys.exit(f'imported: {found}' if found else 0)\n"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
