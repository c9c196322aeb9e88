"""``python -m ladder_kernels``: the command line."""

from __future__ import annotations

from ladder_kernels.cli import main

if __name__ == "__main__":
    main()
