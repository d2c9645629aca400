"""Checkpoints survive kills, damage and another number of devices, to the last bit."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssljax import checkpoint, leaves

ROOT = pathlib.Path(__file__).parents[1]
# A damaged file leaves tasks of orbax unfinished; their complaints are not about these tests.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
  step: jax.Array
  params: Any
  extra: Any
  opt: optax.OptState
  rng: jax.Array


def make_state(step: int) -> State:
  """A small state with everything a real one has; all its bits depend on `step`."""
  draw = np.random.default_rng(step)  # in NumPy: nothing to compile
  params = {
    "stem": {"kernel": draw.normal(size=(64, 32)).astype(np.float32), "bias": np.ones(32, "f")},
    "half": draw.normal(size=(8, 3)).astype(jnp.bfloat16),
    "registers": np.zeros((0, 8), np.float32),
  }
  params["half"][0, 0] = np.nan
  extra = {
    "teacher": jax.tree.map(lambda x: x + x.dtype.type(1), params),
    "seen": np.arange(5) > step % 5,
    "rows": draw.integers(0, 255, 7).astype(np.uint8),
  }
  params, extra = jax.tree.map(jnp.asarray, (params, extra))
  opt = optax.adamw(1e-3).init(params)
  return State(jnp.int32(step), params, extra, opt, jax.random.key(step))


def mesh_of(devices: int) -> jax.sharding.Mesh:
  return jax.make_mesh(
    (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
  )


def placed(tree: Any, devices: int) -> Any:
  """The tree fully sharded: the first axis that divides over the devices, small leaves whole."""
  mesh = mesh_of(devices)

  def place(leaf):
    fits = leaf.ndim and leaf.shape[0] and leaf.shape[0] % devices == 0
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*["data"] * bool(fits))))

  return jax.tree.map(place, tree)


def abstract(state: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(leaf: Any) -> bytes:
  leaf = jax.random.key_data(leaf) if leaves.is_key(leaf) else leaf
  return np.asarray(leaf).tobytes()


def assert_same(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y), path


@pytest.fixture
def said() -> list[str]:
  return []


def opened(path, said=None, **settings) -> checkpoint.Checkpoints:
  log = {} if said is None else {"log": said.append}
  return checkpoint.open_checkpoints(path, every=10, **{"keep": 2, **settings}, **log)


def saved(path, steps=(10, 20), **settings) -> None:
  store = opened(path, **settings)
  for step in steps:
    store.save(step, make_state(step), {"step": step})
  store.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("two") / "checkpoints"
  saved(path)
  return path


def test_a_saved_state_comes_back_to_the_last_bit(two_steps):
  store = opened(two_steps)
  state, meta = store.restore(abstract(make_state(0)))
  assert_same(state, make_state(20))
  assert meta == {"step": 20} and store.steps() == [10, 20]
  assert jax.random.uniform(state.rng) == jax.random.uniform(jax.random.key(20))
  store.close()


def test_nothing_saved_is_none_and_meta_may_be_any_json(tmp_path):
  store = opened(tmp_path / "new")
  assert store.restore(abstract(make_state(0))) is None and store.steps() == []
  meta = {"source": {"kind": "folder", "size": 3}, "list": [1, 2.5, None, "ä"]}
  assert store.save(3, make_state(3), meta) and not store.save(3, make_state(3), meta)
  assert store.restore(abstract(make_state(0)))[1] == meta
  with pytest.raises(TypeError):
    store.save(4, make_state(4), {"array": np.ones(3)})
  store.close()


@pytest.mark.parametrize("before, after", [(8, 1), (8, 2), (8, 4), (1, 8)])
def test_restores_onto_another_number_of_devices(tmp_path, before, after):
  store = opened(tmp_path)
  store.save(10, placed(make_state(10), before), {})
  target = abstract(placed(make_state(0), after))
  state, _ = store.restore(target)
  assert_same(state, make_state(10))
  for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(target)):
    assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
  assert len(state.params["stem"]["kernel"].sharding.device_set) == after
  store.close()


def test_saving_within_a_mesh_and_single_device_leaves(tmp_path):
  store = opened(tmp_path)
  with jax.set_mesh(mesh_of(8)):
    store.save(10, make_state(10)._replace(params=placed(make_state(10).params, 8)), {})
    assert_same(store.restore(abstract(make_state(0)))[0], make_state(10))
  assert_same(
    checkpoint.load(tmp_path).tree["extra"], jax.tree.map(np.asarray, make_state(10).extra)
  )
  store.close()


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  store = opened(tmp_path)
  state = {"params": placed({"a": jnp.arange(1 << 20, dtype=jnp.float32)}, 8)}
  want = np.array(state["params"]["a"])
  store.save(10, state, {})
  overwrite = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
  for _ in range(3):
    state = overwrite(state)
  restored, _ = store.restore(abstract(state))
  np.testing.assert_array_equal(restored["params"]["a"], want)
  store.close()


def test_which_steps_are_kept(tmp_path, said):
  store = opened(tmp_path, said, keep=2, keep_every=30)
  scores = {10: 0.5, 20: np.float32(0.9), 40: 0.1, 50: float("nan")}
  for step in range(10, 81, 10):
    store.save(step, {"a": jnp.full(3, step)}, {}, score=scores.get(step))
  store.wait()
  names = sorted(int(p.name) for p in tmp_path.iterdir())
  assert names == store.steps() == [20, 30, 60, 70, 80]  # best, multiples of 30, latest two
  store.close()
  store = opened(tmp_path, keep_every=30)  # the best step is known again after a restart
  store.save(90, {"a": jnp.full(3, 90)}, {})
  store.close()
  assert store.steps() == [20, 30, 60, 80, 90] and checkpoint.best_step(tmp_path) == 20
  assert said == []


def test_never_fewer_than_two_are_kept(tmp_path, said):
  store = opened(tmp_path, said, keep=0)
  for step in (10, 20, 30):
    store.save(step, {"a": jnp.full(3, step)}, {})
  store.close()
  assert store.steps() == [20, 30]
  assert said == ["checkpoint.keep is 0: two are kept, one of them may be lost to a kill"]
  with pytest.raises(ValueError, match="checkpoint.every is -1"):
    checkpoint.open_checkpoints(tmp_path, every=-1)


def test_when_to_save(tmp_path):
  store = opened(tmp_path)
  assert [s for s in range(41) if store.should_save(s)] == [10, 20, 30, 40]
  store.save(10, {"a": jnp.ones(3)}, {})
  assert not store.should_save(10)
  store.close()
  store = checkpoint.open_checkpoints(tmp_path, every=0)
  assert not any(store.should_save(s) for s in range(41))
  store.close()


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in path.rglob("*") if p.is_file())


def truncate(path):
  data = [p for p in files_of(path / "20" / "state") if p.parent.name == "d"]
  assert data
  for file in data:  # all: some may be superseded by others, and never read
    os.truncate(file, file.stat().st_size // 2)


def truncate_manifest(path):
  os.truncate(path / "20" / "manifest" / "metadata", 100)


def empty_all(path):
  for file in files_of(path / "20"):
    os.truncate(file, 0)


def remove_data(path):
  shutil.rmtree(path / "20" / "state" / "ocdbt.process_0")


def remove_half(path):  # what a kill during the deletion of a step leaves
  for file in files_of(path / "20")[::2]:
    file.unlink()


def empty_folder(path):
  shutil.rmtree(path / "20")
  (path / "20").mkdir()


def change_meta(path):
  file = path / "20" / "manifest" / "metadata"
  file.write_text(file.read_text().replace('"meta": {"step": 20}', '"meta": {"step": 21}'))


def swap_state(path):  # readable, but of another step
  shutil.rmtree(path / "20" / "state")
  shutil.copytree(path / "10" / "state", path / "20" / "state")


DAMAGES = [
  truncate,
  truncate_manifest,
  empty_all,
  remove_data,
  remove_half,
  empty_folder,
  change_meta,
  swap_state,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_step_is_named_and_the_one_before_is_used(two_steps, tmp_path, said, damage):
  path = tmp_path / "checkpoints"
  shutil.copytree(two_steps, path)
  damage(path)
  loaded = checkpoint.load(tmp_path, log=said.append)
  assert loaded.step == 10 and loaded.meta == {"step": 10}
  store = opened(path, said)
  state, meta = store.restore(abstract(make_state(0)))
  assert_same(state, make_state(10))
  assert meta == {"step": 10}
  assert all(s.startswith("checkpoint of step 20 cannot be used: ") for s in said[:2])
  assert said[2].startswith(f"checkpoint of step 20 is damaged: moved to {path}") and said[3:] == []
  assert all("\n" not in line for line in said)
  # The resumed run comes to step 20 again and saves it.
  assert store.steps() == [10] and store.should_save(20)
  assert store.save(20, make_state(20), {"again": True})
  state, meta = store.restore(abstract(make_state(0)))
  assert_same(state, make_state(20))
  assert meta == {"again": True} and (path / "damaged_20").is_dir()
  store.close()


def test_every_flipped_byte_is_noticed_or_harmless(two_steps, tmp_path, said):
  """Some bytes carry nothing (times, padding): then the state must still be right to the bit."""
  want = {step: make_state(step) for step in (10, 20)}
  noticed = 0
  for file in files_of(two_steps / "20" / "state"):
    size = file.stat().st_size
    path = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(two_steps, path)
    target = path / file.relative_to(two_steps)
    content = bytearray(target.read_bytes())
    content[size // 2] ^= 0x10
    target.write_bytes(content)
    loaded = checkpoint.load(path, log=said.append)
    noticed += loaded.step == 10
    assert_same(loaded.tree["params"], jax.tree.map(np.asarray, want[loaded.step].params))
  assert noticed == len(said) >= 3


def test_values_that_changed_readably_are_noticed(tmp_path, said):
  """Orbax itself reads such a step without complaint: only the checksum tells."""
  state = make_state(20)
  changed = state._replace(params=state.params | {"half": -state.params["half"]})
  saved(tmp_path / "a")
  store = opened(tmp_path / "b")
  store.save(20, changed, {"step": 20})
  store.close()
  shutil.rmtree(tmp_path / "a" / "20" / "state")
  shutil.copytree(tmp_path / "b" / "20" / "state", tmp_path / "a" / "20" / "state")
  assert checkpoint.load(tmp_path / "a", log=said.append).step == 10
  assert said == [
    "checkpoint of step 20 cannot be used: ValueError: params/half changed on disk (checksum)"
  ]


def test_all_damaged_is_an_error_and_nothing_is_moved(two_steps, tmp_path, said):
  path = tmp_path / "checkpoints"
  shutil.copytree(two_steps, path)
  for step in ("10", "20"):
    shutil.rmtree(path / step / "state")
  store = opened(path, said)
  with pytest.raises(
    RuntimeError, match="every checkpoint in .* is damaged: step 20: .* step 10: "
  ):
    store.restore(abstract(make_state(0)))
  store.close()
  assert sorted(p.name for p in path.iterdir()) == ["10", "20"] and len(said) == 2


def test_another_model_is_not_taken_for_damage(two_steps):
  store = opened(two_steps)
  want = abstract(make_state(0))
  wide = want.params | {"half": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"step 20 .* has params/half as bfloat16\[8, 3\].*\[8, 4\]"):
    store.restore(want._replace(params=wide))
  less = {k: v for k, v in want.params.items() if k != "half"}
  with pytest.raises(ValueError, match="also has params/half"):
    store.restore(want._replace(params=less))
  with pytest.raises(ValueError, match="lacks params/new"):
    store.restore(want._replace(params=want.params | {"new": want.step}))
  assert store.steps() == [10, 20]
  store.close()


def test_load_gives_numpy_without_knowing_shardings(two_steps):
  params = checkpoint.load_params(two_steps)
  assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
  assert_same(params, jax.tree.map(np.asarray, make_state(20).params))
  loaded = checkpoint.load(two_steps.parent, step=10)  # a workdir will do too
  assert loaded.step == 10 and set(loaded.tree) == {"params", "extra"}
  assert_same(loaded.tree["extra"], jax.tree.map(np.asarray, make_state(10).extra))
  with pytest.raises(ValueError, match=r"no checkpoint of step 15 .*\[10, 20\]"):
    checkpoint.load(two_steps, step=15)


def test_load_says_where_it_found_nothing(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}"):
    checkpoint.load_params(tmp_path)


def test_a_save_that_fails_in_the_background_is_reported(tmp_path, monkeypatch):
  store = opened(tmp_path)
  store.save(10, {"a": jnp.ones(3)}, {})
  store.wait()

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", full)
    patch.setattr(os, "replace", full)
    store.save(20, {"a": jnp.ones(3)}, {})
    with pytest.raises(OSError, match="cannot write a checkpoint to .*No space left on device"):
      store.wait()
  assert store.steps() == [10]
  assert checkpoint.load(tmp_path, parts=("a",)).step == 10


# A child saves 10 and 20, begins 30 and dies of SIGKILL at the named place.
CHILD = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r}); sys.path.insert(0, {root!r} + "/tests")
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity, deleter
from ssljax import checkpoint
from test_checkpoint import make_state

place, path = sys.argv[1:]

def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)

def half(self, step):
  target = pathlib.Path(path) / str(step)
  files = sorted(p for p in target.rglob("*") if p.is_file())
  for file in files[::2]:
    file.unlink()
  die()

store = checkpoint.open_checkpoints(path, every=10, keep=2)
for step in (10, 20):
  store.save(step, make_state(step), dict(step=step))
store.wait()
hooks = dict(
  save_returned=None,
  arrays_written=(ocp.PyTreeCheckpointHandler, "finalize", die),
  before_rename=(atomicity.AtomicRenameTemporaryPath, "finalize", die),
  deleting_old=(deleter.StandardCheckpointDeleter, "delete", half),
)
if hooks[place]:
  setattr(*hooks[place])
store.save(30, make_state(30), dict(step=30))
if place == "save_returned":
  die()
store.close()
sys.exit("the hook was not reached")
"""

