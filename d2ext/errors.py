"""The one exception type for mistakes a user can make."""


class UserError(ValueError):
    """A mistake in a path, file, config key or option; its text is one line that names the mend.

    Command line programs print the text without a traceback and exit with status 1.
    """
