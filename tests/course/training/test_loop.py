"""training: what one run of `train` computes, and what it refuses."""

import os
import signal
import socket
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_ref.course.training import train

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def regression(seed=0, frozen=False):
    """A model with dropout, and the loss of step t on data that depend on t alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(not frozen)

    def loss(model, t):
        x = randn(16, 6, seed=100 + t, dtype=torch.float32)
        return (model(x) - x[:, :3].sin()).square().mean()

    return model, loss


def test_train_is_adamw_with_warm_up_linear_decay_and_clipping():
    (model, loss), (twin, _) = regression(), regression()
    steps, rate, warmup = 9, 0.02, 3
    torch.manual_seed(5)
    history = train(
        model, loss, steps, rate, warmup_steps=warmup, weight_decay=0.1, betas=(0.8, 0.95), max_grad_norm=0.3
    )
    torch.manual_seed(5)
    optimizer, losses = torch.optim.AdamW(twin.parameters(), lr=1.0, weight_decay=0.1, betas=(0.8, 0.95)), []
    for t, share in enumerate([1 / 3, 2 / 3, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]):
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.zero_grad()
        value = loss(twin, t)
        value.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        optimizer.step()
        losses.append(value.item())
    assert history.losses == losses and history.resumed_at == 0
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("killed_at", [1, 4, 5, 9])
def test_a_run_that_was_killed_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, killed_at):
    class Killed(Exception):
        pass

    def run(model, loss, **options):
        return train(
            model,
            loss,
            10,
            0.05,
            warmup_steps=2,
            eval_steps=2,
            evaluate=lambda m: m(torch.ones(1, 6)).sum().item(),
            **options,
        )

    torch.manual_seed(3)
    whole, loss = regression(frozen=True)
    expected = run(whole, loss)
    torch.manual_seed(3)
    model, loss = regression(frozen=True)

    def dies(model, t):
        if t == killed_at:
            raise Killed
        return loss(model, t)

    with pytest.raises(Killed):
        run(model, dies, checkpoint_path=tmp_path / "run.pt")
    torch.manual_seed(99)  # another process: another generator, another start of what is trained
    again, loss = regression(frozen=True)
    with torch.no_grad():
        again[3].weight.normal_()
    history = run(again, loss, checkpoint_path=tmp_path / "run.pt")
    assert history.resumed_at == killed_at // 2 * 2
    assert history.losses == expected.losses and history.evaluations == expected.evaluations
    for mine, theirs in zip(again.parameters(), whole.parameters()):
        assert torch.equal(mine, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    done = run(regression(frozen=True)[0], dies, checkpoint_path=tmp_path / "run.pt")
    assert done.resumed_at == 10 and done.losses == expected.losses


def test_the_checkpoint_holds_what_is_trained_only_and_belongs_to_its_run(tmp_path, refused):
    model, loss = regression(frozen=True)
    train(model, loss, 4, 0.05, checkpoint_path=tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert list(saved["model"]) == ["3.weight", "3.bias"] and len(saved["optimizer"]["state"]) == 2
    before = [p.clone() for p in model.parameters()]
    refused(lambda: train(model, loss, 5, 0.05, checkpoint_path=tmp_path / "run.pt"), "another run", "steps")
    refused(lambda: train(model.requires_grad_(True), loss, 4, 0.05, checkpoint_path=tmp_path / "run.pt"), "trained")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_evaluating_changes_nothing_and_sees_eval_mode_without_gradients():
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return torch.rand(()).item()  # draws from the global generator

    torch.manual_seed(1)
    (model, loss), (twin, _) = regression(), regression()
    plain = train(model, loss, 5, 0.05)
    torch.manual_seed(1)
    watched = train(twin, loss, 5, 0.05, evaluate=evaluate, eval_steps=2)
    assert plain.losses == watched.losses and [step for step, _ in watched.evaluations] == [0, 2, 4, 5]
    assert seen == [(False, False)] * 4 and twin.training


def test_groups_have_rates_of_their_own():
    model, loss = regression()
    model[1].p = 0.0
    before = [p.clone() for p in model.parameters()]
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.0, "weight_decay": 0.0},
        {"params": list(model[3].parameters())},
    ]
    train(model, loss, 3, 0.05, param_groups=groups)
    assert [torch.equal(a, b) for a, b in zip(before, model.parameters())] == [True, True, False, False]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model, loss = regression()
    explodes = lambda model, t: loss(model, t) * (float("nan") if t == 3 else 1)  # noqa: E731
    with pytest.raises(FloatingPointError, match="nan at step 3; lower lr \\(0.05\\) or max_grad_norm \\(1.0\\)"):
        train(model, explodes, 6, 0.05, eval_steps=2, checkpoint_path=tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bad_runs_are_refused(refused):
    model, loss = regression()
    refused(lambda: train(model, loss, 0, 0.1), "steps = 0")
    refused(lambda: train(model, loss, 3, 0.1, warmup_steps=3), "warmup_steps = 3")
    refused(lambda: train(model, loss, 3, float("inf")), "lr = inf")
    refused(lambda: train(model, loss, 3, 0.1, eval_steps=0), "eval_steps = 0")
    refused(lambda: train(model.requires_grad_(False), loss, 3, 0.1), "trains nothing", "requires_grad_(True)")


# ---------------------------------------------------------------- one run, in parts and in several processes

COUNTS = [1, 5, 2, 4]  # tokens of the four rows of a step: a mean of rows' means is not the mean over tokens


def shared(model, t, mine):
    """The share of the loss of step t that these rows have: their tokens' losses over all rows' tokens."""
    total = 0.0
    for row in mine:
        x = randn(COUNTS[row], 6, seed=1000 * t + row, dtype=torch.float32)
        total = total + (row + 1) * (model(x) - x[:, :3].sin()).square().sum()
    return total / sum(COUNTS)


def plain():
    """A model without dropout, one layer of it frozen."""
    model, _ = regression()
    model[1].p = 0.0
    model[0].weight.requires_grad_(False)
    return model


def whole_run(**options):
    model = plain()
    history = train(model, lambda model, t: shared(model, t, [0, 1, 2, 3]), 7, 0.05, warmup_steps=2, **options)
    return model, history


def same(mine, theirs, rtol=1e-5):
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_that_add_up_give_the_whole_steps_gradients_and_losses(accumulate):
    expected, history = whole_run()
    model, calls = plain(), []

    def parts(model, t, part):
        calls.append((t, part))
        return shared(model, t, [0, 1, 2, 3][part::accumulate])

    found = train(model, parts, 7, 0.05, warmup_steps=2, gradient_accumulation_steps=accumulate)
    assert calls == [(t, part) for t in range(7) for part in range(accumulate)]
    assert found.losses == pytest.approx(history.losses, rel=1e-5)
    same(model, expected)


def test_an_accelerator_of_one_process_changes_nothing():
    from accelerate import Accelerator

    expected, history = whole_run()
    model = plain()
    found = train(
        model,
        lambda model, t: shared(model, t, [0, 1, 2, 3]),
        7,
        0.05,
        warmup_steps=2,
        accelerator=Accelerator(cpu=True),
    )
    assert found.losses == history.losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


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
    """One of two processes. Process 1 is killed in step 5, or interrupted in step 3, and then both go on.

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
        return shared(model, t, mine[part::2])

    for _ in range(1 if job == "killed" else 2):
        model = plain()
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
    model = plain()
    model.load_state_dict(state)
    return model


