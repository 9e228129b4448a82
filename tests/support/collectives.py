"""What compiled programs exchange between devices."""

import re

import numpy as np


def collectives(compiled):
    """The results of every collective in compiled HLO, as (operation, number of values)."""
    found = []
    pattern = r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    for results, operation in re.findall(pattern, compiled.as_text()):
        shapes = re.findall(r"\w+\[([\d,]*)\]", results)
        found.append((operation, sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)))
    return found
