"""At the end of a run, pytest names the claims that failed; nbval by itself names only the cell.

In several processes (`pytest -n 2 --dist loadfile`) each takes one thread: threads that wait for a core which another
process has make a lesson ten times as slow.
"""

import os
import re

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; the lessons' kernels inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FAILED = re.compile(r"ClaimError\S*: (claim '\w+' does not hold as measured)\n[E\s]*statement: (.*)")


def pytest_terminal_summary(terminalreporter):
    """A line for each claim that a failed lesson cell raised: where, which, and what people say."""
    lines = []
    for report in terminalreporter.stats.get("failed", []):
        for settled, statement in FAILED.findall(report.longreprtext):
            lines.append(f"{report.nodeid}: {settled}: {statement}")
    if lines:
        terminalreporter.section("claims")
        for line in dict.fromkeys(lines):
            terminalreporter.write_line(line)
