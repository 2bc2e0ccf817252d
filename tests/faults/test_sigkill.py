"""Real SIGKILLs at every operation of a save: the injected ones of `test_saves.py` are honest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.tally import Tally

_CHILD = """
import json, os, shutil, signal, sys
from pathlib import Path
from tests.faults.disks import CountingDisk
from tests.faults.saves import SITUATIONS, make_run, save

class KilledDisk(CountingDisk):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def _count(self, operation, path):
        super()._count(operation, path)
        if len(self.operations) - 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

folder, outcomes = Path(sys.argv[1]), []
for name in ("with rotation", "the same step again"):
    situation = SITUATIONS[name]
    counted = CountingDisk()
    run = make_run(folder / name / "counted")
    situation.prepare(run)
    save(run, situation.saved, counted)
    for at in range(len(counted.operations)):
        run = make_run(folder / name / str(at))
        situation.prepare(run)
        child = os.fork()
        if child == 0:
            save(run, situation.saved, KilledDisk(at))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        outcomes.append([name, counted.operations[at], killed, situation.outcome(run)])
        shutil.rmtree(run.folder)
print(json.dumps(outcomes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_costs_nothing(folder: Path, tally: Tally) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder)],
        capture_output=True, text=True, env=environment, cwd=root, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert len(outcomes) > 60
    assert {outcome for *_, outcome in outcomes} == {"before", "saved"}
    assert all(killed for _, _, killed, _ in outcomes)
    for _ in outcomes:
        tally.add("a save, real SIGKILL at every operation (two situations)")
