"""`scripts/audit`: fails for a known hole, and only for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.watch import Watch

ROOT = Path(__file__).parents[2]
_HOLE = {"id": "CVE-2024-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}
_PACKAGES = [{"name": "sound", "version": "2.0", "vulns": []}, {"name": "odd", "skip_reason": "x"}]


def _answer(packages: list[object], code: int) -> str:
    text = json.dumps({"dependencies": packages, "fixes": []})
    return f"import sys; print({text!r}); sys.exit({code})"


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        (_answer(list(_PACKAGES), 0), 0, "2 packages, no known hole."),
        (
            _answer([*_PACKAGES, {"name": "weak", "version": "1.0", "vulns": [_HOLE]}], 1),
            1,
            "weak 1.0: CVE-2024-1, mended in 1.1",
        ),
        ("import sys; sys.exit('ConnectionError: no route to pypi.org')", 0, "NOT AUDITED: Conn"),
        ("raise ImportError('pip_audit')", 0, "NOT AUDITED: ImportError"),
    ],
)
def test_an_audit_fails_for_known_holes_alone(
    module: str, code: int, said: str, tmp_path: Path, watch: Watch
) -> None:
    watch.is_on = False  # starting the script is what this is about
    (tmp_path / "pip_audit.py").write_text(module)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "audit"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stdout
