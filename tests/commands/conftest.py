from helpers.commands import base, compiled, inside, place, run  # noqa: F401
