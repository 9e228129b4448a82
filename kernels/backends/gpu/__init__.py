"""What the backends for GPUs share: their view of x, and the launches and passes of a plan."""
