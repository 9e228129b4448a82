"""The backends, a module or a folder each: the operations of `contract`, computed in one way."""
