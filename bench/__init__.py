"""Benchmarks: ops and whole steps against their rivals, one row format for all results."""
