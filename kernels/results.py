"""What every benchmark reports: a table, a JSON line, CSV rows with the machine and the versions they were measured on.

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
        machine = f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch",)}
    return {
        "machine": machine,
        **versions,
        "commit": commit or "none",
        "date": datetime.date.today().isoformat(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of measured values."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def show(rows: list[dict], columns: dict[str, str], device: str, csv_file: str | None) -> None:
    """Print `rows` under the headings and formats of `columns` ("heading": "{key:format}"), then as JSON; append them to `csv_file`."""
    lines = [list(columns)] + [[text.format_map(row) for text in columns.values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        print(
            "  ".join(
                cell.ljust(width) if not n else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )
    machine = where(device)
    print(json.dumps({"where": machine, "rows": rows}))
    if csv_file:
        new = not Path(csv_file).exists()
        with open(csv_file, "a", newline="") as file:
            writer = csv.DictWriter(file, [*machine, *rows[0]])
            if new:
                writer.writeheader()
            writer.writerows({**machine, **row} for row in rows)
