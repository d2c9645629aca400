"""Pictures of a run: pure functions from arrays to PNG files, and the HTML report."""
