"""What of ``rich`` the programs here print with; without it they end at once, in words."""

from output import needs

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(needs("rich", error)) from None

__all__ = ["BarColumn", "Console", "MofNCompleteColumn", "Progress", "Table", "TextColumn", "TimeElapsedColumn"]
