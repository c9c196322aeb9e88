"""Tables and plots of the rows under ``bench/results/``, as pages show them.

``specs`` declares them, ``select`` finds their rows, ``tables`` and ``pictures`` make them,
``blocks`` puts them into a Markdown file.
"""
