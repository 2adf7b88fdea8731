"""The pauses before a device tries again."""

BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 60.0
"""The longest pause after an error of the link."""

HINT_MOST_S = 300.0
"""A busy cloud may name the time after which to try again; longer times count as this one, before jitter."""

TROUBLE_MOST_S = 3600.0
"""The longest pause after any other error."""

MOST_REFUSALS = 5
"""A run that ends by itself (``--once``) ends after more errors than this, not counting errors of the link."""

NEEDS_A_PERSON = 8
"""The count of refusals after an error that time alone rarely mends: the next pause is then a minute or so."""


def backoff_s(attempt: int, jitter: float, most_s: float = BACKOFF_MOST_S) -> float:
    """Return the seconds before try ``attempt`` (from 1): doubling up to ``most_s``, the upper half of it random."""
    longest_s = min(most_s, BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 16))
    return longest_s * (0.5 + 0.5 * jitter)
