"""The package is imported where only Windows is, and shows no more than its public names."""

import subprocess
import sys

import pytest

import fst_dspy

UNIX_ALONE = ("fcntl", "grp", "posix_ipc", "pty", "pwd", "resource", "syslog", "termios", "tty")
UNIX_SIGNALS = ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD")
UNIX_CALLS = ("fork", "uname", "getuid", "geteuid", "setsid", "killpg", "getloadavg", "mkfifo")

WITHOUT_UNIX = f"""
import importlib, os, pkgutil, signal, sys
import dspy, trl, optuna, matplotlib.figure, peft, litellm  # what they need of Unix is theirs
import pytest

import fst_dspy

for name in {UNIX_ALONE!r}:
    sys.modules[name] = None
for name in {UNIX_SIGNALS!r}:
    delattr(signal, name)
for name in {UNIX_CALLS!r}:
    delattr(os, name)
left = [m.name for m in pkgutil.walk_packages(fst_dspy.__path__, "fst_dspy.")]
for name in left:
    if name != "fst_dspy.__main__":
        importlib.import_module(name)
print(len(left))
"""


@pytest.mark.slow
def test_nothing_that_only_unix_has_is_needed_to_import_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) > 100


def test_the_package_lists_its_public_names_and_no_others():
    assert dir(fst_dspy) == sorted(fst_dspy.__all__)
    assert all(getattr(fst_dspy, name) is not None for name in fst_dspy.__all__)