def test_a_killed_process_ends_the_run_with_a_message_and_a_checkpoint_that_goes_on(tmp_path):
    expected, history = whole_run()
    first, second = two(tmp_path, "killed")
    assert second is None
    [error] = first["errors"]
    assert "RuntimeError: another process of this run has died at step 5 of 7" in error
    assert f"{tmp_path / 'run.pt'} holds the run as it was after step 4" in error
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 4
    alone = plain()
    found = train(  # one process instead of two: the same run
        alone,
        lambda model, t: shared(model, t, [0, 1, 2, 3]),
        7,
        0.05,
        warmup_steps=2,
        checkpoint_path=tmp_path / "run.pt",
    )
    assert found.resumed_at == 4 and found.losses == pytest.approx(history.losses, rel=1e-5)
    same(alone, expected)


@pytest.mark.parametrize("job", ["copied", "sharded"])
def test_two_processes_agree_where_to_stop_go_on_and_end_as_one_process_does_and_one_of_them_writes(tmp_path, job):
    """Their tokens are unequal: see COUNTS. Copied (DDP) or sharded (FSDP), the checkpoint is whole, and the same."""
    expected, history = whole_run(eval_steps=2, evaluate=lambda model: model(torch.ones(1, 6)).sum().item())
    first, second = two(tmp_path, job)
    for result in (first, second):
        [error] = result["errors"]
        assert "KeyboardInterrupt: stopped after step 4 of 7" in error and result["resumed"] == 4
    assert first["losses"] == pytest.approx(history.losses, rel=1e-5) and first["losses"] == second["losses"]
    for (step, value), (expected_step, expected_value) in zip(first["evaluations"], history.evaluations, strict=True):
        assert step == expected_step and value == pytest.approx(expected_value, rel=1e-4, abs=1e-6)
    same(filled(first["model"]), expected)
    assert all(torch.equal(a, b) for a, b in zip(first["model"].values(), second["model"].values()))
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert {name: p.shape for name, p in saved["model"].items()} == {
        name: p.shape for name, p in expected.named_parameters() if p.requires_grad
    }
    assert first["first"] and not second["first"]
    assert set(first["writes"]) == {str(tmp_path / "run.pt")} and second["writes"] == []


