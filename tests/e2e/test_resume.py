"""A calibration that is killed at any moment and taken up again ends with the same bytes."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

KILLS = 4


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> list[str]:
    """A calibration of a few hundred batches that keeps its state often, without its output."""
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "data.npz", input=rng.standard_normal((600, 3, 8, 8), dtype=np.float32))
    words = ["calibrate", tiny_model, "--data", tmp_path / "data.npz", "--checkpoint-every", 7, "--output"]
    return [sys.executable, "-m", "trt_int8", *map(str, words)]


def run_for(command: list[str], seconds: float, start_at: Path) -> bool:
    """Run a command and kill it with SIGKILL; return whether it ended by itself before.

    Args:
        command: what to run.
        seconds: how long it may go on after the file `start_at` is there (again).
        start_at: its checkpoint.
    """
    before = start_at.stat().st_mtime_ns if start_at.exists() else 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        for _ in range(12_000):  # until it has begun to count: two minutes on a machine that does much else
            if start_at.exists() and start_at.stat().st_mtime_ns != before:
                break
            try:
                assert child.wait(0.01) == 0
            except subprocess.TimeoutExpired:
                continue
            return True
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            return False
        return child.returncode == 0


def test_killed_again_and_again(command: list[str], tmp_path: Path):
    """SIGKILL while it counts, several times: what is left resumes, and the file is the one of an undisturbed run."""
    whole, output, part = (tmp_path / name for name in ("whole.npz", "c.npz", "c.part.npz"))
    started = time.perf_counter()
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    duration = time.perf_counter() - started
    rng = random.Random(20)
    killed = 0
    for _ in range(KILLS):
        killed += not run_for([*command, str(output), "--resume"], rng.uniform(0, 0.05 * duration), part)
        assert output.exists() or part.exists()

    done = subprocess.run([*command, str(output), "--resume"], check=True, capture_output=True, text=True)

    assert killed
    assert "going on from batch" in done.stderr or "kept" in done.stdout
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "data.npz", "tiny.onnx", "whole.npz"]


def test_killed_before_the_first_checkpoint(command: list[str], tmp_path: Path):
    """Without a state there is nothing to go on from: it starts from the beginning, and says so."""
    output = tmp_path / "c.npz"
    with subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        child.kill()
    done = subprocess.run([*command, str(output), "--resume"], check=True, capture_output=True, text=True)

    assert "there is no checkpoint" in done.stderr
    assert "600 batches" in done.stdout


def test_a_run_goes_on_inside_its_calibration(tiny_model: Path, tmp_path: Path):
    """SIGKILL in the calibration stage of `run`: with --resume it goes on from its state, to the same bytes."""
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "data.npz", input=rng.standard_normal((1000, 3, 8, 8), dtype=np.float32))
    (tmp_path / "c.yaml").write_text(
        f"""
model: {{source: {tiny_model.name}}}
data: {{calibration: data.npz}}
calibrate: {{checkpoint_every: 20, threads: 1}}
quantize: {{methods: [minmax], method: minmax, targets: [cpu], fp16: false}}
benchmark: {{rounds: 5, budget_s: 0.1, warmup_s: 0.01}}
accuracy: {{max_samples: 4}}
output: out
"""
    )
    words = [sys.executable, "-m", "trt_int8", "run", str(tmp_path / "c.yaml"), "--backend", "onnxruntime"]
    output = tmp_path / "out" / "calibration.npz"
    part = output.with_name("calibration.part.npz")

    ended = run_for(words, 0, part)
    left = part.exists()
    done = subprocess.run([*words, "--resume"], check=True, capture_output=True, text=True)
    alone = [*words[:3], "calibrate", str(tiny_model), "--data", str(tmp_path / "data.npz"), "--output"]
    subprocess.run([*alone, str(tmp_path / "whole.npz"), "--threads", "1"], check=True, capture_output=True)

    assert not ended
    assert left
    assert "going on from batch" in done.stderr
    assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not part.exists()
