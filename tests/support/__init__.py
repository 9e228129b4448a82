"""What tests share: oracles, tolerances, cases, and the programs that run in processes of their own."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]  # of the repository
