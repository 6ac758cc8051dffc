"""`python -m capgap` is `capgap`, for torchrun: `torchrun --nproc-per-node 8 -m capgap run RECIPE.yaml`."""

from capgap.cli.app import main

main()
