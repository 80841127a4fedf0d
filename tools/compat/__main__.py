"""Which versions fastreward works with, tried and written down: `make compat`, or `python tools/compat [ROW ...]`.

Each row has an environment of its own under build/compat (kept for the next time; gigabytes for torch), in which the
tests of the patch, or a core of all tests, are run; the largest differences that they find, what each patch replaces
and the counts go to tools/compat/results.json, and from there into the tables of docs/compat.md. ROW: a name
(trl-1.16.0, torch-2.8.0) or a kind (verl, triton); none: all. --list: the names. --page: only the tables.
"""

from __future__ import annotations

import argparse

from page import read, write
from rows import rows
from run import run


def main() -> None:
    """Run the rows that are asked for, and write after each."""
    parser = argparse.ArgumentParser(prog="python tools/compat", description=__doc__)
    parser.add_argument("row", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    known = rows()
    unknown = set(options.row) - {row.name for row in known} - {row.kind for row in known}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such row; --list has them")
    chosen = [row for row in known if not options.row or {row.name, row.kind} & set(options.row)]
    if options.list:
        print(*(row.name for row in known), sep="\n")
        return
    for row in [] if options.page else chosen:
        print(f"{row.name} ...", flush=True)
        result = run(row)
        print(f"{row.name}: {result.get('not_run') or result['outcome']}", flush=True)
        write(read() | {row.name: result})  # read anew: another may be at other rows
    write(read())


if __name__ == "__main__":
    main()
