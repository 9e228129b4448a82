"""The commands of `bn-bench`, one module each: its options, and the order of what it does."""
