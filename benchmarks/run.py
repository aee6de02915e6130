"""Check and time operations beside their alternatives: ``python benchmarks/run.py [OPERATION ...]``.

Every contender is first compared with the float32 definition (outputs and every gradient, fresh random inputs); what
is wrong is not timed. A contender that is not installed, does not fit or runs out of memory is a row with the reason.
The ceilings, a large copy and an 8,192-cubed bfloat16 product, are measured once a run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import record
import torch
from measure import measure
from operation import DIRECTIONS, QWEN3_30B_A3B, Operation, operations
from timing import measure_ceilings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; exit code 1 where something of ours was wrong or failed."""
    known = operations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", nargs="*", metavar="OPERATION", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="operations, their shapes and contenders, then stop")
    parser.add_argument("--only", action="append", default=[], metavar="CONTENDER", help="this one (repeatable)")
    parser.add_argument("--shape", action="append", default=[], help="this shape (repeatable); default: all but tiny")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.4, help="spent on timing one row")
    parser.add_argument(
        "--csv", type=Path, nargs="?", const="", default=None, help="append here; without a path results/<gpu>.csv"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.operation if name not in known]
    if unknown:
        parser.error(f"unknown operation {', '.join(unknown)}, expected some of {', '.join(known)}")
    chosen = [known[name] for name in options.operation or known]
    if options.list:
        print_list(chosen)
        return 0
    device = torch.device(options.device)
    csv = record.results_file(device) if options.csv == Path("") else options.csv
    ceilings = measure_ceilings(device)
    print(
        f"{record.device_name(device)}: copy {ceilings.copy_gbps:.0f} GB/s, "
        f"product {ceilings.matmul_tflops:.1f} TFLOP/s"
    )
    failed = False
    for operation in chosen:
        shapes = options.shape or [
            name for name in operation.shapes if not name.startswith("tiny") and name not in operation.slow_shapes
        ]
        for shape_name in (name for name in shapes if name in operation.shapes):
            for name, contender in operation.contenders.items():
                if name in options.only or not (options.only or contender.on_request):
                    rows = measure(
                        operation, shape_name, name, ceilings, device, options.direction or DIRECTIONS, options.seconds
                    )
                    print_rows(rows)
                    failed |= contender.ours and any(row.status.startswith(("wrong", "failed")) for row in rows)
                    if csv is not None:
                        record.append(csv, rows)
    return int(failed)


def print_list(chosen: Sequence[Operation]) -> None:
    """Operations, shapes and contenders; the widths of Qwen3-30B-A3B go without saying."""
    for operation in chosen:
        print(operation.name)
        for name, shape in operation.shapes.items():
            sizes = {key: size for key, size in shape.items() if QWEN3_30B_A3B.get(key) != size}
            slow = f"  (only where named: --shape {name})" if name in operation.slow_shapes else ""
            print(f"  shape {name:<20} {' '.join(f'{key}={size}' for key, size in sizes.items())}{slow}")
        for name, contender in operation.contenders.items():
            print(f"  contender {name}{' (only where named: --only ' + name + ')' if contender.on_request else ''}")


def print_rows(rows: Sequence[record.Row]) -> None:
    """One line a row."""
    for row in rows:
        head = f"{row.op:<20} {row.shape:<20} {row.implementation:<24} {row.direction:<8}"
        if row.status != "ok":
            print(f"{head} {row.status}", flush=True)
            continue
        assert row.median_ms is not None and row.share_of_ceiling is not None
        memory = "" if row.peak_extra_mb is None else f"{row.peak_extra_mb:8.0f} MB"
        print(
            f"{head} {row.median_ms:9.4f} ms [{row.p20_ms:.4f} {row.p80_ms:.4f}] {row.tflops:7.1f} TFLOP/s "
            f"{row.gbps:7.0f} GB/s {100 * row.share_of_ceiling:5.1f} % {memory} error {row.error:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
