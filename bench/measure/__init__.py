"""All that is to be measured on a GPU, in one command with a time limit; see `bench.measure.__main__`."""
