"""Commands as a user gives them, and what they print."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from imstep.cli import app


def imstep_command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def output(*words: object, code: int = 0) -> str:
    """What a command prints that ends with this code, without a traceback."""
    result = imstep_command(*words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def refused(*words: object) -> str:
    """The error message of a command that must be refused."""
    return output(*words, code=2)
