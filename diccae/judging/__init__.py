"""Judging: stages that read the predictions of runs, and touch neither models nor clips."""
