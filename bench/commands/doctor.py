"""`bn-bench doctor`: what is here, what can run, and whether it is right."""

import click
from rich.console import Console

from bn_fused.bench import doctor
from bn_fused.bench.commands.common import FAILED, first_device, make_console, progress_bar, say, show
from bn_fused.bench.run import records, report


@click.command("doctor")
@click.pass_context
def command(context):
    """Say what is installed, which devices there are and which backends can run, and check those in seconds."""
    context.exit(FAILED if print_doctor(make_console()) else 0)


def print_doctor(console: Console) -> bool:
    """Print what the doctor finds; whether a check failed."""
    first_device()
    for line in report.environment_lines(records.environment()):
        say(console, line)
    say(console, f"devices: {', '.join(doctor.devices())}")
    able, refusals = doctor.backends()
    say(console, f"backends that run here: {', '.join(able)}")
    for name, reason in refusals.items():
        say(console, f"  {name} does not: {reason}")
    for line in (*doctor.tuning(), *doctor.lowered_kernels()):
        say(console, f"measured plans: {line}")
    for what, states in (("rivals", doctor.rivals()), ("compilers for the audit", doctor.compilers())):
        say(console, f"{what}:")
        for name, state in states.items():
            say(console, f"  {name}: {state}")
    with progress_bar(console) as progress:
        task = progress.add_task("checking backends", total=1.0)
        checks = doctor.check_backends(lambda share: progress.update(task, completed=share), able)
    say(console)
    show(console, report.check_table(checks))
    failures = [f"{backend}, {approach}: {check.reason}" for backend, approach, check in checks if not check.ok]
    for line in failures:
        say(console, f"FAILED: {line}", "bold red")
    return bool(failures)
