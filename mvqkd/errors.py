"""The one exception that users see as a single line."""


class RecipeError(Exception):
    """Bad input: the message is one line that names the file or key, the cause and the remedy.

    Entry scripts print it on stderr without a traceback (unless ``--debug``) and exit with 1.
    """


def reason_of(error: Exception) -> str:
    """``error`` as a few words on one line: its kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