KILLS = {  # place -> steps that may be restored
  "save_returned": (20, 30),
  "arrays_written": (20,),
  "before_rename": (20,),
  "deleting_old": (30,),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, pathlib.Path]:
  """Workdirs of children killed at each place; the children run side by side."""
  root = tmp_path_factory.mktemp("killed")
  script = textwrap.dedent(CHILD.format(root=str(ROOT)))
  children = {}
  for place in KILLS:
    command = [sys.executable, "-c", script, place, str(root / place)]
    children[place] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  for place, child in children.items():
    _, errors = child.communicate()
    assert child.returncode == -9, (place, errors)
  return {place: root / place for place in KILLS}


@pytest.mark.parametrize("place", KILLS)
def test_kill_9_leaves_a_good_step(killed, place, said):
  path = killed[place]
  before = sorted(p.name for p in path.iterdir())
  if place in ("arrays_written", "before_rename"):
    assert any("tmp" in name for name in before), before  # a half-written step lies there
  store = opened(path, said)
  state, meta = store.restore(abstract(make_state(0)))
  step = int(state.step)
  assert step in KILLS[place] and meta == {"step": step}
  assert_same(state, make_state(step))
  for new in (40, 50):
    store.save(new, make_state(new), {"step": new})
  store.close()
  assert store.steps() == [40, 50] and said == []
  assert sorted(p.name for p in path.iterdir()) == ["40", "50"]  # the half-written step is gone
  assert json.loads((path / "50" / "manifest" / "metadata").read_text())["step"] == 50


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float16"])
def test_checksums_depend_on_bits_and_places_but_not_on_devices(dtype):
  x = np.random.default_rng(0).integers(0, 2, (16, 6)).astype(jnp.dtype(dtype))
  one = leaves.checksums({"x": x})["x"]
  for devices in (1, 2, 8):
    assert leaves.checksums(placed({"x": jnp.asarray(x)}, devices)) == {"x": one}
  changed = x.copy()
  changed[3, 2] = 1 - changed[3, 2]
  assert leaves.checksums({"x": changed})["x"] != one
  assert leaves.checksums({"x": x[::-1]})["x"] != one
  if dtype != "bool":
    assert leaves.checksums({"x": x + x.dtype.type(1)})["x"] != one


