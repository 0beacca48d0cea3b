"""Entry point of `python -m export3d_cli`."""

from export3d_cli.main import main

if __name__ == "__main__":
    main()
