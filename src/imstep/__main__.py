"""`python -m imstep`, the command line where no script is on the path."""

from imstep.cli import main

if __name__ == "__main__":
    main()
