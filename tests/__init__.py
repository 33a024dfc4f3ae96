# SPDX-License-Identifier: MIT
"""The tests, a file a chapter; see README.md beside this file."""

import pytest

pytest.register_assert_rewrite("tests.support")
