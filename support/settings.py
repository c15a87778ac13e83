"""Has moved: `python -m training.settings`."""

import sys

if __name__ == "__main__":
    print("support.settings has moved; run python -m training.settings", file=sys.stderr)
    sys.exit(2)
