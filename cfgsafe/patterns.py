"""Regular expressions from elsewhere, matched against names in bounded time.

A pattern such as (a+)+b needs time that doubles with each character of a name that it nearly matches,
and Python's `re` has no limit. To tell such patterns by their looks misses some (a*a*a*a*b) and refuses
good ones; a thread cannot be stopped, and a signal works in the main thread alone. So patterns that can
run away are matched by another process, which ends after `SECONDS`. It costs 20 ms, and few adapters
have such patterns.

Run it: python -m pytest tests/test_patterns.py
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection

from cfgsafe.errors import CheckpointError
from cfgsafe.settings import shown

SECONDS = 10.0
LONGEST = 10_000  # characters of a pattern
FEW = 1_000  # so many harmless patterns take no time
HARMLESS = re.compile(r"(\w|[.-]|\\\.)*")  # no groups, choices or repeats: one step a character
CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
found = {}
for pattern in patterns:
    try:
        found[pattern] = [name for name in names if re.fullmatch(pattern, name)]
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"{error}"[:200])
print(json.dumps(found))
"""


def full_matches(patterns: Collection[str], names: Collection[str]) -> dict[str, set[str]]:
    """Pattern -> the names that match it as a whole.

    Raises CheckpointError naming a pattern that is too long or no regular expression, or when they
    take longer than `SECONDS`.
    """
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise CheckpointError(f"a pattern of {len(pattern):,} characters; at most {LONGEST:,} are read")
    if len(patterns) <= FEW and all(map(HARMLESS.fullmatch, patterns)):
        found = {}
        for pattern in patterns:
            found[pattern] = {name for name in names if re.fullmatch(pattern, name)}
        return found
    given = json.dumps([list(patterns), list(names)])
    # Isolated (-I) and without packages (-S): it starts at once and imports nothing of the folder it is in.
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{_named(patterns)}: does not end within {SECONDS:g} seconds; write simpler ones"
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.split()[-30:])
        raise CheckpointError(f"{_named(patterns)}: no regular expression ({reason})")
    return {pattern: set(matched) for pattern, matched in json.loads(done.stdout).items()}


def _named(patterns: Collection[str]) -> str:
    return f"pattern {', '.join(map(shown, list(patterns)[:3]))}"
