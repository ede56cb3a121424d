"""At the end of a run, pytest names the claims that failed; nbval by itself names only the cell."""

import re

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
