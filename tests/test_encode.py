"""Features of a source: every row there, in order, with what could not be read marked and named."""

import numpy as np
import pytest
import tiny

from ssljax import encode as encode_lib
from ssljax import load, tables, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train.run(tiny.config(total_steps=3), workdir)
  return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two classes of pictures of several sizes, two of them broken."""
  image = pytest.importorskip("PIL.Image")
  root = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for i in range(11):
    name = root / ("even" if i % 2 == 0 else "odd") / f"{i:02d}.png"
    name.parent.mkdir(exist_ok=True)
    if i in (3, 8):
      name.write_bytes(b"" if i == 3 else b"\x89PNG\r\n\x1a\n broken")
      continue
    size = (40 + i, 36 + 2 * i, 3)
    image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(name)
  return root


@pytest.mark.parametrize("batch_size", [8, 64])
def test_npz_of_arrays_holds_what_encode_gives(run, tmp_path, batch_size):
  source = tiny.images(21)
  out = tmp_path / "features.npz"
  damaged = encode_lib.encode(
    run, source, out, patches=True, layers=(0, -1), batch_size=batch_size, log=lambda line: None
  )
  assert damaged == {}
  opened = load.load(run)
  want = opened.method.encode(opened.params, opened.extra, source, layers=(0, 1))
  with np.load(out, allow_pickle=False) as found:
    assert set(found) == {
      "pooled", "cls", "patches", "layer_0", "layer_1", "index", "name", "readable", "error",
      "label",
    }  # fmt: skip
    for key in ("pooled", "cls", "patches", "layer_0", "layer_1"):
      assert found[key].dtype == np.float32
      np.testing.assert_allclose(found[key], want[key], atol=2e-5)
    np.testing.assert_array_equal(found["index"], np.arange(21))
    np.testing.assert_array_equal(found["label"], source["label"])
    assert found["readable"].all() and not any(found["error"])
    assert len(set(found["name"])) == 21
  assert [p.name for p in tmp_path.iterdir()] == ["features.npz"]


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_a_folder_with_broken_files(run, folder, tmp_path, kind, capsys):
  out = tmp_path / f"features.{kind}"
  code = encode_lib.main([f"--workdir={run}", f"--source=folder:{folder}", f"--out={out}"])
  said = capsys.readouterr().out
  assert code == 0 and "2 images could not be read" in said and "odd/03.png" in said
  if kind == "npz":
    found = dict(np.load(out, allow_pickle=False))
  else:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(out)
    found = {name: np.array(table[name].to_pylist()) for name in table.column_names}
  assert found["pooled"].shape == (11, 32)
  broken = ["even/08.png", "odd/03.png"]
  assert sorted(found["name"][~found["readable"]]) == broken
  assert all(found["error"][~found["readable"]]) and not any(found["error"][found["readable"]])
  assert np.isnan(found["pooled"][~found["readable"]]).all()
  assert np.isfinite(found["pooled"][found["readable"]]).all()
  assert [name.startswith("odd") for name in found["name"]] == list(found["label"] == 1)
  assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_parquet_keeps_patches_as_rows_of_known_shape(run, tmp_path):
  parquet = pytest.importorskip("pyarrow.parquet")
  out = tmp_path / "features.parquet"
  source = tiny.images(9)
  encode_lib.encode(run, source, out, patches=True, batch_size=8, log=lambda line: None)
  opened = load.load(run)
  want = opened.method.encode(opened.params, opened.extra, source)["patches"]
  table = parquet.read_table(out)
  assert table.schema.field("patches").metadata == {b"shape": b"[64, 32]"}
  got = np.array(table["patches"].to_pylist(), np.float32).reshape(9, 64, 32)
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
  "changes, message",
  [
    (["--layers=5"], "--layers 5: the encoder has blocks 0 to 1"),
    (["--batch_size=0"], "--batch_size 0 must be at least 1"),
    (["--out=features.csv"], "written as .npz or .parquet"),
    (["--source=digitz"], "digits"),
    (["--source=folder:/nowhere"], "/nowhere"),
    (["--workdir=/nowhere"], "no config.json"),
  ],
)
def test_errors_are_one_line(run, tmp_path, changes, message, capsys):
  given = [f"--workdir={run}", "--source=digits", f"--out={tmp_path / 'x.npz'}"]
  assert encode_lib.main([*given, *changes]) == 1
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_tables_grow_by_batches_and_vanish_on_failure(tmp_path, kind, monkeypatch):
  if kind == "parquet":
    pytest.importorskip("pyarrow")
  monkeypatch.setattr(tables, "ROW_GROUP", 1)  # a row group a batch
  out = tmp_path / f"x.{kind}"
  rng = np.random.default_rng(0)
  rows = [
    {
      "z": rng.normal(size=(k, 3)).astype(np.float32),
      "index": np.arange(k),
      "name": [f"é {i}\n" for i in range(k)],
    }
    for k in (4, 1)
  ]
  with pytest.raises(RuntimeError), tables.open_table(out, 5) as table:
    table.add(rows[0])
    raise RuntimeError
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="5 rows and got 4"), tables.open_table(out, 5) as table:
    table.add(rows[0])
  assert not list(tmp_path.iterdir())
  with tables.open_table(out, 5) as table:
    for part in rows:
      table.add(part)
  if kind == "npz":
    found = np.load(out, allow_pickle=False)
    assert found["name"][3].startswith("é 3")
    np.testing.assert_array_equal(found["z"], np.concatenate([part["z"] for part in rows]))
  else:
    import pyarrow.parquet

    assert pyarrow.parquet.ParquetFile(out).num_row_groups == 2


@pytest.mark.parametrize("method", ["simclr_vit", "moco"])
def test_a_run_of_two_views_is_loaded_and_encodes(tmp_path, method):
  """Empty parts of its state (a ViT has no batch statistics) are in no checkpoint."""
  config = tiny.config(method, total_steps=3, mesh=dict(devices=1))
  train.run(config, tmp_path)
  run = load.load(tmp_path)
  images = tiny.images(4)["image"]
  out = run.method.encode(run.params, run.extra, {"image": images})
  assert out["pooled"].shape == (4, 32) and np.isfinite(out["pooled"]).all()
