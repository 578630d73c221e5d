"""How far long work is: a bar on a terminal, a line every half minute in a log.

Deviation from tqdm, which draws both: where stderr is no terminal, work of less than half a minute leaves
no trace, and nothing is drawn over.

Run it: python train.py orpo ... 2> log
"""

import sys
import time
from collections.abc import Iterable

from tqdm import tqdm as Bar  # for annotations too

EVERY = 30.0  # seconds between two lines of a log
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} so far, {remaining} left{postfix}"


def progress(
    items: Iterable | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str | None = None,
    disable: bool = False,
) -> Bar:
    """tqdm's bar over `items`, or one to `update` within a `with` block; it leaves no bar behind.

    `initial` of the `total` items were done before; `disable`: nothing is shown.
    """
    if sys.stderr.isatty():
        return Bar(items, desc, total, leave=False, initial=initial, disable=disable)
    return _Lines(
        items,
        desc,
        total,
        leave=False,
        initial=initial,
        disable=disable,
        mininterval=EVERY,
        delay=EVERY,
        miniters=1,
        smoothing=0,  # the rate is the mean since the beginning
        bar_format=LINE,
    )


class _Lines(Bar):
    """A line every half minute, and one at the end of work that took longer."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line; tqdm passes "" to clear a bar, which no log needs."""
        if msg is None:
            print(self, file=self.fp, flush=True)
        return False

    def close(self) -> None:
        """Say where the work ended, unless the last line did."""
        if not self.disable and self.n > self.last_print_n and time.time() - self.start_t >= EVERY:
            self.refresh()
        super().close()
