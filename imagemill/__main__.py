"""`python -m imagemill` is the `imagemill` command."""

from imagemill.cli import main

if __name__ == "__main__":
    main()
