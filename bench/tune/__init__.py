"""`bn-bench tune`: every backend's plans, timed for classes of arrays on the device at hand."""
