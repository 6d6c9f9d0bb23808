"""What the notebooks use to show their work, and nothing else needs. A plain file, like `cli.py`."""
import re


class raises:
    "`with raises(ValueError, match=\"...\") as refused:` goes on if that error is raised, and keeps it in `refused.value`."
    def __init__(
        self,
        error,     # the class, or a tuple of classes
        match="",  # a regular expression that its message holds
    ):
        self.error, self.match, self.value = error, match, None

    def __enter__(self): return self

    def __exit__(self, kind, value, trace):
        if kind is None: raise AssertionError(f"nothing was raised; {self.error} was expected")
        if not issubclass(kind, self.error): return False
        if not re.search(self.match, str(value)): raise AssertionError(f"the message is {str(value)!r}, which does not match {self.match!r}")
        self.value = value
        return True
