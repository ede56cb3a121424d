"""training/schedule.py: linear warm-up, linear decay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from lora_ref.course.training.schedule import lr_factor


@given(st.integers(1, 60), st.data())
def test_it_rises_linearly_to_1_and_falls_linearly_towards_0(steps, data):
    warmup_steps = data.draw(st.integers(0, steps - 1))
    factors = [lr_factor(t, steps, warmup_steps) for t in range(steps)]
    up, down = factors[:warmup_steps], factors[warmup_steps:]
    assert up == pytest.approx([(i + 1) / warmup_steps for i in range(warmup_steps)])
    assert down == pytest.approx([1 - i / len(down) for i in range(len(down))])
    assert all(0 < factor <= 1 for factor in factors) and down[0] == 1.0


@pytest.mark.parametrize("steps, warmup_steps", [(9, 0), (9, 3), (40, 39), (1, 0)])
def test_after_the_warm_up_it_is_transformers_schedule(steps, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, steps)
    for t in range(steps):
        if t >= warmup_steps:
            assert lr_factor(t, steps, warmup_steps) == pytest.approx(schedule.get_last_lr()[0])
        else:  # theirs begins at 0
            assert lr_factor(t, steps, warmup_steps) == pytest.approx(schedule.get_last_lr()[0] + 1 / warmup_steps)
        optimizer.step()
        schedule.step()
