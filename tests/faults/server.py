"""Whole processes of `eightgig`, started in hundredths of a second.

Importing torch takes seconds. `python -m tests.faults.server` imports everything once, computes
nothing, and forks a child for each request: a process of its own, which can be killed like one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, cast

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {
    # Threads do not survive a fork.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
}
_IMPORTED = (
    "torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gemma4.configuration_gemma4",
    "transformers.models.llama.configuration_llama",
    "transformers.tokenization_utils_tokenizers",
    "transformers.integrations.accelerate",
    "transformers.core_model_loading",
    "typer._adapters",
    "bitsandbytes",
    "pyarrow",
    "safetensors.torch",
    "eightgig.cli.app",
    "eightgig.cli.progress",
    "eightgig.finetune",
    "eightgig.data.load",
    "eightgig.data.chunks",
    "eightgig.data.tokenizer",
    "eightgig.engine.assemble",
    "eightgig.hardware.calibrate",
    "eightgig.quant.fetch",
    "eightgig.training.bench",
    "eightgig.training.deliver",
    "eightgig.training.loop",
    "eightgig.web.report",
    "tests.faults.plants",
)
_POLL_SECONDS = 0.002


@dataclass
class Process:
    """A running command of `eightgig`; `output` is what it writes to both streams."""

    pid: int
    output: Path
    server: Server

    def signal(self, number: int) -> None:
        """Send a signal; the process may have ended, and is then still there as a zombie."""
        os.kill(self.pid, number)

    def wait(self, timeout_seconds: float = 120.0) -> int:
        """Its exit code, -N for a death by signal N."""
        answer = self.server.ask({"wait": self.pid, "timeout_seconds": timeout_seconds})
        if answer["code"] is None:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"no end within {timeout_seconds} s:\n{self.text()[-4000:]}")
        return cast("int", answer["code"])

    def is_running(self) -> bool:
        """Whether it has not ended; afterwards `wait` still tells its exit code."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def text(self) -> str:
        """What it has written so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")


class Server:
    """The process that forks; use it in a `with` statement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True,
            env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip
        assert self._read() == {"is_ready": True}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        cast("IO[str]", self._process.stdin).close()
        cast("IO[str]", self._process.stdout).close()
        self._process.wait(timeout=30)

    def start(
        self, arguments: Sequence[str], *, plant: Sequence[object] = (), cwd: Path | None = None
    ) -> Process:
        """Start `eightgig ARGUMENTS`.

        Args:
            arguments: As on a command line.
            plant: Name of a function of `tests.faults.plants` and its arguments, called first.
            cwd: Its current folder.
        """
        self._count += 1
        output = self._folder / f"output-{self._count:05d}.txt"
        answer = self.ask(
            {
                "arguments": [str(word) for word in arguments],
                "plant": list(plant),
                "output": str(output),
                "cwd": str(cwd or self._folder),
            }
        )
        return Process(pid=answer["pid"], output=output, server=self)

    def run(
        self, arguments: Sequence[str], *, plant: Sequence[object] = (), cwd: Path | None = None
    ) -> tuple[int, str]:
        """Exit code and output of `eightgig ARGUMENTS`."""
        process = self.start(arguments, plant=plant, cwd=cwd)
        return process.wait(), process.text()

    def ask(self, request: dict[str, object]) -> dict[str, object] | dict[str, int]:
        """One request, one answer."""
        stream = cast("IO[str]", self._process.stdin)
        stream.write(json.dumps(request) + "\n")
        stream.flush()
        return self._read()

    def _read(self) -> dict[str, int]:
        line = cast("IO[str]", self._process.stdout).readline()
        assert line, "the server is gone"
        return cast("dict[str, int]", json.loads(line))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in _IMPORTED:
        importlib.import_module(name)
    print(json.dumps({"is_ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": _wait(request["wait"], request["timeout_seconds"])}
        else:
            answer = {"pid": _fork(request, answers)}
        print(json.dumps(answer), file=answers, flush=True)


def _wait(pid: int, timeout_seconds: float) -> int | None:
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_SECONDS)
    return None


def _fork(request: dict[str, object], answers: IO[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        answers.close()
        os.close(0)
        os.open(os.devnull, os.O_RDONLY)
        stream = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(str(request["cwd"]))
        code = _command(request)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _command(request: dict[str, object]) -> int:
    import traceback

    from eightgig.cli.app import main
    from tests.faults import plants

    try:
        plant = cast("list[object]", request["plant"])
        if plant:
            getattr(plants, str(plant[0]))(*plant[1:])
        return main(cast("list[str]", request["arguments"]))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent reads of it
        traceback.print_exc()
        return 71


if __name__ == "__main__":
    _serve()
