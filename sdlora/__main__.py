"""`python -m sdlora`, as launchers start it."""

from sdlora.cli import main

if __name__ == "__main__":
    main()
