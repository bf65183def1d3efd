"""What command lines here have in common."""

from __future__ import annotations

import argparse
import re


def pattern(text: str) -> re.Pattern[str]:
    """A type for argparse."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error
