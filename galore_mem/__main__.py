"""`python -m galore_mem`."""

from galore_mem.cli import main

if __name__ == "__main__":
    main()
