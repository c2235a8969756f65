"""Commands most users never need; each file can be deleted on its own. Run one as python -m tools.NAME."""
