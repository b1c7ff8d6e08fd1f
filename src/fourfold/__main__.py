"""``python -m fourfold``: the same as the ``fourfold`` command."""

from fourfold.cli.main import main

if __name__ == "__main__":
    main()
