"""training: several processes, each with the same model (DDP) or with a share of it (FSDP2), are one run."""

import os
import signal
import socket

import pytest
import torch
from torch import nn

from lora_ref.course.training import train
from tests.course.training.small_models import assert_same, partial_loss, whole_run, without_dropout


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Sharding:
    """What accelerate's FSDP2 does, which it offers on GPUs alone: each layer's parameters in shares."""

    distributed_type, is_fsdp2, gradient_accumulation_steps, scaler = "FSDP", True, 1, None

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def __getattr__(self, name):
        return getattr(self.accelerator, name)

    def prepare(self, model, optimizer):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for part in (model[0], model[3], model):
            fully_shard(part, mesh=mesh)
        settings = {name: optimizer.param_groups[0][name] for name in ("lr", "betas", "weight_decay")}
        sharded = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
        sharded.optimizer = sharded  # accelerate wraps it
        return model, sharded

    def backward(self, value):
        value.backward()

    def clip_grad_norm_(self, parameters, clip):
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], clip)


def worker(rank, port, directory, job):
    """One of two processes. Process 1 is killed in step 5, or interrupted in step 3, and then both resume.

    What came out goes to a file of its own.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator, mine = Accelerator(cpu=True), [[0, 1], [2, 3]][rank]
    result = {"errors": [], "writes": [], "first": accelerator.is_main_process}
    replace = os.replace
    os.replace = lambda *files: (result["writes"].append(str(files[1])), replace(*files))

    def loss(model, t, part):
        if job == "killed" and rank == 1 and (t, part) == (5, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if job != "killed" and rank == 1 and (t, part) == (3, 0):
            os.kill(os.getpid(), signal.SIGINT)
        return partial_loss(model, t, mine[part::2])

    for _ in range(1 if job == "killed" else 2):
        model = without_dropout()
        try:
            history = train(
                model,
                loss,
                7,
                0.05,
                warmup_steps=2,
                eval_steps=2,
                evaluate=lambda model: model(torch.ones(1, 6)).sum().item(),
                checkpoint_path=directory / "run.pt",
                accelerator=Sharding(accelerator) if job == "sharded" else accelerator,
                gradient_accumulation_steps=2,
            )
            result |= {"losses": history.losses, "resumed": history.resumed_at, "evaluations": history.evaluations}
        except (RuntimeError, KeyboardInterrupt) as error:
            result["errors"].append(f"{type(error).__name__}: {error}")
    result["model"] = {name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in model.state_dict().items()}
    torch.save(result, directory / f"{job}{rank}.pt")
    if job == "killed":
        os._exit(1)  # the other one is gone: nobody to say good-bye to
    torch.distributed.destroy_process_group()


def two(directory, job):
    """What the two processes of a job left behind; None for one that left nothing."""
    context = torch.multiprocessing.get_context("spawn")
    port = free_port()
    processes = [context.Process(target=worker, args=(rank, port, directory, job)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(300)
            assert process.exitcode is not None, f"a process of {job!r} hangs"
    finally:
        for process in processes:
            process.kill()
    files = [directory / f"{job}{rank}.pt" for rank in (0, 1)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def filled(state):
    model = without_dropout()
    model.load_state_dict(state)
    return model


def test_a_killed_process_ends_the_run_with_a_message_and_a_checkpoint_that_resumes(tmp_path):
    expected, history = whole_run()
    first, second = two(tmp_path, "killed")
    assert second is None
    [error] = first["errors"]
    assert "RuntimeError: another process of this run has died at step 5 of 7" in error
    assert f"{tmp_path / 'run.pt'} holds the run as it was after step 4" in error
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 4
    alone = without_dropout()
    found = train(  # one process instead of two: the same run
        alone,
        lambda model, t: partial_loss(model, t, [0, 1, 2, 3]),
        7,
        0.05,
        warmup_steps=2,
        checkpoint_path=tmp_path / "run.pt",
    )
    assert found.resumed_at == 4 and found.losses == pytest.approx(history.losses, rel=1e-5)
    assert_same(alone, expected)


@pytest.mark.parametrize("job", ["copied", "sharded"])
def test_two_processes_stop_together_resume_and_end_as_one_process_does_and_one_of_them_writes(tmp_path, job):
    """Their tokens are unequal: see COUNTS. Copied (DDP) or sharded (FSDP), the checkpoint is whole, and the same."""
    expected, history = whole_run(eval_steps=2, evaluate=lambda model: model(torch.ones(1, 6)).sum().item())
    first, second = two(tmp_path, job)
    for result in (first, second):
        [error] = result["errors"]
        assert "KeyboardInterrupt: stopped after step 4 of 7" in error and result["resumed"] == 4
    assert first["losses"] == pytest.approx(history.losses, rel=1e-5) and first["losses"] == second["losses"]
    for (step, value), (expected_step, expected_value) in zip(first["evaluations"], history.evaluations, strict=True):
        assert step == expected_step and value == pytest.approx(expected_value, rel=1e-4, abs=1e-6)
    assert_same(filled(first["model"]), expected)
    assert all(torch.equal(a, b) for a, b in zip(first["model"].values(), second["model"].values(), strict=True))
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert {name: p.shape for name, p in saved["model"].items()} == {
        name: p.shape for name, p in expected.named_parameters() if p.requires_grad
    }
    assert first["first"] and not second["first"]
    assert set(first["writes"]) == {str(tmp_path / "run.pt")} and second["writes"] == []
