"""Makes the shared helpers importable from every test folder."""

import pytest

pytest.register_assert_rewrite("tests.tiny")
