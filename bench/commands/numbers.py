"""Numbers as options."""

import math

import click


class Number(click.FloatRange):
    """A number in a range, and no NaN or infinity, which no range excludes."""

    def convert(self, value, param, ctx):
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number
