import pytest

pytest.register_assert_rewrite("tests.cost.steps")  # its assertions then say what differed
