"""The small sets and pictures of the data tests."""

from tests.data.conftest import class_folders, encoded, make_set, picture

__all__ = ["class_folders", "encoded", "make_set", "picture"]
