"""The microbenchmark and the experiments behind the documentation.

`bn-bench` (or `python -m bn_fused.bench`) checks every installed backend against float64 and times the layer
on the device that is there. Importing this package has no effect and needs none of the `bench` extra.
"""
