"""Which number format each matmul runs in, and the layers that run in FP8."""
