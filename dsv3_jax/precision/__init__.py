"""Which number format each matmul runs in."""
