"""Keep freed memory instead of handing it back to the system: a third of a network's time on the CPU.

Every activation of a network is a large block that lives for a moment. glibc returns blocks over 32 MB to the system
when they are freed, and each new one is mapped, zeroed and faulted in page by page. Kept, they are simply used again.
All threads then share one arena: a large block does not fit into a thread's own, and would be mapped after all.
"""

from __future__ import annotations

import contextlib
import ctypes

# mallopt's names for them (malloc.h)
MMAP_THRESHOLD, MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -3, -4, -1, -8
# Where glibc's own adaptation ends; how many blocks it maps; 0: its own number of arenas
GLIBC = {MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536, TRIM_THRESHOLD: 64 << 20, ARENA_MAX: 0}
# No block is mapped. A threshold above all blocks would do the same, but glibc before 2.35 refuses one over 32 MB
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, ARENA_MAX: 1}


def keep_freed(keep: bool = True) -> bool:
    """Keep freed memory from here on, or (keep=False) return it as glibc does. False where the C library is another.

    What a process holds afterwards is what it held at its peak, and some per cent for gaps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):          # musl, macOS; Windows takes no None
        return False
    return all([mallopt(name, value) == 1 for name, value in (KEEP if keep else GLIBC).items()])


def give_back() -> None:
    """Return what is free now to the system, even where freed memory is kept: after something large that was used once.

    Nothing happens where the C library is another.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
