"""Generated pages are what the generator writes now."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_losses_page_is_up_to_date_and_complete():
  spec = importlib.util.spec_from_file_location("make_losses", ROOT / "docs" / "make_losses.py")
  make_losses = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make_losses)
  page = (ROOT / "docs" / "losses.md").read_text()
  assert page == make_losses.page(), "run python docs/make_losses.py"
