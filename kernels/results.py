"""What every benchmark reports: a table, a JSON line, and CSV rows with machine and versions.

Run it: python -m cfgsafe.bench --help
"""

import csv
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
from pathlib import Path

import torch


def where(device: str) -> dict[str, str]:
    """The machine, the versions, the commit, the date."""
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    else:
        cpu = platform.processor() or platform.machine()
        machine = f"{cpu} CPU, {torch.get_num_threads()} threads"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout
    return {
        "machine": machine,
        "torch": importlib.metadata.version("torch"),
        "commit": commit.strip() or "none",
        "date": datetime.date.today().isoformat(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile of measured values."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def spread_columns(unit: str, digits: int) -> dict[str, str]:
    """The columns that `show` needs for a `spread`."""
    cell = f":.{digits}f}}"
    return {f"{unit} p20": "{p20" + cell, "p50": "{p50" + cell, "p80": "{p80" + cell}


def show(rows: list[dict], columns: dict[str, str], device: str, csv_file: str | None) -> None:
    """Print the rows as a table and as a JSON line; append them to `csv_file`.

    columns: heading -> "{key:format}"; the first column is aligned to the left.
    """
    lines = [list(columns)]
    for row in rows:
        lines.append([cell.format_map(row) for cell in columns.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    machine = where(device)
    print(json.dumps({"where": machine, "rows": rows}))
    if csv_file:
        is_new = not Path(csv_file).exists()
        with open(csv_file, "a", newline="") as file:
            writer = csv.DictWriter(file, [*machine, *rows[0]])
            if is_new:
                writer.writeheader()
            writer.writerows({**machine, **row} for row in rows)
