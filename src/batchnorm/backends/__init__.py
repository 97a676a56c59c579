"""The ways to run the four kernels: `base` is the contract, `dispatch` the one table of them all."""
