"""What all tests share: repeatable properties, one thread, and how a refusal is checked."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# Small matrices gain nothing from threads. The examples are the same in every run.
torch.set_num_threads(1)
settings.register_profile(
    "lora_ref",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lora_ref")


@pytest.fixture
def refused():
    """refused(call, *says): the call raises TypeError or ValueError, and its message says all of this."""

    def check(call, *says):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        for part in says:
            assert part in str(error.value), f"{part!r} is not in: {error.value}"

    return check


@pytest.fixture
def rng_untouched():
    """The test must leave torch's global generator as it found it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
