"""Puts together the results of parts that ran one after the other, with plots.

python kernels/bench/merge.py --output FOLDER PART...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plots import plot
from report import latest_rows, read_benches, subtitle, write_report


def main() -> None:
    """Merge folders with a results.json each."""
    parser = argparse.ArgumentParser(description="Results of several folders in one.")
    parser.add_argument("--output", type=Path, required=True, help="folder of all results")
    parser.add_argument("parts", type=Path, nargs="+", help="folders with a results.json each")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    benches = [bench for part in options.parts for bench in read_benches(part)]
    write_report(options.output, benches)
    plot(options.output, latest_rows(benches), subtitle(benches))


if __name__ == "__main__":
    main()
