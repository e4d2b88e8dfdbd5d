"""The one exception for what a user can mend."""


class UsageError(ValueError):
    """A wrong argument, file or environment; its message is one sentence that says what to do."""
