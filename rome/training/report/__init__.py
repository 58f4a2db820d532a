"""The report of a run: `plots/*.png` for documents, and one self-contained `report.html` for people."""

from rome.training.report.page import write_report

__all__ = ["write_report"]
