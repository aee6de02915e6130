"""Check and time operations beside their alternatives: ``python benchmarks/run.py [OPERATION ...]``.

Every contender is first compared with the float32 definition (outputs and every gradient, fresh random inputs, the
timed shape where it fits); what is wrong is not timed. A contender that is not installed, does not fit or runs out of
memory is a row with the reason. The ceilings, a large copy and an 8,192-cubed bfloat16 product, are measured once a
run. ``--check-only`` compares and times nothing; ``memcheck.sh`` does that under compute-sanitizer, at small shapes
that reach every launch bucket.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import record
import torch
from measure import Check, measure, verdict
from operation import DIRECTIONS, QWEN3_30B_A3B, Operation, operations
from timing import measure_ceilings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; exit code 1 where something of ours was wrong or failed."""
    known = operations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", nargs="*", metavar="OPERATION", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="operations, their shapes and contenders, then stop")
    parser.add_argument("--only", action="append", default=[], metavar="CONTENDER", help="this one (repeatable)")
    parser.add_argument("--shape", action="append", default=[], help="this shape (repeatable); see --list")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.4, help="spent on timing one row")
    parser.add_argument("--check-only", action="store_true", help="one line a contender: ok, or what is wrong")
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
    if options.check_only:
        return check_only(chosen, options, device)
    csv = record.results_file(device) if options.csv == Path("") else options.csv
    if csv is not None:
        record.ready(csv)
    ceilings = measure_ceilings(device)
    print(
        f"{record.device_name(device)}: copy {ceilings.copy_gbps:.0f} GB/s, "
        f"product {ceilings.matmul_tflops:.1f} TFLOP/s"
    )
    failed = False
    for check, name in asked_for(chosen, options, device):
        rows = measure(check, name, ceilings, options.direction or DIRECTIONS, options.seconds)
        print_rows(rows)
        ours = check.operation.contenders[name].ours
        failed |= ours and any(row.status.startswith(("wrong", "failed")) for row in rows)
        if csv is not None:
            record.append(csv, rows)
    return int(failed)


def asked_for(
    chosen: Sequence[Operation], options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Check, str]]:
    """Contenders by name, each with the check of its operation and shape."""
    for operation in chosen:
        for shape_name in operation.shapes:
            if shape_name in options.shape or (not options.shape and operation.runs_unasked(shape_name)):
                check = Check(operation, shape_name, device)
                for name, contender in operation.contenders.items():
                    if name in options.only or not (options.only or contender.on_request):
                        yield check, name


def check_only(chosen: Sequence[Operation], options: argparse.Namespace, device: torch.device) -> int:
    """Exit code 1 where something of ours was wrong or failed, or nothing of ours was right."""
    found = []
    for check, name in asked_for(chosen, options, device):
        said = verdict(check, name)
        print(f"{check.operation.name:<20} {check.shape_name:<24} {name:<24} {said}", flush=True)
        if check.operation.contenders[name].ours:
            found.append(said)
    wrong = [said for said in found if not said.startswith(("ok", "skipped"))]
    return int(bool(wrong) or not any(said.startswith("ok") for said in found))


def print_list(chosen: Sequence[Operation]) -> None:
    """Operations, shapes and contenders; the widths of Qwen3-30B-A3B go without saying."""
    for operation in chosen:
        print(operation.name)
        for name, shape in operation.shapes.items():
            sizes = {key: size for key, size in shape.items() if QWEN3_30B_A3B.get(key) != size}
            asked = "" if operation.runs_unasked(name) else f"  (only where named: --shape {name})"
            print(f"  shape {name:<24} {' '.join(f'{key}={size}' for key, size in sizes.items())}{asked}")
        for name, contender in operation.contenders.items():
            print(f"  contender {name}{' (only where named: --only ' + name + ')' if contender.on_request else ''}")


def print_rows(rows: Sequence[record.Row]) -> None:
    """One line a row."""
    for row in rows:
        head = f"{row.op:<20} {row.shape:<24} {row.implementation:<24} {row.direction:<8}"
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
