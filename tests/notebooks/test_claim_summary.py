"""A false claim is named, with what people say, in the summary at the end of the run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lora_ref.course.claims import ledger

ROOT = Path(__file__).parents[2]


def summary(tmp_path, holds):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    body = f"from lora_ref.course.claims import claim\n\ndef test_it():\n    claim('rank_is_set_by_r', {holds})\n"
    (tmp_path / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout


def test_a_false_claim_is_named_and_a_true_one_is_not(tmp_path):
    line = f"claim 'rank_is_set_by_r' does not hold as measured: {ledger()['rank_is_set_by_r'].statement}"
    assert f"test_it.py::test_it: {line}" in summary(tmp_path, False)
    passed = summary(tmp_path, True)
    assert "1 passed" in passed and "rank_is_set_by_r" not in passed
