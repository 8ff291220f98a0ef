"""What a page registers is forgotten after it."""

from tests.plugins.conftest import as_before

__all__ = ["as_before"]
