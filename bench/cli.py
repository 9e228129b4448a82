"""The command line `bn-bench`: its commands, and what it does without one."""

import sys

import click

import bn_fused
from bn_fused.bench.commands import audit, compare, doctor, report, run, stability, step, tune
from bn_fused.bench.commands.common import FAILED, INTERRUPTED, UNUSABLE, make_console, say
from bn_fused.bench.providers import RIVALS
from bn_fused.bench.run.suite import Settings
from bn_fused.bench.workloads import SUITES, WORKLOADS


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(bn_fused.__version__, message="%(version)s")
@click.pass_context
def group(context: click.Context) -> None:
    """Is bn_fused faster for your shapes, on your chip, by how much, and is it right?

    Without a command: `doctor`, then `run` of the quick suite against equinox and flax, in about a minute.
    """  # noqa: D400 a question, for who reads the help
    if context.invoked_subcommand is None:
        context.exit(check_and_time())


for _module in (run, compare, report, audit, stability, step, tune, doctor):
    group.add_command(_module.command)


def check_and_time() -> int:
    """What `bn-bench` does without a command; the exit status."""
    console = make_console()
    sick = doctor.print_doctor(console)
    say(console)
    device = run.use_devices(1)
    rivals = tuple(name for name in ("equinox", "flax") if RIVALS[name].missing is None)
    settings = Settings(rivals=rivals, cold=device.platform != "cpu")
    workloads = [WORKLOADS[name] for name in SUITES["quick"]]
    record = run.run_and_print(console, workloads, settings, suite="quick", heading=False)
    return FAILED if sick else run.exit_status(record)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's own) and return the exit status.

    0: every check passed; 1: one failed; 2: input it cannot use, said in one line; 130: interrupted.
    """
    try:
        return group.main(arguments, prog_name="bn-bench", standalone_mode=False) or 0
    except click.ClickException as error:
        print(f"bn-bench: {' '.join(error.format_message().split())}", file=sys.stderr)
        return UNUSABLE
    except (click.Abort, KeyboardInterrupt):
        print("bn-bench: interrupted", file=sys.stderr)
        return INTERRUPTED
