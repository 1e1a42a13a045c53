"""Its place makes `tests/` importable: tests in any folder share `reference.py`."""
