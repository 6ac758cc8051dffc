"""A simulated cluster on a real PostgreSQL: nodes that are killed, a server that crashes, and nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from capgap.study import Family, Queue, read_records, run_study, trials_of
from capgap.study.queue import RECORDS
from study.small import study

WORKERS, KILLS = 6, 15
# 2 members and 58 short students.
SIXTY = {
    "seeds": list(range(29)),
    "retries": 0,
    "distill": {"tokens_per_step": 512, "tokens": 10_240, "lr": 5e-3, "evaluations": 2, "checkpoint_every": 0.2},
}
# One thread, as sums are rounded otherwise with another number of threads.
_NODE = "import torch; torch.set_num_threads(1); from capgap.cli.app import main; main()"


class Cluster:
    """Nodes of one worker each, started anew when they are killed."""

    def __init__(self, folder: Path, url: str):
        command = [sys.executable, "-c", _NODE, "study", "run", str(folder), "--storage", url]
        self.command = [*command, "--heartbeat", "1", "--grace", "6"]
        self.log = (folder.parent / "nodes.log").open("w")
        self.nodes = [self.start() for _ in range(WORKERS)]

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, stdout=self.log, stderr=self.log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def kill_one(self, number: int) -> bool:
        """Kills a node where it stands; whether it was still at work."""
        node = self.nodes[number]
        if node.poll() is not None:
            return False
        node.send_signal(signal.SIGKILL)
        node.wait()
        self.nodes[number] = self.start()
        return True

    def join(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        return [node.wait(max(1.0, deadline - time.monotonic())) for node in self.nodes]

    def end(self) -> None:
        for node in self.nodes:
            node.kill()
            node.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_six_workers_fifteen_kills_and_a_crashed_server_lose_nothing_and_do_nothing_twice(tmp_path, postgresql):
    spec = study(**SIXTY)
    names = Counter(trial.name for trial in trials_of(Family(spec)))
    assert len(names) == 60
    undisturbed = {r.run: r for r in run_study(spec, tmp_path / "alone", quiet=True)}

    folder = tmp_path / "cluster"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True)))
    words = ["study", "create", str(tmp_path / "study.yaml"), "--output", str(folder), "--storage", postgresql.url]
    subprocess.run([sys.executable, "-m", "capgap", *words], check=True, capture_output=True)
    chance = random.Random(0)
    cluster = Cluster(folder, postgresql.url)
    killed, restarted = 0, False
    try:
        while killed < KILLS:
            done = len(_lines(folder))
            assert done < 60, f"all trials were done after {killed} kills: they are too short for this test"
            # So that some nodes come to work: each takes some seconds to start.
            time.sleep(chance.uniform(1.0, 4.0))
            if killed >= KILLS // 2 and not restarted:
                postgresql.restart()
                restarted = True
            killed += cluster.kill_one(chance.randrange(WORKERS))
        statuses = cluster.join(900)
    finally:
        cluster.end()

    assert statuses == [0] * WORKERS, (tmp_path / "nodes.log").read_text()[-3000:]
    records = read_records(folder)
    assert Counter(r.run for r in records) == names
    queue = Queue(folder, postgresql.url, name="cluster")
    attempts = Counter(row.user_attrs["name"] for row in queue._all() if row.state.name == "COMPLETE")
    assert attempts == names
    assert {row.state.name for row in queue.rows()} == {"COMPLETE"}
    assert sum(row.state.name == "FAIL" for row in queue._all()) > 0  # kills did hit trials
    queue.close()
    for record in records:
        assert record.loss == undisturbed[record.run].loss
        assert [row.get("loss") for row in record.curve] == [row.get("loss") for row in undisturbed[record.run].curve]


def _lines(folder: Path) -> list[bytes]:
    file = folder / RECORDS
    return file.read_bytes().splitlines() if file.is_file() else []
