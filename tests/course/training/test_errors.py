"""training/errors.py: errors of the system say what to do; interrupts let a step end first."""

import os
import signal

import pytest
import torch

from lora_ref.course.training import train
from lora_ref.course.training.errors import out_of_memory, process_lost, reason
from tests.course.training.small_models import regression


def test_without_a_checkpoint_an_interrupt_is_one_and_so_is_the_second():
    model, loss = regression()

    def interrupted(model, t):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(model, t)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(model, interrupted, 3, 0.05)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory: 9")],
)
def test_out_of_memory_says_what_to_lower_and_leaves_the_checkpoint_as_it_was(tmp_path, error):
    model, loss = regression()
    contents = []

    def full(model, t):
        if t == 3:
            contents.append((tmp_path / "run.pt").read_bytes())
            raise error
        return loss(model, t)

    with pytest.raises(
        MemoryError, match="out of memory at step 3: take fewer .*run.pt holds .* after step 2"
    ) as raised:
        train(model, full, 6, 0.05, eval_steps=2, checkpoint_path=tmp_path / "run.pt")
    assert "raise gradient_accumulation_steps" in str(raised.value) and str(error)[:20] in str(raised.value)
    assert (tmp_path / "run.pt").read_bytes() == contents[0] and os.listdir(tmp_path) == ["run.pt"]
    assert train(model, loss, 6, 0.05, eval_steps=2, checkpoint_path=tmp_path / "run.pt").resumed_at == 2


def test_an_error_of_the_loss_itself_stays_what_it_is():
    model, _ = regression()
    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        train(model, lambda model, t: model(torch.ones(2, 7)).sum(), 3, 0.05)


@pytest.mark.parametrize(
    "error, memory, lost",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True, False),
        (torch.distributed.DistBackendError("unhandled system error"), False, True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), False, True),
        (RuntimeError("NCCL communicator was aborted"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x7 and 6x8)"), False, False),
        (RuntimeError("a fault\nwhose second line says: can't allocate memory, Connection"), False, False),
    ],
)
def test_errors_are_recognised_by_their_type_or_first_line(error, memory, lost):
    assert out_of_memory(error) is memory and process_lost(error) is lost


def test_a_reason_is_one_line_of_at_most_200_characters():
    assert reason(ValueError("\n  first line\nsecond")) == "first line"
    assert reason(ValueError("x" * 300)) == "x" * 200 and reason(ValueError()) == ""
