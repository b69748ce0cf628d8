"""What several test files use."""

import signal
import sys
from collections import Counter

import pytest

import train


@pytest.fixture
def here(monkeypatch, capsys):
    """train.py's command line in this process, which has torch loaded already: (exit code, what it printed, its errors)."""
    def run(folder, *words):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        code = 0
        try:
            train.command_line()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    before = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, before)


def pytest_terminal_summary(terminalreporter):
    """One line for each reason to skip, with how to run what was skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
