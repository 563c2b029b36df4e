"""`python -m dit_sparse`: the command line from an installed package or a bare checkout."""

from dit_sparse.cli import main

if __name__ == "__main__":
    main()
