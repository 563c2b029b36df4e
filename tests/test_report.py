"""README's figures are those of the recorded measurements."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_readme_says_what_was_measured():
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
