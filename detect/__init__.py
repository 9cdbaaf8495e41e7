"""From a scan to a score: the closest normal slice, how unusual the difference is, and what is written of it.

    from ct.read import find_scans, read_scan
    from detect import Projector, load_bundle

    projector = Projector(load_bundle("models/head-128"))
    for source in find_scans("scans"):
        projection = projector(read_scan(source))
        print(source.scan_id, projection.score, projection.percentile)

docs/API.md tells the rest.
"""

__all__ = ["Bundle", "Projection", "Projector", "Settings", "load_bundle"]

_HOME = {"Bundle": "bundle", "load_bundle": "bundle", "Projection": "projection", "Projector": "projection",
         "Settings": "settings"}


def __getattr__(name: str):
    # At first use: the report and the tables need no networks.
    if name in _HOME:
        from importlib import import_module
        return getattr(import_module(f"detect.{_HOME[name]}"), name)
    raise AttributeError(f"module 'detect' has no attribute '{name}'")
