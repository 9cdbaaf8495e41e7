"""From a scan to a score: the closest normal slice, how unusual the difference is, and what is written of it."""
