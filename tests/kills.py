"""For tests: a forked process that ends without a word, as by kill -9, at the moment that a test chooses."""

import os
import sys
from collections.abc import Callable

# A moment is before each line of these functions, and before each system call that changes names or files.
FUNCTIONS = ("_exchange", "new_folder", "write_bytes", "save", "add")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "open")
KILLED = 9


def run_until(moment: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process until that moment, from 0; whether it ended before."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), code
        return code == 0
    left = moment

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(KILLED)

    def trace(frame, event, _):
        if frame.f_code.co_name not in FUNCTIONS:
            return None
        if event == "line":
            count()
        return trace

    def hook(event, _):
        if event in CHANGES:
            count()

    try:
        sys.addaudithook(hook)
        sys.settrace(trace)
        action()
        os._exit(0)
    except BaseException:
        sys.settrace(None)
        left = sys.maxsize
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def every_moment(action: Callable[[], object], check: Callable[[int], None]) -> int:
    """Run `action` until each of its moments, and `check` after each; returns how many there are."""
    moment = 0
    while not run_until(moment, action):
        check(moment)
        moment += 1
    check(moment)
    return moment
