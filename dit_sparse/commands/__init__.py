"""What the commands of `dit-sparse` do; `dit_sparse/cli.py` only declares their options."""
