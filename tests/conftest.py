"""Eight fake CPU devices and a compile cache for every test; both must be set before jax starts."""

import os
import pathlib

_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
  # Optimisation level 0 halves the compile time of the CPU backend; numbers stay the same to 1e-6.
  _flags += " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  os.environ["XLA_FLAGS"] = _flags.strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
_cache = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
  """The folder of real test data; tests that need it skip with a reason where it is absent."""
  folder = pathlib.Path(os.environ.get("SSLJAX_TEST_DATA", ROOT / ".." / "shared" / "data"))
  if not folder.is_dir():
    pytest.skip(f"no real test data at {folder}; set SSLJAX_TEST_DATA")
  return folder


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Compiled programs go with the file that made them: a worker otherwise grows to 6 GiB."""
  yield
  import jax

  jax.clear_caches()


# Files that take longest, first: at the end of a run nobody should wait for one of them.
LONG = (
  "test_processes", "test_notebook", "test_methods", "test_on_device", "test_resume",
  "test_evaluate", "test_plan", "test_losses_table", "test_blocked", "test_main", "test_sharding",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  place = {name: number for number, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
