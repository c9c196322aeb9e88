"""A study of how well small models learn: ways of fine-tuning, compared on the same tasks.

``tasks`` holds what is learned, ``methods`` and ``bases`` how and on what, ``studies`` which trials
answer which question, ``trial`` and ``judge`` run one of them. Rows are in
``bench/results/learning.csv``; what has a row is not run again: ``python -m bench.learning run``.
"""
