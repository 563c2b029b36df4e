"""Runs a plan: order, kernel, undo. The only place where order and kernels meet."""
