"""Has moved: `python -m training.publish`."""

import sys

if __name__ == "__main__":
    print("support.publish has moved; run python -m training.publish", file=sys.stderr)
    sys.exit(2)
