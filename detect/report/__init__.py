"""A results folder of projector.py as one HTML file that opens offline: worklist, pictures, how sure, settings.

tables.py reads the results, pictures.py packs what fits, words.py says what was found, page.py puts it together.
"""

from detect.report.page import write_report
from detect.report.tables import ReportError, read_json

__all__ = ["ReportError", "read_json", "write_report"]
