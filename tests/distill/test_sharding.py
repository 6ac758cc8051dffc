"""One student on one, two and four processes: whole or in shards, stopped and resumed on another number, restarted."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
STEPS = 50
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}


def command(folder: Path, *more: str, steps: int = STEPS, processes: int = 1, restarts: int = 0) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    torchrun += ["--max-restarts", str(restarts)]
    folder.mkdir(exist_ok=True)
    runner = [str(HERE / "runner.py"), str(folder), str(steps), *more]
    return [sys.executable, *(torchrun if processes > 1 else []), *runner]


def run(folder: Path, *more: str, **how: int) -> str:
    done = subprocess.run(command(folder, *more, **how), env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The student trained in one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, "log_every=1", "checkpoint_every=1000")
    return folder


def check_same(folder: Path, alone: Path, *, tolerance: float = 1e-5, rows: int = STEPS) -> None:
    """Equal weights, and an equal loss at every step, but for the order of sums; with no tolerance, bit for bit."""
    a, b = load_file(alone / "final.safetensors"), load_file(folder / "final.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=10 * tolerance, atol=tolerance)
    expected, found = (json.loads((place / "curve.json").read_text()) for place in (alone, folder))
    assert found == pytest.approx(expected, rel=tolerance, abs=0)
    assert len(found) == rows


def test_a_first_process_that_is_late_to_make_a_checkpoints_folder_is_waited_for(tmp_path):
    run(tmp_path, "late_first=0.3", processes=2, steps=4)
    assert list((tmp_path / "checkpoints").glob("step-*"))


def test_two_processes_each_with_the_whole_student(alone, tmp_path):
    run(tmp_path, "log_every=1", "micro_batch_tokens=32", processes=2)
    check_same(tmp_path, alone)


def test_in_shards_on_two_processes_then_on_one_or_four(alone, tmp_path):
    two = tmp_path / "two"
    told = run(two, "log_every=1", "stop_at=29", "parallel=fsdp", processes=2)
    assert "stopped at step 30 of 50" in told
    written = {path.name: path.stat().st_size for path in (two / "checkpoints/step-000000030").glob("*.distcp")}
    assert written.keys() == {"__0_0.distcp", "__1_0.distcp"}
    assert max(written.values()) < 2 * min(written.values())
    for processes, more in ((1, ()), (4, ("parallel=hsdp", "shard_size=2", "activation_checkpointing=true"))):
        folder = tmp_path / str(processes)
        shutil.copytree(two, folder)
        run(folder, "log_every=1", *more, processes=processes)
        check_same(folder, alone)


def test_a_killed_process_is_restarted_and_resumes_by_itself(alone, tmp_path):
    run(tmp_path, "log_every=1", "kill_at=9", "checkpoint_every=0.01", processes=2, restarts=2)
    assert (tmp_path / "kill_at-1").read_text() == "sent"
    check_same(tmp_path, alone)


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(1, "ddp"), pytest.param(2, "ddp", marks=pytest.mark.slow), pytest.param(2, "fsdp", marks=pytest.mark.slow)],
)
def test_a_checkpoint_written_beside_the_training_is_that_of_its_step(alone, tmp_path, processes, parallel):
    more = ("log_every=1", f"parallel={parallel}")
    run(tmp_path, *more, "stop_at=29", "checkpoint_every=0.01", "async_checkpoints=true", processes=processes)
    run(tmp_path, "log_every=1")
    check_same(tmp_path, alone, tolerance=0 if processes == 1 else 1e-5)


def test_offloading_the_teacher_needs_shards(tmp_path):
    with pytest.raises(AssertionError, match=r"teacher_offload = true needs distill\.parallel = fsdp"):
        run(tmp_path, "teacher_offload=true")
    run(tmp_path, "teacher_offload=true", "parallel=fsdp", processes=2)


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(alone, tmp_path):
    run(tmp_path, "log_every=1", "compile=true", "checkpoint_every=1000")
    check_same(tmp_path, alone)


def newest_checkpoint(folder: Path) -> str:
    """The name of the newest checkpoint; names sort by step."""
    return max((path.name for path in (folder / "checkpoints").glob("step-*")), default="")


def signal_all(process: subprocess.Popen, number: int) -> None:
    """SIGKILL to the process and all below it, as when a machine dies; SIGTERM to the process, as a scheduler does."""
    family = psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else []
    process.send_signal(number)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("parallel", "kills", "stops", "steps"), [("alone", 14, 4, 12_000), ("ddp", 8, 3, 1_500), ("fsdp", 8, 3, 1_000)]
)
def test_killed_and_stopped_at_random_moments(tmp_path, parallel, kills, stops, steps):
    """Nothing is lost but the steps since the last checkpoint; the sums of two processes have only one order."""
    rng = random.Random(11)
    processes, more = (1, []) if parallel == "alone" else (2, [f"parallel={parallel}"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, "log_every=50", "checkpoint_every=1000", *more, steps=steps, processes=processes)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    rng.shuffle(signals)
    for number in signals:
        before = newest_checkpoint(broken)
        words = command(broken, "log_every=50", *more, steps=steps, processes=processes)
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while newest_checkpoint(broken) <= before:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.4))
        reached = newest_checkpoint(broken)
        signal_all(process, number)
        process.wait(60)
        assert newest_checkpoint(broken) >= reached
    run(broken, "log_every=50", "checkpoint_every=1000", *more, steps=steps, processes=processes)
    check_same(broken, whole, tolerance=0, rows=steps // 50)
