"""Trials under torchrun, on all devices of a node: `torchrun -m capgap.study.on_devices FOLDER TRIALS`."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil

from capgap.errors import CapgapError
from capgap.progress import say
from capgap.study.family import Family
from capgap.study.folder import read_spec
from capgap.study.run_trial import ERROR, WORKER, open_study_corpus, run_trials
from capgap.study.trials import Trial


def main(folder: Path, words: str) -> None:
    threading.Thread(target=_end_with, args=(int(os.environ[WORKER]),), daemon=True).start()
    spec = read_spec(folder)
    trials = [Trial.model_validate(trial) for trial in json.loads(words)]
    try:
        run_trials(Family(spec), trials, open_study_corpus(spec, folder, quiet=True), folder)
    except CapgapError as error:
        say(f"{ERROR}{error}", every_process=True)
        sys.exit(1)


def _end_with(worker: int) -> None:
    """Ends this process when the worker is gone: its trial is given to another, and two must not write to one place."""
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
