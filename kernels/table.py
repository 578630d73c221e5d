"""What every benchmark reports: a table, a JSON line, and CSV rows with machine and versions.

Run it: python -m cfgsafe.bench --help
"""

import csv
import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # they decide the speed of products


def where(device: str) -> dict[str, str]:
    """The machine, the versions, the commit, the date."""
    if device.startswith("cuda"):
        machine = f"{torch.cuda.get_device_name(device)}, driver {driver()}"
    else:
        machine = f"{processor()}, {torch.get_num_threads()} threads"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout
    return {
        "machine": machine,
        "torch": version("torch"),
        "triton": version("triton"),
        "commit": commit.strip() or "none",
        "date": datetime.date.today().isoformat(),
    }


def processor(known: Path = Path("/proc/cpuinfo")) -> str:
    """The model of the CPU and those of `INSTRUCTIONS` that it has, or its architecture alone."""
    text = known.read_text() if known.exists() else ""
    name = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    if name is None:
        return f"{platform.processor() or platform.machine()} CPU"
    flags = re.search(r"^flags\s*: (.+)", text, re.MULTILINE)
    held = flags[1].split() if flags else []
    return " ".join([name[1], *(each for each in INSTRUCTIONS if each in held)])


def driver(known: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of the NVIDIA driver."""
    found = re.search(r"Module .*?(\d+\.[\d.]+)", known.read_text()) if known.exists() else None
    return found[1] if found else "unknown"


def version(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


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
    Ends the process with a line where the file has other columns than these rows.
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
        append(csv_file, [{**machine, **row} for row in rows])


def append(csv_file: str, rows: list[dict]) -> None:
    """Add rows to a CSV file, which is made with its folder if there is none; see `show`."""
    path, columns = Path(csv_file), list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, columns):
            line = f"error: {csv_file}: has other columns than these rows; name another file"
            print(line, file=sys.stderr)
            sys.exit(2)
        writer = csv.DictWriter(file, columns)
        if header is None:
            writer.writeheader()
        writer.writerows(rows)
