"""Shows a verification to people, and as JSON to programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megallama.verify.compare import Report

WORST = 10


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data: the fields of `Report`, and `passed` for it and for each check."""
    plain = asdict(report)
    for check, shown in zip(report.checks, plain["checks"], strict=True):
        shown["passed"] = check.passed
    return {"passed": report.passed, **plain}


def print_report(report: Report) -> None:
    """Tables on standard output."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{report.layout}[/] in {report.dtype} on {report.processes} processes")
    console.print(f"{report.model}\n")
    console.print(_checks(report))
    console.print(_steps(report))
    console.print(_gradients(report))
    console.print(_communication(report))
    verdict = "[green]the same numbers[/]" if report.passed else "[red]NOT the same numbers[/]"
    console.print(f"\n{verdict}: {report.layout} against one process, {report.dtype}")


def _checks(report: Report) -> Table:
    table = Table("", "relative error", "bar", "", title="checks", title_justify="left")
    for check in report.checks:
        word = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        table.add_row(check.name, f"{check.error:.1e}", f"{check.bar:.1e}", word)
    return table


def _steps(report: Report) -> Table:
    table = Table("step", "loss", "one process", "grad norm", "one process", title="steps")
    table.title_justify = "left"
    for row in report.steps:
        values = (row.loss, row.reference_loss, row.grad_norm, row.reference_grad_norm)
        table.add_row(str(row.step), *(f"{value:.12f}" for value in values))
    return table


def _gradients(report: Report) -> Table:
    table = Table("parameter", "relative error", title=f"gradients, step 1, worst {WORST}")
    table.title_justify = "left"
    worst = sorted(report.gradient_errors.items(), key=lambda item: -item[1])[:WORST]
    for name, error in worst:
        table.add_row(name, f"{error:.1e}")
    return table


def _communication(report: Report) -> Table:
    title = "collectives and messages of one step, the rank with most"
    table = Table("axis", "kind", "calls", "bytes", title=title, title_justify="left")
    for row in report.communication:
        table.add_row(row.axis, row.kind, f"{row.calls:,}", f"{row.bytes:,}")
    return table
