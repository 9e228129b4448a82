"""The audit's command line, and cases and rows of it that are made up."""

from click.testing import CliRunner

from bn_fused.bench.audit.blocks import Setting
from bn_fused.bench.audit.rows import Case, Row
from bn_fused.bench.commands.audit import command

SETTING = Setting((32, 64, 56, 56))


def run(*arguments):
    """What `bn-bench audit` does with these arguments."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments], prog_name="bn-bench audit")


def compiled_row(case, **fields):
    """The row of a case whose program reads x twice and writes it once, without a kernel of ours."""
    return Row(
        case, "compiled", reads=2.0, writes=1.0, padded_reads=2.0, padded_writes=1.0, inside_reads=0.0,
        inside_writes=0.0, padded_inside_reads=0.0, padded_inside_writes=0.0, launches=3, temporary_bytes=0, **fields,
    )  # fmt: skip


def case_for(target="h200", layer="jnp", pass_name="fwd", setting=SETTING):
    """A case of one shape."""
    return Case(target, "shape", setting, layer, pass_name)
