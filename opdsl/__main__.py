"""`python -m opdsl` is `opdsl`."""

from opdsl.cli import main

if __name__ == "__main__":
    main()
