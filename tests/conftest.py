"""What several test files use."""

import signal
import sys

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