# what goes wrong in a run


def test_an_interrupt_saves_says_how_to_go_on_and_the_run_ends_bit_for_bit_the_same(tmp_path):
    def run(model, loss):
        return train(
            model,
            loss,
            9,
            0.05,
            eval_steps=4,
            evaluate=lambda m: m(torch.ones(1, 6)).sum().item(),
            checkpoint_path=tmp_path / f"{id(model)}.pt" if model is whole else tmp_path / "run.pt",
        )

    torch.manual_seed(3)
    whole, loss = regression()
    expected = run(whole, loss)
    torch.manual_seed(3)
    model, loss = regression()

    def interrupted(model, t):
        if t == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, t)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 6 of 9; .*run.pt holds the run.* resumes"):
        run(model, interrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(77)
    again, loss = regression()
    found = run(again, loss)
    assert found.resumed_at == 6 and found.losses == expected.losses and found.evaluations == expected.evaluations
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))


@pytest.mark.parametrize("stops", [False, True])
def test_the_bar_leaves_nothing_behind_and_calls_the_processs_memory_so(tmp_path, capsys, stops):
    model, loss = regression()

    def slow(model, t):
        time.sleep(0.02)  # or the bar is not drawn anew
        if stops and t == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, t)

    with pytest.raises(KeyboardInterrupt) if stops else nullcontext():
        train(model, slow, 12, 0.05, checkpoint_path=tmp_path / "run.pt", tokens_per_step=5, progress=True)
    shown = capsys.readouterr().err.split("\r")
    assert any(f"{n}/12" in line and "process=" in line and "GB" in line for line in shown for n in (10, 11, 12))
    assert not any("memory=" in line for line in shown) and shown[-1].strip() == "", shown[-1]


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
    kept = []

    def full(model, t):
        if t == 3:
            kept.append((tmp_path / "run.pt").read_bytes())
            raise error
        return loss(model, t)

    with pytest.raises(MemoryError, match="out of memory at step 3: take fewer .*run.pt holds .* after step 2") as said:
        train(model, full, 6, 0.05, eval_steps=2, checkpoint_path=tmp_path / "run.pt")
    assert "raise gradient_accumulation_steps" in str(said.value) and str(error)[:20] in str(said.value)
    assert (tmp_path / "run.pt").read_bytes() == kept[0] and os.listdir(tmp_path) == ["run.pt"]
    assert train(model, loss, 6, 0.05, eval_steps=2, checkpoint_path=tmp_path / "run.pt").resumed_at == 2


def test_an_error_of_the_loss_itself_stays_what_it_is():
    model, _ = regression()
    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        train(model, lambda model, t: model(torch.ones(2, 7)).sum(), 3, 0.05)


def test_the_optimizer_holds_what_is_trained_and_nothing_of_what_is_frozen(tmp_path):
    model, loss = regression(frozen=True)
    train(model, loss, 2, 0.05, checkpoint_path=tmp_path / "run.pt", memory_step=1)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert [len(group["params"]) for group in saved["optimizer"]["param_groups"]] == [2]
    assert all(p.grad is None for p in model.parameters())
    numbers = 8 * 3 + 3
    assert saved["memory"]["optimizer"] == 2 * 4 * numbers + 2 * 4  # two moments a number, a count a tensor


def test_the_measured_step_gives_the_bytes_and_changes_no_bit(tmp_path):
    torch.manual_seed(1)
    model, loss = regression(frozen=True)
    history = train(model, loss, 4, 0.05, memory_step=2)
    torch.manual_seed(1)
    twin, loss = regression(frozen=True)
    assert train(twin, loss, 4, 0.05).losses == history.losses
    memory = history.memory
    assert memory["weights"] == 4 * (6 * 8 + 8 + 8 * 3 + 3) and memory["gradients"] == 4 * (8 * 3 + 3)
    rows = 4 * 16 * (6 + 8)  # the input in, and the tanh out, at the least
    assert memory["peak"] > memory["weights"] + memory["optimizer"] + memory["gradients"] + rows
    assert len(history.step_seconds) == 4 and 0 < sum(history.step_seconds) < history.seconds


def test_the_peak_counts_what_is_held_before_the_measured_step(monkeypatch):
    from lora_ref.course.training import state as running

    monkeypatch.setattr(running, "peak_bytes", lambda function, device: (function(), 10**6)[1])
    model, loss = regression(frozen=True)
    memory = train(model, loss, 3, 0.05, memory_step=1).memory
    assert memory["peak"] == memory["weights"] + memory["optimizer"] + 10**6


def test_more_bad_runs_are_refused(refused):
    model, loss = regression()
    refused(lambda: train(model, loss, 3, 0.1, gradient_accumulation_steps=0), "gradient_accumulation_steps = 0")
