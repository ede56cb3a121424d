"""At the end of a run, pytest names the claims that failed; nbval by itself names only the cell.

A test whose reference is missing in an old torch is skipped.

In several processes (`pytest -n 2 --dist loadfile`) each takes one thread: threads that wait for a core which another
process has make a lesson ten times as slow.
"""

import os
import re
import traceback
from importlib.metadata import version

import pytest
from packaging.version import Version

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; the lessons' kernels inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FAILED = re.compile(r"ClaimError\S*: (claim '\w+' does not hold as measured)\n[E\s]*statement: (.*)")


# From this version on torch's FLOP counter, which tests/cost compares with, accepts grouped queries.
GROUPED_QUERIES_COUNTED = Version("2.13")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """With an older torch its counter stops at grouped queries with a bare assertion of its own: nothing to compare."""
    try:
        return (yield)
    except AssertionError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        in_counter = last.name == "sdpa_flop_count" and os.path.basename(last.filename) == "flop_counter.py"
        if in_counter and Version(version("torch")).release < GROUPED_QUERIES_COUNTED.release:
            pytest.skip("the FLOP counter of this torch does not know grouped queries")
        raise


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
