"""Scores held against labels: figures with intervals, cohorts, the worklist simulation, tables and plots."""
