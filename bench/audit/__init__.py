"""`bn-bench audit`: what a layer moves through a chip's memory, without the chip."""
