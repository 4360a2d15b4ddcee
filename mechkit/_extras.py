"""What studies and the command line need, and a plain installation lacks: `pip install 'mechkit[studies]'`."""

from __future__ import annotations

from importlib.util import find_spec

STUDIES = ("filelock", "fsspec", "pyarrow", "pydantic", "rich", "typer", "zarr")  # as in pyproject.toml


def need_studies(what: str) -> None:
    """Raises `ModuleNotFoundError`, which names the packages and the command that installs them, if one of them is missing."""
    missing = [name for name in STUDIES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {', '.join(missing)}, which a plain installation lacks; pip install 'mechkit[studies]'",
            name=missing[0],
        )