def test_checksums_are_stable_and_tell_negative_zero():
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  place = np.arange(6, dtype=np.uint32)
  flat = x.reshape(-1).view(np.uint32)
  want = "".join(
    f"{int(_mix(flat + _mix(place ^ np.uint32(seed))).sum(dtype=np.uint32)):08x}"
    for seed in (0x9E3779B9, 0x7F4A7C15)
  )
  assert leaves.checksums({"x": x}) == {"x": want}
  assert leaves.checksums({"x": x})["x"] != leaves.checksums({"x": np.where(x == 0, -x, x)})["x"]


def _mix(h):
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))


BIG = {"a": np.random.default_rng(0).integers(0, 255, 1 << 20).astype(np.uint8)}


@contextlib.contextmanager
def files_of_at_most(size: int):
  """The system refuses to write more into any file (of this process): "File too large"."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_to_its_end_is_reported(tmp_path):
  store = opened(tmp_path)
  store.save(10, BIG, {})
  store.wait()
  store.check()
  with files_of_at_most(100_000):
    with pytest.raises(OSError, match=f"cannot write a checkpoint to {tmp_path}: .*too large"):
      store.save(20, {"a": BIG["a"][::-1]}, {})
      store.wait()
  assert store.steps() == [10] and checkpoint.load(tmp_path, parts=("a",)).step == 10
  np.testing.assert_array_equal(checkpoint.load(tmp_path, parts=("a",)).tree["a"], BIG["a"])
  store.save(30, BIG, {})  # there is room again
  store.close()
  assert store.steps() == [10, 30]


FULL = """
import sys
sys.path.insert(0, {root!r}); sys.path.insert(0, {root!r} + "/tests")
from ssljax import checkpoint
from test_checkpoint import BIG

store = checkpoint.open_checkpoints(sys.argv[1], every=10, keep=2)
store.save(10, BIG, {{}})
store.wait()
try:
  store.save(20, dict(BIG, b=BIG["a"][::-1], c=BIG["a"] ^ 7), {{}})
  store.wait()
except OSError as error:
  print("said:", error)
found = checkpoint.load(sys.argv[1], parts=("a",))
print("step:", found.step, (found.tree["a"] == BIG["a"]).all())
"""


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_step_before_stays(tmp_path):
  """A real file system of 3 MB, in a name space of its own."""
  mount = ["unshare", "-Urm", "sh", "-c"]
  disk = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
  if shutil.which("unshare") is None or subprocess.run([*mount, disk]).returncode:
    pytest.skip("mounting is not allowed here")
  script = tmp_path.parent / "full.py"
  script.write_text(textwrap.dedent(FULL.format(root=str(ROOT))))
  command = f"{disk} && {sys.executable} {script} {tmp_path}/checkpoints"
  done = subprocess.run([*mount, command], capture_output=True, text=True)
  assert f"said: cannot write a checkpoint to {tmp_path}/checkpoints: " in done.stdout, done.stderr
  assert "No space left on device" in done.stdout
  assert "step: 10 True" in done.stdout
